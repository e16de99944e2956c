"""With whom: from what a user passes as ``group`` to the `Collective` that moves bytes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from funcavg.collectives.base import Collective
from funcavg.collectives.solo import Solo

__all__ = ["Collective", "Solo", "as_collective", "launched_ranks"]

# (variable with the number of ranks, variable that must be there too, who sets them, what to call)
_TORCH = "torch.distributed.init_process_group()"
_MPI = f"{_TORCH} (this release has no MPI transport yet)"
LAUNCHERS = [
    ("WORLD_SIZE", "RANK", "torchrun", _TORCH),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI's mpiexec", _MPI),
    ("PMI_SIZE", "PMI_RANK", "MPICH's mpiexec", _MPI),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun", _TORCH),
]


def as_collective(group: Any = None) -> Collective | None:
    """Return the `Collective` behind whatever can be passed as ``group``; None if this rank is not in it.

    ==========================================  ===========================================================
    ``group``                                   who takes part
    ==========================================  ===========================================================
    ``None``                                    torch.distributed's default group if it is initialised, else
                                                this process alone
    ``ProcessGroup``, 1-D ``DeviceMesh``        the ranks of that torch group, whatever its backend
    a `Collective`                              its ranks
    ==========================================  ===========================================================

    The same torch group gives the same collective each time. Those of funcavg count what this rank has sent in
    their attribute ``bytes_sent``.

    Raises:
        TypeError: If ``group`` is none of these.
        ValueError: If it is a destroyed process group, or a mesh of several dimensions.
        RuntimeError: If ``group`` is None and a launcher has started several ranks, but nothing connects them yet:
            averaging each rank with itself alone would go unnoticed.
    """
    torch_dist = sys.modules.get("torch.distributed")
    if torch_dist is not None and not torch_dist.is_available():
        torch_dist = None
    if group is None:
        if torch_dist is not None and torch_dist.is_initialized():
            group = torch_dist.group.WORLD
        else:
            _guard_against_silent_solo(os.environ)
            return Solo()
    if torch_dist is not None and _is_torch_group(group, torch_dist):
        from funcavg.collectives.torch import collective_of

        return collective_of(group)
    if isinstance(group, type):
        raise TypeError(f"average: group is a class, {group!r}; pass an instance of it")
    if isinstance(group, Collective):
        if not 0 <= group.rank < group.size:
            raise ValueError(f"average: group {group!r} has rank {group.rank} of size {group.size}")
        return group
    raise _rejection(group)


def _is_torch_group(group: Any, torch_dist: Any) -> bool:
    kinds: tuple[type, ...] = (torch_dist.ProcessGroup,)
    if (mesh := sys.modules.get("torch.distributed.device_mesh")) is not None:
        kinds = (*kinds, mesh.DeviceMesh)
    outside = type(group) is int and group == torch_dist.GroupMember.NON_GROUP_MEMBER
    return outside or isinstance(group, kinds)


def _rejection(group: Any) -> TypeError:
    if isinstance(group, str) or (isinstance(group, tuple) and group and all(isinstance(n, str) for n in group)):
        return TypeError(f"average: group={group!r}: JAX axis names are not supported yet")
    if type(group).__module__.partition(".")[0] == "mpi4py":
        return TypeError(f"average: group={group!r}: mpi4py communicators are not supported yet")
    missing = [name for name in ("rank", "size", "gather", "exchange", "share") if not hasattr(group, name)]
    if len(missing) < 3:
        return TypeError(
            f"average: group {group!r} of type {type(group).__name__} is no Collective: it lacks {missing}"
        )
    shown = repr(group)
    return TypeError(
        f"average: group must be None, a torch.distributed ProcessGroup, a 1-D DeviceMesh or a funcavg.Collective, got "
        f"{shown if len(shown) <= 80 else shown[:77] + '...'} of type {type(group).__name__}"
    )


def _guard_against_silent_solo(environ: Mapping[str, str]) -> None:
    launched = launched_ranks(environ)
    alone = "If each process is to be on its own, pass group=funcavg.collectives.Solo()."
    if launched is not None:
        ranks, launcher, call = launched
        raise RuntimeError(
            f"average: group=None, but {launcher} has started {ranks} ranks and nothing connects them yet. First call "
            f"{call}. {alone}"
        )
    jax = sys.modules.get("jax")
    if jax is not None and getattr(jax.distributed, "is_initialized", bool)() and jax.process_count() > 1:
        raise RuntimeError(
            f"average: group=None, but jax.distributed runs {jax.process_count()} processes, which funcavg cannot "
            f"reach by itself. Pass a group. {alone}"
        )


def launched_ranks(environ: Mapping[str, str]) -> tuple[int, str, str] | None:
    """Read a launcher's environment: (number of ranks, launcher, what to call), None for a single process.

    >>> launched_ranks({"WORLD_SIZE": "2", "RANK": "0"})
    (2, 'torchrun', 'torch.distributed.init_process_group()')
    >>> launched_ranks({"SLURM_NTASKS": "8"})  # an allocation, not a step: this is the batch script itself
    """
    for size, rank, launcher, call in LAUNCHERS:
        if environ.get(size, "").isdigit() and int(environ[size]) > 1 and environ.get(rank, "").isdigit():
            return int(environ[size]), launcher, call
    return None

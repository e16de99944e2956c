"""Blocks of consecutive ranks: the smaller groups of a hierarchy."""

from __future__ import annotations

import sys
import weakref
from datetime import timedelta
from typing import Any

from funcavg.collectives import as_collective, default_group
from funcavg.collectives.solo import Solo

__all__ = ["block_of"]


def block_of(group: Any, size: int) -> Any:
    """Return the group of ``size`` consecutive ranks of ``group`` that this rank is one of. Collective."""
    group = default_group() if group is None else group
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and isinstance(group, dist.ProcessGroup) and type(group) is not dist.ProcessGroup:
        raise TypeError(
            f"hierarchical: group is a {type(group).__name__}, whose ranks may be others at any time: numbers of them "
            f"make no lasting groups. Map periods to groups instead."
        )
    collective = as_collective(group)
    if collective is None:
        return group
    if isinstance(size, bool) or size < 1 or collective.size % size:
        raise ValueError(
            f"hierarchical: a block must hold a number of ranks that divides the {collective.size} ranks of its group, "
            f"got {size!r}"
        )
    if size == collective.size:
        return group
    if size == 1:
        return Solo()
    made = _MADE.setdefault(collective, {})  # once: a job may make many averagers
    if size not in made:
        first = collective.rank // size * size
        made[size] = _make(group, collective, range(first, first + size))
    return made[size]


_MADE: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()


def _make(group: Any, collective: Any, members: range) -> Any:
    if hasattr(collective, "block"):
        return collective.block(members)
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and isinstance(group, mpi.Comm):
        return group.Split(members.start, collective.rank)
    dist: Any = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available():
        mesh = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", ())
        group = group.get_group() if isinstance(group, mesh) else group
        if isinstance(group, dist.ProcessGroup):
            ranks = dist.get_process_group_ranks(group)
            seconds = collective.default_timeout  # else the block would have torch's default, not its parent's
            timeout = None if seconds is None else timedelta(seconds=seconds)
            block = [ranks[member] for member in members]
            return dist.new_group(block, timeout=timeout, use_local_synchronization=True)
    raise TypeError(
        f"hierarchical: numbers of ranks need a torch process group, an mpi4py communicator or the group of run_ranks, "
        f"got {group!r}. Map periods to groups instead."
    )

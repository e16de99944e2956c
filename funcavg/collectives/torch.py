"""Ranks of a torch.distributed process group.

Host memory goes over a Gloo group of our own, built over the store of the user's group: our traffic never mixes with
the group's own, whatever its backend is. Rows travel point to point. (Measured on two cores, two ranks, 102 MB:
exchange and share by sends and receives take 80 ms, Gloo's own all-reduce 100 ms, its all-to-all and all-gather 125 ms.
So there is no native all-reduce here, and host leaves keep the tight accuracy bound.)

Accelerator memory goes over the group itself if it is NCCL's (`nccl.py`). What blocks inside a library is done in a
thread of our own while the main thread waits for it, so that signal handlers run (`waiting.py`).

Of any class but torch's own, a group may be configured anew at any time, and has no store that all its ranks know:
`borrowed.py`.
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from funcavg._errors import PeerLostError
from funcavg.collectives.base import Pending
from funcavg.collectives.borrowed import BorrowedCollective
from funcavg.collectives.connecting import connect
from funcavg.collectives.nccl import DeviceVerbs, device_route
from funcavg.collectives.rows import Ways
from funcavg.collectives.tagged import TaggedRows, close_connections
from funcavg.collectives.waiting import LINGER, Waiter

__all__ = ["BorrowedCollective", "DeviceVerbs", "TorchCollective", "collective_of", "device_route"]


def collective_of(group: Any) -> TorchCollective | BorrowedCollective | None:
    """Return the collective of a ProcessGroup or 1-D DeviceMesh, or None if this rank is not in it.

    Raises:
        PeerLostError: If it is a group that is configured anew, and not connected now.
    """
    mesh_type = getattr(dist.device_mesh, "DeviceMesh", None) if dist.is_available() else None
    if mesh_type is not None and isinstance(group, mesh_type):
        if group.ndim != 1:
            names = group.mesh_dim_names or tuple(range(group.ndim))
            raise ValueError(
                f"average: group must be a 1-D DeviceMesh, got {group.ndim} dimensions of shape {tuple(group.shape)}. "
                f"Pass one of them, such as mesh[{names[0]!r}]."
            )
        if group.get_coordinate() is None:
            return None
        group = group.get_group()
    if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
        return None
    collective = _COLLECTIVES.get(group)
    if type(group) is dist.ProcessGroup and group not in _known_groups():
        _COLLECTIVES.pop(group, None)
        raise ValueError(
            f"average: this process group is not registered with torch.distributed (has it been destroyed?): "
            f"{group!r}. Make a new one with init_process_group or new_group."
        )
    if isinstance(collective, BorrowedCollective):
        collective.look()
    elif collective is None and type(group) is not dist.ProcessGroup:
        collective = _COLLECTIVES[group] = BorrowedCollective(group)
    elif collective is None:
        if group.size() > 1 and dist.get_backend(group) == "fake":
            raise ValueError(
                f"average: the backend of this group is torch's 'fake', which moves nothing: rank {group.rank()} has "
                f"none of the {group.size() - 1} other ranks to average with. To try a program alone, pass "
                f"group=funcavg.collectives.Solo(); for several ranks in one process, use funcavg.testing.run_ranks."
            )
        collective = _COLLECTIVES[group] = TorchCollective(group, _known_groups()[group][1])
    return collective


_COLLECTIVES: weakref.WeakKeyDictionary[Any, TorchCollective | BorrowedCollective] = weakref.WeakKeyDictionary()


def _known_groups() -> dict[Any, Any]:
    """Return {group: (backend, store)}. Private to torch; tested with release 2.13."""
    groups: dict[Any, Any] = dist.distributed_c10d._world.pg_map
    return groups


def _timeout_of(group: Any) -> float | None:
    """Return a group's timeout unless torch would have chosen it. Partly private to torch; tested with release 2.13."""
    try:
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(",") if ":" in part)
        private: Any = dist.distributed_c10d
        # Where all is NCCL's, it is NCCL's; a group that also serves the host has the general one.
        default = private._get_default_timeout("nccl" if set(backends.values()) == {"nccl"} else "gloo")
        timeouts = [group._get_backend(torch.device(kind)).options._timeout for kind in backends]
    except (AttributeError, RuntimeError, TypeError, ValueError):  # destroyed, or a release or a backend without it
        return None
    return next((float(timeout.total_seconds()) for timeout in timeouts if timeout != default), None)


class TorchCollective(TaggedRows):
    """One rank of a torch process group. Made at the first call on a group, which all its ranks make."""

    stops_on_error = True  # `abort` closes the connections

    def __init__(self, group: Any, store: Any) -> None:
        super().__init__()
        self.rank, self.size = group.rank(), group.size()
        self.on_device = 0  # collectives under way there
        # A weak reference: the cache is keyed by the group, and must not keep it alive.
        self._group, self._store = weakref.ref(group), store
        self._gloo: Any = None
        self._old: Any = None  # what it was before `renew`
        self._given_up = threading.Event()
        self.connected_on_device = False
        self.waiter = Waiter()

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of a torch process group>"

    @property
    def default_timeout(self) -> float | None:
        """The group's own timeout in seconds, if its user has set one; None if it is torch's default, or unknown."""
        group = self._group()
        return None if group is None else _timeout_of(group)

    def abort(self) -> None:
        """Close the connections, so that nothing more arrives here and nobody waits in vain. The group is spent.

        The user's own NCCL communicator, too, if something of ours is under way on it: it would never end, or meet
        the peers at another place.
        """
        self._given_up.set()
        if self._gloo is not None:
            close_connections(self._gloo, self._peers())
        self._gloo = None  # not sooner: a signal may break this off, and then it is done again
        group, on_device, self.on_device = self._group(), self.on_device, 0
        if on_device and group is not None:
            nccl: Any = group._get_backend(torch.device("cuda"))
            if hasattr(nccl, "abort"):  # older torch's watchdog ends the process, after the group's own timeout
                nccl.abort()

    def renew(self, _: Any) -> None:
        """Connect anew at the next call, which all ranks make. Only then is nobody reading from the old connections."""
        self._old, self._gloo = self._gloo, None
        self.renumber()
        self._given_up = threading.Event()

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Start sends and receives."""
        finish = self.start(self._connected(timeout), send, receive, timeout, channel=channel)
        # Not cut into short waits, between which handlers would run: the first that ends closes the connections.
        return partial(self.waiter.run, finish, self.abort)

    def _connected(self, timeout: float) -> Any:
        """Return the Gloo group of our own; make it with the other ranks at the first call."""
        if self._given_up.is_set():
            raise PeerLostError(f"{self.me()} has given up.")
        if self._gloo is None:
            meet = partial(connect, self._store, self.rank, self.size, timeout, self._given_up)
            self._gloo, self._old = self.waiter.run(meet, self.abort, linger=LINGER), None
        return self._gloo

    def device_verbs(self, device_type: str) -> DeviceVerbs | None:
        """Return the way for leaves in an accelerator's memory, or None if they go through the host."""
        group = self._group()
        if group is None:
            return None
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(",") if ":" in part)
        route = device_route(backends.get(device_type), "float32", weighted=False)
        return None if route == "host" else DeviceVerbs(group, self)

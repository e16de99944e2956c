"""Ranks of a torch.distributed process group.

Host memory goes over a Gloo group of our own, built over the store of the user's group: our traffic never mixes with
the group's own, whatever its backend is. Rows travel point to point. (Measured on two cores, two ranks, 102 MB:
exchange and share by sends and receives take 80 ms, Gloo's own all-reduce 100 ms, its all-to-all and all-gather 125 ms.
So there is no native all-reduce here, and host leaves keep the tight accuracy bound.)

Accelerator memory goes over the group itself if it is NCCL's, in the caller's thread: float32 and float64 by its native
average, narrower floats by exchange, because a ring would round them at every hop. The host waits for the end of each.

A process group that torch does not know (torchft's, for one) has no store and cannot be duplicated. Then its own
sends and receives are used, in the caller's thread.
"""

from __future__ import annotations

import itertools
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from funcavg._device import Mark
from funcavg._errors import PeerLostError
from funcavg.collectives.base import Pending
from funcavg.collectives.rows import Patience, Rows, Ways

__all__ = ["DeviceVerbs", "TorchCollective", "collective_of", "device_route"]


def collective_of(group: Any) -> TorchCollective | None:
    """Return the collective of a ProcessGroup or 1-D DeviceMesh, or None if this rank is not in it."""
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
    if collective is None:
        collective = _COLLECTIVES[group] = TorchCollective(group)
    return collective


_COLLECTIVES: weakref.WeakKeyDictionary[Any, TorchCollective] = weakref.WeakKeyDictionary()


def _known_groups() -> dict[Any, Any]:
    """Return {group: (backend, store)}. Private to torch; tested with release 2.13."""
    groups: dict[Any, Any] = dist.distributed_c10d._world.pg_map
    return groups


class TorchCollective(Rows):
    """One rank of a torch process group. Made at the first call on a group, which all its ranks make."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.bytes_sent = 0
        self.on_device = 0  # collectives under way there
        _, store = _known_groups().get(group, (None, None))
        self.in_callers_thread = store is None
        # A weak reference: the cache is keyed by the group, and must not keep it alive.
        self._group, self._store = weakref.ref(group), store
        self._gloo: Any = None
        self._tags = itertools.count(), itertools.count()  # of the group's transfers, and of channels'

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of a torch process group>"

    @property
    def stops_on_error(self) -> bool:
        """Whether nothing arrives any more once a verb has raised: `abort` closes the connections."""
        return not self.in_callers_thread

    def abort(self) -> None:
        """Close the connections, so that nothing more arrives here and no peer waits in vain. The group is spent.

        The user's own NCCL communicator, too, if something of ours is under way on it: it would never end, or meet
        the peers at another place.
        """
        gloo, self._gloo = self._gloo, None
        if gloo is not None and hasattr(gloo, "abort"):  # older torch closes them when the last reference goes
            gloo.abort()
        group, on_device, self.on_device = self._group(), self.on_device, 0
        if on_device and group is not None:
            nccl: Any = group._get_backend(torch.device("cuda"))
            if hasattr(nccl, "abort"):  # older torch's watchdog ends the process, after the group's own timeout
                nccl.abort()

    def _connect(self, timeout: float) -> Any:
        """Meet the other ranks in the store and connect to them."""
        deadline = time.monotonic() + timeout
        with self._translate_errors("for the store", timeout):
            # A connection of our own: whoever waits in a store keeps the rest of the process out of it.
            own = self._store.clone()
            # Counted per rank, so that a group made anew over an old store does not find the addresses of the last.
            made = own.add(f"funcavg/made/{self.rank}", 1)
            store: Any = dist.distributed_c10d.PrefixStore(f"funcavg/{made}", own)
            keys = [f"here/{rank}" for rank in range(self.size)]
            store.set(keys[self.rank], "1")
            nap = 1e-3
            while not store.check(keys):
                if time.monotonic() > deadline:
                    missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
                    raise PeerLostError(
                        f"rank {self.rank} of {self.size} waited {timeout:g} s for rank(s) {missing}, which never "
                        f"called average on this group."
                    )
                time.sleep(nap)
                nap = min(2 * nap, 0.05)
        left = max(deadline - time.monotonic(), 1.0)
        with self._translate_errors("to connect", left):
            return dist.ProcessGroupGloo(store, self.rank, self.size, timedelta(seconds=left))

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Start sends and receives."""
        if self._gloo is None and not self.in_callers_thread:
            self._gloo = self._connect(timeout)
        group: Any = self._group() if self.in_callers_thread else self._gloo
        tag = (next(self._tags[channel]) & 0xFFFF) + (channel << 16)
        with self._translate_errors("to start a transfer", timeout):
            works = [(peer, group.recv([torch.from_numpy(row)], peer, tag)) for peer, row in receive]
            works += [(peer, group.send([torch.from_numpy(row)], peer, tag)) for peer, row in send]
        self.bytes_sent += sum(row.nbytes for _, row in send)

        def wait() -> None:
            # Gloo forgets a transfer's buffer only with its work, so these live until the wait is over.
            deadline = time.monotonic() + timeout
            for peer, work in works:
                with self._translate_errors(f"for rank {peer}", timeout):
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

        return wait

    @contextmanager
    def _translate_errors(self, what: str, timeout: float) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        except PeerLostError:
            raise
        except RuntimeError as error:  # torch's own, c10d's DistError among them
            waited = f"{time.monotonic() - started:.1f} s of {timeout:g} s"
            # Gloo begins with a line of its source and ends with general advice; NCCL with a rank and with a stack.
            reason = re.sub(r"^\[[^]]+\] ", "", str(error)).partition(". This is typically")[0]
            reason = reason.partition("Exception raised from")[0].rstrip(" .\n")
            raise PeerLostError(f"rank {self.rank} of {self.size} waited {what} {waited}: {reason}.") from error

    def device_verbs(self, device_type: str) -> DeviceVerbs | None:
        """Return the way for leaves in an accelerator's memory, or None if they go through the host."""
        group = self._group()
        if group is None or self.in_callers_thread:
            return None
        backends = dict(part.split(":") for part in dist.get_backend_config(group).split(",") if ":" in part)
        route = device_route(backends.get(device_type), "float32", weighted=False)
        return None if route == "host" else DeviceVerbs(group, self)


def device_route(backend: str | None, element: str, *, weighted: bool) -> str:
    """Decide how leaves of an accelerator are averaged: a pure function.

    Returns "average" (the backend's native average), "exchange" (bytes move on the device, the kernel sums there)
    or "host" (staged through host memory).

    >>> device_route("nccl", "float32", weighted=False), device_route("nccl", "bfloat16", weighted=False)
    ('average', 'exchange')
    >>> device_route("nccl", "float32", weighted=True), device_route("gloo", "float32", weighted=False)
    ('exchange', 'host')
    """
    if backend != "nccl":
        return "host"
    return "average" if element in ("float32", "float64") and not weighted else "exchange"


class DeviceVerbs:
    """Moves buckets that lie in a GPU's memory over the user's own group, which is NCCL's for them."""

    def __init__(self, group: Any, owner: TorchCollective) -> None:
        self._group, self._owner = group, owner
        self.size = owner.size

    def averages_natively(self, *, weighted: bool) -> frozenset[str]:
        """Return the dtypes whose mean the backend takes itself."""
        routes = {
            name: device_route("nccl", name, weighted=weighted)
            for name in ("float32", "float64", "float16", "bfloat16")
        }
        return frozenset(name for name, route in routes.items() if route == "average")

    def average(self, tensor: Any, timeout: float) -> Pending:
        """Replace the tensor by its mean over ranks."""
        self._owner.bytes_sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.AVG
        return self._under_way(lambda: self._group.allreduce([tensor], options), tensor.device, timeout)

    def exchange(self, send: Any, receive: Any, timeout: float) -> Pending:
        """As `Collective.exchange`, with tensors."""
        self._owner.bytes_sent += (self.size - 1) * send.nbytes // self.size
        start = partial(dist.all_to_all_single, receive, send, group=self._group, async_op=True)
        return self._under_way(start, send.device, timeout)

    def share(self, buffer: Any, timeout: float) -> Pending:
        """As `Collective.share`, with tensors."""
        self._owner.bytes_sent += (self.size - 1) * buffer[0].nbytes
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # before torch 2.13
        start = partial(gather, buffer.view(-1), buffer[self._owner.rank], group=self._group, async_op=True)
        return self._under_way(start, buffer.device, timeout)

    def _under_way(self, start: Callable[[], Any], device: Any, timeout: float) -> Pending:
        owner, packed = self._owner, Mark([device])
        owner.on_device += 1
        with owner._translate_errors("to start NCCL", timeout):
            work = start()

        def wait() -> None:
            packed.synchronize()  # what this rank itself has queued before is not waiting for others
            patience = Patience(timeout)
            with owner._translate_errors("for NCCL", timeout):
                while not work.is_completed():
                    if patience.pause() and patience.is_over():
                        waited = f"{patience.waited:.1f} s of {timeout:g} s"
                        raise PeerLostError(f"rank {owner.rank} of {owner.size} waited {waited} for NCCL.")
                work.wait(timedelta(milliseconds=1))  # is over: raises what has failed, else the stream need not wait
            owner.on_device -= 1

        return wait

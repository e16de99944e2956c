"""Leaves in a GPU's memory over the user's own group, which is NCCL's for them.

float32 and float64 go by NCCL's native average, narrower floats by exchange, because a ring would round them at every
hop. The host waits for the end of each. All is done in the caller's thread, but for what may block inside a library:
the first collective, in which NCCL connects, and the wait for the caller's own stream.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from funcavg._device import Mark, in_stream_of_here
from funcavg._errors import PeerLostError
from funcavg.collectives.base import Pending
from funcavg.collectives.connecting import translate_errors
from funcavg.collectives.rows import Patience
from funcavg.collectives.waiting import LINGER

__all__ = ["DeviceVerbs", "device_route"]


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

    def __init__(self, group: Any, owner: Any) -> None:
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

    def broadcast(self, buffer: Any, root: int, timeout: float) -> Pending:
        """Replace the tensor by that of rank ``root``."""
        self._owner.bytes_sent += buffer.nbytes  # in a ring, whose last rank sends nothing
        options: Any = dist.BroadcastOptions()
        options.rootRank = root
        return self._under_way(lambda: self._group.broadcast([buffer], options), buffer.device, timeout)

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
        me = f"rank {owner.rank} of {owner.size}"
        owner.on_device += 1

        def begin() -> Any:
            with translate_errors(me, "to start NCCL", timeout):
                return start()

        if owner.connected_on_device:
            work = begin()
        else:
            work = owner.waiter.run(in_stream_of_here(begin, device), owner.abort, linger=LINGER)
        owner.connected_on_device = True

        def wait() -> None:
            # What this rank itself has queued before is not waiting for others.
            owner.waiter.run(packed.synchronize, owner.abort, linger=LINGER)
            patience = Patience(timeout)

            def is_completed() -> bool:
                with translate_errors(me, "for NCCL", timeout):
                    return bool(work.is_completed())

            while not is_completed():
                if patience.pause() and patience.is_over():  # where handlers run: what they raise is nobody's loss
                    waited = f"{patience.waited:.1f} s of {timeout:g} s"
                    raise PeerLostError(f"{me} waited {waited} for NCCL.")
            with translate_errors(me, "for NCCL", timeout):
                work.wait(timedelta(milliseconds=1))  # is over: raises what has failed, else the stream need not wait
            owner.on_device -= 1

        return wait

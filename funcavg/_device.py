"""Accelerators: their streams, and memory for buckets there.

A stream does its work in order. What is queued on another one, by another thread or by this one later, must wait for
it. Drawn for the buckets of a group, which two calls use::

    stream a    pack ─ move ─ unpack │ mark
    stream b                         └─────► pack ─ move ─ unpack
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["DEVICE_AHEAD", "DEVICE_BUCKET", "DeviceSlots", "Mark", "current_stream", "device_memory"]

DEVICE_AHEAD = 1  # one bucket on its way keeps the streams busy
DEVICE_BUCKET = 32 << 20  # bytes; each collective costs a launch. Provisional: measured by two ranks on one GPU


def current_stream(device: Any) -> Any:
    """Return the current stream of a device, torch's or its name; None for the host, and where there are no streams."""
    import torch

    kind = torch.device(device).type
    of_kind: Any = getattr(torch, kind, None)
    return of_kind.current_stream(device) if kind != "cpu" and hasattr(of_kind, "current_stream") else None


class Mark:
    """A place in the current streams of some devices."""

    def __init__(self, devices: Iterable[Any]) -> None:
        streams = [(device, current_stream(device)) for device in devices]
        self._events = [(device, stream.record_event()) for device, stream in streams if stream is not None]

    def wait(self) -> None:
        """Let what is queued from now on, on the streams now current, come after this place."""
        for device, event in self._events:
            current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Let the host wait until the streams have come to this place."""
        for _, event in self._events:
            event.synchronize()


class DeviceSlots:
    """The memory of buckets in flight on one device (torch's name of it), kept for later calls on whatever streams."""

    def __init__(self, device: str) -> None:
        self._device, self._last_use = device, Mark([])
        self._mine: list[Any] = [None] * (2 * DEVICE_AHEAD + 1)
        self._theirs: list[Any] = [None] * (DEVICE_AHEAD + 1)

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, None, Any]:
        """As `funcavg._buckets.Slots.lend`, but for what arrives: see `theirs`."""
        mine = self._slot(self._mine, number)[: rows * nbytes].reshape(rows, nbytes)
        return mine, None, mine

    def theirs(self, number: int, shape: tuple[int, int]) -> Any:
        """Return memory for the rows of others, which a bucket needs while it is exchanged."""
        return self._slot(self._theirs, number)[: shape[0] * shape[1]].reshape(shape)

    def _slot(self, memory: list[Any], number: int) -> Any:
        slot = number % len(memory)
        if memory[slot] is None:
            memory[slot] = device_memory(self._device, DEVICE_BUCKET)
        return memory[slot]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Come after what the last call has queued; after an error there is no next one."""
        self._last_use.wait()
        stream = current_stream(self._device)
        for memory in [*self._mine, *self._theirs]:
            if memory is not None and stream is not None:  # once it is freed, others get it only after this stream
                memory.record_stream(stream)
        yield
        self._last_use = Mark([self._device])


def device_memory(device: str, nbytes: int) -> Any:
    """Return fresh bytes on a device."""
    import torch

    with torch.inference_mode(mode=False):  # they may outlive the call
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

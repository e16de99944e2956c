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
DEVICE_BUCKET = 32 << 20  # bytes; every collective costs a launch


def current_stream(device: Any) -> Any:
    """Return the current stream of a device, torch's or its name; None for the host, and where there are no streams."""
    import torch

    kind = torch.device(device).type
    of_kind: Any = getattr(torch, kind, None)
    return of_kind.current_stream(device) if kind != "cpu" and hasattr(of_kind, "current_stream") else None


class Mark:
    """A place in the current streams of some devices. Nothing is waited for here: streams wait for streams."""

    def __init__(self, devices: Iterable[str]) -> None:
        streams = [(device, current_stream(device)) for device in devices]
        self._events = [(device, stream.record_event()) for device, stream in streams if stream is not None]

    def wait(self) -> None:
        """Let what is queued from now on, on the streams now current, come after this place."""
        for device, event in self._events:
            current_stream(device).wait_event(event)


class DeviceSlots:
    """The memory of buckets in flight on one device (torch's name of it), kept for later calls on whatever streams.

    Only `mine`. What arrives from others is put into memory of torch's allocator, which costs little on a device.
    """

    def __init__(self, device: str) -> None:
        self._device, self._last_use = device, Mark([])
        self._memory: list[Any] = [None] * (2 * DEVICE_AHEAD + 1)

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, None, Any]:
        """As `funcavg._buckets.Slots.lend`."""
        slot = number % len(self._memory)
        if self._memory[slot] is None:
            self._memory[slot] = device_memory(self._device, DEVICE_BUCKET)
        mine = self._memory[slot][: rows * nbytes].reshape(rows, nbytes)
        return mine, None, mine

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Come after what the last call has queued."""
        self._last_use.wait()
        yield
        self._last_use = Mark([self._device])


def device_memory(device: str, nbytes: int) -> Any:
    """Return fresh bytes on a device."""
    import torch

    with torch.inference_mode(mode=False):  # they may outlive the call
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

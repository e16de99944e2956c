"""Memory for buckets on an accelerator.

Two calls on a group use the same buckets, maybe on two streams, of which the second waits for the first::

    stream a    pack ─ move ─ unpack │ mark
    stream b                         └─────► pack ─ move ─ unpack
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from funcavg import _device
from funcavg._device import Mark, device_memory

__all__ = ["DEVICE_AHEAD", "DEVICE_BUCKET", "DeviceSlots"]

DEVICE_AHEAD = 1  # one bucket on its way keeps the streams busy
DEVICE_BUCKET = 32 << 20  # bytes; each collective costs a launch. Provisional: measured by two ranks on one GPU


class DeviceSlots:
    """The memory of buckets in flight on one device (torch's name of it), kept for later calls on whatever streams."""

    apart = False  # each collective costs a launch: buckets are filled

    def __init__(self, device: str) -> None:
        self._device, self._last_use = device, Mark([])
        self._mine: list[Any] = [None] * (2 * DEVICE_AHEAD + 1)
        self._theirs: list[Any] = [None] * (DEVICE_AHEAD + 1)

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, None, Any]:
        """As `funcavg._engine.buckets.Slots.lend`, but for what arrives: see `theirs`."""
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
        stream = _device.current_stream(self._device)
        for memory in [*self._mine, *self._theirs]:
            if memory is not None and stream is not None:  # once it is freed, others get it only after this stream
                memory.record_stream(stream)
        yield
        self._last_use = Mark([self._device])

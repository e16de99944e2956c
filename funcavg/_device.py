"""Accelerators: their streams, and memory there.

A stream does its work in order. What is queued on another one, by another thread or later, must wait for it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["Mark", "current_stream", "device_memory", "in_stream_of_here", "side_streams", "use_here"]

T = TypeVar("T")


def current_stream(device: Any) -> Any:
    """Return the current stream of a device, torch's or its name; None for the host, and where there are no streams."""
    import torch

    kind = torch.device(device).type
    of_kind: Any = getattr(torch, kind, None)
    return of_kind.current_stream(device) if kind != "cpu" and hasattr(of_kind, "current_stream") else None


def in_stream_of_here(call: Callable[[], T], device: Any) -> Callable[[], T]:
    """Return the call for another thread to make, in this thread's current stream of a device."""
    stream = current_stream(device)
    if stream is None:
        return call
    import torch

    of_kind: Any = getattr(torch, torch.device(device).type)

    def there() -> T:
        with of_kind.device(device), of_kind.stream(stream):
            return call()

    return there


@contextlib.contextmanager
def side_streams(devices: Iterable[Any]) -> Iterator[None]:
    """Queue on other streams of some devices, beside all that is computed there; at the end, wait for them."""
    import torch

    devices = [device for device in devices if current_stream(device) is not None]
    with contextlib.ExitStack() as stack:
        for device in devices:
            of_kind: Any = getattr(torch, torch.device(device).type)
            stack.enter_context(of_kind.stream(_side_stream(device)))
        try:
            yield
        finally:  # nothing reads or writes memory that others get
            Mark(devices).synchronize()


@functools.cache
def _side_stream(device: Any) -> Any:
    """Return one stream for all that goes on in the background: memory is kept for each stream that had some."""
    import torch

    of_kind: Any = getattr(torch, torch.device(device).type)
    return of_kind.Stream(device)


def use_here(tensors: Iterable[Any]) -> None:
    """Let memory that other streams have made be given to others only after what is queued on those of here."""
    for tensor in tensors:
        if (stream := current_stream(tensor.device)) is not None:
            tensor.record_stream(stream)


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


def device_memory(device: str, nbytes: int) -> Any:
    """Return fresh bytes on a device."""
    import torch

    with torch.inference_mode(mode=False):  # they may outlive the call
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

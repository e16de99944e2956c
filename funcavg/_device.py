"""Accelerators: their streams, and memory there.

A stream does its work in order. What is queued on another one, by another thread or later, must wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Mark", "current_stream", "device_memory"]


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


def device_memory(device: str, nbytes: int) -> Any:
    """Return fresh bytes on a device."""
    import torch

    with torch.inference_mode(mode=False):  # they may outlive the call
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

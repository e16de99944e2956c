"""This process alone: the mean of one."""

from __future__ import annotations

from funcavg.collectives.base import Buffer

__all__ = ["Solo"]


class Solo:
    """A group of one rank. Nothing is communicated."""

    rank = 0
    size = 1
    bytes_sent = 0

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Return the payload."""
        return [payload]

    def exchange(self, send: Buffer, receive: Buffer, timeout: float) -> None:
        """Do nothing: there is nobody to exchange with."""

    def share(self, buffer: Buffer, timeout: float) -> None:
        """Do nothing: there is nobody to share with."""

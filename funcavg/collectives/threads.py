"""Ranks as threads of one process, for tests and simulations (see `funcavg.testing.run_ranks`).

A verb is two meetings::

    every rank posts its buffer ── all meet ── every rank copies what is meant for it ── all meet ── buffers are free
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from funcavg._errors import PeerLostError
from funcavg.collectives.base import Buffer

__all__ = ["Meeting", "Threads"]


class Meeting:
    """Where the threads of one group meet: posted buffers, and a barrier that knows who is missing."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.posts: list[Any] = [None] * size
        self._arrived = [0] * size  # meetings that each rank has come to
        self._gone: dict[int, str] = {}  # ranks that will come to no more meetings, and why
        self._changed = threading.Condition()
        self._blocks: dict[range, Meeting] = {}

    def leave(self, rank: int, why: str) -> None:
        """Say that a rank comes no more, so that nobody waits for it, here or among some of the ranks."""
        with self._changed:
            self._gone.setdefault(rank, why)  # the first reason is the cause
            self._changed.notify_all()
            blocks = [(members, block) for members, block in self._blocks.items() if rank in members]
        for members, block in blocks:
            block.leave(members.index(rank), why)

    def block(self, members: range) -> Meeting:
        """Return where some of the ranks meet."""
        with self._changed:
            if members not in self._blocks:
                self._blocks[members] = Meeting(len(members))
            gone = {rank: why for rank, why in self._gone.items() if rank in members}
            block = self._blocks[members]
        for rank, why in gone.items():
            block.leave(members.index(rank), why)
        return block

    def meet(self, rank: int, timeout: float) -> None:
        """Wait until every rank has come as often as this one."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._arrived[rank] += 1
            self._changed.notify_all()
            while missing := [r for r in range(self.size) if self._arrived[r] < self._arrived[rank]]:
                gone = next((r for r in missing if r in self._gone), None)
                if gone is not None:
                    raise PeerLostError(f"rank {rank} of {self.size} waits for rank {gone}, which {self._gone[gone]}.")
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    self._gone[rank] = "gave up waiting"
                    self._changed.notify_all()
                    raise PeerLostError(
                        f"rank {rank} of {self.size} waited {timeout:g} s for rank(s) {', '.join(map(str, missing))}."
                    )


class Threads:
    """One rank of a group of threads."""

    stops_on_error = True  # every thread writes to its own buffers only
    is_of_threads = True  # which share what a framework has once for a process

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.size = rank, meeting.size
        self.bytes_sent = 0
        self._meeting = meeting

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} threads>"

    def block(self, members: range) -> Threads:
        """Return this rank's place among some of the ranks."""
        return Threads(members.index(self.rank), self._meeting.block(members))

    def _swap(self, post: Any, timeout: float) -> list[Any]:
        self._meeting.posts[self.rank] = post
        self._meeting.meet(self.rank, timeout)
        return list(self._meeting.posts)

    def abort(self) -> None:
        """Let nobody wait for this rank."""
        self._meeting.leave(self.rank, "has failed in the middle of a call")

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Return every rank's payload."""
        payloads = self._swap(payload, timeout)
        self._meeting.meet(self.rank, timeout)
        self.bytes_sent += len(payload) * (self.size - 1)
        return payloads

    def exchange(self, send: Buffer, receive: Buffer, timeout: float) -> None:
        """Read this rank's row of everyone's ``send``."""
        for peer, theirs in enumerate(self._swap(send, timeout)):
            if peer != self.rank:
                np.copyto(receive[peer], theirs[self.rank])
        self._meeting.meet(self.rank, timeout)
        self.bytes_sent += send.nbytes - send[self.rank].nbytes

    def share(self, buffer: Buffer, timeout: float) -> None:
        """Read everyone's own row."""
        for peer, theirs in enumerate(self._swap(buffer, timeout)):
            if peer != self.rank:
                np.copyto(buffer[peer], theirs[peer])
        self._meeting.meet(self.rank, timeout)
        self.bytes_sent += buffer[self.rank].nbytes * (self.size - 1)

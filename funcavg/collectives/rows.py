"""The three verbs by sends and receives, for transports whose one primitive is point to point.

Rows go first to the next rank, then to the one after it, and so on: nobody is everyone's first.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from funcavg.collectives.base import Buffer, Pending

__all__ = ["Channel", "Patience", "Rows"]

YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))
Ways = Sequence[tuple[int, Any]]  # (peer, flat bytes)


class Rows:
    """One rank that moves rows by `transfer`."""

    rank: int
    size: int
    bytes_sent: int  # by this rank, to others
    advice = ""  # for whoever has lost a peer

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Start to send and to receive; return what waits for the end.

        Transfers between two ranks match in the order of their starts, those of channels apart from the others.
        """
        raise NotImplementedError

    def progress(self) -> None:
        """Let the transport work on what others have under way with this rank, while it waits for something else."""

    def among(self, ranks: Sequence[int]) -> Rows:
        """Return the collective of some of the ranks, this one among them. A rank is in one such collective at most."""
        return Channel(self, ranks)

    def _peers(self) -> list[int]:
        return [(self.rank + distance) % self.size for distance in range(1, self.size)]

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Send the payload to all and receive theirs."""
        rows = np.empty((self.size, len(payload)), np.uint8)
        rows[self.rank] = np.frombuffer(payload, np.uint8)
        self.share(rows, timeout)()
        return [row.tobytes() for row in rows]

    def exchange(self, send: Buffer, receive: Buffer, timeout: float) -> Pending:
        """Send each peer its row."""
        peers = self._peers()
        return self.transfer([(p, send[p]) for p in peers], [(p, receive[p]) for p in reversed(peers)], timeout)

    def share(self, buffer: Buffer, timeout: float) -> Pending:
        """Send all peers this rank's row."""
        peers = self._peers()
        mine = buffer[self.rank]
        return self.transfer([(p, mine) for p in peers], [(p, buffer[p]) for p in reversed(peers)], timeout)

    def scatter(self, buffer: Buffer, root: int, timeout: float) -> Pending:
        """Let ``root`` send each rank the row of that number, and its own row, which it alone has, to all."""
        if self.rank != root:
            return self.transfer([], [(root, buffer[self.rank]), (root, buffer[root])], timeout)
        peers = self._peers()
        return self.transfer([(p, row) for p in peers for row in (buffer[p], buffer[root])], [], timeout)

    def share_scattered(self, buffer: Buffer, root: int, timeout: float) -> Pending | None:
        """Send this rank's row to all but ``root``, which has it; receive theirs."""
        peers = [peer for peer in self._peers() if peer != root]
        if self.rank == root or not peers:
            return None
        mine = buffer[self.rank]
        return self.transfer([(p, mine) for p in peers], [(p, buffer[p]) for p in reversed(peers)], timeout)


class Renewable:
    """A transport of funcavg's own that can begin anew. Its hooks are looked for by this class, not by their names."""

    tells_nothing = False  # whether it may have come to join other ranks and does not know

    def begin(self) -> None:
        """Take the ranks as they are now, for one call; raise PeerLostError if that cannot be."""

    def end(self) -> None:
        """The call is over."""

    def confirm(self, timeout: float) -> TypeError | None:
        """Make sure that all ranks are in one configuration; return what all are to raise."""
        return None

    def renew(self, group: Any) -> None:
        """Begin anew at the next call, which all ranks make. One of the call before may not be over on other ranks."""


class Channel(Rows):
    """Some ranks of a group: what joins one rank of every node. The group's transport counts what is sent."""

    def __init__(self, whole: Rows, ranks: Sequence[int]) -> None:
        self._whole, self._ranks = weakref.ref(whole), ranks  # weak: the whole's session keeps its channels
        self.rank, self.size = ranks.index(whole.rank), len(ranks)

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = True) -> Pending:
        """Let the whole group's transport do it."""
        whole, ranks = self._whole(), self._ranks
        assert whole is not None
        return whole.transfer(
            [(ranks[peer], row) for peer, row in send],
            [(ranks[peer], row) for peer, row in receive],
            timeout,
            channel=True,
        )


class Patience:
    """The pace of a wait that polls: at first at once, then whoever shares the processor goes first, then with naps."""

    __slots__ = ("_deadline", "_nap", "_rounds", "_started", "timeout")

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._rounds, self._nap = 0, 50e-6
        self._started = time.monotonic()
        self._deadline = self._started + timeout

    @property
    def waited(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._started

    def pause(self) -> bool:
        """Pass some time; say whether it is time to look for trouble, too."""
        self._rounds += 1
        if self._rounds <= 20:
            return False
        if self._rounds <= 200:
            YIELD()
            return False
        time.sleep(self._nap)
        self._nap = min(1.1 * self._nap, 1e-3)
        return True

    def is_over(self) -> bool:
        """Say whether the timeout has passed."""
        return time.monotonic() > self._deadline

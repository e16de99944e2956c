"""Rows over the sends and receives of a torch process group, which are matched by tags."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from funcavg._compile import outside
from funcavg.collectives.connecting import translate_errors
from funcavg.collectives.rows import Renewable, Rows, Ways

__all__ = ["SPECIAL", "TaggedRows", "close_connections"]

# A tag has 31 bits: 16 of a count, one for channels, one for what is no transfer, 13 that tell configurations apart.
CHANNEL, SPECIAL, BASE = 1 << 16, 1 << 17, 1 << 18
ALARM = SPECIAL  # that no message has


def close_connections(gloo: Any, peers: Sequence[int]) -> None:
    """Close a Gloo group's connections, so that nothing more arrives, and whoever waits, here or there, hears of it.

    Gloo's abort() leaves a thread of this process that waits there waiting. A wait that times out ends all waits; one
    for a rank that is gone fails at once instead, and ends none, so every rank is waited for.
    """
    for peer in peers:
        with contextlib.suppress(RuntimeError), outside():
            alarm = torch.from_numpy(np.empty(1, np.uint8))
            gloo.recv([alarm], peer, ALARM).wait(timedelta(milliseconds=1))
    if hasattr(gloo, "abort"):  # older torch closes them when the last reference goes
        gloo.abort()


class TaggedRows(Renewable, Rows):
    """One rank that starts transfers on a process group, and numbers them."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.renumber()

    def renumber(self, base: int = 0) -> None:
        """Count from 0 again. No message of a group that counts from another base, modulo 2**13, is taken for ours."""
        self._base = base % (1 << 13) * BASE
        # Of what has gone to and come from each peer, the group's transfers and channels' apart.
        self._sent, self._received = (defaultdict[tuple[int, bool], int](int) for _ in range(2))

    def start(self, group: Any, send: Ways, receive: Ways, timeout: float, *, channel: bool) -> Callable[[], None]:
        """Start sends and receives on a group; return what waits for their end."""

        def tag(counts: dict[tuple[int, bool], int], peer: int) -> int:
            """Return what only the transfer in the same place between the two ranks has."""
            number = counts[peer, channel]
            counts[peer, channel] += 1
            return self._base + channel * CHANNEL + (number & 0xFFFF)

        return self.start_tagged(
            group,
            [(peer, row, tag(self._sent, peer)) for peer, row in send],
            [(peer, row, tag(self._received, peer)) for peer, row in receive],
            timeout,
        )

    def start_tagged(
        self, group: Any, send: Sequence[tuple[int, Any, int]], receive: Sequence[tuple[int, Any, int]], timeout: float
    ) -> Callable[[], None]:
        """Start sends and receives of (peer, flat bytes, tag)."""
        with outside(), translate_errors(self.me(), "to start a transfer", timeout):
            works = [(peer, group.recv([torch.from_numpy(row)], peer, tag)) for peer, row, tag in receive]
            works += [(peer, group.send([torch.from_numpy(row)], peer, tag)) for peer, row, tag in send]
        self.bytes_sent += sum(row.nbytes for _, row, _ in send)

        def finish() -> None:
            # Gloo forgets a transfer's buffer only with its work, so these live until the wait is over.
            deadline = time.monotonic() + timeout
            for peer, work in works:
                with translate_errors(self.me(), f"for rank {peer}", timeout):
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))

        return finish

    def me(self) -> str:
        """Say which rank this is, for errors."""
        return f"rank {self.rank} of {self.size}"

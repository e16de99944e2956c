"""The way of buckets to other nodes and back: each node's means cross, and their weighted mean comes back."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funcavg._engine.buckets import Bucket
from funcavg._engine.mean import mean_into, wide
from funcavg.collectives.base import Pending

if TYPE_CHECKING:
    from funcavg._engine.codes import Codes, CodeSlots

__all__ = ["DELAY", "Crossing", "weights_by_node"]

AHEAD = 2  # buckets on their way to other nodes, and as many on their way back
DELAY = 2 * AHEAD


def weights_by_node(
    nodes: Sequence[Sequence[int]], weights: Sequence[float] | None
) -> tuple[list[list[float] | None], list[float] | None]:
    """Return the weights of ranks within each node, and of nodes; None where all are equal."""
    if weights is None:
        sizes = [float(len(members)) for members in nodes]
        return [None] * len(nodes), None if len(set(sizes)) == 1 else sizes
    top = max(weights)  # lest their sums overflow
    least = sys.float_info.min  # a weight may be very small, and is still not 0
    scaled = [max(weight / top, least) if weight else 0.0 for weight in weights]
    here: list[list[float] | None] = [[scaled[rank] for rank in members] for members in nodes]
    return here, [sum(inside or ()) for inside in here]


class _Transit(NamedTuple):
    element: str
    nbytes: int  # of the shard
    mine: Any  # (nodes, row bytes) in wide precision
    theirs: Any
    result: Any  # (nodes, row bytes)
    wait: Pending | None
    codes: Codes | None = None  # how a wire writes the rows, if it does
    going: Any = None  # (nodes, code bytes): of rows, then of means
    coming: Any = None

    def arrived(self) -> _Transit:
        if self.wait is not None:
            self.wait()
        return self


class Crossing:
    """The way of one shard."""

    def __init__(self, channel: Any, nbytes: int) -> None:
        self._channel, self._nbytes = channel, nbytes  # of the largest shard
        self._going: list[Any] = [None] * (AHEAD + 1)  # pairs: this node's mean, the others'
        self._coming: list[Any] = [None] * (2 * AHEAD + 1)
        self._begun = self._turned = 0
        self._over: deque[_Transit] = deque()
        self._back: deque[_Transit] = deque()
        self._between: Sequence[float] | None = None
        self._codes: Mapping[int, Codes] = {}
        self._code_slots: CodeSlots | None = None
        self._timeout = 0.0

    def begin(self, between: Sequence[float] | None, timeout: float, codes: Mapping[int, Codes] | None = None) -> None:
        """Begin a call: the weights of nodes, how long each wait may take, and how a wire writes this shard's rows."""
        self._between, self._timeout, self._codes = between, timeout, codes or {}

    def over(self, bucket: Bucket, nbytes: int, fill: Callable[[Any], None]) -> None:
        """Let ``fill`` write this node's mean of a shard, and start to exchange it with the other nodes."""
        nodes, number = self._channel.size, self._begun
        slot = number % len(self._going)
        self._begun += 1
        if self._going[slot] is None:  # eight-bit leaves are four times as wide on their way
            self._going[slot] = [np.empty(4 * self._nbytes, np.uint8) for _ in range(2)]
        broad = nbytes // bucket.itemsize * max(bucket.itemsize, 4)
        mine, theirs = (memory[:broad].reshape(nodes, -1) for memory in self._going[slot])
        fill(mine.reshape(-1))
        transit = _Transit(bucket.element, nbytes, mine, theirs, None, None)
        codes = self._codes.get(bucket.number)
        if codes is None:
            wait = self._channel.exchange(mine, theirs, self._timeout)
        else:
            going, coming = self._lent(number, codes)
            if self._between is not None and not self._between[self._channel.rank]:
                going[...] = 0  # nobody reads this node's means, and there are none
            else:
                for node in self._others:
                    codes.encode(node, mine[node], going[node])
            wait = self._channel.exchange(going, coming, self._timeout)
            transit = transit._replace(codes=codes, going=going, coming=coming)
        self._over.append(transit._replace(wait=wait))
        if len(self._over) > AHEAD:
            self._turn()

    def _turn(self) -> None:
        """Average the oldest shard that is over, and share the result."""
        transit, slot = self._over.popleft().arrived(), self._turned % len(self._coming)
        self._turned += 1
        if self._coming[slot] is None:
            self._coming[slot] = np.empty(self._nbytes, np.uint8)
        result = self._coming[slot][: transit.nbytes].reshape(self._channel.size, -1)
        here, codes = self._channel.rank, transit.codes
        rows = [transit.mine[node] if node == here else transit.theirs[node] for node in range(self._channel.size)]
        if codes is None:
            mean_into(result[here], rows, self._between, wide(transit.element), transit.element)
            wait = self._channel.share(result, self._timeout)
        else:
            for node in self._others:
                if self._between is None or self._between[node]:
                    codes.decode(here, transit.coming[node], rows[node])
            mean = transit.theirs[here]  # which nothing has come into
            mean_into(mean, rows, self._between, "float32")
            codes.encode(here, mean, transit.going[here], mean=True)
            wait = self._channel.share(transit.going, self._timeout)
        self._back.append(transit._replace(result=result, wait=wait))

    def back(self, *, draining: bool) -> Any:
        """Return the mean over all nodes of the shard that went over first, (nodes, row bytes)."""
        while self._over and (draining or not self._back):
            self._turn()
        transit = self._back.popleft().arrived()
        if transit.codes is not None:
            transit.codes.land(transit.going, transit.result)
        return transit.result

    @property
    def _others(self) -> list[int]:
        return [node for node in range(self._channel.size) if node != self._channel.rank]

    def _lent(self, number: int, codes: Codes) -> tuple[Any, Any]:
        if self._code_slots is None:
            from funcavg._engine.codes import CodeSlots

            self._code_slots = CodeSlots(DELAY + 1)
        return self._code_slots.lend(number, self._channel.size, codes.width)

"""Buckets through the memory that ranks of one host share (`funcavg.collectives.node`), and on to other nodes."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg import _points
from funcavg._engine.buckets import Bucket
from funcavg._engine.lanes import Cargo
from funcavg._engine.mean import mean_into, wide
from funcavg.collectives.base import Pending
from funcavg.collectives.node import Node, schedule

__all__ = ["Crossing", "NodeLane", "NodeSlots"]

AHEAD = 2  # buckets on their way to other nodes, and as many on their way back


class NodeSlots:
    """The slots of a node's shared memory, as plans see them."""

    apart = True

    def __init__(self, node: Node) -> None:
        self._node = node

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Any, Any]:
        """Return this rank's in-slot, everyone's in-slots and the out-slot: so many rows of ``nbytes``."""
        mine, everyone, out = self._node.slots(number)
        cut = [memory[: rows * nbytes].reshape(rows, nbytes) for memory in (mine, *everyone, out)]
        return cut[0], cut[1:-1], cut[-1]


class NodeLane:
    """A plan of buckets in the slots of a node."""

    def __init__(self, plan: Sequence[Bucket], node: Node, collective: Any, crossing: Crossing | None) -> None:
        self.plan, self.node, self.collective, self.crossing = plan, node, collective, crossing

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets. Nothing is read or arrives late in shared memory, so it is always done directly.

        Of a bucket in a leaf's own memory, the shard that this rank reduces is read there: nobody else needs it.
        """
        node, plan = self.node, self.plan
        carriers, results, weights, timeout, *_ = cargo
        here, between = weights_by_node(node.nodes, weights)
        if self.crossing is not None:
            self.crossing.begin(between, timeout)
        delay = 0 if self.crossing is None else 2 * AHEAD
        meetings = 0
        sources: dict[int, Any] = {}  # where a bucket lies in a leaf's own memory
        for action, k in schedule(len(plan), delay) if plan else ():
            if action == "meet":
                node.meet(timeout)
                _points.reached("arrived", meetings)
                meetings += 1
                continue
            bucket = plan[k]
            if action == "copy in":
                source = sources[k] = bucket.rows_in(carriers)
                if source is None:
                    bucket.pack(carriers)
                else:
                    shard = self._shard_rows()
                    np.copyto(bucket.mine[: shard.start], source[: shard.start])
                    np.copyto(bucket.mine[shard.stop :], source[shard.stop :])
                _points.reached("copied_in", k)
            elif action == "copy out":
                source = sources.pop(k)
                target = source if results is carriers else bucket.rows_in(results)
                if target is None:
                    bucket.unpack(results)
                elif bucket.own is not None:
                    np.copyto(target, bucket.landing)
                    bucket.own[0].written(results[bucket.own[1]])
                _points.reached("copied_out", k)
            elif node.index < node.shards:
                if action == "reduce":
                    self._reduce(bucket, sources[k], here[node.here])
                elif self.crossing is not None:
                    np.copyto(bucket.landing[self._shard_rows()], self.crossing.back(draining=k + delay >= len(plan)))
        # Others have read all of this rank's in-slots but its own shard, and its own shard of the means.
        nbytes = sum(bucket.mine.nbytes for bucket in plan)
        mine = nbytes // node.shards if node.index < node.shards else 0
        self.collective.bytes_sent += (nbytes - mine if node.size > 1 else 0) + mine * (node.size - 1)

    def _shard_rows(self) -> slice:
        """Return the rows of the shard that this rank reduces, one for every node; where it has none, no rows."""
        count, index = len(self.node.nodes), min(self.node.index, self.node.shards)
        return slice(index * count, min(index + 1, self.node.shards) * count)

    def _reduce(self, bucket: Bucket, source: Any, weights: Sequence[float] | None) -> None:
        rows = self._shard_rows()
        everyone = list(bucket.theirs)
        if source is not None:
            everyone[self.node.index] = source
        shards = [slot[rows].reshape(-1) for slot in everyone]
        if self.crossing is None:
            mean_into(bucket.landing[rows].reshape(-1), shards, weights, bucket.element)
        else:

            def local_mean(out: Any) -> None:
                if weights is None or any(weights):  # else nobody reads it
                    mean_into(out, shards, weights, bucket.element, wide(bucket.element))

            self.crossing.over(bucket, len(shards[0]), local_mean)
        _points.reached("reduced", bucket.number)


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

    def arrived(self) -> _Transit:
        if self.wait is not None:
            self.wait()
        return self


class Crossing:
    """The way of one shard to the other nodes and back: means of nodes go over, their means come back."""

    def __init__(self, channel: Any, nbytes: int) -> None:
        self._channel, self._nbytes = channel, nbytes  # of the largest shard
        self._going: list[Any] = [None] * (AHEAD + 1)  # pairs: this node's mean, the others'
        self._coming: list[Any] = [None] * (2 * AHEAD + 1)
        self._begun = self._turned = 0
        self._over: deque[_Transit] = deque()
        self._back: deque[_Transit] = deque()
        self._between: Sequence[float] | None = None
        self._timeout = 0.0

    def begin(self, between: Sequence[float] | None, timeout: float) -> None:
        """Begin a call: the weights of nodes, and how long each wait may take."""
        self._between, self._timeout = between, timeout

    def over(self, bucket: Bucket, nbytes: int, fill: Callable[[Any], None]) -> None:
        """Let ``fill`` write this node's mean of a shard, and start to exchange it with the other nodes."""
        nodes, slot = self._channel.size, self._begun % len(self._going)
        self._begun += 1
        if self._going[slot] is None:  # eight-bit leaves are four times as wide on their way
            self._going[slot] = [np.empty(4 * self._nbytes, np.uint8) for _ in range(2)]
        broad = nbytes // bucket.itemsize * max(bucket.itemsize, 4)
        mine, theirs = (memory[:broad].reshape(nodes, -1) for memory in self._going[slot])
        fill(mine.reshape(-1))
        wait = self._channel.exchange(mine, theirs, self._timeout)
        self._over.append(_Transit(bucket.element, nbytes, mine, theirs, None, wait))
        if len(self._over) > AHEAD:
            self._turn()

    def _turn(self) -> None:
        """Average the oldest shard that is over, and share the result."""
        transit, slot = self._over.popleft().arrived(), self._turned % len(self._coming)
        self._turned += 1
        if self._coming[slot] is None:
            self._coming[slot] = np.empty(self._nbytes, np.uint8)
        result = self._coming[slot][: transit.nbytes].reshape(self._channel.size, -1)
        here = self._channel.rank
        rows = [transit.mine[node] if node == here else transit.theirs[node] for node in range(self._channel.size)]
        mean_into(result[here], rows, self._between, wide(transit.element), transit.element)
        self._back.append(transit._replace(result=result, wait=self._channel.share(result, self._timeout)))

    def back(self, *, draining: bool) -> Any:
        """Return the mean over all nodes of the shard that went over first, (nodes, row bytes)."""
        while self._over and (draining or not self._back):
            self._turn()
        return self._back.popleft().arrived().result

"""Buckets that are copied from one rank to all, bit for bit: the lanes of `funcavg.broadcast`.

Nobody sends a bucket to every other rank. The root cuts it into rows, one for each rank, and ranks share theirs (van de
Geijn's way: each rank receives all bytes once, and none sends more than twice as many)::

    root      pack ── scatter: row r to rank r ─►
    others                  ────► arrived    share what has been scattered ────► unpack

On a host the root packs into its own in-slot, where all read it; of other hosts, each rank that has a shard receives it
from the root's and publishes it in an out-slot::

    root's host     fill 0 │ fill 1, take 0, send 0 on │ fill 2, take 1, send 1 on │ ...
    another host    ────► fill 0 │ ────► fill 1, take 0 │ ...
                          meet     meet
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from funcavg import _points
from funcavg._engine.buckets import Bucket
from funcavg._engine.device_slots import DEVICE_AHEAD
from funcavg._engine.lanes import Cargo, Lane
from funcavg.collectives.base import Pending
from funcavg.collectives.node import SLOTS, Node
from funcavg.collectives.rows import Rows

__all__ = ["CopyLane", "DeviceCopyLane", "NodeCopyLane", "StageSlots", "copies"]

AHEAD = 2  # buckets on their way to other nodes
TOGETHER = SLOTS // 2  # there are two stages, as large as slots allow


class CopyLane(Lane):
    """Over a transport's verbs. One that has but the three sends what an average sends."""

    def __init__(self, plan: Sequence[Bucket], collective: Any, rank: int, root: int) -> None:
        super().__init__(plan, collective, rank)
        self.root = root

    def open(self, bucket: Bucket, cargo: Cargo) -> tuple[Any, Any]:
        if self.rank == self.root:
            return super().open(bucket, cargo)
        target = bucket.rows_in(cargo.results) if cargo.land_in_results else None
        return bucket.mine, bucket.mine if target is None else target

    def start(self, bucket: Bucket, source: Any, target: Any, timeout: float) -> Pending | None:
        pending: Pending | None
        if isinstance(self.collective, Rows):
            rows = source if self.rank == self.root else target
            pending = self.collective.scatter(rows, self.root, timeout)
        else:
            pending = self.collective.exchange(source, bucket.theirs, timeout)
        return pending

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        if self.rank == self.root:
            if not np.may_share_memory(source, target):
                np.copyto(target, source)
        elif not isinstance(self.collective, Rows):
            np.copyto(target[self.rank], bucket.theirs[self.root])

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        pending: Pending | None
        if isinstance(self.collective, Rows):
            pending = self.collective.share_scattered(target, self.root, timeout)
        else:
            pending = self.collective.share(target, timeout)
        return pending


class DeviceCopyLane(CopyLane):
    """In an accelerator's memory, where NCCL has a broadcast of its own."""

    ahead = DEVICE_AHEAD

    def start(self, bucket: Bucket, source: Any, target: Any, timeout: float) -> Pending | None:
        if not hasattr(self.collective, "broadcast"):
            return super().start(bucket, source, target, timeout)
        pending: Pending | None = self.collective.broadcast(source, self.root, timeout)
        return pending

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        """Do nothing: leaves on a device are packed, and come from where they were packed."""

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        return None if hasattr(self.collective, "broadcast") else super().finish(bucket, target, timeout)


class StageSlots:
    """Where a node's ranks find a bucket: in the root's in-slot, on other nodes in the node's out-slot."""

    apart = True

    def __init__(self, node: Node, root: int) -> None:
        self.bytes = TOGETHER * node.slot_bytes
        self._node, self._members = node, node.nodes[node.here]
        self._root = root

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, None, Any]:
        """Return the stage as `mine` and as `landing`."""
        everyone, stage = self._node.slots(number, TOGETHER)
        if self._root in self._members:
            stage = everyone[self._members.index(self._root)]
        stage = stage[: rows * nbytes].reshape(rows, nbytes)
        return stage, None, stage


def copies(buckets: int) -> Iterator[tuple[str, int]]:
    """Yield what a rank of a node does in one call: (action, bucket); bucket k is in stage k & 1.

    All of a group meet once more when they have taken the last bucket, which keeps calls apart.
    """
    for k in range(buckets):
        yield "fill", k
        if k:
            yield "take", k - 1
        yield "meet", k
    if buckets:
        yield "take", buckets - 1


class NodeCopyLane:
    """Through the memory that ranks of one host share, and on to other nodes."""

    def __init__(self, plan: Sequence[Bucket], node: Node, collective: Any, root: int) -> None:
        self.plan, self.node, self.collective = plan, node, collective
        self.is_root = collective.rank == root
        self.at_home = root in node.nodes[node.here]
        home = next(number for number, members in enumerate(node.nodes) if root in members)
        self.relay = None if node.channel is None else _Relay(plan, node, home)

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets."""
        for action, k in copies(len(self.plan)):
            if action == "fill":
                self._fill(self.plan[k], cargo)
                _points.reached("copied_in", k)
            elif action == "take":
                self._take(self.plan[k], cargo)
                _points.reached("copied_out", k)
            else:
                self.node.meet(cargo.timeout)
                _points.reached("arrived", k)
        if self.relay is not None:
            self.relay.drain()

    def _fill(self, bucket: Bucket, cargo: Cargo) -> None:
        """Put into the stage what this rank has for it."""
        readers = self.node.size - 1
        if self.is_root:
            source = bucket.rows_in(cargo.carriers)
            if source is None:
                bucket.pack(cargo.carriers)
            else:
                np.copyto(bucket.mine, source)
            self.collective.bytes_sent += bucket.mine.nbytes * readers
        elif self.relay is not None and not self.at_home:
            shard = self.relay.receive(cargo.timeout)
            np.copyto(bucket.mine[self.relay.rows], shard)
            self.collective.bytes_sent += shard.nbytes * readers

    def _take(self, bucket: Bucket, cargo: Cargo) -> None:
        """Bring what is in the stage to the other nodes, and to this rank's results."""
        if self.relay is not None and self.at_home:
            self.relay.send(bucket, cargo.timeout)
        if self.is_root and cargo.results is cargo.carriers:
            return
        target = bucket.rows_in(cargo.results)
        if target is None:
            bucket.unpack(cargo.results)
        elif bucket.own is not None:
            np.copyto(target, bucket.landing)
            bucket.own[0].written([cargo.results[bucket.own[1]]])


class _Relay:
    """The way of one shard of every bucket from the root's node to the others, over the channel of its ranks."""

    def __init__(self, plan: Sequence[Bucket], node: Node, home: int) -> None:
        assert node.channel is not None
        self.channel: Any = node.channel
        self.rows = slice(node.index * len(node.nodes), (node.index + 1) * len(node.nodes))  # of a bucket
        self._plan, self._home = plan, home
        self._memory: list[Any] = [None] * (2 * AHEAD + 2)
        self._begun = 0
        self._coming: deque[tuple[Any, Pending]] = deque()  # scattered by the root's node
        self._shared: deque[tuple[Any, Pending | None]] = deque()  # among the others

    def _buffer(self, bucket: Bucket) -> Any:
        """Return memory as large as the shard, used again when the transfer before it is over."""
        slot, shape = self._begun % len(self._memory), bucket.mine[self.rows].shape
        self._begun += 1
        if self._memory[slot] is None or self._memory[slot].size < shape[0] * shape[1]:
            self._memory[slot] = np.empty(shape[0] * shape[1], np.uint8)
        return self._memory[slot][: shape[0] * shape[1]].reshape(shape)

    def send(self, bucket: Bucket, timeout: float) -> None:
        """Start to send a shard, from memory of its own: the stage is filled again."""
        buffer = self._buffer(bucket)
        np.copyto(buffer, bucket.mine[self.rows])
        self._coming.append((buffer, self.channel.scatter(buffer, self._home, timeout)))
        if len(self._coming) > 2 * AHEAD:
            self._coming.popleft()[1]()

    def receive(self, timeout: float) -> Any:
        """Return the next shard; begin to receive those that come after it."""
        while len(self._coming) + len(self._shared) <= 2 * AHEAD and self._begun < len(self._plan):
            buffer = self._buffer(self._plan[self._begun])
            self._coming.append((buffer, self.channel.scatter(buffer, self._home, timeout)))
        ahead = 1 if self.channel.size == 2 else 2  # with a third node, one is shared while the next arrives
        while self._coming and len(self._shared) < ahead:
            buffer, arrived = self._coming.popleft()
            arrived()
            self._shared.append((buffer, self.channel.share_scattered(buffer, self._home, timeout)))
        buffer, shared = self._shared.popleft()
        if shared is not None:
            shared()
        return buffer

    def drain(self) -> None:
        """Wait until all has been sent."""
        while self._coming:
            self._coming.popleft()[1]()

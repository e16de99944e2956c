"""Buckets through the memory that ranks of one host share (`funcavg.collectives.node`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from funcavg import _points
from funcavg._engine.buckets import Bucket
from funcavg._engine.crossing import DELAY, Crossing, weights_by_node
from funcavg._engine.lanes import Cargo
from funcavg._engine.mean import Means, wide
from funcavg.collectives.node import Node, schedule

__all__ = ["NodeLane", "NodeSlots"]


class Station:
    """A bucket's views of its slots, made once for a plan: its own shard of each, and what else is copied."""

    def __init__(self, node: Node, everyone: Sequence[Any], out: Any, row_bytes: int) -> None:
        shard = len(node.nodes) * row_bytes
        self.begin = min(node.index, node.shards) * shard  # of the shard that this rank reduces, if it has one
        self.end = min(node.index + 1, node.shards) * shard
        self.shards = [slot[self.begin : self.end] for slot in everyone]
        self.landing = out[self.begin : self.end]
        others = [(begin, end) for begin, end in ((0, self.begin), (self.end, len(out))) if begin < end]
        self.given = [(begin, end, everyone[node.index][begin:end]) for begin, end in others]
        self.taken = [(begin, end, out[begin:end]) for begin, end in others]
        self.operands: list[Any] = []  # the shards, as the kernel takes them
        self.target: Any = None  # and where the mean goes


class NodeSlots:
    """The slots of a node's shared memory, as plans see them."""

    apart = True

    def __init__(self, node: Node) -> None:
        self._node = node

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Station, Any]:
        """Return this rank's in-slot, a `Station`, and the out-slot: so many rows of ``nbytes``."""
        everyone, out = self._node.slots(number)
        everyone, out = [slot[: rows * nbytes] for slot in everyone], out[: rows * nbytes]
        station = Station(self._node, everyone, out, nbytes)
        return everyone[self._node.index].reshape(rows, nbytes), station, out.reshape(rows, nbytes)


class NodeLane:
    """A plan of buckets in the slots of a node.

    Nothing is read or arrives late in shared memory, so large leaves are always read, and their means written, where
    they lie: the shard that this rank reduces never goes through its in-slot, and is not copied out.
    """

    def __init__(self, plan: Sequence[Bucket], node: Node, collective: Any, crossing: Crossing | None) -> None:
        self.plan, self.node, self.collective, self.crossing = plan, node, collective, crossing

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets."""
        node, plan = self.node, self.plan
        here, between = weights_by_node(node.nodes, cargo.weights)
        if self.crossing is not None:
            self.crossing.begin(between, cargo.timeout)
        weights = here[node.here]
        self._counts = weights is None or any(weights)  # else nobody reads this node's means
        self._weights, self._means = weights if self._counts else None, dict[str, Means]()
        self._sources = _Memory(cargo.carriers)
        self._targets = self._sources if cargo.results is cargo.carriers else _Memory(cargo.results)
        delay = 0 if self.crossing is None else DELAY
        actions = {"copy in": self._copy_in, "copy out": self._copy_out}
        if node.index < node.shards:
            actions |= {"reduce": self._reduce, "publish": self._publish}
        before = node.begin(len(plan))
        for action, k in schedule(len(plan), delay) if plan else ():
            act = actions.get(action)
            if act is None:  # this rank has no shard
                continue
            word, behind, tells = node.rules[action]
            if word is not None:
                node.wait(word, before + k + 1 - behind, cargo.timeout)
            act(plan[k])
            if tells is not None:
                node.tell(tells, before + k + 1)
        # Others have read all of this rank's in-slots but its own shard, and its own shard of the means.
        nbytes = sum(bucket.mine.nbytes for bucket in plan)
        mine = nbytes // node.shards if node.index < node.shards else 0
        self.collective.bytes_sent += (nbytes - mine if node.size > 1 else 0) + mine * (node.size - 1)

    def _copy_in(self, bucket: Bucket) -> None:
        source = self._sources.of(bucket)
        if source is None:
            bucket.pack(self._sources.carriers)
        else:
            for begin, end, slot in bucket.theirs.given:
                np.copyto(slot, source[begin:end])
        _points.reached("copied_in", bucket.number)

    def _reduce(self, bucket: Bucket) -> None:
        _points.reached("arrived", bucket.number)
        station, means = bucket.theirs, self._means_of(bucket)
        if not station.operands:
            station.operands = [means.operand(shard) for shard in station.shards]
        shards, source = station.operands, self._sources.of(bucket)
        if source is not None:
            shards = shards.copy()
            shards[self.node.index] = means.operand(source[station.begin : station.end])
        nbytes = station.end - station.begin
        if self.crossing is None:
            if station.target is None:
                station.target = means.target(station.landing)
            target = self._targets.of(bucket)
            if target is None:
                means.write(station.target, shards, nbytes)
            else:  # there first, and from there to the slot: what lies in the slot is read by others at once
                means.write(means.target(target[station.begin : station.end]), shards, nbytes, station.target)
        else:

            def local_mean(out: Any) -> None:
                if self._counts:
                    means.write(means.target(out), shards, nbytes)

            self.crossing.over(bucket, nbytes, local_mean)
        _points.reached("reduced", bucket.number)

    def _means_of(self, bucket: Bucket) -> Means:
        means = self._means.get(bucket.element)
        if means is None:
            into = "" if self.crossing is None else wide(bucket.element)
            means = self._means[bucket.element] = Means(bucket.element, self.node.size, self._weights, into)
        return means

    def _publish(self, bucket: Bucket) -> None:
        if self.crossing is None:  # the mean is there since it was reduced
            return
        station, target = bucket.theirs, self._targets.of(bucket)
        mean = self.crossing.back(draining=bucket.number + DELAY >= len(self.plan)).reshape(-1)
        np.copyto(station.landing, mean)
        if target is not None:
            np.copyto(target[station.begin : station.end], mean)

    def _copy_out(self, bucket: Bucket) -> None:
        _points.reached("done", bucket.number)
        target = self._targets.of(bucket)
        if target is None:
            bucket.unpack(self._targets.carriers)
        else:
            for begin, end, slot in bucket.theirs.taken:
                np.copyto(target[begin:end], slot)
            self._targets.written(bucket)
        _points.reached("copied_out", bucket.number)


class _Memory:
    """Where large leaves lie, found once for a call."""

    def __init__(self, carriers: Sequence[Any]) -> None:
        self.carriers = carriers
        self._known: dict[int, Any] = {}

    def of(self, bucket: Bucket) -> Any:
        """Return the flat bytes of a leaf that a bucket is made of; None if it has none of its own, or not in order."""
        if bucket.own is None:
            return None
        family, leaf, begin, end = bucket.own
        if leaf not in self._known:
            self._known[leaf] = family.as_bytes(self.carriers[leaf])
        flat = self._known[leaf]
        return None if flat is None else flat[begin:end]

    def written(self, bucket: Bucket) -> None:
        """Tell a leaf's framework that it has been written to."""
        assert bucket.own is not None
        family, leaf, *_ = bucket.own
        family.written(self.carriers[leaf])

"""Buckets through the memory that ranks of one host share (`funcavg.collectives.node`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

from funcavg import _points
from funcavg._engine.buckets import Bucket, make_plan
from funcavg._engine.crossing import DELAY, Crossing, weights_by_node
from funcavg._engine.lanes import Cargo
from funcavg._engine.mean import Means, wide
from funcavg._memory import address_of
from funcavg._trees import Family, Leaf
from funcavg.collectives.node import Node, schedule

__all__ = ["NodeLane", "NodePlan"]


class _Station:
    """Where a bucket lies in a node's memory: views and addresses that are made once for a plan."""

    def __init__(self, node: Node, everyone: Sequence[Any], out: Any, row_bytes: int) -> None:
        shard = len(node.nodes) * row_bytes
        self.begin = min(node.index, node.shards) * shard  # of the shard that this rank reduces, if it has one
        self.end = min(node.index + 1, node.shards) * shard
        self.nbytes = self.end - self.begin
        self.shards = [slot[self.begin : self.end] for slot in everyone]
        self.landing = out[self.begin : self.end]
        self.operands: list[Any] = []  # the shards, as the kernel takes them
        self.target: Any = None  # and where their mean goes
        others = [(begin, end) for begin, end in ((0, self.begin), (self.end, len(out))) if begin < end]
        mine, means = address_of(everyone[node.index]), address_of(out)
        self.given = [(mine + begin, begin, end - begin) for begin, end in others]
        self.taken = [(means + begin, begin, end - begin) for begin, end in others]


class _NodeSlots:
    """The slots of a node's shared memory, as plans see them."""

    apart = True

    def __init__(self, node: Node) -> None:
        self._node = node

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, _Station, Any]:
        """Return this rank's in-slot, its station, and the out-slot: so many rows of ``nbytes``."""
        everyone, out = self._node.slots(number)
        everyone, out = [slot[: rows * nbytes] for slot in everyone], out[: rows * nbytes]
        station = _Station(self._node, everyone, out, nbytes)
        return everyone[self._node.index].reshape(rows, nbytes), station, out.reshape(rows, nbytes)


class _Step(NamedTuple):
    """What is done with a bucket, what it waits for, and what it makes known: counts are of this call."""

    action: str
    bucket: Bucket
    waits: int | None
    least: int
    tells: int | None
    told: int


class NodePlan:
    """Leaves, (number, family, leaf) each, in buckets of a node's slots, and what this rank does with them in turn."""

    def __init__(self, node: Node, leaves: Sequence[tuple[int, Family, Leaf]]) -> None:
        buckets = self.buckets = make_plan(leaves, node.rows, _NodeSlots(node), node.slot_bytes)
        reduces = node.index < node.shards
        self.steps = [
            _Step(action, buckets[k], rule.waits, k + 1 - rule.behind, rule.tells, k + 1)
            for action, k in schedule(len(buckets), DELAY if len(node.nodes) > 1 else 0)
            if reduces or action not in ("reduce", "publish")
            for rule in [node.rules[action]]
        ]
        # Others read all of this rank's in-slots but its own shard, and its own shard of the means.
        nbytes = sum(bucket.mine.nbytes for bucket in buckets)
        mine = nbytes // node.shards if reduces else 0
        self.bytes_sent = (nbytes - mine if node.size > 1 else 0) + mine * (node.size - 1)


class NodeLane:
    """A plan of buckets in the slots of a node.

    Nothing is read or arrives late in shared memory, so large leaves are always read, and their means written, where
    they lie: the shard that this rank reduces never goes through its in-slot, and is not copied out.
    """

    def __init__(self, plan: NodePlan, node: Node, collective: Any, crossing: Crossing | None) -> None:
        self.plan, self.node, self.collective, self.crossing = plan, node, collective, crossing

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets."""
        node, timeout = self.node, cargo.timeout
        here, between = weights_by_node(node.nodes, cargo.weights)
        if self.crossing is not None:
            self.crossing.begin(between, timeout)
        weights = here[node.here]
        self._counts = weights is None or any(weights)  # else nobody reads this node's means
        self._weights, self._means = weights if self._counts else None, dict[str, Means]()
        self._targets = _Memory(cargo.results, written=True)
        self._sources = self._targets if cargo.results is cargo.carriers else _Memory(cargo.carriers)
        actions = {
            "copy in": self._copy_in,
            "reduce": self._reduce,
            "publish": self._publish,
            "copy out": self._copy_out,
        }
        before = node.begin(len(self.plan.buckets))
        for action, bucket, waits, least, tells, told in self.plan.steps:
            if waits is not None:
                node.wait(waits, before + least, timeout)
            actions[action](bucket)
            if tells is not None:
                node.tell(tells, before + told)
        self._targets.all_written()
        self.collective.bytes_sent += self.plan.bytes_sent

    def _copy_in(self, bucket: Bucket) -> None:
        source = self._sources.address(bucket)
        if source is None:
            bucket.pack(self._sources.carriers)
        else:
            for slot, begin, nbytes in bucket.theirs.given:
                ctypes.memmove(slot, source + begin, nbytes)
        _points.reached("copied_in", bucket.number)

    def _reduce(self, bucket: Bucket) -> None:
        _points.reached("arrived", bucket.number)
        station, means = bucket.theirs, self._means_of(bucket)
        if not station.operands:
            station.operands = [means.operand(shard) for shard in station.shards]
        shards, own = station.operands, self._sources.shard(bucket, means)
        if own is not None:
            shards = shards.copy()
            shards[self.node.index] = own
        if self.crossing is None:
            if station.target is None:
                station.target = means.target(station.landing)
            result = own if self._targets is self._sources else self._targets.shard(bucket, means)
            if result is None:
                means.write(station.target, shards, station.nbytes)
            else:  # there, and to the slot while it is in the cache
                means.write(result, shards, station.nbytes, station.target)
        else:

            def local_mean(out: Any) -> None:
                if self._counts:
                    means.write(means.target(out), shards, station.nbytes)

            self.crossing.over(bucket, station.nbytes, local_mean)
        _points.reached("reduced", bucket.number)

    def _means_of(self, bucket: Bucket) -> Means:
        means = self._means.get(bucket.element)
        if means is None:
            into = "" if self.crossing is None else wide(bucket.element)
            means = self._means[bucket.element] = Means(bucket.element, self.node.size, self._weights, into)
        return means

    def _publish(self, bucket: Bucket) -> None:
        assert self.crossing is not None
        station, target = bucket.theirs, self._targets.address(bucket)
        mean = self.crossing.back(draining=bucket.number + DELAY >= len(self.plan.buckets)).reshape(-1)
        station.landing[...] = mean
        if target is not None:
            ctypes.memmove(target + station.begin, address_of(mean), station.nbytes)

    def _copy_out(self, bucket: Bucket) -> None:
        _points.reached("done", bucket.number)
        target = self._targets.address(bucket)
        if target is None:
            bucket.unpack(self._targets.carriers)
        else:
            for slot, begin, nbytes in bucket.theirs.taken:
                ctypes.memmove(target + begin, slot, nbytes)
        _points.reached("copied_out", bucket.number)


class _Place(NamedTuple):
    """Where a leaf lies."""

    address: int | None  # None: not in order, or out of reach
    flat: Any  # its bytes
    pointer: Any  # asked whether it still lies there, if it might not


class _Memory:
    """Where large leaves lie: found once for a call."""

    def __init__(self, carriers: Sequence[Any], *, written: bool = False) -> None:
        self.carriers, self._are_written = carriers, written
        self._places: dict[int, _Place] = {}
        self._operands: dict[int, Any] = {}  # leaves as the kernel takes them
        self._families: dict[int, Any] = {}

    def address(self, bucket: Bucket) -> int | None:
        """Return where a bucket begins in a leaf of its own; None if it has none, or not in order."""
        if bucket.own is None:
            return None
        family, leaf, begin, _ = bucket.own
        place = self._places.get(leaf)
        if place is None or (place.pointer is not None and place.pointer(self.carriers[leaf]) != place.address):
            place = self._find(family, leaf)
        return None if place.address is None else place.address + begin

    def shard(self, bucket: Bucket, means: Means) -> Any:
        """Return this rank's shard of a bucket there, as the kernel takes it; None if it does not lie there."""
        if self.address(bucket) is None:
            return None
        _, leaf, begin, _ = bucket.own  # type: ignore[misc]
        operand = self._operands.get(leaf)
        if operand is None:
            operand = self._operands[leaf] = means.operand(self._places[leaf].flat)
        return means.part(operand, begin + bucket.theirs.begin, begin + bucket.theirs.end)

    def _find(self, family: Family, leaf: int) -> _Place:
        flat = family.as_bytes(self.carriers[leaf])
        self._operands.pop(leaf, None)
        if flat is None:
            place = _Place(None, None, None)
        else:
            place = _Place(address_of(flat), flat, family.pointer)
            if self._are_written:
                family.written(self.carriers[leaf])
                self._families[leaf] = family
        self._places[leaf] = place
        return place

    def all_written(self) -> None:
        """Tell once more that leaves have been written to: their framework may have looked at them meanwhile."""
        for leaf, family in self._families.items():
            family.written(self.carriers[leaf])

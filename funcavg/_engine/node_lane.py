"""Buckets through the memory that ranks of one host share (`funcavg.collectives.node`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from funcavg import _points
from funcavg._engine.buckets import Bucket
from funcavg._engine.crossing import DELAY, Crossing, weights_by_node
from funcavg._engine.lanes import Cargo
from funcavg._engine.mean import Means, wide
from funcavg._engine.steps import NodePlan
from funcavg._memory import address_of
from funcavg._trees import Family
from funcavg.collectives.node import Node

__all__ = ["NodeLane"]

BEFORE = {"reduce": "arrived", "copy out": "done"}  # the points of a step
AFTER = {"copy in": "copied_in", "reduce": "reduced", "copy out": "copied_out"}


class NodeLane:
    """A plan of buckets in the slots of a node.

    Nothing is read or arrives late in shared memory, so large leaves are always read, and their means written, where
    they lie: the shard that this rank reduces never goes through its in-slot, and is not copied out.
    """

    def __init__(self, plan: NodePlan, node: Node, collective: Any, crossing: Crossing | None) -> None:
        self.plan, self.node, self.collective, self.crossing = plan, node, collective, crossing

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets."""
        node, plan, table, timeout = self.node, self.plan, self.plan.table, cargo.timeout
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
        watched = _points.are_watched()
        self._fill()
        position, before = 0, node.begin(len(plan.buckets))
        while position < len(plan.steps):
            action, bucket, waits, least, tells, told = plan.steps[position]
            if waits is not None:
                node.wait(waits, before + least, timeout)
            if watched and action in BEFORE:
                _points.reached(BEFORE[action], bucket.number)
            following = position
            if table is not None:
                if any([self._have_moved(leaf) for leaf in table.touched(position)]):
                    self._fill()
                following = table.run(position, before, one=watched)
            if following == position:
                actions[action](bucket)
                if tells is not None:
                    node.tell(tells, before + told)
                following += 1
            if watched and action in AFTER:
                _points.reached(AFTER[action], bucket.number)
            position = following
        self._targets.all_written()
        self.collective.bytes_sent += plan.bytes_sent

    def _fill(self) -> None:
        if self.plan.table is not None:
            leaves = self.plan.table.leaves
            sources = [self._sources.find(family, leaf).address for leaf, family in leaves.items()]
            targets = [self._targets.find(family, leaf).address for leaf, family in leaves.items()]
            self.plan.table.fill(sources, targets, self._weights, self._means_of)

    def _have_moved(self, leaf: int) -> bool:
        return self._sources.has_moved(leaf) or (self._targets is not self._sources and self._targets.has_moved(leaf))

    def _copy_in(self, bucket: Bucket) -> None:
        source = self._sources.address(bucket)
        if not source:
            bucket.pack(self._sources.carriers)
        else:
            for slot, begin, nbytes in bucket.theirs.given:
                ctypes.memmove(slot, source + begin, nbytes)

    def _reduce(self, bucket: Bucket) -> None:
        station, means = bucket.theirs, self._means_of(bucket.element)
        if bucket.element not in station.operands:
            operands = [means.operand(shard) for shard in station.shards]
            station.operands[bucket.element] = operands, means.operand(station.landing)
        (shards, landing), own = station.operands[bucket.element], self._sources.shard(bucket, means)
        if own is not None:
            shards = shards.copy()
            shards[self.node.index] = own
        if self.crossing is None:
            result = own if self._targets is self._sources else self._targets.shard(bucket, means)
            if result is None:
                means.write(landing, shards, station.nbytes)
            else:  # there, and to the slot while it is in the cache
                means.write(result, shards, station.nbytes, landing)
        else:

            def local_mean(out: Any) -> None:
                if self._counts:
                    means.write(means.target(out), shards, station.nbytes)

            self.crossing.over(bucket, station.nbytes, local_mean)

    def _means_of(self, element: str) -> Means:
        means = self._means.get(element)
        if means is None:
            into = "" if self.crossing is None else wide(element)
            means = self._means[element] = Means(element, self.node.size, self._weights, into)
        return means

    def _publish(self, bucket: Bucket) -> None:
        assert self.crossing is not None
        station, target = bucket.theirs, self._targets.address(bucket)
        mean = self.crossing.back(draining=bucket.number + DELAY >= len(self.plan.buckets)).reshape(-1)
        station.landing[...] = mean
        if target:
            ctypes.memmove(target + station.begin, address_of(mean), station.nbytes)

    def _copy_out(self, bucket: Bucket) -> None:
        target = self._targets.address(bucket)
        if not target:
            bucket.unpack(self._targets.carriers)
        else:
            for slot, begin, nbytes in bucket.theirs.taken:
                ctypes.memmove(target + begin, slot, nbytes)


class _Place(NamedTuple):
    """Where a leaf lies."""

    address: int  # 0: not in order, or out of reach
    flat: Any  # its bytes
    pointer: Callable[[Any], int] | None  # asked whether it still lies there, if it might not


class _Memory:
    """Where large leaves lie: found once for a call."""

    def __init__(self, carriers: Sequence[Any], *, written: bool = False) -> None:
        self.carriers, self._are_written = carriers, written
        self._places: dict[int, _Place] = {}
        self._operands: dict[int, Any] = {}  # leaves as the kernel takes them
        self._families: dict[int, Family] = {}

    def find(self, family: Family, leaf: int) -> _Place:
        """Return where a leaf lies; raise RuntimeError if its memory has been freed."""
        place = self._places.get(leaf)
        if place is not None and not self.has_moved(leaf):
            return place
        flat = family.as_bytes(self.carriers[leaf])
        place = _Place(0, None, None) if flat is None else _Place(address_of(flat), flat, family.pointer)
        if flat is not None and self._are_written:
            family.written(self.carriers[leaf])
            self._families[leaf] = family
        self._operands.pop(leaf, None)
        self._places[leaf] = place
        return place

    def has_moved(self, leaf: int) -> bool:
        """Say whether a leaf lies elsewhere than when it was found."""
        place = self._places[leaf]
        return place.pointer is not None and place.pointer(self.carriers[leaf]) != place.address

    def address(self, bucket: Bucket) -> int:
        """Return where a bucket begins in a leaf of its own; 0 if it has none, or not in order."""
        if bucket.own is None:
            return 0
        family, leaf, begin, _ = bucket.own
        place = self.find(family, leaf)
        return place.address and place.address + begin

    def shard(self, bucket: Bucket, means: Means) -> Any:
        """Return this rank's shard of a bucket there, as the kernel takes it; None if it does not lie there."""
        if bucket.own is None or not self.address(bucket):
            return None
        _, leaf, begin, _ = bucket.own
        if leaf not in self._operands:
            self._operands[leaf] = means.operand(self._places[leaf].flat)
        return means.part(self._operands[leaf], begin + bucket.theirs.begin, begin + bucket.theirs.end)

    def all_written(self) -> None:
        """Tell once more that leaves have been written to: their framework may have looked at them meanwhile."""
        for leaf, family in self._families.items():
            family.written(self.carriers[leaf])

"""Buckets through the memory that ranks of one host share (`funcavg.collectives.node`)."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from funcavg import _points
from funcavg._engine.buckets import Bucket, make_plan
from funcavg._engine.crossing import DELAY, Crossing, weights_by_node
from funcavg._engine.kernel import library
from funcavg._engine.lanes import Cargo
from funcavg._engine.mean import Means, wide
from funcavg._engine.steps import NodeSlots, Step
from funcavg._memory import address_of
from funcavg._trees import Family, Leaf
from funcavg.collectives.node import Node, schedule

if TYPE_CHECKING:
    from funcavg._engine.codes import Codes
    from funcavg._engine.table import Table, Touched

__all__ = ["NodeLane", "NodePlan"]

BEFORE = {"reduce": "arrived", "copy out": "done"}  # the points of a step
AFTER = {"copy in": "copied_in", "reduce": "reduced", "copy out": "copied_out"}


class NodePlan:
    """Leaves, (number, family, leaf) each, in buckets of a node's slots, and what this rank does with them in turn."""

    def __init__(self, node: Node, leaves: Sequence[tuple[int, Family, Leaf]]) -> None:
        buckets = self.buckets = make_plan(leaves, node.rows, NodeSlots(node), node.slot_bytes)
        crosses, reduces = len(node.nodes) > 1, node.index < node.shards
        self.steps = [
            Step(action, buckets[k], rule.waits, k + 1 - rule.behind, rule.tells, k + 1)
            for action, k in schedule(len(buckets), DELAY if crosses else 0)
            if reduces or action not in ("reduce", "publish")
            for rule in [node.rules[action]]
        ]
        # Others read all of this rank's in-slots but its own shard, and its own shard of the means.
        nbytes = sum(bucket.mine.nbytes for bucket in buckets)
        mine = nbytes // node.shards if reduces else 0
        self.bytes_sent = (nbytes - mine if node.size > 1 else 0) + mine * (node.size - 1)
        self.table: Table | None = None
        if (found := library()) is not None:
            from funcavg._engine.table import Table  # which other lanes, and other kernels, need not import

            self.table = Table(found, node, self.steps, crosses=crosses)


class NodeLane:
    """A plan of buckets in the slots of a node.

    Nothing is read or arrives late in shared memory, so large leaves are always read, and their means written, where
    they lie: the shard that this rank reduces never goes through its in-slot, and is not copied out.
    """

    def __init__(
        self,
        plan: NodePlan,
        node: Node,
        collective: Any,
        crossing: Crossing | None,
        codes: Mapping[int, Codes] | None = None,
    ) -> None:
        self.plan, self.node, self.collective, self.crossing = plan, node, collective, crossing
        self.codes = codes  # of what crosses

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets."""
        here, between = weights_by_node(self.node.nodes, cargo.weights)
        if self.crossing is not None:
            self.crossing.begin(between, cargo.timeout, self.codes)
        weights = here[self.node.here]
        self._counts = weights is None or any(weights)  # else nobody reads this node's means
        self._weights, self._means = weights if self._counts else None, dict[str, Means]()
        self._sources = self._targets = _Memory(cargo.carriers, cargo.addresses)
        if cargo.results is not cargo.carriers:
            given = zip(cargo.results, cargo.carriers, cargo.addresses or [0] * len(cargo.carriers), strict=True)
            self._targets = _Memory(cargo.results, [at if result is carrier else 0 for result, carrier, at in given])
        try:
            self._carry(cargo.timeout)
        finally:  # also where an error has stopped it half way
            self._targets.have_been_written(self.plan.table)
        self.collective.bytes_sent += self.plan.bytes_sent

    def _carry(self, timeout: float) -> None:
        node, steps, table = self.node, self.plan.steps, self.plan.table
        actions = {
            "copy in": self._copy_in,
            "reduce": self._reduce,
            "publish": self._publish,
            "copy out": self._copy_out,
        }
        watched = _points.are_watched()
        self._fill()
        position, before = 0, node.begin(len(self.plan.buckets))
        while position < len(steps):
            action, bucket, waits, least, tells, told = steps[position]
            if waits is not None:
                node.wait(waits, before + least, timeout)
            if watched and action in BEFORE:
                _points.reached(BEFORE[action], bucket.number)
            following = position
            if table is not None:
                read, written = table.touched(position)
                if self._sources.have_moved(read) or self._targets.have_moved(written):
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

    def _fill(self) -> None:
        table = self.plan.table
        if table is not None:
            sources = self._sources.places(table)
            targets = sources if self._targets is self._sources else self._targets.places(table)
            table.fill(sources, targets, self._weights, self._means_of)

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


class _Memory:
    """Where leaves lie: found for a call, and again when they have moved.

    ``known`` is where they lay when the call began, as their families say. Until `have_moved` sees otherwise, small
    ones are taken to lie there.
    """

    def __init__(self, carriers: Sequence[Any], known: Sequence[int] = ()) -> None:
        self.carriers, self._ask, self._all_there = carriers, False, False
        self._addresses = list(known) or [0] * len(carriers)  # 0 or less: nowhere, not in order, or out of reach
        self._large: dict[int, tuple[Family, Any, Hashable]] = {}  # leaves with buckets of their own: bytes, extent
        self._operands: dict[int, Any] = {}  # and these as the kernel takes them

    def places(self, table: Table) -> list[int]:
        """Return where a table's leaves lie; raise RuntimeError if the memory of one has been freed."""
        for leaf, family in table.large.items():
            self._find(family, leaf)
        for family, leaves in table.small.items():
            for leaf in leaves:
                # None: a result that buckets make
                if (self._ask or not self._addresses[leaf]) and self.carriers[leaf] is not None:
                    self._addresses[leaf] = _address(family.as_bytes(self.carriers[leaf]))
        self._ask = True
        places = list(map(self._addresses.__getitem__, table.leaves))
        self._all_there = min(places, default=0) > 0
        return places

    def have_moved(self, touched: Sequence[Touched]) -> bool:
        """Say whether one of these leaves lies elsewhere than when it was found, or has lost memory."""
        carriers, addresses = self.carriers, self._addresses
        for family, large, small in touched:
            if any([family.extent(carriers[leaf]) != self._large[leaf][2] for leaf in large]):
                return True
            there = small if self._all_there else [leaf for leaf in small if addresses[leaf] > 0]
            if there and family.pointer is not None:
                now = list(map(family.pointer, map(carriers.__getitem__, there)))
                if now != list(map(addresses.__getitem__, there)):
                    return True
        return False

    def address(self, bucket: Bucket) -> int:
        """Return where a bucket begins in a leaf of its own; 0 if it has none, or not in order."""
        if bucket.own is None:
            return 0
        family, leaf, begin, _ = bucket.own
        self._find(family, leaf)
        return self._addresses[leaf] and self._addresses[leaf] + begin

    def shard(self, bucket: Bucket, means: Means) -> Any:
        """Return this rank's shard of a bucket there, as the kernel takes it; None if it does not lie there."""
        if bucket.own is None or not self.address(bucket):
            return None
        _, leaf, begin, _ = bucket.own
        if leaf not in self._operands:
            self._operands[leaf] = means.operand(self._large[leaf][1])
        return means.part(self._operands[leaf], begin + bucket.theirs.begin, begin + bucket.theirs.end)

    def have_been_written(self, table: Table | None) -> None:
        """Tell frameworks whose leaves have been written to behind their backs."""
        leaves = {family: list(its) for family, its in table.small.items()} if table is not None else {}
        for leaf, (family, _, _) in self._large.items():
            leaves.setdefault(family, []).append(leaf)
        for family, its in leaves.items():
            reached = its if self._all_there else [leaf for leaf in its if self._addresses[leaf] > 0]
            family.written(list(map(self.carriers.__getitem__, reached)))

    def _find(self, family: Family, leaf: int) -> None:
        extent = family.extent(self.carriers[leaf])
        if leaf not in self._large or extent != self._large[leaf][2]:
            flat = family.as_bytes(self.carriers[leaf])
            self._large[leaf], self._addresses[leaf] = (family, flat, extent), _address(flat)
            self._operands.pop(leaf, None)


def _address(flat: Any) -> int:
    return 0 if flat is None else address_of(flat)

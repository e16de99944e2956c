"""A plan's steps in the memory of a node: what a rank does with each bucket, for Python to go through, and for C.

The kernel in C goes through a table of steps as far as others have come; it never waits. All waiting is Python's, with
its deadline, and so is what C does not know: packing, other nodes, and means of some dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._engine.buckets import Bucket, make_plan
from funcavg._engine.crossing import DELAY
from funcavg._engine.kernel import Library, library
from funcavg._engine.mean import Means
from funcavg._memory import address_of
from funcavg._trees import Family, Leaf
from funcavg.collectives.node import SLOTS, Node, schedule

__all__ = ["NodePlan", "Station", "Step", "Table"]

PYTHON, COPY, MEAN = range(3)  # actions, as kernel.c numbers them
CHUNK = 48  # steps that C takes at most before Python looks around: at signals, and whether leaves are still there
STEP = np.dtype(  # `struct step` of kernel.c
    [
        *((name, np.int64) for name in ("action", "waits", "least", "tells", "told")),
        *((name, np.uint64, 2) for name in ("to", "from", "sizes")),
        *((name, np.uint64) for name in ("means", "shards", "out", "also", "nbytes")),
    ]
)


class Station:
    """Where a bucket lies in a node's memory: views and addresses that are made once for a plan."""

    def __init__(self, node: Node, everyone: Sequence[Any], out: Any, row_bytes: int) -> None:
        shard = len(node.nodes) * row_bytes
        self.begin = min(node.index, node.shards) * shard  # of the shard that this rank reduces, if it has one
        self.end = min(node.index + 1, node.shards) * shard
        self.nbytes = self.end - self.begin
        self.shards = [slot[self.begin : self.end] for slot in everyone]
        self.landing = out[self.begin : self.end]
        self.operands: dict[str, tuple[list[Any], Any]] = {}  # by dtype: shards and landing, as the kernel takes them
        others = [(begin, end) for begin, end in ((0, self.begin), (self.end, len(out))) if begin < end]
        mine, means = address_of(everyone[node.index]), address_of(out)
        self.given = [(mine + begin, begin, end - begin) for begin, end in others]  # address, from where on, bytes
        self.taken = [(means + begin, begin, end - begin) for begin, end in others]


class _NodeSlots:
    """The slots of a node's shared memory, as plans see them."""

    apart = True

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lent: dict[tuple[int, int], tuple[Any, Station, Any]] = {}  # there are many buckets, of few lengths

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Station, Any]:
        """Return this rank's in-slot, its station, and the out-slot: so many rows of ``nbytes``."""
        key = number % SLOTS, nbytes
        if key not in self._lent:
            everyone, out = self._node.slots(number)
            everyone, out = [slot[: rows * nbytes] for slot in everyone], out[: rows * nbytes]
            station, mine = Station(self._node, everyone, out, nbytes), everyone[self._node.index]
            self._lent[key] = mine.reshape(rows, nbytes), station, out.reshape(rows, nbytes)
        return self._lent[key]


class Step(NamedTuple):
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
        found = library()
        self.table = None if found is None else Table(found, node, self.steps, crosses=crosses)


class Table:
    """The steps as C takes them. What depends on where leaves lie, or on weights, is filled in at each call."""

    def __init__(self, found: Library, node: Node, steps: Sequence[Step], *, crosses: bool) -> None:
        self._run, self._index, self._crosses = found.steps, node.index, crosses
        self._words = node.words()
        self._rows = rows = np.zeros(len(steps), STEP)
        for row, step in zip(rows, steps, strict=True):
            waits, tells = (-1 if word is None else word for word in (step.waits, step.tells))
            row["waits"], row["least"], row["tells"], row["told"] = waits, step.least, tells, step.told
        owned = [step.bucket.own for step in steps if step.bucket.own is not None]
        self.leaves = {leaf: family for family, leaf, *_ in owned}  # those with buckets of their own
        self._order = {leaf: at for at, leaf in enumerate(self.leaves)}
        self._copies_in = self._copies(steps, "copy in")
        self._copies_out = self._copies(steps, "copy out")
        self._means = [i for i, step in enumerate(steps) if step.action == "reduce"]
        reduced = [steps[i].bucket for i in self._means]
        kinds = np.array([bucket.element for bucket in reduced])
        self._elements = {str(kind): kinds == kind for kind in np.unique(kinds)}
        self._leaf_of = np.array([self._where(bucket)[0] for bucket in reduced], np.int64)
        self._begin_of = np.array([self._where(bucket)[1] + bucket.theirs.begin for bucket in reduced], np.uint64)
        self._shards = np.array([[address_of(s) for s in b.theirs.shards] for b in reduced], np.uint64)
        self._landings = np.array([address_of(b.theirs.landing) for b in reduced], np.uint64)
        rows["nbytes"][self._means] = [bucket.theirs.nbytes for bucket in reduced]
        self._filled: Any = None  # for what
        # Leaves whose memory may be freed meanwhile are looked at before C takes steps with them.
        self._touched: list[list[int]] = []
        for begin in range(0, len(steps), CHUNK):
            chunk = [step.bucket.own for step in steps[begin : begin + CHUNK]]
            self._touched.append(list(dict.fromkeys(own[1] for own in chunk if own and own[0].pointer)))

    def _where(self, bucket: Bucket) -> tuple[int, int]:
        """Return which of the leaves a bucket is of, and where it begins there; -1 for a bucket of several."""
        return (-1, 0) if bucket.own is None else (self._order[bucket.own[1]], bucket.own[2])

    def _copies(self, steps: Sequence[Step], action: str) -> tuple[Any, Any, Any]:
        """Fill in the slots' side of copies; return their rows, leaves, and where they begin in these."""
        numbers = [i for i, step in enumerate(steps) if step.action == action and step.bucket.own is not None]
        begins = np.zeros((len(numbers), 2), np.uint64)
        for at, i in enumerate(numbers):
            station, base = steps[i].bucket.theirs, self._where(steps[i].bucket)[1]
            for k, (slot, begin, nbytes) in enumerate(station.given if action == "copy in" else station.taken):
                self._rows["to" if action == "copy in" else "from"][i, k] = slot
                self._rows["sizes"][i, k], begins[at, k] = nbytes, base + begin
        return np.array(numbers, np.int64), [self._where(steps[i].bucket)[0] for i in numbers], begins

    def fill(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        weights: Sequence[float] | None,
        means_of: Callable[[str], Means],
    ) -> None:
        """Fill in where `leaves` lie, and where their results do (0: not in order, so Python packs and unpacks)."""
        filled = sources, targets, weights
        if filled == self._filled:
            return
        self._filled = None
        rows, means = self._rows, {element: means_of(element) for element in self._elements}
        given, taken = (np.array([*places, 0], np.uint64) for places in (sources, targets))  # -1 finds the 0
        for (numbers, leaves, begins), side, places in (
            (self._copies_in, "from", given),
            (self._copies_out, "to", taken),
        ):
            if len(numbers):
                found = places[leaves]
                rows[side][numbers] = found[:, None] + begins
                rows["action"][numbers] = np.where(found, COPY, PYTHON)
        if self._means and not self._crosses:
            self._fill_means(given, taken, means)
        self._filled = filled

    def _fill_means(self, given: Any, taken: Any, means: Mapping[str, Means]) -> None:
        rows = self._rows
        source, target, shards = given[self._leaf_of], taken[self._leaf_of], self._shards.copy()
        shards[:, self._index] = np.where(source, source + self._begin_of, shards[:, self._index])
        kept = next(iter(means.values())).kept
        self._of_call = np.ascontiguousarray(shards[:, kept]), means  # which C finds by their addresses
        width = 8 * len(kept)
        rows["shards"][self._means] = self._of_call[0].ctypes.data + width * np.arange(len(shards), dtype=np.uint64)
        rows["out"][self._means] = np.where(target, target + self._begin_of, self._landings)
        rows["also"][self._means] = np.where(target, self._landings, 0)
        in_c = np.zeros(len(shards), np.uint64)
        for element, its in self._elements.items():
            in_c[its] = means[element].in_c
        rows["means"][self._means] = in_c
        rows["action"][self._means] = np.where(in_c, MEAN, PYTHON)

    def touched(self, position: int) -> list[int]:
        """Return leaves whose memory may have gone, and is used by the steps that `run` takes."""
        return self._touched[position // CHUNK]

    def run(self, position: int, before: int, *, one: bool = False) -> int:
        """Take the steps from ``position`` on, as far as others have come; return the first that is not taken."""
        end = position + 1 if one else min((position // CHUNK + 1) * CHUNK, len(self._rows))
        words = self._words
        found: int = self._run(self._rows.ctypes.data, position, end, words.ctypes.data, words.shape[1], before)
        return found

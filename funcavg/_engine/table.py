"""The steps of a plan as C takes them.

The kernel in C goes through a table of steps as far as others have come; it never waits. All waiting is Python's, with
its deadline, and so is what C does not know: other nodes, means of some dtypes, and leaves that do not lie in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._engine.buckets import Bucket
from funcavg._engine.kernel import Library
from funcavg._engine.mean import Means
from funcavg._engine.steps import Step
from funcavg._memory import address_of
from funcavg._trees import Family
from funcavg.collectives.node import Node

__all__ = ["Table", "Touched"]

PYTHON, COPY, MEAN = range(3)  # actions, as kernel.c numbers them
CHUNK = 48  # steps that C takes at most before Python looks around; and leaves, but for those of one step alone
STEP = np.dtype(  # `struct step` of kernel.c
    [
        *((name, np.int64) for name in ("action", "waits", "least", "tells", "told", "count")),
        *((name, np.uint64) for name in ("copies", "means", "shards", "out", "also", "nbytes")),
    ]
)
COPIES = np.dtype([(name, np.uint64) for name in ("to", "from", "nbytes")])  # `struct copy` of kernel.c
NOWHERE, ZEROS = -1, -2  # in the place of leaves: one that is not in order, and what fills the end of a bucket


class Touched(NamedTuple):
    """Leaves of one family, whose memory may be freed meanwhile."""

    family: Family
    large: list[int]  # those with buckets of their own
    small: list[int]


class _Chunk(NamedTuple):
    """Steps that C takes at once: until when, and the leaves that they read and write."""

    end: int
    read: list[Touched]
    written: list[Touched]


class Table:
    """A row for each step. What depends on where leaves lie, or on weights, is filled in at each call.

    ``large`` are leaves with buckets of their own, ``small`` others that lie in order: those of each family.
    """

    def __init__(self, found: Library, node: Node, steps: Sequence[Step], *, crosses: bool) -> None:
        self._run, self._words, self._crosses = found.steps, node.words(), crosses
        self._rows = rows = np.zeros(len(steps), STEP)
        for row, step in zip(rows, steps, strict=True):
            waits, tells = (-1 if word is None else word for word in (step.waits, step.tells))
            row["waits"], row["least"], row["tells"], row["told"] = waits, step.least, tells, step.told
        self.large: dict[int, Family] = {}
        self.small: dict[Family, list[int]] = {}
        self._find_leaves(list({step.bucket.number: step.bucket for step in steps}.values()))
        self.leaves = [*self.large, *(leaf for its in self.small.values() for leaf in its)]  # in the table's order
        self._order = order = {leaf: at for at, leaf in enumerate(self.leaves)}
        self._zeros = np.zeros(max((len(step.bucket.padding) for step in steps), default=0), np.uint8)
        self._given, self._taken = (_Copies(rows, steps, action, order) for action in ("copy in", "copy out"))
        self._means = _Means(rows, steps, node.index, order)
        self._chunks: list[_Chunk] = []  # that of each step
        while len(self._chunks) < len(steps):
            begin, end = len(self._chunks), self._end_of_chunk(steps, len(self._chunks))
            read, written = (self._touched_by(steps[begin:end], action) for action in ("copy in", "copy out"))
            self._chunks += [_Chunk(end, read, written)] * (end - begin)
        self._filled: Any = None  # for what

    def _find_leaves(self, buckets: Sequence[Bucket]) -> None:
        self.large = {bucket.own[1]: bucket.own[0] for bucket in buckets if bucket.own is not None}
        small: dict[Family, dict[int, None]] = {}
        for bucket in buckets:
            for (number, family, leaf), _, _ in bucket.ranges:
                if leaf.in_order and family.pointer is not None and number not in self.large:
                    small.setdefault(family, {})[number] = None
        self.small = {family: list(leaves) for family, leaves in small.items()}

    def _end_of_chunk(self, steps: Sequence[Step], begin: int) -> int:
        leaves: set[int] = set()
        for end in range(begin, min(begin + CHUNK, len(steps))):
            leaves.update(leaf for action in ("copy in", "copy out") for leaf, _ in _leaves_of(steps[end], action))
            if end > begin and len(leaves) > CHUNK:
                return end
        return min(begin + CHUNK, len(steps))

    def _touched_by(self, steps: Sequence[Step], action: str) -> list[Touched]:
        found: dict[Family, Touched] = {}
        for leaf, family in dict.fromkeys(found for step in steps for found in _leaves_of(step, action)):
            touched = found.setdefault(family, Touched(family, [], []))
            if leaf in self.large:
                touched.large.append(leaf)
            elif leaf in self._order:
                touched.small.append(leaf)
        return [touched for touched in found.values() if touched.family.pointer is not None]

    def fill(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        weights: Sequence[float] | None,
        means_of: Callable[[str], Means],
    ) -> None:
        """Fill in where `leaves` lie, and where their results do (0 or less: not in order, so Python packs them)."""
        filled = sources, targets, weights
        if filled == self._filled:
            return
        self._filled = None
        ends = [address_of(self._zeros), 0]  # found as ZEROS and NOWHERE
        given, taken = (np.maximum([*places, *ends], 0).astype(np.uint64) for places in (sources, targets))
        self._given.fill(self._rows, given)
        self._taken.fill(self._rows, taken)
        if not self._crosses:
            self._means.fill(self._rows, given, taken, means_of)
        self._filled = filled

    def touched(self, position: int) -> tuple[list[Touched], list[Touched]]:
        """Return the leaves that the steps which `run` takes may read, and those that they may write."""
        return self._chunks[position].read, self._chunks[position].written

    def run(self, position: int, before: int, *, one: bool = False) -> int:
        """Take the steps from ``position`` on, as far as others have come; return the first that is not taken."""
        end = position + 1 if one else self._chunks[position].end
        words = self._words
        found: int = self._run(self._rows.ctypes.data, position, end, words.ctypes.data, words.shape[1], before)
        return found


class _Copies:
    """All copies of leaves into slots ("copy in"), or out of them."""

    def __init__(self, rows: Any, steps: Sequence[Step], action: str, order: dict[int, int]) -> None:
        slots, self._side = ("to", "from") if action == "copy in" else ("from", "to")
        self._steps = [i for i, step in enumerate(steps) if step.action == action]
        of_steps = [_copies_of(steps[i].bucket, action, order) for i in self._steps]
        copies, counts = [copy for its in of_steps for copy in its], [len(its) for its in of_steps]
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)[:-1]  # where each step's copies begin
        self._copies = np.zeros(len(copies), COPIES)
        self._copies[slots], self._copies["nbytes"] = [slot for slot, *_ in copies], [nbytes for *_, nbytes in copies]
        self._leaves = np.array([leaf for _, leaf, _, _ in copies], np.int64)
        self._offsets = np.array([offset for _, _, offset, _ in copies], np.uint64)
        rows["count"][self._steps] = counts
        rows["copies"][self._steps] = self._copies.ctypes.data + COPIES.itemsize * self._firsts

    def fill(self, rows: Any, places: Any) -> None:
        """Fill in where leaves lie; what cannot be reached as a whole is Python's."""
        if self._steps:
            found = places[self._leaves]
            self._copies[self._side] = found + self._offsets
            rows["action"][self._steps] = np.where(np.logical_and.reduceat(found != 0, self._firsts), COPY, PYTHON)


def _copies_of(bucket: Bucket, action: str, order: dict[int, int]) -> list[tuple[int, int, int, int]]:
    """Return (where in the slot, which leaf, where in it, bytes) for each copy of a bucket: at least one."""
    station, into_slot = bucket.theirs, action == "copy in"
    slot = address_of(bucket.mine if into_slot else bucket.landing)
    if bucket.own is not None:  # this rank's own shard stays where it is
        _, leaf, base, _ = bucket.own
        parts, place = station.given if into_slot else station.taken, order[leaf]
        return [(slot, place, base + begin, nbytes) for slot, begin, nbytes in parts] or [(slot, place, base, 0)]
    copies = []
    for (number, _, _), start, stop in bucket.ranges:
        nbytes = (stop - start) * bucket.itemsize
        copies.append((slot, order.get(number, NOWHERE), start * bucket.itemsize, nbytes))
        slot += nbytes
    if into_slot and len(bucket.padding):
        copies.append((slot, ZEROS, 0, len(bucket.padding)))
    return copies


class _Means:
    """The means of this rank's shards, each read and written in its leaf where the bucket has one of its own."""

    def __init__(self, rows: Any, steps: Sequence[Step], index: int, order: dict[int, int]) -> None:
        self._steps, self._index = [i for i, step in enumerate(steps) if step.action == "reduce"], index
        buckets = [steps[i].bucket for i in self._steps]
        kinds = np.array([bucket.element for bucket in buckets])
        self._elements = {str(kind): kinds == kind for kind in np.unique(kinds)}
        owns = [(order[bucket.own[1]], bucket.own[2]) if bucket.own else (NOWHERE, 0) for bucket in buckets]
        self._leaves = np.array([leaf for leaf, _ in owns], np.int64)
        begins = [base + bucket.theirs.begin for (_, base), bucket in zip(owns, buckets, strict=True)]
        self._offsets = np.array(begins, np.uint64)
        self._shards = np.array([[address_of(s) for s in bucket.theirs.shards] for bucket in buckets], np.uint64)
        self._landings = np.array([address_of(bucket.theirs.landing) for bucket in buckets], np.uint64)
        rows["nbytes"][self._steps] = [bucket.theirs.nbytes for bucket in buckets]

    def fill(self, rows: Any, given: Any, taken: Any, means_of: Callable[[str], Means]) -> None:
        """Fill in where shards lie, and where means go: to a leaf and to the slot, or to the slot alone."""
        if not self._steps:
            return
        means = {element: means_of(element) for element in self._elements}
        source, target, shards = given[self._leaves], taken[self._leaves], self._shards.copy()
        shards[:, self._index] = np.where(source, source + self._offsets, shards[:, self._index])
        kept = next(iter(means.values())).kept
        self._held = np.ascontiguousarray(shards[:, kept]), means  # which C finds by their addresses
        width = 8 * len(kept)
        rows["shards"][self._steps] = self._held[0].ctypes.data + width * np.arange(len(shards), dtype=np.uint64)
        rows["out"][self._steps] = np.where(target, target + self._offsets, self._landings)
        rows["also"][self._steps] = np.where(target, self._landings, 0)
        in_c = np.zeros(len(shards), np.uint64)
        for element, its in self._elements.items():
            in_c[its] = means[element].in_c
        rows["means"][self._steps] = in_c
        rows["action"][self._steps] = np.where(in_c, MEAN, PYTHON)


def _leaves_of(step: Step, action: str) -> Iterator[tuple[int, Family]]:
    """Yield the leaves that a step reads ("copy in") or writes ("copy out"): the mean of packed ones does neither."""
    if step.action == action or (step.action == "reduce" and step.bucket.own is not None):
        for (number, family, _), _, _ in step.bucket.ranges:
            yield number, family

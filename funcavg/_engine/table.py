"""The steps of a plan as C takes them.

The kernel in C goes through a table of steps as far as others have come; it never waits. All waiting is Python's, with
its deadline, and so is what C does not know: other nodes, means of some dtypes, and leaves that do not lie in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from funcavg._engine.buckets import Bucket
from funcavg._engine.kernel import Library, library
from funcavg._engine.mean import Means
from funcavg._engine.steps import Step
from funcavg._memory import address_of
from funcavg._trees import Family
from funcavg.collectives.node import Node

__all__ = ["Table", "Touched", "make_table"]

PYTHON, COPY, MEAN = range(3)  # actions, as kernel.c numbers them
CHUNK = 48  # steps that C takes at most, and leaves that it touches, before Python looks around
STEP = np.dtype(  # `struct step` of kernel.c
    [
        *((name, np.int64) for name in ("action", "waits", "least", "tells", "told", "first", "count")),
        *((name, np.uint64) for name in ("means", "shards", "out", "also", "nbytes")),
    ]
)
COPIES = np.dtype([(name, np.uint64) for name in ("to", "from", "nbytes")])  # `struct copy` of kernel.c
NOWHERE = -1  # in the place of a leaf that is not in order


Touched: TypeAlias = list[tuple[Family, list[int]]]


class _Copies(NamedTuple):
    """The copies of all steps of one kind, between slots and leaves."""

    side: str  # of the leaves: "from" or "to"
    begin: int  # where they begin among all
    steps: Any  # the rows of these steps
    firsts: Any  # and where each one's copies begin among these
    leaves: Any  # of each copy: which leaf, in the table's order
    offsets: Any  # and where in it, in bytes


class Table:
    """A row for each step. What depends on where leaves lie, or on weights, is filled in at each call.

    ``large`` are leaves with buckets of their own, ``small`` others that lie in order: those of each family.
    """

    def __init__(self, found: Library, node: Node, steps: Sequence[Step], *, crosses: bool) -> None:
        self._run, self._index, self._crosses = found.steps, node.index, crosses
        self._words = node.words()
        self._rows = rows = np.zeros(len(steps), STEP)
        for row, step in zip(rows, steps, strict=True):
            waits, tells = (-1 if word is None else word for word in (step.waits, step.tells))
            row["waits"], row["least"], row["tells"], row["told"] = waits, step.least, tells, step.told
        self.large: dict[int, Family] = {}
        self.small: dict[Family, dict[int, None]] = {}
        self._find_leaves(list({step.bucket.number: step.bucket for step in steps}.values()))
        self.leaves = [*self.large, *(leaf for its in self.small.values() for leaf in its)]  # in the table's order
        self._order = {leaf: at for at, leaf in enumerate(self.leaves)}
        self._all = np.zeros(0, COPIES)
        self._copies = [self._add_copies(steps, "copy in"), self._add_copies(steps, "copy out")]
        self._add_means(steps)
        self._chunks: list[tuple[int, Touched, Touched]] = []  # each step: where C stops, and what `touched` says
        begin = 0
        while begin < len(steps):
            end = self._end_of_chunk(steps, begin)
            read, written = (self._touched_by(steps[begin:end], action) for action in ("copy in", "copy out"))
            self._chunks += [(end, read, written)] * (end - begin)
            begin = end
        self._filled: Any = None  # for what

    def _find_leaves(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            if bucket.own is not None:
                self.large[bucket.own[1]] = bucket.own[0]
        for bucket in buckets:
            for (number, family, leaf), _, _ in bucket.ranges if bucket.own is None else ():
                if leaf.in_order and family.pointer is not None and number not in self.large:
                    self.small.setdefault(family, {})[number] = None

    def _end_of_chunk(self, steps: Sequence[Step], begin: int) -> int:
        """Return where C stops at the latest, for Python to look around: at signals, and whether leaves are there."""
        leaves: set[int] = set()
        for end in range(begin, min(begin + CHUNK, len(steps))):
            leaves.update(leaf for action in ("copy in", "copy out") for leaf, _ in _leaves_of(steps[end], action))
            if end > begin and len(leaves) > CHUNK:
                return end
        return min(begin + CHUNK, len(steps))

    def _touched_by(self, steps: Sequence[Step], action: str) -> Touched:
        found: dict[Family, dict[int, None]] = {}
        for step in steps:
            for leaf, family in _leaves_of(step, action):
                if leaf in self._order and family.pointer is not None:
                    found.setdefault(family, {})[leaf] = None
        return [(family, list(leaves)) for family, leaves in found.items()]

    def _add_copies(self, steps: Sequence[Step], action: str) -> _Copies:
        """Fill in the slots' side of copies."""
        slots, leaves = ("to", "from") if action == "copy in" else ("from", "to")
        chosen = [i for i, step in enumerate(steps) if step.action == action]
        of_step = [self._copies_of(steps[i].bucket, action) for i in chosen]
        counts, copies = [len(its) for its in of_step], [copy for its in of_step for copy in its]
        firsts, begin = np.cumsum([0, *counts], dtype=np.int64)[:-1], len(self._all)
        self._rows["first"][chosen], self._rows["count"][chosen] = begin + firsts, counts
        more = np.zeros(len(copies), COPIES)
        more[slots], more["nbytes"] = [slot for slot, *_ in copies], [nbytes for *_, nbytes in copies]
        self._all = np.concatenate([self._all, more])
        of_leaves = np.array([leaf for _, leaf, _, _ in copies], np.int64)
        offsets = np.array([offset for _, _, offset, _ in copies], np.uint64)
        return _Copies(leaves, begin, np.array(chosen, np.int64), firsts, of_leaves, offsets)

    def _copies_of(self, bucket: Bucket, action: str) -> list[tuple[int, int, int, int]]:
        """Return (where in the slot, which leaf, where in it, bytes) for each copy of a bucket: at least one."""
        station, into_slot = bucket.theirs, action == "copy in"
        if bucket.own is not None:  # this rank's own shard stays where it is
            _, leaf, base, _ = bucket.own
            parts = station.given if into_slot else station.taken
            place = self._order[leaf]
            return [(slot, place, base + begin, nbytes) for slot, begin, nbytes in parts] or [(0, place, 0, 0)]
        copies, slot = [], address_of(bucket.mine if into_slot else bucket.landing)
        for (number, _, _), start, stop in bucket.ranges:
            nbytes = (stop - start) * bucket.itemsize
            copies.append((slot, self._order.get(number, NOWHERE), start * bucket.itemsize, nbytes))
            slot += nbytes
        return copies

    def _add_means(self, steps: Sequence[Step]) -> None:
        self._means = [i for i, step in enumerate(steps) if step.action == "reduce"]
        reduced = [steps[i].bucket for i in self._means]
        kinds = np.array([bucket.element for bucket in reduced])
        self._elements = {str(kind): kinds == kind for kind in np.unique(kinds)}
        owns = [(self._order[b.own[1]], b.own[2]) if b.own is not None else (NOWHERE, 0) for b in reduced]
        self._leaf_of = np.array([leaf for leaf, _ in owns], np.int64)
        begins = [base + bucket.theirs.begin for (_, base), bucket in zip(owns, reduced, strict=True)]
        self._begin_of = np.array(begins, np.uint64)
        self._shards = np.array([[address_of(s) for s in b.theirs.shards] for b in reduced], np.uint64)
        self._landings = np.array([address_of(b.theirs.landing) for b in reduced], np.uint64)
        self._rows["nbytes"][self._means] = [bucket.theirs.nbytes for bucket in reduced]

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
        means = {element: means_of(element) for element in self._elements}
        given, taken = (
            np.maximum([*places, 0], 0).astype(np.uint64) for places in (sources, targets)
        )  # the 0: NOWHERE
        for copies, places in zip(self._copies, (given, taken), strict=True):
            if len(copies.steps):
                found = places[copies.leaves]
                self._all[copies.side][copies.begin : copies.begin + len(found)] = found + copies.offsets
                in_c = np.logical_and.reduceat(found != 0, copies.firsts)
                self._rows["action"][copies.steps] = np.where(in_c, COPY, PYTHON)
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

    def touched(self, position: int) -> tuple[Touched, Touched]:
        """Return leaves that the steps which `run` takes read, and write, and whose memory may have gone meanwhile."""
        return self._chunks[position][1:]

    def run(self, position: int, before: int, *, one: bool = False) -> int:
        """Take the steps from ``position`` on, as far as others have come; return the first that is not taken."""
        end = position + 1 if one else self._chunks[position][0]
        rows, copies, words = self._rows.ctypes.data, self._all.ctypes.data, self._words
        found: int = self._run(rows, copies, position, end, words.ctypes.data, words.shape[1], before)
        return found


def _leaves_of(step: Step, action: str) -> Iterator[tuple[int, Family]]:
    """Yield the leaves that a step reads ("copy in") or writes ("copy out"): the mean of packed ones does neither."""
    if step.action == action or (step.action == "reduce" and step.bucket.own is not None):
        for (number, family, _), _, _ in step.bucket.ranges:
            yield number, family


def make_table(node: Node, steps: Sequence[Step], *, crosses: bool) -> Table | None:
    """Return the table of a plan's steps, or None where there is no kernel in C."""
    found = library()
    return None if found is None else Table(found, node, steps, crosses=crosses)

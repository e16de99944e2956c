"""Leaves cut, packed and unpacked: how a tree becomes a stream of buckets, and back.

A bucket holds consecutive elements of one dtype, cut into rows of equal length, one per rank. Its memory is a slot:
`mine` (what this rank gives), `theirs` (what it reads of others), and `landing`, where the mean appears. Over a
transport's verbs `landing` is `mine`, and there are enough slots for `AHEAD` buckets to be exchanged and as many to be
shared while one is packed. On a node all three lie in shared memory.

A large leaf has buckets of its own. Where it is contiguous, it is sent from and received into its own memory, and
nothing is packed. Small leaves, and what is left of large ones when the shards are equal, share buckets.

Where buckets begin depends only on what ranks agree about: dtypes, shapes, order, and the size of the group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from funcavg._trees import Family, Leaf

__all__ = ["AHEAD", "SLOTS", "Bucket", "Lender", "Slots", "bucket_bytes", "cut", "host_memory", "made_by", "make_plan"]

LARGE = 1 << 20  # bytes
AHEAD = 4  # measured over Gloo, two ranks: 1.1 to 1.2 times faster than 1, no slower than more
SLOTS = 2 * AHEAD + 1
Index = tuple[slice | int, ...]
_Row = tuple[int, Family, Leaf]  # a leaf's number among the carriers, and what it is
_Range = tuple[_Row, int, int]  # and which of its elements, from and to


def bucket_bytes(size: int) -> int:
    """Return how many bytes a bucket holds: 4 MiB, and up to 16 MiB where a shard would get too small."""
    return min(max(4 << 20, size * (64 << 10)), 16 << 20)


class Lender(Protocol):
    """Whoever has memory for buckets."""

    apart: bool  # whether large leaves have buckets of their own, since they are moved from and to their own memory

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Any, Any]:
        """Return `mine`, `theirs` and `landing` for a plan's bucket of that number."""
        ...


class Slots:
    """The memory of buckets in flight on the host, made when first needed and kept for later calls.

    ``allocate(nbytes)`` returns flat bytes.
    """

    apart = True

    def __init__(self, allocate: Any, nbytes: int) -> None:
        self._allocate, self._nbytes = allocate, nbytes
        self._pairs: list[Any] = [None] * SLOTS

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Any, Any]:
        """Return `mine`, `theirs` and `landing` of a slot, which is `mine`: so many rows of ``nbytes``."""
        slot = number % SLOTS
        if self._pairs[slot] is None:
            self._pairs[slot] = self._allocate(self._nbytes), self._allocate(self._nbytes)
        mine, theirs = (memory[: rows * nbytes].reshape(rows, nbytes) for memory in self._pairs[slot])
        return mine, theirs, mine


class _Part:
    """The pieces of one family's leaves in one bucket: which leaf each is of, and where it lies."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.leaves: list[int] = []
        self.cut: list[tuple[int, int, Index]] = []  # of pieces that are not all of a leaf: which, leaf, block of it
        self.windows: list[Any] = []  # in `mine`
        self.landings: list[Any] = []  # and in `landing`
        self.run: Any = None  # all of the bucket as one window, if it holds nothing but vectors of this family
        self.made: list[int] = []  # leaves whose results can be made here, as copies of
        self.makings: list[Any] = []  # these landings
        self.others: list[int] = []  # pieces of other leaves

    def add(self, leaf: int, index: Index | None, window: Any, landing: Any, *, make: bool) -> None:
        """Add a piece: a block of a leaf, or all of it (None), whose result may be made here."""
        if index is not None:
            self.cut.append((len(self.leaves), leaf, index))
        if make:
            self.made.append(leaf)
            self.makings.append(landing)
        else:
            self.others.append(len(self.leaves))
        self.leaves.append(leaf)
        self.windows.append(window)
        self.landings.append(landing)

    def select(self, carriers: Sequence[Any]) -> list[Any]:
        """Return the pieces."""
        chosen = list(map(carriers.__getitem__, self.leaves))
        for piece, leaf, index in self.cut:
            chosen[piece] = carriers[leaf][index]
        return chosen

    def pack(self, carriers: Sequence[Any]) -> None:
        if self.run is not None:
            self.family.concatenate(self.select(carriers), self.run)
        else:
            self.family.copy(self.windows, self.select(carriers))

    def unpack(self, results: Any) -> None:
        if not self.made or results[self.made[0]] is not None:  # which then is so for all of them
            self.family.copy(self.select(results), self.landings)
            return
        for leaf, copy in zip(self.made, self.family.copies(self.makings), strict=True):
            results[leaf] = copy
        if self.others:
            chosen = self.select(results)
            self.family.copy([chosen[i] for i in self.others], [self.landings[i] for i in self.others])


class Bucket(NamedTuple):
    """One unit that is packed and moved."""

    number: int  # in its plan
    element: str  # dtype
    itemsize: int  # bytes
    mine: Any  # bytes, (rows, row bytes)
    theirs: Any  # of other ranks: the same, of which each row came from another; on a node, its `Station`
    landing: Any  # as `mine`
    padding: Any  # the bytes behind the last element, which no leaf fills
    parts: Callable[[], list[_Part]]  # made when first asked for: leaves that lie in order are not packed
    ranges: Sequence[_Range]  # the elements that it holds
    own: tuple[Family, int, int, int] | None  # all of it is bytes m to n of one leaf: (family, leaf, m, n)

    def rows_in(self, carriers: Sequence[Any]) -> Any:
        """Return the rows of this bucket in a leaf's own memory, None if they are not there."""
        if self.own is None:
            return None
        family, leaf, begin, end = self.own
        flat = family.as_bytes(carriers[leaf])
        return None if flat is None else flat[begin:end].reshape(self.mine.shape)

    def pack(self, carriers: Sequence[Any]) -> None:
        """Copy pieces of the leaves into `mine`."""
        for part in self.parts():
            part.pack(carriers)
        if len(self.padding):
            self.padding[...] = 0

    def unpack(self, results: Any) -> None:
        """Copy `landing`, now the mean, into pieces of the results; make those that are not there yet."""
        for part in self.parts():
            part.unpack(results)


def make_plan(leaves: Sequence[_Row], size: int, slots: Lender, limit: int) -> list[Bucket]:
    """Assign the elements of all leaves, (number, family, leaf) each, to buckets of ``size`` rows.

    ``limit`` is the most bytes that a bucket holds.
    """
    by_element: dict[str | None, list[_Row]] = {}
    for row in leaves:
        by_element.setdefault(row[2].element, []).append(row)
    plan: list[Bucket] = []
    for element, rows in by_element.items():
        itemsize = rows[0][2].native.itemsize
        capacity = max(limit // itemsize // size, 1) * size  # elements, a multiple of the number of shards
        ranges: list[_Range] = []
        for row in rows:
            count = math.prod(row[2].shape)
            done = 0
            if slots.apart and count * itemsize >= LARGE:
                buckets = -(-count // capacity)
                each = count // buckets // size * size
                for done in range(each, (buckets + 1) * each, each):
                    plan.append(_bucket(str(element), [(row, done - each, done)], size, slots, len(plan)))
            if done < count:
                ranges.append((row, done, count))
        for group in _fill(ranges, capacity):
            plan.append(_bucket(str(element), group, size, slots, len(plan)))
    return plan


def _fill(ranges: Sequence[_Range], capacity: int) -> Iterator[list[_Range]]:
    """Yield ranges of leaves, (row, start, stop), in groups of ``capacity`` elements."""
    group: list[_Range] = []
    room = capacity
    for row, begin, stop in ranges:
        start = begin
        while start < stop:
            end = min(stop, start + room)
            group.append((row, start, end))
            room -= end - start
            start = end
            if not room:
                yield group
                group, room = [], capacity
    if group:
        yield group


def _bucket(element: str, ranges: Sequence[_Range], size: int, slots: Lender, position: int) -> Bucket:
    itemsize = ranges[0][0][2].native.itemsize
    count = sum(stop - start for _, start, stop in ranges)
    mine, theirs, landing = slots.lend(position, size, -(-count // size) * itemsize)
    own = None
    if len(ranges) == 1 and count % size == 0:
        (number, family, _), start, stop = ranges[0]
        own = family, number, start * itemsize, stop * itemsize
    parts = functools.cache(functools.partial(_parts_of, ranges, mine, landing, alone=own is not None))
    padding = mine.reshape(-1)[count * itemsize :]
    return Bucket(position, element, itemsize, mine, theirs, landing, padding, parts, ranges, own)


def _parts_of(ranges: Sequence[_Range], mine: Any, landing: Any, *, alone: bool) -> list[_Part]:
    itemsize = ranges[0][0][2].native.itemsize
    given, taken = mine.reshape(-1), landing.reshape(-1)
    parts: dict[Family, _Part] = {}
    begin = 0
    for (number, family, leaf), start, stop in ranges:
        part = parts.setdefault(family, _Part(family))
        whole = stop - start == math.prod(leaf.shape)
        blocks: list[tuple[Index | None, tuple[int, ...]]] = (
            [(None, leaf.shape)] if whole else [*cut(leaf.shape, start, stop)]
        )
        for index, shape in blocks:
            end = begin + math.prod(shape) * itemsize
            window = landed = family.window(given[begin:end], leaf.native, shape)
            if landing is not mine:
                landed = family.window(taken[begin:end], leaf.native, shape)
            part.add(number, index, window, landed, make=not alone and _is_made(leaf, start, stop))
            begin = end
    if len(parts) == 1 and all(len(leaf.shape) == 1 and not leaf.device for (_, _, leaf), _, _ in ranges):
        (part,) = parts.values()
        part.run = part.family.window(given[:begin], ranges[0][0][2].native, (begin // itemsize,))
    return list(parts.values())


def made_by(plan: Sequence[Bucket]) -> set[int]:
    """Return the leaves whose results `Bucket.unpack` can make: others must be there before."""
    return {
        number
        for bucket in plan
        if bucket.own is None
        for (number, _, leaf), start, stop in bucket.ranges
        if _is_made(leaf, start, stop)
    }


def _is_made(leaf: Leaf, start: int, stop: int) -> bool:
    return leaf.compact and stop - start == math.prod(leaf.shape)


def cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[Index, tuple[int, ...]]]:
    """Cover the elements ``start`` to ``stop`` of an array, counted row by row, with rectangular blocks.

    Yields the index and the shape of each block, in order: at most two per dimension, and one more. Works on any
    memory layout, for it says nothing of strides.

    >>> [(index, shape) for index, shape in cut((3, 4), 2, 9)]
    [((0, slice(2, 4, None)), (2,)), ((slice(1, 2, None),), (1, 4)), ((2, slice(0, 1, None)), (1,))]
    """
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        for index, block in cut(shape[1:], start - last * row, stop - last * row):
            yield (last, *index), block
        return
    if start < first * row:
        for index, block in cut(shape[1:], start - (first - 1) * row, row):
            yield (first - 1, *index), block
    if first < last:
        yield (slice(first, last),), (last - first, *shape[1:])
    if last * row < stop:
        for index, block in cut(shape[1:], 0, stop - last * row):
            yield (last, *index), block


def host_memory(nbytes: int) -> Any:
    """Return fresh host memory for a slot."""
    return np.empty(nbytes, np.uint8)

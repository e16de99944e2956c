"""Leaves cut, packed and unpacked: how a tree becomes a stream of buckets, and back.

A bucket holds consecutive elements of one dtype, cut into one shard per rank. Its memory is a slot: `mine` (what
this rank sends, and in the end the mean) and `theirs` (what arrives), each of ``size`` rows of equal length. Three
slots are enough for one bucket to be packed while the one before is exchanged and the one before that is shared.

Where buckets begin depends only on what ranks agree about: dtypes, shapes, order, and the size of the group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._arrays import Family, Leaf

__all__ = ["Bucket", "Slots", "bucket_bytes", "cut", "make_plan"]

SLOTS = 3
Index = tuple[slice | int, ...]


def bucket_bytes(size: int) -> int:
    """Return how many bytes a bucket holds: 4 MiB, and up to 16 MiB where a shard would get too small."""
    return min(max(4 << 20, size * (64 << 10)), 16 << 20)


class Slots:
    """The memory of buckets in flight, made when first needed and kept for later calls.

    ``allocate(nbytes)`` returns flat bytes: a NumPy array for the host, a torch tensor for an accelerator.
    """

    def __init__(self, allocate: Any, nbytes: int) -> None:
        self._allocate, self._nbytes = allocate, nbytes
        self._pairs: list[Any] = [None] * SLOTS

    def pair(self, number: int) -> tuple[Any, Any]:
        """Return `mine` and `theirs` of a slot."""
        slot = number % SLOTS
        if self._pairs[slot] is None:
            self._pairs[slot] = self._allocate(self._nbytes), self._allocate(self._nbytes)
        mine, theirs = self._pairs[slot]
        return mine, theirs


class _Part(NamedTuple):
    """The pieces of one family's leaves in one bucket."""

    family: Family
    pieces: list[tuple[int, Index | None]]  # which leaf, and which block of it (None: all of it)
    windows: list[Any]  # where they lie in the bucket

    def select(self, carriers: Sequence[Any]) -> list[Any]:
        return [carriers[leaf] if index is None else carriers[leaf][index] for leaf, index in self.pieces]


class Bucket(NamedTuple):
    """One unit that is packed and moved."""

    element: str  # dtype
    mine: Any  # bytes, (size, shard bytes)
    theirs: Any  # bytes, (size, shard bytes)
    padding: Any  # the bytes behind the last element, which no leaf fills
    parts: list[_Part]

    def pack(self, carriers: Sequence[Any]) -> None:
        """Copy pieces of the leaves into `mine`."""
        for part in self.parts:
            part.family.copy(part.windows, part.select(carriers))
        if len(self.padding):
            self.padding[...] = 0

    def unpack(self, carriers: Sequence[Any]) -> None:
        """Copy `mine`, now the mean, into pieces of the results."""
        for part in self.parts:
            part.family.copy(part.select(carriers), part.windows)


def make_plan(leaves: Sequence[tuple[int, Family, Leaf]], size: int, slots: Slots, limit: int) -> list[Bucket]:
    """Assign the elements of all leaves (numbered as in ``carriers``) to buckets of at most ``limit`` bytes."""
    by_element: dict[str, list[tuple[int, Family, Leaf]]] = {}
    for row in leaves:
        element = row[2].element
        assert element is not None
        by_element.setdefault(element, []).append(row)
    plan: list[Bucket] = []
    for element, rows in by_element.items():
        itemsize = rows[0][2].native.itemsize
        capacity = max(limit // itemsize // size, 1) * size  # elements, a multiple of the number of shards
        total = sum(math.prod(leaf.shape) for _, _, leaf in rows)
        pieces = _pieces(rows, capacity)
        for start, group in itertools.groupby(pieces, key=lambda piece: piece[0] // capacity):
            count = min(capacity, total - start * capacity)
            shard = -(-count // size)
            mine, theirs = (memory[: shard * size * itemsize] for memory in slots.pair(len(plan)))
            parts: dict[Family, _Part] = {}
            for position, family, leaf, number, index, shape in group:
                part = parts.setdefault(family, _Part(family, [], []))
                begin = position % capacity * itemsize
                window = mine[begin : begin + math.prod(shape) * itemsize]
                part.pieces.append((number, index))
                part.windows.append(family.window(window, leaf.native, shape))
            rows_of = (size, shard * itemsize)
            bucket = Bucket(
                element, mine.reshape(rows_of), theirs.reshape(rows_of), mine[count * itemsize :], list(parts.values())
            )
            plan.append(bucket)
    return plan


def _pieces(
    rows: Sequence[tuple[int, Family, Leaf]], capacity: int
) -> Iterator[tuple[int, Family, Leaf, int, Index | None, tuple[int, ...]]]:
    """Yield (position in the stream, family, leaf, number, block, shape of the block), none across a bucket's end."""
    position = 0
    for number, family, leaf in rows:
        count = math.prod(leaf.shape)
        if count and position // capacity == (position + count - 1) // capacity:
            yield position, family, leaf, number, None, leaf.shape
        else:
            start = 0
            while start < count:
                stop = min(count, start + capacity - (position + start) % capacity)
                for index, shape in cut(leaf.shape, start, stop):
                    yield position + start, family, leaf, number, index, shape
                    start += math.prod(shape)
        position += count


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

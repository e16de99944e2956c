"""Where blocks lie: those of a row's numbers, and those of its code.

A row's numbers come in pieces, each of one leaf, and no block holds numbers of two. Blocks lie in the code one after
another, each as its scale, four bytes, and its integers::

    numbers    │ leaf a                     │ leaf b   │
    blocks     │ 1024     │ 1024     │ 600   │ 40       │
    code       │ s ······ │ s ······ │ s ··· │ s ·      │
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["SCALE", "Blocks", "cut"]

SCALE = 4  # bytes: a float32
CHUNK = 1 << 17  # numbers that are coded at once, and stay in the cache

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Blocks of one size in a row. Shorter ones are filled up with zeros; of what rotates, these travel, too."""

    size: int  # numbers
    bits: int  # of each in the code
    rotates: bool
    begins: Ints  # among the row's numbers
    lengths: Ints  # numbers
    codes: Ints  # where each begins in the code
    widths: Ints  # bytes there

    def chunks(self) -> Iterator[Blocks]:
        """Yield as many blocks at a time as stay in the cache."""
        step = max(CHUNK // self.size, 1)
        for k in range(0, len(self.begins), step):
            few = slice(k, k + step)
            arrays = self.begins[few], self.lengths[few], self.codes[few], self.widths[few]
            yield Blocks(self.size, self.bits, self.rotates, *arrays)

    def numbers_of(self, row: Floats) -> Floats:
        """Return the blocks' numbers, (blocks, size)."""
        numbers: Floats = _taken(row, self.begins, self.lengths, self.size)
        return numbers

    def put_numbers(self, row: Floats, numbers: Floats) -> None:
        """Write what `numbers_of` returns."""
        _put(row, self.begins, self.lengths, numbers)

    def code_of(self, code: Bytes) -> tuple[Floats, Bytes]:
        """Return the blocks' scales, and (blocks, bytes) of their integers."""
        whole = _taken(code, self.codes, self.widths, SCALE + self.size * self.bits // 8)
        return np.ascontiguousarray(whole[:, :SCALE]).view(np.float32)[:, 0], whole[:, SCALE:]

    def put_code(self, code: Bytes, scales: Floats, integers: Bytes) -> None:
        """Write what `code_of` returns."""
        whole = np.concatenate([scales[:, None].view(np.uint8), integers], axis=1)
        _put(code, self.codes, self.widths, whole)


def _run(row: npt.NDArray[Any], begins: Ints, lengths: Ints, size: int) -> Any:
    """Return blocks of full size that lie one after another, as they lie; None if they do not."""
    first, count = int(begins[0]), len(begins)
    if int(begins[-1]) - first != (count - 1) * size or (lengths != size).any():
        return None
    return row[first : first + count * size].reshape(count, size)


def _places(begins: Ints, lengths: Ints, size: int) -> tuple[npt.NDArray[np.bool_], Ints]:
    there = np.arange(size) < lengths[:, None]
    return there, (begins[:, None] + np.arange(size))[there]


def _taken(row: npt.NDArray[Any], begins: Ints, lengths: Ints, size: int) -> Any:
    run = _run(row, begins, lengths, size)
    if run is not None:
        return run
    there, places = _places(begins, lengths, size)
    blocks = np.zeros(there.shape, row.dtype)
    blocks[there] = row[places]
    return blocks


def _put(row: npt.NDArray[Any], begins: Ints, lengths: Ints, blocks: npt.NDArray[Any]) -> None:
    run = _run(row, begins, lengths, blocks.shape[1])
    if run is not None:
        run[...] = blocks
    else:
        there, places = _places(begins, lengths, blocks.shape[1])
        row[places] = blocks[there]


def cut(pieces: Ints, block: int, bits: int, smallest: int) -> tuple[list[Blocks], int]:
    """Cut pieces, (begin, length) each, into blocks; return these, by kind, and the bytes of the code.

    A piece is as many whole blocks as it has, and one for what is left. With ``smallest`` blocks rotate: then what is
    left has the power of two that it needs, at least that, and if it has fewer than half of that, a block of int8.
    """
    begins, lengths = pieces[:, 0], pieces[:, 1]
    counts = -(-lengths // block)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # a block's number in its piece
    starts = np.repeat(begins, counts) + within * block
    long = np.minimum(np.repeat(begins + lengths, counts) - starts, block)
    if smallest:
        sizes = np.maximum(1 << np.frexp(long - 1.0)[1].astype(np.int64), smallest)  # bits of long - 1
        sizes[2 * long < smallest] = 0
    else:
        sizes = np.zeros_like(long)
    widths = SCALE + np.where(sizes > 0, sizes * bits // 8, np.where(long > 1, long, 0))  # one number is its scale
    codes = np.cumsum(widths) - widths
    kinds = []
    for size in np.unique(sizes):
        of = sizes == size
        # Blocks of int8 are not filled up in the code, so whole ones go apart.
        shapes: list[tuple[Any, tuple[int, int, bool]]] = [(of, (int(size), bits, True))]
        if not size:
            filled = smallest // 2 or block
            shapes = [
                (of & (long == 1), (1, 0, False)),
                (of & (long == block), (block, 8, False)),
                (of & (long > 1) & (long < block), (filled, 8, False)),
            ]
        for which, shape in shapes:
            if which.any():
                kinds.append(Blocks(*shape, starts[which], long[which], codes[which], widths[which]))
    return kinds, int(widths.sum())

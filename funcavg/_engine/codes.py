"""The rows of buckets as a wire writes them.

Every mean is decoded from the same bytes on every rank, and rounded once to its leaf's dtype. Rows are float32 on their
way to and from a code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from funcavg._engine.buckets import SLOTS, Bucket
from funcavg._engine.coders import coder_of
from funcavg.wires.codecs import Codec, Coder
from funcavg.wires.rounded import to_bfloat16

__all__ = ["CodeSlots", "Codes", "codes_of"]

LARGEST = {"float32": float(np.finfo(np.float32).max), "bfloat16": 255 * 2.0**120, "float16": 65504.0}

Bytes = npt.NDArray[np.uint8]


class Codes:
    """The rows of one bucket, or some of them, as a wire writes them."""

    def __init__(self, element: str, coders: Sequence[Coder | None]) -> None:
        self.element, self._coders = element, coders  # None: a row of padding alone
        self.width = max(coder.width if coder else 0 for coder in coders)  # bytes, the same for all rows

    def encode(self, row: int, numbers: Bytes, code: Bytes, *, mean: bool = False) -> None:
        """Write the code of a row of float32."""
        coder = self._coders[row]
        if coder is not None:
            coder.encode(numbers.view(np.float32), code, mean=mean)
        code[coder.width if coder else 0 :] = 0  # memory that others have used does not travel

    def decode(self, row: int, code: Bytes, numbers: Bytes, *, mean: bool = False) -> None:
        """Write the row of float32 that a code says."""
        coder = self._coders[row]
        if coder is not None:
            coder.decode(code, numbers.view(np.float32), LARGEST[self.element], mean=mean)

    def land(self, codes: Bytes, rows: Bytes) -> None:
        """Write all rows of a mean, in their own dtype."""
        if self.element == "float32":
            for k, code in enumerate(codes):
                self.decode(k, code, rows[k], mean=True)
            return
        numbers = np.zeros(2 * rows.shape[1], np.uint8)  # of float32; padding, too, is some number
        for k, code in enumerate(codes):
            self.decode(k, code, numbers, mean=True)
            _narrow(numbers.view(np.float32), rows[k], self.element)


def codes_of(codec: Codec, buckets: Sequence[Bucket], rows: range) -> dict[int, Codes]:
    """Return, by number, how some rows of each bucket are written, if the wire encodes it."""
    coders: dict[bytes, Coder | None] = {}  # most rows are cut alike

    def coder(pieces: npt.NDArray[np.int64]) -> Coder | None:
        key = pieces.tobytes()
        if key not in coders:
            coders[key] = coder_of(codec, pieces) if len(pieces) else None
        return coders[key]

    return {
        bucket.number: Codes(bucket.element, [coder(_pieces(bucket, row)) for row in rows])
        for bucket in buckets
        if codec.encodes(bucket.element)
    }


def _pieces(bucket: Bucket, row: int) -> npt.NDArray[np.int64]:
    """Return (begin, length) of each leaf's elements in a row."""
    length = bucket.mine.shape[1] // bucket.itemsize
    ends = np.cumsum([stop - start for _, start, stop in bucket.ranges])
    begins = np.concatenate([[0], ends[:-1]])
    first, last = row * length, (row + 1) * length
    begins, ends = np.clip(begins, first, last) - first, np.clip(ends, first, last) - first
    pieces: npt.NDArray[np.int64] = np.stack([begins, ends - begins], axis=1)[ends > begins].astype(np.int64)
    return pieces


def _narrow(numbers: npt.NDArray[np.float32], out: Bytes, element: str) -> None:
    """Round to nearest, on every rank to the same bits: whatever it has imported, and however its thread rounds."""
    if element == "bfloat16":
        out[...] = to_bfloat16(numbers)
    else:
        with np.errstate(all="ignore"):
            out.view(np.float16)[...] = numbers


class CodeSlots:
    """The memory of codes on their way, and of rows that they are made of; made when first needed, and kept."""

    def __init__(self, count: int = SLOTS) -> None:
        self._slots = [np.empty(0, np.uint8)] * count
        self._rows = np.empty(0, np.uint8)

    def lend(self, number: int, rows: int, width: int, spare: Bytes | None = None) -> tuple[Bytes, Bytes]:
        """Return rows of ``width`` bytes for the codes that go, and then are shared; and for those that come.

        They are in ``spare`` memory, if there is enough of it.
        """
        slot, nbytes = number % len(self._slots), rows * width
        memory = spare
        if memory is None or len(memory) < 2 * nbytes:
            if len(self._slots[slot]) < 2 * nbytes:
                self._slots[slot] = np.empty(2 * nbytes, np.uint8)
            memory = self._slots[slot]
        return memory[:nbytes].reshape(rows, width), memory[nbytes : 2 * nbytes].reshape(rows, width)

    def rows(self, count: int, nbytes: int) -> Bytes:
        """Return rows for the numbers of one bucket at a time."""
        if len(self._rows) < count * nbytes:
            self._rows = np.empty(count * nbytes, np.uint8)
        return self._rows[: count * nbytes].reshape(count, nbytes)

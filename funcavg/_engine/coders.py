"""Who writes rows for a wire: the kernel in C where it is loaded, else NumPy, to the same bytes and bits."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg._engine.kernel import Library, address, kernel_in_use, library
from funcavg.wires.codecs import BITS, Codec, Coder, Pieces
from funcavg.wires.rotated import CENTROIDS, signs, thresholds

__all__ = ["coder_in_use", "coder_of"]

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def coder_of(codec: Codec, pieces: Pieces) -> Coder:
    """Return the coder of rows that are cut like this."""
    found = library()
    return codec.coder(pieces) if found is None or codec.own is not None else _InC(codec, pieces, found)


def coder_in_use() -> str:
    """Say who writes the codes of funcavg's own wires in this process."""
    return "NumPy" if library() is None else kernel_in_use()


class _Wire(ctypes.Structure):
    """What C knows of a codec: `struct wire` of wires.c."""

    _fields_ = (
        ("bits", ctypes.c_int32),
        ("level", ctypes.c_int32),
        ("signs", ctypes.c_void_p),
        ("middles", ctypes.c_double * 7),
        ("centroids", ctypes.c_int32 * 8),
    )


@functools.cache
def _masks() -> npt.NDArray[np.uint32]:
    """Return the bits of `signs`, those for means last."""
    return np.concatenate([signs(mean=mean).view(np.uint32) & 0x80000000 for mean in (False, True)])


class _InC(Coder):
    """The codes of a codec of funcavg's, by wires.c."""

    def __init__(self, codec: Codec, pieces: Pieces, found: Library) -> None:
        super().__init__(np.array(pieces, np.int64, order="C"))  # C reads them later
        self.width = codec.coder(self.pieces).width
        bits = BITS[codec.name]
        middles, centroids = (thresholds(bits), CENTROIDS[bits]) if bits in CENTROIDS else ((), ())
        begins, lengths = self.pieces[:, 0], self.pieces[:, 1]
        if (begins < 0).any() or (lengths < 0).any():
            raise ValueError(f"pieces must begin and end in their row, got {self.pieces.tolist()}")
        self._end = int((begins + lengths).max(initial=0))
        # bfloat16 has no blocks, so all is one piece.
        self._cut = np.array([[0, self.length]], np.int64) if bits == BITS["bfloat16"] else self.pieces
        self._found = found
        self._masks = _masks()  # kept here: another thread's, made at the same time, may be in the cache
        self._wire = _Wire(bits, found.level, address(self._masks), (*middles,), (*centroids,))

    def encode(self, numbers: Floats, code: Bytes, *, mean: bool) -> None:
        row, out = _place(numbers, np.float32, self._end), _place(code, np.uint8, self.width, written=True)
        self._found.encode(ctypes.byref(self._wire), *self._places(), row, out, mean)

    def decode(self, code: Bytes, numbers: Floats, limit: float, *, mean: bool) -> None:
        row, out = _place(code, np.uint8, self.width), _place(numbers, np.float32, self._end, written=True)
        self._found.decode(ctypes.byref(self._wire), *self._places(), row, out, mean, limit)

    def _places(self) -> tuple[int, int]:
        return address(self._cut), len(self._cut)


def _place(memory: npt.NDArray[Any], dtype: Any, least: int, *, written: bool = False) -> int:
    """Return the address of a row, once it is sure that C may use it."""
    if memory.ndim != 1 or memory.dtype != dtype or len(memory) < least or (written and not memory.flags.writeable):
        state = "writable" if memory.flags.writeable else "read-only"
        raise ValueError(f"a row must have {least} {np.dtype(dtype)}, got {state} {memory.dtype}{list(memory.shape)}")
    return address(memory)

"""Codecs as the engine uses them: those of funcavg by their names, and a user's own."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg.wires.blocks import Blocks, cut
from funcavg.wires.rotated import from_rotated, to_rotated
from funcavg.wires.rounded import (
    from_bfloat16,
    from_int8,
    from_themselves,
    to_bfloat16,
    to_int8,
    to_themselves,
)

__all__ = ["BITS", "NAMES", "Codec", "Coder", "codec_of"]

BITS = {"bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}  # of a number in the code
NAMES = tuple(BITS)
ENCODED = {"float32": 32, "bfloat16": 16, "float16": 16}  # bits of leaves that a wire may encode
TRIED = 1024  # numbers with which a user's codec is tried

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Pieces = npt.NDArray[np.int64]


class Coder:
    """Encodes and decodes rows that are cut alike: (begin, length) of each leaf's numbers, in order, without gaps."""

    width: int  # bytes of the code

    def __init__(self, pieces: Pieces) -> None:
        self.pieces, self.length = pieces, int(pieces[:, 1].sum())

    def encode(self, numbers: Floats, code: Bytes, *, mean: bool) -> None:
        """Write the code of a row: of a ``mean``, or of what a rank sends."""
        raise NotImplementedError

    def decode(self, code: Bytes, numbers: Floats, limit: float, *, mean: bool) -> None:
        """Write the numbers of a row. None will be above ``limit``, unless what was encoded is."""
        raise NotImplementedError


class Codec:
    """How rows are written."""

    def __init__(
        self, name: str, bits: float, coder: Callable[[Pieces], Coder], own: Any = None, label: str = ""
    ) -> None:
        self.name, self.bits, self.coder = name, bits, coder
        self.own = own  # the user's, if it is one
        self.label = label or name  # what ranks agree about

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codec) and (self.name, id(self.own)) == (other.name, id(other.own))

    def __hash__(self) -> int:
        return hash((self.name, id(self.own)))

    def encodes(self, element: str) -> bool:
        """Say whether leaves of a dtype are encoded: floats of at most 32 bits, if they are wider than the code."""
        return ENCODED.get(element, 0) > self.bits


def _quietly(method: Callable[..., None]) -> Callable[..., None]:
    """Let a method round, overflow and divide whatever a user wants NumPy to raise."""

    @functools.wraps(method)
    def quiet(*args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            method(*args, **kwargs)

    return quiet


class _Bfloat16(Coder):
    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces)
        self.width = 2 * self.length

    def encode(self, numbers: Floats, code: Bytes, *, mean: bool) -> None:
        code[: self.width] = to_bfloat16(numbers[: self.length])

    def decode(self, code: Bytes, numbers: Floats, limit: float, *, mean: bool) -> None:
        numbers[: self.length] = from_bfloat16(code[: self.width])


class _Scaled(Coder):
    """In blocks, each with a scale."""

    def __init__(self, pieces: Pieces, block: int, bits: int, smallest: int) -> None:
        super().__init__(pieces)
        self._kinds, self.width = cut(pieces, block, bits, smallest)

    def _chunks(self) -> Sequence[Blocks]:
        return [chunk for kind in self._kinds for chunk in kind.chunks()]

    @_quietly
    def encode(self, numbers: Floats, code: Bytes, *, mean: bool) -> None:
        for blocks in self._chunks():
            given = blocks.numbers_of(numbers)
            if blocks.rotates:
                written = to_rotated(given, blocks.bits, mean=mean)
            else:
                written = to_int8(given) if blocks.bits else to_themselves(given)
            blocks.put_code(code, *written)

    @_quietly
    def decode(self, code: Bytes, numbers: Floats, limit: float, *, mean: bool) -> None:
        for blocks in self._chunks():
            scales, integers = blocks.code_of(code)
            if blocks.rotates:
                decoded = from_rotated(scales, integers, blocks.bits, limit, mean=mean)
            else:
                decoded = from_int8(scales, integers, limit) if blocks.bits else from_themselves(scales, limit)
            blocks.put_numbers(numbers, decoded)


class _Own(Coder):
    """A user's codec, piece by piece."""

    def __init__(self, pieces: Pieces, own: Any) -> None:
        super().__init__(pieces)
        self._own = own
        widths = {n: len(_encoded(own, np.zeros(n, np.float32))) for n in {int(n) for n in pieces[:, 1]}}
        ends = np.cumsum([widths[int(n)] for n in pieces[:, 1]])
        self._codes = [slice(int(end) - widths[int(n)], int(end)) for n, end in zip(pieces[:, 1], ends, strict=True)]
        self.width = int(ends[-1])

    def _rows(self) -> Sequence[tuple[slice, slice]]:
        return [(slice(b, b + n), code) for (b, n), code in zip(self.pieces.tolist(), self._codes, strict=True)]

    # What a user's function gets is a copy: it may keep it, or write to it.

    def encode(self, numbers: Floats, code: Bytes, *, mean: bool) -> None:
        for piece, place in self._rows():
            code[place] = _encoded(self._own, numbers[piece].copy(), place.stop - place.start)

    def decode(self, code: Bytes, numbers: Floats, limit: float, *, mean: bool) -> None:
        for piece, place in self._rows():
            decoded = _decoded(self._own, code[place].copy(), piece.stop - piece.start)
            numbers[piece] = np.where(np.isfinite(decoded), np.clip(decoded, -limit, limit), decoded)


def _encoded(own: Any, numbers: Floats, nbytes: int | None = None) -> Bytes:
    try:
        code = own.encode(numbers)
    except Exception as error:
        raise RuntimeError(
            f"wire {own.name!r}: encode of {len(numbers)} numbers raised {type(error).__name__}: {error}."
        ) from error
    if not (isinstance(code, np.ndarray) and code.dtype == np.uint8 and code.ndim == 1):
        raise TypeError(f"wire {own.name!r}: encode must return a vector of uint8, got {_described(code)}.")
    if nbytes is not None and len(code) != nbytes:
        raise ValueError(
            f"wire {own.name!r}: encode returned {len(code)} bytes for {len(numbers)} numbers, and {nbytes} for as "
            f"many zeros. Every rank must know its length, which may depend on nothing but the number of numbers."
        )
    return code


def _decoded(own: Any, code: Bytes, length: int) -> Floats:
    try:
        numbers = own.decode(code, length)
    except Exception as error:
        raise RuntimeError(
            f"wire {own.name!r}: decode of {length} numbers raised {type(error).__name__}: {error}."
        ) from error
    if not (isinstance(numbers, np.ndarray) and numbers.dtype == np.float32 and numbers.shape == (length,)):
        raise TypeError(
            f"wire {own.name!r}: decode must return a vector of {length} float32, got {_described(numbers)}."
        )
    return numbers


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else f"{type(value).__name__}"


_OURS = {
    "bfloat16": Codec("bfloat16", BITS["bfloat16"], _Bfloat16),
    "int8": Codec("int8", BITS["int8"], lambda pieces: _Scaled(pieces, 256, 8, 0)),
    "int4": Codec("int4", BITS["int4"], lambda pieces: _Scaled(pieces, 1024, 4, 64)),
    "int2": Codec("int2", BITS["int2"], lambda pieces: _Scaled(pieces, 1024, 2, 64)),
}


def codec_of(wire: Any) -> Codec | None:
    """Return the codec of what a user passes as ``wire``; None for None. Raise what is wrong with it."""
    if wire is None:
        return None
    if isinstance(wire, str):
        if wire not in _OURS:
            raise ValueError(f"wire must be one of {', '.join(map(repr, NAMES))}, or None, got {wire!r}.")
        return _OURS[wire]
    if isinstance(wire, type):
        raise TypeError(f"wire must be an object, got the class {wire.__name__}: pass {wire.__name__}(...).")
    name = getattr(wire, "name", None)
    functions = [getattr(wire, verb, None) for verb in ("encode", "decode")]
    if not (isinstance(name, str) and all(map(callable, functions))):
        raise TypeError(
            f"wire must be one of {', '.join(map(repr, NAMES))}, None, or an object with a name and the functions "
            f"encode and decode, as funcavg.wires.Wire says, got {wire!r} of type {type(wire).__name__}."
        )
    if name in _OURS or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
        raise ValueError(
            f"wire: a codec of your own needs a name of its own, of at most 64 letters, digits, '_', '.' and '-', got "
            f"{name[:80]!r}."
        )
    return _tried(wire)


def _tried(own: Any) -> Codec:
    """Return a user's codec, once it has been seen to do what it must; its label stands for what it makes of numbers.

    Else ranks whose codecs have one name, and other settings, would decode other means.
    """
    checksum, nbytes = 0, 0
    for length in (7, 1, TRIED):
        mixed = np.arange(length, dtype=np.uint64) * 2654435761 % (1 << 20)
        numbers = mixed.astype(np.float32) / np.float32(1 << 17) - np.float32(4)  # exactly: the same on every machine
        nbytes = len(_encoded(own, np.zeros(length, np.float32)))
        code = _encoded(own, numbers, nbytes)
        checksum = zlib.crc32(_decoded(own, code.copy(), length).tobytes(), zlib.crc32(code.tobytes(), checksum))
    bits = 8 * nbytes / TRIED
    if bits >= ENCODED["float32"]:
        raise ValueError(
            f"wire {own.name!r}: encode returned {nbytes} bytes for {TRIED} numbers, which is no shorter than float32: "
            f"no leaf would be encoded. Leave wire out, or make the code shorter."
        )
    return Codec(own.name, bits, lambda pieces: _Own(pieces, own), own, f"{own.name} (checksum {checksum:08x})")

"""Numbers rounded one by one: int8 with a scale for each block, and what all scaled blocks have in common; bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "from_bfloat16",
    "from_int8",
    "from_themselves",
    "times",
    "to_bfloat16",
    "to_int8",
    "to_themselves",
]

NAN = np.float32(np.nan)

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


def to_int8(numbers: Floats) -> tuple[Floats, Bytes]:
    """Return the scale of each block, and its integers, -127 to 127, to nearest."""
    top = np.abs(numbers).max(axis=1)  # NaN if one is
    with np.errstate(all="ignore"):
        scales = top / np.float32(127)
        alive = scales > 0  # of zeros, and of denormal numbers where this thread flushes them, nothing is left
        finite = np.isfinite(top)
        divisors = np.where(alive & finite, scales, np.float32(1))
        # Not times the inverse, which is infinite for small scales, and rounds once more.
        integers = np.clip(np.rint(numbers / divisors[:, None]), -127, 127)
    integers[~(alive & finite)] = 0
    return np.where(finite, np.where(alive, scales, np.float32(0)), NAN), integers.astype(np.int8).view(np.uint8)


def from_int8(scales: Floats, integers: Bytes, limit: float) -> Floats:
    """Return the numbers of blocks, none above ``limit``."""
    return times(integers.view(np.int8).astype(np.float32), scales, limit)


def to_themselves(numbers: Floats) -> tuple[Floats, Bytes]:
    """Return blocks of one number: as their scales, and nothing more."""
    alone = numbers[:, 0]
    return np.where(np.isfinite(alone), alone, NAN), np.empty((len(alone), 0), np.uint8)


def from_themselves(scales: Floats, limit: float) -> Floats:
    """Return these numbers, none above ``limit``."""
    over = np.abs(scales) > limit
    return np.where(over, np.copysign(np.float32(limit), scales), scales)[:, None]


def times(integers: Floats, scales: Floats, limit: float) -> Floats:
    """Multiply each block of ``integers``, below 2**24, by its scale, to the same bits on every machine and thread.

    What is larger than ``limit``, by the error of its code, is that. A scale of NaN makes all of its block NaN.
    """
    with np.errstate(all="ignore"):
        numbers = integers * scales[:, None]
    np.clip(numbers, -limit, limit, out=numbers)
    bits = scales.view(np.uint32)
    small = bits < 1 << 23
    if small.any():  # denormal: a thread may flush such numbers
        numbers[small] = _times_denormal(integers[small].astype(np.int64), bits[small].astype(np.int64)[:, None])
    numbers[np.isnan(scales)] = NAN
    return numbers


def _times_denormal(integers: npt.NDArray[np.int64], scales: npt.NDArray[np.int64]) -> Any:
    """Multiply by numbers of 2**-149s: that is what the bits of a denormal float32 count, and those of its double."""
    product = np.abs(integers * scales)
    normal = (product.astype(np.float64) * 2.0**-149).astype(np.float32)
    signs = (integers < 0).astype(np.uint32) << 31
    magnitude = np.where(product < 1 << 24, product.astype(np.uint32), normal.view(np.uint32))
    return np.where(product == 0, np.uint32(0), magnitude | signs).view(np.float32)


def to_bfloat16(numbers: Floats) -> Bytes:
    """Round to nearest, ties to even; to the largest number rather than to infinity."""
    bits = numbers.view(np.uint32)
    top = bits >> 16
    rounded = (bits + (0x7FFF + (top & 1))) >> 16
    rounded -= (rounded & 0x7FFF == 0x7F80) & np.isfinite(numbers)
    return np.where(np.isnan(numbers), top | 0x40, rounded).astype(np.uint16).view(np.uint8)  # a NaN could round to 0


def from_bfloat16(code: Bytes) -> Floats:
    """Return the numbers, exactly."""
    return (code.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

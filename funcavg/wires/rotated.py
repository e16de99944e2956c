"""Blocks that are rotated first: then all look alike, and few bits say most. DRIVE and EDEN, in whole numbers.

A block of n numbers, times signs that never change, goes through a Walsh-Hadamard transform H. Whatever it looked like,
it now looks Gaussian. So each number becomes the nearest of the 2**bits centroids that Lloyd and Max found for N(0, 1),
and one scale goes with them. On the way back the centroids go through H, times the scale, times the signs.

All of it is calculated in whole numbers, which floats hold exactly, whatever the order of sums. Only thresholds and
scales round, once each, by IEEE division, multiplication and square root: so all machines get the same bits::

    V = rint(x 2^(13-e)), e the exponent of the largest     |V| ≤ 2^13
    R = H (signs V)                                         |R| ≤ 2^23      ΣR² = n ΣV²
    q = the centroid nearest to |R| / rms(R), signed        centroids are integers: 300 times those of N(0, 1)
    scale = ΣR² / <R, q> / n · 2^(e-13)                     which makes the code unbiased: <Q(x), x> = ‖x‖²
    Q(x) = signs (H q) scale                                |H q| < 2^20

Vargaftik et al., [DRIVE](https://arxiv.org/abs/2105.08339), NeurIPS 2021, and
[EDEN](https://arxiv.org/abs/2108.08842), ICML 2022.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg.wires.rounded import NAN, times

__all__ = ["CENTROIDS", "from_rotated", "signs", "thresholds", "to_rotated"]

CENTROIDS = {4: (39, 116, 197, 283, 377, 485, 621, 820), 2: (136, 453)}  # by bits; 300 is one standard deviation
SIGMA = 300
PRECISION = 13  # bits of V
LARGEST = 1024  # numbers in a block

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@functools.cache
def signs(*, mean: bool) -> Floats:
    """Return 1024 signs: one vector for what ranks send, and another for means.

    With one for both, the second code's error would undo part of the first: equal inputs would come back smaller.
    Counter i's sign is a bit of splitmix64's mix of it (Steele, Lea and Flood, 2014).
    """
    mask, words = (1 << 64) - 1, []
    for counter in range(LARGEST * mean, LARGEST * (1 + mean)):
        word = (counter + 1) * 0x9E3779B97F4A7C15 & mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        words.append(1.0 - 2.0 * (word >> 63))
    return np.array(words, np.float32)


@functools.cache
def thresholds(bits: int) -> npt.NDArray[np.float64]:
    """Return what lies in the middle between neighbouring centroids, in standard deviations."""
    centroids = CENTROIDS[bits]
    return np.array([(one + other) / (2 * SIGMA) for one, other in itertools.pairwise(centroids)])


@functools.cache
def _signed_centroids(bits: int) -> Floats:
    positive = np.array(CENTROIDS[bits], np.float32)
    return np.concatenate([positive, -positive])


@functools.cache
def _hadamard_matrix(size: int) -> Floats:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _transformed(blocks: Floats) -> Any:
    """Return H times each block of whole numbers: two products, for H of 1024 is that of 32 by that of 32."""
    count, size = blocks.shape
    square = blocks.reshape(count, -1, min(size, 32)) @ _hadamard_matrix(min(size, 32))
    return np.matmul(_hadamard_matrix(square.shape[1]), square).reshape(count, size)


def to_rotated(numbers: Floats, bits: int, *, mean: bool) -> tuple[Floats, Bytes]:
    """Return the scale of each block, and its integers: indices of centroids, with signs, packed."""
    size = numbers.shape[1]
    top = np.abs(numbers).max(axis=1)
    alive = np.isfinite(top) & (top > 0)
    exponents = np.frexp(np.where(alive, top, np.float32(1)))[1].astype(np.int64)
    with np.errstate(all="ignore"):
        whole = np.rint(np.ldexp(numbers, (PRECISION - exponents)[:, None].astype(np.int32)))
    whole[~alive] = 0
    whole[~alive, 0] = 1  # no matter what, but not 0
    exact = whole.astype(np.float64)
    squares = np.einsum("ij,ij->i", exact, exact)  # ΣV² = ΣR² / n
    rotated = _transformed(whole * signs(mean=mean)[:size])
    magnitudes = np.abs(rotated)
    index = np.zeros(rotated.shape, np.uint8)
    above = np.empty(rotated.shape, np.bool_)
    root = np.sqrt(squares)
    for middle in thresholds(bits):
        # A whole number is above a threshold if it is above its integer part, which float32 holds.
        np.greater(magnitudes, np.floor(middle * root).astype(np.float32)[:, None], out=above)
        index += above.view(np.uint8)
    centroids = np.take(np.array(CENTROIDS[bits], np.float64), index)  # twice as fast as to index
    energy = size * squares
    product = np.einsum("ij,ij->i", magnitudes.astype(np.float64), centroids)
    length = np.einsum("ij,ij->i", centroids, centroids)
    factor = energy / product
    spike = factor * factor * length > 2 * energy  # where unbiased is too dear
    factor = np.where(spike, product / length, factor)
    scales = np.ldexp(factor, exponents - PRECISION - size.bit_length() + 1).astype(np.float32)
    index |= (rotated < 0).view(np.uint8) << (bits - 1)
    index[~alive] = 0
    scales[~alive] = 0
    scales[~np.isfinite(top)] = NAN
    return scales, _packed(index, bits)


def from_rotated(scales: Floats, integers: Bytes, bits: int, limit: float, *, mean: bool) -> Floats:
    """Return the numbers of blocks, none above ``limit``."""
    centroids = np.take(_signed_centroids(bits), _unpacked(integers, bits))
    numbers = times(_transformed(centroids), scales, limit)
    kept = ~(np.isnan(scales) | (scales.view(np.uint32) == 0))  # NaN and 0 have no sign
    # Signs are changed, and not multiplied by: a thread may flush denormal numbers.
    bits_of, changed = numbers.view(np.uint32), signs(mean=mean)[: numbers.shape[1]].view(np.uint32) & 0x80000000
    bits_of ^= kept[:, None] * changed
    return numbers


# A byte holds numbers that lie a half, or a quarter, of the block apart: so whole blocks are packed by few operations.


def _packed(index: Bytes, bits: int) -> Any:
    parts = np.split(index, 8 // bits, axis=1)
    packed = parts[0].copy()
    for k, part in enumerate(parts[1:], 1):
        packed |= part << (k * bits)
    return packed


def _unpacked(packed: Bytes, bits: int) -> Any:
    return np.concatenate([packed >> (k * bits) & (2**bits - 1) for k in range(8 // bits)], axis=1)

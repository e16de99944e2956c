"""The kernel: one shard from every rank in, their mean out, summed in wide precision.

This module says what is summed; `kernel.c` does it, where it was built, and else NumPy and torch (`arithmetic.py`).

Leaves of 32 bits and fewer are summed in float64 and rounded once, so that

    |result - mean| <= 1/2 ulp(result) + N * 2**-53 * mean|x|

and equal replicas come back bit for bit. Work goes in blocks that stay in the cache. Complex numbers never get
here: the mean is linear, so they arrive as pairs of reals.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg._engine.arithmetic import (
    WIDE_ENOUGH,
    ArraySum,
    TensorSum,
    array_mean,
    blocks,
    half_of_sum,
    tensor_mean,
    viewer,
)
from funcavg._engine.kernel import ITEMSIZES, BlockSum, address, library, packer

__all__ = ["Means", "Sums", "mean_into", "scaled", "tensor_mean_into", "wide"]

BLOCK = 32 * 1024  # elements: the float64 sums of a block take 256 KiB
DEVICE_BLOCK = 1 << 20  # of an accelerator: enough to keep it busy, and the sums take 24 MiB

Bytes = npt.NDArray[np.uint8]


def wide(element: str) -> str:
    """Return the dtype in which means of some ranks are handed on, to be averaged again and rounded once."""
    return element if element in ("float64", "longdouble") else "float32"


def mean_into(  # noqa: PLR0913  # and `also`, which few need
    out: Bytes,
    shards: Sequence[Bytes],
    weights: Sequence[float] | None,
    element: str,
    into: str = "",
    also: Bytes | None = None,
) -> None:
    """Write the (weighted) mean of equally long ``shards`` into ``out``, and the same bytes to a second place.

    All are flat bytes: shards of dtype ``element``, ``out`` and ``also`` of dtype ``into``, which is the same unless
    said; of several dtypes one is `wide` of the other. ``out`` may be one of the shards if it is of their dtype. A
    shard of weight 0 is never read, NaN included.
    """
    into = into or element
    long = len(shards[0]) // ITEMSIZES.get(element, 1) * ITEMSIZES.get(into, 1)  # of others, one is as wide as another
    places = [out] if also is None else [out, also]
    if any([len(place) != long for place in places]) or any([len(shard) != len(shards[0]) for shard in shards]):
        found = [len(memory) for memory in (*shards, *places)]
        raise ValueError(f"the mean of {len(shards)} shards of {element} as {into}: they and it have {found} bytes")
    means = Means(element, len(shards), weights, into)
    operands = [means.operand(shard) for shard in shards]
    means.write(means.target(out), operands, len(shards[0]), None if also is None else means.target(also))


class Means:
    """Means of ``count`` shards of one dtype: prepared once, then written for each bucket, by one thread at a time.

    For what dtypes and weights are, see `mean_into`.
    """

    def __init__(self, element: str, count: int, weights: Sequence[float] | None = None, into: str = "") -> None:
        into = into or element
        self.kept, self._weights = _kept_and_scaled(count, weights)  # the numbers of shards that count
        self._norm = sum(self._weights or [1.0] * len(self.kept))
        self._element, self._into, self._every = element, into, len(self.kept) == count
        self.in_c = 0  # where `struct means` lies, if the kernel in C knows the dtypes
        self._library = library(element, into)
        if self._library is None:
            self._view = viewer(into if element == "float32" else element)
            self._pair = len(self.kept) == 2 and self._weights is None and into == element and element in WIDE_ENOUGH
            self._scratch = np.empty(0)
        else:
            prepared = self._library.prepare(element, into, len(self.kept), self._weights, self._norm)
            self._call, self._plan, self._pack = self._library.mean, ctypes.byref(prepared), packer(len(self.kept))
            self.in_c = ctypes.addressof(prepared)

    def operand(self, memory: Bytes) -> Any:
        """Return a shard as `write` takes it, to be used as long as the memory lives."""
        return self._view(memory, self._element) if self._library is None else address(memory)

    def target(self, memory: Bytes) -> Any:
        """Return memory that is to be written, as `write` takes it."""
        return self._view(memory, self._into) if self._library is None else address(memory)

    def part(self, operand: Any, begin: int, end: int) -> Any:
        """Return the bytes of an operand, from and to."""
        if self._library is not None:
            return operand + begin
        width = operand.itemsize
        return operand[begin // width : end // width]

    def write(self, out: Any, shards: Sequence[Any], nbytes: int, also: Any = None) -> None:
        """Write the mean of ``shards``, of ``nbytes`` each, to ``out``, and the same to ``also``.

        ``out`` may be the memory of one of the shards.
        """
        if not self._every:
            shards = [shards[k] for k in self.kept]
        if self._library is not None:
            self._call(self._plan, self._pack(*shards), out, also, nbytes)
            return
        length = nbytes // shards[0].itemsize
        if length == len(out) <= BLOCK and all([len(shard) == length for shard in shards]):  # slicing costs
            self._write_block(out, shards)
            if also is not None:
                also[:length] = out
            return
        for start in range(0, length, BLOCK):
            block = slice(start, min(start + BLOCK, length))
            part = out[block]
            self._write_block(part, [shard[block] for shard in shards])
            if also is not None:
                also[block] = part  # while it is in the cache

    def _write_block(self, out: Any, shards: Sequence[Any]) -> None:
        if self._pair:
            if len(self._scratch) != len(out):
                self._scratch = np.empty_like(out)
            half_of_sum(out, shards[0], shards[1], self._scratch)
        else:
            (array_mean if isinstance(out, np.ndarray) else tensor_mean)(out, shards, self._weights, self._norm)


class Sums:
    """The sums of shards that come one after another; their mean has the bits that `mean_into` gives to all at once.

    Beside the sums there is memory for the first shard, where leaves are as wide as their sums. Shards are flat bytes
    on the host, or, of ``on_device``, typed tensors.
    """

    def __init__(self, element: str, *, on_device: bool = False) -> None:
        self._view: Callable[[Any, str], Any]
        self._element, self._length, self._size = element, DEVICE_BLOCK if on_device else BLOCK, 0
        self._in_c = not on_device and library(element) is not None
        if self._in_c:
            self._view, self._length = (lambda memory, _: memory), BLOCK * ITEMSIZES[element]
        else:
            self._view = (lambda shard, _: shard) if on_device else viewer(element)
        self._sums: list[ArraySum | TensorSum | BlockSum] = []  # one for each block

    def add(self, shard: Any, weight: float) -> None:
        """Add a shard, which may be overwritten afterwards."""
        array = self._viewed(shard)
        parts = [array[block] for block in blocks(len(array), self._length)]
        with np.errstate(all="ignore"):
            if self._sums:
                for total, part in zip(self._sums, parts, strict=True):
                    total.add(part, weight)
            else:
                self._sums = [self._sum_of(part, weight) for part in parts]

    def _viewed(self, memory: Any) -> Any:
        array = self._view(memory, self._element)
        if self._sums and len(array) != self._size:
            raise ValueError(f"sums of {self._element}: expected length {self._size}, as before, got {len(array)}")
        self._size = len(array)
        return array

    def _sum_of(self, part: Any, weight: float) -> ArraySum | TensorSum | BlockSum:
        if self._in_c:
            return BlockSum(part, weight, self._element)
        return (ArraySum if isinstance(part, np.ndarray) else TensorSum)(part, weight, once=True)

    def mean_into(self, out: Any, norm: float) -> None:
        """Write the sums divided by that of the weights, and forget them."""
        result = self._viewed(out)
        with np.errstate(all="ignore"):
            for block in reversed(blocks(len(result), self._length)):
                self._sums.pop().write(result[block], norm)


def scaled(weights: Sequence[float]) -> list[float]:
    """Scale weights by the largest, lest their sum or a product overflow."""
    top = max(weights)
    return [weight / top for weight in weights]


def tensor_mean_into(out: Any, shards: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Do the same with torch tensors of one dtype and one dimension, on their own device."""
    kept, scales = _kept_and_scaled(len(shards), weights)
    norm = sum(scales or [1.0] * len(kept))
    for block in blocks(out.numel(), DEVICE_BLOCK):
        tensor_mean(out[block], [shards[k][block] for k in kept], scales, norm)


def _kept_and_scaled(count: int, weights: Sequence[float] | None) -> tuple[Sequence[int], Sequence[float] | None]:
    """Return which shards have a weight that is not 0, and scaled weights; None if they are all the same."""
    if weights is None:
        return range(count), None
    kept = [k for k in range(count) if weights[k]]
    scales = scaled([weights[k] for k in kept])
    return kept, None if all(scale == 1.0 for scale in scales) else scales

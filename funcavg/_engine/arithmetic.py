"""What `mean.py` does without the C kernel, in NumPy and torch; and always for longdouble, and for 8 bits.

Arrays of one dimension and one dtype. Callers have dropped shards of weight 0, and scaled the weights.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["WIDE_ENOUGH", "ArraySum", "TensorSum", "array_mean", "blocks", "half_of_sum", "tensor_mean", "viewer"]

SMALL = 2.0**-64  # exact to multiply by: sums of fewer than 2**64 numbers do not overflow, times this
NATIVE = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "longdouble": np.longdouble}

Bytes = npt.NDArray[np.uint8]
WIDE_ENOUGH = ("float32", "float64", "longdouble")  # for a sum of two in their own width
HALVES = {NATIVE[name]: NATIVE[name](0.5) for name in WIDE_ENOUGH}
_S = TypeVar("_S", "ArraySum", "TensorSum")


@functools.cache  # views are kept, and those of one dtype must be of one kind, though torch be imported meanwhile
def viewer(narrow: str) -> Callable[[Bytes, str], Any]:
    """Return how to view bytes as an array of NumPy's, or as a tensor where torch is there and knows more dtypes."""
    if narrow in NATIVE and (narrow != "float16" or "torch" not in sys.modules):
        return lambda memory, element: memory.view(NATIVE[element])
    if hasattr(sys.modules.get("torch"), narrow):
        import torch

        return lambda memory, element: torch.from_numpy(memory).view(getattr(torch, element))
    import ml_dtypes  # a leaf of this dtype came from there

    return lambda memory, element: memory.view(np.dtype(getattr(ml_dtypes, element, element)))


def blocks(size: int, length: int) -> list[slice]:
    """Return the parts of an array that stay in the cache."""
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def half_of_sum(out: Any, one: Any, other: Any, total: Any) -> None:
    """Write the mean of two arrays of NumPy's own; ``total`` is memory for as many elements.

    One addition rounds once, and halving is exact, so no wider sum is needed. Where the sum overflows, both are so
    large that their halves are exact, and the sum of these rounds once. That is done for such elements only: the
    halves of small ones are not exact. ``out`` may be one of the arrays.
    """
    half = HALVES[total.dtype.type]
    try:
        with np.errstate(all="ignore", over="raise"):
            np.multiply(np.add(one, other, total), half, out)
    except FloatingPointError:
        with np.errstate(all="ignore"):
            large = np.isinf(np.add(one, other, total))
            total *= half
            np.copyto(total, one * half + other * half, where=large)
            np.copyto(out, total)


def array_mean(
    out: npt.NDArray[Any], shards: Sequence[npt.NDArray[Any]], weights: Sequence[float] | None, norm: float
) -> None:
    """Write the mean of a block of NumPy arrays."""
    weights = weights or [1.0] * len(shards)
    try:
        with np.errstate(all="ignore", over="raise"):
            total = _sum_of(ArraySum, shards, weights)
    except FloatingPointError:  # leaves near the largest float64
        with np.errstate(all="ignore"):
            total = _sum_of(ArraySum, shards, weights, once=True)
    with np.errstate(all="ignore"):
        total.write(out, norm)


def _sum_of(kind: type[_S], shards: Sequence[Any], weights: Sequence[float], *, once: bool = False) -> _S:
    total = kind(shards[0], weights[0], once=once)
    for shard, weight in zip(shards[1:], weights[1:], strict=True):
        total.add(shard, weight)
    return total


class ArraySum:
    """A sum of arrays, element by element: no other element of a block has a say in one's bits.

    Arrays that are seen ``once`` may change afterwards, and cannot be read again if the sum overflows.
    """

    def __init__(self, shard: npt.NDArray[Any], weight: float, *, once: bool) -> None:
        self._once, shard = once, _readable(shard)
        self._tight = shard.dtype.itemsize > 4  # sums are as narrow as the leaves
        self._wide = shard.dtype.type if self._tight else np.float64
        self._total: npt.NDArray[Any] = np.multiply(shard, weight, dtype=self._wide)
        self._small: Any = None  # the totals that are larger than any number, times SMALL; once there is one
        if self._tight:  # they may come back an ulp off, and replicas that are equal must not (zeros cannot)
            self._first, self._equal = shard.copy() if once else shard, shard != 0

    def add(self, shard: npt.NDArray[Any], weight: float) -> None:
        shard = _readable(shard)
        product = shard if weight == 1.0 else np.multiply(shard, weight, dtype=self._wide)
        if self._tight:
            self._equal &= shard == self._first
        if not (self._tight and self._once):
            np.add(self._total, product, out=self._total)
            return
        try:
            with np.errstate(over="ignore" if self._small is not None else "raise"):
                total = np.add(self._total, product)
        except FloatingPointError:
            total, self._small = np.add(self._total, product), self._total * SMALL
        if self._small is not None:
            self._small = np.where(np.isfinite(self._total), self._total * SMALL, self._small) + product * SMALL
        self._total = total

    def write(self, out: npt.NDArray[Any], norm: float) -> None:
        mean = np.divide(self._total, norm, out=self._total)
        if self._small is not None:
            small = self._small / norm
            largest = np.finfo(self._wide).max * self._wide(SMALL)  # which no mean is above, but one may round so
            np.clip(small, -largest, largest, out=small, where=np.isfinite(small))
            np.copyto(mean, small / SMALL, where=~np.isfinite(mean))
        if self._tight:
            np.copyto(mean, self._first, where=self._equal)
        if out.dtype.type not in NATIVE.values():
            mean = _round_to_odd(mean.view(np.int64)).view(np.float64).astype(np.float32)
        np.copyto(out, mean, casting="unsafe")


def _readable(shard: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array that NumPy can calculate with."""
    return shard if shard.dtype.type in NATIVE.values() else shard.astype(np.float32)


def _round_to_odd(bits: npt.NDArray[np.int64]) -> Any:
    """Cut float64 bits to float32's precision, leaving a trace of what was cut.

    A conversion by way of float32 rounds twice, and the second rounding may mistake what the first one left for an
    exact tie. With the last bit kept odd when anything was cut off, the second rounding is right (Boldo and
    Melquiond, "When double rounding is odd", 2005). Works on NumPy arrays and torch tensors alike.
    """
    cut = (1 << 29) - 1
    return (bits | ((bits & cut) + cut)) & ~cut


def tensor_mean(out: Any, shards: Sequence[Any], weights: Sequence[float] | None, norm: float) -> None:
    """Write the mean of a block of torch tensors, on their own device."""
    if len(shards) == 2 and weights is None and out.element_size() <= 2 and shards[0].element_size() <= 2:
        # Halves are exact in float32, and their sum, rounded there and then to 16 bits, is rounded right since
        # 24 >= 2 * 11 + 2. (The sum of two bfloat16 could overflow float32; that of their halves cannot.)
        halves = [wide.copy_(shard) for wide, shard in zip(_scratch_like(out), shards, strict=True)]
        out.copy_(halves[0].mul_(0.5).add_(halves[1], alpha=0.5))
        return
    weights = weights or [1.0] * len(shards)
    _sum_of(TensorSum, shards, weights).write(out, norm)


class TensorSum:
    """The same of tensors. On an accelerator, sums of float64 that overflow are infinite."""

    def __init__(self, shard: Any, weight: float, *, once: bool) -> None:
        import torch

        self._wide = torch.float64
        self._total = shard.to(self._wide, copy=True)
        if weight != 1.0:
            self._total.mul_(weight)
        self._tight = shard.dtype == self._wide  # see ArraySum
        if self._tight:
            self._first, self._equal = shard.clone() if once else shard, shard != 0

    def add(self, shard: Any, weight: float) -> None:
        product = shard.to(self._wide)  # and not `add_(shard, alpha=weight)`, which rounds once here and twice there
        self._total.add_(product if weight == 1.0 else product * weight)
        if self._tight:
            self._equal &= shard == self._first

    def write(self, out: Any, norm: float) -> None:
        import torch

        mean = self._total.div_(norm)
        if self._tight:
            mean = torch.where(self._equal, self._first, mean)
        elif out.element_size() <= 2:
            mean = _round_to_odd(mean.view(torch.int64)).view(self._wide).to(torch.float32)
        out.copy_(mean)


_OF_THREAD = threading.local()


def _scratch_like(out: Any) -> Any:
    """Return two float32 tensors as long as ``out``; on the host this thread's own, since fresh memory is dear."""
    import torch

    if out.device.type != "cpu":
        return torch.empty((2, out.numel()), dtype=torch.float32, device=out.device)
    kept = getattr(_OF_THREAD, "scratch", None)
    if kept is None or kept.shape[1] < out.numel():
        with torch.inference_mode(mode=False):  # it outlives the call
            kept = _OF_THREAD.scratch = torch.empty((2, out.numel()), dtype=torch.float32, device="cpu")
    return kept[:, : out.numel()]

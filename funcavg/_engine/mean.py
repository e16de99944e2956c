"""The kernel: one shard from every rank in, their mean out, summed in wide precision.

Leaves of 32 bits and fewer are summed in float64 and rounded once, so that

    |result - mean| <= 1/2 ulp(result) + N * 2**-53 * mean|x|

and equal replicas come back bit for bit. Work goes in blocks that stay in the cache. Complex numbers never get
here: the mean is linear, so they arrive as pairs of reals.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Sums", "mean_into", "scaled", "tensor_mean_into", "wide"]

BLOCK = 32 * 1024  # elements: the float64 sums of a block take 256 KiB
DEVICE_BLOCK = 1 << 20  # of an accelerator: enough to keep it busy, and the sums take 24 MiB
SMALL = 2.0**-64  # exact to multiply by: sums of fewer than 2**64 numbers do not overflow, times this

Bytes = npt.NDArray[np.uint8]
NATIVE = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "longdouble": np.longdouble}
_S = TypeVar("_S", "_Sum", "_TensorSum")


def wide(element: str) -> str:
    """Return the dtype in which means of some ranks are handed on, to be averaged again and rounded once."""
    return element if element in ("float64", "longdouble") else "float32"


def mean_into(
    out: Bytes, shards: Sequence[Bytes], weights: Sequence[float] | None, element: str, into: str = ""
) -> None:
    """Write the (weighted) mean of equally long ``shards`` into ``out``.

    All are flat bytes: shards of dtype ``element``, ``out`` of dtype ``into``, which is the same unless said; of
    several dtypes one is `wide` of the other. ``out`` may be one of the shards if it is of their dtype. A shard of
    weight 0 is never read, NaN included.
    """
    into = into or element
    shards, weights = _drop_and_scale(shards, weights)
    length = 4 * BLOCK if len(shards) == 2 else BLOCK  # two mostly need no float64 sums
    view = _viewer(into if element == "float32" else element)
    arrays, result = [view(shard, element) for shard in shards], view(out, into)
    if not isinstance(result, np.ndarray):
        for block in _blocks(len(result), length):
            _tensor_mean(result[block], [array[block] for array in arrays], weights)
        return
    scratch = np.empty(min(length, result.size), result.dtype)
    with np.errstate(all="ignore"):
        for block in _blocks(result.size, length):
            _array_mean(result[block], [array[block] for array in arrays], weights, scratch)


class Sums:
    """The sums of shards that come one after another; their mean has the bits that `mean_into` gives to all at once.

    Beside the sums there is memory for the first shard, where leaves are as wide as their sums. Shards are flat bytes
    on the host, or, of ``on_device``, typed tensors.
    """

    def __init__(self, element: str, *, on_device: bool = False) -> None:
        self._view: Callable[[Any, str], Any] = (lambda shard, _: shard) if on_device else _viewer(element)
        self._element, self._length = element, DEVICE_BLOCK if on_device else BLOCK
        self._sums: list[_Sum | _TensorSum] = []  # one for each block

    def add(self, shard: Any, weight: float) -> None:
        """Add a shard, which may be overwritten afterwards."""
        array = self._view(shard, self._element)
        blocks = [array[block] for block in _blocks(len(array), self._length)]
        with np.errstate(all="ignore"):
            if self._sums:
                for total, block in zip(self._sums, blocks, strict=True):
                    total.add(block, weight)
            else:
                kind = _Sum if isinstance(array, np.ndarray) else _TensorSum
                self._sums = [kind(block, weight, once=True) for block in blocks]

    def mean_into(self, out: Any, norm: float) -> None:
        """Write the sums divided by that of the weights, and forget them."""
        result = self._view(out, self._element)
        with np.errstate(all="ignore"):
            for block in reversed(_blocks(len(result), self._length)):
                self._sums.pop().write(result[block], norm)


def _viewer(narrow: str) -> Callable[[Bytes, str], Any]:
    """Return how to view bytes as an array of NumPy's, or as a tensor where torch is there and knows more dtypes."""
    if narrow in NATIVE and (narrow != "float16" or "torch" not in sys.modules):
        return lambda memory, element: memory.view(NATIVE[element])
    if hasattr(sys.modules.get("torch"), narrow):
        import torch

        return lambda memory, element: torch.from_numpy(memory).view(getattr(torch, element))
    import ml_dtypes  # a leaf of this dtype came from there

    return lambda memory, element: memory.view(np.dtype(getattr(ml_dtypes, element, element)))


def scaled(weights: Sequence[float]) -> list[float]:
    """Scale weights by the largest, lest their sum or a product overflow."""
    top = max(weights)
    return [weight / top for weight in weights]


def _drop_and_scale(
    shards: Sequence[Any], weights: Sequence[float] | None
) -> tuple[Sequence[Any], Sequence[float] | None]:
    """Drop shards of weight 0, and scale the weights; None if they are all the same."""
    if weights is None:
        return shards, None
    kept = [shard for shard, weight in zip(shards, weights, strict=True) if weight]
    scales = scaled([weight for weight in weights if weight])
    return kept, None if all(scale == 1.0 for scale in scales) else scales


def _blocks(size: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, size, length)]


def _array_mean(
    out: npt.NDArray[Any], shards: list[npt.NDArray[Any]], weights: Sequence[float] | None, scratch: npt.NDArray[Any]
) -> None:
    narrow = out.dtype.itemsize < 4 or out.dtype.type not in NATIVE.values()
    if len(shards) == 2 and weights is None and not narrow and shards[0].dtype == out.dtype:
        # One addition rounds once, and halving is exact: no wider sum is needed, unless it overflows.
        # Shards may then be read again, so the sum goes to scratch memory where `out` is one of them.
        aliased = any(np.may_share_memory(out, shard) for shard in shards)
        try:
            with np.errstate(over="raise"):
                total = np.add(shards[0], shards[1], out=scratch[: out.size] if aliased else out)
            np.multiply(total, out.dtype.type(0.5), out=out)
            return
        except FloatingPointError:
            pass
    weights = weights or [1.0] * len(shards)
    try:
        with np.errstate(over="raise"):
            total = _sum_of(_Sum, shards, weights)
    except FloatingPointError:  # leaves near the largest float64
        total = _sum_of(_Sum, shards, weights, once=True)
    total.write(out, sum(weights))


def _sum_of(kind: type[_S], shards: Sequence[Any], weights: Sequence[float], *, once: bool = False) -> _S:
    total = kind(shards[0], weights[0], once=once)
    for shard, weight in zip(shards[1:], weights[1:], strict=True):
        total.add(shard, weight)
    return total


class _Sum:
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


def tensor_mean_into(out: Any, shards: Sequence[Any], weights: Sequence[float] | None) -> None:
    """Do the same with torch tensors of one dtype and one dimension, on their own device."""
    shards, weights = _drop_and_scale(shards, weights)
    for block in _blocks(out.numel(), DEVICE_BLOCK):
        _tensor_mean(out[block], [shard[block] for shard in shards], weights)


def _tensor_mean(out: Any, shards: Sequence[Any], weights: Sequence[float] | None) -> None:
    if len(shards) == 2 and weights is None and out.element_size() <= 2 and shards[0].element_size() <= 2:
        # Halves are exact in float32, and their sum, rounded there and then to 16 bits, is rounded right since
        # 24 >= 2 * 11 + 2. (The sum of two bfloat16 could overflow float32; that of their halves cannot.)
        halves = [wide.copy_(shard) for wide, shard in zip(_scratch_like(out), shards, strict=True)]
        out.copy_(halves[0].mul_(0.5).add_(halves[1], alpha=0.5))
        return
    weights = weights or [1.0] * len(shards)
    _sum_of(_TensorSum, shards, weights).write(out, sum(weights))


class _TensorSum:
    """The same of tensors. On an accelerator, sums of float64 that overflow are infinite."""

    def __init__(self, shard: Any, weight: float, *, once: bool) -> None:
        import torch

        self._wide = torch.float64
        self._total = shard.to(self._wide, copy=True)
        if weight != 1.0:
            self._total.mul_(weight)
        self._tight = shard.dtype == self._wide  # see _Sum
        if self._tight:
            self._first, self._equal = shard.clone() if once else shard, shard != 0

    def add(self, shard: Any, weight: float) -> None:
        self._total.add_(shard.to(self._wide), alpha=weight)
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

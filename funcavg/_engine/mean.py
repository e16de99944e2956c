"""The kernel: one shard from every rank in, their mean out, summed in wide precision.

Leaves of 32 bits and fewer are summed in float64 and rounded once, so that

    |result - mean| <= 1/2 ulp(result) + N * 2**-53 * mean|x|

and equal replicas come back bit for bit. Work goes in blocks that stay in the cache. Complex numbers never get
here: the mean is linear, so they arrive as pairs of reals.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["mean_into", "tensor_mean_into", "wide"]

BLOCK = 32 * 1024  # elements: the float64 sums of a block take 256 KiB
DEVICE_BLOCK = 1 << 20  # of an accelerator: enough to keep it busy, and the sums take 24 MiB

Bytes = npt.NDArray[np.uint8]
NATIVE = {"float16": np.float16, "float32": np.float32, "float64": np.float64, "longdouble": np.longdouble}


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
    narrow = into if element == "float32" else element
    if narrow in NATIVE and (narrow != "float16" or "torch" not in sys.modules):
        arrays = [shard.view(NATIVE[element]) for shard in shards]
        result = out.view(NATIVE[into])
        scratch = np.empty(min(length, result.size), NATIVE[into])
        with np.errstate(all="ignore"):
            for block in _blocks(result.size, length):
                _mean_native(result[block], [a[block] for a in arrays], weights, scratch)
    elif hasattr(sys.modules.get("torch"), narrow):
        import torch

        tensors = [torch.from_numpy(shard).view(getattr(torch, element)) for shard in shards]
        target = torch.from_numpy(out).view(getattr(torch, into))
        for block in _blocks(target.numel(), length):
            _tensor_mean(target[block], [t[block] for t in tensors], weights)
    else:
        import ml_dtypes  # a leaf of this dtype came from there

        arrays = [shard.view(np.dtype(getattr(ml_dtypes, element, element))) for shard in shards]
        result = out.view(np.dtype(getattr(ml_dtypes, into, into)))
        with np.errstate(all="ignore"):
            for block in _blocks(result.size, length):
                total = _wide_mean([a[block].astype(np.float32) for a in arrays], weights, np.float64)
                if into != "float32":
                    total = _round_to_odd(total.view(np.int64)).view(np.float64)
                result[block] = total.astype(np.float32)


def _drop_and_scale(
    shards: Sequence[Any], weights: Sequence[float] | None
) -> tuple[Sequence[Any], Sequence[float] | None]:
    """Drop shards of weight 0; scale the weights by the largest, lest their sum or a product overflow."""
    if weights is None:
        return shards, None
    top = max(weights)
    scales = [weight / top for weight in weights if weight]
    kept = [shard for shard, weight in zip(shards, weights, strict=True) if weight]
    return kept, None if all(scale == 1.0 for scale in scales) else scales


def _blocks(size: int, length: int) -> list[slice]:
    return [slice(start, start + length) for start in range(0, size, length)]


def _mean_native(
    out: npt.NDArray[Any], shards: list[npt.NDArray[Any]], weights: Sequence[float] | None, scratch: npt.NDArray[Any]
) -> None:
    if len(shards) == 2 and weights is None and out.dtype.itemsize >= 4 and shards[0].dtype == out.dtype:
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
    wide = np.float64 if out.dtype.itemsize <= 4 else out.dtype.type
    mean = _wide_mean(shards, weights, wide)
    if out.dtype.itemsize > 4 and len(shards) > 1:
        # Sums as narrow as the leaves may come back an ulp off. Replicas that are equal must not.
        equal = np.ones(out.shape, np.bool_)
        for shard in shards[1:]:
            equal &= shard == shards[0]
        np.copyto(mean, shards[0], where=equal)
    np.copyto(out, mean, casting="unsafe")


def _wide_mean(shards: list[npt.NDArray[Any]], weights: Sequence[float] | None, wide: type) -> npt.NDArray[Any]:
    """Return sum(w * x) / sum(w), computed in dtype ``wide``."""
    weights = weights or [1.0] * len(shards)
    norm = sum(weights)

    def weighted_sum(divisor: float) -> npt.NDArray[Any]:
        total: npt.NDArray[Any] = np.multiply(shards[0], weights[0] / divisor, dtype=wide)
        for shard, weight in zip(shards[1:], weights[1:], strict=True):
            scale = weight / divisor
            np.add(total, shard if scale == 1.0 else np.multiply(shard, scale, dtype=wide), out=total)
        return total

    try:
        with np.errstate(over="raise"):
            mean: npt.NDArray[Any] = np.divide(weighted_sum(1.0), norm)
            return mean
    except FloatingPointError:  # float64 leaves near the largest float64: divide first, at the price of an ulp
        return weighted_sum(norm)


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
    import torch

    if len(shards) == 2 and weights is None and out.element_size() <= 2 and shards[0].element_size() <= 2:
        # Halves are exact in float32, and their sum, rounded there and then to 16 bits, is rounded right since
        # 24 >= 2 * 11 + 2. (The sum of two bfloat16 could overflow float32; that of their halves cannot.)
        halves = [wide.copy_(shard) for wide, shard in zip(_scratch_like(out), shards, strict=True)]
        out.copy_(halves[0].mul_(0.5).add_(halves[1], alpha=0.5))
        return
    weights = weights or [1.0] * len(shards)
    total = shards[0].to(torch.float64, copy=True)
    if weights[0] != 1.0:
        total.mul_(weights[0])
    for shard, weight in zip(shards[1:], weights[1:], strict=True):
        total.add_(shard.to(torch.float64), alpha=weight)
    total.div_(sum(weights))
    if out.element_size() <= 2:
        total = _round_to_odd(total.view(torch.int64)).view(torch.float64).to(torch.float32)
    elif out.dtype == torch.float64:  # see _mean_native
        equal = torch.ones_like(out, dtype=torch.bool)
        for shard in shards[1:]:
            equal &= shard == shards[0]
        total = torch.where(equal, shards[0], total)
    out.copy_(total)


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

"""When: the predicate that says on which steps ranks average."""

from __future__ import annotations

import operator
import sys
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["check_schedule", "integer", "should_average"]


@overload
def should_average(step: int | np.integer[Any], warmup: int, period: int) -> bool: ...
@overload
def should_average(step: torch.Tensor, warmup: int, period: int) -> torch.Tensor: ...
@overload
def should_average(step: Any, warmup: int, period: int) -> Any: ...
def should_average(step: Any, warmup: int, period: int) -> Any:
    r"""Say whether parameters are averaged at this step.

    True if and only if ``t ≥ W`` and ``(t - W) mod p = 0``, where ``t`` = ``step``,
    ``W`` = ``warmup`` and ``p`` = ``period``. With ``warmup=0`` the very first step averages.
    A pure function of its arguments: it communicates nothing, and every rank that asks for the same step
    gets the same answer. Write it with keywords; torch's averager classes order the two the other way round.

    Args:
        step: The training step, counted from 0. A Python or NumPy integer (0-d integer arrays too, as
            restored from a file), a torch integer tensor, or a JAX integer, traced or not.
        warmup: Steps, at least 0, before the first averaging.
        period: Steps, at least 1, between two averagings.

    Returns:
        A ``bool`` for Python and NumPy steps; a torch boolean tensor of ``step``'s shape and device for torch
        tensors; a JAX boolean for JAX values, so that it can be the predicate of ``jax.lax.cond``.

    Raises:
        TypeError: If an argument is no integer (``bool`` is none). On this rank only.
        ValueError: If ``period < 1`` or ``warmup < 0``. On this rank only.

    Examples:
        >>> from funcavg import should_average
        >>> [step for step in range(20) if should_average(step, warmup=5, period=4)]
        [5, 9, 13, 17]

    References:
        The rule is that of torch's ``PeriodicModelAverager``. Lin et al., [Don't Use Large Mini-Batches, Use
        Local SGD](https://arxiv.org/abs/1808.07217), ICLR 2020 (post-local SGD).
    """
    warmup, period = check_schedule(warmup, period)
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and isinstance(step, torch.Tensor):
        if step.dtype == torch.bool or step.is_floating_point() or step.is_complex():
            raise TypeError(f"should_average: step must be an integer tensor, got dtype {step.dtype}: {step!r}")
        step = step.to(torch.int64)  # a uint8 step must not wrap around when warmup is subtracted
        return (step >= warmup) & ((step - warmup) % period == 0)
    if jax is not None and isinstance(step, jax.Array):
        if not jax.numpy.issubdtype(step.dtype, jax.numpy.integer):
            raise TypeError(f"should_average: step must be an integer, got a JAX value of dtype {step.dtype}: {step!r}")
        return (step >= warmup) & ((step - warmup) % period == 0)
    step = integer("should_average: step", step)
    return step >= warmup and (step - warmup) % period == 0


def check_schedule(warmup: Any, period: Any, who: str = "should_average") -> tuple[int, int]:
    """Return ``warmup`` and ``period`` as Python integers, or raise what `should_average` raises."""
    warmup, period = integer(f"{who}: warmup", warmup), integer(f"{who}: period", period)
    if period < 1:
        raise ValueError(f"{who}: period must be at least 1, got {period!r}")
    if warmup < 0:
        raise ValueError(f"{who}: warmup must be at least 0, got {warmup!r}")
    return warmup, period


def integer(what: str, value: Any) -> int:
    """Return an integer of any kind as Python's; bool is none."""
    is_bool = isinstance(value, (bool, np.bool_)) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    try:
        if not is_bool:
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{what} must be an integer, got {value!r} of type {type(value).__name__}.")

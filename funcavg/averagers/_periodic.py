"""Local SGD and post-local SGD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from funcavg._schedule import check_schedule, should_average
from funcavg._trees import Options, Timeout, Where
from funcavg.averagers._base import (
    Averager,
    check_tree,
    checksum_of,
    choose,
    failing_everywhere,
    step_of,
    synchronise,
    without_grad,
)

__all__ = ["PeriodicState", "periodic"]


class PeriodicState(NamedTuple):
    """The state of `periodic`: the same on every rank, and fit for any number of them."""

    step: Any  # updates so far; shape (), an integer
    tree: Any  # a checksum of the averaged leaves' paths, shapes and dtypes; shape (), an integer


def periodic(
    period: int, *, warmup: int = 0, group: Any = None, where: Where | None = None, timeout: Timeout = None
) -> Averager:
    r"""Average parameters every ``period`` steps: local SGD, with a warm-up post-local SGD.

    At steps ``t = 0, 1, 2, ...`` with ``t ≥ W`` and ``(t - W) mod p = 0``,

        θ_i ← (1/N) Σ_j θ_j

    where ``p`` = ``period`` and ``W`` = ``warmup``; with no warm-up, the very first update averages. At all
    other steps parameters come back as they went in. **During warm-up nothing is averaged here**: post-local SGD means
    that the caller averages gradients until then, as in the example. The optimizer's own state stays local.

    It has no ``wire``: parameters are sent as they are, for a code's error would be relative to them, and not to what
    has changed. Where links are slow, ``diloco(period, outer=outer.sgd(1.0), wire="int8")`` averages at the ends of
    periods by way of changes.

    Args:
        period: Steps, at least 1, between two averagings.
        warmup: Steps, at least 0, before the first.
        group: Who takes part, as for `funcavg.average`.
        where: Which leaves are averaged, as for `funcavg.average`.
        timeout: How long to wait for the other ranks, as for `funcavg.average`. Allow for the slowest worker, which
            comes late by what it takes longer for a period; and for what some ranks do alone, such as to evaluate.

    Returns:
        An `Averager`. Its state is a `PeriodicState`. ``init`` communicates nothing.

    Raises:
        TypeError, ValueError: If ``period`` or ``warmup`` is no integer, or too small. On this rank. From ``init``, if
            a leaf can be neither averaged nor passed through: on this rank.
        ValueError: From ``update``, if the averaged leaves are not those of ``init``: on every rank, at steps that
            average; at others, on this rank. Under ``jax.jit`` it is not looked at.

        ``update`` raises what `funcavg.average` raises, at steps that average.

    Communication:
        That of one `funcavg.average` every ``period`` steps, else none.

    Examples:
        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def train(group):
        ...     averager = funcavg.periodic(period=2, warmup=2, group=group)
        ...     params, seen = {"w": np.zeros(1)}, []
        ...     state = averager.init(params)
        ...     for step in range(5):
        ...         grads = {"w": params["w"] - group.rank}  # ranks pull to 0 and to 1
        ...         if step < 2:
        ...             grads = funcavg.average(grads, group)
        ...         params = {"w": params["w"] - 0.5 * grads["w"]}
        ...         params, state = averager.update(params, state)
        ...         seen.append(float(params["w"][0]))
        ...     return seen
        >>> run_ranks(2, train)
        [[0.25, 0.375, 0.4375, 0.21875, 0.484375], [0.25, 0.375, 0.4375, 0.71875, 0.484375]]

    References:
        Stich, [Local SGD Converges Fast and Communicates Little](https://arxiv.org/abs/1805.09767), ICLR 2019. Lin et
        al., [Don't Use Large Mini-Batches, Use Local SGD](https://arxiv.org/abs/1808.07217), ICLR 2020. The steps are
        those of torch's ``PeriodicModelAverager``.
    """
    warmup, period = check_schedule(warmup, period, "periodic")
    options = Options(where=where, timeout=timeout).checked("periodic")

    def init(params: Any) -> PeriodicState:
        return PeriodicState(0, checksum_of(params, where))

    def update(params: Any, state: PeriodicState, *, weight: Any = None, donate: bool = False) -> Any:
        step = step_of(state)

        def meet(params: Any) -> Any:
            now = replace(options, weight=weight, donate=donate)
            return synchronise(params, group, now, method="periodic", step=step)

        with without_grad():
            fires = should_average(step, warmup=warmup, period=period)
            with failing_everywhere(group, options, others_wait=fires):
                check_tree(state.tree, params, where, "periodic")
            return choose(fires, [lambda params: params, meet], params), state._replace(step=step + 1)

    return Averager(init, update)

"""Hierarchical SGD: small groups average often, larger ones less often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal, NamedTuple

from funcavg._schedule import check_schedule, should_average
from funcavg._transforms import Stacked, is_axis
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
from funcavg.collectives import is_outside
from funcavg.collectives.blocks import block_of

__all__ = ["HierarchicalState", "hierarchical"]


class HierarchicalState(NamedTuple):
    """The state of `hierarchical`: the same on every rank, and fit for any groups."""

    step: Any  # updates so far; shape (), an integer
    tree: Any  # a checksum of the averaged leaves' paths, shapes and dtypes; shape (), an integer


def hierarchical(  # noqa: PLR0913  # public: its options are keywords
    levels: Mapping[int, Any],
    *,
    warmup: int = 0,
    anchor: Literal["step", "warmup"] = "step",
    group: Any = None,
    where: Where | None = None,
    timeout: Timeout = None,
) -> Averager:
    r"""Average parameters at several levels: hierarchical SGD.

    ``levels`` maps periods ``p_1, ..., p_L``, each a multiple of the one before, to who averages so often. From
    step ``t = W`` = ``warmup`` on,

        θ_i ← (1/|G_l|) Σ_(j ∈ G_l) θ_j, l = max {k : p_k divides t}

    over the group ``G_l`` of rank ``i``; where no period divides ``t``, nothing happens. With
    ``anchor="warmup"`` periods divide ``t - W`` instead, so that the first average comes right after the warm-up,
    over the largest groups. During warm-up the caller averages gradients, as with `periodic`.

    It has no ``wire``, as `periodic` has none: where links between hosts are slow, `diloco` over all ranks has.

    Args:
        levels: {period, in steps: group}. A group is whatever `funcavg.average` takes, an axis name included; or a
            number, of consecutive ranks of ``group`` in each block that averages so often. Numbers grow with the
            periods, each a multiple of the one before, and divide the ranks of ``group``.
        warmup: Steps, at least 0, before the first average.
        anchor: What periods count from: ``"step"``, from the first step, as in torch's ``HierarchicalModelAverager``;
            ``"warmup"``, from the end of the warm-up, as in `periodic`.
        group: What numbers in ``levels`` are blocks of.
        where: Which leaves are averaged, as for `funcavg.average`.
        timeout: How long to wait for the other ranks, as for `periodic`. Groups that numbers make have the timeout of
            ``group``.

    Returns:
        An `Averager`. Its state is a `HierarchicalState`.

    Raises:
        TypeError, ValueError: If ``levels`` is empty or no mapping; if periods or ``warmup`` are no integers, are too
            small, or do not nest; if numbers of ranks do not nest. On this rank.
        ValueError: From ``update``, if the tree is not that of ``init``; see `periodic`.

        ``update`` raises what `funcavg.average` raises, on the ranks of the group that averages.

    Communication:
        Where ``levels`` holds numbers, calling this is collective: the ranks of ``group`` make the smaller groups
        together. ``init`` communicates nothing; ``update`` as one `funcavg.average` over the group of its level.

    Examples:
        Pairs average every 2 steps, all four ranks every 4:

        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def train(group):
        ...     averager = funcavg.hierarchical({2: 2, 4: 4}, warmup=1, group=group)
        ...     params, seen = {"w": np.array(float(group.rank))}, []
        ...     state = averager.init(params)
        ...     for _ in range(5):
        ...         params, state = averager.update(params, state)
        ...         seen.append(float(params["w"]))
        ...     return seen
        >>> for seen in run_ranks(4, train): print(seen)
        [0.0, 0.0, 0.5, 0.5, 1.5]
        [1.0, 1.0, 0.5, 0.5, 1.5]
        [2.0, 2.0, 2.5, 2.5, 1.5]
        [3.0, 3.0, 2.5, 2.5, 1.5]

    References:
        Wang et al., [Demystifying Why Local Aggregation Helps: Convergence Analysis of Hierarchical
        SGD](https://arxiv.org/abs/2010.12998), AAAI 2022. torch's ``HierarchicalModelAverager``.
    """
    periods, start, warmup = _check(levels, warmup, anchor)
    options = Options(where=where, timeout=timeout).checked("hierarchical")
    groups = _groups([levels[period] for period in periods], group)

    def init(params: Any) -> HierarchicalState:
        return HierarchicalState(0, checksum_of(params, where))

    def update(params: Any, state: HierarchicalState, *, weight: Any = None, donate: bool = False) -> Any:
        step = step_of(state)

        def fires(level: int) -> Any:
            due = should_average(step, warmup=start, period=periods[level])
            return due if start == warmup else due & (step >= warmup)

        def meet_at(level: int) -> Any:
            method = f"hierarchical, period {periods[level]}"
            now = replace(options, weight=weight, donate=donate)
            return lambda params: synchronise(params, groups[level], now, method=method, step=step)

        def meet(level: int) -> Any:
            """Average at this level, or at a higher one: periods nest, so that it is due only if this one is."""
            if level + 1 == len(periods):
                return meet_at(level)
            return lambda params: choose(fired[level + 1], [meet_at(level), meet(level + 1)], params)

        with without_grad():
            fired = [fires(level) for level in range(len(periods))]
            waiting = sum(map(bool, fired)) - 1 if isinstance(step, int) else 0  # the level; -1 for none
            with failing_everywhere(groups[max(waiting, 0)], options, others_wait=waiting >= 0):
                check_tree(state.tree, params, where, "hierarchical")
            params = choose(fired[0], [lambda params: params, meet(0)], params)
            return params, state._replace(step=step + 1)

    return Averager(init, update)


def _groups(given: list[Any], group: Any) -> list[Any]:
    """Return groups, where some are given as numbers of ranks in a block."""
    sizes = [who for who in given if isinstance(who, Integral) and not is_outside(who)]
    if sizes and (is_axis(group) or isinstance(group, Stacked)):
        raise TypeError(
            f"hierarchical: numbers of ranks are blocks of a group of processes or threads, got {group!r}. Map periods "
            f"to groups instead, such as names of mesh axes."
        )
    for smaller, larger in pairwise(sizes):
        if smaller < 1 or larger % smaller:
            raise ValueError(
                f"hierarchical: each number of ranks must be a multiple of the one before, got {sizes}, by ascending "
                f"period"
            )
    return [block_of(group, int(who)) if isinstance(who, Integral) and not is_outside(who) else who for who in given]


def _check(levels: Any, warmup: Any, anchor: Any) -> tuple[list[int], int, int]:
    """Return periods, ascending; the step that they count from; and the warm-up."""
    if not isinstance(levels, Mapping) or not levels:
        raise TypeError(f"hierarchical: levels must map periods to groups, at least one, got {levels!r}")
    if anchor not in ("step", "warmup"):
        raise ValueError(f'hierarchical: anchor must be "step" or "warmup", got {anchor!r}')
    for period in levels:
        warmup, _ = check_schedule(warmup, period, "hierarchical")
    periods = sorted(levels)
    for shorter, longer in pairwise(periods):
        if longer % shorter:
            raise ValueError(
                f"hierarchical: each period must be a multiple of the one before, but {longer} is none of {shorter}: "
                f"got {periods}"
            )
    return periods, warmup if anchor == "warmup" else 0, warmup

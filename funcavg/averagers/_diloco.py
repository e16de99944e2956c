"""DiLoCo: local training, and an outer optimizer on what it has changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from funcavg import _tree
from funcavg import outer as outer_optimizers
from funcavg._request import Request, Where
from funcavg._schedule import check_schedule, should_average
from funcavg.averagers._base import (
    Averager,
    choose,
    described,
    fail_everywhere,
    layout_of,
    synchronise,
    without_grad,
)

__all__ = ["DiLoCoState", "diloco"]


class DiLoCoState(NamedTuple):
    """The state of `diloco`: the same bits on every rank, so that any number of ranks can go on from one of them."""

    step: Any  # updates so far; shape (), an integer
    anchor: Any  # the last synchronised parameters: the tree of params, None for leaves that are not averaged
    outer: Any  # of the outer optimizer


def diloco(
    period: int,
    *,
    outer: Any = outer_optimizers.nesterov(0.7, 0.9),  # noqa: B008  # immutable
    warmup: int = 0,
    group: Any = None,
    where: Where | None = None,
) -> Averager:
    r"""Let workers train on their own for ``period`` steps; then take one outer step on what they have changed.

    With ``Θ`` the anchor, that is, the last synchronised parameters, after every ``H`` = ``period`` steps

        Δ = (1/N) Σ_i (Θ - θ_i),    Θ ← outer(Θ, Δ),    θ_i ← Θ

    The pseudo-gradient ``Δ`` points uphill, as a gradient does. The inner optimizer's own state stays local. Updates
    are counted from 0; those with ``should_average(step + 1, warmup + period, period)`` synchronise.

    Other methods, here with their papers' defaults, are spellings of this one:

    - DiLoCo: ``diloco(500)``
    - SlowMo, at a constant inner rate: ``diloco(48, outer=outer.sgd(1.0, momentum=0.5))``, with its α and β
    - BMUF, classical: ``diloco(50, outer=outer.sgd(1.0, momentum=0.875))``, with its ζ and η
    - FedAvgM: ``diloco(period, outer=outer.sgd(1.0, momentum=0.9))``, with each worker's number of examples as weight
    - local SGD that averages at the ends of periods: ``diloco(period, outer=outer.sgd(1.0))``

    (SlowMo under a changing inner rate divides by it, BMUF with Nesterov momentum adds another term, and FedAdam
    corrects no bias, unlike ``optax.adam`` and ``torch.optim.Adam``: these three are not spellings of `diloco`.)

    Args:
        period: Steps, at least 1, between two synchronisations.
        outer: `funcavg.outer.nesterov` or `funcavg.outer.sgd`; an optax ``GradientTransformation``, for JAX trees; or a
            function from parameters to a ``torch.optim.Optimizer``, for torch trees, such as
            ``lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)``.
        warmup: Steps, at least 0, during which the caller averages gradients. The last of them takes the anchor anew:
            periods begin there.
        group: Who takes part, as for `funcavg.average`.
        where: Which leaves are averaged, as for `funcavg.average`.

    Returns:
        An `Averager`. Its state is a `DiLoCoState`. Parameters never share memory with the anchor; with ``donate=True``
        they come back in their own memory.

    Raises:
        TypeError, ValueError: If an argument is no good. On this rank.
        ValueError: From ``update``, if the tree is not that of ``init``: it names the leaves; on every rank, at steps
            that synchronise; at others, on this rank.

        ``init``, and ``update`` at steps that synchronise, raise what `funcavg.average` raises.

    Communication:
        ``init`` is collective: the anchor is the mean of what workers begin with, who may begin with different
        parameters. So is the last step of a warm-up. Then one `funcavg.average` of the pseudo-gradient every ``period``
        steps, else none.

    Memory:
        The anchor and what ``outer`` keeps; at a synchronisation the pseudo-gradient and the next of both besides.

    Example:
        One worker minimises ``(w - 1)^2 / 2`` and the other ``(w - 3)^2 / 2``; together they find 2:

        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def train(group):
        ...     averager = funcavg.diloco(period=5, outer=funcavg.outer.nesterov(0.7, 0.5), group=group)
        ...     params, seen = {"w": np.array(0.0)}, []
        ...     state = averager.init(params)
        ...     for step in range(20):
        ...         params = {"w": params["w"] - 0.2 * (params["w"] - (1 + 2 * group.rank))}  # a step of the optimizer
        ...         params, state = averager.update(params, state)
        ...         if step % 5 == 4:
        ...             seen.append(round(float(params["w"]), 3))
        ...     return seen
        >>> run_ranks(2, train)
        [[1.412, 2.062, 2.205, 2.146], [1.412, 2.062, 2.205, 2.146]]

    References:
        Douillard et al., [DiLoCo: Distributed Low-Communication Training of Language
        Models](https://arxiv.org/abs/2311.08105), 2023. Wang et al., [SlowMo: Improving Communication-Efficient
        Distributed SGD with Slow Momentum](https://arxiv.org/abs/1910.00643), ICLR 2020. Chen and Huo, [Scalable
        Training of Deep Learning Machines by Incremental Block Training with Intra-block Parallel Optimization and
        Blockwise Model-Update Filtering](https://doi.org/10.1109/ICASSP.2016.7472805), ICASSP 2016. Hsu et al.,
        [Measuring the Effects of Non-Identical Data Distribution for Federated Visual
        Classification](https://arxiv.org/abs/1909.06335), 2019.
    """
    warmup, period = check_schedule(warmup, period, "diloco")
    optimizer = outer_optimizers.as_outer(outer)

    def init(params: Any) -> DiLoCoState:
        with without_grad():
            anchor = anchor_at(0, params)
            return DiLoCoState(0, anchor, optimizer.init(anchor))

    def anchor_at(step: Any, params: Any, weight: Any = None) -> Any:
        mean = synchronise(params, group, method="diloco, anchor", step=step, weight=weight, where=where)
        return _averaged_part(described(mean, where))

    def update(params: Any, state: DiLoCoState, *, weight: Any = None, donate: bool = False) -> Any:
        step = state.step

        def meet(everything: Any) -> Any:
            params, anchor, memory = everything
            request = described(params, where)
            delta = _tree.combine(lambda old, new: old - _detached(new), anchor, _averaged_part(request))
            delta = synchronise(delta, group, method="diloco", step=step, weight=weight, donate=True)
            anchor, memory = optimizer.step(delta, memory, anchor)
            return _with_values(request, _tree.flatten(anchor)[0], donate=donate), anchor, memory

        def take_anchor(everything: Any) -> Any:
            params, _, memory = everything
            return params, anchor_at(step, params, weight), memory

        with without_grad():
            synchronises = should_average(step + 1, warmup=warmup + period, period=period)
            different = _differences(state.anchor, params, where)
            if different:
                fail_everywhere(
                    ValueError(f"diloco: update was given another tree than init: {different}"),
                    group,
                    others_wait=synchronises,
                )
            branches = [lambda everything: everything, meet]
            if warmup:
                branches[0] = lambda everything: choose(
                    step == warmup - 1, [lambda everything: everything, take_anchor], everything
                )
            params, anchor, memory = choose(synchronises, branches, (params, state.anchor, state.outer))
            return params, DiLoCoState(step + 1, anchor, memory)

    return Averager(init, update)


def _averaged_part(request: Request) -> Any:
    """Return a tree with None in the place of what is not averaged."""
    layout = layout_of(request)
    part: list[Any] = [None] * len(request.everything)
    for i in layout.averaged:
        part[i] = _detached(request.everything[i])
    return _tree.unflatten(request.spec, part)


def _detached(leaf: Any) -> Any:
    """Return a tensor for a parameter."""
    return leaf.detach() if hasattr(leaf, "detach") else leaf


def _with_values(request: Request, values: Sequence[Any], *, donate: bool) -> Any:
    """Return a tree whose averaged leaves have other values, in memory of their own."""
    layout = layout_of(request)
    results: list[Any] = []
    made: dict[int, Any] = {}  # by leaf: the same object twice is one in the result, too
    for i, (leaf, family, value) in enumerate(zip(request.leaves, layout.families, values, strict=True)):
        if not family.mutable:  # then `value` is as immutable
            made[id(leaf)] = value
        elif donate:
            family.copy([family.carrier(leaf)], [family.carrier(value)])
            made[id(leaf)] = leaf
        elif i not in request.ties:
            carrier = family.fresh(leaf)
            family.copy([carrier], [family.carrier(value)])
            made[id(leaf)] = family.finish(leaf, carrier)
        elif id(leaf) not in made:  # another view of the same memory
            made[id(leaf)] = family.tie(leaf, results[request.ties[i]])
        results.append(made[id(leaf)])
    return request.rebuild(results)


def _differences(anchor: Any, params: Any, where: Where | None) -> str:
    """Name the first leaves that an anchor has and the averaged part of a tree has not, or the other way round."""
    ours, theirs = layout_of(described(anchor)), layout_of(described(params, where))
    left, right = ([layout.lines[i] for i in layout.averaged] for layout in (ours, theirs))
    pairs = [(a, b) for a, b in zip(left, right, strict=False) if a != b][:3]
    if not pairs and len(left) != len(right):
        return f"{len(left)} leaves then, {len(right)} now. Keep the tree as it is, or begin anew with init."
    text = "; ".join(f"{a} then, {b} now" for a, b in pairs)
    return text and f"{text}. Keep the tree as it is, or begin anew with init."

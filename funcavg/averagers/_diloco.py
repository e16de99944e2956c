"""DiLoCo: local training, and an outer optimizer on what it has changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from funcavg import outer as outer_optimizers
from funcavg._schedule import check_schedule, should_average
from funcavg._trees import Options, Timeout, Where, combine, flatten
from funcavg.averagers._base import (
    Averager,
    choose,
    described,
    failing_everywhere,
    layout_of,
    step_of,
    synchronise,
    takes_part,
    without_grad,
)
from funcavg.averagers._outer_step import (
    agreed_ties,
    averaged_part,
    check_same_tree,
    check_wire,
    has_tracers,
    tied,
    with_values,
)

if TYPE_CHECKING:
    from funcavg.wires import Wire

__all__ = ["DiLoCoState", "diloco"]


class DiLoCoState(NamedTuple):
    """The state of `diloco`: the same bits on every rank, so that any number of ranks can go on from one of them."""

    step: Any  # updates so far; shape (), an integer
    anchor: Any  # the last synchronised parameters: the tree of params, None for leaves that are not averaged
    outer: Any  # of the outer optimizer: for those of `funcavg.outer`, a tree like the anchor


def diloco(  # noqa: PLR0913  # public: its options are keywords
    period: int,
    *,
    outer: Any = outer_optimizers.nesterov(0.7, 0.9),  # noqa: B008  # immutable
    warmup: int = 0,
    group: Any = None,
    where: Where | None = None,
    timeout: Timeout = None,
    wire: str | Wire | None = None,
) -> Averager:
    r"""Let workers train on their own for ``period`` steps; then take one outer step on what they have changed.

    With ``Θ`` the anchor, that is, the last synchronised parameters, after every ``H`` = ``period`` steps

        Δ = (1/N) Σ_i (Θ - θ_i),    Θ ← outer(Θ, Δ),    θ_i ← Θ

    The pseudo-gradient ``Δ`` points uphill, as a gradient does. The inner optimizer's own state stays local. Updates
    are counted from 0; those with ``should_average(step + 1, warmup + period, period)`` synchronise.

    Other methods, here with common settings, are spellings of this one:

    - DiLoCo: ``diloco(500)``
    - SlowMo, at a constant inner rate: ``diloco(48, outer=outer.sgd(1.0, momentum=0.5))``, with its α and β
    - BMUF, classical: ``diloco(50, outer=outer.sgd(1.0, momentum=0.875))``, with its ζ and η
    - BMUF with Nesterov momentum, as fairseq has it: ``diloco(50, outer=outer.sgd(1.875, momentum=0.875))``: ζ (1 + η),
      then η
    - FedAvgM: ``diloco(period, outer=outer.sgd(1.0, momentum=0.9))``, with each worker's number of examples as weight
    - local SGD that averages at the ends of periods: ``diloco(period, outer=outer.sgd(1.0))``

    (SlowMo under a changing inner rate divides by it, and FedAdam corrects no bias, unlike ``optax.adam`` and
    ``torch.optim.Adam``: these two are not spellings of `diloco`.)

    Every averaged leaf is stepped, as the paper steps parameters. That is wrong for buffers: an outer momentum can make
    a running variance negative, and infinities have no difference. Leave buffers out with ``where``, and average them
    with `periodic`, or not at all.

    Args:
        period: Steps, at least 1, between two synchronisations.
        outer: `funcavg.outer.nesterov` or `funcavg.outer.sgd`; an optax ``GradientTransformation``, for JAX trees; or a
            function from parameters to a ``torch.optim.Optimizer``, for torch trees, such as
            ``lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)``; or a pair of your own, made
            with `funcavg.outer.Outer`. Its state begins anew with every anchor that is taken.
        warmup: Steps, at least 0, during which the caller averages gradients. The last of them takes the anchor anew:
            periods begin there.
        group: Who takes part, as for `funcavg.average`.
        where: Which leaves are averaged, as for `funcavg.average`.
        timeout: How long to wait for the other ranks, as for `periodic`.
        wire: How pseudo-gradients are written between hosts, as for `funcavg.average`: ``"int8"`` or ``"int4"`` where
            links are slow. Anchors are always exact.

    Returns:
        An `Averager`. Its state is a `DiLoCoState`; on a rank outside of the group it holds the step only. Parameters
        never share memory with the anchor; with ``donate=True`` they come back in their own memory.

    Raises:
        TypeError, ValueError: If an argument is no good. On this rank.
        ValueError: From ``init``, if there is no such wire; from ``update``, if the averaged leaves are not those of
            ``init`` (it names them), or one cannot be donated. On every rank, at steps that communicate; at others, on
            this rank.

        ``init``, and ``update`` at steps that synchronise, raise what `funcavg.average` raises.

    Communication:
        ``init`` is collective: the anchor is the mean of what workers begin with, who may begin with different
        parameters. So is the last step of a warm-up. Then one `funcavg.average` of the pseudo-gradient every ``period``
        steps, else none.

    Memory:
        The anchor and what ``outer`` keeps, in the parameters' dtypes; at a synchronisation the pseudo-gradient, the
        updates and the next of both besides. (Anchors of 16 bits lose updates smaller than their last digit.)

    Examples:
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
    options = Options(timeout=timeout).checked("diloco")
    optimizer = outer_optimizers.as_outer(outer)

    def init(params: Any) -> DiLoCoState:
        with without_grad():
            if not takes_part(group):
                return DiLoCoState(0, None, None)
            with failing_everywhere(group, options, others_wait=True):
                check_wire(wire, group, "diloco")
            anchor = anchor_at(0, params)
            return DiLoCoState(0, anchor, optimizer.init(anchor))

    def anchor_at(step: Any, params: Any, weight: Any = None) -> Any:
        now = replace(options, weight=weight, where=where)
        mean = synchronise(params, group, now, method="diloco, anchor", step=step)
        return averaged_part(described(mean, where))

    def update(params: Any, state: DiLoCoState, *, weight: Any = None, donate: bool = False) -> Any:
        step = step_of(state)
        if not takes_part(group):
            return params, state._replace(step=step + 1)

        def meet(everything: Any) -> Any:
            params, anchor, memory = everything
            with failing_everywhere(group, options, others_wait=True):
                request = described(params, where, donate=donate, ties=not has_tracers(params))
                change = combine(lambda old, new: old - new, anchor, averaged_part(request))
                delta = tied(change, request.ties)
            now = replace(options, weight=weight, donate=donate or not request.ties, wire=wire)
            mean = synchronise(delta, group, now, method="diloco", step=step)
            anchor, memory = optimizer.step(mean, memory, anchor)
            values = flatten(anchor).leaves
            return with_values(request, values, agreed_ties(request.ties, mean)), anchor, memory

        def take_anchor(everything: Any) -> Any:
            params, _, _ = everything
            anchor = anchor_at(step, params, weight)
            return params, anchor, optimizer.init(anchor)

        with without_grad():
            meets = should_average(step + 1, warmup=warmup + period, period=period)
            anchors = step == warmup - 1
            with failing_everywhere(group, options, others_wait=meets | anchors):
                check_same_tree(layout_of(described(state.anchor)), layout_of(described(params, where)), "diloco")
            branches = [lambda everything: everything, meet]
            if warmup:
                idle = branches[0]
                branches[0] = lambda everything: choose(anchors, [idle, take_anchor], everything)
            params, anchor, memory = choose(meets, branches, (params, state.anchor, state.outer))
            return params, DiLoCoState(step + 1, anchor, memory)

    return Averager(init, update)

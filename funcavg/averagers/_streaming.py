"""Streaming DiLoCo: fragments of the model, each synchronised at its own step, that travel while training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from funcavg import outer as outer_optimizers
from funcavg._schedule import check_schedule
from funcavg._trees import Options, Timeout, Where, combine, flatten
from funcavg.averagers._base import (
    Averager,
    choose,
    described,
    failing_everywhere,
    is_local,
    step_of,
    synchronise,
    takes_part,
    without_grad,
)
from funcavg.averagers._cutting import Cutter, local, pieces_of, places_of, ties_of
from funcavg.averagers._flights import forget, turn_to
from funcavg.averagers._fragments import Timetable, check_fragments
from funcavg.averagers._outer_step import agreed_ties, check_wire, has_tracers, mixed, tied, with_values
from funcavg.averagers._packing import empty, forms_of, pack, unpack
from funcavg.averagers._travel import Travel, in_place_of, kept_weight

if TYPE_CHECKING:
    from funcavg.wires import Wire

__all__ = ["StreamingState", "streaming_diloco"]

NAME = "streaming_diloco"


class StreamingState(NamedTuple):
    """The state of `streaming_diloco`. Where nothing is under way, it has the same bits on every rank."""

    step: Any  # updates so far; shape (), an integer
    anchor: Any  # a tree for each fragment: its last synchronised parameters, None for what is of other fragments
    outer: Any  # the outer optimizer's state of each fragment
    sent: Any  # this rank's changes of the fragment that is under way, else zeros: vectors, by kind; none without delay
    weight: Any  # this rank's weight when it was sent, rounded to float32; NaN for none


def streaming_diloco(  # noqa: PLR0913  # public: its options are keywords
    period: int,
    *,
    fragments: int | Sequence[Callable[[tuple[Any, ...]], Any]],
    delay: int = 0,
    mix: float = 0.0,
    outer: Any = outer_optimizers.nesterov(0.7, 0.9),  # noqa: B008  # immutable
    warmup: int = 0,
    group: Any = None,
    where: Where | None = None,
    wire: str | Wire | None = None,
    timeout: Timeout = None,
) -> Averager:
    r"""DiLoCo, fragment by fragment: each is synchronised at its own step, and travels while training goes on.

    With ``F`` fragments and ``H`` = ``period``, fragment ``k`` has its own step ``a_k = ⌊(k + 1) H / F⌋`` of each
    period. ``Θ`` is the synchronised copy (the anchor), ``θ_i`` a worker's parameters, ``τ`` = ``delay``, ``α`` =
    ``mix``:

        after step a_k - τ:   Δ_k = (1/N) Σ_i (Θ_k - θ_i,k) is begun
        after step a_k:       Θ_k ← outer_k(Θ_k, Δ_k),    θ_i,k ← (1 - α) Θ_k + α θ_i,k

    So what is sent at once is ``1/F`` of the model, and nobody waits for it, if it arrives within ``τ`` steps.
    ``streaming_diloco(period, fragments=1)`` is ``diloco(period)``, to the bit.

    The state says all: it can be saved after any step, also while a fragment is under way, which is sent again by
    whoever goes on from there, and then the run has the same bits. All ranks go on from states of the same step, each
    from its own; where nothing is under way, any number of ranks can go on from one of them. (A state that only some
    ranks of a living group go back to is an error: ranks send fragments of different steps, and are told.)

    Args:
        period: Steps, at least 1, in which each fragment is synchronised once.
        fragments: How many: then the averaged leaves, in order, are cut into so many parts, also between rows of a
            leaf's first axis, the largest as small as can be. Or a sequence of functions of a leaf's path: a leaf goes
            to the first that accepts it, whole. Tied leaves go with the first of them.
        delay: Steps, at least 0 and less than ``⌊period / fragments⌋``, that a fragment may travel.
        mix: How much of a worker's own parameters stays when a fragment is applied, 0 to 1. With 0, a replica that has
            diverged heals; with more, its NaNs stay.
        outer: The outer optimizer, as for `diloco`. Each fragment has a state of its own, and sees the tree of
            parameters with None in the place of what is of others.
        warmup: Steps, at least 0, during which the caller averages gradients, as for `diloco`.
        group: Who takes part, as for `funcavg.average`. Over axes and stacked replicas the mean is taken when a
            fragment is sent.
        where: Which leaves are averaged, as for `funcavg.average`.
        wire: How pseudo-gradients are written between hosts, as for `funcavg.average`.
        timeout: How long to wait for the other ranks, as for `periodic`.

    Returns:
        An `Averager`. Its state is a `StreamingState`; on a rank outside of the group it holds the step only.
        ``update``'s weight counts when a fragment is sent.

    Raises:
        TypeError, ValueError: If an argument is no good. On this rank.
        ValueError: From ``init``, if an averaged leaf is in no fragment, a fragment has no leaf, or there are fewer
            rows than fragments (it names them); from ``update``, if the averaged leaves are not those of ``init``. On
            every rank, at steps that communicate; at others, on this rank. With a delay, a step that applies a
            fragment communicates no more: who makes a mistake there can call ``update`` again, without it.

        ``init`` and ``update`` raise what `funcavg.average` raises: of what travels in the background, the update that
        applies it.

    Communication:
        ``init`` is collective, and so is the last step of a warm-up: both average all parameters, exactly. Then
        `funcavg.start_average` of each fragment's pseudo-gradient once a period. While one is under way, nothing else
        can be averaged over this group (RuntimeError says so): use a second group for that. Over groups whose work is
        done by who waits for it (those that are configured anew, an MPI communicator before its first average), and in
        programs of JAX over axes, nothing is in the background.

    Memory:
        The anchor and what ``outer`` keeps, in the parameters' dtypes; with a delay, a fragment's pseudo-gradient
        and its mean, also on the host where the parameters are not.

    Examples:
        Two workers, two fragments, each a step under way:

        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def train(group):
        ...     outer = funcavg.outer.sgd(1.0)
        ...     averager = funcavg.streaming_diloco(4, fragments=2, delay=1, outer=outer, group=group)
        ...     params, seen = {"a": np.array([0.0]), "b": np.array([0.0])}, []
        ...     state = averager.init(params)
        ...     for step in range(8):
        ...         params = {name: leaf + 1 + group.rank for name, leaf in params.items()}  # a step of the optimizer
        ...         params, state = averager.update(params, state)
        ...         seen.append((float(params["a"][0]), float(params["b"][0])))
        ...     return seen
        >>> run_ranks(2, train)[0]
        [(1.0, 1.0), (1.5, 2.0), (2.5, 3.0), (3.5, 4.5), (4.5, 5.5), (6.0, 6.5), (7.0, 7.5), (8.0, 9.0)]

    References:
        Douillard et al., [Streaming DiLoCo with overlapping communication](https://arxiv.org/abs/2501.18512), 2025; the
        order of steps is that of torchft's ``local_sgd.DiLoCo``.
    """
    warmup, period = check_schedule(warmup, period, NAME)
    chosen, delay, mix = check_fragments(fragments, period, delay, mix)
    options = Options(timeout=timeout).checked(NAME)
    optimizer = outer_optimizers.as_outer(outer, NAME)
    cutter, count = Cutter(chosen, group, NAME), chosen if isinstance(chosen, int) else len(chosen)
    table = Timetable(period, count, delay, warmup)
    plan = f"of {count}, period {period}, delay {delay}"

    def init(params: Any) -> StreamingState:
        with without_grad():
            if not takes_part(group):
                return StreamingState(0, None, None, None, None)
            forget(None, group)
            with failing_everywhere(group, options, others_wait=True):
                check_wire(wire, group, NAME)
                cutter.parts_of(described(params, where, ties=not has_tracers(params)))
            return StreamingState(0, *anchored(0, params))

    def anchored(step: Any, params: Any, weight: Any = None) -> tuple[Any, ...]:
        """Return the state of a run that begins here, but for its step."""
        now = replace(options, weight=weight, where=where, about=f"fragments {plan}")
        mean = synchronise(params, group, now, method=f"{NAME}, anchor", step=step)
        anchors = cutter.anchors_of(described(mean, where, ties=not has_tracers(mean)))
        sent = empty([local(flatten(anchor).leaves) for anchor in anchors]) if delay else {}
        return anchors, tuple([optimizer.init(anchor) for anchor in anchors]), sent, math.nan

    def travel(k: int, anchor: Any = None, ties: Mapping[int, int] | None = None) -> Travel:
        now = replace(options, wire=wire, about=f"fragment {k} {plan}")
        return Travel(NAME, cutter, group, now, delay, forms_of(local(flatten(anchor).leaves)), ties or {})

    def update(params: Any, state: StreamingState, *, weight: Any = None, donate: bool = False) -> Any:
        step = step_of(state)
        if not takes_part(group):
            return params, state._replace(step=step + 1)
        index, traced = table.at(step), has_tracers((params, state.sent, weight))

        def send(k: int) -> Callable[[Any], Any]:
            def run(everything: Any) -> Any:
                params, anchors, memories, sent, kept = everything
                request, part = described(params, where, ties=not traced), cut.parts[k]
                with failing_everywhere(group, options, others_wait=True):
                    changes = combine(lambda old, new: old - new, anchors[k], pieces_of(request, part))
                    sent = pack(local(flatten(changes).leaves), sent)
                    kept = kept if is_local(group) else kept_weight(weight, kept)
                way = travel(k, anchors[k], ties_of(request, part))
                if is_local(group):
                    now = replace(way.options, weight=weight)
                    sent = pack(synchronise(unpack(sent, way.forms), group, now, method=way.title, step=step), sent)
                else:
                    sent = way.begin(sent, kept, step, traced=traced)
                return params, anchors, memories, sent, kept

            return run

        def apply(k: int) -> Callable[[Any], Any]:
            def run(everything: Any) -> Any:
                params, anchors, memories, sent, kept = everything
                request, part = described(params, where, ties=not traced), cut.parts[k]
                ties = ties_of(request, part)
                with failing_everywhere(group, options, others_wait=True):
                    places_of(params, request, part, None, donate=donate and mix < 1)
                    own = pieces_of(request, part)
                way = travel(k, anchors[k], ties)
                if delay:
                    means = way.land(sent, kept, step, traced=traced)
                    mean = in_place_of(anchors[k], means)
                    sent, kept = pack([], sent), kept if is_local(group) else kept_weight(None, kept)
                else:
                    change = tied(combine(lambda old, new: old - new, anchors[k], own), ties)
                    now = replace(way.options, weight=weight, donate=donate or not ties)
                    mean = synchronise(change, group, now, method=way.title, step=step)
                    means = list(flatten(mean).leaves)
                ties = agreed_ties(ties, means)
                changed, memory = optimizer.step(mean, memories[k], anchors[k])
                anchors = cutter.same((*anchors[:k], changed, *anchors[k + 1 :]), cut)
                memories = (*memories[:k], memory, *memories[k + 1 :])
                if mix < 1:
                    values = flatten(combine(partial(mixed, mix), changed, own) if mix else changed).leaves
                    target = places_of(params, request, part, ties, donate=donate)
                    params = with_values(target, values, ties, [piece.place for piece in part])
                return params, anchors, memories, sent, kept

            return run

        def take_anchors(everything: Any) -> Any:
            return everything[0], *anchored(step, everything[0], weight)

        with without_grad():
            again = None
            if delay and not traced and not is_local(group):
                turn_to(cutter, group, int(step))
                again = table.under_way(int(step))
            if again and not travel(again[0]).lost(state.sent, state.weight, again[1]):
                again = None
            with failing_everywhere(group, options, others_wait=True if again else index):
                cut = cutter.cut(state.anchor, state.sent if delay else None, described(params, where))
            if again:
                k, sent_at = again
                way = travel(k, state.anchor[k], ties_of(described(params, where, ties=True), cut.parts[k]))
                way.begin(state.sent, state.weight, sent_at, traced=False)
            nothing: list[Callable[[Any], Any]] = [lambda everything: everything]
            sends = map(send, range(count)) if delay else nothing * count
            branches = [*nothing, *sends, *map(apply, range(count)), take_anchors]
            everything = choose(index, branches[: None if warmup else -1], (params, *state[1:]))
            return everything[0], StreamingState(step + 1, *everything[1:])

    return Averager(init, update)

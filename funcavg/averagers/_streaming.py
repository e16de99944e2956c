"""Streaming DiLoCo: fragments of the model, each synchronised at its own step, that travel while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funcavg import outer as outer_optimizers
from funcavg._schedule import check_schedule
from funcavg._transforms import do_in_order
from funcavg._trees import Options, Request, Timeout, Where, combine, flatten, is_dtensor, paths, wrap_local_tensor
from funcavg.averagers._base import (
    Averager,
    choose,
    described,
    failing_everywhere,
    is_local,
    layout_of,
    step_of,
    synchronise,
    takes_part,
    without_grad,
)
from funcavg.averagers._flights import begin, is_under_way, land
from funcavg.averagers._fragments import (
    Fragments,
    Piece,
    Size,
    check_fragments,
    cut_by_number,
    cut_by_paths,
    events,
)
from funcavg.averagers._outer_step import (
    check_same_tree,
    check_wire,
    has_tracers,
    with_values,
)
from funcavg.averagers._packing import Form, empty, forms_of, pack, unpack

if TYPE_CHECKING:
    from funcavg.wires import Wire

__all__ = ["StreamingState", "streaming_diloco"]

Path = tuple[Any, ...]
NAME = "streaming_diloco"


class StreamingState(NamedTuple):
    """The state of `streaming_diloco`. Where nothing is under way, it has the same bits on every rank."""

    step: Any  # updates so far; shape (), an integer
    anchor: Any  # a tree for each fragment: its last synchronised parameters, None for what is of other fragments
    outer: Any  # the outer optimizer's state of each fragment
    sent: Any  # this rank's changes of the fragment that is under way: flat vectors, by kind; none without delay
    weight: Any  # this rank's weight when it was sent


def streaming_diloco(  # noqa: PLR0913  # public: its options are keywords
    period: int,
    *,
    fragments: int | Sequence[Callable[[Path], Any]],
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
    ranks of a living group go back to is an error: they wait for the others, until the timeout.)

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
            every rank, at steps that communicate; at others, on this rank.

        ``init`` and ``update`` raise what `funcavg.average` raises: of what travels in the background, the update that
        applies it.

    Communication:
        ``init`` is collective, and so is the last step of a warm-up: both average all parameters, exactly. Then
        `funcavg.start_average` of each fragment's pseudo-gradient once a period. While one is under way, nothing else
        can be averaged over this group (RuntimeError says so): use a second group for that. Over groups whose work is
        done by who waits for it (those that are configured anew, an MPI communicator before its first average), and in
        programs of JAX over axes, nothing is in the background.

    Memory:
        The anchor and what ``outer`` keeps, in the parameters' dtypes; with a delay, a fragment's pseudo-gradient on
        the host, and its mean.

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
    check_wire(wire, group, NAME)
    optimizer = outer_optimizers.as_outer(outer)
    count = chosen if isinstance(chosen, int) else len(chosen)
    happens, in_background = events(period, count, delay), delay > 0 and not is_local(group)
    cutter = _Cutter(chosen)

    def init(params: Any) -> StreamingState:
        with without_grad():
            if not takes_part(group):
                return StreamingState(0, None, None, None, None)
            with failing_everywhere(group, options, others_wait=True):
                cutter.parts(described(params, where, ties=not has_tracers(params)))
            return StreamingState(0, *begun(anchors_at(0, params)))

    def anchors_at(step: Any, params: Any, weight: Any = None) -> tuple[Any, ...]:
        mean = synchronise(
            params, group, replace(options, weight=weight, where=where), method=f"{NAME}, anchor", step=step
        )
        request = described(mean, where, ties=not has_tracers(mean))
        return tuple(_of_its_own(_pieces(request, part)) for part in cutter.parts(request))

    def begun(anchors: tuple[Any, ...]) -> tuple[Any, ...]:
        leaves = [_local(flatten(anchor).leaves) for anchor in anchors]
        return anchors, tuple(map(optimizer.init, anchors)), empty(leaves) if delay else {}, np.nan

    def settings(k: int, weight: Any) -> Options:
        about = f"fragment {k} of {count}"
        return replace(options, weight=weight, wire=wire, about=about)

    def update(params: Any, state: StreamingState, *, weight: Any = None, donate: bool = False) -> Any:
        step = step_of(state)
        if not takes_part(group):
            return params, state._replace(step=step + 1)

        def send(k: int) -> Callable[[Any], Any]:
            def run(everything: Any) -> Any:
                params, anchors, memories, sent, kept = everything
                with failing_everywhere(group, options, others_wait=True):
                    request = described(params, where, ties=not has_tracers(params))
                    now = _pieces(request, cutter.parts(request)[k])
                    changes = _local(flatten(combine(lambda old, new: old - new, anchors[k], now)).leaves)
                    sent, forms = pack(changes, sent), forms_of(changes)
                kept = _kept(weight, kept)
                if is_local(group):
                    sent = pack(
                        synchronise(unpack(sent, forms), group, settings(k, weight), method=NAME, step=step), sent
                    )
                elif has_tracers((sent, kept)):
                    sent = _in_a_program(sent, kept, partial(_begin_there, forms, group, settings(k, None)))
                else:
                    begin(list(sent.values()), unpack(sent, forms), group, settings(k, weight))
                return params, anchors, memories, sent, kept

            return run

        def apply(k: int) -> Callable[[Any], Any]:
            def run(everything: Any) -> Any:
                params, anchors, memories, sent, kept = everything
                anchor = flatten(anchors[k])
                with failing_everywhere(group, options, others_wait=True):
                    request = described(params, where, ties=not has_tracers(params))
                    part = cutter.parts(request)[k]
                    now = _pieces(request, part)
                if not delay:
                    change = combine(lambda old, new: old - new, anchors[k], now)
                    mean = synchronise(change, group, replace(settings(k, weight), donate=True), method=NAME, step=step)
                else:
                    forms = forms_of(_local(anchor.leaves))
                    means = unpack(sent, forms)
                    if is_local(group):
                        pass  # they are
                    elif has_tracers((sent, kept)):
                        landed = _in_a_program(sent, kept, partial(_land_there, forms, group, settings(k, None)))
                        means = unpack(landed, forms)
                    else:
                        means = land(list(sent.values()), means, group, settings(k, _weight_of(kept)))
                    mean = anchor.rebuild([_as(leaf, value) for leaf, value in zip(anchor.leaves, means, strict=True)])
                changed, memory = optimizer.step(mean, memories[k], anchors[k])
                anchors = (*anchors[:k], changed, *anchors[k + 1 :])
                memories = (*memories[:k], memory, *memories[k + 1 :])
                if mix < 1:
                    values = flatten(changed).leaves
                    if mix:
                        values = [_mixed(mix, *pair) for pair in zip(values, flatten(now).leaves, strict=True)]
                    params = _written(params, request, part, values, donate=donate)
                return params, anchors, memories, sent, kept

            return run

        def take_anchors(everything: Any) -> Any:
            params = everything[0]
            return params, *begun(anchors_at(step, params, weight))

        with without_grad():
            index = _index(step, warmup, happens, 2 * count + 1)
            with failing_everywhere(group, options, others_wait=index):
                request = described(params, where, ties=not has_tracers(params))
                cutter.check(state.anchor, request)
            if in_background and not has_tracers((params, state.sent)):
                going_on(step, state)
            branches = [
                lambda everything: everything,
                *map(send, range(count)),
                *map(apply, range(count)),
                take_anchors,
            ]
            everything = choose(index, branches[: None if warmup else -1], (params, *state[1:]))
            return everything[0], StreamingState(step + 1, *everything[1:])

    def going_on(step: Any, state: StreamingState) -> None:
        """Begin again what was under way when a state was saved."""
        phase = (int(step) - warmup) % period
        for k in range(count if step >= warmup else 0):
            own = (k + 1) * period // count - 1
            if own - delay < phase < own and not is_under_way(list(state.sent.values()), group):
                pieces = unpack(state.sent, forms_of(_local(flatten(state.anchor[k]).leaves)))
                begin(list(state.sent.values()), pieces, group, settings(k, _weight_of(state.weight)))

    return Averager(init, update)


def _index(step: Any, warmup: int, happens: Sequence[int], anchors: int) -> Any:
    """Return what happens after a step, as `events` numbers it; ``anchors`` where they are taken."""
    if isinstance(step, int):
        return happens[(step - warmup) % len(happens)] if step >= warmup else anchors if step == warmup - 1 else 0
    import jax

    now = jax.numpy.asarray(happens)[(step - warmup) % len(happens)]
    return jax.numpy.where(step >= warmup, now, jax.numpy.where(step == warmup - 1, anchors, 0))


class _Cutter:
    """Cuts trees into fragments; remembers how, and which trees it has seen to be those of ``init``."""

    def __init__(self, fragments: Fragments) -> None:
        self._fragments = fragments
        self._known: dict[Any, list[list[Piece]]] = {}
        self._checked: set[Any] = set()

    def parts(self, request: Request) -> list[list[Piece]]:
        """Return the pieces of each fragment."""
        layout = layout_of(request)
        key = layout, tuple(request.ties.items())
        if key not in self._known:
            if len(self._known) >= 8:
                self._known.clear()
            names = {i: layout.name(i) for i in range(len(layout.averaged)) if i not in request.ties}
            if isinstance(self._fragments, int):
                self._known[key] = cut_by_number([*map(_size_of, request.leaves)], self._fragments, list(names))
            else:
                of_leaves = paths(request.flat.spec)
                averaged = [of_leaves[position] for position in layout.averaged]
                self._known[key] = cut_by_paths(averaged, self._fragments, names)
        return self._known[key]

    def check(self, anchors: Any, request: Request) -> None:
        """Raise ValueError if anchors are not those of a tree."""
        found = layout_of(described(anchors))
        key = found, layout_of(request), tuple(request.ties.items())
        if key not in self._checked:
            expected = tuple(_pieces(request, part) for part in self.parts(request))
            check_same_tree(found, layout_of(described(expected)), NAME)
            if len(self._checked) >= 8:
                self._checked.clear()
            self._checked.add(key)


def _size_of(leaf: Any) -> Size:
    shape = np.shape(leaf)
    nbytes = int(np.prod(shape, dtype=np.int64)) * getattr(getattr(leaf, "dtype", None), "itemsize", 8)
    rows = shape[0] if shape and not is_dtensor(leaf) else 1
    return Size(rows, nbytes // max(rows, 1))


def _pieces(request: Request, part: Sequence[Piece]) -> Any:
    """Return the tree with a fragment's rows in their places, and None elsewhere."""
    leaves, positions = request.leaves, layout_of(request).averaged
    values: list[Any] = [None] * len(request.flat.leaves)
    for piece in part:
        leaf = leaves[piece.leaf]
        values[positions[piece.leaf]] = piece.of(leaf.detach() if hasattr(leaf, "detach") else leaf)
    return request.flat.rebuild(values)


def _of_its_own(tree: Any) -> Any:
    """Return a tree of which no leaf is a part of a larger array, all of which would be kept, and saved, for it."""

    def owned(leaf: Any) -> Any:
        if hasattr(leaf, "_is_view"):
            return leaf.clone() if leaf._is_view() else leaf
        return leaf.copy() if isinstance(leaf, np.ndarray) and leaf.base is not None else leaf

    return combine(owned, tree)


def _local(leaves: Sequence[Any]) -> list[Any]:
    """Return leaves as they lie in this process."""
    return [leaf.to_local() if is_dtensor(leaf) else leaf for leaf in leaves]


def _as(leaf: Any, value: Any) -> Any:
    """Return a mean that has come back in the place of a leaf: of its kind, and where it is."""
    if is_dtensor(leaf):
        return wrap_local_tensor(leaf, value.to(leaf.device))
    if hasattr(value, "to") and hasattr(leaf, "device"):
        return value.to(leaf.device)
    return value if hasattr(leaf, "shape") and not isinstance(leaf, np.generic) else type(leaf)(value[()])


def _kept(weight: Any, before: Any) -> Any:
    """Return a weight as a state keeps it: NaN if there is none."""
    number = np.nan if weight is None else weight
    if has_tracers((number, before)):
        import jax

        return jax.numpy.asarray(number, before.dtype)
    return float(number)


def _weight_of(kept: Any) -> Any:
    """Return the weight that a state keeps."""
    return None if np.isnan(kept) else float(kept)


# In a program of JAX's, the two halves are two callbacks. They get arrays that are XLA's.


def _in_a_program(sent: dict[str, Any], weight: Any, do: Callable[[dict[str, Any], float], Any]) -> dict[str, Any]:
    """Let ``do(vectors, weight)`` be done when the program runs, and return the vectors that it returns."""
    kinds = list(sent)

    def there(vectors: Sequence[Any], number: float) -> list[Any]:
        return list(do(dict(zip(kinds, vectors, strict=True)), number).values())

    return dict(zip(kinds, do_in_order(there, list(sent.values()), weight, NAME), strict=True))


def _begin_there(forms: Sequence[Form], group: Any, options: Options, vectors: dict[str, Any], weight: float) -> Any:
    own = {kind: np.array(vector) for kind, vector in vectors.items()}
    begin(list(own.values()), unpack(own, forms), group, replace(options, weight=_weight_of(weight)))
    return own


def _land_there(forms: Sequence[Form], group: Any, options: Options, vectors: dict[str, Any], weight: float) -> Any:
    now = replace(options, weight=_weight_of(weight))
    means = land(list(vectors.values()), unpack(vectors, forms), group, now)
    results = {kind: np.zeros_like(vector) for kind, vector in vectors.items()}
    for place, mean in zip(unpack(results, forms), means, strict=True):
        place[...] = mean
    return results


def _mixed(mix: float, synchronised: Any, own: Any) -> Any:
    """Return ``(1 - mix) synchronised + mix own``, of 16 bits by way of float32: rounded once."""
    one, other = _wide(synchronised), _wide(own)
    mean = one + mix * (other - one) if mix <= 0.5 else other + (1 - mix) * (one - other)
    dtype = getattr(synchronised, "dtype", None)
    if dtype is None or mean.dtype == dtype:
        return mean
    return mean.to(dtype) if hasattr(mean, "to") else mean.astype(dtype)


def _wide(leaf: Any) -> Any:
    if getattr(getattr(leaf, "dtype", None), "itemsize", 8) > 2:
        return leaf
    return leaf.float() if hasattr(leaf, "float") else leaf.astype(np.float32)


def _written(params: Any, request: Request, part: Sequence[Piece], values: Sequence[Any], *, donate: bool) -> Any:
    """Return the tree with a fragment's new values, in memory of their own: donated, or new."""
    of_leaf = {piece.leaf: (value, piece.rows) for piece, value in zip(part, values, strict=True)}
    for tied_one, first in request.ties.items():
        if first in of_leaf:
            of_leaf[tied_one] = of_leaf[first]
    positions = layout_of(request).averaged
    chosen = sorted(of_leaf)
    only = frozenset(positions[i] for i in chosen)
    fragment = described(params, only=only, donate=donate, ties=not has_tracers(params))
    return with_values(fragment, [of_leaf[i][0] for i in chosen], fragment.ties, [of_leaf[i][1] for i in chosen])

"""Average under JAX's transformations, over a group of processes or threads: one primitive for a whole tree.

The mean is linear, so each rule is another average:

    jvp         the tangents' (weighted) mean
    transpose   the cotangents' plain mean, times N w_i / sum(w); and of that, the weighted mean again
    vmap        the mean of the batched leaves

It has an ordered effect: calls stay in program order, and none is dropped because its result is not used (the other
ranks wait for it). In a compiled program it is one callback, which calls no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from funcavg._engine import Handle, carry_out, move, reach_agreement, same_configuration, session_of
from funcavg._transforms.call import Call
from funcavg._transforms.jax_private import prepare_jax
from funcavg._trees import Flat, Options, Request, StandIn, failed_request, make_request
from funcavg.collectives import Collective

__all__ = ["average", "do_in_order", "is_traced", "start", "takes"]


def takes(call: Call) -> bool:
    """Take calls while JAX traces what is to be averaged, or the weight."""
    return call.concerns(is_traced, call.options.weight)


def start(call: Call) -> Handle[Any]:
    """Refuse: a program's results are there when it has run."""
    raise RuntimeError(f"{call.who}: not inside JAX's transformations; use average")


def is_traced(everything: Sequence[Any], weight: Any) -> bool:
    """Say whether JAX is tracing what is to be averaged."""
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    return any(issubclass(kind, jax.core.Tracer) for kind in {*map(type, everything), type(weight)})


def average(call: Call) -> Any:
    """Average a tree as an operation that JAX can transform and compile."""
    import jax

    collective, weight = call.collective, call.options.weight
    assert collective is not None
    later = is_traced((), weight)
    options = dataclasses.replace(call.options, weight=None if later else weight, donate=False)
    request = make_request(call.flat, options, wrapped=True)
    mistake = _mistake(request, weight if later else None)
    if mistake is not None:
        request = failed_request(mistake, options)
    if request.layout is None:
        with session_of(collective).entered(call.who):
            carry_out(request, collective)  # raises it on every rank
    assert request.layout is not None
    stand_ins = list(call.flat.leaves)
    for i, line in enumerate(request.layout.lines):
        if i in request.layout.averaged:
            stand_ins[i] = None  # to come; a call may be kept for long, and must keep no leaf
        elif line.rsplit(": ", 1)[1] != "not averaged":
            stand_ins[i] = StandIn(line.rsplit(": ", 1)[1])
    flat = call.flat._replace(leaves=tuple(stand_ins))
    options = dataclasses.replace(options, where=None)
    place = _Place(flat, request.only, options, tuple(request.layout.averaged), later, collective)
    leaves = [jax.numpy.asarray(leaf) for leaf in request.leaves]
    operand = jax.lax.stop_gradient(jax.numpy.asarray(weight if later else 0.0, float))
    return request.rebuild(_primitive().bind(*leaves, operand, call=place, adjoint=False, derived=False))


def _mistake(request: Request, weight: Any) -> TypeError | None:
    """Return what is wrong with leaves or with a traced weight, if anything is."""
    if request.layout is not None and any(type(leaf).__module__.startswith("torch") for leaf in request.leaves):
        return TypeError("torch tensors cannot be averaged inside JAX's transformations.")
    if weight is not None and (weight.ndim or weight.dtype.kind not in "iuf"):
        return TypeError(f"weight must be a number, at least 0, got {weight.dtype.name}{list(weight.shape)}.")
    return None


@dataclass(frozen=True, eq=False)
class _Place:
    """One place in a program where ranks average: a constant of the program, and of all its derivatives."""

    flat: Flat  # without the leaves that come in
    only: frozenset[int] | None
    options: Options
    positions: Sequence[int]  # of the leaves that come in
    weight_comes_in: bool
    collective: Collective
    over: dict[str, Any] = field(default_factory=dict)  # the configuration that it last ran "forward" over

    def run(
        self,
        leaves: Sequence[Any],
        weight: Any,
        *,
        adjoint: bool,
        derived: bool,
        out: Sequence[Any] | None = None,
    ) -> list[Any]:
        """Average NumPy arrays now, into ``out`` if given; ``weight`` counts where the program computes it.

        ``derived``: they are tangents or cotangents, and not what was averaged in the first place.
        """
        everything = list(self.flat.leaves)
        for i, leaf in zip(self.positions, leaves, strict=True):
            everything[i] = leaf
        options = self.options
        if self.weight_comes_in:
            options = dataclasses.replace(options, weight=float(weight))
        flat = self.flat._replace(leaves=everything)
        request = make_request(flat, options, only=self.only, wrapped=True)
        session = session_of(self.collective)
        with session.entered("average"):
            before = self.over.get("forward") if derived else None
            same_configuration(before, session)
            agreement = reach_agreement(request, self.collective)
            now = same_configuration(before, session)  # which ranks may just have found to be new
            if not derived:
                self.over["forward"] = now
            weights = agreement.weights
            if adjoint:
                agreement = agreement._replace(weights=None)
            means = move(request, agreement, self.collective, out)
            rank, size = self.collective.rank, self.collective.size
        if adjoint and weights is not None:
            top = max(weights)
            share = weights[rank] / top / sum(other / top for other in weights)
            for mean in means:
                mean[...] = mean * (size * share) if share else 0
        return means

    def refuse_derivatives(self) -> None:
        """Raise if there is a wire."""
        if self.options.wire is not None:
            raise ValueError(
                f"average: wire={self.options.wire!r} under derivatives: a code has none. Average what has been "
                f"differentiated, or without a wire, or jax.lax.stop_gradient of the tree."
            )

    def refuse_batches(self) -> None:
        """Do not: the mean is linear."""


@dataclass(frozen=True, eq=False)
class _Errand:
    """One place in a program where something is done in program order."""

    do: Callable[[Sequence[Any], float], Sequence[Any]]
    who: str

    def run(self, leaves: Sequence[Any], weight: Any, *, out: Sequence[Any] | None = None, **_: Any) -> Sequence[Any]:
        """Do it, with NumPy arrays."""
        results = self.do(leaves, float(weight))
        if out is not None:
            for target, result in zip(out, results, strict=True):
                np.copyto(target, result)
        return results

    def refuse_derivatives(self) -> None:
        """Raise."""
        raise ValueError(f"{self.who} has no derivative; differentiate the loss, and not the averager.")

    def refuse_batches(self) -> None:
        """Raise."""
        raise ValueError(f"{self.who}: over a group of processes, not under jax.vmap.")


def do_in_order(
    do: Callable[[Sequence[Any], float], Sequence[Any]], leaves: Sequence[Any], number: Any, who: str
) -> list[Any]:
    """Let ``do(arrays, number)`` be done when a traced program comes here, in program order.

    It must copy what it keeps of the arrays, and return as many of the same shapes and dtypes, which are the result.
    """
    import jax

    errand = _Errand(do, who)
    operand = jax.lax.stop_gradient(jax.numpy.asarray(number, float))
    results: list[Any] = _primitive().bind(*leaves, operand, call=errand, adjoint=False, derived=False)
    return results


@functools.cache
def _primitive() -> Any:
    import jax
    from jax.extend import core
    from jax.interpreters import ad as untyped
    from jax.interpreters import batching, mlir

    ad: Any = untyped
    effect, emit = prepare_jax()
    primitive: Any = core.Primitive("funcavg_average")
    primitive.multiple_results = True

    def implementation(*operands: Any, call: _Place | _Errand, **kind: Any) -> list[Any]:
        *leaves, weight = (np.asarray(operand) for operand in operands)
        return [jax.numpy.asarray(mean) for mean in call.run(leaves, weight, **kind)]

    def abstract(*avals: Any, **_: Any) -> Any:
        return list(avals[:-1]), {effect}

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        params["call"].refuse_derivatives()
        *rows, weight = primals
        means = primitive.bind(*rows, weight, **params)
        given = [ad.instantiate_zeros(tangent) for tangent in tangents[:-1]]
        return means, primitive.bind(*given, weight, **params | {"derived": True})

    def transpose(cotangents: Any, *operands: Any, call: _Place | _Errand, adjoint: bool, **_: Any) -> Any:
        call.refuse_derivatives()
        given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        means = primitive.bind(*given, operands[-1], call=call, adjoint=not adjoint, derived=True)
        linear = [ad.is_undefined_primal(operand) for operand in operands[:-1]]
        return [mean if it_is else None for mean, it_is in zip(means, linear, strict=True)] + [None]

    def batch(operands: Any, axes: Any, **params: Any) -> Any:
        params["call"].refuse_batches()
        if axes[-1] is not None:
            raise ValueError("average: a weight per element of jax.vmap is not supported; pass one weight per rank")
        # The batch goes first, so that ranks which batch along different dimensions send the same shapes.
        rows = [
            operand if axis is None else jax.numpy.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*rows, **params), [None if axis is None else 0 for axis in axes[:-1]]

    def lower(ctx: Any, *operands: Any, call: _Place | _Errand, **kind: Any) -> Any:
        def run(leaves: Sequence[Any], weight: Any, out: Sequence[Any] | None) -> Sequence[Any]:
            return call.run(leaves, weight, **kind, out=out)

        return emit(ctx, operands, run)

    primitive.def_impl(implementation)
    primitive.def_effectful_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower, cacheable=False)
    return primitive

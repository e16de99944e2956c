"""Average under JAX's transformations, over a group of processes or threads: one primitive for a whole tree.

The mean is linear, so each rule is another average:

    jvp         the tangents' (weighted) mean
    transpose   the cotangents' plain mean, times N w_i / sum(w); and of that, the weighted mean again
    vmap        the mean of the batched leaves

It has an ordered effect: calls stay in program order, and none is dropped because its result is not used (the other
ranks wait for it). In a compiled program it is a callback that reads the leaves where XLA has them; it calls no JAX.
"""

from __future__ import annotations

import functools
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from funcavg import _tree
from funcavg._arrays import StandIn
from funcavg._engine import carry_out, move, reach_agreement
from funcavg._request import Where, make_request
from funcavg._session import Session
from funcavg.collectives.base import Collective

__all__ = ["average_traced", "finish_what_is_traced", "is_traced"]

TESTED = "0.10"  # release of JAX


def is_traced(everything: Sequence[Any], weight: Any) -> bool:
    """Say whether JAX is tracing what is to be averaged."""
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    return any(issubclass(kind, jax.core.Tracer) for kind in {*map(type, everything), type(weight)})


def finish_what_is_traced() -> None:
    """Wait for averages inside compiled programs that are still running: a group does one thing at a time."""
    if _primitive.cache_info().currsize:
        sys.modules["jax"].effects_barrier()


def average_traced(
    everything: Sequence[Any],
    spec: _tree.Spec,
    collective: Collective,
    session: Session,
    weight: Any,
    where: Where | None,
    timeout: float,
) -> Any:
    """Average a flattened tree as an operation that JAX can transform and compile; rebuild it."""
    import jax

    later = is_traced((), weight)
    request = make_request(everything, spec, weight=None if later else weight, where=where, wrapped=True)
    if request.layout is None:
        with session.entered("average"):
            carry_out(request, collective, session, timeout)  # raises it on every rank
    assert request.layout is not None
    if any(type(leaf).__module__.partition(".")[0] == "torch" for leaf in request.leaves):
        raise TypeError("average: torch tensors cannot be averaged inside JAX's transformations")
    stand_ins = list(everything)
    for i, line in enumerate(request.layout.lines):
        if i not in request.layout.averaged and line.rsplit(": ", 1)[1] != "not averaged":
            stand_ins[i] = StandIn(line.rsplit(": ", 1)[1])
    call = _Call(
        tuple(stand_ins),
        spec,
        tuple(request.layout.averaged),
        request.only,
        None if later else weight,
        later,
        collective,
        session,
        timeout,
    )
    leaves = [jax.numpy.asarray(leaf) for leaf in request.leaves]
    operand = jax.lax.stop_gradient(jax.numpy.asarray(weight if later else 0.0, jax.numpy.float32))
    return request.rebuild(_primitive().bind(*leaves, operand, call=call, adjoint=False))


@dataclass(frozen=True, eq=False)
class _Call:
    """One place in a program where ranks average: a constant of the program, and of all its derivatives."""

    everything: Sequence[Any]  # leaves; at `positions` those that come in
    spec: _tree.Spec
    positions: Sequence[int]
    only: frozenset[int] | None
    weight: Any  # None: there is none, or it comes in
    weight_comes_in: bool
    collective: Collective
    session: Session
    timeout: float

    def run(self, leaves: Sequence[Any], weight: Any, *, adjoint: bool) -> list[Any]:
        """Average NumPy arrays now; ``weight`` counts where the program computes it."""
        everything = list(self.everything)
        for i, leaf in zip(self.positions, leaves, strict=True):
            everything[i] = leaf
        number = float(weight) if self.weight_comes_in else self.weight
        request = make_request(everything, self.spec, weight=number, only=self.only, wrapped=True)
        with self.session.entered("average"):
            agreement = reach_agreement(request, self.collective, self.session, self.timeout)
            weights = agreement.weights
            if not adjoint or weights is None:
                return move(request, agreement, self.collective, self.session, self.timeout)
            means = move(request, agreement._replace(weights=None), self.collective, self.session, self.timeout)
        top = max(weights)
        share = weights[self.collective.rank] / top / sum(other / top for other in weights)
        scale = self.collective.size * share
        return [(mean * scale).astype(mean.dtype) if scale else np.zeros_like(mean) for mean in means]


class _Private(NamedTuple):
    """What JAX keeps to itself."""

    emit_python_callback: Any
    effects: Any
    op_sharding: Any
    executable: Any  # the class of compiled programs


def _private() -> _Private:
    """Return the parts of JAX that a primitive with an ordered effect needs, and that are not public."""
    import jax

    try:
        from jax._src import callback, effects
        from jax._src.interpreters import pxla

        executable = pxla.ExecuteReplicated
        return _Private(callback.emit_python_callback, effects, callback._callback_op_sharding, executable)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"average: inside jax.jit and jax.grad over a group of processes, funcavg is tested with JAX {TESTED}, and "
            f"finds its way in {jax.__version__} no more ({error}). Average outside of them, or install that release."
        ) from error


@functools.cache
def _primitive() -> Any:
    import jax
    from jax.extend import core
    from jax.interpreters import ad as untyped
    from jax.interpreters import batching, mlir

    ad: Any = untyped
    private = _private()

    class Averages(private.effects.Effect):  # type: ignore[misc, name-defined]
        def __str__(self) -> str:
            return "Averages"

    effect = Averages()
    for allowed in (
        "lowerable_effects",
        "ordered_effects",
        "shardable_ordered_effects",
        "control_flow_allowed_effects",
        "custom_derivatives_allowed_effects",
        "remat_allowed_effects",
    ):
        getattr(private.effects, allowed).add_type(Averages)

    failures: deque[Exception] = deque(maxlen=64)
    primitive: Any = core.Primitive("funcavg_average")
    primitive.multiple_results = True

    def implementation(*operands: Any, call: _Call, adjoint: bool) -> list[Any]:
        *leaves, weight = (np.asarray(operand) for operand in operands)
        return [jax.numpy.asarray(mean) for mean in call.run(leaves, weight, adjoint=adjoint)]

    def abstract(*avals: Any, **_: Any) -> Any:
        return list(avals[:-1]), {effect}

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        *rows, weight = primals
        means = primitive.bind(*rows, weight, **params)
        given = [ad.instantiate_zeros(tangent) for tangent in tangents[:-1]]
        return means, primitive.bind(*given, weight, **params)

    def transpose(cotangents: Any, *operands: Any, call: _Call, adjoint: bool) -> Any:
        given = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
        means = primitive.bind(*given, operands[-1], call=call, adjoint=not adjoint)
        linear = [ad.is_undefined_primal(operand) for operand in operands[:-1]]
        return [mean if it_is else None for mean, it_is in zip(means, linear, strict=True)] + [None]

    def batch(operands: Any, axes: Any, **params: Any) -> Any:
        if axes[-1] is not None:
            raise ValueError("average: a weight per element of jax.vmap is not supported; pass one weight per rank")
        # The batch goes first, so that ranks which batch along different dimensions send the same shapes.
        rows = [
            operand if axis is None else jax.numpy.moveaxis(operand, axis, 0)
            for operand, axis in zip(operands, axes, strict=True)
        ]
        return primitive.bind(*rows, **params), [None if axis is None else 0 for axis in axes[:-1]]

    def lower(ctx: Any, *operands: Any, call: _Call, adjoint: bool) -> Any:
        context = ctx.module_context.axis_context
        if getattr(context, "manual_axes", None) or type(context).__name__ == "ReplicaAxisContext":
            raise ValueError(
                "average: a group of processes inside jax.shard_map or jax.pmap, where every device would call it. "
                "Pass the axis name there, and average over the group outside."
            )

        def callback(*arrays: Any) -> tuple[Any, ...]:
            *leaves, weight = arrays
            try:
                return tuple(call.run(leaves, weight, adjoint=adjoint))
            except Exception as failure:
                failures.append(failure)
                raise

        results, token, _ = private.emit_python_callback(
            ctx,
            callback,
            ctx.tokens_in.get(effect),
            list(operands),
            ctx.avals_in,
            ctx.avals_out,
            has_side_effect=True,
            returns_token=True,
            sharding=private.op_sharding(context, None, ctx.avals_out),
        )
        ctx.set_tokens_out(ctx.tokens_in.update_tokens(mlir.TokenSet({effect: token})))
        return results

    run = private.executable.__call__

    @functools.wraps(run)
    def run_and_say_what_failed(self: Any, *args: Any) -> Any:
        try:
            return run(self, *args)
        except jax.errors.JaxRuntimeError as error:  # all that JAX makes of an exception in a callback
            for failure in list(failures):
                if str(failure) and str(failure) in str(error):
                    failures.remove(failure)
                    raise failure from None
            raise

    private.executable.__call__ = run_and_say_what_failed
    primitive.def_impl(implementation)
    primitive.def_effectful_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, lower, cacheable=False)
    return primitive

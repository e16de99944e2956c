"""How a compiled program of JAX's calls an average: all that needs parts of JAX which are not public.

In a program for one device which is the host, the callback gets XLA's own buffers: leaves are read, and means written,
where XLA has them. Elsewhere it gets and returns arrays on the host, of which XLA makes copies (and for a large model
takes half as long again). XLA's partitioner knows of no other kind, so neither can programs for several devices.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["prepare_jax"]

TESTED = "0.10.2 to 0.12"  # releases of JAX
IN_PLACE = "xla_buffer_python_cpu_callback"

Run = Callable[[Sequence[Any], Any, Any], Sequence[Any]]  # (leaves, weight, out) -> means, in `out` unless that is None


class _Private(NamedTuple):
    """What JAX keeps to itself."""

    effects: Any
    executable: Any  # the class of compiled programs
    build_call: Any
    emit_python_callback: Any
    on_one_device: Any
    abstract_token: Any
    token_set: Any
    tokens: Any  # what runs in program order waits for
    not_a_number: Any  # what jax_debug_nans and jax_debug_infs raise first


def _private() -> _Private:
    """Return the parts of JAX that a primitive with an ordered effect needs, and that are not public."""
    import jax

    try:
        from jax._src import api_util, callback, core, dispatch, effects, ffi
        from jax._src.interpreters import mlir, pxla

        return _Private(
            effects,
            pxla.ExecuteReplicated,
            ffi.build_ffi_lowering_function,
            callback.emit_python_callback,
            callback._callback_op_sharding,
            core.abstract_token,
            mlir.TokenSet,
            dispatch.runtime_tokens,
            api_util.InternalFloatingPointError,
        )
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"average: inside jax.jit and jax.grad over a group of processes, funcavg is tested with JAX {TESTED}, and "
            f"finds its way in {jax.__version__} no more ({error}). Average outside of them, or install one of these "
            f"releases."
        ) from error


@functools.cache
def prepare_jax() -> tuple[Any, Callable[[Any, Sequence[Any], Run], Sequence[Any]]]:
    """Make an ordered effect known to JAX; return it, and a function ``emit(ctx, operands, run)`` for lowering rules.

    ``operands`` are leaves and a weight. When the program runs, ``run`` is called in its place, in program order, and
    what it raises is what the caller of the program sees.
    """
    import jax

    private = _private()

    class Averages(private.effects.Effect):  # type: ignore[misc, name-defined]  # found at run time only
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
    keeping_failures = _run_programs_at_once(private, Averages)

    def emit(ctx: Any, operands: Sequence[Any], run: Run) -> Sequence[Any]:
        context, token = ctx.module_context.axis_context, ctx.tokens_in.get(effect)
        if getattr(context, "manual_axes", None) or type(context).__name__ == "ReplicaAxisContext":
            raise ValueError(
                "average: a group of processes inside jax.shard_map or jax.pmap, where every device would call it. "
                "Pass the axis name there, and average over the group outside."
            )
        if context.num_devices > 1 and jax.process_count() > 1:
            # XLA would call from one of the devices, and whose they are is not known yet.
            raise ValueError(
                f"average: a group of processes in a program for {context.num_devices} devices, where jax.distributed "
                f"runs {jax.process_count()} processes: of these only one might call it. Average by an axis name "
                f"inside jax.shard_map instead."
            )
        on_host = tuple(ctx.module_context.platforms) == ("cpu",) and context.num_devices == 1
        if on_host and not any(aval.dtype.name.startswith("float4") for aval in ctx.avals_in):  # two in a byte
            token, *results = _call_in_place(ctx, token, operands, keeping_failures(run), private)
        else:
            results, token, _ = private.emit_python_callback(
                ctx,
                lambda *arrays: keeping_failures(run)(arrays[:-1], arrays[-1], None),
                token,
                list(operands),
                ctx.avals_in,
                ctx.avals_out,
                has_side_effect=True,
                returns_token=True,
                sharding=private.on_one_device(context, None, ctx.avals_out),
            )
        ctx.set_tokens_out(ctx.tokens_in.update_tokens(private.token_set({effect: token})))
        return results

    return effect, emit


def _call_in_place(ctx: Any, token: Any, operands: Sequence[Any], run: Run, private: _Private) -> Sequence[Any]:
    """Emit a call whose results are written where XLA wants them; return what stands for the token and for these."""
    count = len(operands)

    def callback(_: Any, *buffers: Any) -> tuple[()]:  # token, operands, token, results
        arrays = [np.asarray(buffer) for i, buffer in enumerate(buffers) if i % (count + 1)]
        run(arrays[: count - 1], arrays[count - 1], arrays[count:])
        return ()

    module = ctx.module_context
    module.add_host_callback(callback)
    with_token = dataclasses.replace(
        ctx,
        avals_in=[private.abstract_token, *ctx.avals_in],
        avals_out=[private.abstract_token, *ctx.avals_out],
    )
    build = private.build_call(IN_PLACE, has_side_effect=True)
    call = build(with_token, token, *operands, index=np.uint64(len(module.host_callbacks) - 1))
    results: Sequence[Any] = call.results
    return results


def _run_programs_at_once(private: _Private, effect: type) -> Callable[[Run], Run]:
    """Let programs that average run when called, in the caller's thread, and raise what their callbacks raised.

    JAX may leave a program whose inputs are still being computed to a thread of XLA's. There are as many as cores, and
    ranks that are threads would block them; MPI may not like to be called from them; the caller's next average could
    overtake this one; and an error would be JAX's, come later, and come again. So inputs are waited for first, and
    results after. (JAX makes a JaxRuntimeError of every exception in a callback, whose text holds the exception's own.)
    """
    jax: Any = sys.modules["jax"]
    failures: deque[tuple[int, BaseException]] = deque(maxlen=64)  # and the threads that callbacks ran in
    execute = private.executable.__call__

    @functools.wraps(execute)
    def execute_at_once(self: Any, *args: Any) -> Any:
        if not any(isinstance(effect_of_it, effect) for effect_of_it in self.ordered_effects):
            return execute(self, *args)
        jax.block_until_ready(args)
        here = threading.get_ident()
        for earlier in [failure for failure in failures if failure[0] == here]:
            failures.remove(earlier)
        try:
            return jax.block_until_ready(execute(self, *args))
        except private.not_a_number as error:
            # JAX would run the program again, op by op, to find out where; the ranks would average twice.
            private.tokens.clear()
            raise FloatingPointError(
                f"{error.ty} in a result of a compiled program that averages over a group of processes. It is not run "
                f"again op by op, to find out where, since the other ranks would not come a second time. Look for it "
                f"with jax.experimental.checkify, or average outside of jit."
            ) from None
        except jax.errors.JaxRuntimeError as error:
            private.tokens.clear()  # else whatever comes next would fail with this error
            for thread, failure in reversed(failures):
                # In programs for several devices callbacks run in other threads.
                if thread == here or f"{type(failure).__name__}: {failure}" in str(error):
                    failures.remove((thread, failure))
                    raise failure.with_traceback(None) from failure.__cause__
            raise

    private.executable.__call__ = execute_at_once

    def keeping_failures(run: Run) -> Run:
        def call(leaves: Sequence[Any], weight: Any, out: Any) -> Sequence[Any]:
            try:
                return run(leaves, weight, out)
            except BaseException as failure:
                _forget_frames(failure)
                failures.append((threading.get_ident(), failure))
                raise

        return call

    return keeping_failures


def _forget_frames(error: BaseException | None) -> None:
    """Drop tracebacks: their frames hold arrays in XLA's memory, which is freed while an error may be kept."""
    while error is not None:
        error.__traceback__ = None
        _forget_frames(error.__cause__)
        error = error.__context__

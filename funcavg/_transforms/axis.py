"""Average over an axis name: inside `jax.shard_map`, `jax.pmap` and `jax.vmap(axis_name=...)`.

The ranks are the devices (or batch elements) along the axis, and JAX's own collectives do the work. They run one
program, so there is nothing to agree about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from funcavg._engine import Handle, reach_agreement
from funcavg._transforms.call import Call
from funcavg._trees import Request, make_request
from funcavg.collectives.solo import Solo

__all__ = ["average", "broadcast", "is_axis", "start", "takes"]


def is_axis(group: Any) -> bool:
    """Say whether a group is an axis name, or a tuple of them."""
    return isinstance(group, str) or (
        isinstance(group, tuple) and bool(group) and all(isinstance(name, str) for name in group)
    )


def takes(call: Call) -> bool:
    """Take calls over axis names."""
    return is_axis(call.group)


def start(call: Call) -> Handle[Any]:
    """Refuse: in a compiled program XLA decides what goes on when."""
    raise RuntimeError(f"{call.who}: group={call.group!r} is an axis name; under JAX transformations use average")


def average(call: Call) -> Any:
    """Return the mean over an axis. Sums are in float32, in float64 for float64 leaves."""
    axis, weight = call.group, call.options.weight
    call.refuse_wire(
        f"over the axis {axis!r}: XLA moves these numbers, as they are. Leave wire out, or average over a group of "
        f"processes."
    )
    size = _size(call)
    import jax

    traced = isinstance(weight, jax.Array)
    if traced and (weight.ndim or weight.dtype.kind not in "iuf"):
        raise TypeError(f"average: weight must be a number, at least 0, got {weight.dtype.name}{list(weight.shape)}")
    options = replace(call.options, weight=None if traced else weight, donate=False)
    request = make_request(call.flat, options, wrapped=True)
    reach_agreement(request, Solo())  # raises this rank's own mistakes
    if not traced and weight is not None:  # the same number on all ranks, which run one program
        if not float(weight):
            raise ValueError("average: the weights of all ranks are 0")
        weight = None
    return _with_arrays_replaced(request, lambda leaves: _means(leaves, axis, size, weight))


def broadcast(call: Call) -> Any:
    """Return the tree of the rank ``root`` of an axis: bits are summed, of which all ranks but one have none."""
    axis, root, size = call.group, call.options.root, _size(call)
    import jax

    if not isinstance(root, int) or not 0 <= root < size:
        raise ValueError(f"{call.who}: root must be a rank of the axis, 0 to {size - 1}, got {root!r}")
    request = make_request(call.flat, replace(call.options, donate=False), wrapped=True)
    reach_agreement(request, Solo())

    lax: Any = jax.lax  # parts of it have no types

    def of_root(leaves: Sequence[Any]) -> list[Any]:
        here = lax.axis_index(axis) == root
        bits = jax.tree_util.tree_map(lambda word: word * here.astype(word.dtype), [_to_bits(leaf) for leaf in leaves])
        return [_like(_from_bits(words, leaf), leaf) for words, leaf in zip(lax.psum(bits, axis), leaves, strict=True)]

    return _with_arrays_replaced(request, of_root)


def _to_bits(leaf: Any) -> Any:
    """Return integers that can be summed and hold what a leaf is made of."""
    import jax

    jnp: Any = jax.numpy
    bitcast = jax.lax.bitcast_convert_type
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    if leaf.dtype.kind == "c":
        return [_to_bits(leaf.real), _to_bits(leaf.imag)]
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer):
        return leaf.astype(jnp.int8) if leaf.dtype == bool or jnp.iinfo(leaf.dtype).bits < 8 else leaf
    width = jnp.finfo(leaf.dtype).bits
    return bitcast(leaf, f"uint{width}") if width >= 8 else bitcast(leaf.astype(jnp.float32), "uint32")


def _from_bits(words: Any, leaf: Any) -> Any:
    import jax

    jnp: Any = jax.numpy
    bitcast = jax.lax.bitcast_convert_type
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    if leaf.dtype.kind == "c":
        return jax.lax.complex(
            *[_from_bits(word, part) for word, part in zip(words, (leaf.real, leaf.imag), strict=True)]
        )
    if leaf.dtype == bool or jnp.issubdtype(leaf.dtype, jnp.integer):
        return words.astype(leaf.dtype)
    whole = bitcast(words, leaf.dtype if jnp.finfo(leaf.dtype).bits >= 8 else "float32")
    return whole.astype(leaf.dtype)


def _with_arrays_replaced(request: Request, replace_all: Callable[[Sequence[Any]], Sequence[Any]]) -> Any:
    """Return the tree with its arrays replaced. Numbers are the same on all ranks, which run one program.

    So are NumPy's arrays, which JAX would make narrower: where bits count, they stay what they are.
    """
    leaves = list(request.leaves)
    same = (int, float, complex, np.ndarray, np.generic) if request.options.exactly else (int, float, complex)
    moving = [i for i, leaf in enumerate(leaves) if not isinstance(leaf, same)]
    for i, result in zip(moving, replace_all([_as_jax(leaves[i]) for i in moving]), strict=True):
        leaves[i] = result
    return request.rebuild(leaves)


def _size(call: Call) -> int:
    axis, who = call.group, call.who
    jax: Any = sys.modules.get("jax")
    try:
        if jax is None:
            raise NameError("JAX has not been imported")
        return int(jax.lax.axis_size(axis))
    except NameError as error:
        raise ValueError(
            f"{who}: group={axis!r} is an axis name, but no such axis is bound here ({error}). Call {who} inside "
            f"jax.shard_map, jax.pmap or jax.vmap(..., axis_name={axis!r})."
        ) from error


def _as_jax(leaf: Any) -> Any:
    import jax

    if type(leaf).__module__.partition(".")[0] == "torch":
        raise TypeError("average: a torch tensor cannot be averaged over an axis of JAX's")
    return jax.numpy.asarray(leaf)


def _means(leaves: Sequence[Any], axis: Any, size: int, weight: Any) -> list[Any]:
    import jax

    lax: Any = jax.lax  # parts of it have no types
    jnp = jax.numpy
    wide = [leaf.astype(jnp.float32) if leaf.dtype.itemsize < 4 else leaf for leaf in leaves]
    if weight is None:
        means = [total / size for total in lax.psum(wide, axis)]
    else:
        number = jnp.asarray(weight, float)
        top = lax.pmax(lax.stop_gradient(number), axis)  # scaled by it, neither sums nor products can overflow
        scale = number / top
        # Of a rank that does not count nothing is read, NaN included. (0 * nan is nan, in derivatives as well.)
        read = [jnp.where(number == 0, jnp.zeros_like(leaf), leaf) for leaf in wide]
        totals = lax.psum([leaf * scale.astype(leaf.dtype) for leaf in read], axis)
        norm = lax.psum(scale, axis)
        means = [total / norm.astype(total.dtype) for total in totals]
    return [_like(mean.astype(leaf.dtype), leaf) for mean, leaf in zip(means, leaves, strict=True)]


def _like(mean: Any, leaf: Any) -> Any:
    """Let a mean vary over the axes that its leaf varies over, for the types of `cond`, `scan` and of derivatives."""
    import jax

    missing = _varying(leaf) - _varying(mean)
    lax: Any = jax.lax
    return lax.pcast(mean, tuple(missing), to="varying") if missing else mean


def _varying(value: Any) -> frozenset[str]:
    import jax

    kind = jax.typeof(value)
    kind = getattr(kind, "manual_axis_type", kind)
    varying: frozenset[str] = getattr(kind, "varying", None) or getattr(kind, "vma", None) or frozenset()
    return varying

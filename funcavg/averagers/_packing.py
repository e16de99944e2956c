"""A fragment's changes in a flat vector for each kind of array, of one length at every step, as `scan` needs it.

They lie where the leaves do: on an accelerator, packing only queues copies. To be sent they are copied to the host:
torch's in the background, JAX's at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._trees import is_jax

__all__ = ["Form", "empty", "forms_of", "is_sharded", "lengths_of", "pack", "unpack"]

Lengths = dict[str, int]  # elements of the largest fragment, by kind


class Form(NamedTuple):
    """What is known of a leaf without its values."""

    kind: str
    shape: tuple[int, ...]


def kind_of(leaf: Any) -> str:
    """Return what leaves have in common that share a vector: their dtype, and whether they are torch's."""
    if type(leaf).__module__.partition(".")[0] == "torch":
        return str(leaf.dtype).replace(".", " ")
    return str(leaf.dtype if is_jax(leaf) else np.asarray(leaf).dtype)


def _kinds(leaves: Sequence[Any]) -> dict[str, str]:
    """Return, for the kind of each leaf, that of its vector: beside arrays of JAX's, what a program makes of it."""
    if not any(map(is_jax, leaves)):
        return {kind_of(leaf): kind_of(leaf) for leaf in leaves}
    canonical = sys.modules["jax"].dtypes.canonicalize_dtype
    return {
        kind_of(leaf): str(canonical(np.asarray(leaf).dtype if not is_jax(leaf) else leaf.dtype)) for leaf in leaves
    }


def lengths_of(fragments: Sequence[Sequence[Any]]) -> Lengths:
    """Return how long each kind's vector is: as long as the fragment with the most of it."""
    kinds = _kinds([leaf for leaves in fragments for leaf in leaves])
    lengths: Lengths = dict.fromkeys(sorted(set(kinds.values())), 0)
    for leaves in fragments:
        own = dict.fromkeys(lengths, 0)
        for leaf in leaves:
            own[kinds[kind_of(leaf)]] += math.prod(np.shape(leaf))
        lengths = {kind: max(length, own[kind]) for kind, length in lengths.items()}
    return lengths


def empty(fragments: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return vectors of zeros for the largest of some fragments: JAX's, if there is an array of JAX's among them."""
    everything = [leaf for leaves in fragments for leaf in leaves]
    kinds, one = _kinds(everything), next(filter(is_jax, everything), None)
    likes = {kinds[kind_of(leaf)]: leaf for leaf in everything}
    likes |= {kinds[kind_of(leaf)]: leaf for leaf in everything if is_jax(leaf)}
    return {kind: _zeros(kind, likes[kind], one, length) for kind, length in lengths_of(fragments).items()}


def _zeros(kind: str, like: Any, one_of_jax: Any, length: int) -> Any:
    if kind.startswith("torch"):
        return like.new_zeros(length)
    if one_of_jax is None:
        return np.zeros(length, np.asarray(like).dtype)
    return _concatenated(like if is_jax(like) else sys.modules["jax"].numpy.zeros(0, kind), (), length)


def _concatenated(like: Any, leaves: Sequence[Any], length: int) -> Any:
    """Return leaves in a vector, and zeros behind; in shard_map it varies over axes as ``like`` does."""
    numpy = sys.modules["jax"].numpy
    rest = numpy.zeros(length - sum(math.prod(np.shape(leaf)) for leaf in leaves), like.dtype)
    own = [_in_one_part(numpy.asarray(leaf, like.dtype)).ravel() for leaf in leaves]
    return numpy.concatenate([_in_one_part(like).ravel()[:0], *own, rest])


def _in_one_part(leaf: Any) -> Any:
    """Return an array whose type says that it is sharded, of which reshapes are refused, as one that is not."""
    import jax
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    if AxisType.Explicit not in jax.typeof(leaf).sharding.mesh.axis_types:
        return leaf
    if isinstance(leaf, jax.core.Tracer) or not jax.sharding.get_abstract_mesh().empty:
        return jax.sharding.reshard(leaf, PartitionSpec())
    mesh = leaf.sharding.mesh
    untyped = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return jax.device_put(leaf, NamedSharding(untyped, PartitionSpec()))


def is_sharded(leaf: Any, axis: int) -> bool:
    """Say whether the type of one of JAX's arrays says that it is sharded along an axis, so that it cannot be cut."""
    if not is_jax(leaf):
        return False
    import jax

    sharding = jax.typeof(leaf).sharding
    kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
    along = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = along if isinstance(along, tuple) else () if along is None else (along,)
    return any(kinds.get(name) is jax.sharding.AxisType.Explicit for name in names)


def pack(leaves: Sequence[Any], vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Return new vectors, as long as these, that hold the leaves, and zeros behind."""
    packed = {}
    kinds = [_kind_in(vectors, kind_of(leaf)) for leaf in leaves]
    for kind, vector in vectors.items():
        own = [leaf for leaf, of in zip(leaves, kinds, strict=True) if of == kind]
        if is_jax(vector):
            packed[kind] = _concatenated(vector, own, len(vector))
            continue
        is_torch = kind.startswith("torch")
        packed[kind] = vector.new_zeros(len(vector)) if is_torch else np.zeros(len(vector), vector.dtype)
        begin = 0
        for leaf in own:
            end = begin + math.prod(np.shape(leaf))
            packed[kind][begin:end].reshape(np.shape(leaf))[...] = leaf
            begin = end
    return packed


def _kind_in(vectors: Mapping[str, Any], kind: str) -> str:
    """Return which vector holds leaves of a kind."""
    if kind in vectors:
        return kind
    return str(sys.modules["jax"].dtypes.canonicalize_dtype(np.dtype(kind)))


def forms_of(leaves: Sequence[Any]) -> list[Form]:
    """Return the kind and the shape of each leaf."""
    return [Form(kind_of(leaf), np.shape(leaf)) for leaf in leaves]


def unpack(vectors: Mapping[str, Any], forms: Sequence[Form]) -> list[Any]:
    """Return the leaves that lie in vectors, as views."""
    begins = dict.fromkeys(vectors, 0)
    leaves = []
    for form in forms:
        kind = _kind_in(vectors, form.kind)
        begin = begins[kind]
        begins[kind] += math.prod(form.shape)
        leaves.append(vectors[kind][begin : begins[kind]].reshape(form.shape))
    return leaves

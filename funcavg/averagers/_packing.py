"""A fragment's changes in a flat vector for each kind of array, of one length at every step, as `scan` needs it.

They lie where the leaves do: on an accelerator, packing only queues copies. To be sent they are copied to the host:
torch's in the background, JAX's at once.

What programs of JAX's make one dtype (float32 of float64, unless x64 is on) shares a vector everywhere, so that leaves
lie in the same places before and in a program: of the widest among them, or, beside arrays of JAX's, of what becomes of
it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._trees import is_jax

__all__ = ["Form", "can_hold", "empty", "forms_of", "is_sharded", "lengths_of", "pack", "unpack"]

Lengths = dict[str, int]  # elements of the largest fragment, by kind
NARROWED = {"float64": "float32", "complex128": "complex64"}  # in programs of JAX's, unless x64 is on


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
    """Return, for the kind of each leaf, that of its vector."""
    beside_jax = any(map(is_jax, leaves))
    kinds = {kind: _in_a_program(kind) if beside_jax else kind for kind in map(kind_of, leaves)}
    wide = {NARROWED[kind]: kind for kind in kinds.values() if kind in NARROWED}
    return {kind: wide.get(its, its) for kind, its in kinds.items()}


def _in_a_program(kind: str) -> str:
    """Return the kind that JAX has for one of NumPy's."""
    if kind.startswith("torch"):
        return kind
    return str(sys.modules["jax"].dtypes.canonicalize_dtype(np.dtype(kind)))


def _alike(kind: str) -> str:
    """Return what kinds that share a vector have in common."""
    return NARROWED.get(kind, kind)


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
    return {kind: _zeros(kind, everything, length) for kind, length in lengths_of(fragments).items()}


def _zeros(kind: str, leaves: Sequence[Any], length: int) -> Any:
    likes = [leaf for leaf in leaves if kind_of(leaf) == kind]
    if kind.startswith("torch"):
        return likes[0].new_zeros(length)
    if not any(map(is_jax, leaves)):
        return np.zeros(length, np.asarray(likes[0]).dtype)
    like = next(filter(is_jax, likes), None)
    return _concatenated(sys.modules["jax"].numpy.zeros(0, kind) if like is None else like, (), length)


def _concatenated(like: Any, leaves: Sequence[Any], length: int) -> Any:
    """Return leaves in a vector, and zeros behind; in shard_map it varies over axes as ``like`` does."""
    numpy = sys.modules["jax"].numpy
    rest = numpy.zeros(length - sum(math.prod(np.shape(leaf)) for leaf in leaves), like.dtype)
    own = [_in_one_part(numpy.asarray(leaf, like.dtype)).ravel() for leaf in leaves]
    return numpy.concatenate([_in_one_part(like).ravel()[:0], *own, rest])


def _in_one_part(leaf: Any) -> Any:
    """Return an array whose type says that it is sharded, of which reshapes are refused, as one that is not."""
    import jax

    sharding: Any = jax.sharding
    whole, kinds = sharding.PartitionSpec(), sharding.AxisType
    if kinds.Explicit not in jax.typeof(leaf).sharding.mesh.axis_types:
        return leaf
    if isinstance(leaf, jax.core.Tracer) or not sharding.get_abstract_mesh().empty:
        return sharding.reshard(leaf, whole)
    mesh = leaf.sharding.mesh
    untyped = sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=(kinds.Auto,) * len(mesh.axis_names))
    return jax.device_put(leaf, sharding.NamedSharding(untyped, whole))


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
    names = [_vector_of(kind_of(leaf), vectors) for leaf in leaves]
    return {
        name: _packed([leaf for leaf, its in zip(leaves, names, strict=True) if its == name], vector)
        for name, vector in vectors.items()
    }


def _packed(leaves: Sequence[Any], like: Any) -> Any:
    if is_jax(like):
        return _concatenated(like, leaves, len(like))
    vector = like.new_zeros(len(like)) if hasattr(like, "new_zeros") else np.zeros(len(like), like.dtype)
    begin = 0
    for leaf in leaves:
        end = begin + math.prod(np.shape(leaf))
        vector[begin:end].reshape(np.shape(leaf))[...] = leaf
        begin = end
    return vector


def _vector_of(kind: str, vectors: Mapping[str, Any]) -> str:
    """Return which of the vectors holds leaves of a kind, whatever a program has made of either."""
    return next(name for name in vectors if _alike(name) == _alike(kind))


def can_hold(vectors: Mapping[str, Any], lengths: Lengths) -> bool:
    """Say whether vectors are those of `empty` for fragments of these lengths, or what a program has made of them."""
    found = {_alike(name): len(vector) for name, vector in vectors.items()}
    return found == {_alike(kind): length for kind, length in lengths.items()}


def forms_of(leaves: Sequence[Any]) -> list[Form]:
    """Return the kind and the shape of each leaf."""
    return [Form(kind_of(leaf), np.shape(leaf)) for leaf in leaves]


def unpack(vectors: Mapping[str, Any], forms: Sequence[Form]) -> list[Any]:
    """Return the leaves that lie in vectors: as views, but those that are narrower than what they lie in."""
    begins = dict.fromkeys(vectors, 0)
    leaves = []
    for form in forms:
        name = _vector_of(form.kind, vectors)
        begin = begins[name]
        begins[name] += math.prod(form.shape)
        leaf = vectors[name][begin : begins[name]].reshape(form.shape)
        is_narrower = NARROWED.get(str(leaf.dtype)) == form.kind
        leaves.append(leaf.astype(form.kind) if is_narrower else leaf)
    return leaves

"""A fragment's changes in a flat vector for each kind of array, of one length at every step, as `scan` needs it.

torch's lie on the host, where they can travel while an accelerator computes; JAX's are copied there to be sent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._trees import is_jax

__all__ = ["Form", "empty", "forms_of", "lengths_of", "pack", "unpack"]

Lengths = dict[str, int]  # elements of the largest fragment, by kind


class Form(NamedTuple):
    """What is known of a leaf without its values."""

    kind: str
    shape: tuple[int, ...]


def kind_of(leaf: Any) -> str:
    """Return what leaves have in common that share a vector: who makes them, and their dtype."""
    module = type(leaf).__module__.partition(".")[0]
    if is_jax(leaf):
        return f"jax {leaf.dtype}"
    if module == "torch":
        return str(leaf.dtype).replace(".", " ")
    return f"numpy {np.asarray(leaf).dtype}"


def lengths_of(fragments: Sequence[Sequence[Any]]) -> Lengths:
    """Return how long each kind's vector is: as long as the fragment with the most of it."""
    lengths: Lengths = {}
    for leaves in fragments:
        own: Lengths = {}
        for leaf in leaves:
            own[kind_of(leaf)] = own.get(kind_of(leaf), 0) + math.prod(np.shape(leaf))
        lengths = {kind: max(lengths.get(kind, 0), own.get(kind, 0)) for kind in {**lengths, **own}}
    return dict(sorted(lengths.items()))


def empty(fragments: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return vectors of zeros for the largest of some fragments."""
    kinds = {kind_of(leaf): leaf for leaves in fragments for leaf in leaves}
    return {kind: _zeros(kinds[kind], length) for kind, length in lengths_of(fragments).items()}


def _zeros(like: Any, length: int) -> Any:
    if is_jax(like):
        return _concatenated(like, (), length)
    if kind_of(like).startswith("torch"):
        return sys.modules["torch"].zeros(length, dtype=like.dtype)
    return np.zeros(length, np.asarray(like).dtype)


def _concatenated(like: Any, leaves: Sequence[Any], length: int) -> Any:
    """Return leaves in a vector, and zeros behind; in shard_map it varies over axes as ``like`` does."""
    numpy = sys.modules["jax"].numpy
    rest = numpy.zeros(length - sum(math.prod(leaf.shape) for leaf in leaves), like.dtype)
    return numpy.concatenate([like.ravel()[:0], *(leaf.ravel() for leaf in leaves), rest])


def pack(leaves: Sequence[Any], vectors: Mapping[str, Any]) -> dict[str, Any]:
    """Return new vectors, as long as these, that hold the leaves, and zeros behind."""
    packed = {}
    for kind, vector in vectors.items():
        own = [leaf for leaf in leaves if kind_of(leaf) == kind]
        if is_jax(vector):
            packed[kind] = _concatenated(vector, own, len(vector))
            continue
        packed[kind] = _zeros(vector, len(vector))
        begin = 0
        for leaf in own:
            end = begin + math.prod(np.shape(leaf))
            packed[kind][begin:end].reshape(np.shape(leaf))[...] = leaf
            begin = end
    return packed


def forms_of(leaves: Sequence[Any]) -> list[Form]:
    """Return the kind and the shape of each leaf."""
    return [Form(kind_of(leaf), np.shape(leaf)) for leaf in leaves]


def unpack(vectors: Mapping[str, Any], forms: Sequence[Form]) -> list[Any]:
    """Return the leaves that lie in vectors, as views."""
    begins = dict.fromkeys(vectors, 0)
    leaves = []
    for kind, shape in forms:
        begin = begins[kind]
        begins[kind] += math.prod(shape)
        leaves.append(vectors[kind][begin : begins[kind]].reshape(shape))
    return leaves

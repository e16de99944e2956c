"""Trees: flatten, rebuild, and the names of leaves.

optree does the walking. Plain dicts are flattened by sorted key, so their order never matters; the order of an
``OrderedDict``, a list or a dataclass is part of the tree. ``None`` is structure, not a leaf. What only JAX knows how
to walk (Equinox modules, ``flax.struct``) is walked by JAX.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optree

from funcavg._trees.survey import ROOT, refuse_keys, survey_of

__all__ = ["ROOT", "Flat", "Spec", "combine", "flatten", "names", "paths", "unflatten"]

Path = tuple[Any, ...]


class Spec(NamedTuple):
    """A tree without its leaves."""

    outer: optree.PyTreeSpec
    inner: tuple[tuple[int, Any], ...] = ()  # (which leaf of it, JAX's PyTreeDef) of containers that JAX walks
    order: tuple[int, ...] = ()  # where the leaves stand in optree's order, if ranks could not agree about that


class Flat(NamedTuple):
    """A tree taken apart."""

    leaves: Sequence[Any]
    spec: Spec
    attributes: Sequence[tuple[tuple[int, ...], dict[str, Any]]] = ()  # of OrderedDicts, such as a state_dict's

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """Return the tree around other leaves."""
        tree = unflatten(self.spec, leaves)
        kept = dict(self.attributes)
        for where, node in _nodes(tree, list(kept)):
            vars(node).update(kept[where])
        return tree


def flatten(tree: Any) -> Flat:
    """Return the leaves of ``tree`` and the structure to rebuild it with."""
    try:
        leaves, outer = optree.tree_flatten(tree)
    except Exception:
        refuse_keys(tree)  # else what has been raised is a container's own
        raise
    ordered_dicts, order = survey_of(outer)
    nodes = _nodes(tree, ordered_dicts)
    attributes = [(where, {k: copy.copy(v) for k, v in vars(node).items()}) for where, node in nodes if vars(node)]
    if order:
        leaves = [leaves[i] for i in order]
    jax: Any = sys.modules.get("jax")
    foreign = set() if jax is None else {kind for kind in set(map(type, leaves)) if _may_be_walked_by_jax(kind)}
    if not foreign:
        return Flat(leaves, Spec(outer, (), order), attributes)
    everything: list[Any] = []
    inner: list[tuple[int, Any]] = []
    for i, leaf in enumerate(leaves):
        if type(leaf) in foreign and not jax.tree_util.all_leaves([leaf]):
            found_leaves, treedef = jax.tree_util.tree_flatten(leaf)
            everything += found_leaves
            inner.append((i, treedef))
        else:
            everything.append(leaf)
    return Flat(everything, Spec(outer, tuple(inner), order), attributes)


def _nodes(tree: Any, places: Sequence[tuple[int, ...]], depth: int = 0) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the containers at some places, which begin alike up to ``depth``: each is come to once."""
    below: dict[int, list[tuple[int, ...]]] = {}
    for place in places:
        if len(place) == depth:
            yield place, tree
        else:
            below.setdefault(place[depth], []).append(place)
    if below:
        children = optree.tree_flatten_one_level(tree)[0]
        for i, some in below.items():
            yield from _nodes(children[i], some, depth + 1)


def _may_be_walked_by_jax(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("builtins", "numpy", "torch", "jaxlib", "ml_dtypes")


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """Rebuild a tree: the containers of ``spec``, key order kept, around ``leaves``."""
    if spec.inner:
        leaves = [whole if treedef is None else treedef.unflatten(whole) for treedef, whole in _by_leaf(spec, leaves)]
    if spec.order:
        leaves = [leaf for _, leaf in sorted(zip(spec.order, leaves, strict=True), key=lambda pair: pair[0])]
    return optree.tree_unflatten(spec.outer, leaves)


def combine(fn: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Return the tree of ``fn(leaf, *leaves of the others in its place)``."""
    flat = flatten(tree)
    rows = [flatten(other).leaves for other in others]
    return flat.rebuild([fn(*column) for column in zip(flat.leaves, *rows, strict=True)])


def _by_leaf(spec: Spec, leaves: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (None, leaf) for every leaf of the outer structure, but (treedef, its leaves) where JAX has walked on."""
    walked, remaining = dict(spec.inner), iter(leaves)
    for i in range(spec.outer.num_leaves):
        treedef = walked.get(i)
        if treedef is None:
            yield None, next(remaining)
        else:
            yield treedef, [next(remaining) for _ in range(treedef.num_leaves)]


def paths(spec: Spec) -> list[Path]:
    """Return the path of every leaf: a tuple of dict keys, attributes and positions (for ``where``)."""
    return _extended(spec, spec.outer.paths(), lambda path, keys: path + tuple(map(_plain_key, keys)))


def names(spec: Spec) -> list[str]:
    """Return every leaf as one would write it, such as ``params_tree['layer1']['weight']``."""
    outer = [accessor.codify(ROOT) for accessor in spec.outer.accessors()]
    whole = _extended(spec, outer, lambda name, keys: name + sys.modules["jax"].tree_util.keystr(keys))
    return [" ".join(name.splitlines()) for name in whole]  # whatever a key of one's own shows: they are lines


def _extended(spec: Spec, outer: list[Any], extend: Any) -> list[Any]:
    """Return ``outer``, what is known of each leaf of the outer structure, for all leaves."""
    if spec.order:
        outer = [outer[i] for i in spec.order]
    if not spec.inner:
        return outer
    walked, extended = dict(spec.inner), []
    for i, stem in enumerate(outer):
        if i in walked:
            hollow = walked[i].unflatten([0] * walked[i].num_leaves)
            flat, _ = sys.modules["jax"].tree_util.tree_flatten_with_path(hollow)
            extended += [extend(stem, keys) for keys, _ in flat]
        else:
            extended.append(stem)
    return extended


def _plain_key(key: Any) -> Any:
    """Return what one of JAX's key types holds; a key of another type is itself, whatever attributes it has."""
    tree_util = sys.modules["jax"].tree_util
    if isinstance(key, tree_util.SequenceKey):
        return key.idx
    if isinstance(key, tree_util.GetAttrKey):
        return key.name
    return key.key if isinstance(key, (tree_util.DictKey, tree_util.FlattenedIndexKey)) else key

"""Trees: flatten, rebuild, and the names of leaves.

optree does the walking. Plain dicts are flattened by sorted key, so their order never matters; the order of an
``OrderedDict``, a list or a dataclass is part of the tree. ``None`` is structure, not a leaf. What only JAX knows how
to walk (Equinox modules, ``flax.struct``) is walked by JAX.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import optree

__all__ = ["ROOT", "Flat", "Spec", "combine", "flatten", "names", "paths", "unflatten"]

ROOT = "params_tree"

Path = tuple[Any, ...]


class Spec(NamedTuple):
    """A tree without its leaves."""

    outer: optree.PyTreeSpec
    inner: tuple[tuple[int, Any], ...] = ()  # (which leaf of it, JAX's PyTreeDef) of containers that JAX walks


class Flat(NamedTuple):
    """A tree taken apart."""

    leaves: Sequence[Any]
    spec: Spec
    attributes: Sequence[tuple[tuple[int, ...], dict[str, Any]]] = ()  # of OrderedDicts, such as a state_dict's

    def rebuild(self, leaves: Sequence[Any]) -> Any:
        """Return the tree around other leaves."""
        tree = unflatten(self.spec, leaves)
        for where, attributes in self.attributes:
            vars(_at(tree, where)).update(attributes)
        return tree


def flatten(tree: Any) -> Flat:
    """Return the leaves of ``tree`` and the structure to rebuild it with."""
    leaves, outer = optree.tree_flatten(tree)
    found = ((where, dict(vars(_at(tree, where)))) for where in _ordered_dicts(outer))
    attributes = [(where, attributes) for where, attributes in found if attributes]
    jax: Any = sys.modules.get("jax")
    foreign = set() if jax is None else {kind for kind in set(map(type, leaves)) if _may_be_walked_by_jax(kind)}
    if not foreign:
        return Flat(leaves, Spec(outer), attributes)
    everything: list[Any] = []
    inner: list[tuple[int, Any]] = []
    for i, leaf in enumerate(leaves):
        if type(leaf) in foreign and not jax.tree_util.all_leaves([leaf]):
            found, treedef = jax.tree_util.tree_flatten(leaf)
            everything += found
            inner.append((i, treedef))
        else:
            everything.append(leaf)
    return Flat(everything, Spec(outer, tuple(inner)), attributes)


def _ordered_dicts(spec: optree.PyTreeSpec) -> Sequence[tuple[int, ...]]:
    """Return where the OrderedDicts of a tree are: which child of which child.

    Alone of all containers they have attributes of their own, and optree leaves these behind.
    """
    try:
        return _known_ordered_dicts(spec)
    except Exception:  # what a user's container keeps beside its children may be neither hashed nor compared
        return list(_find_ordered_dicts(spec))


@functools.lru_cache(maxsize=32)
def _known_ordered_dicts(spec: optree.PyTreeSpec) -> Sequence[tuple[int, ...]]:
    return list(_find_ordered_dicts(spec))


def _find_ordered_dicts(spec: optree.PyTreeSpec) -> Iterator[tuple[int, ...]]:
    if spec.type is OrderedDict:
        yield ()
    for i, child in enumerate(spec.children()):
        yield from ((i, *where) for where in _find_ordered_dicts(child))


def _at(tree: Any, where: tuple[int, ...]) -> Any:
    for i in where:
        tree = optree.tree_flatten_one_level(tree)[0][i]
    return tree


def _may_be_walked_by_jax(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in ("builtins", "numpy", "torch", "jaxlib", "ml_dtypes")


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """Rebuild a tree: the containers of ``spec``, key order kept, around ``leaves``."""
    if spec.inner:
        leaves = [whole if treedef is None else treedef.unflatten(whole) for treedef, whole in _by_leaf(spec, leaves)]
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
    return _extended(spec, outer, lambda name, keys: name + sys.modules["jax"].tree_util.keystr(keys))


def _extended(spec: Spec, outer: list[Any], extend: Any) -> list[Any]:
    """Return ``outer``, what is known of each leaf of the outer structure, for all leaves."""
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
    """Return what one of JAX's key types holds."""
    return next(getattr(key, name) for name in ("name", "idx", "key") if hasattr(key, name))

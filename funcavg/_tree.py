"""Trees: flatten, rebuild, and the names of leaves.

optree does the walking. Plain dicts are flattened by sorted key, so their order never matters; the order of an
``OrderedDict``, a list or a dataclass is part of the tree. ``None`` is structure, not a leaf.
"""

from __future__ import annotations

from typing import Any

import optree

__all__ = ["ROOT", "flatten", "names", "paths", "unflatten"]

ROOT = "params_tree"

Path = tuple[Any, ...]


def flatten(tree: Any) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves of ``tree`` and the structure to rebuild it with."""
    leaves, spec = optree.tree_flatten(tree)
    return leaves, spec


def unflatten(spec: optree.PyTreeSpec, leaves: list[Any]) -> Any:
    """Rebuild a tree: the containers of ``spec``, key order kept, around ``leaves``."""
    return optree.tree_unflatten(spec, leaves)


def paths(spec: optree.PyTreeSpec) -> list[Path]:
    """Return the path of every leaf: a tuple of dict keys and positions (for ``where``)."""
    return spec.paths()


def names(spec: optree.PyTreeSpec) -> list[str]:
    """Return every leaf as one would write it, such as ``params_tree['layer1']['weight']``."""
    return [accessor.codify(ROOT) for accessor in spec.accessors()]

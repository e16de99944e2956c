"""What follows from a tree's structure alone: where its OrderedDicts are, and an order of leaves for all ranks.

optree sorts a dict by its keys, or where these cannot be compared by their types first. Where that fails, too (enums,
objects of one's own), it takes them as they were put in, which differs between ranks: then they are sorted by what
they show, here.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optree

__all__ = ["ROOT", "Survey", "refuse_keys", "survey_of"]

ROOT = "params_tree"


class Survey(NamedTuple):
    """What has been found in a tree."""

    ordered_dicts: Sequence[tuple[int, ...]]  # which child of which child. They alone have attributes of their own
    order: tuple[int, ...]  # of leaves, by their places in optree's; () for that itself


def survey_of(spec: optree.PyTreeSpec) -> Survey:
    """Return what is found in a tree of this structure, or raise TypeError for keys that ranks cannot agree about."""
    try:
        return _remembered(spec)
    except Exception:  # a mistake; or what a container keeps beside its children can be neither hashed nor compared
        return _survey(spec)


def _survey(spec: optree.PyTreeSpec) -> Survey:
    order = tuple(_ordered(spec, 0, ROOT))
    return Survey(list(_find_ordered_dicts(spec)), () if order == tuple(range(spec.num_leaves)) else order)


_remembered = functools.lru_cache(maxsize=32)(_survey)


def _find_ordered_dicts(spec: optree.PyTreeSpec) -> Iterator[tuple[int, ...]]:
    if spec.type is OrderedDict:
        yield ()
    for i, child in enumerate(spec.children()):
        yield from ((i, *where) for where in _find_ordered_dicts(child))


def _ordered(spec: optree.PyTreeSpec, begin: int, name: str) -> Iterator[int]:
    """Yield the places of leaves, the first of which is ``begin``, in an order that all ranks have."""
    if spec.is_leaf():
        yield begin
        return
    keys, parts = spec.entries(), []
    is_dict = spec.type in (dict, defaultdict, OrderedDict)
    if is_dict:
        _check_keys(keys, name)
    for key, child in zip(keys, spec.children(), strict=True):
        inside = f"{name}.{key}" if isinstance(key, str) and not is_dict else f"{name}[{key!r}]"
        parts.append(list(_ordered(child, begin, inside)))
        begin += child.num_leaves
    if spec.type in (dict, defaultdict) and not _comparable(keys):
        shown = list(map(repr, keys))
        by: list[Any] = [type(key).__repr__ for key in keys]
        if len(set(shown)) < len(shown) or object.__repr__ in by:
            kinds = ", ".join(sorted({type(key).__qualname__ for key in keys}))
            raise TypeError(
                f"{name} is a dict of which ranks cannot agree about the order: its keys, of type {kinds}, can neither "
                f"be compared nor told apart by their repr(). Give them an order (__lt__), or pass an OrderedDict"
            )
        parts = [part for _, part in sorted(zip(shown, parts, strict=True), key=lambda pair: pair[0])]
    for part in parts:
        yield from part


def _comparable(keys: Sequence[Any]) -> bool:
    """Say whether optree has sorted a dict by these keys, and would have so however it was filled.

    (Sets can be compared, but that one holds the other is no order.)
    """
    by_type: Any = lambda key: (f"{type(key).__module__}.{type(key).__qualname__}", key)  # noqa: E731  # as optree does
    for order in (None, by_type):
        with contextlib.suppress(Exception):
            other_way = list(keys)[::-1]
            return sorted(keys, key=order) == sorted(other_way, key=order)
    return False


def _check_keys(keys: Sequence[Any], name: str) -> None:
    """Refuse tensors as keys: they are equal to nothing on another rank."""
    for key in keys:
        if hasattr(key, "data_ptr"):
            raise TypeError(
                f"{name} is a dict whose keys are tensors, of type {type(key).__qualname__}, which no other rank has. "
                f"optimizer.state is keyed by parameters: pass optimizer.state_dict()"
            )


def refuse_keys(tree: Any, name: str = ROOT) -> None:
    """Raise TypeError for a dict in a tree whose keys are tensors: optree cannot even try to sort them."""
    if isinstance(tree, dict):
        _check_keys(list(tree), name)
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, child in children:
        refuse_keys(child, f"{name}[{key!r}]")

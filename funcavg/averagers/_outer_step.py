"""What DiLoCo's outer steps are made of, whole or fragment by fragment: anchors, changes, and values that come back."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from funcavg._engine import Agreement, move
from funcavg._transforms import is_traced
from funcavg._trees import Layout, Request, flatten
from funcavg.averagers._base import averaged_lines, is_local, layout_of
from funcavg.collectives.solo import Solo

__all__ = [
    "agreed_ties",
    "averaged_part",
    "check_same_tree",
    "check_wire",
    "differences",
    "has_tracers",
    "mixed",
    "refuse_tree",
    "tied",
    "with_values",
]


def check_wire(wire: Any, group: Any, who: str) -> None:
    """Raise what is wrong with a wire, or with having one."""
    if wire is None:
        return
    from funcavg.wires.codecs import codec_of

    if is_local(group):
        raise ValueError(
            f"{who}: wire={wire!r} is for groups of processes or threads, got group={group!r}: over an axis, and of "
            f"stacked replicas, nothing is encoded. Leave wire out."
        )
    codec_of(wire)


def averaged_part(request: Request) -> Any:
    """Return a tree with None in the place of what is not averaged, and tensors in that of parameters."""
    part: list[Any] = [None] * len(request.flat.leaves)
    for i in layout_of(request).averaged:
        leaf = request.flat.leaves[i]
        part[i] = leaf.detach() if hasattr(leaf, "detach") else leaf
    return request.flat.rebuild(part)


def check_same_tree(ours: Layout, theirs: Layout, who: str) -> None:
    """Raise ValueError, and name the first leaves, if an anchor is not of the averaged leaves of a tree."""
    refuse_tree(_differences(ours, theirs), who)


def refuse_tree(different: str, who: str) -> None:
    """Raise ValueError, if there is a difference."""
    if different:
        raise ValueError(
            f"{who}: update was given another tree than init: {different}. Keep the tree as it is, or begin anew with "
            f"init."
        )


@functools.lru_cache(maxsize=32)
def _differences(ours: Layout, theirs: Layout) -> str:
    return differences(averaged_lines(ours), averaged_lines(theirs))


def differences(left: Sequence[str], right: Sequence[str]) -> str:
    """Return in words where the lines of two trees differ first; "" if they do not."""
    pairs = [(a, b) for a, b in zip(left, right, strict=False) if a != b][:3]
    if not pairs and len(left) != len(right):
        return f"{len(left)} averaged leaves then, {len(right)} now"
    return "; ".join(f"{a} then, {b} now" for a, b in pairs)


# Tied leaves (the same memory twice) come back tied, if all ranks have tied them: then, and only then, `average`
# returns the tied leaves of a pseudo-gradient as one.


def tied(delta: Any, ties: Mapping[int, int]) -> Any:
    """Return a pseudo-gradient whose leaves are tied as the parameters are."""
    flat = flatten(delta)
    return flat.rebuild([flat.leaves[ties.get(i, i)] for i in range(len(flat.leaves))])


def agreed_ties(ties: Mapping[int, int], mean: Any) -> dict[int, int]:
    """Return the ties that all ranks have, by what came back tied."""
    leaves = flatten(mean).leaves
    return {i: first for i, first in ties.items() if leaves[i] is leaves[first]}


def with_values(request: Request, values: Sequence[Any], ties: dict[int, int], rows: Sequence[Any] = ()) -> Any:
    """Return a tree whose averaged leaves have these values, in memory of their own: donated, or new.

    ``rows`` says of each which part of the leaf these are, as an index; None, or not given, for all of it.
    """
    rows = rows or [None] * len(values)
    if is_traced(request.flat.leaves, None) or is_traced(values, None):  # XLA sees to the memory
        whole = [
            value if part is None else leaf.at[part].set(value)
            for leaf, value, part in zip(request.leaves, values, rows, strict=True)
        ]
        return request.rebuild(whole)
    request, copying = request._replace(ties=ties), _Values(values, rows)
    return request.rebuild(move(request, Agreement(None, same_ties=True), copying))


class _Values(Solo):
    """A process alone, whose results are given."""

    def __init__(self, values: Sequence[Any], rows: Sequence[Any]) -> None:
        self._values, self._rows = values, rows

    def fill(self, layout: Layout, carriers: Sequence[Any], results: Sequence[Any], ties: Mapping[int, int]) -> None:
        """Copy the values into the results."""
        for i, (family, value, rows) in enumerate(zip(layout.families, self._values, self._rows, strict=True)):
            if i in ties:
                continue
            target = results[i]
            if rows is not None:
                if target is not carriers[i]:
                    family.copy([target], [carriers[i]])
                target = target[rows]
            family.copy([target], [family.carrier(value)])


def mixed(mix: float, synchronised: Any, own: Any) -> Any:
    """Return ``(1 - mix) synchronised + mix own``, of 16 bits by way of float32: rounded once."""
    one, other = _wide(synchronised), _wide(own)
    mean = one + mix * (other - one) if mix <= 0.5 else other + (1 - mix) * (one - other)
    dtype = getattr(synchronised, "dtype", None)
    if dtype is None or mean.dtype == dtype:
        return mean
    return mean.to(dtype) if hasattr(mean, "to") else mean.astype(dtype)


def _wide(leaf: Any) -> Any:
    if getattr(getattr(leaf, "dtype", None), "itemsize", 8) > 2:
        return leaf
    return leaf.float() if hasattr(leaf, "float") else leaf.astype(np.float32)


def has_tracers(tree: Any) -> bool:
    """Say whether JAX is tracing what a tree holds."""
    return is_traced(flatten(tree).leaves, None)

"""Cutting trees into fragments: at ``init`` as the user says, and from then on as the anchors in a state say.

So ranks whose leaves are tied in different ways, and runs whose leaves are tied no more, cut alike.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._transforms import Stacked
from funcavg._trees import Leaf, Request, combine, flatten, is_dtensor, paths
from funcavg.averagers._base import averaged_lines, described, layout_of
from funcavg.averagers._fragments import Fragments, Parts, Piece, Size, cut_by_number, cut_by_paths
from funcavg.averagers._outer_step import differences, has_tracers, refuse_tree
from funcavg.averagers._packing import can_hold, is_sharded, lengths_of

__all__ = ["Cut", "Cutter", "local", "pieces_of", "places_of", "ties_of", "with_memory_of_its_own"]


class Cut(NamedTuple):
    """A tree's fragments."""

    parts: Parts
    lengths: dict[str, int]  # of the vectors that the largest of them needs


class Cutter:
    """Cuts trees; remembers how it has read what anchors say."""

    def __init__(self, fragments: Fragments, group: Any, who: str) -> None:
        self._fragments, self._who = fragments, who
        self._count = fragments if isinstance(fragments, int) else len(fragments)
        self._replicas = group.axis if isinstance(group, Stacked) else None
        self._known: dict[Any, Cut] = {}
        # Most updates see the anchors of the one before: their structure, their leaves, not kept, what the tree is
        # like, and the cut.
        self._last: tuple[Any, list[Callable[[], Any]], Any, Cut] | None = None

    def parts_of(self, request: Request) -> Parts:
        """Cut a tree as the user says; of tied leaves the first."""
        layout, ties = layout_of(request), request.ties
        names = {i: layout.name(i) for i in range(len(layout.averaged)) if i not in ties}
        sizes = [self._size_of(leaf) for leaf in request.leaves]
        if isinstance(self._fragments, int):
            return cut_by_number(sizes, self._fragments, list(names))
        of_leaves = paths(request.flat.spec)
        return cut_by_paths([of_leaves[position] for position in layout.averaged], self._fragments, names, sizes)

    def anchors_of(self, request: Request) -> tuple[Any, ...]:
        """Return the fragments of a tree, as the user says; tied leaves go with the first."""
        followers: dict[int, list[int]] = {}
        for tied_one, first in request.ties.items():
            followers.setdefault(first, []).append(tied_one)
        whole = []
        for part in self.parts_of(request):
            placed = [piece._replace(axis=self._axis(np.ndim(request.leaves[piece.leaf]))) for piece in part]
            more = [piece._replace(leaf=other) for piece in placed for other in followers.get(piece.leaf, ())]
            whole.append(sorted(placed + more, key=lambda piece: piece.leaf))
        return tuple([with_memory_of_its_own(pieces_of(request, part)) for part in whole])

    def cut(self, anchors: Any, sent: Any, request: Request) -> Cut:
        """Return how a tree is cut, by its anchors; raise ValueError if these are of another tree.

        So are vectors of what is sent, where there are some, or should be (``sent`` is not None).
        """
        if len(anchors) != self._count:
            raise ValueError(
                f"{self._who}: this state is of {len(anchors)} fragments, and fragments={self._count} now. Go on with "
                f"as many, or begin anew with init."
            )
        cut = self._cut_of_last(anchors, request)
        if cut is None:
            cut = self._looked_up(anchors, request)
            self._remember(anchors, layout_of(request).signature, cut)
        if sent is not None and not can_hold(sent, cut.lengths):
            found_lengths = {name: len(vector) for name, vector in sent.items()}
            raise ValueError(
                f"{self._who}: what is sent is kept in vectors of {cut.lengths}, and this state, of a run with other "
                f"settings, has {found_lengths or 'none'}. Go on with those, or begin anew with init."
            )
        return cut

    def same(self, anchors: Any, cut: Cut) -> Any:
        """Return anchors, of which the next update need not be told that they are cut as the last ones."""
        if self._last is not None and self._last[3] is cut:
            self._remember(anchors, self._last[2], cut)
        return anchors

    def _remember(self, anchors: Any, signature: Any, cut: Cut) -> None:
        flat = flatten(anchors)
        weak = [_weak(leaf) for leaf in flat.leaves]
        self._last = None if has_tracers(flat.leaves) else (flat.spec, weak, signature, cut)

    def _cut_of_last(self, anchors: Any, request: Request) -> Cut | None:
        if self._last is None:
            return None
        spec, known, signature, cut = self._last
        flat = flatten(anchors)
        if spec != flat.spec or any(find() is not leaf for find, leaf in zip(known, flat.leaves, strict=True)):
            return None
        return cut if signature == layout_of(request).signature else None

    def _looked_up(self, anchors: Any, request: Request) -> Cut:
        key = layout_of(described(anchors)), layout_of(request)
        if key not in self._known:
            if len(self._known) >= 8:
                self._known.clear()
            lengths = lengths_of([local(flatten(anchor).leaves) for anchor in anchors])
            self._known[key] = Cut(self._read(anchors, request), lengths)
        return self._known[key]

    def _read(self, anchors: Any, request: Request) -> Parts:
        of_leaves, layout = paths(request.flat.spec), layout_of(request)
        pieces: dict[Any, list[tuple[int, Leaf, str]]] = {}  # of each path
        for k, anchor in enumerate(anchors):
            part = described(anchor)
            keys, known = paths(part.flat.spec), layout_of(part)
            lines = averaged_lines(known)
            for i, position in enumerate(known.averaged):
                pieces.setdefault(keys[position], []).append((k, known.leaves[i], lines[i]))
        parts: Parts = [[] for _ in anchors]
        then = []
        for i, position in enumerate(layout.averaged):
            own, begin = pieces.pop(of_leaves[position], []), 0
            axis = self._axis(np.ndim(request.leaves[i]))
            for k, leaf, _ in own:
                end = begin + (leaf.shape[axis] if axis < len(leaf.shape) else 1)
                parts[k].append(Piece(i) if len(own) == 1 else Piece(i, slice(begin, end), axis))
                begin = end
            then += _joined(own, axis, begin)
        then += [line for (_, _, line), *_ in pieces.values()]
        refuse_tree(differences(then, averaged_lines(layout)), self._who)
        return parts

    def _size_of(self, leaf: Any) -> Size:
        shape = np.shape(leaf)
        nbytes = math.prod(shape) * getattr(getattr(leaf, "dtype", None), "itemsize", 8)
        axis = self._axis(len(shape))
        rows = 1 if is_dtensor(leaf) or axis >= len(shape) or is_sharded(leaf, axis) else shape[axis]
        return Size(rows, nbytes // max(rows, 1))

    def _axis(self, ndim: int) -> int:
        """Return the axis along which a leaf is cut."""
        return 1 if self._replicas is not None and ndim and self._replicas % ndim == 0 else 0


def _weak(leaf: Any) -> Callable[[], Any]:
    """Return a reference that does not keep a leaf; a number, which has none, is kept."""
    try:
        return weakref.ref(leaf)
    except TypeError:
        return lambda: leaf


def _joined(pieces: Sequence[tuple[int, Leaf, str]], axis: int, rows: int) -> list[str]:
    """Return the line of a leaf whose parts these are; none of what is in no fragment."""
    if len(pieces) < 2:
        return [line for _, _, line in pieces]
    name, _, text = pieces[0][2].rpartition(": ")
    shape = [int(number) for number in text[text.index("[") + 1 : -1].split(",")]
    shape[axis] = rows
    return [f"{name}: {text[: text.index('[')]}{shape}"]


def pieces_of(request: Request, part: Sequence[Piece]) -> Any:
    """Return the tree with a fragment's rows in their places, and None elsewhere."""
    leaves, positions = request.leaves, layout_of(request).averaged
    values: list[Any] = [None] * len(request.flat.leaves)
    for piece in part:
        leaf = leaves[piece.leaf]
        values[positions[piece.leaf]] = piece.of(leaf.detach() if hasattr(leaf, "detach") else leaf)
    return request.flat.rebuild(values)


def ties_of(request: Request, part: Sequence[Piece]) -> dict[int, int]:
    """Return which pieces of a fragment are the same memory as an earlier one."""
    numbers = {piece.leaf: n for n, piece in enumerate(part)}
    pairs = [(numbers[i], numbers[first]) for i, first in request.ties.items() if i in numbers and first in numbers]
    return {n: first for n, first in pairs if part[n].rows == part[first].rows}


def places_of(
    params: Any, request: Request, part: Sequence[Piece], ties: Mapping[int, int] | None, *, donate: bool
) -> Request:
    """Return the leaves of which a fragment has rows; raise what is wrong if they are to be written to, and cannot.

    ``ties``: those that all ranks have, once that is known.
    """
    positions = layout_of(request).averaged
    only = frozenset(positions[piece.leaf] for piece in part)
    target = described(params, only=only, donate=donate, ties=not has_tracers(params))
    for i, first in target.ties.items() if donate else ():
        if ties is not None and i not in ties:
            one, other = (layout_of(target).name(leaf) for leaf in (first, i))
            raise ValueError(
                f"donate=True, but {one} and {other} are the same memory (tied leaves) here, and not on all ranks: two "
                f"results cannot be written to one place. Tie the same leaves on every rank, or pass donate=False."
            )
    return target


def local(leaves: Sequence[Any]) -> list[Any]:
    """Return leaves as they lie in this process."""
    return [leaf.to_local() if is_dtensor(leaf) else leaf for leaf in leaves]


def with_memory_of_its_own(tree: Any) -> Any:
    """Return a tree of which no leaf is a part of a larger array, all of which would be kept, and saved, for it."""

    def owned(leaf: Any) -> Any:
        if hasattr(leaf, "_is_view"):
            return leaf.clone() if leaf._is_view() else leaf
        return leaf.copy() if isinstance(leaf, np.ndarray) and leaf.base is not None else leaf

    return combine(owned, tree)

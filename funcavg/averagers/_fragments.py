"""Fragments of a tree: which rows of which leaves are synchronised together, and when.

A fragment is a list of pieces, in the order of leaves. Cut by a number, the averaged leaves are one long row of rows,
of which fragments are consecutive parts::

    leaves       │ embedding       │ w1    │ b1 │ w2         │
    rows         │ 0 1 2 3 4 5 6 7 │ 0 1 2 │ 0  │ 0 1 2 3 4  │
    fragments    │ 0        │ 1              │ 2             │
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Fragments", "Piece", "Size", "check_fragments", "cut_by_number", "cut_by_paths", "events"]

Fragments = int | tuple[Callable[[tuple[Any, ...]], Any], ...]


class Piece(NamedTuple):
    """Some rows of a leaf, or all of it."""

    leaf: int  # its number among the averaged ones
    rows: slice | None = None  # along the first axis; None for all of the leaf

    def of(self, leaf: Any) -> Any:
        """Return these rows of a leaf."""
        return leaf if self.rows is None else leaf[self.rows]


class Size(NamedTuple):
    """What a leaf may be cut into."""

    rows: int  # 1 if it cannot be cut
    nbytes: int  # of a row


def check_fragments(fragments: Any, period: int, delay: Any, mix: Any) -> tuple[Fragments, int, float]:
    """Return the arguments of `funcavg.streaming_diloco`, or raise what is wrong with them."""
    checked: Fragments
    if isinstance(fragments, int) and not isinstance(fragments, bool):
        checked = count = fragments
    elif isinstance(fragments, (list, tuple)) and all(map(callable, fragments)):
        checked, count = tuple(fragments), len(fragments)
    else:
        raise TypeError(
            f"streaming_diloco: fragments must be a number, or a list of functions of a path, got {fragments!r} of "
            f"type {type(fragments).__name__}"
        )
    if not 1 <= count <= period:
        raise ValueError(
            f"streaming_diloco: there must be at least 1 fragment, and at most one for each step of a period, got "
            f"{count} and period={period}"
        )
    if isinstance(delay, bool) or not isinstance(delay, int):
        raise TypeError(f"streaming_diloco: delay must be an integer, got {delay!r} of type {type(delay).__name__}")
    if not 0 <= delay < period // count:
        raise ValueError(
            f"streaming_diloco: delay must be at least 0 and less than the {period // count} steps from one fragment "
            f"to the next (period={period}, {count} fragments), so that one is under way at a time, got {delay}"
        )
    if isinstance(mix, bool) or not isinstance(mix, (int, float)):
        raise TypeError(f"streaming_diloco: mix must be a number, got {mix!r} of type {type(mix).__name__}")
    if not 0 <= mix <= 1:
        raise ValueError(f"streaming_diloco: mix must be at least 0 and at most 1, got {mix!r}")
    return checked, delay, float(mix)


def events(period: int, count: int, delay: int) -> list[int]:
    """Return what happens after each step of a period: 0 nothing, 1 + k fragment k is sent, 1 + count + k applied.

    Without delay, what is applied is sent at once.

    >>> events(6, 2, 1)
    [0, 1, 3, 0, 2, 4]
    >>> events(6, 2, 0)
    [0, 0, 3, 0, 0, 4]
    """
    happens = [0] * period
    for k in range(count):
        own = (k + 1) * period // count
        if delay:
            happens[own - delay - 1] = 1 + k
        happens[own - 1] = 1 + count + k
    return happens


def cut_by_number(sizes: Sequence[Size], count: int, kept: Sequence[int]) -> list[list[Piece]]:
    """Cut leaves, those that are ``kept``, into so many consecutive parts, of which the largest is as small as can be.

    >>> cut_by_number([Size(4, 10), Size(1, 15)], 2, [0, 1])
    [[Piece(leaf=0, rows=slice(0, 3, None))], [Piece(leaf=0, rows=slice(3, 4, None)), Piece(leaf=1, rows=None)]]
    """
    rows = sum(max(sizes[i].rows, 1) for i in kept)
    if rows < count:
        raise ValueError(
            f"streaming_diloco: {count} fragments of a tree whose averaged leaves have {rows} rows along their first "
            f"axes: a fragment has at least one. Take fewer."
        )
    low = max(sizes[i].nbytes for i in kept)
    high = max(low, sum(sizes[i].rows * sizes[i].nbytes for i in kept))
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, kept, middle, count)) <= count:
            high = middle
        else:
            low = middle + 1
    return _filled(sizes, kept, high, count)


def _filled(sizes: Sequence[Size], kept: Sequence[int], most: int, count: int) -> list[list[Piece]]:
    """Fill parts with rows, in order, up to ``most`` bytes each, and leave a row at least for each part to come."""
    parts: list[list[Piece]] = [[]]
    room, left = most, sum(max(sizes[i].rows, 1) for i in kept)
    for i in kept:
        total, nbytes = max(sizes[i].rows, 1), sizes[i].nbytes
        start = 0
        while start < total:
            # Of the rows that are left, the parts that are still to come need one each.
            spare = left - max(count - len(parts), 0)
            fit = min(total - start, room // nbytes if nbytes else total, max(spare, 0))
            if fit == 0 and parts[-1]:
                parts.append([])
                room = most
                continue
            fit = max(fit, 1)
            whole = start == 0 and fit == total
            parts[-1].append(Piece(i) if whole else Piece(i, slice(start, start + fit)))
            start, room, left = start + fit, room - fit * nbytes, left - fit
    return parts


def cut_by_paths(paths: Sequence[tuple[Any, ...]], predicates: Sequence[Any], names: Mapping[int, str]) -> Any:
    """Give each averaged leaf, by its path, to the first predicate that accepts it; raise for what is left over."""
    parts: list[list[Piece]] = [[] for _ in predicates]
    for i, name in names.items():
        taker = next((k for k, accepts in enumerate(predicates) if accepts(paths[i])), None)
        if taker is None:
            raise ValueError(
                f"streaming_diloco: {name} is averaged, and no fragment accepts its path {paths[i]!r}. Add a fragment "
                f"for it, such as lambda path: True at the end, or leave it out with where."
            )
        parts[taker].append(Piece(i))
    for k, part in enumerate(parts):
        if not part:
            raise ValueError(
                f"streaming_diloco: fragment {k} of {len(parts)} ({predicates[k]!r}) accepts none of the {len(names)} "
                f"averaged leaves that earlier ones leave it, the first of which is {next(iter(names.values()), None)}."
            )
    return parts

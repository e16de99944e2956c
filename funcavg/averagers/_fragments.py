"""Fragments of a tree: which rows of which leaves are synchronised together, and when.

A fragment is a list of pieces, in the order of leaves. Cut by a number, the averaged leaves are one long row of rows,
of which fragments are consecutive parts::

    leaves       │ embedding       │ w1    │ b1 │ w2         │
    rows         │ 0 1 2 3 4 5 6 7 │ 0 1 2 │ 0  │ 0 1 2 3 4  │
    fragments    │ 0        │ 1              │ 2             │
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Any, NamedTuple

from funcavg._schedule import integer
from funcavg._transforms import is_traced

__all__ = [
    "Fragments",
    "Parts",
    "Path",
    "Piece",
    "Size",
    "Timetable",
    "check_fragments",
    "cut_by_number",
    "cut_by_paths",
]

Path = tuple[Any, ...]
Fragments = int | tuple[Callable[[Path], Any], ...]


class Piece(NamedTuple):
    """Some rows of a leaf, or all of it."""

    leaf: int  # its number among the averaged ones
    rows: slice | None = None  # None for all of the leaf
    axis: int = 0  # that rows are along: the first, but for that of stacked replicas

    @property
    def place(self) -> tuple[slice, ...] | None:
        """Where these rows lie in the leaf, as an index; None for all of it."""
        return None if self.rows is None else (*(slice(None),) * self.axis, self.rows)

    def of(self, leaf: Any) -> Any:
        """Return these rows of a leaf."""
        return leaf if self.place is None else leaf[self.place]


Parts = list[list[Piece]]


class Size(NamedTuple):
    """What a leaf may be cut into."""

    rows: int  # 1 if it cannot be cut
    nbytes: int  # of a row

    @property
    def total(self) -> int:
        """All its bytes."""
        return self.rows * self.nbytes


def check_fragments(fragments: Any, period: int, delay: Any, mix: Any) -> tuple[Fragments, int, float]:
    """Return the arguments of `funcavg.streaming_diloco`, or raise what is wrong with them."""
    checked: Fragments
    if isinstance(fragments, Integral) and not isinstance(fragments, bool):
        checked = count = int(fragments)
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
    delay = integer("streaming_diloco: delay", delay)
    if not 0 <= delay < period // count:
        raise ValueError(
            f"streaming_diloco: delay must be at least 0 and less than the {period // count} steps from one fragment "
            f"to the next (period={period}, {count} fragments), so that one is under way at a time, got {delay}"
        )
    if isinstance(mix, bool) or not isinstance(mix, Real):
        raise TypeError(f"streaming_diloco: mix must be a number, got {mix!r} of type {type(mix).__name__}")
    if not 0 <= float(mix) <= 1:
        raise ValueError(f"streaming_diloco: mix must be at least 0 and at most 1, got {mix!r}")
    return checked, delay, float(mix)


@dataclass(frozen=True)
class Timetable:
    """When fragments are sent and applied. What happens after a step has a number; JAX may be tracing the step."""

    period: int
    count: int
    delay: int
    warmup: int

    @cached_property
    def events(self) -> list[int]:
        """What happens in a period: 0 nothing, 1 + k fragment k is sent, 1 + count + k it is applied.

        Without delay, what is applied is sent at once.

        >>> Timetable(6, 2, 1, 0).events
        [0, 1, 3, 0, 2, 4]
        >>> Timetable(6, 2, 0, 0).events
        [0, 0, 3, 0, 0, 4]
        """
        happens = [0] * self.period
        for k in range(self.count):
            if self.delay:
                happens[self._own(k) - self.delay] = 1 + k
            happens[self._own(k)] = 1 + self.count + k
        return happens

    @property
    def anchors(self) -> int:
        """The number of what happens after the last step of a warm-up: anchors are taken anew."""
        return 1 + 2 * self.count

    def _own(self, k: int) -> int:
        return (k + 1) * self.period // self.count - 1

    def at(self, step: Any) -> Any:
        """Return what happens after a step, counted from 0."""
        if not is_traced((step,), None):
            step = int(step)
            if step < self.warmup:
                return self.anchors if step == self.warmup - 1 else 0
            return self.events[(step - self.warmup) % self.period]
        import jax

        now = jax.numpy.asarray(self.events)[(step - self.warmup) % self.period]
        before = jax.numpy.where(step == self.warmup - 1, self.anchors, 0)
        return jax.numpy.where(step >= self.warmup, now, before)

    def under_way(self, step: int) -> tuple[int, int] | None:
        """Return which fragment is on its way before a step that does not apply it, and after which it was sent.

        >>> [Timetable(4, 1, 2, 0).under_way(step) for step in range(6)]
        [None, None, (0, 1), None, None, None]
        """
        phase = (step - self.warmup) % self.period
        for k in range(self.count if step >= self.warmup else 0):
            sent = self._own(k) - self.delay
            if sent < phase < self._own(k):
                return k, step - phase + sent
        return None


def cut_by_number(sizes: Sequence[Size], count: int, kept: Sequence[int]) -> Parts:
    """Cut leaves, those that are ``kept``, into so many consecutive parts, of which the largest is as small as can be.

    Leaves without elements go with the one before: a part has something to send.

    >>> cut_by_number([Size(3, 10), Size(1, 15)], 2, [0, 1])
    [[Piece(leaf=0, rows=slice(0, 2, None), axis=0)],
     [Piece(leaf=0, rows=slice(2, 3, None), axis=0), Piece(leaf=1, rows=None, axis=0)]]
    """
    full = [i for i in kept if sizes[i].total]
    rows = sum(sizes[i].rows for i in full)
    if rows < count:
        raise ValueError(
            f"streaming_diloco: {count} fragments of a tree whose averaged leaves have {rows} rows along their first "
            f"axes, without empty ones: a fragment has at least one. Take fewer."
        )
    low, high = max(sizes[i].nbytes for i in full), sum(sizes[i].total for i in full)
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, full, middle, count)) <= count:
            high = middle
        else:
            low = middle + 1
    parts = _filled(sizes, full, high, count)
    for i in set(kept).difference(full):
        part = next((part for part in reversed(parts) if part[0].leaf < i), parts[0])
        part.append(Piece(i))
        part.sort(key=lambda piece: piece.leaf)
    return parts


def _filled(sizes: Sequence[Size], kept: Sequence[int], most: int, count: int) -> Parts:
    """Fill parts with rows, in order, up to ``most`` bytes each, and leave a row at least for each part to come."""
    parts: Parts = [[]]
    room, left = most, sum(sizes[i].rows for i in kept)
    for i in kept:
        total, nbytes = sizes[i].rows, sizes[i].nbytes
        start = 0
        while start < total:
            # Of the rows that are left, the parts that are still to come need one each.
            spare = left - max(count - len(parts), 0)
            fit = min(total - start, room // nbytes, max(spare, 0))
            if fit == 0 and parts[-1]:
                parts.append([])
                room = most
                continue
            fit = max(fit, 1)
            whole = start == 0 and fit == total
            parts[-1].append(Piece(i) if whole else Piece(i, slice(start, start + fit)))
            start, room, left = start + fit, room - fit * nbytes, left - fit
    return parts


def cut_by_paths(
    paths: Sequence[Path], predicates: Sequence[Any], names: Mapping[int, str], sizes: Sequence[Size]
) -> Parts:
    """Give each averaged leaf, by its path, to the first predicate that accepts it; raise for what is left over."""
    parts: Parts = [[] for _ in predicates]
    for i, name in names.items():
        taker = next((k for k, accepts in enumerate(predicates) if accepts(paths[i])), None)
        if taker is None:
            raise ValueError(
                f"streaming_diloco: {name} is averaged, and no fragment accepts its path {paths[i]!r}. Add a fragment "
                f"for it, such as lambda path: True at the end, or leave it out with where."
            )
        parts[taker].append(Piece(i))
    for k, part in enumerate(parts):
        if any(sizes[piece.leaf].total for piece in part):
            continue
        who = f"streaming_diloco: fragment {k} of {len(parts)} ({predicates[k]!r})"
        if part:
            raise ValueError(
                f"{who} accepts leaves without elements only, such as {names[part[0].leaf]}: there is nothing to send. "
                f"Let another fragment accept them."
            )
        if (taken := next((i for i in names if predicates[k](paths[i])), None)) is not None:
            raise ValueError(
                f"{who} accepts nothing that earlier ones leave it: {names[taken]}, for one, is taken. Put it before "
                f"them, or leave it out."
            )
        first = next(((name, paths[i]) for i, name in names.items()), None)
        raise ValueError(
            f"{who} accepts none of the {len(names)} averaged leaves. It is called with the path of each, a tuple of "
            f"keys and positions" + ("." if first is None else f": that of {first[0]} is {first[1]!r}.")
        )
    return parts

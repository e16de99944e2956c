"""What travels in the background from one update to a later one.

An averager's state says what was sent. That it is under way already is remembered here, for each group: a cache, which
a restarted process does without. So `land` returns the same bits whether anything was begun or not.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._average import average_with, start_with
from funcavg._engine import Handle
from funcavg._trees import Options, family_of
from funcavg.collectives import as_collective

__all__ = ["begin", "is_under_way", "land"]


class _Flight(NamedTuple):
    vectors: Sequence[Any]  # what was sent
    handle: Handle[Any]


_UNDER_WAY: dict[int, _Flight] = {}  # by the collective's id: it need not be hashable
_KNOWN: set[int] = set()  # collectives with whose end it is forgotten


def begin(vectors: Sequence[Any], pieces: Sequence[Any], group: Any, options: Options) -> None:
    """Start to average ``pieces``, arrays in the memory of ``vectors``, neither of which may change until they land.

    Where a group's work is done by whoever waits for it, nothing is begun.
    """
    collective: Any = as_collective(group)
    key = id(collective)
    if (earlier := _UNDER_WAY.pop(key, None)) is not None:  # of a run that was given up
        earlier.handle.wait()
    if getattr(collective, "in_callers_thread", False):
        return
    if key not in _KNOWN:
        _KNOWN.add(key)
        weakref.finalize(collective, _forget, key)
    _UNDER_WAY[key] = _Flight(vectors, start_with(options, list(pieces), group))


def _forget(key: int) -> None:
    _KNOWN.discard(key)
    if (flight := _UNDER_WAY.pop(key, None)) is not None:
        flight.handle.drop()


def is_under_way(vectors: Sequence[Any], group: Any) -> bool:
    """Say whether these very bits are."""
    flight = _UNDER_WAY.get(id(as_collective(group)))
    return flight is not None and _are_same(flight.vectors, vectors)


def land(vectors: Sequence[Any], pieces: Sequence[Any], group: Any, options: Options) -> list[Any]:
    """Return the means of ``pieces``, of which the average may have begun."""
    flight = _UNDER_WAY.pop(id(as_collective(group)), None)
    if flight is not None:
        means = flight.handle.wait()
        if _are_same(flight.vectors, vectors):
            return list(means)
    return list(average_with(options, list(pieces), group))


def _are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        one is other or np.array_equal(_bits(one), _bits(other)) for one, other in zip(ours, theirs, strict=True)
    )


def _bits(vector: Any) -> Any:
    return np.asarray(family_of(vector).as_numpy(vector)).view(np.uint8)

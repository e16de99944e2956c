"""What is averaged in the background, from one update to a later one.

An averager's state says what was sent. That it is under way already is remembered here, for each group: a cache, which
a restarted process does without. So `land` returns the same bits whether anything was begun or not.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from funcavg._average import average_with, start_with
from funcavg._engine import Handle, session_of
from funcavg._trees import Options, family_of
from funcavg.averagers._base import is_local, log_synchronisation
from funcavg.collectives import as_collective

__all__ = ["begin", "forget", "is_under_way", "land", "turn_to"]


@dataclass
class _Flight:
    """It is kept when it has landed, too, until the run goes on: an update may be repeated."""

    owner: weakref.ref[Any]  # the averager that has begun it
    vectors: Sequence[Any]  # what was sent
    weight: float | None
    about: str  # and which fragment it is, of which step: ranks that hold equal vectors by chance do as the others
    handle: Handle[Any]
    sent: int  # bytes that this rank had sent before
    step: int  # at which its run is

    def is_of(self, owner: object, vectors: Sequence[Any], options: Options) -> bool:
        """Say whether these very bits are under way, or have landed."""
        if self.owner() is not owner or (self.about, self.weight) != (options.about, options.weight):
            return False
        return _are_same(self.vectors, vectors)

    def may_be_ended_by(self, owner: object) -> bool:
        """Say whether its run is over: its averager has gone, or has gone back."""
        return self.has_landed or self.owner() in (None, owner)

    @property
    def has_landed(self) -> bool:
        """Whether somebody has waited for it, so that the group is free."""
        return self.handle.is_over


_UNDER_WAY: dict[int, _Flight] = {}  # by the collective's id: it need not be hashable
_KNOWN: set[int] = set()  # collectives with whose end it is forgotten


def turn_to(owner: object, group: Any, step: int) -> None:
    """Let go of what the run at this step has no use for: what has landed before, or was begun by what it goes back on.

    Ranks go back together, so all of them begin anew, also one whose bits are those of the time before.
    """
    key = id(as_collective(group))
    flight = _UNDER_WAY.get(key)
    if flight is None or flight.owner() is not owner:
        return
    if step < flight.step or (flight.has_landed and step > flight.step):
        _let_go(key)
    flight.step = step


def begin(  # noqa: PLR0913  # private: what a flight is
    owner: object, vectors: Sequence[Any], pieces: Sequence[Any], group: Any, options: Options, who: str, step: int
) -> None:
    """Start to average ``pieces``, arrays in the memory of ``vectors``, neither of which may change until they land.

    Where a group's work is done by whoever waits for it, and where it is of one, nothing is begun.
    """
    collective: Any = as_collective(group)
    key = id(collective)
    if (flight := _UNDER_WAY.get(key)) is not None and flight.is_of(owner, vectors, options):
        return  # this update is repeated
    forget(owner, group)
    if collective.size == 1 or getattr(collective, "in_callers_thread", False):
        return
    if key not in _KNOWN:
        _KNOWN.add(key)
        weakref.finalize(collective, _end, key)
        session_of(collective).let_go = partial(_let_go, key)
    sent = _bytes_sent(collective)

    def keep(handle: Handle[Any]) -> None:
        _UNDER_WAY[key] = _Flight(weakref.ref(owner), vectors, options.weight, options.about, handle, sent, step)

    try:
        start_with(options, list(pieces), group, who, keep)  # refuses if another averager's is under way
    except BaseException:
        if key in _UNDER_WAY and _UNDER_WAY[key].has_landed:  # called off
            del _UNDER_WAY[key]
        raise


def _end(key: int) -> None:
    _KNOWN.discard(key)
    _end_of(key)


def _end_of(key: int) -> None:
    if (flight := _UNDER_WAY.pop(key, None)) is not None:
        flight.handle.drop()  # in a fork, it has not been waited for


def _let_go(key: int) -> None:
    """Wait for what is under way, whatever comes of it, and forget it."""
    if (flight := _UNDER_WAY.get(key)) is not None:
        with contextlib.suppress(Exception):  # that run's; if the group is lost, the next call says so
            flight.handle.wait()
        _end_of(key)


def forget(owner: object, group: Any) -> None:
    """Let go of what an earlier run has begun, if there is such, so that the group can be used.

    What another averager is about is left alone; not by ``None``, a run that begins.
    """
    key = None if is_local(group) else id(as_collective(group))
    flight = None if key is None else _UNDER_WAY.get(key)
    if key is not None and flight is not None and (owner is None or flight.may_be_ended_by(owner)):
        _let_go(key)


def is_under_way(owner: object, vectors: Sequence[Any], group: Any, options: Options) -> bool:
    """Say whether these very bits are, or will be averaged by whoever waits for them."""
    collective: Any = as_collective(group)
    if collective.size == 1 or getattr(collective, "in_callers_thread", False):
        return True
    flight = _UNDER_WAY.get(id(collective))
    if flight is None or not flight.is_of(owner, vectors, options):
        return False
    flight.vectors = vectors  # the next update need not compare their bits
    return True


def land(  # noqa: PLR0913  # as `begin`
    owner: object, vectors: Sequence[Any], pieces: Sequence[Any], group: Any, options: Options, what: str
) -> list[Any]:
    """Return the means of ``pieces``, of which the average may have begun; log that ``what`` has been averaged."""
    collective: Any = as_collective(group)
    start, flight = time.perf_counter(), _UNDER_WAY.get(id(collective))
    if flight is not None and not flight.is_of(owner, vectors, options):
        forget(owner, group)
        flight = None
    if flight is None:
        sent = _bytes_sent(collective)
        means = average_with(options, list(pieces), group)
    else:
        sent, landed_before = flight.sent, flight.has_landed
        try:
            means = flight.handle.wait()
        except Exception:
            _end_of(id(collective))
            raise  # what interrupts, such as Ctrl-C, leaves it under way
        if landed_before:  # this update is repeated
            return list(means)
    sent, seconds = _bytes_sent(collective) - sent, time.perf_counter() - start
    log_synchronisation(what, len(pieces), options, sent, f"{seconds:.6f} seconds waited")
    return list(means)


def _bytes_sent(collective: Any) -> int:
    return int(getattr(collective, "bytes_sent", 0))


def _are_same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(ours) == len(theirs) and all(
        one is other or (not _is_gone(one) and np.array_equal(_bits(one), _bits(other)))
        for one, other in zip(ours, theirs, strict=True)
    )


def _is_gone(vector: Any) -> bool:
    """Say whether it was donated to a program of JAX's."""
    return bool(getattr(vector, "is_deleted", bool)())


def _bits(vector: Any) -> Any:
    on_host = vector.cpu() if hasattr(vector, "cpu") else vector  # the same, if it is there
    return np.asarray(family_of(on_host).as_numpy(on_host)).view(np.uint8)

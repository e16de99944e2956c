"""A call in the background: what `start_average` returns, and the thread behind it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar, cast

from funcavg._compile import not_compiled
from funcavg._device import Mark, side_streams, use_here
from funcavg._engine.engine import carry_out
from funcavg._engine.session import session_of
from funcavg._trees import Request
from funcavg.collectives.base import Collective

__all__ = ["Handle", "depart"]

T = TypeVar("T")


class Handle(Generic[T]):
    """An average under way. Made by `funcavg.start_average`."""

    def __init__(self, result: Any, flight: Flight | None = None) -> None:
        self._one_at_a_time = threading.Lock()
        self._result, self._flight = result, flight

    @not_compiled
    def wait(self) -> T:
        """Wait for the other ranks and return the averaged tree; raise what `funcavg.average` raises.

        Can be called again, also after an interruption, and from several threads: all get the same tree or error.
        """
        with self._one_at_a_time:
            if self._flight is not None:
                self._result = self._flight.land()
                self._flight = None
        if isinstance(self._result, BaseException):
            raise self._result
        return cast("T", self._result)

    def done(self) -> bool:
        """Say whether there is nothing left to wait for in the background.

        Always true where all work is done inside ``wait()``: leaves on a GPU, groups that cannot be duplicated.
        """
        flight = self._flight
        return flight is None or flight.landed()

    @property
    def is_over(self) -> bool:
        """Whether somebody has waited for the result, or it was interrupted before it began."""
        return self._flight is None or self._flight.called_off

    def drop(self) -> None:
        """Give up the result, and any error: as who drops the handle does, but without a warning."""
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.abandon()

    def __del__(self) -> None:
        flight: Flight | None = getattr(self, "_flight", None)
        if flight is not None and not flight.called_off:
            self.drop()
            warnings.warn(
                "a handle of start_average was dropped without wait(): its result is lost, and so is any error",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


class Flight:
    """The background of one call. It holds the session, which has been entered, until it is waited for or abandoned."""

    def __init__(
        self,
        request: Request,
        collective: Collective,
        inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._request, self._session = request, session_of(collective)
        self._collective: Any = collective
        self._inside = inside  # what the work must be done in
        self._outcome: Any = RuntimeError("start_average: it was interrupted")  # or the tree, or another exception
        torch = sys.modules.get("torch")
        inference = torch is not None and torch.is_inference_mode_enabled()
        self._mode = torch.inference_mode if torch is not None and inference else contextlib.nullcontext
        jax = sys.modules.get("jax")
        x64 = None if jax is None else jax.config.jax_enable_x64
        self._width = contextlib.nullcontext if jax is None or x64 is None else lambda: jax.enable_x64(x64)
        self._guard, self.pid = threading.RLock(), os.getpid()  # gc may drop the handle inside
        self._holds = True  # the session
        self._over, self._abandoned = threading.Event(), False
        devices = set() if request.layout is None else {leaf.device for leaf in request.layout.leaves} - {""}
        self._given = Mark(devices)  # wait() may be called on other streams than those that write the leaves
        in_callers_thread = getattr(collective, "in_callers_thread", False)
        self._flying = self.called_off = False
        self._waits_for_caller = in_callers_thread or (bool(devices) and not request.options.aside)
        self._devices = set() if self._waits_for_caller else devices  # on which the thread has streams of its own
        self._results: list[Any] = []  # that have been made on those
        self._thread: threading.Thread | None = None

    def take_off(self) -> None:
        """Begin."""
        if self._waits_for_caller:
            self._session.pause()  # the call is over the group as it is in wait()
        else:
            with _AIR:
                _IN_THE_AIR.add(self)
            self._thread = threading.Thread(target=self._fly, name="funcavg start_average", daemon=True)
            self._thread.start()

    def call_off(self) -> None:
        """Give the session back, and do not begin, if that is in time."""
        with self._guard:
            self.called_off = not self._flying
        if self.called_off:
            self._outcome = RuntimeError("start_average: it was interrupted before it began")
            self._thread = None  # which has not run, and keeps this
            self._end()
            self._leave()
            self._over.set()

    def _fly(self) -> None:
        with self._guard:
            if self.called_off or self._flying:
                return
            self._flying = True
        try:
            aside = side_streams(self._devices) if self._devices else contextlib.nullcontext()
            with self._inside(), self._mode(), self._width(), aside:  # those of the caller's thread
                self._given.wait()
                if self._waits_for_caller:
                    self._session.resume("start_average")
                results = carry_out(self._request, self._collective)
                self._results = results if self._devices else []
                self._outcome = self._request.rebuild(results)
        except BaseException as error:  # raised by wait()
            _clear_frames(error)
            self._outcome = error
        finally:
            collective = self._collective
            with self._guard:
                if not self._waits_for_caller:
                    self._collective = None  # whoever keeps a handle does not keep the group
                self._over.set()
                if self._abandoned:
                    self._leave()
            del collective  # maybe the last who knew it: what ends with it may abandon this very flight
            self._end()

    def _end(self) -> None:
        with _AIR:
            _IN_THE_AIR.discard(self)

    def _leave(self) -> None:
        """Give the session back, once: it may be another call's by now."""
        if self._holds:
            self._holds = False
            self._session.leave()

    def landed(self) -> bool:
        """Say whether the thread is done, if there is one."""
        return self._waits_for_caller or self._over.is_set()

    def land(self) -> Any:
        """Wait, if interrupted (Ctrl-C) again and again, and return the tree or the exception."""
        if self.pid != os.getpid() and not self._over.is_set():  # that thread is not here
            raise RuntimeError(
                f"wait: this process was forked from the one that the group belongs to ({self.pid}), where the average "
                f"is under way. Wait there."
            )
        if self._waits_for_caller:
            self._fly()
            self._over.set()  # where it was interrupted, too
        while not self._over.wait(0.5):  # a signal may have come to another thread, which does not wake this one
            pass  # and no join, which an interrupt breaks (CPython issue 90882)
        use_here(self._results)
        self._leave()
        return self._outcome

    def abandon(self) -> None:
        """Give the session back, now or when the thread is done."""
        if self.pid != os.getpid() or self.called_off:  # a fork has none of it
            return
        with self._guard:
            self._abandoned = True
            if self._waits_for_caller:
                # Nothing was sent, while other ranks wait for it: they must not meet this rank's next call instead.
                self.give_up("a handle of start_average was dropped without wait()")
            if self._waits_for_caller or self._over.is_set():
                self._leave()

    def give_up(self, why: str) -> None:
        """Spend the group."""
        self._session.spend(RuntimeError(why), late_writes=True)
        if hasattr(self._collective, "abort"):
            self._collective.abort()

    def end_within(self, seconds: float) -> None:
        """Wait for the thread to end."""
        if self._thread is not None:
            with contextlib.suppress(RuntimeError):  # it has not begun
                self._thread.join(seconds)


def depart(
    who: str,
    request: Request,
    collective: Collective,
    *,
    inside: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    keep: Callable[[Handle[Any]], None] | None = None,
) -> Handle[Any]:
    """Begin a call. ``keep`` gets its handle first: who is interrupted (Ctrl-C) here has either begun nothing, or that.

    ::

        this thread   keep ─ start ─ ... ─✕ Ctrl-C: call off ──► too late: the handle knows what is under way
        the new one                   fly ─────────────────────►
    """
    session = session_of(collective)
    session.enter(who, request.options.about)
    flight: Flight | None = None
    try:
        flight = Flight(request, collective, inside)
        handle: Handle[Any] = Handle(None, flight)
        if keep is not None:
            keep(handle)
        flight.take_off()
    except BaseException:  # or no thread to be had
        if flight is None:
            session.leave()
        else:
            flight.call_off()
        raise
    return handle


def _clear_frames(error: BaseException | None) -> None:
    """Let go of what the frames of a traceback hold: the group, for one, which whoever keeps a handle does not keep."""
    import traceback  # which would be a tenth of the time that importing funcavg takes

    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


_IN_THE_AIR: weakref.WeakSet[Flight] = weakref.WeakSet()
_AIR = threading.RLock()


@atexit.register
def _end_flights() -> None:
    """End what is under way when the interpreter exits: a thread inside Gloo would take the process down with it."""
    with _AIR:
        flights = [flight for flight in _IN_THE_AIR if flight.pid == os.getpid()]  # not those of a process forked from
    for flight in flights:
        if not flight.landed():
            flight.give_up("the interpreter exits")
    for flight in flights:
        flight.end_within(5.0)

"""Waits inside a library's own code, which signals must not wait for: Ctrl-C, SIGTERM, a scheduler's SIGUSR1.

Python runs signal handlers in the main thread, between two steps of its interpreter, and a wait in C++ is one step,
however long. So a thread of ours waits there, and the main thread waits for that thread on a queue, where handlers run.
Other threads run no handlers, and wait themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

__all__ = ["LINGER", "Waiter"]

LOOK = 0.5  # seconds: a signal may have come to another thread, which does not wake the main one
WATCH = 0.05  # seconds between two looks at something else that may end the wait
PARTING = 5.0  # seconds that the end of the process waits for such calls
LINGER = 0.5  # seconds that a call may take to end which nobody needs to have ended
T = TypeVar("T")


class Waiter:
    """Does for the main thread what blocks, in a thread that is kept. One errand at a time."""

    def __init__(self) -> None:
        self._errands: SimpleQueue[_Errand[Any] | None] | None = None

    def run(
        self,
        call: Callable[[], T],
        interrupt: Callable[[], None],
        *,
        linger: float = math.inf,
        watch: Callable[[], None] | None = None,
    ) -> T:
        """Return ``call()``, or raise what it raises, or what a signal handler or ``watch`` raises meanwhile.

        In the latter cases ``interrupt`` must make the call end, and this raises when it has ended: then nothing
        touches the caller's memory any more. A call that touches none may be left behind after ``linger`` seconds.
        Further signals may break off ``interrupt``, which is then begun again. ``watch`` is called from time to time.
        """
        if watch is None and threading.current_thread() is not threading.main_thread():
            return call()
        try:
            errands = self._served()
        except RuntimeError as error:
            if "start new thread" not in str(error):  # a signal handler's own
                raise
            return call()  # no thread can be started: better a call whose signals wait than none
        errand = _Errand(call)

        def end() -> None:
            errand.call = None  # in case it has not begun
            interrupt()
            errands.put(errand)  # in case it has not been put there; an errand that is done is not done again
            _outlast(errand, linger)

        try:
            errands.put(errand)
            while not errand.is_over_within(LOOK if watch is None else WATCH):
                if watch is not None:
                    watch()
        except BaseException:  # Two signals may be pending, of which the second is raised as soon as `end` is called.
            try:
                end()
            except BaseException:
                try:
                    end()
                except BaseException:
                    end()
            raise
        return errand.outcome()

    def _served(self) -> SimpleQueue[_Errand[Any] | None]:
        """Return the queue that the thread takes its errands from. The thread ends with this object."""
        if self._errands is None:
            errands: SimpleQueue[_Errand[Any] | None] = SimpleQueue()
            weakref.finalize(self, errands.put, None).atexit = False  # first, lest a signal leave a thread behind
            threading.Thread(target=_serve, args=(errands,), name="funcavg waits", daemon=True).start()
            self._errands = errands
        return self._errands


class _Errand(Generic[T]):
    """A call, and what came of it."""

    def __init__(self, call: Callable[[], T]) -> None:
        self.call: Callable[[], T] | None = call
        self._result: T | None = None
        self._error: BaseException | None = None
        self._over: SimpleQueue[None] = SimpleQueue()

    def do(self) -> None:
        """Make the call, once."""
        call, self.call = self.call, None
        try:
            if call is not None:
                self._result = call()
        except BaseException as error:  # raised where it is waited for
            self._error = error
        call = None  # before anybody goes on: it holds the caller's memory
        self._over.put(None)

    def is_over_within(self, seconds: float) -> bool:
        """Say whether the call has ended, and wait so long for it."""
        try:
            self._over.get(timeout=seconds)
        except Empty:
            return False
        return True

    def outcome(self) -> T:
        """Return the result, or raise the error, and keep neither."""
        error, self._error = self._error, None
        if error is None:
            return cast("T", self._result)
        try:
            raise error
        finally:
            del error  # whose traceback holds this frame


def _serve(errands: SimpleQueue[_Errand[Any] | None]) -> None:
    while (errand := errands.get()) is not None:
        errand.do()
        del errand


def _outlast(errand: _Errand[Any], seconds: float) -> None:
    """Wait until an errand is over, whatever further signals bring: the first one's exception is on its way."""
    until = time.monotonic() + seconds
    _LEFT_BEHIND.add(errand)
    while time.monotonic() < until:
        with contextlib.suppress(BaseException):
            if errand.is_over_within(min(LOOK, max(until - time.monotonic(), 0.0))):
                _LEFT_BEHIND.discard(errand)
                return


_LEFT_BEHIND: set[_Errand[Any]] = set()


@atexit.register
def _wait_for_those_left_behind() -> None:
    """A thread that comes back from a library when the interpreter is gone takes the process down with it."""
    until = time.monotonic() + PARTING
    for errand in list(_LEFT_BEHIND):
        _outlast(errand, max(until - time.monotonic(), 0.0))

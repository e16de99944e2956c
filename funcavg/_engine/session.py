"""What is remembered of a collective between calls: whether it is usable, and the plans and memory of its buckets.

One call at a time: a session is entered by the thread that averages and by nobody else until it is done.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from funcavg._engine.buckets import Slots, bucket_bytes, host_memory
from funcavg._engine.device_slots import DeviceSlots
from funcavg._errors import PeerLostError
from funcavg.collectives.base import Collective
from funcavg.collectives.rows import Renewable

if TYPE_CHECKING:
    from funcavg._engine.codes import CodeSlots
    from funcavg._engine.crossing import Crossing
    from funcavg.collectives.node import Node

__all__ = ["Session", "nothing_is_late", "same_configuration", "session_of"]

PLANS = 8  # remembered per collective
T = TypeVar("T")


class Session:
    """State of one collective, in one configuration: where a transport is configured anew, all of it goes."""

    def __init__(self, collective: Collective) -> None:
        self._collective = weakref.ref(collective)  # which keeps this
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._spent: str | None = None
        self._busy_with, self._cure = "", ""
        self.let_go: Callable[[], None] | None = None  # ends what an averager has under way, for `forget`
        self._slots: dict[str, Any] = {}
        self._node: Node | None = None
        self._begin_anew()

    def _begin_anew(self, *, poison: bool = True) -> None:
        """Forget everything: what was remembered is of other ranks. ``poison``: let those of a node hear of it."""
        collective = self._collective()
        assert collective is not None
        self.configuration = _configuration(collective)
        self._size = collective.size
        self.bucket_bytes = bucket_bytes(collective.size)
        self._drop(poison=poison)
        self._looked_for_node = collective.size == 1
        self._spent = None

    def _drop(self, *, poison: bool) -> None:
        self._slots, self._plans = {}, OrderedDict[Hashable, Any]()
        node, self._node = self._node, None
        if node is not None:
            node.close(poison=poison)

    @contextmanager
    def entered(self, what: str) -> Iterator[None]:
        """Hold the session for one call; raise at once if it is spent or another call is under way."""
        self.enter(what)
        try:
            yield
        finally:
            self.leave()

    def enter(self, what: str, about: str = "") -> None:
        """Begin a call; ``about``: what of an averager's, which ends in a later update."""
        self._refuse_in_a_fork(what)
        if not self._lock.acquire(blocking=False):
            if self._spent is not None:
                raise self._spent_error(what)
            raise RuntimeError(
                f"{what}: {self._busy_with} is still under way on this group. Only one call at a time can use a group: "
                f"{self._cure} first, or use a second group."
            )
        try:
            self.resume(what)
        except BaseException:
            self._lock.release()
            raise
        self._busy_with = f"{what} ({about})" if about else what
        self._cure = "go on to the update that applies it, or funcavg.forget(group) on all ranks," if about else ""
        self._cure = self._cure or "wait for its handle"

    def _refuse_in_a_fork(self, what: str) -> None:
        if self._pid != os.getpid() and self._size > 1:
            raise RuntimeError(
                f"{what}: this process was forked from the one that the group belongs to ({self._pid}), and has no "
                f"part in it. Average where the group was made."
            )

    def leave(self) -> None:
        """End a call."""
        self.pause()
        self._lock.release()

    def resume(self, what: str) -> None:
        """Take the collective as it is configured now."""
        collective: Any = self._collective()
        renewable = isinstance(collective, Renewable)
        if renewable:
            collective.begin()
        try:
            if not _are_equal(_configuration(collective), self.configuration):
                self._begin_anew()
            if self._spent is not None and not (renewable and collective.tells_nothing):
                raise self._spent_error(what)
        except BaseException:
            self.pause()
            raise

    def pause(self) -> None:
        """Let the collective be configured anew."""
        collective: Any = self._collective()
        if isinstance(collective, Renewable):
            collective.end()

    def confirm(self, timeout: float) -> TypeError | None:
        """Make sure that all ranks have the same configuration, if this one cannot tell; see `BorrowedCollective`."""
        collective: Any = self._collective()
        if not isinstance(collective, Renewable):
            return None
        refusal = collective.confirm(timeout)
        if not _are_equal(_configuration(collective), self.configuration):
            self._begin_anew()
        return refusal

    def forget(self, group: Any) -> None:
        """Begin anew, on all ranks alike."""
        collective: Any = self._collective()
        self._refuse_in_a_fork("forget")
        if self.let_go is not None:
            self.let_go()
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(f"forget: {self._busy_with} is still under way on this group: {self._cure} first.")
        try:
            if isinstance(collective, Renewable):
                collective.renew(group)
            self._begin_anew(poison=False)  # others may be about to read that this rank has come to the last meeting
        finally:
            self._lock.release()

    def _spent_error(self, what: str) -> PeerLostError:
        return PeerLostError(
            f"{what}: this group is spent, since an earlier call on it {self._spent}. Make a new group and start "
            f"from one rank's parameters or a checkpoint."
        )

    def spend(self, error: BaseException, *, late_writes: bool) -> Any:
        """Declare the group unusable: ranks may no longer agree about where in a call they are.

        ``late_writes``: whether a transfer that has failed may still write to the memory of buckets. Returns what is
        kept for it, for `nothing_is_late`.
        """
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._spent = f"{'was interrupted by a signal' if _was_signal(error) else 'failed'} ({words})"
        slots = self._slots
        if late_writes:
            _GRAVEYARD.append(slots)
        self._drop(poison=True)
        return slots

    def node(self, collective: Any, timeout: float) -> Node | None:
        """Return the ranks of this host that share memory; look for them at the first call, together with all ranks."""
        if not self._looked_for_node:
            if hasattr(collective, "among") and sys.platform == "linux":
                from funcavg.collectives.discovery import discover

                self._node = discover(collective, timeout)
            self._looked_for_node = True
        return self._node

    @property
    def gather(self) -> Any:
        """The gather of the node, once that is known; None before, and where there is none."""
        return None if self._node is None else self._node.gather

    def crossing(self, node: Node) -> Crossing | None:
        """Return this rank's way to other nodes, None if there is none or other ranks of its node see to it."""
        if "crossing" not in self._slots and len(node.nodes) > 1:
            from funcavg._engine.crossing import Crossing

            self._slots["crossing"] = Crossing(node.channel, node.slot_bytes // node.shards)
        return self._slots.get("crossing")

    def slots(self) -> Slots:
        """Return the bucket memory on the host."""
        if "cpu" not in self._slots:
            self._slots["cpu"] = Slots(host_memory, self.bucket_bytes)
        slots: Slots = self._slots["cpu"]
        return slots

    def code_slots(self) -> CodeSlots:
        """Return the memory of a wire's codes."""
        if "codes" not in self._slots:
            from funcavg._engine.codes import CodeSlots

            self._slots["codes"] = CodeSlots()
        slots: CodeSlots = self._slots["codes"]
        return slots

    def device_slots(self, device: str) -> DeviceSlots:
        """Return the bucket memory on an accelerator, by torch's name of it."""
        if device not in self._slots:
            self._slots[device] = DeviceSlots(device)
        slots: DeviceSlots = self._slots[device]
        return slots

    def remember(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return ``make()``, or what it returned for this key before."""
        if key in self._plans:
            self._plans.move_to_end(key)
        else:
            self._plans[key] = make()
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        result: T = self._plans[key]
        return result


def _configuration(collective: Any) -> tuple[Any, ...]:
    """Return what changes when a group is configured anew: with other ranks, though their number be the same."""
    return collective.rank, collective.size, getattr(collective, "configuration", None)


def _are_equal(one: Any, other: Any) -> bool:
    """Say whether configurations are equal; a user's may be of a type that does not say, and is new then."""
    try:
        return bool(one == other)
    except Exception:
        return False


def same_configuration(before: Any, session: Session) -> Any:
    """Return a session's configuration; raise if it is not that of before: None, or that of a forward pass.

    A derivative over other ranks than the values would be a wrong number.
    """
    if before is not None and before != session.configuration:
        raise PeerLostError(
            f"average: the forward pass went over rank {before[0]} of {before[1]} of this group, which has been "
            f"configured anew since: now it is rank {session.configuration[0]} of {session.configuration[1]}. Take "
            f"the forward pass again."
        )
    return session.configuration


def _was_signal(error: BaseException) -> bool:
    """Say whether a signal handler has raised it, such as that of Ctrl-C."""
    import signal
    import traceback

    if isinstance(error, KeyboardInterrupt):
        return True
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return any(frame.f_code in handlers for frame, _ in traceback.walk_tb(error.__traceback__))


def _code_of(handler: Any) -> Any:
    """Return the code of a function, a method, a partial, or an object that can be called."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not hasattr(handler, "__code__"):
        handler = type(handler).__call__
    return getattr(handler, "__code__", None)


_GRAVEYARD: list[Any] = []


def nothing_is_late(slots: Any) -> None:
    """Free what was kept for transfers that have all ended after all."""
    _GRAVEYARD[:] = [kept for kept in _GRAVEYARD if kept is not slots]


_SESSIONS: dict[int, Session] = {}  # by id: a user's transport need not be hashable
_GUARD = threading.Lock()


def session_of(collective: Collective) -> Session:
    """Return the session of a collective; it lives as long as the collective."""
    key = id(collective)
    with _GUARD:
        if key not in _SESSIONS:
            try:
                weakref.finalize(collective, _SESSIONS.pop, key, None)
            except TypeError:
                cure = "Add '__weakref__' to its __slots__."
                raise TypeError(f"average: group {collective!r} must allow weak references. {cure}") from None
            _SESSIONS[key] = Session(collective)
        return _SESSIONS[key]

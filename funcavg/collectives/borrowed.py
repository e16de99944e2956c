"""Ranks of a process group of any class but torch's own, such as torchft's, over its own sends and receives.

Such a group may be configured anew at any time, also in another thread: with other ranks, or with the same number of
others. A call takes the group that moves the bytes, below whatever wraps it, once, and uses it to its end. What has
been remembered of a *configuration* must not outlive it:

- Where another group moves the bytes than in the last call, or a wrapper counts another quorum, everything begins anew.
- Where it is no group of torch's own that moves the bytes, nothing tells. There each call begins with a message to
  every rank, over the group's own transfers, of what this rank and the others have drawn together when they last
  began anew: the *token*. Where tokens differ, all begin anew, in that call. So a rank that has come into the place of
  another is not taken for it.

All begin anew with a meeting, which also sees whether the group can be served at all::

    rank 0   "00 <nonce>" with tag 2, tag 3 │ waits for tag 3, then tag 2   token = digest of all nonces
    rank 1   "01 <nonce>" with tag 2, tag 3 │ waits for tag 3, then tag 2   token = digest of all nonces
"""

from __future__ import annotations

import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from funcavg._errors import FuncavgError, PeerLostError
from funcavg.collectives.base import Pending
from funcavg.collectives.rows import Ways
from funcavg.collectives.tagged import SPECIAL, TaggedRows, close_connections
from funcavg.collectives.waiting import Waiter

__all__ = ["BorrowedCollective"]

SAYS_TOKEN, SAYS_NONCE, SAYS_NONCE_AGAIN = SPECIAL + 1, SPECIAL + 2, SPECIAL + 3  # tags
TOKEN = 16  # bytes


class _Found(NamedTuple):
    """What moves the bytes of a group, and what those that wrap it say."""

    mover: Any
    quorums: tuple[Any, ...] = ()
    timeout: float | None = None


def _find(group: Any) -> _Found | None:
    """Go down through wrappers (torchft's keep what they wrap in ``_pg``); None if the last one wraps nothing now."""
    quorums, timeout = list[Any](), None
    while group is not None:
        if type(group) is dist.ProcessGroup or not hasattr(group, "_pg"):
            return _Found(group, tuple(quorums), timeout)
        quorums.append(getattr(group, "_quorum_id", None))
        own = getattr(group, "_timeout", None)
        timeout = own.total_seconds() if isinstance(own, timedelta) else timeout
        group = group._pg
    return None


class BorrowedCollective(TaggedRows):
    """One rank of a group that is not ours to duplicate. One object for each group, whatever its configuration."""

    in_callers_thread = True
    advice = "An engine that configures the group anew has to hear of it, as torchft by manager.report_error(error)."

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group, self._kind = weakref.ref(group), type(group).__name__
        self._mover: Any = lambda: None  # a weak reference: a strong one would keep its sockets open
        self._taken: Any = None  # the same, for as long as a call lasts
        self._quorums: tuple[Any, ...] = ()
        self._guard, self._waiter = threading.Lock(), Waiter()
        self.default_timeout: float | None = None
        self.rank, self.size, self.configuration = 0, 1, 0
        self.look()

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of a {self._kind}>"

    # ---- which configuration it is

    def look(self) -> None:
        """See how the group is configured now, unless a call is under way."""
        self._see(unless_taken=True)

    def begin(self) -> None:
        """Take what moves the bytes, for one call."""
        self._taken = self._see()

    def end(self) -> None:
        """Let it go."""
        self._taken = None

    def _see(self, *, unless_taken: bool = False) -> Any:
        if unless_taken and self._taken is not None:
            return self._taken
        group = self._group()
        try:
            if group is not None:
                group.size()  # some wait until they are configured: torchft's ManagedProcessGroup
        except Exception as error:
            raise self._unconnected(error) from error
        found = None if group is None else _find(group)
        if found is None:
            raise self._unconnected()
        with self._guard:
            if unless_taken and self._taken is not None:  # meanwhile
                return self._taken
            try:
                rank, size = found.mover.rank(), found.mover.size()
            except Exception as error:
                raise self._unconnected(error) from error
            as_before = self._mover() is found.mover and self._quorums == found.quorums
            if not as_before or (rank, size) != (self.rank, self.size):
                self._refuse_what_cannot_be_served(found.mover, rank, size)
                self._mover, self._quorums = weakref.ref(found.mover), found.quorums
                self.tells_nothing = type(found.mover) is not dist.ProcessGroup  # which never changes its ranks
                self.rank, self.size, self.default_timeout = rank, size, found.timeout
                self.renew(group)
        return found.mover

    def _unconnected(self, error: Exception | None = None) -> PeerLostError:
        why = f" ({type(error).__name__}: {error})" if error is not None else ""
        return PeerLostError(
            f"average: this {self._kind} is connected to nobody now{why}: it is being configured, could not be, or has "
            f"been shut down. With torchft, call manager.wait_quorum() first, and manager.report_error(error) now."
        )

    def renew(self, _: Any) -> None:
        """Begin anew: with other ranks, for all that is known."""
        self.configuration += 1
        self._met, self._token = False, b""
        self.renumber()

    def _moved_on(self) -> None:
        """Raise if the group that the call has taken is not the user's any more."""
        group = self._group()
        found = None if group is None else _find(group)
        if found is None or found.mover is not self._taken:
            raise PeerLostError(
                f"{self.me()}: this {self._kind} was configured anew, or shut down, while the call was under way."
            )

    def progress(self) -> None:
        """While this rank waits in shared memory: see whether the group is still there."""
        self._moved_on()

    # ---- whether it can be served

    def _refuse_what_cannot_be_served(self, mover: Any, rank: int, size: int) -> None:
        kind = type(mover)
        if kind is dist.ProcessGroup:
            devices = {device.type for device in mover._device_types}
            if "cpu" not in devices:
                raise TypeError(
                    f"average: group is a {self._kind}, which moves the memory of {', '.join(sorted(devices))} only. "
                    f"funcavg needs one that moves the host's: with torchft, a ProcessGroupGloo."
                )
        elif size != dist.ProcessGroup.size(mover) and not _defines(kind, "rank"):
            raise TypeError(
                f"average: group is a {kind.__name__} of {size} ranks, each of which says it is rank {rank}: "
                f"the class overrides size(), but not rank(). With torchft, use a ProcessGroupGloo."
            )

    def confirm(self, timeout: float) -> TypeError | None:
        """Make sure that all ranks are in one configuration; begin anew where they are not, or have not yet met.

        Nothing is sent where the configuration can be seen and is not new. Returns what all ranks are to raise.
        """
        if self.size == 1 or (self._met and not self.tells_nothing):
            return None
        if self.tells_nothing:
            tokens = self._swap([(self._token.ljust(TOKEN, b"\0"), SAYS_TOKEN)], timeout)[0]
            if self._token and tokens == [self._token] * self.size:
                return None
            self.renew(None)
        nonce = self.rank.to_bytes(4, "little") + os.urandom(TOKEN - 4)
        again = nonce[:4] + b"again".ljust(TOKEN - 4, b"\0")
        nonces, echoes = self._swap([(nonce, SAYS_NONCE), (again, SAYS_NONCE_AGAIN)], timeout)
        ranks = [int.from_bytes(said[:4], "little") for said in nonces]
        fault = ""
        if b"\xff" * TOKEN in (*nonces, *echoes):
            fault = "what it receives does not reach the memory that it was given to receive into"
        elif any(said[4:] != again[4:] for said in echoes):
            fault = "it does not tell messages apart by their tags"
        elif ranks != list(range(self.size)):
            fault = f"its ranks 0 to {self.size - 1} say that they are ranks {', '.join(map(str, ranks))}"
        if fault:
            cure = "With torchft, use a ProcessGroupGloo."
            return TypeError(f"average: group is a {self._kind}, which cannot be used: {fault}. {cure}")
        self._token, self._met = hashlib.blake2b(b"".join(nonces), digest_size=TOKEN).digest(), True
        self.renumber(int.from_bytes(self._token[:4], "little"))
        return None

    def _swap(self, messages: list[tuple[bytes, int]], timeout: float) -> list[list[bytes]]:
        """Send short messages, each with its tag, to all; return what ranks have sent with each, in rank order.

        What is sent first is received last.
        """
        peers = self._peers()
        # Arrays of their own: torch warns of memory that is read-only.
        ours = [(np.array(list(said), np.uint8), tag) for said, tag in messages]
        theirs = [(np.full((self.size, len(said)), 0xFF, np.uint8), tag) for said, tag in messages]
        send = [(peer, said, tag) for said, tag in ours for peer in peers]
        receive = [(peer, said[peer], tag) for said, tag in reversed(theirs) for peer in peers]
        with self._translated():
            wait = self._waiting(self.start_tagged(self._taken, send, receive, timeout))
        wait()
        for (mine, _), (said, _) in zip(ours, theirs, strict=True):
            said[self.rank] = mine
        return [[row.tobytes() for row in said] for said, _ in theirs]

    # ---- moving bytes

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Start sends and receives."""
        with self._translated():
            if self.tells_nothing and self._taken.size() != self.size:
                raise PeerLostError(f"{self.me()}: this {self._kind} has {self._taken.size()} ranks now, in a call.")
            return self._waiting(self.start(self._taken, send, receive, timeout, channel=channel))

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn whatever a group of another's raises into PeerLostError: it may be gone in the middle of a call."""
        try:
            yield
        except FuncavgError:
            raise
        except Exception as error:
            raise PeerLostError(f"{self.me()}: this {self._kind} raised {type(error).__name__}: {error}.") from error

    def _waiting(self, finish: Pending) -> Pending:
        """Return what waits: in the caller's thread, or where Gloo moves the bytes, seeing whether it still may."""
        if self.stops_on_error:
            return partial(self._waiter.run, finish, self.abort, watch=self._moved_on)

        def wait() -> None:
            with self._translated():
                finish()

        return wait

    @property
    def stops_on_error(self) -> bool:
        """Whether `abort` can close the connections: where Gloo moves the bytes."""
        return self._gloo() is not None

    def _gloo(self) -> Any:
        mover = self._mover() if self._taken is None else self._taken
        if type(mover) is not dist.ProcessGroup:
            return None
        backend: Any = mover._get_backend(torch.device("cpu"))
        return backend if isinstance(backend, dist.ProcessGroupGloo) else None

    def abort(self) -> None:
        """Close the connections, though they are the user's: those that wait for this rank are to hear of it.

        Ranks may be at different places of a call. Where the group is not Gloo's, they wait for their own deadlines.
        """
        gloo = self._gloo()
        if gloo is not None:
            close_connections(gloo, self._peers())
        self._met, self._token = False, b""


def _defines(kind: type, method: str) -> bool:
    """Say whether a class, or one between it and torch's, has a method of its own."""
    return any(method in vars(base) for base in kind.__mro__[: kind.__mro__.index(dist.ProcessGroup)])

"""Ranks of an mpi4py communicator.

Bytes travel over a private duplicate of the user's communicator, so our messages never meet his. It is made at the
first call, and kept in an attribute of his communicator, with which it goes: freeing is collective, and so must never
happen in a destructor, which runs on each rank when it likes.

Every wait polls non-blocking calls up to a deadline and yields the processor in between. A request that nobody waits
for any more can be neither cancelled nor freed safely: it and its buffers are kept for good, on purpose. But where the
library goes on without lost ranks (ULFM), giving up revokes the duplicate: so every request ends, and all ranks that
wait in ours hear of it, also those that wait for another survivor::

    rank 0   waits for 2 ── MPI: 2 is dead ── revokes ── PeerLostError
    rank 1   waits for 0 ────────────────────── MPI: revoked ── PeerLostError
    rank 2   dies
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from mpi4py import MPI

from funcavg._device import current_stream
from funcavg._errors import PeerLostError
from funcavg.collectives.base import Pending
from funcavg.collectives.gpu_aware import is_gpu_aware
from funcavg.collectives.rows import Patience, Renewable, Rows, Ways
from funcavg.collectives.surviving import advice_for, is_fault_tolerant

__all__ = ["MPICollective", "MPIDeviceVerbs", "collective_of", "survives_losses"]

_LEAKED: list[Any] = []
ENDING = 0.3  # seconds that requests may take to end when their communicator has been revoked


def collective_of(comm: MPI.Comm) -> MPICollective | None:
    """Return the collective of a communicator, None if this rank is not in it (``COMM_NULL``)."""
    if comm == MPI.COMM_NULL:
        if comm in _MET:  # which a rank without a part in it never was
            raise ValueError("average: group is an MPI communicator that has been freed")
        return None
    if MPI.Is_finalized():
        raise RuntimeError(f"average: group={comm!r}, but MPI has been finalised")
    if comm in (MPI.COMM_WORLD, MPI.COMM_SELF) and not MPI.Is_initialized():  # else it is of an MPI session
        cure = "call MPI.Init(), or pass a communicator of your MPI session"
        raise RuntimeError(f"average: group={comm!r}, but MPI is not initialised yet: {cure}")
    if comm.Is_inter():
        raise TypeError(
            f"average: group={comm!r} is an intercommunicator, which has two sides and no common mean. Pass an "
            f"intracommunicator, such as intercomm.Merge()."
        )
    with _GUARD:
        if not _KEYVAL:
            _KEYVAL.append(MPI.Comm.Create_keyval(delete_fn=_free_with_its_communicator))
        kept: Any = comm.Get_attr(_KEYVAL[0])
        collective: MPICollective = kept or MPICollective(comm)
        if kept is None:
            comm.Set_attr(_KEYVAL[0], collective)
        _MET.add(comm)
    return collective


class _ByIdentity:
    """A set of objects, each until it is gone. Equality will not do: communicators that have been freed are equal."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Any]] = {}

    def add(self, item: Any) -> None:
        if item not in self:
            key = id(item)
            self._known[key] = weakref.ref(item, lambda _: self._known.pop(key, None))

    def __contains__(self, item: Any) -> bool:
        known = self._known.get(id(item))
        return known is not None and known() is item


_KEYVAL: list[int] = []
_MET = _ByIdentity()
_GUARD = threading.Lock()


def _free_with_its_communicator(_comm: Any, _keyval: int, collective: MPICollective) -> None:
    """Free the duplicate while all ranks free the communicator that it belongs to."""
    collective.free()


class MPICollective(Renewable, Rows):
    """One rank of a communicator."""

    def __init__(self, comm: MPI.Comm) -> None:
        self.rank, self.size = comm.rank, comm.size
        self.bytes_sent = 0
        self._alone_in_mpi = _thread_level() < MPI.THREAD_MULTIPLE
        self._users: MPI.Comm | None = comm
        self._watched: Any = MPI.Intracomm(comm) if survives_losses() else None  # another handle of the user's
        self._made: Any = None  # a duplicate that ranks have not yet met on
        self._comm: Any = None
        self._revoked: Any = None  # what `_comm` was before a loss
        self._under_way: dict[int, Any] = {}  # requests and their buffers, by number
        self._numbers = itertools.count()
        self._freed_by_finalize = comm in (MPI.COMM_WORLD, MPI.COMM_SELF)  # by handle: MPI may have sessions only
        self._gpu_aware = False

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of an MPI communicator>"

    @property
    def advice(self) -> str:  # type: ignore[override]
        """What to do when a rank is lost."""
        return advice_for(MPI.Get_library_version(), fault_tolerant=survives_losses())

    @property
    def in_callers_thread(self) -> bool:
        """Whether work must be done where the user's own calls of MPI are made.

        Below MPI_THREAD_MULTIPLE no other thread may call MPI while his does. And while his communicator is duplicated,
        he must not start an operation on it: Open MPI would mix up the two, on some ranks and not on others.
        """
        return self._alone_in_mpi or self._comm is None

    def _connected(self, timeout: float) -> Any:
        """Return the duplicate; make it with the other ranks at the first call."""
        if self._comm is None:
            if self._users is None:
                raise RuntimeError("average: the MPI communicator has been freed while a call was under way on it")
            everyone = "all ranks to call average on this communicator"
            with self._translate_errors():
                duplicate, request = self._users.Idup()
            self._finish(self._keep([request], duplicate), [], timeout, everyone)
            self._made = duplicate
            duplicate.Set_errhandler(MPI.ERRORS_RETURN)
            # Ranks may see different environments, and must take the same way.
            aware = np.array([is_gpu_aware(_memory_kinds(self._users), os.environ)], np.int8)
            with self._translate_errors():
                request = duplicate.Iallreduce(MPI.IN_PLACE, [aware, MPI.SIGNED_CHAR], MPI.MIN)
            self._finish(self._keep([request], aware), [], timeout, everyone)
            self._gpu_aware = bool(aware[0])
            self._comm, self._users, self._made = duplicate, None, None
        return self._comm

    def free(self) -> None:
        """Free the duplicate, together with all ranks; MPI_Finalize sees to those of the predefined communicators."""
        if self._under_way:  # it was a mistake to free it now, of which the call under way will tell
            self.abort()
        ours = [comm for comm in (self._comm, self._revoked) if comm is not None]
        self._comm, self._users, self._revoked, self._watched = None, None, None, None
        if not self._freed_by_finalize:
            for comm in ours:
                comm.Free()

    def abort(self) -> bool:
        """Give up the duplicate for good; say whether all transfers have ended.

        Where MPI survives lost ranks, nobody waits in vain for this one.
        """
        comm, under_way = self._comm or self._made, self._under_way
        self._comm, self._users, self._made, self._under_way = None, None, None, {}
        if comm is not None and survives_losses() and not MPI.Is_finalized():
            with suppress(MPI.Exception):
                comm.Revoke()
            # To be freed when his is: one that is gone would leave others' sends to it unanswered.
            self._revoked = comm
            if _all_end([request for requests, *_ in under_way.values() for request in requests]):
                return True
        if comm is not None or under_way:
            _LEAKED.append((comm, under_way))
        return False

    def renew(self, comm: MPI.Comm) -> None:
        """Duplicate the communicator anew at the next call. The old duplicate stays: freeing it is collective, too."""
        if self._comm is not None:
            _LEAKED.append(self._comm)
        self._comm, self._users = None, comm

    def begin(self) -> None:
        """Raise if the user has revoked his communicator."""
        if self._watched is not None and self._watched.Is_revoked():
            me = f"rank {self.rank} of {self.size}"
            raise PeerLostError(f"average: {me}: this communicator has been revoked. {self.advice}")

    def _hear_of_revocation(self) -> None:
        """While this rank waits, another may have given up, and have revoked the user's communicator."""
        if self._watched is not None and self._watched.Is_revoked():
            raise PeerLostError(f"rank {self.rank} of {self.size}: another rank has revoked the communicator.")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except MPI.Exception as error:
            reason = error.Get_error_string().strip().rstrip(".")
            me = f"rank {self.rank} of {self.size}"
            lost = self._lost() if survives_losses() else ""
            raise PeerLostError(f"{me}: MPI reports: {reason}{lost}.") from error

    def _lost(self) -> str:
        """Say whom MPI knows to be lost: MPI_Testall only says that something is wrong."""
        comm, ranks = self._comm or self._users, list[int]()
        with suppress(MPI.Exception):
            if comm is not None:
                failed, everyone = comm.Get_failed(), comm.Get_group()
                ranks = failed.Translate_ranks(group=everyone)
                failed.Free()
                everyone.Free()
        if not ranks:
            return " (another rank has given up)"
        return f" (lost: rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of the group)"

    def _keep(self, requests: list[Any], *buffers: Any) -> int:
        """Keep requests and what they read and write until `_finish`, or for good; return a number for them."""
        number = next(self._numbers)
        self._under_way[number] = requests, buffers
        return number

    def _finish(self, number: int, peers: Sequence[int], timeout: float, what: str = "") -> None:
        """Poll requests until all are complete. ``peers`` are those of the first ones, for the error to name."""
        patience = Patience(timeout)
        with self._translate_errors():
            while True:
                if number not in self._under_way:
                    raise PeerLostError(f"rank {self.rank} of {self.size} has given up.")
                requests = self._under_way[number][0]
                if MPI.Request.Testall(requests):
                    break
                if not patience.pause():
                    continue
                self._hear_of_revocation()
                if survives_losses():
                    for request in requests:  # MPI_Testall says nothing of one that has failed until all have ended
                        request.Test()
                if patience.is_over():
                    late = [p for p, request in zip(peers, requests, strict=False) if not request.Get_status()]
                    what = what or f"rank(s) {', '.join(map(str, sorted(set(late or peers))))}"
                    raise PeerLostError(
                        f"rank {self.rank} of {self.size} waited {patience.waited:.1f} s of {timeout:g} s for {what}."
                    )
        del self._under_way[number]

    def progress(self) -> None:
        """Let MPI work on operations of the user's own that are under way: it does so in calls only."""
        if self._comm is not None:
            with self._translate_errors():
                self._comm.Iprobe()
                self._hear_of_revocation()

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Start sends and receives. MPI keeps messages between two ranks in order, those of each tag apart."""
        comm = self._connected(timeout)
        tag = int(channel)
        requests: list[Any] = []
        number = self._keep(requests, send, receive)
        with self._translate_errors():
            requests += [comm.Irecv([row, MPI.BYTE], peer, tag) for peer, row in receive]
            requests += [comm.Isend([row, MPI.BYTE], peer, tag) for peer, row in send]
        self.bytes_sent += sum(row.nbytes for _, row in send)

        def wait() -> None:
            self._finish(number, [peer for peer, _ in (*receive, *send)], timeout)

        return wait

    def device_verbs(self, device_type: str) -> MPIDeviceVerbs | None:
        """Return the way for leaves in an accelerator's memory, or None if they go through the host."""
        return MPIDeviceVerbs(self) if self._gpu_aware and device_type in ("cuda", "xpu") else None


@functools.cache
def survives_losses() -> bool:
    """Say whether this job goes on when a rank dies."""
    return is_fault_tolerant(MPI.Get_library_version(), str(MPI.__file__))


def _all_end(requests: Sequence[Any]) -> bool:
    """Wait for requests on a communicator that has been revoked, whatever becomes of them; say whether all have ended.

    One at a time: MPI_Testall need not say which of several have failed.
    """
    patience = Patience(ENDING)
    for request in requests:
        while not _has_ended(request):
            if patience.pause() and patience.is_over():
                return False
    return True


def _has_ended(request: Any) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:
        return bool(request == MPI.REQUEST_NULL)


class MPIDeviceVerbs(Rows):
    """Moves buckets that lie in an accelerator's memory, where the MPI library can."""

    def __init__(self, owner: MPICollective) -> None:
        self._owner = owner
        self.rank, self.size = owner.rank, owner.size

    def averages_natively(self, *, weighted: bool) -> frozenset[str]:
        """Return no dtype: the kernel sums all of them."""
        return frozenset()

    def transfer(self, send: Ways, receive: Ways, timeout: float, *, channel: bool = False) -> Pending:
        """Send and receive device memory, once the current stream has written it: MPI knows nothing of streams."""
        for device in {row.device for _, row in send if row.device.type != "cpu"}:
            current_stream(device).synchronize()
        return self._owner.transfer(send, receive, timeout, channel=channel)


def _thread_level() -> int:
    """Return which threads may call MPI. Of sessions, libraries need not say it: then only the caller's may."""
    try:
        return MPI.Query_thread()
    except (MPI.Exception, NotImplementedError):
        return MPI.THREAD_SINGLE


def _memory_kinds(comm: MPI.Comm | None = None) -> str:
    """Return what the library says of the memory it takes; "" before MPI 4.1. A session's ``comm`` is asked itself."""
    try:
        info = MPI.COMM_WORLD.Get_info() if comm is None or MPI.Is_initialized() else comm.Get_info()
    except (MPI.Exception, NotImplementedError):
        return ""
    kinds = info.Get("mpi_memory_alloc_kinds") or ""
    info.Free()
    return str(kinds)

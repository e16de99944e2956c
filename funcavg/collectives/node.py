"""Ranks of one host meet in shared memory: the node stage. For every transport that can also join some of its ranks.

Every element is summed on exactly one rank: rank i reduces shard i of everybody's in-slot, and the mean goes into the
node's out-slot. Nobody waits for all others at once. Each rank counts, in words that all can read, how many buckets it
has FILLED, and of how many its shard is DONE; the others wait for these counts, each where it needs them::

    rank 0    copy in 2 ─► FILLED    reduce 1 ─► DONE    copy out 0    copy in 3 ─► FILLED    reduce 2 ...
                              │         ▲        │           ▲
                              └─────────┼────┐   └───────────┼────┐
                                        │    ▼               │    ▼
    rank 1         copy in 2 ─► FILLED ─┘    reduce 1 ─► DONE┘    copy out 0    copy in 3 ...

Who is ahead by a bucket or two goes on, so that no rank is as slow as the slowest one in each bucket.

Of several nodes, L is the number of ranks of the smallest. A bucket has L shards, and channel c joins the c-th ranks
of all nodes over the group's own transport: what crosses is each node's mean of shard c, and the weighted mean of these
is published in every node's out-slot. Crossing takes a few rounds (`schedule`'s delay) while other buckets are reduced.
"""

from __future__ import annotations

import os
import select
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from funcavg._errors import PeerLostError
from funcavg._memory import address_of
from funcavg.collectives.base import Buffer
from funcavg.collectives.rows import Patience, Rows
from funcavg.collectives.segment import HEADER, WORDS

__all__ = ["DONE", "FILLED", "MET", "POISON", "READ", "SLOTS", "TAKEN", "Node", "Rule", "rules", "schedule"]

SLOTS = 4  # of each kind: bucket k of a call is in slot k % SLOTS
POISON = -1
ROOM = 1024  # bytes of a header for what a rank says in a gather: two such, behind the words
APART = 128  # bytes between words: each has a cache line, and the one beside it, to itself
MET, FILLED, READ, DONE, TAKEN = range(5)  # the words of a rank: MET counts meetings, the others buckets


def schedule(buckets: int, delay: int = 0) -> Iterator[tuple[str, int]]:
    """Yield what a rank does in one call: (action, bucket). Who has no shard neither reduces nor publishes.

    ``delay`` is how many rounds a bucket takes to cross to other nodes and back. Without other nodes, what is reduced
    need not be published: it goes to the out-slot.
    """
    for k in range(buckets + delay + 2):
        if k < buckets:
            yield "copy in", k
        if 1 <= k <= buckets:
            yield "reduce", k - 1
        if delay and 1 + delay <= k <= buckets + delay:
            yield "publish", k - 1 - delay
        if 2 + delay <= k:
            yield "copy out", k - 2 - delay


class Rule(NamedTuple):
    """What an action on bucket k waits for, and what it makes known."""

    waits: int | None  # a word: those of all who count it must have come to k + 1 - behind
    behind: int
    tells: int | None  # the word that comes to k + 1


def rules(index: int, size: int, shards: int, *, crossing: bool) -> dict[str, Rule]:
    """Return the rule of each action of rank ``index`` of a node's ``size``, of which the first ``shards`` reduce.

    Most slots are free by themselves: who sees that a rank has filled bucket k knows that it has reduced k - 2, and,
    without other nodes, copied out k - 3. Only a rank without a shard sees nothing of this, and nothing is seen of it:
    READ keeps its in-slots, and TAKEN the out-slots that it reads, from being overwritten.
    """
    some_have_none, has_none = size > shards, index >= shards
    return {
        "copy in": Rule(READ if has_none else None, SLOTS, FILLED),
        "reduce": Rule(FILLED, 0, DONE if not crossing else READ if some_have_none else None),
        "publish": Rule(TAKEN if some_have_none else None, SLOTS, DONE),
        "copy out": Rule(DONE, 0, TAKEN if has_none else None),
    }


class Node:
    """This rank's place in the shared memory of its host."""

    def __init__(
        self, transport: Rows, nodes: list[list[int]], memory: list[Buffer], pidfds: Mapping[int, int]
    ) -> None:
        self.nodes = nodes
        self.here = next(number for number, members in enumerate(nodes) if transport.rank in members)
        members = nodes[self.here]
        self.index, self.size = members.index(transport.rank), len(members)
        self.shards = min(map(len, nodes))
        self.rows = self.shards * len(nodes)  # of a bucket
        self.rules = rules(self.index, self.size, self.shards, crossing=len(nodes) > 1)
        self.slot_bytes = (len(memory[0]) - HEADER) // (2 * SLOTS)
        self.channel: Rows | None = None
        if len(nodes) > 1 and self.index < self.shards:
            self.channel = transport.among([members[self.index] for members in nodes])
        self._transport, self._gathered = weakref.ref(transport), 0  # weak: the session of a transport keeps its node
        self._rank, self._group_size = transport.rank, transport.size
        self._memory = memory
        self._meetings, self._buckets, self._closed, self._pid = 0, 0, False, os.getpid()
        lock = threading.Lock()  # of one thread at a time, as all of this
        lock.acquire()
        self._release, self._acquire = lock.release, lock.acquire
        words = [[buffer[APART * i : APART * i + 8].view(np.int64) for i in range(1 + TAKEN)] for buffer in memory]
        self._words = words[self.index]
        counted = {READ: range(self.shards), DONE: range(self.shards), TAKEN: range(self.shards, self.size)}  # by whom
        self._others = [
            [(members[i], words[i][word]) for i in counted.get(word, range(self.size)) if i != self.index]
            for word in range(1 + TAKEN)
        ]
        self._pidfds = pidfds
        self._let_go = weakref.finalize(self, _close, list(pidfds.values()), os.getpid())

    def slots(self, number: int, together: int = 1) -> tuple[list[Buffer], Buffer]:
        """Return everyone's in-slots and the node's out-slot of a bucket; some may be taken ``together`` as one."""
        nbytes = together * self.slot_bytes
        begin = HEADER + number % (SLOTS // together) * nbytes
        everyone = [memory[begin : begin + nbytes] for memory in self._memory]
        begin += SLOTS * self.slot_bytes
        return everyone, self._memory[0][begin : begin + nbytes]

    def words(self) -> npt.NDArray[np.uint64]:
        """Return a row for each word: where this rank's own lies, how many others count it, and where theirs lie."""
        rows = np.zeros((len(self._words), 1 + self.size), np.uint64)
        for word, own in enumerate(self._words):
            others = [address_of(theirs) for _, theirs in self._others[word]]
            rows[word, : 2 + len(others)] = [address_of(own), len(others), *others]
        return rows

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Return every rank's payload: in memory, but where there are other nodes, or the header has no room for it."""
        transport = self._transport()
        assert transport is not None
        if len(self.nodes) > 1 or len(payload) > ROOM:
            return transport.gather(payload, timeout)
        # Two places in turns: one is written to again after the next meeting, to which all come when they have read it.
        self._gathered += 1
        begin = WORDS + ROOM * (self._gathered % 2)
        self._memory[self.index][begin : begin + len(payload)] = np.frombuffer(payload, np.uint8)
        self.meet(timeout)
        transport.bytes_sent += len(payload) * (self.size - 1)
        return [memory[begin : begin + len(payload)].tobytes() for memory in self._memory]

    def meet(self, timeout: float) -> None:
        """Wait until every rank of the node has come as often as this one."""
        self._meetings += 1
        self.tell(MET, self._meetings)
        self.wait(MET, self._meetings, timeout)

    def begin(self, buckets: int) -> int:
        """Begin a call of so many buckets; return how many there have been before. Words count on, and never back."""
        before = self._buckets
        self._buckets += buckets
        return before

    def tell(self, word: int, count: int) -> None:
        """Let others see how far this rank has come."""
        self._release()  # a fence, which is a release and then an acquire: what was written to slots is there before
        self._acquire()  # the word says so
        self._words[word][0] = count

    def wait(self, word: int, count: int, timeout: float) -> None:
        """Wait until all others who count a word have come that far.

        One whose word says POISON, or whose process has ended before, never will.
        """
        if self._closed:
            raise PeerLostError(f"{self._me()} has given up.")
        for _, theirs in self._others[word]:
            if theirs.item() < count:
                self._wait_for_all(word, count, Patience(timeout))
                break
        self._release()  # and nothing is read from slots before it has said so
        self._acquire()

    def _wait_for_all(self, word: int, count: int, patience: Patience) -> None:
        for peer, theirs in self._others[word]:
            while (said := theirs.item()) < count:
                if said == POISON:
                    raise PeerLostError(f"{self._me()} waited for rank {peer} on this host, which had given up.")
                if patience.pause():
                    self._look_for_trouble(peer, theirs, word, count, patience)
                    transport = self._transport()
                    if transport is not None:  # lest one wait in vain for this rank to do its part in something else
                        transport.progress()

    def _look_for_trouble(self, peer: int, theirs: Any, word: int, count: int, patience: Patience) -> None:
        pidfd = self._pidfds.get(peer)
        if pidfd is not None:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            ended = any(events & select.POLLIN for _, events in poll.poll(0))
            if ended and theirs.item() < count:  # it may have come so far, and ended afterwards
                raise PeerLostError(f"{self._me()} waited for rank {peer} on this host, whose process has ended.")
        if patience.is_over():
            # One that has given up may have waited for the same ranks, and only a little less long.
            late = [str(other) for other, w in self._others[word] if POISON < w.item() < count]
            if late:
                raise PeerLostError(
                    f"{self._me()} waited {patience.waited:.1f} s of {patience.timeout:g} s for rank(s) "
                    f"{', '.join(late)} on this host, or for what these were waiting for."
                )

    def _me(self) -> str:
        return f"rank {self._rank} of {self._group_size}"

    def close(self, *, poison: bool = True) -> None:
        """Let nobody wait for this rank, and never use the memory again. Without ``poison``, others need not hear."""
        if os.getpid() == self._pid:  # in a forked child it is not even there
            self._closed = True
            if poison:
                for word in self._words:
                    word[0] = POISON
            self._let_go()


def _close(pidfds: Sequence[int], pid: int) -> None:
    if os.getpid() == pid:
        for pidfd in pidfds:
            os.close(pidfd)

"""Ranks of one host meet in shared memory: the node stage. For every transport that can also join some of its ranks.

One rank's memory is two in-slots; the first rank of a node has two out-slots besides. All ranks of a node go through
the same `schedule`, here with two buckets::

    rank 0    copy in 0 │ copy in 1   reduce 0 │ copy out 0   reduce 1 │ copy out 1
    rank 1    copy in 0 │ copy in 1   reduce 0 │ copy out 0   reduce 1 │ copy out 1
                       meet                   meet                    meet

Every element is summed on exactly one rank: rank i reduces shard i of everybody's in-slot into the out-slot.

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
from typing import Any

import numpy as np

from funcavg._errors import PeerLostError
from funcavg.collectives.base import Buffer
from funcavg.collectives.rows import Patience, Rows
from funcavg.collectives.segment import HEADER

__all__ = ["POISON", "Node", "schedule"]

POISON = -1
ROOM = 1024  # bytes of a header for what a rank says in a gather; the first such are its word's


def schedule(buckets: int, delay: int = 0) -> Iterator[tuple[str, int]]:
    """Yield what a rank does in one call: (action, bucket); bucket k is in slot k & 1.

    ``delay`` is how many rounds a bucket takes to cross to other nodes and back. The meeting before the first reduction
    keeps calls apart: when it is over, everyone has read all of the call before.
    """
    yield "copy in", 0
    yield "meet", 0
    for k in range(buckets + delay):
        if k + 1 < buckets:
            yield "copy in", k + 1
        if k < buckets:
            yield "reduce", k
        if k >= delay:
            yield "publish", k - delay
        yield "meet", k
        if k >= delay:
            yield "copy out", k - delay


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
        self.slot_bytes = (len(memory[0]) - HEADER) // 4
        self.channel: Rows | None = None
        if len(nodes) > 1 and self.index < self.shards:
            self.channel = transport.among([members[self.index] for members in nodes])
        self._transport, self._gathered = weakref.ref(transport), 0  # weak: the session of a transport keeps its node
        self._rank, self._group_size = transport.rank, transport.size
        self._memory = memory
        self._ticks, self._closed, self._pid = 0, False, os.getpid()
        words = [buffer[:8].view(np.int64) for buffer in memory]
        self._word = words[self.index]
        self._others = [(peer, word) for peer, word in zip(members, words, strict=True) if peer != transport.rank]
        self._pidfds = pidfds
        self._let_go = weakref.finalize(self, _close, list(pidfds.values()), os.getpid())

    def slots(self, number: int) -> tuple[Buffer, list[Buffer], Buffer]:
        """Return this rank's in-slot, everyone's in-slots, and the node's out-slot of a bucket."""
        begin = HEADER + (number & 1) * self.slot_bytes
        everyone = [memory[begin : begin + self.slot_bytes] for memory in self._memory]
        begin += 2 * self.slot_bytes
        return everyone[self.index], everyone, self._memory[0][begin : begin + self.slot_bytes]

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Return every rank's payload: in memory, but where there are other nodes, or the header has no room for it."""
        transport = self._transport()
        assert transport is not None
        if len(self.nodes) > 1 or len(payload) > ROOM:
            return transport.gather(payload, timeout)
        # Two places in turns: one is written to again after the next meeting, to which all come when they have read it.
        self._gathered += 1
        begin = ROOM * (1 + self._gathered % 2)
        self._memory[self.index][begin : begin + len(payload)] = np.frombuffer(payload, np.uint8)
        self.meet(timeout)
        transport.bytes_sent += len(payload) * (self.size - 1)
        return [memory[begin : begin + len(payload)].tobytes() for memory in self._memory]

    def meet(self, timeout: float) -> None:
        """Wait until every rank of the node has come as often as this one.

        A word that says POISON, or one whose process has ended, will never be there.
        """
        if self._closed:
            raise PeerLostError(f"{self._me()} has given up.")
        self._ticks += 1
        fence()  # what was written to slots is there before the word says so
        self._word[0] = self._ticks
        patience: Patience | None = None
        for peer, word in self._others:
            while (said := word.item()) < self._ticks:
                if said == POISON:
                    raise PeerLostError(f"{self._me()} waited for rank {peer} on this host, which had given up.")
                patience = patience or Patience(timeout)
                if patience.pause():
                    self._look_for_trouble(peer, word, patience)
                    transport = self._transport()
                    if transport is not None:  # lest one wait in vain for this rank to do its part in something else
                        transport.progress()
        fence()  # and nothing is read from slots before it has said so

    def _look_for_trouble(self, peer: int, word: Any, patience: Patience) -> None:
        pidfd = self._pidfds.get(peer)
        if pidfd is not None:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            ended = any(events & select.POLLIN for _, events in poll.poll(0))
            if ended and word.item() < self._ticks:  # it may have come, and ended afterwards
                raise PeerLostError(f"{self._me()} waited for rank {peer} on this host, whose process has ended.")
        if patience.is_over():
            # One that has given up may have waited for the same ranks, and only a little less long.
            late = [str(other) for other, w in self._others if POISON < w.item() < self._ticks]
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
                self._word[0] = POISON
            self._let_go()


def _close(pidfds: Sequence[int], pid: int) -> None:
    if os.getpid() == pid:
        for pidfd in pidfds:
            os.close(pidfd)


_OF_THREAD = threading.local()


def fence() -> None:
    """Order the memory accesses before and after: a release, followed by an acquire."""
    lock = getattr(_OF_THREAD, "lock", None)
    if lock is None:
        lock = _OF_THREAD.lock = threading.Lock()
        lock.acquire()
    lock.release()
    lock.acquire()

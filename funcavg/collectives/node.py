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

import contextlib
import hashlib
import logging
import os
import select
import struct
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from funcavg import _points
from funcavg._errors import PeerLostError
from funcavg.collectives.base import Buffer
from funcavg.collectives.rows import Patience, Rows
from funcavg.collectives.segment import HEADER, Address, Segment, map_segment, open_segment, watch

__all__ = ["Node", "discover", "partition", "schedule", "slot_bytes"]

LOGGER = logging.getLogger("funcavg")
POISON = -1
ROOM = 1024  # bytes of a header for what a rank says in a gather; the first such are its word's
ABOUT = struct.Struct("<?qi8s16s")  # can, process id, descriptor, nonce, place


def schedule(buckets: int, first: int, delay: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yield what a rank does in one call: (action, bucket, slot), which `Node.meet` s between.

    ``first`` is how many buckets the window has seen: slots go on alternating from call to call. ``delay`` is how many
    rounds a bucket takes to cross to other nodes and back.
    """
    yield "copy in", 0, first & 1
    yield "meet", 0, 0
    for k in range(buckets + delay):
        if k + 1 < buckets:
            yield "copy in", k + 1, (first + k + 1) & 1
        if k < buckets:
            yield "reduce", k, (first + k) & 1
        if k >= delay:
            yield "publish", k - delay, (first + k - delay) & 1
        yield "meet", 0, 0
        if k >= delay:
            yield "copy out", k - delay, (first + k - delay) & 1


def slot_bytes(sizes: Sequence[int]) -> int:
    """Return the size of a slot for nodes of so many ranks: all slots of a node stay in its cache.

    Where there are several nodes, they are large enough for the rows that go to the others.

    >>> [slot_bytes([ranks]) >> 10 for ranks in (2, 3, 4, 8, 64)]
    [2048, 2048, 1024, 512, 256]
    """
    fitting = (16 << 20) // (2 * max(sizes) + 2)
    nbytes = min(max(1 << fitting.bit_length() - 1, 256 << 10), 2 << 20)
    rows = len(sizes) * min(sizes)
    return nbytes if len(sizes) == 1 else min(max(nbytes, rows * (32 << 10)), 4 << 20)


def partition(reach: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the nodes: cliques of ranks that reach each other, lowest rank first. A rank alone is a node of its own.

    >>> partition([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    [[0, 1], [2]]
    """
    nodes: list[list[int]] = []
    for rank in range(len(reach)):
        for node in nodes:
            if all(reach[rank][other] and reach[other][rank] for other in node):
                node.append(rank)
                break
        else:
            nodes.append([rank])
    return nodes


def discover(transport: Rows, timeout: float) -> Node | None:
    """Find the ranks that share this host's memory. None, on all ranks alike, if every rank is alone."""
    with ExitStack() as descriptors, ExitStack() as watches, ExitStack() as unless_done:
        segment, why = _create()
        if segment is not None:
            descriptors.callback(segment.close)
            # Others may be done, and wait for this rank's word.
            unless_done.callback(segment.map(HEADER)[:8].view(np.int64).fill, POISON)
        _points.reached("created")
        about = _gather(transport, _describe(segment), timeout)  # round 1
        _points.reached("published")

        opened: dict[int, tuple[int, int | None]] = {}
        for peer, (can, address, place) in enumerate(about):
            if segment is None or peer == transport.rank or not can or place != about[transport.rank][2]:
                continue
            pidfd = watch(address.pid)  # first, lest it watch a process that has only reused the number
            if pidfd is not None:
                watches.callback(os.close, pidfd)
            descriptor = open_segment(address)
            if descriptor is not None:
                descriptors.callback(os.close, descriptor)
                opened[peer] = descriptor, pidfd
        mine = np.array([peer in opened or peer == transport.rank for peer in range(transport.size)], np.uint8)
        answers = transport.gather(np.packbits(mine).tobytes(), timeout)  # round 2
        bits = [np.unpackbits(np.frombuffer(answer, np.uint8), count=transport.size) for answer in answers]
        nodes = partition([row.tolist() for row in bits])

        slot, memory = slot_bytes([len(members) for members in nodes]), list[Buffer]()
        try:
            memory = _attach(transport.rank, nodes, slot, segment, opened)
        except OSError as error:  # no room for slots
            why = f"{type(error).__name__}: {error}"
        fine = [answer == b"\1" for answer in transport.gather(bytes([bool(memory)]), timeout)]  # round 3
        _points.reached("attached")
        attached = [members for members in nodes if all(fine[rank] for rank in members)]
        lone = [[rank] for members in nodes if members not in attached for rank in members]
        if [transport.rank] in lone:
            memory = _attach(transport.rank, lone, slot, None, {})
        nodes = sorted(attached + lone)
        members = next(members for members in nodes if transport.rank in members)
        kept = {peer: os.dup(pidfd) for peer, (_, pidfd) in opened.items() if pidfd is not None and peer in members}
        node = Node(transport, nodes, memory, kept)
        unless_done.pop_all()
    shared = sum(len(members) > 1 for members in node.nodes)
    LOGGER.info(
        "node stage: rank %d of %d meets %d other rank(s) of its host in shared memory; %d node(s) in all%s",
        *(transport.rank, transport.size, node.size - 1, len(node.nodes)),
        f"; off on this rank: {why}" if why else "",
    )
    return node if shared else None


def _create() -> tuple[Segment | None, str]:
    """Make this rank's segment, or say why there is none."""
    if os.environ.get("FUNCAVG_NODE") == "off":
        return None, "FUNCAVG_NODE=off"
    try:
        return Segment(), ""
    except (AttributeError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def _describe(segment: Segment | None) -> bytes:
    if segment is None:
        return ABOUT.pack(False, 0, 0, b"", b"")
    host = b""
    with contextlib.suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    place = hashlib.blake2b(host + os.environ.get("FUNCAVG_NODE", "").encode(), digest_size=16).digest()
    return ABOUT.pack(True, *segment.address, place)


def _gather(transport: Rows, payload: bytes, timeout: float) -> list[tuple[bool, Address, bytes]]:
    unpacked = [ABOUT.unpack(answer) for answer in transport.gather(payload, timeout)]
    return [(can, Address(pid, descriptor, nonce), place) for can, pid, descriptor, nonce, place in unpacked]


def _attach(
    rank: int,
    nodes: Sequence[Sequence[int]],
    slot: int,
    segment: Segment | None,
    opened: Mapping[int, tuple[int, int | None]],
) -> list[Buffer]:
    """Map the memory of all ranks of this node: a header and two in-slots, and of the first two out-slots, too."""
    members = next(members for members in nodes if rank in members)
    nbytes = [HEADER + (2 + 2 * (peer == members[0])) * slot for peer in members]
    mine = nbytes[members.index(rank)]
    if segment is None or len(members) == 1:
        return [np.zeros(mine, np.uint8)]
    segment.grow(mine)
    own = segment.map(mine)
    own[HEADER:] = 0  # touched first by this rank, so that it lies near
    return [
        own if peer == rank else map_segment(opened[peer][0], size) for peer, size in zip(members, nbytes, strict=True)
    ]


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
        self.sequence = 0  # buckets seen
        self.channel: Rows | None = None
        if len(nodes) > 1 and self.index < self.shards:
            self.channel = transport.among([members[self.index] for members in nodes])
        self._transport, self._gathered = weakref.ref(transport), 0  # weak: the session of a transport keeps its node
        self._rank, self._group_size = transport.rank, transport.size
        self._memory = memory
        self._ticks = 0
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
        self._ticks += 1
        fence()  # what was written to slots is there before the word says so
        self._word[0] = self._ticks
        patience: Patience | None = None
        for peer, word in self._others:
            while (said := word.item()) < self._ticks:
                if said == POISON:
                    raise PeerLostError(f"{self._me()} met rank {peer} on this host, which had given up.")
                patience = patience or Patience(timeout)
                if patience.pause():
                    self._look_for_trouble(peer, word, patience)
        fence()  # and nothing is read from slots before it has said so

    def _look_for_trouble(self, peer: int, word: Any, patience: Patience) -> None:
        pidfd = self._pidfds.get(peer)
        if pidfd is not None:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(0) and word.item() < self._ticks:  # it may have come, and ended afterwards
                raise PeerLostError(f"{self._me()} waited for rank {peer} on this host, whose process has ended.")
        if patience.is_over():
            # One that has given up may have waited for the same ranks, and only a little less long.
            late = [str(other) for other, w in self._others if POISON < w.item() < self._ticks]
            if late:
                raise PeerLostError(
                    f"{self._me()} waited {patience.waited:.1f} s of {patience.timeout:g} s for rank(s) "
                    f"{', '.join(late)} on this host."
                )

    def _me(self) -> str:
        return f"rank {self._rank} of {self._group_size}"

    def close(self) -> None:
        """Let nobody wait for this rank, and never use the memory again."""
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

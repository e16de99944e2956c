"""Which ranks share this host's memory: three rounds of gathering, after which all ranks know the same nodes.

1. Everyone says where its fresh segment is.
2. Everyone says whose it could open. A node is a clique of ranks that reach each other: containers on one host with
   separate memory are two nodes, and so are users.
3. Everyone says whether it has attached to all of its node. Where one has not, the ranks of that node stay alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from funcavg import _points
from funcavg.collectives.base import Buffer
from funcavg.collectives.node import POISON, SLOTS, Node
from funcavg.collectives.rows import Rows
from funcavg.collectives.segment import HEADER, Address, Segment, map_segment, open_segment, watch

__all__ = ["discover", "partition", "slot_bytes"]

LOGGER = logging.getLogger("funcavg")
ABOUT = struct.Struct("<?qi8s16sI")  # can, process id, descriptor, nonce, place, cores


def slot_bytes(sizes: Sequence[int], cores: int) -> int:
    """Return the size of a slot for nodes of so many ranks: all slots of up to 9 ranks fit into a cache of 5 MiB.

    Where there are several nodes, they are large enough for the rows that go to the others, and follow from the nodes
    alone: all hosts cut buckets alike. On one host with fewer ``cores`` than ranks, where these take turns, a turn is
    long enough to be worth it.

    >>> [slot_bytes([ranks], cores=64) >> 10 for ranks in (2, 3, 4, 8, 64)]
    [256, 256, 256, 128, 128]
    >>> [slot_bytes([ranks], cores=2) >> 10 for ranks in (2, 3, 8)]
    [256, 1024, 1024]
    >>> [slot_bytes([ranks, ranks], cores=64) >> 10 for ranks in (1, 2, 8)]
    [512, 1024, 512]
    """
    slots = SLOTS * (max(sizes) + 1)
    if len(sizes) == 1 and sizes[0] > cores:
        return 1 << 20
    if len(sizes) == 1:
        return min(max(_power_of_two((5 << 20) // slots), 128 << 10), 256 << 10)
    shards = min(sizes)  # each has buffers for several buckets on their way
    nbytes = min(max(_power_of_two((16 << 20) // slots), 128 << 10), 1 << 20, shards * (512 << 10))
    return min(max(nbytes, shards * len(sizes) * (32 << 10)), 4 << 20)


def _power_of_two(most: int) -> int:
    return 1 << most.bit_length() - 1


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
            # Others may be done, and wait for this rank's words.
            unless_done.callback(segment.words.fill, POISON)
        _points.reached("created")
        about = _gather(transport, _describe(segment), timeout)  # round 1
        _points.reached("published")

        opened, pidfds = dict[int, int](), dict[int, int]()
        watches.callback(_close_all, pidfds)
        for peer, (can, address, place, _) in enumerate(about):
            if segment is None or peer == transport.rank or not can or place != about[transport.rank][2]:
                continue
            pidfd = watch(address.pid)  # first, lest it watch a process that has only reused the number
            if pidfd is not None:
                pidfds[peer] = pidfd
            try:
                opened[peer] = open_segment(address)
            except OSError as error:
                why = f"rank {peer}'s memory is out of reach ({_words(error)})"
            else:
                descriptors.callback(os.close, opened[peer])
        mine = np.array([peer in opened or peer == transport.rank for peer in range(transport.size)], np.uint8)
        answers = transport.gather(np.packbits(mine).tobytes(), timeout)  # round 2
        bits = [np.unpackbits(np.frombuffer(answer, np.uint8), count=transport.size) for answer in answers]
        nodes = partition([row.tolist() for row in bits])

        cores = min(cores for *_, cores in about)  # those of a host are the same for all its ranks, or nearly
        slot, memory = slot_bytes([len(members) for members in nodes], cores), list[Buffer]()
        try:
            memory = _attach(transport.rank, nodes, slot, segment, opened)
        except OSError as error:  # no room for slots
            why = f"off on this rank: {_words(error)}"
        fine = [answer == b"\1" for answer in transport.gather(bytes([bool(memory)]), timeout)]  # round 3
        _points.reached("attached")
        attached = [members for members in nodes if all(fine[rank] for rank in members)]
        lone = [[rank] for members in nodes if members not in attached for rank in members]
        if [transport.rank] in lone:
            memory = _attach(transport.rank, lone, slot, None, {})
        nodes = sorted(attached + lone)
        members = next(members for members in nodes if transport.rank in members)
        kept = {peer: pidfds.pop(peer) for peer in members if peer in pidfds}
        node = Node(transport, nodes, memory, kept)
        unless_done.pop_all()
    shared = sum(len(members) > 1 for members in node.nodes)
    LOGGER.info(
        "node stage: rank %d of %d meets %d other rank(s) of its host in shared memory; %d node(s) in all%s",
        *(transport.rank, transport.size, node.size - 1, len(node.nodes)),
        f"; {why}" if why else "",
    )
    return node if shared else None


def _words(error: OSError) -> str:
    """Return what an error says, and what it means where that is known."""
    said = f"{type(error).__name__}: {error}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{said}. Raise the limit of open files: while ranks meet, each of a host takes two"
    if error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM):
        return f"{said}: another user's, or another container's"
    return said


def _close_all(descriptors: Mapping[int, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def _create() -> tuple[Segment | None, str]:
    """Make this rank's segment, or say why there is none."""
    if os.environ.get("FUNCAVG_NODE", "").lower() == "off":
        return None, "off on this rank: FUNCAVG_NODE=off"
    try:
        return Segment(), ""
    except (AttributeError, OSError) as error:
        return None, f"off on this rank: {_words(error) if isinstance(error, OSError) else repr(error)}"


def _describe(segment: Segment | None) -> bytes:
    if segment is None:
        return ABOUT.pack(False, 0, 0, b"", b"", 0)
    host = b""
    with contextlib.suppress(OSError):
        host = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    place = hashlib.blake2b(host + os.environ.get("FUNCAVG_NODE", "").encode(), digest_size=16).digest()
    return ABOUT.pack(True, *segment.address, place, os.cpu_count() or 1)


def _gather(transport: Rows, payload: bytes, timeout: float) -> list[tuple[bool, Address, bytes, int]]:
    unpacked = [ABOUT.unpack(answer) for answer in transport.gather(payload, timeout)]
    return [(can, Address(pid, number, nonce), place, cores) for can, pid, number, nonce, place, cores in unpacked]


def _attach(
    rank: int,
    nodes: Sequence[Sequence[int]],
    slot: int,
    segment: Segment | None,
    opened: Mapping[int, int],
) -> list[Buffer]:
    """Map the memory of all ranks of this node: a header and in-slots, and of the first out-slots, too."""
    members = next(members for members in nodes if rank in members)
    nbytes = [HEADER + SLOTS * (1 + (peer == members[0])) * slot for peer in members]
    mine = nbytes[members.index(rank)]
    if segment is None or len(members) == 1:
        return [np.zeros(mine, np.uint8)]
    segment.grow(mine)
    own = segment.map(mine)
    own[HEADER:] = 0  # touched first by this rank, so that it lies near
    return [
        own if peer == rank else map_segment(opened[peer], size) for peer, size in zip(members, nbytes, strict=True)
    ]

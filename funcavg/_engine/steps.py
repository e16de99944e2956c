"""Buckets in the memory of a node: where they lie, and the steps that a rank takes with each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from funcavg._engine.buckets import Bucket
from funcavg._memory import address_of
from funcavg.collectives.node import SLOTS, Node

__all__ = ["NodeSlots", "Station", "Step"]


class Station:
    """Where a bucket lies in a node's memory: views and addresses that are made once for a plan."""

    def __init__(self, node: Node, everyone: Sequence[Any], out: Any, row_bytes: int) -> None:
        shard = len(node.nodes) * row_bytes
        self.begin = min(node.index, node.shards) * shard  # of the shard that this rank reduces, if it has one
        self.end = min(node.index + 1, node.shards) * shard
        self.nbytes = self.end - self.begin
        self.shards = [slot[self.begin : self.end] for slot in everyone]
        self.landing = out[self.begin : self.end]
        self.operands: dict[str, tuple[list[Any], Any]] = {}  # by dtype: shards and landing, as the kernel takes them
        others = [(begin, end) for begin, end in ((0, self.begin), (self.end, len(out))) if begin < end]
        mine, means = address_of(everyone[node.index]), address_of(out)
        self.given = [(mine + begin, begin, end - begin) for begin, end in others]  # address, from where on, bytes
        self.taken = [(means + begin, begin, end - begin) for begin, end in others]


class NodeSlots:
    """The slots of a node's shared memory, as plans see them."""

    apart = True

    def __init__(self, node: Node) -> None:
        self._node = node
        self._lent: dict[tuple[int, int], tuple[Any, Station, Any]] = {}  # there are many buckets, of few lengths

    def lend(self, number: int, rows: int, nbytes: int) -> tuple[Any, Station, Any]:
        """Return this rank's in-slot, its station, and the out-slot: so many rows of ``nbytes``."""
        key = number % SLOTS, nbytes
        if key not in self._lent:
            everyone, out = self._node.slots(number)
            everyone, out = [slot[: rows * nbytes] for slot in everyone], out[: rows * nbytes]
            station, mine = Station(self._node, everyone, out, nbytes), everyone[self._node.index]
            self._lent[key] = mine.reshape(rows, nbytes), station, out.reshape(rows, nbytes)
        return self._lent[key]


class Step(NamedTuple):
    """What is done with a bucket, what it waits for, and what it makes known: counts are of this call."""

    action: str
    bucket: Bucket
    waits: int | None
    least: int
    tells: int | None
    told: int

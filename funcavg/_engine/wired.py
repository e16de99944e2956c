"""Buckets over a transport's verbs whose rows travel as a wire's code.

::

    exchange    row r of my numbers, encoded, goes to rank r; its row for me comes back
    (mean)      this rank decodes these, averages the shard that is its own in float32, and encodes that
    share       its code goes to everyone, theirs come to me; all decode all of them, their own, too

A rank's own row never travels, and is averaged as it is. Leaves that the wire does not encode travel as without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg._engine.buckets import Bucket
from funcavg._engine.codes import Codes, CodeSlots
from funcavg._engine.lanes import Cargo, Lane
from funcavg._engine.mean import mean_into
from funcavg.collectives.base import Pending

__all__ = ["WiredLane"]

Bytes = npt.NDArray[np.uint8]


class WiredLane(Lane):
    """A lane on which some buckets travel as codes. Of these, not even a late transfer sees a leaf."""

    def __init__(
        self, plan: Sequence[Bucket], collective: Any, rank: int, codes: Mapping[int, Codes], slots: CodeSlots
    ) -> None:
        super().__init__(plan, collective, rank)
        self._codes, self._slots, self._counts = codes, slots, True

    def _lent(self, bucket: Bucket) -> tuple[Bytes, Bytes]:
        spare = bucket.theirs.reshape(-1)  # nothing else comes into it
        return self._slots.lend(bucket.number, len(bucket.mine), self._codes[bucket.number].width, spare)

    def open(self, bucket: Bucket, cargo: Cargo) -> tuple[Any, Any]:
        self._counts = cargo.weights is None or bool(cargo.weights[self.rank])  # else nobody reads its rows
        if bucket.number in self._codes:
            cargo = cargo._replace(land_in_results=True, send_from_leaves=True)
        return super().open(bucket, cargo)

    def start(self, bucket: Bucket, source: Any, target: Any, timeout: float) -> Pending | None:
        codes = self._codes.get(bucket.number)
        if codes is None:
            return super().start(bucket, source, target, timeout)
        going, coming = self._lent(bucket)
        (row,) = self._slots.rows(1, source.shape[1] // bucket.itemsize * 4)
        if not self._counts:
            going[...] = 0
        for rank in range(len(source)) if self._counts else ():
            if rank != self.rank:
                codes.encode(rank, self._wide(bucket, source[rank], row), going[rank])
        pending: Pending | None = self.collective.exchange(going, coming, timeout)
        return pending

    def _wide(self, bucket: Bucket, row: Bytes, memory: Bytes) -> Bytes:
        """Return a row as float32: as it is, or in this memory."""
        if bucket.element == "float32":
            return row
        mean_into(memory, [row], None, bucket.element, "float32")
        return memory

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        codes = self._codes.get(bucket.number)
        if codes is None:
            super().reduce(bucket, source, target, weights)
            return
        (going, coming), size = self._lent(bucket), len(source)
        *rows, mean = self._slots.rows(size + 1, source.shape[1] // bucket.itemsize * 4)
        for rank, row in enumerate(rows):
            if rank == self.rank:
                rows[rank] = self._wide(bucket, source[rank], row)
            elif weights is None or weights[rank]:
                codes.decode(self.rank, coming[rank], row)
        mean_into(mean, rows, weights, "float32")
        codes.encode(self.rank, mean, going[self.rank], mean=True)

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        if bucket.number not in self._codes:
            return super().finish(bucket, target, timeout)
        pending: Pending | None = self.collective.share(self._lent(bucket)[0], timeout)
        return pending

    def land(self, bucket: Bucket, target: Any) -> None:
        if bucket.number in self._codes:
            self._codes[bucket.number].land(self._lent(bucket)[0], target)

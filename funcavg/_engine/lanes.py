"""Buckets over a transport's verbs.

They are kept on their way, so that bytes travel while this rank packs, averages and unpacks. Drawn for one bucket ahead
(`AHEAD` is more)::

    bucket k+1    pack    exchange ─────────────►
    bucket k              ────► exchanged    mean    share ─────────────►
    bucket k-1                                       ────► shared    unpack
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from funcavg import _points
from funcavg._engine.buckets import AHEAD, Bucket
from funcavg._engine.device_slots import DEVICE_AHEAD, DeviceSlots
from funcavg._engine.mean import mean_into, tensor_mean_into
from funcavg.collectives.base import Pending

__all__ = ["Cargo", "DeviceLane", "Lane"]


class Cargo(NamedTuple):
    """What a lane carries, and how."""

    carriers: Sequence[Any]  # of the leaves
    results: Sequence[Any]  # carriers of the results; the leaves' own, if they are donated
    weights: Sequence[float] | None
    timeout: float  # seconds, for each bucket
    land_in_results: bool  # whether what arrives may be received there
    send_from_leaves: bool
    addresses: Sequence[int] = ()  # where the leaves lay when the call began


class Lane:
    """A plan of buckets, and the verbs that move them: through host memory, over any transport."""

    ahead = AHEAD

    def __init__(self, plan: Sequence[Bucket], collective: Any, rank: int) -> None:
        self.plan, self.collective, self.rank = plan, collective, rank

    def carry(self, cargo: Cargo) -> None:
        """Move all buckets. Large leaves are sent from, and their means received in, their own memory, if they may."""
        _pump(self, cargo)

    def open(self, bucket: Bucket, cargo: Cargo) -> tuple[Any, Any]:
        """Return the rows that this rank gives, and those that are to hold the result."""
        source = bucket.rows_in(cargo.carriers) if cargo.send_from_leaves else None
        target = bucket.rows_in(cargo.results) if cargo.land_in_results else None
        if source is None:
            bucket.pack(cargo.carriers)
            source = bucket.mine
        return source, bucket.mine if target is None else target

    def start(self, bucket: Bucket, source: Any, target: Any, timeout: float) -> Pending | None:
        """Send every rank its shard."""
        pending: Pending | None = self.collective.exchange(source, bucket.theirs, timeout)
        return pending

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        """Average this rank's shard."""
        rows = [source[rank] if rank == self.rank else bucket.theirs[rank] for rank in range(len(source))]
        mean_into(target[self.rank], rows, weights, bucket.element)

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        """Send this rank's shard to everyone."""
        pending: Pending | None = self.collective.share(target, timeout)
        return pending

    def land(self, bucket: Bucket, target: Any) -> None:
        """Make what has come the result."""


class DeviceLane(Lane):
    """The same in an accelerator's memory, where the backend may average by itself."""

    ahead = DEVICE_AHEAD

    def __init__(
        self, plan: Sequence[Bucket], collective: Any, rank: int, slots: DeviceSlots, natively: frozenset[str]
    ) -> None:
        super().__init__(plan, collective, rank)
        self.slots, self.natively = slots, natively  # memory; dtypes

    def start(self, bucket: Bucket, source: Any, target: Any, timeout: float) -> Pending | None:
        pending: Pending | None
        if bucket.element in self.natively:
            pending = self.collective.average(self.typed(source, bucket), timeout)
        else:
            pending = self.collective.exchange(source, self.slots.theirs(bucket.number, source.shape), timeout)
        return pending

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        if bucket.element not in self.natively:
            theirs = self.slots.theirs(bucket.number, source.shape)
            rows = [source[rank] if rank == self.rank else theirs[rank] for rank in range(len(source))]
            tensor_mean_into(self.typed(target[self.rank], bucket), [self.typed(row, bucket) for row in rows], weights)

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        return None if bucket.element in self.natively else super().finish(bucket, target, timeout)

    @staticmethod
    def typed(memory: Any, bucket: Bucket) -> Any:
        import torch

        return memory.view(getattr(torch, bucket.element))


class _Transit(NamedTuple):
    """A bucket on its way."""

    bucket: Bucket
    source: Any  # rows that are sent
    target: Any  # rows that the mean goes into
    wait: Pending | None

    def arrived(self) -> _Transit:
        if self.wait is not None:
            self.wait()
        return self


def _pump(lane: Lane, cargo: Cargo) -> None:
    timeout = cargo.timeout
    exchanging: deque[_Transit] = deque()
    sharing: deque[_Transit] = deque()
    for bucket in chain(lane.plan, [None] * (2 * lane.ahead)):  # the last rounds empty the pipeline
        if bucket is not None:
            source, target = lane.open(bucket, cargo)
            _points.reached("copied_in", bucket.number)
            exchanging.append(_Transit(bucket, source, target, lane.start(bucket, source, target, timeout)))
        if len(exchanging) > lane.ahead or (bucket is None and exchanging):
            ready, source, target, _ = exchanging.popleft().arrived()
            _points.reached("arrived", ready.number)
            lane.reduce(ready, source, target, cargo.weights)
            _points.reached("reduced", ready.number)
            sharing.append(_Transit(ready, source, target, lane.finish(ready, target, timeout)))
        if len(sharing) > lane.ahead or (not exchanging and sharing):
            done = sharing.popleft().arrived()
            lane.land(done.bucket, done.target)
            _points.reached("done", done.bucket.number)
            if done.target is done.bucket.mine:
                done.bucket.unpack(cargo.results)
            elif done.bucket.own is not None:
                family, leaf, *_ = done.bucket.own
                family.written([cargo.results[leaf]])
            _points.reached("copied_out", done.bucket.number)

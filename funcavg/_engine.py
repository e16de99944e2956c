"""The engine: agree, then move a request's leaves through buckets.

Buckets are kept on their way, so that bytes travel while this rank packs, averages and unpacks. Drawn for one bucket
ahead (`AHEAD` is more)::

    bucket k+1    pack    exchange ─────────────►
    bucket k              ────► exchanged    mean    share ─────────────►
    bucket k-1                                       ────► shared    unpack
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from funcavg._agree import Agreement, agree
from funcavg._buckets import AHEAD, Bucket, make_plan
from funcavg._errors import PeerLostError
from funcavg._mean import mean_into, tensor_mean_into
from funcavg._request import Request
from funcavg._session import Session
from funcavg.collectives.base import Collective, Pending

__all__ = ["carry_out", "move", "reach_agreement"]


def carry_out(request: Request, collective: Collective, session: Session, timeout: float) -> list[Any]:
    """Agree and move: return the means of the request's averaged leaves."""
    agreement = reach_agreement(request, collective, session, timeout)
    return move(request, agreement, collective, session, timeout)


def reach_agreement(request: Request, collective: Collective, session: Session, timeout: float) -> Agreement:
    """Let all ranks agree about their requests, or raise the same error on each of them."""
    with _spending(session, collective):
        outcome = agree(collective, request.claim, timeout)
    if isinstance(outcome, Exception):  # every rank raises it, so the group stays usable
        raise outcome
    return outcome


def move(request: Request, agreement: Agreement, collective: Collective, session: Session, timeout: float) -> list[Any]:
    """Average the leaves that ranks have agreed about; return the results."""
    layout = request.layout
    assert layout is not None
    leaves, families = request.leaves, layout.families
    ties = request.ties if agreement.same_layout else {}
    carriers = list(leaves)
    for i in layout.special:
        carriers[i] = families[i].carrier(leaves[i])
    with _spending(session, collective):
        if request.donate:
            results = carriers
        else:
            results = [None if i in ties else family.fresh(leaves[i]) for i, family in enumerate(families)]
        if collective.size == 1:
            if not request.donate:
                for i, family in enumerate(families):
                    if i not in ties:
                        family.copy([results[i]], [carriers[i]])
        else:
            # Results are private until they are returned. Donated memory is not: it must not change after an error.
            land_in_results = not request.donate or getattr(collective, "stops_on_error", False)
            for lane in _lanes(request, agreement, collective, session):
                _pump(lane, carriers, results, agreement.weights, timeout, land_in_results)
    return _finish(request, leaves, results, ties)


def _finish(request: Request, leaves: Sequence[Any], results: Sequence[Any], ties: dict[int, int]) -> list[Any]:
    """Turn filled carriers into results of the leaves' own kinds."""
    layout = request.layout
    assert layout is not None
    finished = list(results)
    for i in layout.special:
        if i not in ties:
            finished[i] = layout.families[i].finish(leaves[i], results[i])
    if request.donate:
        return [
            leaf if family.mutable else finished[i]
            for i, (leaf, family) in enumerate(zip(leaves, layout.families, strict=True))
        ]
    tied = {id(leaves[original]): finished[original] for original in ties.values()}
    for i, original in ties.items():
        if id(leaves[i]) not in tied:  # another view of the same memory
            tied[id(leaves[i])] = layout.families[i].tie(leaves[i], finished[original])
        finished[i] = tied[id(leaves[i])]
    return finished


@contextmanager
def _spending(session: Session, collective: Collective) -> Iterator[None]:
    """Declare the group spent if anything goes wrong inside: ranks may then be at different places of a call."""
    try:
        yield
    except BaseException as error:
        session.spend(error, late_writes=not getattr(collective, "stops_on_error", False))
        if hasattr(collective, "abort"):
            collective.abort()
        if isinstance(error, PeerLostError):
            cure = "The group is spent: make a new one, and start from one rank's parameters or a checkpoint."
            raise PeerLostError(f"average: {error} {cure}") from error
        raise


class _Lane:
    """A plan of buckets, and the verbs that move them: through host memory, over any transport."""

    def __init__(self, plan: Sequence[Bucket], collective: Any, rank: int) -> None:
        self.plan, self.collective, self.rank = plan, collective, rank

    def start(self, bucket: Bucket, source: Any, timeout: float) -> Pending | None:
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


class _DeviceLane(_Lane):
    """The same in an accelerator's memory, where the backend may average by itself."""

    def __init__(self, plan: Sequence[Bucket], collective: Any, rank: int, natively: frozenset[str]) -> None:
        super().__init__(plan, collective, rank)
        self.natively = natively  # dtypes

    def start(self, bucket: Bucket, source: Any, timeout: float) -> Pending | None:
        if bucket.element not in self.natively:
            return super().start(bucket, source, timeout)
        pending: Pending | None = self.collective.average(self.typed(source, bucket), timeout)
        return pending

    def reduce(self, bucket: Bucket, source: Any, target: Any, weights: Sequence[float] | None) -> None:
        if bucket.element not in self.natively:
            rows = [source[rank] if rank == self.rank else bucket.theirs[rank] for rank in range(len(source))]
            tensor_mean_into(self.typed(target[self.rank], bucket), [self.typed(row, bucket) for row in rows], weights)

    def finish(self, bucket: Bucket, target: Any, timeout: float) -> Pending | None:
        return None if bucket.element in self.natively else super().finish(bucket, target, timeout)

    @staticmethod
    def typed(memory: Any, bucket: Bucket) -> Any:
        import torch

        return memory.view(getattr(torch, bucket.element))


def _lanes(request: Request, agreement: Agreement, collective: Collective, session: Session) -> Iterator[_Lane]:
    """Yield the lanes that a request needs: leaves on an accelerator first, if the transport has a way for them."""
    layout = request.layout
    assert layout is not None
    ties = request.ties if agreement.same_layout else {}
    kept = [i for i in range(len(layout.leaves)) if i not in ties]
    on_device = [i for i in kept if layout.leaves[i].device]
    if on_device and agreement.same_layout and layout.devices and hasattr(collective, "device_lane"):
        (device,) = layout.devices
        verbs = collective.device_lane(device.partition(":")[0])
        if verbs is not None:
            plan = _plan(request, tuple(on_device), device, collective.size, session)
            natively = verbs.averages_natively(weighted=agreement.weights is not None)
            yield _DeviceLane(plan, verbs, collective.rank, natively)
            kept = [i for i in kept if not layout.leaves[i].device]
    yield _Lane(_plan(request, tuple(kept), "cpu", collective.size, session), collective, collective.rank)


def _plan(request: Request, kept: tuple[int, ...], memory: str, size: int, session: Session) -> list[Bucket]:
    layout = request.layout
    assert layout is not None

    def make() -> list[Bucket]:
        rows = [(i, layout.families[i], layout.leaves[i]) for i in kept]
        return make_plan(rows, size, session.slots(memory), session.bucket_bytes)

    return session.remember((layout, kept if len(kept) < len(layout.leaves) else None, memory), make)


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


def _pump(
    lane: _Lane,
    carriers: Sequence[Any],
    results: Sequence[Any],
    weights: Sequence[float] | None,
    timeout: float,
    land_in_results: bool,
) -> None:
    """Move all buckets of a lane. Large leaves are sent from, and their means received in, their own memory."""
    exchanging: deque[_Transit] = deque()
    sharing: deque[_Transit] = deque()
    for bucket in chain(lane.plan, [None] * (2 * AHEAD)):  # the last rounds empty the pipeline
        if bucket is not None:
            source = bucket.rows_in(carriers)
            target = bucket.rows_in(results) if land_in_results else None
            if source is None:
                bucket.pack(carriers)
                source = bucket.mine
            pending = lane.start(bucket, source, timeout)
            exchanging.append(_Transit(bucket, source, bucket.mine if target is None else target, pending))
        if len(exchanging) > AHEAD or (bucket is None and exchanging):
            ready, source, target, _ = exchanging.popleft().arrived()
            lane.reduce(ready, source, target, weights)
            sharing.append(_Transit(ready, source, target, lane.finish(ready, target, timeout)))
        if len(sharing) > AHEAD or (not exchanging and sharing):
            done = sharing.popleft().arrived()
            if done.target is done.bucket.mine:
                done.bucket.unpack(results)
            elif done.bucket.own is not None:
                family, leaf, *_ = done.bucket.own
                family.written(results[leaf])

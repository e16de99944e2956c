"""The engine: agree, then move a request's leaves through buckets, by the lanes that they need."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from funcavg._engine.agree import Agreement, agree, exchange_words
from funcavg._engine.buckets import Bucket, made_by, make_plan
from funcavg._engine.copies import CopyLane, DeviceCopyLane, NodeCopyLane, StageSlots
from funcavg._engine.device_slots import DEVICE_BUCKET
from funcavg._engine.digests import digests_of, ranks_that_differ
from funcavg._engine.kernel import kernel_in_use
from funcavg._engine.lanes import Cargo, DeviceLane, Lane
from funcavg._engine.node_lane import NodeLane, NodePlan
from funcavg._engine.session import Session, nothing_is_late, session_of
from funcavg._errors import PeerLostError
from funcavg._trees import Claim, Layout, Options, Request
from funcavg.collectives.base import Collective

if TYPE_CHECKING:
    from funcavg._engine.codes import Codes
    from funcavg.collectives.node import Node

__all__ = ["carry_out", "compare", "gather", "move", "reach_agreement"]


def carry_out(request: Request, collective: Collective) -> list[Any]:
    """Agree and move: return the means of the request's averaged leaves, or the root's values."""
    return move(request, reach_agreement(request, collective), collective)


def reach_agreement(request: Request, collective: Collective) -> Agreement:
    """Let all ranks agree about their requests, or raise the same error on each of them."""
    session = session_of(collective)
    purpose, seconds = request.options.purpose, request.options.seconds(collective)
    with _spending(session, collective, purpose):
        claim = _claim(request, collective.size)
        outcome = session.confirm(seconds) or agree(collective, claim, seconds, session.gather, purpose)
    if isinstance(outcome, Exception):  # every rank raises it, so the group stays usable
        raise outcome
    return outcome


def _claim(request: Request, size: int) -> Claim:
    """Return what this rank brings; where its kernel is not the one that its user asks for, that mistake."""
    try:
        if size > 1:  # one alone sums nothing
            kernel_in_use()
    except (RuntimeError, ValueError) as mistake:
        return request.claim._replace(error=request.claim.error or mistake)
    return request.claim


def gather(payload: bytes, collective: Collective, options: Options, purpose: str) -> list[bytes]:
    """Return a few bytes of every rank, in rank order, in a call of their own."""
    session, seconds = session_of(collective), options.seconds(collective)
    with _spending(session, collective, purpose):
        outcome = session.confirm(seconds) or exchange_words(collective, payload, seconds, session.gather, purpose)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def move(request: Request, agreement: Agreement, collective: Collective, out: Sequence[Any] | None = None) -> list[Any]:
    """Average the leaves that ranks have agreed about, or copy the root's to all; return the results.

    ``out`` are arrays to write them to, of the leaves' own kinds; else there will be new ones. Whoever passes it may
    free that memory, and the leaves', as soon as this returns or raises.
    """
    session, options = session_of(collective), request.options
    donate, timeout = options.donate, options.seconds(collective)
    layout = request.layout
    assert layout is not None
    leaves, families = request.leaves, layout.families
    ties = request.ties if agreement.same_ties else {}
    carriers = list(leaves)
    for i in layout.special:
        carriers[i] = families[i].carrier(leaves[i])
    with _spending(session, collective, options.purpose):
        if out is not None:
            results = [family.carrier(array) for family, array in zip(families, out, strict=True)]
        elif donate and len(layout.mutable) == len(leaves):
            results = carriers
        else:
            results = [None] * len(leaves)  # to be made, by `prepare`, or by buckets
            if donate:
                for i in layout.mutable:
                    results[i] = carriers[i]

        def prepare(numbers: Iterable[int]) -> None:
            for i in numbers:
                if results[i] is None:
                    results[i] = families[i].fresh(leaves[i])

        if collective.size == 1:
            prepare(i for i in range(len(leaves)) if i not in ties)
            getattr(collective, "fill", _copy)(layout, carriers, results, ties)
        else:
            # After an error, transfers may go on. New results are private until they are returned, and kept by whatever
            # still writes to them; donated memory must not change, and memory that is freed must not even be read.
            late = not getattr(collective, "stops_on_error", False)
            cargo = Cargo(
                carriers,
                results,
                agreement.weights,
                timeout,
                land_in_results=not late or (out is None and not donate),
                send_from_leaves=not late or out is None,
                addresses=request.addresses,
            )
            for lane in _lanes(request, agreement, collective, session, prepare):
                lane.carry(cargo)
            if options.root is not None:  # a root waits for nobody: without this, it could go on where others cannot
                (session.gather or collective.gather)(b"arrived.", timeout)
    return _finish(request, leaves, results, ties)


def compare(request: Request, collective: Collective) -> dict[int, list[int]]:
    """Agree, and return the leaves that differ, with the ranks on which they are not as on rank 0."""
    reach_agreement(request, collective)
    session, options = session_of(collective), request.options
    with _spending(session, collective, options.purpose):
        return ranks_that_differ(digests_of(request), collective, session, options.seconds(collective))


def _copy(layout: Layout, carriers: Sequence[Any], results: Sequence[Any], ties: Mapping[int, int]) -> None:
    for i, family in enumerate(layout.families):
        if i not in ties and results[i] is not carriers[i]:
            family.copy([results[i]], [carriers[i]])


def _finish(request: Request, leaves: Sequence[Any], results: Sequence[Any], ties: dict[int, int]) -> list[Any]:
    """Turn filled carriers into results of the leaves' own kinds."""
    layout = request.layout
    assert layout is not None
    if request.options.donate and len(layout.mutable) == len(leaves):
        return list(leaves)
    finished = list(results)
    for family in layout.members:
        special = [i for i in layout.special if layout.families[i] is family and i not in ties]
        whole = family.finish_all([leaves[i] for i in special], [results[i] for i in special])
        for i, result in zip(special, whole, strict=True):
            finished[i] = result
    tied = {id(leaves[original]): finished[original] for original in ties.values()}
    for i, original in ties.items():
        if id(leaves[i]) not in tied:  # another view of the same memory
            tied[id(leaves[i])] = layout.families[i].tie(leaves[i], finished[original])
        finished[i] = tied[id(leaves[i])]
    if request.options.donate:
        for i in layout.mutable:
            finished[i] = leaves[i]
    return finished


@contextmanager
def _spending(session: Session, collective: Collective, purpose: str) -> Iterator[None]:
    """Declare the group spent if anything goes wrong inside: ranks may then be at different places of a call."""
    try:
        yield
    except BaseException as error:
        kept = session.spend(error, late_writes=not getattr(collective, "stops_on_error", False))
        if hasattr(collective, "abort") and collective.abort() is True:  # MPI's has seen all transfers end
            nothing_is_late(kept)
        if isinstance(error, PeerLostError):
            cure = "The group is spent: make a new one, and start from one rank's parameters or a checkpoint."
            words = [f"{purpose}:", str(error), cure, getattr(collective, "advice", "")]
            raise PeerLostError(" ".join(filter(None, words))) from error
        raise


def _lanes(
    request: Request,
    agreement: Agreement,
    collective: Collective,
    session: Session,
    prepare: Callable[[Iterable[int]], None],
) -> Iterator[Lane | NodeLane | NodeCopyLane]:
    """Yield the lanes that a request needs: leaves on an accelerator first, if the transport has a way for them.

    ``prepare`` makes memory for the results of leaves, where buckets do not.
    """
    layout = request.layout
    assert layout is not None
    ties = request.ties if agreement.same_ties else {}
    rank, root = collective.rank, request.options.root
    kept: Sequence[int] = range(len(layout.leaves))
    if ties:
        kept = [i for i in kept if i not in ties]
    on_device = [i for i in kept if layout.leaves[i].device] if layout.devices and not request.options.aside else []

    def plan(numbers: Sequence[int], place: str, make: Callable[[list[Any]], Any]) -> Any:
        def remembered() -> tuple[Any, list[int]]:
            planned = make([(i, layout.families[i], layout.leaves[i]) for i in numbers])
            made = made_by(planned.buckets if isinstance(planned, NodePlan) else planned)
            return planned, [i for i in numbers if i not in made]

        planned, others = session.remember(key_of(numbers, place), remembered)
        prepare(others)
        return planned

    def key_of(numbers: Sequence[int], *place: Any) -> Hashable:
        return layout, None if len(numbers) == len(layout.leaves) else tuple(numbers), *place

    def codes(place: str, buckets: Sequence[Bucket], rows: range) -> Mapping[int, Codes] | None:
        """Return how the wire writes some rows of each bucket; None if there is no wire."""
        if codec is None:
            return None
        from funcavg._engine.codes import codes_of  # which calls without a wire need not import

        return session.remember(key_of(kept, place, codec), partial(codes_of, codec, buckets, rows))

    codec = request.codec
    if codec is not None and _is_one_host(session.node(collective, request.options.seconds(collective))):
        codec = None
    if codec is not None:  # which is where the host has them, and knows who shares it
        on_device = [i for i in on_device if not codec.encodes(layout.leaves[i].element or "")]
    if on_device and agreement.same_places and layout.devices and hasattr(collective, "device_verbs"):
        (device,) = layout.devices
        verbs = collective.device_verbs(device.partition(":")[0])
        if verbs is not None:
            slots = session.device_slots(device)
            buckets = plan(on_device, device, lambda rows: make_plan(rows, collective.size, slots, DEVICE_BUCKET))
            with slots.in_turn():  # until the lane has carried
                if root is None:
                    natively = verbs.averages_natively(weighted=agreement.weights is not None)
                    yield DeviceLane(buckets, verbs, rank, slots, natively)
                else:
                    yield DeviceCopyLane(buckets, verbs, rank, root)
            there = set(on_device)
            kept = [i for i in kept if i not in there]
    if not kept:
        return
    node = session.node(collective, request.options.seconds(collective))
    if node is None:
        make: Any = partial(make_plan, size=collective.size, slots=session.slots(), limit=session.bucket_bytes)
        buckets = plan(kept, "cpu", make)
        written = codes("cpu", buckets, range(collective.size))
        if root is not None:
            yield CopyLane(buckets, collective, rank, root)
        elif written is not None:
            from funcavg._engine.wired import WiredLane

            yield WiredLane(buckets, collective, rank, written, session.code_slots())
        else:
            yield Lane(buckets, collective, rank)
    elif root is None:
        planned, crossing = plan(kept, "node", partial(NodePlan, node)), session.crossing(node)
        first, nodes = node.index * len(node.nodes), len(node.nodes)
        written = None if crossing is None else codes("node", planned.buckets, range(first, first + nodes))
        yield NodeLane(planned, node, collective, crossing, written)
    else:
        stages = StageSlots(node, root)
        make = partial(make_plan, size=node.rows, slots=stages, limit=stages.bytes)
        yield NodeCopyLane(plan(kept, f"stage of {root}", make), node, collective, root)


def _is_one_host(node: Node | None) -> bool:
    """Say whether all ranks are known to share a host."""
    return node is not None and len(node.nodes) == 1

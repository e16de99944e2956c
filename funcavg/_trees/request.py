"""What a rank asks for: a tree taken apart and described, its own mistakes kept for agreement to report."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from funcavg._trees import containers
from funcavg._trees.claim import WIRE, Claim, digest
from funcavg._trees.containers import Flat
from funcavg._trees.layouts import Layout, layout_of
from funcavg._trees.options import Options, Where

if TYPE_CHECKING:
    from funcavg.wires.codecs import Codec

__all__ = ["Layout", "Request", "check_weight", "failed_request", "make_request"]


class Request(NamedTuple):
    """One rank's side of a call."""

    flat: Flat
    layout: Layout | None  # None if there is an error
    claim: Claim
    options: Options
    ties: dict[int, int]  # averaged leaf -> the first with the same memory
    only: frozenset[int] | None = None  # positions that may be averaged
    addresses: Sequence[int] = ()  # of averaged leaves, as their families say; none of a transform's
    codec: Codec | None = None  # of the wire

    @property
    def leaves(self) -> list[Any]:
        """The leaves that are averaged."""
        assert self.layout is not None
        everything = self.flat.leaves  # looked up once: trees of thousands of leaves pass here
        return list(everything) if self.layout.all_averaged else [everything[i] for i in self.layout.averaged]

    def rebuild(self, results: Sequence[Any]) -> Any:
        """Return the tree with its averaged leaves replaced."""
        assert self.layout is not None
        if self.layout.all_averaged:
            return self.flat.rebuild(results)
        everything = list(self.flat.leaves)
        for i, result in zip(self.layout.averaged, results, strict=True):
            everything[i] = result
        return self.flat.rebuild(everything)


def make_request(flat: Flat, options: Options, *, only: frozenset[int] | None = None, wrapped: bool = False) -> Request:
    """Take a call's arguments apart. Mistakes in the tree or the weight go into the claim, for all ranks to raise.

    ``only`` restricts averaging to leaves at these positions, in the place of ``where``. ``wrapped`` leaves are those
    of a transform: ties are not looked for, since their memory may be out of reach.
    """
    try:
        number = check_weight(options.weight)
        codec = None if options.wire is None else _codec_of(options.wire)
        if only is None and options.where is not None:
            only = _accepted(flat.spec, options.where)
        layout = layout_of(flat, only, exactly=options.exactly)
        if layout.hollow and not wrapped:
            first, *more = (layout.lines[i] for i in layout.averaged)
            raise ValueError(
                f"not one of the {1 + len(more)} averaged leaves has an element: {first}{', ...' if more else ''}. If "
                f"parameters have been partitioned, as by ZeRO-3 or FSDP, gather them first and average inside of that."
            )
        ties, addresses = {}, []
        if not wrapped:
            everything = flat.leaves
            leaves = everything if layout.all_averaged else [everything[i] for i in layout.averaged]
            _check_memory(layout, leaves)
            addresses = _addresses(layout, leaves)
            ties = _find_ties(layout, leaves, addresses)
            if options.donate:
                _check_donation(layout, leaves, addresses, ties)
    except Exception as mistake:  # whatever it is, the other ranks must hear of it
        return failed_request(mistake, options)
    line = options.line if codec is None else f"{options.line}{WIRE}wire {codec.label}"
    claim = Claim(
        digest([line, layout.signature.hex()]),
        [line, *layout.lines],
        digest([repr(sorted(ties.items()))]),
        digest([layout.on_device]),
        number,
        options.weight is not None,
        donates_ties=options.donate and bool(ties),
    )
    return Request(flat, layout, claim, options, ties, only, addresses, codec)


def failed_request(mistake: Exception, options: Options) -> Request:
    """Return what a rank brings to agreement that cannot even describe what it was given."""
    return Request(containers.flatten(None), None, Claim(bytes(16), (), b"", b"", error=mistake), options, {})


def _accepted(spec: containers.Spec, where: Where) -> frozenset[int]:
    if not callable(where):
        raise TypeError(f"where must be a function of a path, got {where!r} of type {type(where).__name__}.")
    accepted: list[int] = []
    path: tuple[Any, ...] = ()
    try:
        for i, path in enumerate(containers.paths(spec)):
            if where(path):
                accepted.append(i)
    except Exception as error:
        raise RuntimeError(f"where raised {type(error).__name__}: {error}, for path {path!r}.") from error
    return frozenset(accepted)


def check_weight(weight: Any) -> float:
    """Return a rank's weight as a number, 1 if there is none; or raise what is wrong with it."""
    if weight is None:
        return 1.0
    try:
        if isinstance(weight, (bool, str, bytes)):
            raise TypeError
        number = float(weight)
    except (TypeError, ValueError, RuntimeError):
        shown = f"{weight!r} of type {type(weight).__name__}"
        raise TypeError(f"weight must be a number, at least 0, got {shown}.") from None
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"weight must be finite and at least 0, got {weight!r}.")
    return number


def _codec_of(wire: Any) -> Codec | None:
    from funcavg.wires.codecs import codec_of  # which calls without a wire need not import

    return codec_of(wire)


def _find_ties(layout: Layout, leaves: Sequence[Any], addresses: Sequence[int]) -> dict[int, int]:
    """Return {leaf: the first leaf that is the same memory in the same dtype, shape and strides}."""
    if len(set(addresses)) == len(addresses):
        return {}
    first: dict[Hashable, int] = {}
    ties = {}
    for i, (family, leaf, address) in enumerate(zip(layout.families, leaves, addresses, strict=True)):
        original = first.setdefault((address, family.geometry(leaf)), i)
        if original != i:
            ties[i] = original
    return ties


def _addresses(layout: Layout, leaves: Sequence[Any]) -> list[int]:
    """Return where each leaf's memory begins; something unique where there is none."""
    if len(layout.members) == 1:
        (family,) = layout.members
        found = family.addresses(leaves)
        return [at or -id(leaf) for at, leaf in zip(found, leaves, strict=True)] if 0 in found else found
    addresses: list[int] = [0] * len(leaves)
    for family, members in layout.members.items():
        found = family.addresses([leaves[i] for i in members])
        for i, address in zip(members, found, strict=True):
            addresses[i] = address or -id(leaves[i])
    return addresses


def _check_memory(layout: Layout, leaves: Sequence[Any]) -> None:
    """Raise ValueError if the memory of a leaf has been freed: who reads it would crash."""
    for family, members in layout.members.items():
        chosen = leaves if len(members) == len(leaves) else [leaves[i] for i in members]
        for i in members if not family.are_held(chosen) else ():
            if not family.is_held(leaves[i]):
                raise ValueError(
                    f"{layout.name(i)} is {layout.leaves[i].text}, but its memory has been freed: its storage has been "
                    f"resized. Average where parameters are gathered, as by FSDP's summon_full_params."
                )


def _check_donation(layout: Layout, leaves: Sequence[Any], addresses: Sequence[int], ties: dict[int, int]) -> None:
    """Raise ValueError if a result cannot be written into the leaves' own memory."""
    for family, members in layout.members.items():
        chosen = leaves if len(members) == len(leaves) else [leaves[i] for i in members]
        if not layout.intricate and family.all_donatable(chosen):
            continue
        for i in members:
            reason = family.refuse_donation(leaves[i])
            if reason is not None:
                raise ValueError(f"donate=True, but {layout.name(i)} is {reason}. Pass donate=False, or a copy of it.")
    kept = layout.mutable
    if ties:
        kept = kept[~np.isin(kept, list(ties))]
    spans = layout.spans[kept] + np.array(addresses, np.int64)[kept, None]
    order = np.argsort(spans[:, 0], kind="stable")
    begins, ends = spans[order, 0], np.maximum.accumulate(spans[order, 1])
    if not (begins[1:] < ends[:-1]).any():
        return
    # Extents meet. Interleaved views, such as x[0::2] and x[1::2], may still have no element in common.
    for position, this in enumerate(order):
        for that in order[:position]:
            if spans[that, 1] > spans[this, 0] and _share(layout, leaves, kept[this], kept[that]):
                one, other = (layout.name(kept[k]) for k in sorted((this, that)))
                raise ValueError(
                    f"donate=True, but {one} and {other} overlap in memory without being equal views. "
                    f"Pass donate=False, or copies of them."
                )


def _share(layout: Layout, leaves: Sequence[Any], this: int, that: int) -> bool:
    one, other = (layout.families[i].as_numpy(leaves[i]) for i in (this, that))
    if one is None or other is None:
        return True  # on an accelerator, where nobody can tell
    try:
        return bool(np.shares_memory(one, other, max_work=100_000))  # type: ignore[arg-type]  # the stub knows only 0, -1
    except np.exceptions.TooHardError:
        return True

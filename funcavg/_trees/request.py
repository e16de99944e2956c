"""What a rank asks for: a tree taken apart and described, its own mistakes kept for agreement to report."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from funcavg._trees import containers
from funcavg._trees.arrays import Family, Leaf, exact_family_of, family_of, type_name
from funcavg._trees.claim import Claim, digest
from funcavg._trees.containers import Flat
from funcavg._trees.options import Options, Where

__all__ = ["Layout", "Request", "check_weight", "failed_request", "make_request"]

BAD_SHOWN = 5
LEFT_OUT = "not averaged"


@dataclass(frozen=True, eq=False)  # a key by identity
class Layout:
    """All that follows from a tree's structure, dtypes and shapes: made once, remembered."""

    averaged: list[int]  # positions of averaged leaves among all
    families: list[Family]  # of averaged leaves, like all that follows
    leaves: list[Leaf]
    special: list[int]  # those that are not their own carrier, or need wrapping
    spans: Any  # (leaves, 2) bytes: where each leaf's memory begins and ends, seen from its address
    lines: list[str]  # the signature, but for options
    signature: bytes  # its digest
    devices: frozenset[str]  # accelerators that hold leaves; empty if there are several, for one is what a rank has
    on_device: str  # the mask of leaves that lie there
    members: dict[Family, list[int]]
    intricate: bool  # some leaf is complex or expanded: each must be asked whether it can be donated
    hollow: bool  # there are leaves, and not one has an element, where that is no rank's share of a parameter

    def name(self, i: int) -> str:
        """Return the name of an averaged leaf."""
        return self.lines[self.averaged[i]].rsplit(": ", 1)[0]


class Request(NamedTuple):
    """One rank's side of a call."""

    flat: Flat
    layout: Layout | None  # None if there is an error
    claim: Claim
    options: Options
    ties: dict[int, int]  # averaged leaf -> the first with the same memory
    only: frozenset[int] | None = None  # positions that may be averaged

    @property
    def leaves(self) -> list[Any]:
        """The leaves that are averaged."""
        assert self.layout is not None
        everything = self.flat.leaves  # looked up once: trees of thousands of leaves pass here
        return [everything[i] for i in self.layout.averaged]

    def rebuild(self, results: Sequence[Any]) -> Any:
        """Return the tree with its averaged leaves replaced."""
        assert self.layout is not None
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
        if only is None and options.where is not None:
            only = _accepted(flat.spec, options.where)
        layout = _layout_of(flat, only, exactly=options.exactly)
        if layout.hollow and not wrapped:
            first, *more = (layout.lines[i] for i in layout.averaged)
            raise ValueError(
                f"not one of the {1 + len(more)} averaged leaves has an element: {first}{', ...' if more else ''}. If "
                f"parameters have been partitioned, as by ZeRO-3 or FSDP, gather them first and average inside of that."
            )
        ties = {}
        if not wrapped:
            everything = flat.leaves
            leaves = [everything[i] for i in layout.averaged]
            addresses = _addresses(layout, leaves)
            ties = _find_ties(layout, leaves, addresses)
            if options.donate:
                _check_donation(layout, leaves, addresses, ties)
    except Exception as mistake:  # whatever it is, the other ranks must hear of it
        return failed_request(mistake, options)
    claim = Claim(
        digest([options.line, layout.signature.hex()]),
        [options.line, *layout.lines],
        digest([repr(sorted(ties.items()))]),
        digest([layout.on_device]),
        number,
        options.weight is not None,
        donates_ties=options.donate and bool(ties),
    )
    return Request(flat, layout, claim, options, ties, only)


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


_LAYOUTS: OrderedDict[Hashable, Layout] = OrderedDict()
LAYOUTS = 32  # remembered


def _layout_of(flat: Flat, only: frozenset[int] | None, *, exactly: bool) -> Layout:
    everything = flat.leaves
    types = tuple(map(type, everything))
    kind_of = exact_family_of if exactly else family_of
    by_type = {kind: kind_of(leaf) for kind, leaf in dict(zip(types, everything, strict=True)).items()}
    families = [by_type[kind] for kind in types]
    parts: list[Hashable] = [flat.spec, types, only, exactly]
    try:
        for family in dict.fromkeys(by_type.values()):
            if only is None and len(by_type) == 1:
                chosen = everything
            else:
                members = (i for i, other in enumerate(families) if other is family and (only is None or i in only))
                chosen = [everything[i] for i in members]
            parts.append(family.signature(chosen))
    except Exception:  # a leaf that cannot even say its shape: found again below, and named
        return _describe_all(flat, families, only, exactly=exactly)
    key = tuple(parts)
    layout = None
    # What a container keeps beside its children, such as an array, may not let itself be hashed or compared.
    with contextlib.suppress(Exception):
        layout = _LAYOUTS.get(key)
    if layout is None:
        layout = _describe_all(flat, families, only, exactly=exactly)
        with contextlib.suppress(Exception):
            _LAYOUTS[key] = layout
            while len(_LAYOUTS) > LAYOUTS:
                _LAYOUTS.popitem(last=False)
    return layout


def _describe_all(flat: Flat, families: list[Family], only: frozenset[int] | None, *, exactly: bool) -> Layout:
    everything, names = flat.leaves, containers.names(flat.spec)
    lines, bad, averaged, leaves = [], [], [], []
    for i, (leaf, family) in enumerate(zip(everything, families, strict=True)):
        if only is not None and i not in only:
            lines.append(f"{names[i]}: {LEFT_OUT}")
            continue
        try:
            described = family.describe(leaf)
        except TypeError as error:
            bad.append(f"{names[i]} is a {error}")
            continue
        except Exception as error:  # the framework's own words: what they ask for is not what is needed here
            reason = str(error).strip().partition("\n")[0].partition(" Please ")[0]
            bad.append(f"{names[i]} is a {type_name(leaf)} that cannot be read ({type(error).__name__}: {reason})")
            continue
        lines.append(f"{names[i]}: {described.text}")
        if described.element is not None:
            averaged.append(i)
            leaves.append(described)
    if bad:
        shown = "; ".join(bad[:BAD_SHOWN]) + (f"; and {len(bad) - BAD_SHOWN} more" if len(bad) > BAD_SHOWN else "")
        cannot = "cannot be taken as bits" if exactly else "can be neither averaged nor passed through"
        raise TypeError(
            f"{len(bad)} of {len(everything)} leaves {cannot}: {shown}. Leaves must "
            f"be arrays, numbers, bools or None; leave others out with where=, or with equinox.partition."
        )
    chosen = [families[i] for i in averaged]
    devices = frozenset(leaf.device for leaf in leaves if leaf.device)
    devices = devices if len(devices) == 1 else frozenset()
    return Layout(
        averaged,
        chosen,
        leaves,
        [i for i, leaf in enumerate(leaves) if not leaf.plain],
        np.array([family.span(everything[i]) for family, i in zip(chosen, averaged, strict=True)]).reshape(-1, 2),
        lines,
        digest(lines),
        devices,
        "".join("x" if devices and leaf.device else "." for leaf in leaves),
        {family: [i for i, other in enumerate(chosen) if other is family] for family in dict.fromkeys(chosen)},
        any(f.overlaps_itself(everything[i]) for f, i in zip(chosen, averaged, strict=True))
        or any("complex" in leaf.text for leaf in leaves),
        bool(leaves) and not any(math.prod(leaf.shape) or "part of an FSDP" in leaf.text for leaf in leaves),
    )


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
        return [address or -id(leaf) for address, leaf in zip(family.addresses(leaves), leaves, strict=True)]
    addresses: list[int] = [0] * len(leaves)
    for family, members in layout.members.items():
        found = family.addresses([leaves[i] for i in members])
        for i, address in zip(members, found, strict=True):
            addresses[i] = address or -id(leaves[i])
    return addresses


def _check_donation(layout: Layout, leaves: Sequence[Any], addresses: Sequence[int], ties: dict[int, int]) -> None:
    """Raise ValueError if a result cannot be written into the leaves' own memory."""
    for family, members in layout.members.items():
        if not layout.intricate and family.all_donatable([leaves[i] for i in members]):
            continue
        for i in members:
            reason = family.refuse_donation(leaves[i])
            if reason is not None:
                raise ValueError(f"donate=True, but {layout.name(i)} is {reason}. Pass donate=False, or a copy of it.")
    mutable = [i for i, family in enumerate(layout.families) if family.mutable and i not in ties]
    kept = np.array(mutable, np.int64)
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

"""Layouts: all that follows from a tree's structure and the kinds of its leaves, made once and remembered."""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from funcavg._trees import containers
from funcavg._trees.arrays import Alike, Family, Leaf, exact_family_of, family_of, type_name
from funcavg._trees.claim import digest
from funcavg._trees.containers import Flat

__all__ = ["Layout", "layout_of"]

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

    @cached_property
    def all_averaged(self) -> bool:
        """Whether no leaf passes through, or is left out."""
        return len(self.averaged) == len(self.lines)

    @cached_property
    def mutable(self) -> Any:
        """The leaves that can be written to, if they may be donated."""
        return np.array([i for i, family in enumerate(self.families) if family.mutable], np.int64)


_LAYOUTS: OrderedDict[Hashable, Layout] = OrderedDict()  # by all that families see in leaves
_ALIKE: OrderedDict[Hashable, tuple[Alike, Layout]] = OrderedDict()  # by structure alone, with a test of the leaves
LAYOUTS = 32  # remembered, of either


def layout_of(flat: Flat, only: frozenset[int] | None, *, exactly: bool) -> Layout:
    """Return the layout of a tree of which the leaves at positions ``only`` may be averaged."""
    structure = flat.spec, only, exactly
    # What a container keeps beside its children, such as an array, may not let itself be hashed or compared.
    with contextlib.suppress(Exception):
        alike, known = _ALIKE[structure]
        if alike(flat.leaves):
            return known
    everything = flat.leaves
    types = tuple(map(type, everything))
    kind_of = exact_family_of if exactly else family_of
    by_type = {kind: kind_of(leaf) for kind, leaf in dict(zip(types, everything, strict=True)).items()}
    families = [by_type[kind] for kind in types]
    parts: list[Hashable] = [structure, types]
    try:
        for family in dict.fromkeys(families):
            if only is None and len(by_type) == 1:
                chosen = everything
            else:
                members = (i for i, other in enumerate(families) if other is family and (only is None or i in only))
                chosen = [everything[i] for i in members]
            parts.append(family.signature(chosen))
    except Exception:  # a leaf that cannot even say its shape: found again below, and named
        return _describe_all(flat, families, only, exactly=exactly)
    key = tuple(parts)
    layout: Layout | None = None
    with contextlib.suppress(Exception):
        layout = _LAYOUTS.get(key)
    if layout is None:
        layout = _describe_all(flat, families, only, exactly=exactly)
        with contextlib.suppress(Exception):
            _remember(_LAYOUTS, key, layout)
    with contextlib.suppress(Exception):
        if only is None and len(set(families)) == 1:
            _remember(_ALIKE, structure, (families[0].alike(everything), layout))
    return layout


def _remember(cache: OrderedDict[Hashable, Any], key: Hashable, value: Any) -> None:
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > LAYOUTS:
        cache.popitem(last=False)


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

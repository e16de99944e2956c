"""What torch, NumPy and other arrays have in common, as the engine sees it.

A leaf is described once per signature (`Leaf`) and then handled through its *carrier*: the real-valued torch tensor
or NumPy array that shares the leaf's memory (complex numbers appear as pairs along a last dimension of 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

__all__ = ["EXPANDED", "Alike", "Family", "Leaf", "is_compact", "is_expanded", "memory_span", "type_name"]

Alike: TypeAlias = Callable[[Sequence[Any]], bool]

EXPANDED = "an expanded array, several elements of which share one memory cell"


class Leaf(NamedTuple):
    """What is agreed about one leaf. ``element`` is None for leaves that pass through."""

    text: str  # as shown in errors and hashed into the digest, such as "float32[512, 64]"
    element: str | None = None  # name of the real dtype that the kernel averages
    shape: tuple[int, ...] = ()  # of the carrier
    native: Any = None  # the carrier's dtype, in the framework's own terms
    plain: bool = False  # the leaf is its own carrier, and its result needs no wrapping
    device: str = ""  # the accelerator in whose memory it lies, in torch's terms; "" on the host
    in_order: bool = False  # the carrier lies in C order on the host, where its family's `pointer` says
    compact: bool = False  # a copy of what lies in a bucket (`Family.copies`) is as good a result as `fresh` memory


class Family:
    """How to read, make and name one kind of leaf. Abstract: each kind has its own of what is not implemented here."""

    mutable = True  # False: even a donated leaf is replaced by a new object
    pointer: Callable[[Any], int] | None = None  # where a carrier lies now, if its memory may be freed meanwhile

    def exact(self) -> Family:
        """Return the family that has the same leaves as bits, for whom their dtypes mean nothing.

        Its carriers hold integers, and none of its leaves passes through.
        """
        return self

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        """Return all that `describe` and `span` look at.

        Of many leaves at once and column by column, since trees of thousands of leaves pass here before every average.
        """
        raise NotImplementedError

    def alike(self, leaves: Sequence[Any]) -> Alike:
        """Return a quick way to see that leaves have the signature of these. It may say no to leaves that have it."""
        known = tuple(map(type, leaves)), self.signature(leaves)  # compared, which is faster than to hash it
        return lambda others: (tuple(map(type, others)), self.signature(others)) == known

    def describe(self, leaf: Any) -> Leaf:
        """Describe the leaf, or raise TypeError if it can be neither averaged nor passed through."""
        raise NotImplementedError

    def carrier(self, leaf: Any) -> Any:
        """Return a real-valued array that shares the leaf's memory."""
        return leaf

    def fresh(self, leaf: Any) -> Any:
        """Return the carrier of a result: new memory of the leaf's dtype, shape, device and layout."""
        raise NotImplementedError

    def copies(self, windows: Sequence[Any]) -> Sequence[Any]:
        """Return carriers of results that hold what windows do, each in memory of its own: all at once, for speed."""
        raise NotImplementedError

    def finish(self, leaf: Any, carrier: Any) -> Any:
        """Return the result that stands in for ``leaf``, made from its filled carrier."""
        return carrier

    def finish_all(self, leaves: Sequence[Any], carriers: Sequence[Any]) -> list[Any]:
        """Finish many leaves at once."""
        return [self.finish(leaf, carrier) for leaf, carrier in zip(leaves, carriers, strict=True)]

    def tie(self, leaf: Any, result: Any) -> Any:
        """Return the result for ``leaf``, whose memory is that of a leaf with the given result."""
        return result

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        """Return where each leaf's memory begins, 0 if it has none."""
        raise NotImplementedError

    def geometry(self, leaf: Any) -> Hashable:
        """Return what, besides the address, makes two leaves the same memory: dtype, shape, strides."""
        raise NotImplementedError

    def span(self, leaf: Any) -> tuple[int, int]:
        """Return the bytes between which the leaf's memory lies, seen from its address."""
        raise NotImplementedError

    def refuse_donation(self, leaf: Any) -> str | None:
        """Say why this leaf cannot be written to, if it cannot."""
        return None

    def overlaps_itself(self, leaf: Any) -> bool:
        """Say whether several elements share one memory cell."""
        return False

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        """Return True if `refuse_donation` need not be asked, leaf by leaf, about what may change between calls."""
        return False

    def written(self, carriers: Sequence[Any]) -> None:
        """Tell the framework that bytes of carriers have been written to behind its back."""

    def are_held(self, leaves: Sequence[Any]) -> bool:
        """Return True if none of them can have lost its memory, and `is_held` need not be asked."""
        return True

    def is_held(self, leaf: Any) -> bool:
        """Say whether all the memory of a leaf, or carrier, is still there."""
        return True

    def extent(self, carrier: Any) -> Hashable:
        """Return where a carrier lies and how much memory is held for it, as far as either may change."""
        return None

    def as_bytes(self, carrier: Any) -> Any:
        """View the memory of a contiguous carrier on the host as flat NumPy bytes; None if that cannot be."""
        return None

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        """View flat bytes of a bucket as an array."""
        raise NotImplementedError

    def concatenate(self, sources: list[Any], target: Any) -> None:
        """Copy vectors on the host into one: faster than one by one, and small leaves mostly are vectors."""
        raise NotImplementedError

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        """Copy arrays, one by one."""
        raise NotImplementedError

    def significant(self, leaf: Any, carrier: Any) -> Any:
        """Return what of a carrier of bits two equal leaves have in common: all but what pads an element."""
        return carrier

    def as_numpy(self, leaf: Any) -> Any:
        """View the leaf's memory as a NumPy array of any dtype of the same width, or None on an accelerator."""
        return leaf


def is_expanded(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Say whether several elements may share one memory cell (in rare layouts that interlock, they do not)."""
    if 0 in shape:
        return False
    reach = 0  # of the dimensions with smaller strides: an element further off lies nowhere among them
    for stride, extent in sorted((abs(stride), extent) for extent, stride in zip(shape, strides, strict=True)):
        if extent > 1 and stride <= reach:
            return True
        reach += (extent - 1) * stride
    return False


def is_compact(shape: Sequence[int], nbytes: int, limit: int) -> bool:
    """Say whether an array in C order, of fewer bytes than ``limit``, has the strides that every copy of it has.

    Where a dimension has one element, its stride may be any; and what torch calls channels last is told by it.
    """
    return nbytes < limit and 1 not in shape


def memory_span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Return the bytes, from and to, between which an array lies, seen from its first element."""
    if math.prod(shape) == 0:
        return 0, 0
    reach = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    return sum(step for step in reach if step < 0), sum(step for step in reach if step > 0) + itemsize


def type_name(leaf: Any) -> str:
    """Return the type of a leaf as errors show it."""
    module, name = type(leaf).__module__, type(leaf).__qualname__
    return name if module == "builtins" else f"{module}.{name}"

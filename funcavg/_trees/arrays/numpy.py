"""NumPy arrays, and Python and NumPy numbers."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._trees.arrays.base import EXPANDED, Family, Leaf, is_expanded, memory_span, type_name

__all__ = ["Integers", "NumpyArrays", "Scalars", "StandIn", "StandIns", "is_averaged"]


class NumpyArrays(Family):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.strides for leaf in leaves]),
        )

    def describe(self, leaf: Any) -> Leaf:
        if type(leaf) not in (np.ndarray, np.memmap):
            cure = "averaging its data alone would lose what the subclass means; pass np.asarray(leaf)"
            raise TypeError(f"NumPy subclass {type_name(leaf)} ({cure})")
        return _describe_numpy(leaf.dtype, leaf.shape, plain=leaf.dtype.kind != "c")

    def carrier(self, leaf: Any) -> Any:
        if leaf.dtype.kind != "c":
            return leaf
        return leaf[..., None].view(_component(leaf.dtype))

    def fresh(self, leaf: Any) -> Any:
        # A broadcast leaf (stride 0) gets memory for every element; others keep their memory layout.
        return self.carrier(np.empty_like(leaf, subok=False))

    def finish(self, leaf: Any, carrier: Any) -> Any:
        return carrier if leaf.dtype.kind != "c" else carrier.view(leaf.dtype)[..., 0]

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [leaf.__array_interface__["data"][0] if leaf.size else 0 for leaf in leaves]

    def geometry(self, leaf: Any) -> Hashable:
        return leaf.dtype, leaf.shape, leaf.strides

    def span(self, leaf: Any) -> tuple[int, int]:
        return memory_span(leaf.shape, leaf.strides, leaf.itemsize)

    def refuse_donation(self, leaf: Any) -> str | None:
        if not leaf.flags.writeable:
            return "a read-only NumPy array"
        return EXPANDED if self.overlaps_itself(leaf) else None

    def overlaps_itself(self, leaf: Any) -> bool:
        return is_expanded(leaf.shape, leaf.strides)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return all([leaf.flags.writeable for leaf in leaves])

    def as_bytes(self, carrier: Any) -> Any:
        if not (carrier.flags.c_contiguous and carrier.dtype.isnative and carrier.flags.writeable):
            return None  # read-only memory is packed: transports take writable buffers only
        return carrier.reshape(-1).view(np.uint8)

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        if not isinstance(memory, np.ndarray):
            memory = memory.numpy()
        return memory.view(native).reshape(shape)

    def concatenate(self, sources: list[Any], target: Any) -> None:
        np.concatenate(sources, out=target)

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target[...] = source


class Scalars(NumpyArrays):
    """Python floats and complex numbers, and NumPy scalars: 0-d arrays on the way."""

    mutable = False

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        return _describe_numpy(np.asarray(leaf).dtype, (), plain=False)

    def carrier(self, leaf: Any) -> Any:
        return super().carrier(np.asarray(leaf))

    def fresh(self, leaf: Any) -> Any:
        return super().fresh(np.asarray(leaf))

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = super().finish(np.asarray(leaf), carrier)
        return result[()] if isinstance(leaf, np.generic) else result.item()

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [0] * len(leaves)

    def geometry(self, leaf: Any) -> Hashable:
        return object()  # numbers are not tied

    def span(self, leaf: Any) -> tuple[int, int]:
        return 0, 0

    def overlaps_itself(self, leaf: Any) -> bool:
        return False

    def refuse_donation(self, leaf: Any) -> str | None:
        return None  # immutable: the result is a new number either way

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return True


class StandIn(NamedTuple):
    """In the place of a leaf that passes through, where the leaf itself is out of reach."""

    text: str


class StandIns(Family):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(leaves)

    def describe(self, leaf: Any) -> Leaf:
        return Leaf(leaf.text)


class Integers(Family):
    """Python bools and integers pass through."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        return Leaf("bool" if isinstance(leaf, bool) else "int")


def _describe_numpy(dtype: np.dtype[Any], shape: tuple[int, ...], *, plain: bool) -> Leaf:
    text = f"{dtype.name}{list(shape)}"
    averaged = is_averaged(dtype)
    if averaged is None:
        raise TypeError(f"NumPy array of dtype {dtype}")
    if not averaged:
        return Leaf(text)
    if dtype.kind == "c":
        shape, dtype = (*shape, 2), _component(dtype)
    element = "longdouble" if dtype.type is np.longdouble and dtype.itemsize > 8 else dtype.name
    return Leaf(text, element, shape, dtype.newbyteorder("="), plain)


def is_averaged(dtype: np.dtype[Any]) -> bool | None:
    """Say whether a NumPy dtype is averaged (True), passes through (False), or is refused (None)."""
    if dtype.type.__module__ == "ml_dtypes":  # float types; its integers are 4 bits wide and narrower
        try:
            sys.modules["ml_dtypes"].finfo(dtype.type)  # of any byte order
        except ValueError:
            return False
        return True
    return {"f": True, "c": True, "b": False, "i": False, "u": False}.get(dtype.kind)


def _component(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the real dtype of a complex dtype, byte order kept."""
    return np.dtype(f"{dtype.byteorder}f{dtype.itemsize // 2}")

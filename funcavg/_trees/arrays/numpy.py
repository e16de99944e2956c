"""NumPy arrays, and Python and NumPy numbers."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from funcavg._memory import HUGE
from funcavg._trees.arrays.base import EXPANDED, Family, Leaf, is_compact, is_expanded, memory_span, type_name

__all__ = ["Integers", "NumpyArrays", "Scalars", "StandIn", "StandIns", "is_averaged"]


class NumpyArrays(Family):
    def exact(self) -> Family:
        return ExactArrays()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.strides for leaf in leaves]),
        )

    def describe(self, leaf: Any) -> Leaf:
        _refuse_subclass(leaf, "averaging")
        real = leaf.dtype.kind != "c"
        in_order = real and leaf.dtype.isnative and leaf.flags.c_contiguous
        compact = in_order and is_compact(leaf.shape, leaf.nbytes, HUGE)
        return _describe_numpy(leaf.dtype, leaf.shape, plain=real)._replace(compact=compact)

    def carrier(self, leaf: Any) -> Any:
        if leaf.dtype.kind != "c":
            return leaf
        return leaf[..., None].view(_component(leaf.dtype))

    def fresh(self, leaf: Any) -> Any:
        # A broadcast leaf (stride 0) gets memory for every element; others keep their memory layout.
        return self.carrier(np.empty_like(leaf, subok=False))

    def copies(self, windows: Sequence[Any]) -> Sequence[Any]:
        return list(map(np.ndarray.copy, windows))

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

    def exact(self) -> Family:
        return ExactScalars()

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

    def exact(self) -> Family:
        return ExactIntegers()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        return Leaf("bool" if isinstance(leaf, bool) else "int")


class ExactArrays(NumpyArrays):
    """Arrays as bits."""

    def describe(self, leaf: Any) -> Leaf:
        _refuse_subclass(leaf, "taking")
        return _describe_bits(leaf.dtype, leaf.shape)

    def carrier(self, leaf: Any) -> Any:
        unit = _unit(leaf.dtype)
        bits = f"{leaf.dtype.byteorder}u{unit}" if _is_a_number(leaf.dtype) else f"u{unit}"
        return leaf.view(bits) if unit == leaf.itemsize else leaf[..., None].view(bits)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        whole = carrier.view(leaf.dtype)
        return whole if carrier.itemsize == leaf.itemsize else whole[..., 0]

    def significant(self, leaf: Any, carrier: Any) -> Any:
        if leaf.dtype.type not in (np.longdouble, np.clongdouble) or np.finfo(np.longdouble).nmant != 63:
            return carrier
        return carrier.view("u2").reshape(-1, np.dtype(np.longdouble).itemsize // 2)[:, :5]  # the rest pads 80 bits


class ExactScalars(Scalars, ExactArrays):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple([(type(leaf), getattr(leaf, "dtype", None)) for leaf in leaves])  # a time has a unit, too

    def describe(self, leaf: Any) -> Leaf:
        return _describe_bits(np.asarray(leaf).dtype, ())

    def significant(self, leaf: Any, carrier: Any) -> Any:
        return super().significant(np.asarray(leaf), carrier)


class ExactIntegers(ExactScalars):
    """Python integers of up to 64 bits, as nine bytes: with a sign or without."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        if not all([-(2**63) <= leaf < 2**64 for leaf in leaves]):
            raise ValueError("an integer that `describe` will refuse")
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        if not -(2**63) <= leaf < 2**64:
            raise TypeError(f"int that needs more than 64 bits: {leaf if abs(leaf) < 10**40 else '...'}")
        return Leaf("bool" if isinstance(leaf, bool) else "int", "bits8", (9,), np.dtype("u1"))

    def carrier(self, leaf: Any) -> Any:
        return np.frombuffer(bytearray(int(leaf).to_bytes(9, "little", signed=True)), np.uint8)

    def fresh(self, leaf: Any) -> Any:
        return np.empty(9, np.uint8)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        return type(leaf)(int.from_bytes(carrier.tobytes(), "little", signed=True))

    def significant(self, leaf: Any, carrier: Any) -> Any:
        return carrier


def _refuse_subclass(leaf: Any, doing: str) -> None:
    if type(leaf) not in (np.ndarray, np.memmap):
        cure = f"{doing} its data alone would lose what the subclass means; pass np.asarray(leaf)"
        raise TypeError(f"NumPy subclass {type_name(leaf)} ({cure})")


def _describe_bits(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Leaf:
    unit = _unit(dtype)
    text = (str(dtype).replace(": ", ":") if dtype.kind == "V" and dtype.fields else dtype.name) + str(list(shape))
    shape = shape if unit == dtype.itemsize else (*shape, dtype.itemsize // unit)
    return Leaf(text, f"bits{8 * unit}", shape, np.dtype(f"u{unit}"))


def _is_a_number(dtype: np.dtype[Any]) -> bool:
    """Say whether elements are a number, or two of equal width: whose bytes can be swapped."""
    return dtype.kind in "fiucMm" or dtype.type.__module__ == "ml_dtypes"


def _unit(dtype: np.dtype[Any]) -> int:
    """Return how many bytes of an element make one integer: all, if there is an integer as wide."""
    if dtype.hasobject or not dtype.itemsize:
        reason = "objects" if dtype.hasobject else "of no bytes"
        raise TypeError(f"NumPy array of dtype {dtype}, whose elements are {reason}")
    part = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    unit = next(width for width in (8, 4, 2, 1) if part % width == 0)
    if not dtype.isnative and not (_is_a_number(dtype) and unit == part):
        raise TypeError(
            f"NumPy array of dtype {dtype}, in another byte order than this machine's (pass a copy in its own)"
        )
    return unit


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

"""Random trees for Hypothesis, the exact mean to check results against, and looks at memory that tests share."""

from __future__ import annotations

import ctypes
import math
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import optree
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE

from helpers.frameworks import is_tensor, torch

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ML_DTYPES = [name for name in dir(ml_dtypes) if name.startswith(("bfloat", "float"))]
NUMPY_FLOATS = ["float16", "float32", "float64", "longdouble", *ML_DTYPES]
COMPLEX = ["complex64", "complex128"]
TORCH_FLOATS = [
    *("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
]
INTEGERS = ["bool", "uint8", "int32", "int64"]
SHAPES = [(), (1,), (5,), (0,), (2, 3), (3, 0, 2), (4, 1), (2, 3, 2), (13,), (1, 2, 2, 3)]
LAYOUTS = ["plain", "transposed", "strided", "reversed", "channels_last", "expanded", "read-only", "big-endian"]
VALUES = ["ordinary", "small integers", "subnormal", "huge", "wide", "special"]


class Point(NamedTuple):
    x: Any
    y: Any


@optree.dataclasses.dataclass(namespace=GLOBAL_NAMESPACE)
class Layer:
    weight: Any
    bias: Any


# Leaves


@dataclass(frozen=True)
class Spec:
    """One leaf, whose values differ between ranks unless ``seed`` says otherwise."""

    kind: str  # "numpy", "torch", "parameter", "scalar" (NumPy's), "float", "complex", "int", "bool"
    dtype: str = "float64"
    shape: tuple[int, ...] = ()
    layout: str = "plain"
    values: str = "ordinary"
    seed: int = 0

    @property
    def averaged(self) -> bool:
        return self.kind in ("float", "complex") or (self.kind not in ("int", "bool") and self.dtype not in INTEGERS)

    @property
    def is_array(self) -> bool:
        return self.kind in ("numpy", "torch", "parameter")

    @property
    def donatable(self) -> bool:
        """Whether nothing speaks against donating it; numbers are donated in vain."""
        return not self.is_array or self.layout not in ("expanded", "read-only")


DTYPES = {
    "numpy": [*NUMPY_FLOATS, *COMPLEX, *INTEGERS],
    "torch": [*TORCH_FLOATS, *COMPLEX, *INTEGERS],
    "parameter": ["float32", "float64", "bfloat16", "complex64"],
    "scalar": [*NUMPY_FLOATS, *COMPLEX],
}
KINDS = [kind for kind in DTYPES if torch or kind not in ("torch", "parameter")]


@st.composite
def specs(draw: st.DrawFn, values: list[str] = VALUES) -> Spec:
    """Draw a leaf of any kind, dtype, shape and memory layout."""
    kind = draw(st.sampled_from([*KINDS, *KINDS, "float", "complex", "int", "bool"]))
    common = {"values": draw(st.sampled_from(values)), "seed": draw(st.integers(0, 999))}
    if kind not in DTYPES:
        return Spec(kind, **common)
    dtype = draw(st.sampled_from(DTYPES[kind]))
    if kind == "scalar":
        return Spec(kind, dtype, **common)
    return Spec(kind, dtype, draw(st.sampled_from(SHAPES)), draw(st.sampled_from(LAYOUTS)), **common)


def build(spec: Spec, rank: int) -> Any:
    """Make the leaf of one rank."""
    rng = np.random.default_rng([spec.seed, rank])
    if spec.kind in ("int", "bool"):
        return bool(rng.integers(2)) if spec.kind == "bool" else int(rng.integers(-9, 9))
    if spec.kind in ("float", "complex", "scalar"):
        dtype = {"float": "float64", "complex": "complex128"}.get(spec.kind, spec.dtype)
        leaf = _numbers(rng, dtype, (), spec.values)[()]
        return leaf if spec.kind == "scalar" else leaf.item()
    if spec.kind == "numpy":
        return _lay_out_array(_numbers(rng, spec.dtype, spec.shape, spec.values), spec.layout)
    leaf = _lay_out_tensor(_tensor(_numbers(rng, spec.dtype, spec.shape, spec.values), spec.dtype), spec.layout)
    return torch.nn.Parameter(leaf) if spec.kind == "parameter" else leaf


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


def limits_of(dtype: np.dtype[Any]) -> Any:
    return ml_dtypes.finfo(dtype.type) if dtype.type.__module__ == "ml_dtypes" else np.finfo(dtype)


def _numbers(rng: np.random.Generator, name: str, shape: tuple[int, ...], values: str) -> np.ndarray[Any, Any]:
    dtype = numpy_dtype(name)
    if dtype.kind in "biu":
        return np.asarray(rng.integers(0, 2 if name == "bool" else 9, shape)).astype(dtype)
    if dtype.kind == "c":
        real = np.dtype(f"f{dtype.itemsize // 2}").name
        numbers = np.empty(shape, dtype)
        numbers.real, numbers.imag = _numbers(rng, real, shape, values), _numbers(rng, real, shape, values)
        return numbers
    limits = limits_of(dtype)
    largest, tiny = (float(x) if name != "longdouble" else x for x in (limits.max, limits.smallest_normal))
    wide = np.longdouble if name == "longdouble" else np.float64
    numbers = rng.normal(size=shape).astype(wide)
    if values == "small integers":
        numbers = rng.integers(-3, 4, shape).astype(wide)
    elif values == "subnormal":
        numbers = numbers * wide(tiny)
    elif values == "huge":
        numbers = np.copysign(wide(largest) * rng.choice([1, 0.99, 0.75], shape).astype(wide), numbers)
    elif values == "wide":
        numbers = numbers * np.exp2(rng.integers(-20, 20, shape)).astype(wide)
    elif values == "special":
        numbers = np.where(rng.random(shape) < 0.3, rng.choice([np.inf, -np.inf, np.nan, -0.0], shape), numbers)
    if name == "float8_e8m0fnu":  # powers of two only
        numbers = np.where(numbers == 0, 1.0, np.abs(numbers))
    if values != "special":
        numbers = np.clip(numbers, -largest, largest)
    with np.errstate(all="ignore"):
        return np.asarray(numbers).astype(dtype)


def _tensor(numbers: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    dtype = getattr(torch, name)
    if hasattr(ml_dtypes, name):  # numbers that torch does not take from NumPy travel as bits
        bits = torch.from_numpy(numbers.view(np.dtype(f"i{numbers.itemsize}")))
        return bits.view(dtype)
    return torch.from_numpy(numbers)


def _lay_out_array(leaf: np.ndarray[Any, Any], layout: str) -> np.ndarray[Any, Any]:
    if layout == "transposed":
        return np.asfortranarray(leaf)
    if layout == "strided" and leaf.ndim:
        spaced = np.zeros((*leaf.shape[:-1], 2 * leaf.shape[-1]), leaf.dtype)
        spaced[..., ::2] = leaf
        return spaced[..., ::2]
    if layout == "reversed" and leaf.ndim:
        return leaf[(slice(None, None, -1),) * leaf.ndim].copy()[(slice(None, None, -1),) * leaf.ndim]
    if layout == "expanded":
        return np.broadcast_to(leaf.reshape(-1)[:1].reshape(()), leaf.shape) if leaf.size else leaf
    if layout == "read-only":
        leaf.setflags(write=False)
    if layout == "big-endian" and leaf.dtype.kind not in "biu" and leaf.dtype.type is not np.longdouble:
        return leaf.astype(leaf.dtype.newbyteorder(">"))
    return leaf


def _lay_out_tensor(leaf: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed" and leaf.ndim >= 2:
        return leaf.transpose(0, -1).contiguous().transpose(0, -1)
    if layout in ("strided", "reversed") and leaf.ndim:
        spaced = torch.zeros((*leaf.shape[:-1], 2 * leaf.shape[-1]), dtype=leaf.dtype)
        spaced[..., ::2].copy_(leaf)
        return spaced[..., ::2]
    if layout == "channels_last" and leaf.ndim == 4:
        return leaf.contiguous(memory_format=torch.channels_last)
    if layout == "expanded" and leaf.numel():
        return leaf.reshape(-1)[0].expand(leaf.shape)
    return leaf


# Trees


@dataclass(frozen=True)
class Ref:
    """A place in a tree: which spec, and whether as the very object or as an equal view of it."""

    spec: Spec
    view: bool = False


KEYS = ["w", "b", "a", "layer 1", "z"]
BRANCHES = ["list", "tuple", "dict", "OrderedDict", "defaultdict", "Point", "Layer", "dict of integers"]


@st.composite
def trees(draw: st.DrawFn, values: list[str] = VALUES) -> Any:
    """Draw a tree with `Ref` leaves. One spec at several places is one piece of memory: tied leaves."""
    drawn = [draw(specs(values)) for _ in range(draw(st.integers(1, 5)))]
    budget = draw(st.integers(0, 8))  # leaves

    def grow(depth: int) -> Any:
        nonlocal budget
        branch = draw(st.sampled_from([*BRANCHES, "leaf", "leaf", "leaf"])) if depth < 4 else "leaf"
        if branch == "leaf":
            budget -= 1
            return Ref(draw(st.sampled_from(drawn)), draw(st.booleans())) if draw(st.integers(0, 5)) else None
        width = 2 if branch in ("Point", "Layer") else draw(st.integers(0, 3)) if budget > 0 else 0
        children = [grow(depth + 1) for _ in range(width)]
        if branch in ("Point", "Layer"):
            return Point(*children) if branch == "Point" else Layer(*children)
        if branch in ("list", "tuple"):
            return children if branch == "list" else tuple(children)
        keys = draw(st.permutations(range(20) if branch == "dict of integers" else KEYS))
        pairs = dict(zip(keys, children, strict=False))
        make = {"OrderedDict": OrderedDict, "defaultdict": lambda pairs: defaultdict(list, pairs)}
        return make.get(branch, dict)(pairs)

    tree = grow(0)
    assume(not is_hollow([ref.spec for ref in refs_of(tree)]))
    return tree


def is_hollow(leaves: list[Spec]) -> bool:
    """Say whether there are averaged leaves, and not one has an element, which is an error."""
    sizes = [math.prod(spec.shape) for spec in leaves if spec.averaged]
    return bool(sizes) and not any(sizes)


def plant(tree: Any, rank: int) -> Any:
    """Make one rank's tree: `Ref` leaves replaced by arrays and numbers."""
    built: dict[Spec, Any] = {}

    def leaf_of(ref: Ref) -> Any:
        leaf = built.setdefault(ref.spec, build(ref.spec, rank))
        if ref.view and ref.spec.kind == "torch":
            return leaf.view(leaf.shape) if leaf.is_contiguous() else leaf[...]
        return leaf[...] if ref.view and ref.spec.kind == "numpy" else leaf

    return optree.tree_map(leaf_of, tree)


def refs_of(tree: Any) -> list[Ref]:
    return optree.tree_leaves(tree)


def same_containers(one: Any, other: Any) -> bool:
    """Say whether two trees have the same containers: types, keys and their order, whatever the leaves."""
    if isinstance(one, dict):
        factory = getattr(one, "default_factory", None) is getattr(other, "default_factory", None)
        alike = type(one) is type(other) and list(one) == list(other) and factory
        return alike and all(same_containers(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        alike = type(one) is type(other) and len(one) == len(other)
        return alike and all(map(same_containers, one, other))
    if isinstance(one, Layer):
        return type(other) is Layer and same_containers(tuple(vars(one).values()), tuple(vars(other).values()))
    return (one is None) == (other is None)


# Looking at leaves


def bits(leaf: Any) -> bytes:
    """Return a leaf's values, bit for bit and in logical order. Long doubles without their padding."""
    if is_tensor(leaf):
        copy = leaf.detach().clone(memory_format=torch.contiguous_format)
        return bytes(copy.view(-1).view(torch.uint8).numpy())
    array = np.ascontiguousarray(leaf)
    if array.dtype.type is np.longdouble:
        return " ".join(map(repr, array.reshape(-1))).encode()
    return array.tobytes()


def memory(leaf: Any) -> tuple[int, int] | None:
    """Return the addresses between which the memory behind a leaf lies; None for numbers and empty leaves."""
    if is_tensor(leaf):
        storage = leaf.untyped_storage()
        return (storage.data_ptr(), storage.data_ptr() + storage.nbytes()) if storage.nbytes() else None
    if isinstance(leaf, np.ndarray) and leaf.size:
        return np.lib.array_utils.byte_bounds(leaf)
    return None


def raw_memory(leaf: Any) -> bytes:
    """Return all of the memory behind a leaf: also what lies between its elements."""
    span = memory(leaf)
    return ctypes.string_at(span[0], span[1] - span[0]) if span else repr(leaf).encode()


# The exact mean


def reals(leaf: Any) -> list[Any]:
    """Return a leaf's real numbers, exactly, in logical order; complex numbers as pairs."""
    if is_tensor(leaf):
        leaf = leaf.detach()
        leaf = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        return leaf.to(torch.float64).reshape(-1).tolist()
    array = np.asarray(leaf)
    if array.dtype.kind == "c":
        return [part for number in array.reshape(-1).tolist() for part in (number.real, number.imag)]
    array = array.reshape(-1)
    return list(array) if array.dtype.type is np.longdouble else array.astype(np.float64).tolist()


def exact(number: Any) -> Fraction:
    """Return a finite number as a fraction."""
    return Fraction(*(number if isinstance(number, np.longdouble) else float(number)).as_integer_ratio())


def _ulp(leaf: Any, number: Fraction) -> Fraction:
    """Return the distance between neighbours of the leaf's dtype around a number."""
    # torch.finfo errs about float8_e5m2fnuz (2.13)
    dtype = numpy_dtype(str(leaf.dtype).removeprefix("torch.")) if is_tensor(leaf) else np.asarray(leaf).dtype
    limits = limits_of(dtype)
    eps, normal = exact(limits.eps), exact(limits.smallest_normal)
    magnitude = max(abs(number), normal)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    return eps * Fraction(2) ** exponent


def assert_is_mean(result: Any, leaves: list[Any], weights: list[float] | None = None) -> None:
    """Check design's bound, |result - mean| <= 1/2 ulp(result) + N * 2**-53 * mean|x|, exactly, element by element.

    With weights, the products round too: the second term is allowed to be four times as large, and to be a few of
    float64's smallest numbers.
    """
    scale = [Fraction(1)] * len(leaves) if weights is None else [Fraction(weight) for weight in weights]
    taken = [(w, reals(leaf)) for w, leaf in zip(scale, leaves, strict=True) if w]
    for i, got in enumerate(reals(result)):
        numbers = [(w, column[i]) for w, column in taken]
        strange = [x for _, x in numbers if not np.isfinite(x)]
        if strange:
            expected = sum(map(float, strange))
            assert got == expected or (math.isnan(got) and math.isnan(expected)), (got, numbers)
            continue
        pairs = [(w, exact(x)) for w, x in numbers]
        total = sum(w for w, _ in pairs)
        mean = sum(w * x for w, x in pairs) / total
        assert np.isfinite(got), (got, float(mean), numbers)
        value = exact(got)
        slack = len(leaves) * Fraction(2) ** -53 * sum(w * abs(x) for w, x in pairs) / total
        if weights is not None:
            slack = 4 * slack + len(leaves) * Fraction(2) ** -1072
        assert abs(value - mean) <= _ulp(result, value) / 2 + slack, (got, float(mean), numbers)

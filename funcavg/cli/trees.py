"""What is averaged: a named tree, or the user's own file, of which only names, dtypes and shapes are read."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from funcavg.cli.environment import CliError, has
from funcavg.cli.files import READERS, open_file

__all__ = ["DTYPES", "NAMED", "Leaf", "Spec", "arrays", "random_array", "random_tensor", "read"]

WIDTHS = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
DTYPES = [dtype for dtype in WIDTHS if dtype != "float8_e8m0fnu"]  # of a named tree: scales have no sign to be random


class Leaf(NamedTuple):
    """One array of a tree."""

    dtype: str
    shape: tuple[int, ...]


class Spec(NamedTuple):
    """A tree: what is averaged of it, by name."""

    name: str
    leaves: dict[str, Leaf]
    left_out: int = 0  # leaves that are not averaged, such as integers

    @property
    def nbytes(self) -> int:
        """The bytes of all leaves that are averaged."""
        return sum(WIDTHS[leaf.dtype] * math.prod(leaf.shape) for leaf in self.leaves.values())

    def numel(self) -> dict[str, int]:
        """Return the number of elements by dtype."""
        total: dict[str, int] = {}
        for leaf in self.leaves.values():
            total[leaf.dtype] = total.get(leaf.dtype, 0) + math.prod(leaf.shape)
        return total


def _resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's 161 parameters (25.6 million elements)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [(width, width_in, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(out, width, 1, 1), (out,), (out,)]
            if block == 0:
                shapes += [(out, width_in, 1, 1), (out,), (out,)]
            width_in = out
    return [*shapes, (1000, 2048), (1000,)]


def _gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of the 148 parameters of the smallest GPT-2 (124 million elements)."""
    wide = 768
    attention = [(wide, 3 * wide), (3 * wide,), (wide, wide), (wide,)]
    feed_forward = [(wide, 4 * wide), (4 * wide,), (4 * wide, wide), (wide,)]
    block = [(wide,), (wide,), *attention, (wide,), (wide,), *feed_forward]
    return [(50257, wide), (1024, wide), *(block * 12), (wide,), (wide,)]


NAMED: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "resnet50": _resnet50,
    "gpt2": _gpt2,
    "thousand-small": lambda: [(256,)] * 1000,
    "many-small": lambda: [(256,)] * 4000,
}


def read(tree: str, dtype: str | None = None) -> Spec:
    """Return the tree of this name, whose leaves have the dtype (float32 by default), or of this file."""
    if tree in NAMED:
        return Spec(tree, {f"p{i}": Leaf(dtype or "float32", shape) for i, shape in enumerate(NAMED[tree]())})
    if not Path(tree).is_dir() and Path(tree).suffix not in READERS:
        raise CliError(
            f"no tree is called {tree!r}: take {', '.join(NAMED)}, a file ({', '.join(READERS)}), or a model's folder"
        )
    if dtype is not None:
        raise CliError(
            f"--dtype {dtype} is for the named trees ({', '.join(NAMED)}): the leaves of {tree} have dtypes of their "
            f"own; leave --dtype out"
        )
    file = open_file(tree)
    found = {name: array for name, array in file.arrays.items() if name not in file.tied}  # those are averaged once
    leaves = {name: Leaf(array.dtype, array.shape) for name, array in found.items() if array.dtype in WIDTHS}
    if not leaves:
        kinds = {array.dtype for array in found.values()} | {type(other).__name__ for other in file.others.values()}
        count = len(found) + len(file.others)
        raise CliError(
            f"{tree}: nothing in it is averaged; its {count} leaves are of {', '.join(sorted(kinds)) or 'no kind'}"
        )
    return Spec(file.parts[0].name, leaves, len(found) + len(file.others) - len(leaves))


def random_array(shape: int | tuple[int, ...], dtype: str) -> Any:
    """Make a NumPy array of random numbers."""
    if dtype.startswith(("bfloat", "float8")):
        if not has("ml_dtypes"):
            raise CliError(f"NumPy has no {dtype} without ml_dtypes: pip install ml_dtypes")
        importlib.import_module("ml_dtypes")
    return np.asarray(np.random.default_rng(0).standard_normal(shape, np.float32), dtype)


def random_tensor(shape: int | tuple[int, ...], dtype: str, device: str) -> Any:
    """Make a torch tensor of random numbers."""
    import torch

    shape = (shape,) if isinstance(shape, int) else shape
    kind = getattr(torch, dtype)
    return torch.randn(shape, dtype=kind if kind.itemsize > 1 else torch.float32, device=device).to(kind)


def arrays(spec: Spec, kind: str, device: str = "cpu") -> dict[str, Any]:
    """Make the tree of random numbers, of torch, NumPy or JAX."""
    if kind == "torch":
        return {name: random_tensor(leaf.shape, leaf.dtype, device) for name, leaf in spec.leaves.items()}
    made = {name: random_array(leaf.shape, leaf.dtype) for name, leaf in spec.leaves.items()}
    if kind == "numpy":
        return made
    import jax

    if {"float64", "complex128"} & set(spec.numel()):
        jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]
    return {name: jax.numpy.asarray(leaf) for name, leaf in made.items()}

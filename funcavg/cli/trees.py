"""What is averaged: a named tree, or the user's own file, of which only names, dtypes and shapes are read."""

from __future__ import annotations

import importlib
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optree

from funcavg.cli.environment import CliError, has

__all__ = ["NAMED", "Leaf", "Spec", "arrays", "random_array", "random_tensor", "read"]

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
SAFETENSORS = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


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


def read(tree: str) -> Spec:
    """Return the tree of this name, or of this file."""
    if tree in NAMED:
        return Spec(tree, {f"p{i}": Leaf("float32", shape) for i, shape in enumerate(NAMED[tree]())})
    path = Path(tree)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix not in READERS:
        raise CliError(
            f"no tree is called {tree!r}: take {', '.join(NAMED)}, a file ({', '.join(READERS)}), or a model's folder"
        )
    if not path.is_file():
        raise CliError(f"{tree}: no such file")
    library, reader = READERS[path.suffix]
    if not has(library):
        raise CliError(f"{tree}: {path.suffix} files need {library}: pip install {library}")
    try:
        found = reader(path)
    except Exception as error:  # whatever a library says of a file that it cannot read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CliError(f"{tree}: cannot be read as {path.suffix}: {reason}") from error
    leaves = {name: leaf for name, leaf in found.items() if leaf.dtype in WIDTHS}
    if not leaves:
        dtypes = ", ".join(sorted({leaf.dtype for leaf in found.values()}))
        raise CliError(f"{tree}: nothing in it is averaged; its {len(found)} leaves are of {dtypes or 'no kind'}")
    return Spec(path.name, leaves, len(found) - len(leaves))


def _in_folder(folder: Path) -> Path:
    """Return the file that stands for a model in a folder, as hubs lay them: an index of shards, or the only one."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise CliError(f"{folder}: {len(found)} files could be the model ({names}); name one, or their index")
    raise CliError(f"{folder}: a folder without a model: no .safetensors, .bin, .pt or .pth, nor an index of such")


def _index(path: Path) -> dict[str, Leaf]:
    """Read the shards that an index names, as `save_pretrained` writes them."""
    shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Leaf] = {}
    for name in shards:
        shard = path.parent / name
        if not shard.is_file():
            raise ValueError(f"it names {name}, which is not there")
        found |= READERS[shard.suffix][1](shard)
    return found


def _safetensors(path: Path) -> dict[str, Leaf]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Leaf(SAFETENSORS.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def _npz(path: Path) -> dict[str, Leaf]:
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive")
    with np.load(path, allow_pickle=False) as file:
        return {name: Leaf(str(array.dtype.newbyteorder("=")), array.shape) for name, array in file.items()}


def _torch(path: Path) -> dict[str, Leaf]:
    import torch

    try:
        # Mapped, so that values are not read, where the format allows it.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # its own words are a page, and tell users to load the file unsafely
        raise ValueError(
            f"torch.load(weights_only=True) takes tensors in containers, such as a state_dict, and fails here with "
            f"{type(error).__name__}"
        ) from error
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):  # a checkpoint of Lightning, and its like
        held = held["state_dict"]
    paths, leaves, _ = optree.tree_flatten_with_path(held)
    found, seen = {}, set()
    for names, leaf in zip(paths, leaves, strict=True):
        kind = Leaf(type(leaf).__name__, ())
        if isinstance(leaf, torch.Tensor):
            kind = Leaf(str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape))
            place = (leaf.untyped_storage().data_ptr(), leaf.storage_offset(), leaf.dtype, leaf.shape, leaf.stride())
            if leaf.numel() and place in seen:  # tied, and averaged once
                continue
            seen.add(place)
        found[".".join(map(str, names))] = kind
    return found


READERS: dict[str, tuple[str, Callable[[Path], dict[str, Leaf]]]] = {
    ".safetensors": ("safetensors", _safetensors),
    ".npz": ("numpy", _npz),
    ".pt": ("torch", _torch),
    ".pth": ("torch", _torch),
    ".bin": ("torch", _torch),
    ".ckpt": ("torch", _torch),
    ".json": ("safetensors", _index),
}


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

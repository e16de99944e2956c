"""Checkpoints of any format: what arrays are in a file, and how to read a part of one.

Opening a file reads its header. What an array holds is read when asked for, part by part, and not kept.
"""

from __future__ import annotations

import functools
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from funcavg.cli import archives
from funcavg.cli.environment import CliError, has

__all__ = [
    "DAMAGE",
    "ELEMENTS",
    "READERS",
    "SAFETENSORS",
    "TORCH",
    "Array",
    "BadFileError",
    "Bytes",
    "File",
    "open_file",
]

Bytes = npt.NDArray[np.uint8]
ELEMENTS = {  # what is averaged, and the real dtype that the kernel then sees
    "float8_e4m3fn": "float8_e4m3fn",
    "float8_e5m2": "float8_e5m2",
    "float8_e4m3fnuz": "float8_e4m3fnuz",
    "float8_e5m2fnuz": "float8_e5m2fnuz",
    "float8_e8m0fnu": "float8_e8m0fnu",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "float64": "float64",
    "complex32": "float16",
    "complex64": "float32",
    "complex128": "float64",
    np.dtype(np.longdouble).name: "longdouble",
    np.dtype(np.clongdouble).name: "longdouble",
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
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "BOOL": "bool",
}
DAMAGE = (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error)  # what reading an array may raise
TORCH = (".pt", ".pth", ".bin", ".ckpt")


class BadFileError(CliError):
    """A file that is damaged, or does not fit to the others."""


class Array(NamedTuple):
    """An array in a file."""

    dtype: str  # as torch and NumPy call it
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[int, int], Bytes]  # from one byte up to another, elements in C order; parts in their order

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass
class File:
    """An open checkpoint."""

    name: str
    parts: list[Path]
    arrays: dict[str, Array]
    others: dict[str, Any] = field(default_factory=dict)  # what stands among the arrays, and is none
    tied: dict[str, str] = field(default_factory=dict)  # arrays that are the memory of an earlier one, by its name
    metadata: dict[str, str] | None = None
    whole: bool = False  # it lies in memory as a whole


def open_file(name: str) -> File:
    """Open a file, or the model in a folder."""
    path = Path(name)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix not in READERS:
        raise CliError(f"{name}: its name must end with one of {', '.join(READERS)}, or be a model's folder")
    if not path.is_file():
        raise CliError(f"{name}: no such file")
    library, reader = READERS[path.suffix]
    if not has(library):
        raise CliError(f"{name}: {path.suffix} files need {library}: pip install {library}")
    try:
        file = reader(path)
    except Exception as error:  # whatever a library says of a file that it cannot read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise BadFileError(f"{name}: cannot be read as {path.suffix}: {reason}") from error
    file.name = name
    return file


def _in_folder(folder: Path) -> Path:
    """Return the file that stands for a model in a folder, as hubs lay them: an index of shards, or the only one."""
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth"):
        found = [path for path in sorted(folder.glob(pattern)) if path.name != "training_args.bin"]  # a Trainer's
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(path.name for path in found[:5])
            raise CliError(f"{folder}: {len(found)} files could be the model ({names}); name one, or their index")
    raise CliError(f"{folder}: a folder without a model: no .safetensors, .bin, .pt or .pth, nor an index of such")


def _index(path: Path) -> File:
    """Open the shards that an index names, as `save_pretrained` writes them."""
    held = json.loads(path.read_text(encoding="utf-8"))
    weight_map = held.get("weight_map") if isinstance(held, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError("it is no index of shards, which has a weight_map")  # noqa: TRY004  # as other damage
    opened = {}
    for name in sorted(set(weight_map.values())):
        shard = path.parent / name
        if not shard.is_file():
            raise ValueError(f"it names {name}, which is not there")
        if shard.suffix not in READERS or shard.suffix == ".json":
            raise ValueError(f"it names {name}, which is no file of arrays")
        opened[name] = READERS[shard.suffix][1](shard)
    shards = list(opened.values())
    whole = File(path.name, [path, *(part for shard in shards for part in shard.parts)], {})
    for name, shard_name in weight_map.items():  # a shard may hold more than it is asked for
        if name not in opened[shard_name].arrays:
            raise ValueError(f"leaf {name!r} is not in {shard_name}, where it should be")
        whole.arrays[name] = opened[shard_name].arrays[name]
    for shard in shards:
        whole.others |= shard.others
        whole.tied |= {name: one for name, one in shard.tied.items() if {name, one} <= whole.arrays.keys()}
        whole.metadata = whole.metadata or shard.metadata
        whole.whole = whole.whole or shard.whole
    return whole


def _safetensors(path: Path) -> File:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:  # it checks the header, and whether the file is as long as that says
        metadata = file.metadata()
    with path.open("rb") as raw:
        (length,) = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        read = functools.partial(_read_at, path, 8 + length + begin)
        arrays[name] = Array(SAFETENSORS.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), end - begin, read)
    return File(path.name, [path], arrays, metadata=metadata)


def _read_at(path: Path, offset: int, begin: int, end: int) -> Bytes:
    """Read without mapping: pages of a mapped file would count as this process's memory."""
    found = np.fromfile(path, np.uint8, end - begin, offset=offset + begin)
    if len(found) != end - begin:
        raise EOFError(f"the file ends {end - begin - len(found)} bytes too early")
    return found


def _npz(path: Path) -> File:
    members = archives.members(path)
    arrays = {name: Array(each.kind, each.shape, each.nbytes, each.read) for name, each in members.items()}
    return File(path.name, [path], arrays)


def _torch(path: Path) -> File:
    from funcavg.cli import tensors

    saved = tensors.load(path)
    arrays = {}
    for name, tensor in saved.tensors.items():
        try:
            memory = tensors.memory_of(tensor)
        except TypeError as error:
            raise ValueError(f"leaf {name!r} is a {error}, which cannot be averaged") from error
        read = functools.partial(tensors.read, memory, saved)
        arrays[name] = Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.nbytes, read)
    whole = not zipfile.is_zipfile(path)
    return File(path.name, [path], arrays, saved.others, saved.tied, whole=whole)


READERS: dict[str, tuple[str, Callable[[Path], File]]] = {
    ".safetensors": ("safetensors", _safetensors),
    ".npz": ("numpy", _npz),
    **dict.fromkeys(TORCH, ("torch", _torch)),
    ".json": ("safetensors", _index),
}

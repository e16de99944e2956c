"""Means in C: `kernel.c`, where it was built when funcavg was installed. Loaded when it is first needed, once.

Its functions are called with addresses, and without the GIL. What it does not know (longdouble, floats of 8 bits), and
everything where it is not there, is calculated by `arithmetic.py`, to the same bits.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from funcavg._memory import address_of

__all__ = ["BlockSum", "Library", "address", "choose", "kernel_in_use", "library"]

VERSION = 4  # of the interface: kernel.c has the same
LIBRARY = __file__.removesuffix("kernel.py") + "libkernel.so"  # hatch_build.py puts it there
DTYPES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}  # as kernel.c numbers them
ITEMSIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
LEVELS = ("C", "C (AVX2)")  # baseline code, and functions for processors that have more

Bytes = npt.NDArray[np.uint8]


class Prepared(ctypes.Structure):
    """What many means have in common: `struct means` of kernel.c."""

    _fields_ = (
        ("count", ctypes.c_int64),
        ("weights", ctypes.POINTER(ctypes.c_double)),
        ("norm", ctypes.c_double),
        ("from_", ctypes.c_int32),
        ("into", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class Library:
    """The library, loaded. OSError says why it cannot be."""

    def __init__(self, path: str) -> None:
        from pathlib import Path  # which would be a tenth of the time that importing funcavg takes

        if not os.access(path, os.F_OK):
            raise FileNotFoundError("it was not built when funcavg was installed; pip install -v says why")
        loaded = ctypes.CDLL(path)
        found = loaded.funcavg_version() if hasattr(loaded, "funcavg_version") else None
        if found != VERSION:
            raise OSError(f"{path} has interface {found}, and this release {VERSION}")
        loaded.funcavg_source.restype = ctypes.c_uint32
        self.source: int = loaded.funcavg_source()  # a checksum of the source that it was built from
        source = b"".join(file.read_bytes() for file in sorted(Path(path).parent.glob("*.[ch]")))
        if source and zlib.crc32(source) != self.source:
            raise OSError(f"{path} was built from another source than the one beside it")
        address, number, nbytes = ctypes.c_void_p, ctypes.c_double, ctypes.c_size_t
        self.mean, self.add, self.write = loaded.funcavg_mean, loaded.funcavg_add, loaded.funcavg_write
        self.mean.argtypes = [address, address, address, address, nbytes]
        self.add.argtypes = [address, address, number, ctypes.c_int32, address, address, address, nbytes]
        self.write.argtypes = [address, address, number, address, address, address, nbytes]
        self.mean.restype = self.add.restype = self.write.restype = None
        self.steps = loaded.funcavg_steps
        self.steps.argtypes = [address, *[ctypes.c_int64] * 2, address, *[ctypes.c_int64] * 2]
        self.steps.restype = ctypes.c_int64
        self.encode, self.decode = loaded.funcavg_encode, loaded.funcavg_decode  # of wires.c: coders.py calls them
        self.encode.argtypes = [address, address, ctypes.c_int64, address, address, ctypes.c_int32]
        self.decode.argtypes = [*self.encode.argtypes, ctypes.c_float]
        self.encode.restype = self.decode.restype = None
        self.level: int = loaded.funcavg_level()

    def prepare(
        self, element: str, into: str = "", count: int = 1, weights: Sequence[float] | None = None, norm: float = 1.0
    ) -> Prepared:
        """Prepare means; what they are of, `Means` says."""
        numbers = None if weights is None else (ctypes.c_double * count)(*weights)
        return Prepared(count, numbers, norm, DTYPES[element], DTYPES[into or element], self.level)


def choose(environ: Mapping[str, str], path: str = LIBRARY) -> tuple[Library | None, str]:
    """Return the library, or None, and which kernel that is, and why.

    ``FUNCAVG_KERNEL=off`` leaves the library out, and ``require`` makes it an error if it is not there.

    >>> choose({"FUNCAVG_KERNEL": "off"})
    (None, 'NumPy and torch (FUNCAVG_KERNEL=off)')
    >>> choose({"FUNCAVG_KERNEL": "on"})
    Traceback (most recent call last):
    ValueError: FUNCAVG_KERNEL must be off or require, or not be set, got 'on'
    """
    setting = environ.get("FUNCAVG_KERNEL", "")
    if setting.lower() not in ("", "off", "require"):
        raise ValueError(f"FUNCAVG_KERNEL must be off or require, or not be set, got {setting!r}")
    if setting.lower() == "off":
        return None, f"NumPy and torch (FUNCAVG_KERNEL={setting})"
    try:
        loaded = Library(path)
    except (OSError, AttributeError) as error:  # it cannot be loaded, or lacks a function
        if setting:
            cure = "Install funcavg again where there is a C compiler, or unset FUNCAVG_KERNEL."
            raise RuntimeError(f"FUNCAVG_KERNEL={setting}, but the C kernel cannot be used: {error}. {cure}") from error
        return None, f"NumPy and torch (the C kernel cannot be used: {error})"
    return loaded, LEVELS[loaded.level]


@functools.cache
def _chosen() -> tuple[Library | None, str]:
    return choose(os.environ)


def library(*elements: str) -> Library | None:
    """Return the library if it is used here and knows these dtypes."""
    return _chosen()[0] if all(element in DTYPES for element in elements) else None


def kernel_in_use() -> str:
    """Say which kernel sums in this process, and if it is not the one in C, why."""
    return _chosen()[1]


def address(memory: npt.NDArray[Any]) -> int:
    """Return where an array begins. It must live as long as the address is used."""
    if not memory.flags.c_contiguous:
        raise ValueError(f"shards must lie in one piece, got strides {memory.strides} of shape {memory.shape}")
    return address_of(memory)


def packer(count: int) -> Any:
    """Return a function that makes a table of so many addresses: faster than an array of ctypes'."""
    return struct.Struct(f"{count}P").pack


class BlockSum:
    """A sum of blocks that come one after another, as `ArraySum` is, in C. It can be copied."""

    def __init__(self, block: Bytes, weight: float, element: str) -> None:
        length = len(block) // ITEMSIZES[element]
        self._element, self._total = element, np.empty(length)
        tight = element == "float64"  # sums are as narrow as the leaves
        self._first, self._flags = np.empty(length if tight else 0), np.empty(length if tight else 0, np.uint8)
        self._call("add", block, weight, 1)

    def add(self, block: Bytes, weight: float) -> None:
        self._call("add", block, weight, 0)

    def write(self, out: Bytes, norm: float) -> None:
        self._call("write", out, norm)

    def _call(self, name: str, memory: Bytes, *numbers: float) -> None:
        found = library(self._element)
        assert found is not None
        kept = [address(array) for array in (self._total, self._first, self._flags)]
        getattr(found, name)(_prepared_for(found, self._element), address(memory), *numbers, *kept, len(memory))


@functools.cache
def _prepared_for(found: Library, element: str) -> Any:
    return ctypes.byref(found.prepare(element))

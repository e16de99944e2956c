"""Memory by its address, without asking the framework that it belongs to; and what only the C library can ask for."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["HUGE", "PAGE", "address_of", "ask_for_huge_pages", "bytes_at", "c_library", "let_go_of_pages"]

HUGE = 4 << 20  # bytes, from which on huge pages are worth it: fresh memory costs four times less (NumPy does the same)
PAGE, MADV_DONTNEED, MADV_HUGEPAGE = 4096, 4, 14


def bytes_at(address: int, nbytes: int, owner: Any) -> npt.NDArray[np.uint8]:
    """View memory as writable bytes that keep ``owner`` alive.

    Frameworks leave marks when they are asked for a view: ``Tensor.numpy()`` makes a storage unfit to be resized, for
    good, and FSDP resizes; JAX's and DLPack's views are read-only, which transports do not take.
    """
    if not nbytes:
        return np.empty(0, np.uint8)
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    memory.owner = owner
    return np.frombuffer(memory, np.uint8)


def address_of(memory: npt.NDArray[Any]) -> int:
    """Return where an array begins."""
    address: int = memory.__array_interface__["data"][0]
    return address


def ask_for_huge_pages(address: int, nbytes: int) -> None:
    """Advise the kernel to back fresh memory, of `HUGE` bytes or more, with huge pages, where it takes advice."""
    begin = -(-address // PAGE) * PAGE
    if sys.platform == "linux":
        c_library().madvise(begin, (address + nbytes - begin) // PAGE * PAGE, MADV_HUGEPAGE)


def let_go_of_pages(address: int, nbytes: int) -> None:
    """Let go of whole pages of a mapped file, which are read again when looked at. What was written there is lost."""
    if sys.platform == "linux":
        c_library().madvise(address, nbytes, MADV_DONTNEED)


@functools.cache
def c_library() -> Any:
    """Return the C library: asked for when memory is mapped or advised on, since Windows has none under this name."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc

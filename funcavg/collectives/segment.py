"""Shared memory that leaves nothing behind: an anonymous file, reached by peers through ``/proc``.

It has no name in any folder, only its owner's user may open it, and it is gone with the last process that maps it,
however that dies. Linux only; elsewhere, and where ``/proc`` is closed, opening fails and ranks do without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import weakref
from typing import Any, NamedTuple

import numpy as np

from funcavg._memory import c_library
from funcavg.collectives.base import Buffer

__all__ = ["HEADER", "WORDS", "Address", "Segment", "map_segment", "open_segment", "watch"]

HEADER = 4096  # bytes in front of the slots: the rank's words, and a page of its own for them
WORDS = 1024  # the first of these bytes
PROT_READ_WRITE, MAP_SHARED, MADV_DONTFORK = 3, 1, 10


class Address(NamedTuple):
    """Where a peer finds a segment."""

    pid: int
    descriptor: int
    nonce: bytes  # 8 bytes, also in the file's name: so nothing else is opened in a process that has reused the pid


class Segment:
    """This rank's own shared memory: a header at first, then `grow` for the slots."""

    def __init__(self) -> None:
        nonce = os.urandom(8)
        self.descriptor = os.memfd_create(_name(nonce), os.MFD_CLOEXEC)
        self.address = Address(os.getpid(), self.descriptor, nonce)
        try:
            self.grow(HEADER)
            self.words = self.map(HEADER)[:WORDS].view(np.int64)  # which peers watch
        except BaseException:
            self.close()
            raise

    def grow(self, nbytes: int) -> None:
        """Reserve memory up to ``nbytes``, or raise OSError: unreserved, a write could die of SIGBUS later."""
        os.posix_fallocate(self.descriptor, 0, nbytes)

    def map(self, nbytes: int) -> Buffer:
        """Return the memory."""
        return _map(self.descriptor, nbytes)

    def close(self) -> None:
        """Give up the descriptor: all who need the memory have mapped it."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def open_segment(address: Address) -> int:
    """Return a descriptor of a peer's segment; OSError if it cannot be reached, or is not what it should be."""
    path = f"/proc/{address.pid}/fd/{address.descriptor}"
    # pathlib would be a sixth of what `import funcavg` takes
    if not os.readlink(path).startswith(f"/memfd:{_name(address.nonce)}"):  # noqa: PTH115
        raise FileNotFoundError(errno.ENOENT, "another process has this number here", path)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is another user's", path)
    return descriptor


def map_segment(descriptor: int, nbytes: int) -> Buffer:
    """Return a peer's memory. It may not have grown yet: nobody touches it before all have said that theirs has."""
    return _map(descriptor, nbytes)


def watch(pid: int) -> int | None:
    """Return a descriptor that tells when a process ends, None where the kernel has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _name(nonce: bytes) -> str:
    return f"funcavg-{nonce.hex()}"


def _map(descriptor: int, nbytes: int) -> Buffer:
    """Map a file. (Python's own mmap would keep a descriptor of each mapping.) Unmapped with the last view of it."""
    start = c_library().mmap(None, nbytes, PROT_READ_WRITE, MAP_SHARED, descriptor, 0)
    if start in (None, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {nbytes} bytes: {os.strerror(number)}")
    c_library().madvise(start, nbytes, MADV_DONTFORK)  # a forked child, as of a DataLoader, has no part in it
    memory: Any = (ctypes.c_char * nbytes).from_address(start)
    weakref.finalize(memory, _unmap, start, nbytes, os.getpid()).atexit = False
    view: Buffer = np.frombuffer(memory, np.uint8)
    return view


def _unmap(start: int, nbytes: int, pid: int) -> None:
    if os.getpid() == pid:  # in a forked child something else may lie there
        c_library().munmap(start, nbytes)

"""The arrays of a .npz, read part by part: NumPy itself reads each as a whole."""

from __future__ import annotations

import functools
import math
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

__all__ = ["Member", "members"]

SPOOLED = 1 << 20  # elements that are put in order at a time


def members(path: Path) -> dict[str, Member]:
    """Open an archive; return its arrays by name."""
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive")
    archive = zipfile.ZipFile(path)
    found = {}
    for name in archive.namelist():
        leaf = name.removesuffix(".npy")
        try:
            found[leaf] = Member(archive, name)
        except Exception as error:  # it may be damaged in many ways
            raise ValueError(f"leaf {leaf!r} cannot be read: {error}") from error
    return found


class Member:
    """An array in a .npz, which may be compressed: a stream, read from its beginning to its end."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._open = functools.partial(archive.open, name)
        self._stream: IO[bytes] | None = None
        with self._open() as stream:
            self.shape, fortran, self.dtype = _npy_header(stream)
        if self.dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded")
        self.in_order = self.dtype.isnative and not (fortran and len(self.shape) > 1)
        self.kind = self.dtype.name if self.dtype.kind in "biufc" else self.dtype.newbyteorder("=").str
        self.nbytes = self.dtype.itemsize * math.prod(self.shape)

    def read(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        if begin == 0:
            self._stream = self._begin() if self.in_order else self._spool()
        assert self._stream is not None
        found = np.frombuffer(bytearray(self._stream.read(end - begin)), np.uint8)
        if end == self.nbytes:
            self._stream.close()  # the archive's checksum has been compared where it ends
        if len(found) != end - begin:
            raise EOFError(f"it ends {end - begin - len(found)} bytes too early")
        return found

    def _begin(self) -> IO[bytes]:
        stream = self._open()
        _npy_header(stream)
        return stream

    def _spool(self) -> IO[bytes]:
        """Return another file with the elements in C order and native bytes."""
        with self._open() as stream:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        spool = tempfile.TemporaryFile()  # noqa: SIM115  # closed when it has been read
        for begin in range(0, array.size, SPOOLED):
            spool.write(array.flat[begin : begin + SPOOLED].astype(self.dtype.newbyteorder("=")).tobytes())
        spool.seek(0)
        return spool


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(stream)
    return header

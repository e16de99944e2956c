"""Files that means are written into: one `Sink` for each format, and a file that is there as a whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from funcavg._memory import let_go_of_pages
from funcavg.cli.environment import CliError, has
from funcavg.cli.files import READERS, SAFETENSORS, TORCH, Array, BadFileError, Bytes, File

__all__ = ["Sink", "check_output", "replacing", "sink_for"]


AT_ONCE = 32 << 20  # bytes that are written before pages are let go


def check_output(name: str) -> Path:
    """Return the path of the file to be written, or raise CliError if none can be."""
    path = Path(os.path.realpath(name))  # a link's target is replaced, and not the link
    suffix = Path(name).suffix
    if suffix not in SINKS:
        raise CliError(f"--output {name}: the name must end with one of {', '.join(SINKS)}")
    if not path.parent.is_dir():
        raise CliError(f"--output {name}: there is no such folder")
    if path.is_dir():
        raise CliError(f"--output {name}: that is a folder; name a file")
    library = READERS[suffix][0]
    if suffix in TORCH and not has(library):
        raise CliError(f"--output {name}: {suffix} files need {library}: pip install {library}")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside ``path`` that takes its place when all is written, and is gone if anything fails."""
    partial = path.with_name(f".{path.name[:99]}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            if path.exists():
                partial.chmod(path.stat().st_mode & 0o777)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise BadFileError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


class Sink:
    """A file in the making, of arrays that come one after the other, each in parts."""

    again: Sequence[str] = ()  # arrays that are to come once more, to `check`
    flat = True  # it holds nothing but arrays, by name

    def add(self, name: str, parts: Iterable[Bytes]) -> None:
        """Write an array."""
        raise NotImplementedError

    def check(self, name: str, parts: Iterable[Bytes]) -> None:
        """Raise BadFileError if an array is not there as it was added."""

    def close(self) -> None:
        """Write what comes last."""

    def give_up(self) -> None:
        """Leave the file as it is."""


def sink_for(path: Path, file: IO[bytes], arrays: Mapping[str, Array], files: Sequence[File]) -> Sink:
    """Begin a file with arrays like these; from the first of ``files`` of its kind it has what else is in it."""
    return SINKS[path.suffix](file, arrays, files)


def refuse(arrays: Mapping[str, Array], suffix: str, held: Mapping[str, Any] | set[str], instead: str) -> None:
    """Raise CliError if a format has no such dtype."""
    for name, array in arrays.items():
        if array.dtype not in held:
            instead = ".pt" if array.dtype == "complex32" else instead  # which only torch has
            raise CliError(f"leaf {name!r} is {array}, which a {suffix} file cannot hold: choose {instead}")


class _Safetensors(Sink):
    """Header first, then the bytes: the library itself would need all of them at once, twice."""

    def __init__(self, file: IO[bytes], arrays: Mapping[str, Array], files: Sequence[File]) -> None:
        codes = {dtype: code for code, dtype in SAFETENSORS.items()}
        refuse(arrays, ".safetensors", codes, ".pt or .npz")
        if "__metadata__" in arrays:
            raise CliError(
                "leaf '__metadata__' has a name that a .safetensors file keeps for itself: choose .pt or .npz"
            )
        metadata = next((each.metadata for each in files if each.metadata is not None), None)
        if metadata is None and any(each.parts[-1].suffix in TORCH for each in files):
            metadata = {"format": "pt"}  # as torch's own writer says, and transformers asks
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        place = 0
        # Widest first, as the library has it: then all are aligned.
        for name in sorted(arrays, key=lambda name: -arrays[name].nbytes // max(1, math.prod(arrays[name].shape))):
            array = arrays[name]
            offsets = [place, place := place + array.nbytes]
            header[name] = {"dtype": codes[array.dtype], "shape": array.shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(struct.pack("<Q", len(text)) + text)
        self._file, self._begin, self._header = file, file.tell(), header

    def add(self, name: str, parts: Iterable[Bytes]) -> None:
        self._file.seek(self._begin + self._header[name]["data_offsets"][0])
        for part in parts:
            self._file.write(part.data)


class _Npz(Sink):
    def __init__(self, file: IO[bytes], arrays: Mapping[str, Array], files: Sequence[File]) -> None:
        foreign = {
            array.dtype for array in arrays.values() if array.dtype.startswith(("bfloat", "float8", "complex32"))
        }
        refuse(arrays, ".npz", {array.dtype for array in arrays.values()} - foreign, ".safetensors or .pt")
        self._arrays, self._archive = arrays, zipfile.ZipFile(file, "w")

    def add(self, name: str, parts: Iterable[Bytes]) -> None:
        array = self._arrays[name]
        descr = np.lib.format.dtype_to_descr(np.dtype(array.dtype))
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": descr, "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(part.data)

    def close(self) -> None:
        self._archive.close()

    def give_up(self) -> None:
        with contextlib.suppress(Exception):  # else it would try when it is collected, and complain
            self._archive.close()


class _LettingGo:
    """A file whose writer reads a mapped one meanwhile: of that, pages are let go."""

    def __init__(self, file: IO[bytes], pages: Sequence[tuple[int, int]]) -> None:
        self._file, self._pages, self._written = file, pages, 0

    def write(self, data: Any) -> int:
        count = self._file.write(data)
        self._written += count
        if self._written >= AT_ONCE:
            self._written = 0
            for begin, end in self._pages:
                let_go_of_pages(begin, end - begin)
        return count

    def flush(self) -> None:
        self._file.flush()


class _Torch(Sink):
    """The first file of torch's once more, mapped so that what is written to its tensors stays in memory."""

    def __init__(self, file: IO[bytes], arrays: Mapping[str, Array], files: Sequence[File]) -> None:
        import torch

        from funcavg.cli import tensors

        self._file: Any = file
        model = next((each for each in files if each.parts[0].suffix in TORCH), None)
        if model is not None:
            saved = tensors.load(model.parts[0])
            self._held, made, self.flat = saved.held, saved.tensors, False
            self._file = _LettingGo(file, tensors.rest_of(saved))
        else:
            kinds = {
                str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if type(kind) is torch.dtype
            }
            refuse(arrays, ".pt", kinds, ".npz")
            made = {name: torch.empty(array.shape, dtype=kinds[array.dtype]) for name, array in arrays.items()}
            self._held = made
        self._memory = {name: tensors.memory_of(tensor) for name, tensor in made.items()}
        self._tensors = tensors
        self._who, self.again = model.name if model else "", tensors.overlapping(self._memory)

    def add(self, name: str, parts: Iterable[Bytes]) -> None:
        place = 0
        for part in parts:
            self._tensors.write(self._memory[name], place, part)
            place += len(part)

    def check(self, name: str, parts: Iterable[Bytes]) -> None:
        place = 0
        for part in parts:
            if not np.array_equal(self._tensors.between(self._memory[name], place, place + len(part)), part):
                raise BadFileError(
                    f"leaf {name!r} shares memory in {self._who} with another leaf, or its own elements do, and not in "
                    f"all other files: their means differ. Write a .safetensors, in which each has its own"
                )
            place += len(part)

    def close(self) -> None:
        import torch

        try:
            torch.save(self._held, self._file)
        except RuntimeError as error:  # how its writer says that the disk is full
            raise OSError(str(error).partition("\n")[0]) from error


SINKS: dict[str, Callable[[IO[bytes], Mapping[str, Array], Sequence[File]], Sink]] = {
    ".safetensors": _Safetensors,
    ".npz": _Npz,
    **dict.fromkeys(TORCH, _Torch),
}

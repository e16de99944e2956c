"""``funcavg mean``: the mean of checkpoints, leaf by leaf, with the kernel that averages ranks."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from funcavg._engine import mean_into
from funcavg.cli.environment import CliError, has
from funcavg.cli.files import DAMAGE, ELEMENTS, READERS, Array, BadFileError, Bytes, File, open_file
from funcavg.cli.report import progress
from funcavg.cli.writing import SINKS, check_output, replacing, sink_for

__all__ = ["ABOUT", "HOW", "add_arguments", "run"]

ABOUT = "Average checkpoints: of several files of one model, write the file of their mean."
HOW = """\
Files may be of different formats, among them a folder or an index of shards. Of a checkpoint with a dict of arrays
under "state_dict", "model" or "model_state_dict", such as Lightning's, that dict is averaged. All files must hold the
same leaves.

Floating and complex leaves are averaged, to the same bits as by funcavg.average over as many ranks. Integers, bools,
and what --where leaves out are as in the first file; a warning names those that are not the same in all.

A .pt, .pth, .bin or .ckpt is the first such file with other numbers: its structure, tied tensors and other entries
stay (so Lightning can load it: the optimizer's state and the epoch are that file's). A .safetensors keeps the metadata
of the first such file.

However many files there are, at most one model is in memory, and not even one if OUT is a .safetensors or .npz. (Files
of torch before 1.6 are read as a whole.) OUT is written beside its place and then renamed.
Damage inside of an array is noticed in a .npz only: other formats have no checksum, or torch does not look at it.

Exit code 1: a file is damaged, does not fit to the first, or cannot be written; 2: a mistake in the command.
"""
TOGETHER = 32 << 20  # bytes of all files that are at hand at once
LONGEST = 4 << 20  # bytes of one file that are averaged at a time
SHORTEST = 4096  # such a part holds whole elements of any dtype
KEPT = re.compile(r"bool|u?int\d+|[<|=][USMm]\d.*")
NATIVE = ("float16", "float32", "float64", "longdouble")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("files", nargs="+", metavar="FILE", help=f"a model's folder, or a file: {', '.join(READERS)}")
    parser.add_argument("--output", required=True, metavar="OUT", help=f"file to write: {', '.join(SINKS)}")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="a weight for each file (default: equal)")
    parser.add_argument(
        "--where", metavar="REGEX", help="average only leaves in whose name it is found; others are the first file's"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    begin = time.perf_counter()
    _check_weights(args.weights, args.files)
    try:
        where = re.compile(args.where or "")
    except re.error as error:
        raise CliError(f"--where {args.where}: no regular expression: {error}") from error
    out = check_output(args.output)
    before = _leave_at_signals()
    try:
        files = [open_file(name) for name in args.files]
        for file in files:
            if out.exists() and any(part.samefile(out) for part in file.parts):
                raise CliError(f"--output {args.output}: that is one of the files to be averaged; name another")
        elements = _elements(files, where)
        if not any(elements.values()):
            raise CliError("no leaf is averaged" + (f": --where {args.where} is found in none" if args.where else ""))
        _load_kernel(elements)
        nbytes = _write(out, files, args.weights, elements)
    except BadFileError as error:
        print(f"funcavg mean: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    seconds = time.perf_counter() - begin
    print(f"{args.output}: the mean of {len(files)} file(s), {len(elements)} leaves, {nbytes:,} bytes, {seconds:.2f} s")
    return 0


def _leave_at_signals() -> dict[Any, Any]:
    """Let what ends a job raise, so that what is half written is taken away; return the handlers before."""
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread, where no handler can be set
        for name in ("SIGTERM", "SIGHUP"):  # Windows has one of them
            if number := getattr(signal, name, None):
                before[number] = signal.signal(number, lambda number, _: sys.exit(128 + number))
    return before


def _check_weights(weights: Sequence[float] | None, files: Sequence[str]) -> None:
    if weights is None:
        return
    if len(weights) != len(files):
        raise CliError(f"--weights: {len(files)} file(s) need as many weights, got {len(weights)}")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        shown = " ".join(f"{weight:g}" for weight in weights)
        raise CliError(f"--weights: they must be finite, not negative, and not all 0, got {shown}")


def _elements(files: Sequence[File], where: re.Pattern[str]) -> dict[str, str | None]:
    """Return the dtype in which each leaf is averaged, None for those that are kept; all files must agree."""
    first = files[0]
    for file in files[1:]:
        for one, other in ((first, file), (file, first)):
            if missing := next((name for name in one.arrays if name not in other.arrays), None):
                raise BadFileError(f"{other.name}: there is no leaf {missing!r}, and {one.name} has it")
        for name, array in file.arrays.items():
            if str(array) != str(first.arrays[name]):
                raise BadFileError(
                    f"{file.name}: leaf {name!r} is {array}, and {first.arrays[name]} in {first.name}: all must agree"
                )
    return {name: _element(first, name, array, where) for name, array in first.arrays.items()}


def _element(file: File, name: str, array: Array, where: re.Pattern[str]) -> str | None:
    if array.dtype not in ELEMENTS and not KEPT.fullmatch(array.dtype):
        raise BadFileError(f"{file.name}: leaf {name!r} is {array}, which cannot be averaged, nor kept")
    return ELEMENTS.get(array.dtype) if where.search(name) else None


def _load_kernel(elements: dict[str, str | None]) -> None:
    """Import what the kernel needs for dtypes that NumPy does not have."""
    for name, element in elements.items():
        if element is None or element in NATIVE or hasattr(sys.modules.get("torch"), element):
            continue
        for library in ("ml_dtypes", "torch"):  # the smaller one first
            if has(library) and hasattr(importlib.import_module(library), element):
                break
        else:
            raise CliError(f"leaf {name!r} is {element}, which needs ml_dtypes or torch: pip install ml_dtypes")


def _write(out: Path, files: Sequence[File], weights: Sequence[float] | None, elements: dict[str, str | None]) -> int:
    """Write the mean; return how many bytes of leaves it has."""
    arrays = files[0].arrays
    with replacing(out) as target:
        sink = sink_for(out, target, arrays, files)
        try:
            names = [*arrays, *sink.again]
            with progress(len(files) * sum(arrays[name].nbytes for name in names), unit="B") as advance:
                means = Means(files, weights, elements, advance)
                for name in arrays:
                    sink.add(name, means.of(name))
                for name in sink.again:
                    sink.check(name, means.of(name))
            sink.close()
        except BaseException:
            sink.give_up()
            raise
    _tell(out, files, means.differing, flat=sink.flat)
    return sum(array.nbytes for array in arrays.values())


class Means:
    """The means of leaves, from the parts of them that are at hand at a time."""

    def __init__(
        self,
        files: Sequence[File],
        weights: Sequence[float] | None,
        elements: dict[str, str | None],
        advance: Callable[[int], object],
    ) -> None:
        self._files, self._weights, self._elements, self._advance = files, weights, elements, advance
        self._step = max(SHORTEST, min(LONGEST, TOGETHER // (len(files) + 1)) // SHORTEST * SHORTEST)
        self.differing: dict[str, None] = {}  # leaves that were kept, and are not the same in all files

    def of(self, name: str) -> Iterator[Bytes]:
        """Yield a leaf's mean; of one that is kept, what it is in the first file."""
        nbytes = self._files[0].arrays[name].nbytes
        for begin in range(0, nbytes, self._step):
            yield self._between(name, begin, min(begin + self._step, nbytes))

    def _between(self, name: str, begin: int, end: int) -> Bytes:
        parts = [_read(file, name, begin, end) for file in self._files]
        self._advance((end - begin) * len(parts))
        element = self._elements[name]
        if element is None:
            if not all(np.array_equal(part, parts[0]) for part in parts[1:]):
                self.differing[name] = None
            return parts[0]
        mean = np.empty(end - begin, np.uint8)
        mean_into(mean, parts, self._weights, element)
        return mean


def _read(file: File, name: str, begin: int, end: int) -> Bytes:
    try:
        return file.arrays[name].read(begin, end)
    except DAMAGE as error:
        raise BadFileError(f"{file.name}: leaf {name!r} cannot be read: {error}") from error


def _tell(out: Path, files: Sequence[File], differing: dict[str, None], *, flat: bool) -> None:
    """Say what users may not expect of the file that has been written."""
    first = next((file for file in files if file.others), files[0])
    others = list(first.others)
    for name in others:
        if any(name in file.others and file.others[name] != first.others[name] for file in files):
            differing[name] = None
    notes = [
        (differing, f"not averaged, and not the same in all files; {out.name} has the first one's"),
        ([file.name for file in files if file.whole], "in the format before torch 1.6, and in memory as a whole"),
    ]
    if flat:
        tied = [f"{name} = {one}" for file in files for name, one in file.tied.items()]
        notes += [
            (dict.fromkeys(tied), f"tied, and copies in {out.name}"),
            (others, f"no arrays, and left out of {out.name}, which holds nothing else"),
        ]
    for names, what in notes:
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"funcavg mean: {what}: {', '.join([*names][:5])}{more}", file=sys.stderr)

"""``funcavg bench``: how long averaging a model takes here, and against what."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import funcavg
from funcavg.cli import machine, report, trees
from funcavg.cli.checks import listening
from funcavg.cli.environment import STARTED, CliError, choose_backend, has, need
from funcavg.cli.files import READERS
from funcavg.cli.jobs import AgreedError, Job, agree, connect
from funcavg.cli.rows import ALONE, BASES, FLOOR, Row, make_rows, node_setting
from funcavg.cli.start import start
from funcavg.collectives import as_collective, launched_ranks
from funcavg.wires.codecs import NAMES

__all__ = ["ABOUT", "HOW", "add_arguments", "run"]

ABOUT = "Measure how long averaging a tree takes on these ranks, and against what."
HOW = """\
Alone, it starts two ranks on this machine. In a job it takes the job's ranks: `torchrun -m funcavg bench`,
`mpiexec -n 4 funcavg bench`. To measure as if ranks were on two hosts, let FUNCAVG_NODE be a on some and b on others.

rows:
  nothing but the barriers         what is in the times of all rows
  memcpy                           a copy of the tree's bytes, by all ranks at once: the floor
  memcpy, rank 0 alone             while the others wait: what one rank has when it shares no memory bandwidth
  one all-reduce of a flat buffer  the library's own sum of as many bytes, without packing or division
  one all-reduce per leaf          the same, leaf by leaf
  torch's averager                 PeriodicModelAverager of torch.distributed, over Gloo or NCCL
  funcavg's PeriodicModelAverager  its stand-in
  funcavg                          funcavg.average, which makes a new tree
  ..., donate                      and which writes into the old one's memory
  ..., FUNCAVG_NODE=off            and where ranks of one host do not meet in shared memory
  ..., FUNCAVG_NODE=off, int8      and what is sent travels as a code, with `--wire int8`
  funcavg in jit, mpi4jax in jit   compiled, with JAX arrays

Every turn runs each row once, in another order. Times are from barrier to barrier.
"""
WARM_UP = 2  # turns that are not counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--tree", default="resnet50", help=f"{', '.join(trees.NAMED)}, or a file: {', '.join(READERS)}")
    parser.add_argument(
        "--dtype", choices=trees.DTYPES, metavar="NAME", help=f"of a named tree: {', '.join(trees.DTYPES)} (float32)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start, where no launcher has (default: 2)")
    parser.add_argument("--turns", type=int, default=15, help="turns that are counted (default: 15)")
    parser.add_argument(
        "--backend", choices=["torch", "mpi"], help="what connects the ranks (default: what started them)"
    )
    parser.add_argument(
        "--leaves", choices=["torch", "numpy", "jax"], help="kind of arrays (default: torch if installed)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="where torch leaves are (default: cpu)"
    )
    parser.add_argument(
        "--wire",
        nargs="+",
        default=[],
        choices=NAMES,
        metavar="NAME",
        help=f"add rows that average over wires: {', '.join(NAMES)}",
    )
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only rows with one of these words in their name")
    parser.add_argument("--json", action="store_true", help="print JSON, with the time of every turn")
    parser.add_argument("--plot", metavar="FILE", help="draw the rows into a .png, .svg or .pdf")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if args.ranks < 1 or args.turns < 1:
        raise CliError(f"--ranks and --turns must be at least 1, got {args.ranks} and {args.turns}")
    args.leaves = args.leaves or ("torch" if has("torch") else "numpy")
    if args.leaves != "numpy":
        need(args.leaves, f"--leaves {args.leaves}")
    if args.device != "cpu" and args.leaves != "torch":
        raise CliError(f"--device {args.device} is for torch leaves, not for --leaves {args.leaves}")
    backend = choose_backend(args.backend, os.environ)
    if args.device != "cpu" and backend == "mpi":
        raise CliError(f"--device {args.device} needs a job over torch.distributed: --backend torch, or torchrun")
    if launched_ranks(os.environ) is not None or STARTED in os.environ:
        measure(connect(backend, args.device), args)
        return 0
    _check(args)
    return start(backend, args.ranks, measure, args)


def _check(args: argparse.Namespace) -> trees.Spec:
    """Read the tree, and raise CliError for what this machine cannot do, before anything takes time."""
    report.check_plot(args.plot)
    return trees.read(args.tree, args.dtype)


def measure(job: Job, args: argparse.Namespace) -> None:
    """Time all rows on the job's ranks; rank 0 prints."""
    libraries = [has(library) for library in ("torch", "jax", "mpi4jax")]  # which decide the rows
    options = [args.turns, args.rows, args.wire, args.leaves, args.device]
    # What the machine is like is asked before the run, which is a load itself.
    found_here, spec = agree(
        job,
        lambda: (machine.describe(), _check(args)),
        lambda made: (made[0]["kernel"], made[1], libraries, options),
    )
    with ExitStack() as resources:
        rows, notes = agree(
            job, lambda: make_rows(job, spec, args, resources), lambda made: [row.name for row in made[0]]
        )
        if args.rows:
            chosen = [row for row in rows if any(word in row.name for word in args.rows)]
            if not chosen:
                raise AgreedError(f"no row has one of {args.rows} in its name: {'; '.join(row.name for row in rows)}")
            rows = [row for row in rows if row.name in BASES or row in chosen]
        calls = (1 + WARM_UP + args.turns) * len(rows)
        progress = resources.enter_context(report.progress(calls, unit="call", shown=job.rank == 0))
        first = {}
        for row in rows:
            first[row.name] = _first_call(job, row, args.device)
            progress()
        before = {row.name: _counted(row) for row in rows}
        times = _in_turns(job, rows, args.turns, progress)
        sent = {row.name: row.sends or (_counted(row) - before[row.name]) // (WARM_UP + args.turns) for row in rows}
        job.barrier()
        job.close()
    if job.rank != 0:
        return
    medians = {name: statistics.median(found) for name, found in times.items()}
    found = [
        {
            "name": row.name,
            "median_ms": medians[row.name],
            "quartiles_ms": _quartiles(times[row.name]),
            "memcpys": medians[row.name] / medians[FLOOR],
            "GB_per_s": spec.nbytes / 1e6 / medians[row.name],
            "bytes_sent": sent[row.name],
            "bytes_sent_is": "counted" if row.group is not None else "computed",
            "extra_bytes": first[row.name][0],
            "node_stage": first[row.name][1],
            "turns_ms": times[row.name],
        }
        for row in rows
    ]
    result = {
        "funcavg": funcavg.__version__,
        "machine": found_here,
        "memcpy_GB_per_s": {
            "rank 0 alone": spec.nbytes / 1e6 / medians[ALONE],
            f"each of {job.size} at once": spec.nbytes / 1e6 / medians[FLOOR],
        },
        "tree": {
            "name": spec.name,
            "leaves": len(spec.leaves),
            "dtypes": sorted(spec.numel()),
            "left_out": spec.left_out,
            "bytes": spec.nbytes,
        },
        "kind": args.leaves,
        "device": args.device,
        "ranks": job.size,
        "library": job.library,
        "turns": args.turns,
        "notes": notes,
        "rows": found,
        "sentence": report.sentence(f"{spec.name} in {args.dtype}" if args.dtype else spec.name, job.size, found),
    }
    print(json.dumps(result, indent=1) if args.json else report.text(result))
    if args.plot:
        report.plot(args.plot, report.title(result), found)


def _first_call(job: Job, row: Row, device: str) -> tuple[int | None, str]:
    """Run a row for the first time.

    Return by how much this process grew meanwhile, in bytes (None: not known), and what was logged of shared memory.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what earlier rows have freed would hide what this one takes
    before: int | None = None
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew
        before = _status("VmRSS")
    job.barrier()
    with node_setting(row.node), listening() as said:
        row.run()
    job.barrier()
    grown = None if before is None or device != "cpu" else max(0, _status("VmHWM") - before)
    return grown, "; ".join(said)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(text.split(f"{field}:")[1].split()[0])


def _counted(row: Row) -> int:
    collective = as_collective(row.group) if row.group is not None else None
    return int(getattr(collective, "bytes_sent", 0))


def _in_turns(job: Job, rows: Sequence[Row], turns: int, progress: Any) -> dict[str, list[float]]:
    """Time every row between barriers, once a turn, in an order of its own. Return milliseconds."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(WARM_UP + turns):
        for row in random.Random(turn).sample(rows, len(rows)):  # noqa: S311  # the same order on all ranks
            job.barrier()
            start = time.perf_counter()
            row.run()
            job.barrier()
            if turn >= WARM_UP:
                times[row.name].append(1e3 * (time.perf_counter() - start))
            progress()
    return times


def _quartiles(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [*values, *values]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]

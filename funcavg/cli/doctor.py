"""``funcavg doctor``: what works on this machine, and what does not, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence

import funcavg
from funcavg._engine import kernel_in_use, wires_in_use
from funcavg._errors import FuncavgError
from funcavg.cli import checks, losses
from funcavg.cli.environment import CliError, choose_backend, cores, rank_of
from funcavg.cli.jobs import agree, connect
from funcavg.cli.trials import ABSENT, FAILED, NO, OK, SUBJECTS, TRIALS, Finding, attempt, judge
from funcavg.collectives import LAUNCHERS, launched_ranks
from funcavg.wires.codecs import NAMES

__all__ = ["ABOUT", "HOW", "add_arguments", "run"]

ABOUT = "Find out what works here: frameworks, backends, MPI, shared memory, averaging over each; what survives a loss."
HOW = """\
Exit code 0: all that you asked for works; if you ask for nothing, all that is installed. Of "lost", the ways
to go on after a worker was lost, one is enough. In a job (torchrun, mpiexec, srun) the job's own ranks are tried as
well, they alone decide whether ranks share memory, and rank 0 reports.
"""
JOB = "this job"
SETTINGS = (
    "FUNCAVG_NODE",
    "FUNCAVG_KERNEL",
    "FUNCAVG_MPI_GPU",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "MPIEXEC",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("what", nargs="*", metavar="WHAT", help=f"what has to work: {', '.join(SUBJECTS)}")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that each check may take (default: 10)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if unknown := [what for what in args.what if what not in SUBJECTS]:
        raise CliError(f"nothing is called {unknown[0]!r}: {', '.join(SUBJECTS)}")
    if not 1 <= args.timeout <= 3600:
        raise CliError(f"--timeout must be 1 to 3600 seconds, got {args.timeout:g}")
    findings: list[Finding] = []
    for finding in _find(args.what or SUBJECTS, args.timeout):
        findings.append(finding)
        if not args.json and rank_of(os.environ) == 0:
            _print(finding)
    code, verdict = _verdict(findings, args.what)
    if rank_of(os.environ) != 0:
        return code
    if args.json:
        rows = [finding._asdict() for finding in findings]
        verdict = json.dumps({"ok": code == 0, "verdict": verdict, "found": rows}, indent=1)
    print(verdict if args.json else f"\n{verdict}")
    return code


def _find(whats: Sequence[str], timeout: float) -> Iterator[Finding]:
    """Yield what is found, as it is found. Of a job, rank 0 goes on alone when the job's own ranks have been tried."""
    yield from _facts()
    job = None
    if launched_ranks(os.environ) is not None:
        job = _this_job(whats, timeout)
        yield job
        if rank_of(os.environ) != 0:
            return
    yield from _try_all(whats, timeout, job)


def _facts() -> Iterator[Finding]:
    """Yield what needs no trying."""
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores()} core(s)"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "optree")]
    yield Finding("", "funcavg", "", ", ".join([funcavg.__version__, *versions, python]))
    try:
        yield Finding("", "kernel", "", kernel_in_use())
        yield Finding("", "wires", "", f"{', '.join(NAMES)}; written by {wires_in_use()}")
    except (RuntimeError, ValueError) as error:
        yield Finding("", "kernel", FAILED, str(error))
    launched = launched_ranks(os.environ)
    said = ", ".join(f"{name}={os.environ[name]}" for row in LAUNCHERS for name in row[:2] if name in os.environ)
    who = f"{launched[1]}, {launched[0]} ranks" if launched else "none: a single process"
    yield Finding("", "launcher", "", f"{who}{f' ({said})' if said else ''}")
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    yield Finding("", "environment", "", ", ".join(settings) or f"none of {', '.join(SETTINGS)}")


def _this_job(whats: Sequence[str], timeout: float) -> Finding:
    """Connect the ranks of the job that this process is in, and average over them."""
    what, start = "", time.perf_counter()
    try:
        backend = choose_backend(_asked_backend(whats), os.environ)
        what = "mpi" if backend == "mpi" else "torch"
        job = connect(backend, timeout=timeout)
        group = job.group()
        found = agree(job, lambda: checks.average_ranks(group, timeout), timeout=timeout)
        job.close()
    except Exception as error:
        reason = str(error) if isinstance(error, (CliError, FuncavgError)) else f"{type(error).__name__}: {error}"
        return Finding(what, JOB, FAILED, reason, time.perf_counter() - start)
    details = f"{job.library}: {found['details']}"
    return Finding(what, JOB, OK, details, time.perf_counter() - start, found["node"])


def _asked_backend(whats: Sequence[str]) -> str | None:
    """Return which library has to connect this job, if only one was asked for and its launcher may start either."""
    launched = launched_ranks(os.environ)
    if launched is None or launched[1] != "srun" or ("torch" in whats) == ("mpi" in whats):
        return None
    return "torch" if "torch" in whats else "mpi"


def _try_all(whats: Sequence[str], timeout: float, job: Finding | None) -> Iterator[Finding]:
    """Try what was asked for, one after the other: together, they would slow each other."""
    said = []
    for trial in TRIALS:
        meets = trial.check in ("gloo", "mpi-ranks") and "node" in whats and job is None
        if trial.what not in whats and not meets:
            continue
        in_mpi = job is not None and job.what == "mpi" and job.state == OK
        if in_mpi and trial.needs == "mpi4py":  # it is running already, and cannot start jobs inside
            if trial.check != "mpi-ranks":
                found = checks.mpi_facts() if trial.check == "mpi" else losses.this_mpi_job()
                yield Finding(trial.what, trial.name, *judge(found))
            continue
        yield (finding := attempt(trial, timeout))
        said.append(finding.node)
    if "node" in whats:  # in a job, its own ranks decide
        yield _node_stage([text for text in (said if job is None else [job.node]) if text])


def _node_stage(said: Sequence[str]) -> Finding:
    """Say whether ranks of this host meet in shared memory, and if not, why."""
    if not said:
        return Finding("node", "node stage", ABSENT, "needs ranks that are processes and can be connected")
    used = [text for text in said if " meets 0 " not in text]
    return Finding("node", "node stage", OK if used else NO, (used or list(said))[0])


def _print(finding: Finding) -> None:
    """Print a row at once: some take seconds."""
    took = f" ({finding.seconds:.1f} s)" if finding.seconds else ""
    indent = " " * 24
    width = max(60, shutil.get_terminal_size((120, 0)).columns) - len(indent)
    lines = textwrap.wrap(finding.details + took, width, break_on_hyphens=False, break_long_words=False)
    print(f"{finding.name:15s} {finding.state:7s} {f'{chr(10)}{indent}'.join(lines)}", flush=True)


def _verdict(findings: Sequence[Finding], asked: Sequence[str]) -> tuple[int, str]:
    """Return the exit code, and why. Of the ways to go on after a loss, one is enough."""
    if asked:
        bad = [finding for finding in findings if finding.what in asked and finding.state != OK]
    else:
        bad = [finding for finding in findings if finding.state == FAILED]
    able = [finding.name for finding in findings if finding.what == "lost" and finding.state == OK]
    one_is_enough = "lost" in asked and bool(able)
    names = [finding.name for finding in bad if not (one_is_enough and finding.what == "lost")]
    subject = "Of what was asked for" if asked else "Of what is installed"
    works = "enough works" if one_is_enough else "all works"
    verdict = f"this does not work: {'; '.join(names)}" if names else works
    after = f" After a loss, jobs can go on with: {'; '.join(able)}." if one_is_enough else ""
    return int(bool(names)), f"{subject}, {verdict}.{after}"

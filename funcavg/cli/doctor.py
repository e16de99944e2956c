"""``funcavg doctor``: what works on this machine, and what does not, and why."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import funcavg
from funcavg._errors import FuncavgError
from funcavg.cli import checks
from funcavg.cli.environment import LIBRARIES, CliError, choose_backend, cores, has, mpiexec, rank_of, unlaunched
from funcavg.cli.jobs import agree, connect
from funcavg.collectives import LAUNCHERS, launched_ranks

__all__ = ["ABOUT", "HOW", "add_arguments", "run"]

ABOUT = "Find out what works on this machine: frameworks, backends, MPI, shared memory, and averaging over each."
HOW = (
    "Exit code 0: all that you asked for works; if you ask for nothing, all that is installed. In a job (torchrun, "
    "mpiexec, srun) the job's own ranks are tried as well, and rank 0 reports."
)
SUBJECTS = ("threads", "torch", "nccl", "jax", "mpi", "node")
SETTINGS = (
    "FUNCAVG_NODE",
    "FUNCAVG_MPI_GPU",
    "OMP_NUM_THREADS",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "XLA_FLAGS",
    "JAX_PLATFORMS",
    "MPIEXEC",
)
OK, FAILED, ABSENT, NO = "ok", "failed", "absent", "no"
JOB = "this job"


class Trial(NamedTuple):
    """Something to try, in processes of its own."""

    what: str  # one of SUBJECTS that it decides
    name: str
    check: str  # one of `checks.CHECKS`
    needs: str = "numpy"  # library
    start: str = "alone"  # or as two "ranks", or by "mpiexec"


TRIALS = [
    Trial("threads", "threads", "threads"),
    Trial("torch", "torch", "torch", "torch"),
    Trial("torch", "torch, Gloo", "gloo", "torch", "ranks"),
    Trial("nccl", "torch, NCCL", "nccl", "torch", "ranks"),
    Trial("jax", "JAX", "jax", "jax"),
    Trial("jax", "JAX, axis", "axis", "jax"),
    Trial("mpi", "mpi4py", "mpi", "mpi4py"),
    Trial("mpi", "MPI", "mpi-ranks", "mpi4py", "mpiexec"),
    Trial("node", "shared memory", "memory"),
]


class Finding(NamedTuple):
    """A row: whether something works."""

    what: str  # one of SUBJECTS that it decides, or "" for a fact
    name: str
    state: str
    details: str
    seconds: float = 0.0
    node: str = ""  # what was logged about shared memory


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
        job = _this_job(timeout)
        yield job
        if rank_of(os.environ) != 0:
            return
    yield from _try_all(whats, timeout, job)


def _facts() -> Iterator[Finding]:
    """Yield what needs no trying."""
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores()} core(s)"
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", "optree")]
    yield Finding("", "funcavg", "", ", ".join([funcavg.__version__, *versions, python]))
    launched = launched_ranks(os.environ)
    said = ", ".join(f"{name}={os.environ[name]}" for row in LAUNCHERS for name in row[:2] if name in os.environ)
    who = f"{launched[1]}, {launched[0]} ranks" if launched else "none: a single process"
    yield Finding("", "launcher", "", f"{who}{f' ({said})' if said else ''}")
    settings = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    yield Finding("", "environment", "", ", ".join(settings) or f"none of {', '.join(SETTINGS)}")


def _this_job(timeout: float) -> Finding:
    """Connect the ranks of the job that this process is in, and average over them."""
    what, start = "", time.perf_counter()
    try:
        backend = choose_backend(None, os.environ)
        what = "mpi" if backend == "mpi" else "torch"
        job = connect(backend, timeout=timeout)
        group = job.group()
        found = agree(job, lambda: checks.average_ranks(group, timeout), timeout)
        job.close()
    except (CliError, FuncavgError) as error:
        return Finding(what, JOB, FAILED, str(error), time.perf_counter() - start)
    details = f"{job.library}: {found['details']}"
    return Finding(what, JOB, OK, details, time.perf_counter() - start, found["node"])


def _try_all(whats: Sequence[str], timeout: float, job: Finding | None) -> Iterator[Finding]:
    """Try what was asked for, one after the other: together, they would slow each other."""
    said = []
    for trial in TRIALS:
        meets = trial.check in ("gloo", "mpi-ranks") and "node" in whats and job is None
        if trial.what not in whats and not meets:
            continue
        if job is not None and job.what == "mpi" == trial.what and job.state == OK:
            if trial.check == "mpi":  # MPI is running already, and cannot start jobs inside
                yield Finding("mpi", trial.name, OK, checks.mpi_facts()["details"])
            continue
        yield (finding := _try(trial, timeout))
        said.append(finding.node)
    if "node" in whats:  # in a job, its own ranks decide
        yield _node_stage([text for text in (said if job is None else [job.node]) if text])


def _try(trial: Trial, timeout: float) -> Finding:
    """Try one thing, in new processes that end when their time is up."""
    if not has(trial.needs):
        return Finding(trial.what, trial.name, ABSENT, f"not installed: {LIBRARIES[trial.needs]}")
    start = time.perf_counter()
    environ = unlaunched(os.environ) | {"FUNCAVG_DOCTOR_ALARM": str(math.ceil(timeout))}
    environ.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "funcavg.cli.checks", trial.check]
    state, found = FAILED, dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if trial.start == "mpiexec":
                commands = [[*mpiexec(os.environ, timeout), "-n", "2", *command]]
            else:
                commands = [[*command, str(rank), "2", folder] for rank in range(2)]
                commands = commands if trial.start == "ranks" else [command]
            found = _run(commands, environ, timeout)
            state = ABSENT if "absent" in found else OK
            details = found.get("absent") or found["details"]
        except (CliError, OSError) as error:
            details = str(error)
    return Finding(trial.what, trial.name, state, details, time.perf_counter() - start, found.get("node", ""))


def _run(commands: Sequence[Sequence[str]], environ: dict[str, str], timeout: float) -> dict[str, str]:
    """Run the processes of a trial to their end; return what the first has found, or raise CliError."""
    processes = [
        subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]
    deadline = time.monotonic() + timeout
    try:
        said = [process.communicate(timeout=max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        raise CliError(f"no end within {timeout:g} s; --timeout gives it more") from None
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    for process, (_, errors) in zip(processes, said, strict=True):
        if process.returncode == -signal.SIGALRM:
            raise CliError(f"no end within {timeout:g} s; --timeout gives it more")
        if process.returncode:
            lines = [line for line in errors.splitlines() if line.strip()]
            raise CliError(lines[-1].strip() if lines else f"ended with code {process.returncode}, and said nothing")
    lines = [line for output, _ in said for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise CliError(f"said nothing: {said[0][0].strip() or said[0][1].strip()}")
    found: dict[str, str] = json.loads(lines[0])
    return found


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
    """Return the exit code, and why."""
    if asked:
        bad = [finding.name for finding in findings if finding.what in asked and finding.state != OK]
    else:
        bad = [finding.name for finding in findings if finding.state == FAILED]
    subject = "Of what was asked for" if asked else "Of what is installed"
    verdict = f"this does not work: {'; '.join(bad)}" if bad else "all works"
    return int(bool(bad)), f"{subject}, {verdict}."

"""One thing to try after the other, in processes that end when their time is up."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from funcavg.cli.environment import LIBRARIES, CliError, has, mpi_library, mpiexec, unlaunched

__all__ = ["ABSENT", "FAILED", "NO", "OK", "SUBJECTS", "TRIALS", "Finding", "attempt", "judge"]

SUBJECTS = ("threads", "torch", "nccl", "jax", "mpi", "lost", "node")
OK, FAILED, ABSENT, NO = "ok", "failed", "absent", "no"
LATE = "no end within {:g} s; --timeout gives it more"


class Trial(NamedTuple):
    """Something to try, in processes of its own."""

    what: str  # one of SUBJECTS that it decides
    name: str
    check: str  # one of `checks.CHECKS`
    needs: str = "numpy"  # library
    start: str = "alone"  # or as two "ranks", or by "mpiexec", or so that they may be lost: "ulfm"


TRIALS = [
    Trial("threads", "threads", "threads"),
    Trial("threads", "threads, wires", "wires"),
    Trial("torch", "torch", "torch", "torch"),
    Trial("torch", "torch, Gloo", "gloo", "torch", "ranks"),
    Trial("nccl", "torch, NCCL", "nccl", "torch", "ranks"),
    Trial("jax", "JAX", "jax", "jax"),
    Trial("jax", "JAX, axis", "axis", "jax"),
    Trial("mpi", "mpi4py", "mpi", "mpi4py"),
    Trial("mpi", "MPI", "mpi-ranks", "mpi4py", "mpiexec"),
    Trial("lost", "torchft", "torchft", "torchft"),
    Trial("lost", "MPI, ULFM", "ulfm", "mpi4py", "ulfm"),
    Trial("lost", "torchrun", "torchrun", "torch"),
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


def attempt(trial: Trial, timeout: float) -> Finding:
    """Try one thing, in new processes that end when their time is up."""
    if not has(trial.needs):
        return Finding(trial.what, trial.name, ABSENT, f"not installed: {LIBRARIES[trial.needs]}")
    start = time.perf_counter()
    environ = unlaunched(os.environ) | {"FUNCAVG_DOCTOR_ALARM": str(math.ceil(timeout))}
    environ.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-c", "from funcavg.cli.checks import enter; enter()", trial.check]
    state, found = FAILED, dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            commands = [command]
            if trial.start == "ranks":
                commands = [[*command, str(rank), "2", folder] for rank in range(2)]
            elif trial.start == "mpiexec":
                commands = [[*mpiexec(os.environ, timeout), "-n", "2", *command, "each", "2"]]
            elif trial.start == "ulfm":
                commands = [[*_ulfm(os.environ, timeout), *command]]
            found = _run(commands, environ, timeout)
            state, details = judge(found)
        except (CliError, OSError) as error:
            details = str(error)
    return Finding(trial.what, trial.name, state, details, time.perf_counter() - start, found.get("node", ""))


def judge(found: Mapping[str, str]) -> tuple[str, str]:
    """Return the state that a check has found, and its words."""
    state = next((state for state in (ABSENT, NO) if state in found), OK)
    return state, found["details" if state == OK else state]


def _ulfm(environ: Mapping[str, str], timeout: float) -> list[str]:
    """Return what starts three ranks that survive a loss; nothing where none can: the check alone says why."""
    if re.match(r"Open MPI v([5-9]|\d\d)", mpi_library(environ, timeout)):
        launcher = mpiexec(environ, timeout)
        if Path(launcher[0]).name != "srun":
            return [*launcher, "--with-ft", "ulfm", "-n", "3"]
    return []


def _run(commands: Sequence[Sequence[str]], environ: dict[str, str], timeout: float) -> dict[str, str]:
    """Run the processes of a trial to their end; return what the first has found, or raise CliError."""
    with contextlib.ExitStack() as resources:
        files = [[resources.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
            for command, (output, errors) in zip(commands, files, strict=True)
        ]
        resources.callback(_end, processes)
        deadline = time.monotonic() + timeout
        while _first_failed(processes) is None and any(process.poll() is None for process in processes):
            if time.monotonic() > deadline:
                raise CliError(LATE.format(timeout))
            time.sleep(0.01)
        failed = _first_failed(processes)  # before the others, which wait for it, are ended
        outputs, errors = zip(*[[_read(file) for file in pair] for pair in files], strict=True)
    if failed is not None:
        if processes[failed].returncode == -signal.SIGALRM:
            raise CliError(LATE.format(timeout))
        lines = [line for line in errors[failed].splitlines() if line.strip()]
        code = processes[failed].returncode
        raise CliError(lines[-1].strip() if lines else f"ended with code {code}, and said nothing")
    found = [line for output in outputs for line in output.splitlines() if line.startswith("{")]
    if not found:  # a launcher need not end with the code of its ranks
        said = (errors[0].strip() or outputs[0].strip()).splitlines()
        raise CliError(said[-1] if said else "ended without a result")
    result: dict[str, str] = json.loads(found[0])
    return result


def _first_failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    return next((rank for rank, process in enumerate(processes) if process.poll()), None)


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: a launcher is asked first, so that it ends its ranks, which are in groups of their own."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

"""Ranks of an MPI job: start one from plain pytest, with a deadline, and see which rank failed and where."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from funcavg.cli.environment import CliError, unlaunched
from funcavg.cli.environment import mpiexec as find_mpiexec
from helpers.frameworks import Skip, collecting

ROOT = Path(__file__).parents[2]


class JobFailed(AssertionError):
    """A rank raised, died or hung; the message holds every rank's traceback."""


@functools.cache
def launcher() -> list[str] | str:
    """Return the command that starts MPI jobs, or why there is none. ``$MPIEXEC`` chooses it.

    Found out in a process of its own: MPI must not be initialised in this one, which starts jobs.
    """
    try:
        return find_mpiexec(os.environ)
    except CliError as reason:
        return str(reason)


def start(size: int, *args: Any, options: tuple[str, ...] = (), **environ: str) -> subprocess.Popen[str]:
    """Start ``python -m mpi4py`` with these arguments on some ranks; 0: without a launcher.

    ``options`` are the launcher's.
    """
    command = launcher()
    if isinstance(command, str):
        skip(command)
    ranks = [*command, *options, "-n", str(size)] if size else []
    rooms = [folder for folder in sorted((ROOT / "tests").iterdir()) if folder.is_dir() and folder.name != "helpers"]
    path = os.pathsep.join(map(str, [ROOT, ROOT / "tests", *rooms]))
    return subprocess.Popen(
        [*ranks, sys.executable, "-m", "mpi4py", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=unlaunched(os.environ) | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environ,
    )


def skip(reason: str) -> None:
    """Leave a test that needs MPI, unless ``$FUNCAVG_REQUIRE_MPI`` says that there must be one."""
    if os.environ.get("FUNCAVG_REQUIRE_MPI"):
        pytest.fail(f"FUNCAVG_REQUIRE_MPI is set, but {reason}")
    pytest.skip(reason)


def mpiexec(size: int, *args: Any, timeout: float = 50, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    job = start(size, *args, **environ)
    try:
        output, errors = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise JobFailed(f"no end within {timeout} s: {kill(job)}") from None
    return subprocess.CompletedProcess(job.args, job.returncode, output, errors)


def kill(job: subprocess.Popen[str]) -> tuple[str, str]:
    """Kill the launcher and all ranks; return what they had to say."""
    for pid in (*children(job.pid), job.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return job.communicate(timeout=10)


def children(pid: int) -> list[int]:
    """Return the processes below one: launchers put ranks into groups of their own."""
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except FileNotFoundError:
        return []
    return [descendant for child in map(int, found) for descendant in (child, *children(child))]


def run_mpi(
    size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    options: tuple[str, ...] = (),
    dies: tuple[int, ...] = (),
    **environ: str,
) -> list[Any]:
    """Run ``fn(comm, *args)`` on every rank of an MPI job; return the results in rank order.

    ``fn`` is a function of a module that tests can import. A rank leaves when its function is done, without
    MPI_Finalize, which would wait for requests that were given up. Ranks in ``dies`` are expected to be killed, and
    return None; ``options`` are the launcher's.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "job").write_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args)))
        job = start(size, Path(__file__).resolve(), folder, options=options, **environ)
        deadline, hanging = time.monotonic() + timeout, False
        done = [Path(folder, f"outcome{rank}") for rank in range(size)]
        while not all(path.exists() or rank in dies for rank, path in enumerate(done)) and job.poll() is None:
            if time.monotonic() > deadline:
                hanging = True
                for pid in children(job.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGUSR1)
                time.sleep(1)
                break
            time.sleep(0.01)
        Path(folder, "over").touch()
        try:
            said = job.communicate(timeout=0.1 if hanging else 20)
        except subprocess.TimeoutExpired:
            said = kill(job)
        problems, outcomes = [], []
        for rank, path in enumerate(done):
            if not path.exists() and rank in dies:
                outcomes.append(None)
                continue
            if not path.exists():
                stack = Path(folder, f"stack{rank}")
                where = f"hangs after {timeout:g} s at\n" if hanging else "has died\n"
                problems.append(f"rank {rank} {where}{stack.read_text() if stack.exists() else ''}")
                continue
            outcome, failure = pickle.loads(path.read_bytes())
            outcomes.append(outcome)
            if failure is not None:
                problems.append(f"rank {rank} raised\n{failure}")
        if problems:
            raise JobFailed("\n".join([*problems, *said]))
        for outcome in outcomes:
            if isinstance(outcome, Skip):
                pytest.skip(outcome)
        return outcomes


def _rank_of_a_job(folder: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    with Path(folder, f"stack{comm.rank}").open("w") as stack:
        with contextlib.suppress(AttributeError):
            faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        try:
            with collecting():
                module, name, args = pickle.loads(Path(folder, "job").read_bytes())
                fn = getattr(importlib.import_module(module), name)
            outcome = fn(comm, *args), None
        except pytest.skip.Exception as reason:
            outcome = Skip(reason), None
        except BaseException:
            outcome = None, traceback.format_exc()
        draft = Path(folder, f"draft{comm.rank}")
        draft.write_bytes(pickle.dumps(outcome))
        draft.rename(Path(folder, f"outcome{comm.rank}"))
        while not Path(folder, "over").exists():  # a launcher ends all ranks when the first has gone without Finalize
            time.sleep(0.01)
        os._exit(0)


if __name__ == "__main__":
    _rank_of_a_job(sys.argv[1])

"""What there is: installed libraries, the launcher that has started this process, an mpiexec."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from funcavg.collectives import LAUNCHERS, launched_ranks

__all__ = [
    "LIBRARIES",
    "STARTED",
    "CliError",
    "choose_backend",
    "cores",
    "has",
    "mpi_library",
    "mpi_name",
    "mpiexec",
    "need",
    "rank_of",
    "unlaunched",
]

LIBRARIES = {
    "torch": "pip install torch",
    "mpi4py": "pip install mpi4py mpich",
    "jax": "pip install jax",
    "torchft": "pip install torchft",
}
STARTED = "FUNCAVG_BENCH_RANKS"  # how many ranks a command has started, told to each: launchers need not tell
# Asking for its version does not need a library to be initialised, which may hang on a misconfigured network.
MPI_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"


class CliError(Exception):
    """A mistake of the user, or of his machine: one line."""


def has(library: str) -> bool:
    """Say whether a library is installed, without importing it."""
    return importlib.util.find_spec(library) is not None


def need(library: str, what: str) -> None:
    """Raise CliError if a library is not installed."""
    if not has(library):
        raise CliError(f"{what} needs {library}, which is not installed: {LIBRARIES[library]}")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rank_of(environ: Mapping[str, str]) -> int:
    """Return this process's rank as its launcher tells, 0 if it is alone.

    >>> rank_of({}), rank_of({"PMI_SIZE": "4", "PMI_RANK": "3"})
    (0, 3)
    """
    return next((int(environ[row[1]]) for row in LAUNCHERS if launched_ranks(environ, [row])), 0)


def unlaunched(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of processes that are a job of their own: without what a launcher tells each rank.

    What a user sets for all jobs, such as ``OMPI_MCA_btl``, stays; inside a job it may be the launcher's, and goes.
    """
    launched = launched_ranks(environ) is not None
    of_ranks = (
        "PMI",
        "OMPI_",
        "PRTE_",
        "HYD",
        "MPI_LOCAL",
        "TORCHELASTIC_",
        "SLURM_STEP",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    )
    others = {
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        STARTED,
    }

    def stays(name: str) -> bool:
        if launched and name.startswith("SLURM_"):
            return False
        return not (name in others or name.startswith(of_ranks)) or ("_MCA_" in name and not launched)

    return {name: value for name, value in environ.items() if stays(name)}


def choose_backend(asked: str | None, environ: Mapping[str, str]) -> str:
    """Decide which library connects the ranks: "torch" or "mpi".

    The launcher's, where there is one; srun may start either. Alone, torch if it is installed.

    >>> choose_backend(None, {"WORLD_SIZE": "2", "RANK": "0"}), choose_backend("torch", {})
    ('torch', 'torch')
    >>> choose_backend(None, {"PMI_SIZE": "2", "PMI_RANK": "0"})
    'mpi'
    """
    launched = launched_ranks(environ)
    if asked is not None:
        return asked
    if launched is None or launched[1] == "srun":
        first, second = ("torch", "mpi4py") if launched is None else ("mpi4py", "torch")
        found = next((library for library in (first, second) if has(library)), None)
        if found is None:
            raise CliError(
                f"ranks meet over torch.distributed or MPI, and neither torch nor mpi4py is installed: "
                f"{LIBRARIES['torch']}, or {LIBRARIES['mpi4py']}"
            )
        return "mpi" if found == "mpi4py" else "torch"
    return "torch" if launched[1] == "torchrun" else "mpi"


def mpi_name(version: str) -> str:
    """Return the short name of an MPI library.

    >>> mpi_name("Open MPI v5.0.8, package: Open MPI conda@x Distribution"), mpi_name("MPICH Version:      4.3.1")
    ('Open MPI v5.0.8', 'MPICH 4.3.1')
    >>> mpi_name("Intel(R) MPI Library 2021.18 for Linux* OS")
    'Intel MPI 2021.18'
    """
    line = version.strip().partition("\n")[0].partition(",")[0].partition(" for Linux")[0]
    return " ".join(line.replace("Version:", "").replace("(R)", "").replace("MPI Library", "MPI").split())


def mpi_library(environ: Mapping[str, str], timeout: float = 60.0) -> str:
    """Return what mpi4py's MPI library says of itself. It is asked in another process, lest this one load it."""
    need("mpi4py", "an MPI job")
    command = [sys.executable, "-c", MPI_PROBE]
    try:
        probe = subprocess.run(
            command, capture_output=True, text=True, check=False, env=unlaunched(environ), timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise CliError(f"mpi4py does not load its MPI library within {timeout:g} s") from None
    if probe.returncode:
        reason = probe.stderr.strip().rpartition("\n")[2]
        raise CliError(f"mpi4py finds no MPI library ({reason}): pip install mpich, or load your site's")
    return probe.stdout


def mpiexec(environ: Mapping[str, str], timeout: float = 60.0) -> list[str]:
    """Return the command that starts MPI jobs here: ``$MPIEXEC``, else the one beside Python, else that in PATH."""
    library = mpi_library(environ, timeout)
    if "MPIEXEC" in environ:
        return shlex.split(environ["MPIEXEC"])
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise CliError(f"{mpi_name(library)} is there, but no mpiexec; MPIEXEC can say where it is")
    few_cores = ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return [found, *(few_cores if "Open MPI" in library else [])]

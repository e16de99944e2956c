"""The checks of ``funcavg doctor lost``: the ways to go on after a worker was lost, and which of them are there."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import time
from typing import Any

import numpy as np

import funcavg
from funcavg.cli.environment import CliError, mpi_name

__all__ = ["this_mpi_job", "torchft", "torchrun", "ulfm"]

SECONDS = 5  # that a call may wait for a rank


def torchft() -> dict[str, str]:
    """Configure a group of one replica, as torchft's Manager does, and average over it."""
    from datetime import timedelta

    import torch.distributed as dist
    from torchft.process_group import ProcessGroupGloo

    store = dist.TCPStore(  # type: ignore[attr-defined]
        "localhost", 0, is_master=True, wait_for_workers=False
    )
    group = ProcessGroupGloo(timeout=timedelta(seconds=SECONDS))
    group.configure(f"localhost:{store.port}/funcavg", "the only replica", 0, 1)
    if (mean := funcavg.average(3.0, group, timeout=SECONDS)) != 3:
        raise CliError(f"a wrong mean over one replica: {mean} must be 3")
    names = importlib.metadata.packages_distributions().get("torchft")  # it may be torchft-nightly
    version = importlib.metadata.version(names[0]) if names else "of unknown version"
    return {
        "details": f"{version}; a ProcessGroupGloo of one replica is configured, and averages (no lighthouse was tried)"
    }


def torchrun() -> dict[str, str]:
    """Import what torchrun is: starting a job with it would tell no more."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return {"absent": f"torch {torch.__version__} is built without torch.distributed"}
    import torch.distributed.run

    return {
        "details": "is installed; restarts all workers after a loss (--max-restarts), which go on from a checkpoint"
    }


def this_mpi_job() -> dict[str, str]:
    """Say whether the MPI job that this process is in goes on when a rank dies. Initialises MPI."""
    from mpi4py import MPI

    from funcavg.collectives.mpi import survives_losses

    library = mpi_name(MPI.Get_library_version())
    if survives_losses():
        return {"details": f"{library}: this job goes on without a rank that dies"}
    other = "Open MPI can go on"
    if library.startswith("Open MPI"):
        other = "it goes on where it has ULFM (since 5.0) and `mpiexec --with-ft ulfm` has started the job"
    return {"no": f"{library} ends a job of which a rank dies; {other}"}


def ulfm() -> dict[str, str]:
    """Let the last rank of this job kill itself; the others notice, shrink, and average again."""
    from mpi4py import MPI

    found = this_mpi_job()
    if "no" in found:
        return found
    comm = MPI.COMM_WORLD
    _average_over(comm, 3)
    if comm.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.perf_counter()
    try:
        _average_over(comm, 3)
    except funcavg.PeerLostError:
        comm.Revoke()
        left = comm.Shrink()
    else:
        raise CliError(f"rank {comm.rank} of 3 was not told that rank 2 had been killed")
    _average_over(left, 2)
    took = f"after {time.perf_counter() - start:.2f} s (mpiexec --with-ft ulfm)"
    library = mpi_name(MPI.Get_library_version())
    return {"details": f"{library}: 2 ranks go on without a third that was killed, {took}"}


def _average_over(comm: Any, size: int) -> None:
    """Average over a communicator, which must have so many ranks, and compare the mean with what it must be."""
    if comm.size != size:
        raise CliError(f"a communicator must have {size} ranks, and has {comm.size}")
    mean = funcavg.average(np.full(1 << 20, np.float32(comm.rank)), comm, timeout=SECONDS)
    if not (mean == (size - 1) / 2).all():
        raise CliError(f"rank {comm.rank} of {size} got a wrong mean: it must be {(size - 1) / 2}, and is {mean}")

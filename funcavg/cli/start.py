"""Ranks of this machine, started by a command that no launcher has started."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

from funcavg._errors import FuncavgError
from funcavg.cli.environment import STARTED, CliError, mpiexec, need, unlaunched
from funcavg.cli.jobs import AgreedError, Job, TorchJob

__all__ = ["start"]


class Ranks(NamedTuple):
    """What local ranks are started with."""

    main: Callable[[Job, Any], None]
    args: Any
    size: int
    folder: str


def _torch_rank(rank: int, ranks: Ranks) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks.size))
    try:
        job = TorchJob(ranks.args.device, f"file://{ranks.folder}/store")
        ranks.main(job, ranks.args)
    except (CliError, FuncavgError) as error:
        if rank == 0 or not isinstance(error, AgreedError):
            print(f"funcavg {ranks.args.command}: {error}", file=sys.stderr)
        sys.exit(2)


def start(backend: str, size: int, main: Callable[[Job, Any], None], args: Any) -> int:
    """Start ranks on this host that run ``main(job, args)``; over MPI, the whole command. Return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it: ranks share the cores
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # to end the ranks, too
    if backend == "mpi":
        command = [*mpiexec(os.environ), "-n", str(size), sys.executable, "-m", "funcavg", *args.argv]
        with subprocess.Popen(command, env=unlaunched(os.environ) | {STARTED: str(size)}) as process:
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()  # a launcher that is killed leaves its ranks behind
                    process.wait(10)
    need("torch", "a job over torch.distributed")
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    if args.device == "cuda" and torch.cuda.device_count() < size:
        raise CliError(f"--device cuda: {size} ranks need {size} GPUs, and torch finds {torch.cuda.device_count()}")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the other ranks is no news
    with tempfile.TemporaryDirectory() as folder:
        ranks = spawn(_torch_rank, (Ranks(main, args, size, folder),), size, join=False)  # type: ignore[no-untyped-call]
        try:
            while not ranks.join():
                pass
        except ProcessExitedException as error:
            if error.exit_code != 2:  # 2: it has said why
                raise CliError(f"rank {error.error_index} of {size} has died: {error}") from None
            return 2
        finally:
            for process in ranks.processes:
                process.terminate()
    return 0

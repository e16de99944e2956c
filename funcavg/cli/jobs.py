"""The ranks of a command: those of the launcher that has started it, or two of its own."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, NamedTuple

from funcavg._errors import FuncavgError
from funcavg.cli.environment import CliError, mpi_name, mpiexec, need, rank_of, unlaunched
from funcavg.cli.trees import random_array
from funcavg.collectives import as_collective, launched_ranks

__all__ = ["Job", "MPIJob", "TorchJob", "agree", "connect", "start"]

SAID = 512  # bytes of what ranks tell each other about a failure


class Job:
    """The ranks that a command runs on, over one library."""

    rank: int
    size: int
    library: str  # as a table's title names it

    def group(self) -> Any:
        """Return a group of all ranks that has not met yet, so that `average` finds out anew who shares memory."""
        raise NotImplementedError

    def barrier(self) -> None:
        """Wait for all ranks, and for their devices."""
        raise NotImplementedError

    def buffer(self, numel: int, dtype: str) -> Any:
        """Return random numbers, in the kind of memory that the library's own all-reduce takes."""
        raise NotImplementedError

    def all_reduce(self, buffer: Any) -> None:
        """Replace a buffer by its sum over ranks: the library's own way."""
        raise NotImplementedError

    def sums(self, dtype: str) -> bool:
        """Say whether the library's own all-reduce knows a dtype."""
        return True

    def close(self) -> None:
        """Take leave of torch.distributed, if it connects these ranks."""
        if (dist := sys.modules.get("torch.distributed")) is not None and dist.is_initialized():
            dist.destroy_process_group()


class TorchJob(Job):
    """Ranks of torch.distributed's default group."""

    def __init__(self, device: str, init_method: str | None = None, timeout: float = 300.0) -> None:
        import torch
        import torch.distributed as dist

        launched, self._torch, self._dist = launched_ranks(os.environ), torch, dist
        name = "gloo"
        if device == "cuda":
            local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
            if local >= torch.cuda.device_count():
                raise CliError(f"--device cuda: rank {local} of this host finds {torch.cuda.device_count()} GPU(s)")
            torch.cuda.set_device(local)
            name = "cpu:gloo,cuda:nccl"
        self._device = device
        if launched is not None and launched[1] != "torchrun" and "MASTER_PORT" not in os.environ:
            raise CliError(
                f"{launched[1]} has started {launched[0]} ranks, and torch.distributed needs MASTER_ADDR and "
                f"MASTER_PORT to connect them: set both, or take torchrun"
            )
        rank, size = rank_of(os.environ), launched[0] if launched else 1
        try:
            dist.init_process_group(
                name, init_method=init_method, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
            reason = str(error).strip().partition("\n")[0]
            raise CliError(f"rank {rank} of {size} cannot connect to the others: {reason}") from error
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.library = f"torch {torch.__version__} ({'NCCL' if device == 'cuda' else 'Gloo'})"

    def group(self) -> Any:
        return self._dist.new_group()

    def barrier(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()
        self._dist.barrier()

    def buffer(self, numel: int, dtype: str) -> Any:
        return self._torch.randn(numel, dtype=getattr(self._torch, dtype), device=self._device)

    def all_reduce(self, buffer: Any) -> None:
        self._dist.all_reduce(buffer)


class MPIJob(Job):
    """Ranks of MPI.COMM_WORLD."""

    def __init__(self) -> None:
        launched = launched_ranks(os.environ)
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise CliError(
                f"mpi4py finds no MPI library ({reason}): load your site's, or on a machine without one, "
                f"pip install mpich"
            ) from None
        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._world.rank, self._world.size
        self.library = mpi_name(MPI.Get_library_version())
        if launched is not None and launched[0] != self.size:
            raise CliError(
                f"{launched[1]} has started {launched[0]} ranks, but MPI.COMM_WORLD has {self.size}: the launcher is "
                f"not that of mpi4py's library, {self.library}"
            )

    def group(self) -> Any:
        return self._world.Dup()

    def barrier(self) -> None:
        self._world.Barrier()

    def buffer(self, numel: int, dtype: str) -> Any:
        return random_array(numel, dtype)

    def all_reduce(self, buffer: Any) -> None:
        self._world.Allreduce(self._mpi.IN_PLACE, buffer)

    def sums(self, dtype: str) -> bool:
        return dtype not in ("float16", "bfloat16")

    def init_torch(self, resources: ExitStack) -> bool:
        """Connect the same ranks over Gloo, for torch's averager; False if they are not all on one host."""
        group = as_collective(self._world)
        assert group is not None
        folder = resources.enter_context(tempfile.TemporaryDirectory()) if self.rank == 0 else ""
        told = json.dumps([socket.gethostname(), folder]).encode().ljust(SAID)
        hosts, folders = zip(*(json.loads(answer) for answer in group.gather(told, 60)), strict=True)
        if len(set(hosts)) > 1:
            return False
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{folders[0]}/store", rank=self.rank, world_size=self.size)
        return True


def connect(backend: str, device: str = "cpu", timeout: float = 300.0) -> Job:
    """Connect this rank to the others of its launcher's job."""
    what = {"torch": "a job over torch.distributed", "mpi": "an MPI job"}[backend]
    if (launched := launched_ranks(os.environ)) is not None:
        what = f"{launched[1]} has started {launched[0]} ranks, and {what}"
    need({"torch": "torch", "mpi": "mpi4py"}[backend], what)
    return TorchJob(device, timeout=timeout) if backend == "torch" else MPIJob()


def agree(job: Job, fn: Callable[[], Any], timeout: float = 300.0) -> Any:
    """Return ``fn()``, or raise on all ranks what the first rank that cannot do it says."""
    mine, failure = None, ""
    try:
        mine = fn()
    except CliError as error:
        failure = str(error)
    group = as_collective(job.group())
    assert group is not None
    said = [
        answer.decode(errors="ignore").strip() for answer in group.gather(failure.encode()[:SAID].ljust(SAID), timeout)
    ]
    for rank, text in enumerate(said):
        if text:
            raise CliError(text if all(said) else f"rank {rank} of {job.size}: {text}")
    return mine


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
        if rank == 0 or isinstance(error, FuncavgError):
            print(f"funcavg {ranks.args.command}: {error}", file=sys.stderr)
        sys.exit(2)


def start(backend: str, size: int, main: Callable[[Job, Any], None], args: Any) -> int:
    """Start ranks on this host that run ``main(job, args)``; over MPI, the whole command. Return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun sets it: ranks share the cores
    if backend == "mpi":
        command = [*mpiexec(os.environ), "-n", str(size), sys.executable, "-m", "funcavg", *args.argv]
        return subprocess.run(command, check=False, env=unlaunched(os.environ)).returncode
    need("torch", "a job over torch.distributed")
    import torch
    from torch.multiprocessing.spawn import ProcessExitedException, spawn

    if args.device == "cuda" and torch.cuda.device_count() < size:
        raise CliError(f"--device cuda: {size} ranks need {size} GPUs, and torch finds {torch.cuda.device_count()}")
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the other ranks is no news
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_torch_rank, (Ranks(main, args, size, folder),), size)  # type: ignore[no-untyped-call]
        except ProcessExitedException as error:
            if error.exit_code != 2:  # 2: it has said why
                raise CliError(f"rank {error.error_index} of {size} has died: {error}") from None
            return 2
    return 0

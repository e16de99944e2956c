"""The ranks that a command runs on, over torch.distributed or MPI, and what they agree about."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from funcavg.cli.environment import STARTED, CliError, mpi_name, need, rank_of
from funcavg.cli.trees import random_array, random_tensor
from funcavg.collectives import as_collective, launched_ranks

__all__ = ["AgreedError", "Job", "MPIJob", "TorchJob", "agree", "connect"]

SAID = 4096  # bytes of what ranks tell each other
LONGEST = 256  # characters of a failure: JSON may need 12 bytes for each


class AgreedError(CliError):
    """What all ranks of a job raise alike, so that one of them may say it."""


class Job:
    """The ranks that a command runs on, over one library. Abstract: below, what each library does in its own way."""

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
        raise NotImplementedError

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
            local = 0 if torch.cuda.device_count() == 1 else local  # as with `srun --gpus-per-task=1`
            if local >= torch.cuda.device_count():
                raise CliError(f"--device cuda: rank {local} of this host finds {torch.cuda.device_count()} GPU(s)")
            torch.cuda.set_device(local)
            name = "cpu:gloo,cuda:nccl"
        self._device = device
        if launched is not None and init_method is None and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
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
        return random_tensor(numel, dtype, self._device)

    def all_reduce(self, buffer: Any) -> None:
        self._dist.all_reduce(buffer)

    def sums(self, dtype: str) -> bool:
        return not dtype.startswith("float8")


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
        who, size = (launched[1], launched[0]) if launched is not None else ("funcavg", self.size)
        size = int(os.environ.get(STARTED, size))
        if size != self.size:
            raise CliError(
                f"{who} has started {size} ranks, but MPI.COMM_WORLD has {self.size}: the launcher is not that of "
                f"mpi4py's library, {self.library}"
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
        if dtype == "float16":  # as an extension of the library's, for which mpi4py must know its name
            try:
                self._mpi.COMM_SELF.Allreduce(self._mpi.IN_PLACE, random_array(1, dtype))
            except (self._mpi.Exception, KeyError, TypeError, ValueError):
                return False
        return dtype != "bfloat16" and not dtype.startswith("float8")

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


def agree(job: Job, fn: Callable[[], Any], same: Callable[[Any], Any] = type, timeout: float = 300.0) -> Any:
    """Return ``fn()``, or raise on all ranks what the first rank that cannot do it says.

    They raise, too, if ``same(fn())`` is not the same on all ranks: they would wait for each other in different rows.
    """
    mine, told = None, {"failure": "", "digest": ""}
    try:
        mine = fn()
        told["digest"] = hashlib.blake2b(repr(same(mine)).encode(), digest_size=16).hexdigest()
    except CliError as error:
        told["failure"] = str(error)[:LONGEST]
    group = as_collective(job.group())
    assert group is not None
    answers = [json.loads(answer) for answer in group.gather(json.dumps(told).encode().ljust(SAID), timeout)]
    failures = [answer["failure"] for answer in answers]
    for rank, text in enumerate(failures):
        if text:
            raise AgreedError(text if all(failures) else f"rank {rank} of {job.size}: {text}")
    others = [rank for rank, answer in enumerate(answers) if answer["digest"] != answers[0]["digest"]]
    if others:
        raise AgreedError(
            f"ranks 0 and {others[0]} of {job.size} differ: in the tree, the options, or what is installed"
        )
    return mine

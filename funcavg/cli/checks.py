"""What ``funcavg doctor`` tries, each in processes of its own, which `enter` with ``CHECK [RANK SIZE FOLDER]``.

A check prints a line of JSON that says what it has found, or fails with one line on stderr. A process that hangs is
ended by its alarm.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

import funcavg
from funcavg.cli import losses
from funcavg.cli.environment import CliError, mpi_name
from funcavg.collectives import as_collective
from funcavg.collectives.gpu_aware import is_gpu_aware
from funcavg.collectives.segment import Address, Segment, open_segment

__all__ = ["CHECKS", "average_ranks", "enter", "listening", "mpi_facts"]

NODE_STAGE = "node stage: "
BOUNDS = {"bfloat16": 0.003, "int8": 0.015, "int4": 0.15, "int2": 0.55}  # of the relative error of a mean over a wire


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect what the library logs about who shares memory."""
    said: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("funcavg")
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def average_ranks(group: Any, timeout: float = 300.0) -> dict[str, str]:
    """Average two leaves over a group, compare the means with what they must be; return what was found."""
    collective = as_collective(group)
    assert collective is not None
    rank, size = collective.rank, collective.size
    tree = {"large": np.arange(1 << 20, dtype=np.float32) + rank, "small": np.full(3, float(rank))}
    with listening() as said:
        start = time.perf_counter()
        means = funcavg.average(tree, group, timeout=timeout)
        seconds = time.perf_counter() - start
    shift = (size - 1) / 2
    for name, expected in (("large", tree["large"] - rank + shift), ("small", np.full(3, shift))):
        if not np.array_equal(means[name], expected):
            worst = int(np.argmax(means[name] != expected))
            raise CliError(
                f"rank {rank} of {size} got a wrong mean of {name!r}: element {worst} must be {expected[worst]}, "
                f"and is {means[name][worst]}"
            )
    node = next((line.removeprefix(NODE_STAGE) for line in said if line.startswith(NODE_STAGE)), "")
    return {"details": f"{size} ranks average 4 MB, the first time in {seconds:.2f} s", "node": node}


def _threads() -> dict[str, str]:
    from funcavg.testing import run_ranks

    return run_ranks(2, average_ranks)[0]


def _wires() -> dict[str, str]:
    """Average over each wire, between threads, which count as hosts."""
    from funcavg.testing import run_ranks

    numbers = np.random.default_rng(0).standard_normal((3, 50_000), np.float32)
    mean, errors = numbers.mean(axis=0, dtype=np.float64), {}
    for wire, bound in BOUNDS.items():
        means = run_ranks(3, lambda group, wire=wire: funcavg.average(numbers[group.rank], group, wire=wire))  # type: ignore[misc]
        if any(other.tobytes() != means[0].tobytes() for other in means):
            raise CliError(f"over wire {wire} ranks got means of different bits")
        errors[wire] = float(np.linalg.norm(means[0] - mean) / np.linalg.norm(mean))
        if not errors[wire] <= bound:
            raise CliError(f"over wire {wire} the mean has a relative error of {errors[wire]:.2g}, above {bound:g}")
    found = ", ".join(f"{wire} {100 * error:.2g} %" for wire, error in errors.items())
    return {"details": f"3 ranks get the same bits over each wire, with errors of {found}"}


def _torch() -> dict[str, str]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        return {"absent": f"{torch.__version__} is built without torch.distributed"}
    backends = {"Gloo": dist.is_gloo_available(), "NCCL": dist.is_nccl_available(), "MPI": dist.is_mpi_available()}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    have = ", ".join(name for name, there in backends.items() if there)
    return {"details": f"{torch.__version__}; backends: {have or 'none'}; GPUs: {', '.join(gpus) or 'none'}"}


def _gloo(rank: str, size: str, folder: str) -> dict[str, str]:
    return _over("gloo", int(rank), int(size), folder)


def _nccl(rank: str, size: str, folder: str) -> dict[str, str]:
    import torch

    if torch.cuda.device_count() < int(size):
        return {"absent": f"tried with {size} GPUs, of which torch finds {torch.cuda.device_count()}"}
    torch.cuda.set_device(int(rank))
    found = _over("cpu:gloo,cuda:nccl", int(rank), int(size), folder)
    mean = funcavg.average(torch.full((1000,), float(rank), device="cuda"))
    if not bool((mean == (int(size) - 1) / 2).all()):
        raise CliError(f"rank {rank} of {size} got a wrong mean: {mean[0].item()}")
    return found


def _over(backend: str, rank: int, size: int, folder: str) -> dict[str, str]:
    import torch.distributed as dist

    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=size)
    found = average_ranks(dist.group.WORLD)
    dist.barrier()
    return found


def _jax() -> dict[str, str]:
    import jax

    devices = jax.devices()
    return {"details": f"{jax.__version__}; devices: {len(devices)} {devices[0].platform} ({devices[0].device_kind})"}


def _axis() -> dict[str, str]:
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax.sharding import Mesh, PartitionSpec

    axis = PartitionSpec("data")  # type: ignore[no-untyped-call]
    mesh = Mesh(np.array(jax.devices()), ("data",))
    mapped = jax.shard_map(lambda x: funcavg.average(x, "data"), mesh=mesh, in_specs=axis, out_specs=axis)
    means = jax.jit(mapped)(np.array([0, 1], np.float32))
    if means.tolist() != [0.5, 0.5]:
        raise CliError(f"a wrong mean over an axis of two devices: {means.tolist()} must be [0.5, 0.5]")
    return {"details": "an axis of 2 simulated devices averages, compiled"}


def mpi_facts() -> dict[str, str]:
    """Say which MPI library this is, and what it can do. Initialises MPI."""
    import mpi4py
    from mpi4py import MPI

    from funcavg.collectives.mpi import _memory_kinds

    levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled", MPI.THREAD_SERIALIZED: "serialized"}
    aware = "takes GPU memory" if is_gpu_aware(_memory_kinds(), os.environ) else "does not say that it takes GPU memory"
    library = mpi_name(MPI.Get_library_version())
    threads = levels.get(MPI.Query_thread(), "multiple")
    return {"details": f"{mpi4py.__version__}; {library}; threads: {threads}; {aware}"}


def _mpi_ranks(_: str, size: str) -> dict[str, str]:
    from mpi4py import MPI

    if MPI.COMM_WORLD.size != int(size):
        raise CliError(
            f"{size} ranks were started, but each has a COMM_WORLD of {MPI.COMM_WORLD.size}: the mpiexec is not of "
            f"mpi4py's library, {mpi_name(MPI.Get_library_version())}"
        )
    found = average_ranks(MPI.COMM_WORLD)
    return found if MPI.COMM_WORLD.rank == 0 else {}


def _memory() -> dict[str, str]:
    """Make a segment, and let another process of this user open it."""
    if not hasattr(os, "memfd_create"):
        return {"absent": "ranks of one host meet in shared memory on Linux only"}
    segment = Segment()
    pid, descriptor, nonce = segment.address
    enter_open = "from funcavg.cli.checks import enter; enter()"
    other = [sys.executable, "-c", enter_open, "open", str(pid), str(descriptor), nonce.hex()]
    opened = subprocess.run(other, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if opened.returncode:
        raise OSError(opened.stderr.strip().rpartition("\n")[2])
    return {"details": "another process opens this one's anonymous memory through /proc"}


def _open(pid: str, descriptor: str, nonce: str) -> dict[str, str]:
    try:
        open_segment(Address(int(pid), int(descriptor), bytes.fromhex(nonce)))
    except OSError as error:
        why = f"/proc is closed to this user's own processes ({error})"
        raise OSError(f"/proc/{pid}/fd/{descriptor} cannot be opened: {why}") from error
    return {}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    "threads": _threads,
    "wires": _wires,
    "torch": _torch,
    "gloo": _gloo,
    "nccl": _nccl,
    "jax": _jax,
    "axis": _axis,
    "mpi": mpi_facts,
    "mpi-ranks": _mpi_ranks,
    "memory": _memory,
    "open": _open,
    "torchft": losses.torchft,
    "ulfm": losses.ulfm,
    "torchrun": losses.torchrun,
}


def enter() -> NoReturn:
    """Run the check that the command line names."""
    check, *args = sys.argv[1:]
    signal.alarm(int(os.environ.get("FUNCAVG_DOCTOR_ALARM", "0")))
    code = 0
    try:
        if found := CHECKS[check](*args):
            print(json.dumps(found), flush=True)
    except Exception as error:
        kind = "" if isinstance(error, CliError) else f"{type(error).__name__}: "
        print(f"{kind}{str(error).strip() or 'no more is known'}", file=sys.stderr, flush=True)
        code = 1
    if check in ("gloo", "nccl", "torchft"):  # torchft's group is one of torch's, with threads of its own
        os._exit(code)  # a rank whose peer has failed must not wait in torch's destructors
    sys.exit(code)

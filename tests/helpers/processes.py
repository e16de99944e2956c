"""Ranks as processes: run a function on every rank of a Gloo group, with a deadline, and see where it hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.frameworks import Skip, collecting, skip_without

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the forkserver and its children inherit it
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "funcavg", "funcavg.stateful", "torch.nn.parallel"])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGINT interrupt, which shells let processes in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message holds every rank's traceback."""


def descriptors() -> list[str]:
    """Return what this process has open, as /proc names it."""
    links = []
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of this very listing is gone
            links.append(str(entry.readlink()))
    return links


def shared_memory() -> list[str]:
    """Return the lines of funcavg's memory in this process's map."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:funcavg" in line]


def run_processes(
    size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0, dies: tuple[int, ...] = ()
) -> list[Any]:
    """Run ``fn(rank, *args)`` on ``size`` processes of one default Gloo group; return the results in rank order.

    ``fn`` is a module-level function. Ranks in ``dies`` are expected to be killed, and return None.
    """
    skip_without("torch")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(size)]
        workers = [
            _CONTEXT.Process(target=_worker, args=(rank, size, folder, pipes[rank][1], fn, args), daemon=True)
            for rank in range(size)
        ]
        with collecting():  # a rank imports the test's module before anything else
            for worker in workers:
                worker.start()
        for _, sender in pipes:
            sender.close()
        deadline = time.monotonic() + timeout
        outcomes: list[Any] = [None] * size
        problems = []
        for rank, (receiver, _) in enumerate(pipes):
            try:
                if receiver.poll(max(0.0, deadline - time.monotonic())):
                    outcomes[rank], failure = pickle.loads(receiver.recv_bytes())
                    if failure is not None:
                        problems.append(f"rank {rank} raised\n{failure}")
                else:
                    os.kill(workers[rank].pid or 0, signal.SIGUSR1)
                    time.sleep(0.5)
                    stack = Path(folder, f"stack{rank}").read_text()
                    problems.append(f"rank {rank} hangs after {timeout:g} s at\n{stack}")
            except EOFError:
                if rank not in dies:
                    workers[rank].join(1)
                    problems.append(f"rank {rank} died with exit code {workers[rank].exitcode}")
        for worker in workers:
            worker.join(0 if problems else max(0.1, deadline - time.monotonic()))
            worker.kill()
            worker.join()
        if problems:
            raise RankFailed("\n".join(problems))
        for outcome in outcomes:
            if isinstance(outcome, Skip):
                pytest.skip(outcome)
        return outcomes


def _worker(rank: int, size: int, folder: str, sender: Any, fn: Callable[..., Any], args: Any) -> None:
    os.environ["PYTEST_CURRENT_TEST"] = "a rank of a test"  # see helpers.frameworks
    with Path(folder, f"stack{rank}").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, stack, all_threads=True)
        try:
            import torch
            import torch.distributed as dist

            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
            dist.barrier()  # a rank that is done and gone before the others have connected to it would fail them
            outcome = fn(rank, *args), None
        except pytest.skip.Exception as reason:
            outcome = Skip(reason), None
        except BaseException:
            outcome = None, traceback.format_exc()
        sender.send_bytes(pickle.dumps(outcome))  # by value: the shared memory that torch would send dies with us
        sender.close()
        os._exit(0)  # a rank whose peer was killed must not hang in torch's destructors

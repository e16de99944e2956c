"""Replicas of a torchft job: its lighthouse, and processes that each have a Manager, with a deadline for all."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from helpers.frameworks import collecting, skip_without
from helpers.processes import RankFailed

_CONTEXT = multiprocessing.get_context("forkserver")
SECONDS = timedelta(seconds=15)


class Job(NamedTuple):
    """What a replica needs to know."""

    number: int
    lighthouse: str
    folder: str  # of all of them


def run_replicas(
    count: int, fn: Callable[..., Any], *args: Any, timeout: float = 90.0, dies: tuple[int, ...] = (), least: int = 1
) -> list[Any]:
    """Run ``fn(job, *args)`` on ``count`` replicas; return the results by number. Those in ``dies`` return None.

    ``least``: how many replicas it takes to go on.
    """
    skip_without("torchft")
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(
        bind="[::]:0", min_replicas=least, join_timeout_ms=200, quorum_tick_ms=20, heartbeat_timeout_ms=1000
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(count)]
            workers = [
                _CONTEXT.Process(
                    target=_replica,
                    args=(Job(n, lighthouse.address(), folder), pipes[n][1], fn, args),
                    daemon=False,  # torchft's ProcessGroupBaby has children
                )
                for n in range(count)
            ]
            with collecting():
                for worker in workers:
                    worker.start()
            for _, sender in pipes:
                sender.close()
            deadline = time.monotonic() + timeout
            outcomes, problems = list[Any](), []
            for number, (receiver, _) in enumerate(pipes):
                outcome, failure = None, ""
                try:
                    if receiver.poll(max(0.0, deadline - time.monotonic())):
                        outcome, failure = pickle.loads(receiver.recv_bytes())
                    else:
                        failure = f"hangs after {timeout:g} s"
                except EOFError:
                    failure = "" if number in dies else "has died"
                outcomes.append(outcome)
                if failure:
                    said = Path(folder, f"said{number}")
                    tail = said.read_text(errors="replace")[-3000:] if said.exists() else ""
                    problems.append(f"replica {number}: {failure}\n{tail}")
            for worker in workers:
                worker.kill()
                worker.join()
            if problems:
                raise RankFailed("\n".join(problems))
            return outcomes
    finally:
        lighthouse.shutdown()


def _replica(job: Job, sender: Any, fn: Callable[..., Any], args: Any) -> None:
    os.environ["PYTEST_CURRENT_TEST"] = "a replica of a test"  # see helpers.frameworks
    with Path(job.folder, f"said{job.number}").open("w") as said:  # torchft says much
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    try:
        import torch

        torch.set_num_threads(1)
        outcome = fn(job, *args), ""
    except BaseException:
        outcome = None, traceback.format_exc()
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    os._exit(0)


def manager_of(job: Job, group: Any, load: Any, state: Any, **options: Any) -> Any:
    """Return a Manager for a replica of one process."""
    import torch.distributed as dist
    from torchft import Manager

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=group,
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=job.lighthouse,
        replica_id=f"replica{job.number}",
        hostname="localhost",
        timeout=SECONDS,
        quorum_timeout=SECONDS,
        connect_timeout=SECONDS,
        # Else torchft's first mean is of too many: it counts replicas that it heals, and adds zeros for them.
        init_sync=False,
        **options,
    )
    manager.kept = store
    return manager

"""Hazards that are easy to fall into: each of these was a silent wrong number, a hang or a leak in some draft."""

import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes

from funcavg import FuncavgError, PeerLostError, average, start_average
from funcavg._engine import session
from funcavg.collectives import Solo
from funcavg.collectives.threads import Threads
from funcavg.collectives.torch import TorchCollective, _known_groups
from funcavg.testing import run_ranks


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def many_groups_at_once(rank, port):
    """Two groups that are first used together must not block each other in the store that they share."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = []
    for _ in range(6):
        pair = [dist.new_group([0, 1]) for _ in range(2)]
        order = pair if rank == 0 else pair[::-1]
        handles = [start_average(float(rank), group, timeout=10) for group in order]
        results += [handle.wait() for handle in handles]
    handle = start_average(float(rank), dist.new_group([0, 1]), timeout=10)
    if rank == 1:
        time.sleep(0.5)
    dist.new_group([0, 1])  # uses the store while rank 0's thread waits there
    results.append(handle.wait())
    dist.barrier()  # rank 0 holds the store, and must not go before the others have done with it
    return results


def test_groups_that_are_first_used_together():
    assert run_processes(2, many_groups_at_once, free_port(), timeout=100) == [[0.5] * 13] * 2


def made_again(rank):
    """A group made anew over an old store must not find the addresses of the last one."""
    results = []
    for _ in range(3):
        collective = TorchCollective(dist.group.WORLD, _known_groups()[dist.group.WORLD][1])
        results.append(average(float(rank), collective, timeout=10))
        collective.abort()
    return results


def test_a_group_made_again_over_one_store():
    assert run_processes(2, made_again) == [[0.5] * 3] * 2


class InCallersThread(Threads):
    in_callers_thread = True


def test_a_dropped_handle_never_lets_ranks_meet_in_different_calls():
    def fn(group):
        group = InCallersThread(group.rank, group._meeting)
        handle = start_average({"w": 1.0}, group, timeout=5)
        assert handle.done()  # all is done in wait()
        if group.rank == 0:
            with pytest.warns(RuntimeWarning, match="dropped without wait"):
                del handle
            with pytest.raises(PeerLostError, match="this group is spent"):
                average({"w": 100.0}, group)
            return
        with pytest.raises(PeerLostError, match="rank 1 of 2 waits for rank 0"):
            handle.wait()
        return

    run_ranks(2, fn)


@pytest.mark.parametrize(
    "leaf",
    [
        torch.arange(4.0).as_strided((3, 2), (1, 1)),
        np.lib.stride_tricks.as_strided(np.arange(4.0), (3, 2), (8, 8)),
        torch.zeros(1, 2).expand(3, 2),
    ],
)
def test_leaves_that_overlap_themselves_are_not_donated(leaf):
    def fn(group):
        mine = leaf if group.rank == 0 else torch.ones(3, 2, dtype=torch.float32)
        mine = mine if not isinstance(leaf, np.ndarray) or group.rank == 0 else np.ones((3, 2))
        with pytest.raises(ValueError, match=r"rank 0: donate=True, but params_tree\[0\] is an expanded array"):
            average([mine], group, donate=True)
        average([mine], group)

    run_ranks(2, fn)


@pytest.mark.parametrize("count", [10, 600_000])
def test_autograd_notices_donated_leaves(count):
    def fn(group):
        leaf = torch.full((count,), 1.0 + group.rank, requires_grad=True)
        loss = (leaf * leaf).sum()
        with torch.no_grad():
            assert average({"w": leaf}, group, donate=True)["w"] is leaf
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    run_ranks(2, fn)


def test_a_transport_that_gathers_too_little():
    class Short(Solo):
        size = 2

        def gather(self, payload, timeout):
            return [payload]

    with pytest.raises(FuncavgError, match=r"must return 2 payloads of 48 bytes.*got lengths \[48\]"):
        average(np.ones(4), Short())


def test_spent_groups_keep_no_memory_that_nobody_can_write_to():
    kept = len(session._GRAVEYARD)

    def fn(group):
        average(np.ones(1_000_000), group)
        if group.rank == 0:
            with pytest.raises(PeerLostError):
                average(np.ones(1_000_000), group, timeout=0.1)

    run_ranks(2, fn)
    assert len(session._GRAVEYARD) == kept


def test_gradients_asked_for_on_one_rank_only_do_not_change_what_is_sent():
    def fn(group):
        leaf = torch.ones(3, requires_grad=group.rank == 0)
        return average({"w": leaf, "n": np.arange(3), "s": 7}, group)["w"].tolist()

    assert run_ranks(2, fn) == [[1.0] * 3] * 2


EXITS = """
import sys, time
import numpy as np, torch.distributed as dist, funcavg
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
funcavg.average(1.0)
if rank == 0:
    handle = funcavg.start_average(np.ones(3))  # the other rank never comes
else:
    time.sleep(2)
"""


def test_the_interpreter_can_exit_with_a_handle_in_the_air(tmp_path):
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", EXITS, str(tmp_path / "store"), str(rank)])
        for rank in range(2)
    ]
    assert [process.wait(60) for process in ranks] == [0, 0]

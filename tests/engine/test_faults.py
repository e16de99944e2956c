"""Faults at every point of a call: no hang past the timeout, no wrong tree, inputs as before, nothing left behind."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import dist, skip_without, torch
from helpers.processes import descriptors, run_processes, shared_memory

from funcavg import PeerLostError, _points, average, broadcast
from funcavg._engine.session import session_of
from funcavg.collectives import as_collective

ONCE = ["created", "published", "attached"]  # per group, and only where there is a node
PER_BUCKET = ["copied_in", "arrived", "reduced", "done", "copied_out"]
MODES = {"flat": "off", "node": "one"}


def points_of(mode, method="average"):
    """Name the points of a call: (point, whether at its last bucket rather than its first)."""
    nobody_reduces = (mode, method) == ("node", "broadcast")
    points = [p for p in PER_BUCKET if not (nobody_reduces and p in ("reduced", "done"))]
    return [(p, False) for p in ONCE if mode == "node"] + [(p, last) for p in points for last in (False, True)]


def tree_of(rank):
    return {
        "large": torch.arange(1_500_000.0) + rank,
        "small": [np.full(3, float(rank)), torch.full((7,), rank).half()],
    }


METHODS = {  # and by how much its result is shifted from rank 0's tree
    "average": (average, lambda size: (size - 1) / 2),
    "broadcast": (lambda tree, group, timeout=None: broadcast(tree, group, root=1, timeout=timeout), lambda size: 1),
}


def is_mean(tree, size, method="average"):
    shift = METHODS[method][1](size)
    large = torch.equal(tree["large"], torch.arange(1_500_000.0) + shift)
    return large and (tree["small"][0] == shift).all() and (tree["small"][1] == shift).all().item()


def is_unchanged(tree, rank):
    untouched = torch.equal(tree["large"], torch.arange(1_500_000.0) + rank)
    return bool(untouched and (tree["small"][0] == rank).all() and (tree["small"][1] == rank).all())


class Injected(RuntimeError):
    pass


def act(action):
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        # Stopped for longer than the timeout, and then goes on as if nothing had happened.
        subprocess.Popen(["sh", "-c", f"sleep 1.6; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "sleep":
        time.sleep(0.1)
    elif action == "raise":
        raise Injected("injected")


def left_behind():
    """Return what a spent group may not leave: descriptors and mappings of shared memory, and descriptors of peers."""
    gc.collect()
    kept = [link for link in descriptors() if "funcavg" in link or "pidfd" in link]
    return kept + shared_memory()


def one_scenario(group, point, last, action, victim, timeout, method="average"):
    """Return what happened on this rank."""
    call, _ = METHODS[method]
    rank, size = group.rank, group.size
    if callable(rank):  # of a torch group
        rank, size = rank(), size()
    highest = {}
    _points.reached = lambda where, number=0: highest.update({where: max(number, highest.get(where, 0))})
    if point not in ONCE:
        call(tree_of(rank), group, timeout=20)  # the group is warm, and the last bucket known
    at = highest.get(point, 0) if last else 0
    armed = [rank == victim]

    def reached(where, number=0):
        if armed[0] and (where, number) == (point, at):
            armed[0] = False
            act(action)

    _points.reached = reached
    tree, outcome = tree_of(rank), "returned"
    begin = time.monotonic()
    try:
        result = call(tree, group, timeout=timeout)
    except (PeerLostError, Injected) as error:
        outcome = type(error).__name__
    took = time.monotonic() - begin
    if outcome == "returned":
        assert is_mean(result, size, method), f"a wrong tree after {action} at {point}"
    else:
        begin = time.monotonic()
        with pytest.raises(PeerLostError, match="this group is spent"):
            average(tree, group)
        assert time.monotonic() - begin < 0.2
        assert left_behind() == [], f"after {action} at {point}"
    assert is_unchanged(tree, rank), f"inputs changed after {action} at {point}"
    return outcome, took, armed[0]


def all_scenarios(new_group, barrier, size, mode, action, timeout, method="average"):
    os.environ["FUNCAVG_NODE"] = MODES[mode]
    outcomes = {}
    for number, (point, last) in enumerate(points_of(mode, method)):
        # Who is stopped holds all up for as long as the timeout: there the two take turns.
        for victim in (0, size - 1) if action != "stop" else ((0, size - 1)[number % 2],):
            group = new_group()
            outcomes[point, last, victim] = one_scenario(group, point, last, action, victim, timeout, method)
            _points.reached = lambda where, number=0: None
            barrier()
            session_of(as_collective(group)).spend(RuntimeError("over"), late_writes=False)  # else its window stays
    return outcomes


def over_gloo(rank, *args):
    return all_scenarios(dist.new_group, dist.barrier, *args)


def over_mpi(comm, *args):
    return all_scenarios(comm.Dup, comm.Barrier, *args)


TIMEOUTS = {"sleep": 20.0, "raise": 4.0, "stop": 1.0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("action", "size"), [("sleep", 2), ("sleep", 3), ("raise", 2), ("raise", 3), ("stop", 3)])
def test_faults_that_a_rank_survives(action, size, mode):
    timeout = TIMEOUTS[action]
    ranks = run_processes(size, over_gloo, size, mode, action, timeout, timeout=100)
    assert_all_went_well(ranks, mode, action, timeout, closes=True)


@pytest.mark.mpi
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [3])  # two others than the one that fails: with two ranks nothing else can happen
@pytest.mark.parametrize("action", TIMEOUTS)
def test_faults_that_a_rank_survives_under_mpi(action, size, mode):
    timeout = min(TIMEOUTS[action], 1.0) if mode == "flat" and action != "sleep" else TIMEOUTS[action]
    ranks = mpi.run_mpi(size, over_mpi, size, mode, action, timeout, timeout=100)
    assert_all_went_well(ranks, mode, action, timeout, closes=False)


@pytest.mark.parametrize("mode", MODES)
def test_faults_of_a_broadcast(mode):
    """The root has sent all before others are lost, and hears of it nevertheless."""
    ranks = run_processes(2, over_gloo, 2, mode, "raise", 4.0, "broadcast", timeout=100)
    assert_all_went_well(ranks, mode, "raise", 4.0, closes=True, always=True)


@pytest.mark.mpi
def test_faults_of_a_broadcast_under_mpi():
    ranks = mpi.run_mpi(3, over_mpi, 3, "node", "raise", 4.0, "broadcast", timeout=100)
    assert_all_went_well(ranks, "node", "raise", 4.0, closes=False, always=True)


def assert_all_went_well(ranks, mode, action, timeout, *, closes, always=False):
    """``closes``: whether a rank that fails closes its connections, so that others hear of it.

    ``always``: whether others never return, since all ranks meet once more at the end.
    """
    size = len(ranks)
    for scenario in ranks[0]:
        point, last, victim = scenario
        outcomes = [rank[scenario] for rank in ranks]
        assert not outcomes[victim][2], f"{scenario}: the fault was never injected"
        if action == "sleep":
            assert [outcome for outcome, *_ in outcomes] == ["returned"] * size, scenario
            continue
        if action == "raise":
            assert outcomes[victim][0] == "Injected", scenario
        survivors = [outcome for rank, outcome in enumerate(outcomes) if rank != victim]
        # A node hears of it at once; Gloo, whose connections are closed, nearly always, but always within the timeout.
        # Before there is a node, MPI has no connections to close.
        bound = 2.0 if action == "raise" and mode == "node" and (closes or point not in ONCE) else timeout + 1.0
        assert all(took < bound for _, took, _ in survivors), (scenario, outcomes)
        if always or is_needed(mode, point, last):
            assert {outcome for outcome, *_ in survivors} == {"PeerLostError"}, (scenario, outcomes)


def is_needed(mode, point, last):
    """Say whether others need something more of a rank that has come to a point of a call."""
    if mode == "node":  # where nobody is ahead by more than two buckets
        return point not in ("reduced", "done", "copied_out") or not last
    return point not in ("done", "copied_out") and not (point in ("reduced", "arrived") and last)


def killed(rank, mode, point, last, victim, method="average"):
    os.environ["FUNCAVG_NODE"] = MODES[mode]
    return one_scenario(dist.group.WORLD, point, last, "kill", victim, 10.0, method)[:2]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("point", "last"), [("copied_in", False), ("copied_out", True)])
def test_a_rank_is_killed_in_a_broadcast(mode, point, last, victim):
    """The root is rank 1."""
    for found in filter(None, run_processes(3, killed, mode, point, last, victim, "broadcast", dies=(victim,))):
        outcome, took = found
        assert outcome == "PeerLostError"
        assert took < 9


@pytest.mark.parametrize(
    ("mode", "point", "last"), [(mode, *where) for mode in MODES for where in points_of(mode)], ids=str
)
def test_a_rank_is_killed(mode, point, last):
    size = 3
    for victim in (0, size - 1):
        ranks = run_processes(size, killed, mode, point, last, victim, dies=(victim,))
        for rank, found in enumerate(ranks):
            assert (found is None) == (rank == victim)
            if found is not None:
                outcome, took = found
                assert took < 9, "the end of a process must be noticed before the timeout"
                assert outcome == "PeerLostError" or not is_needed(mode, point, last)


def killed_at_any_time(rank, victim, seed):
    """Average until a rank is killed from outside. No points are watched, so C takes as many steps as it ever does."""
    tree, calls = tree_of(rank), 0
    average(tree, timeout=20)
    dist.barrier()
    if rank == victim:
        after = random.Random(seed).uniform(0.3, 0.8)
        subprocess.Popen(["sh", "-c", f"sleep {after:.4f}; kill -KILL {os.getpid()}"])
    while True:
        begin = time.monotonic()
        try:
            result = average(tree, timeout=10)
        except PeerLostError:
            took = time.monotonic() - begin
            break
        assert is_mean(result, 3), f"a wrong tree in call {calls}"
        calls += 1
    assert left_behind() == []
    assert is_unchanged(tree, rank)
    return took, calls


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_a_rank_is_killed_at_any_time(seed, mode, monkeypatch):
    monkeypatch.setenv("FUNCAVG_NODE", MODES[mode])
    victim = seed % 3
    ranks = run_processes(3, killed_at_any_time, victim, seed, dies=(victim,))
    assert [found is None for found in ranks] == [rank == victim for rank in range(3)]
    for took, calls in filter(None, ranks):
        assert took < 9
        assert calls > 0


JOB = """
import os, signal, sys
if sys.argv[1] == "mpi":
    from mpi4py import MPI
    group = MPI.COMM_WORLD
    rank = group.rank
else:
    import torch.distributed as dist
    dist.init_process_group("gloo")
    group, rank = None, dist.get_rank()
import numpy as np
from funcavg import _points, average
average(np.ones(3), group)
def reached(where, number=0):
    if rank == 1 and where == "arrived":
        os.kill(os.getpid(), signal.SIGKILL)
_points.reached = reached
average(np.ones(3), group, timeout=20)
"""


@pytest.mark.parametrize("mode", MODES)
def test_torchrun_ends_a_job_of_which_a_rank_is_killed(tmp_path, mode):
    skip_without("torch")
    (tmp_path / "job.py").write_text(JOB)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "job.py"), "torch"]
    environ = os.environ | {"FUNCAVG_NODE": MODES[mode], "PYTHONPATH": str(mpi.ROOT)}
    begin = time.monotonic()
    done = subprocess.run([sys.executable, *command], env=environ, capture_output=True, check=False, timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - begin < 60
    assert not list(Path("/dev/shm").glob("*funcavg*"))


@pytest.mark.mpi
@pytest.mark.parametrize("mode", MODES)
def test_mpiexec_ends_a_job_of_which_a_rank_is_killed(tmp_path, mode):
    (tmp_path / "job.py").write_text(JOB)
    done = mpi.mpiexec(2, tmp_path / "job.py", "mpi", FUNCAVG_NODE=MODES[mode])
    assert done.returncode != 0
    assert not list(Path("/dev/shm").glob("*funcavg*"))


def late(rank):
    if rank == 1:
        time.sleep(3)
    return is_mean(average(tree_of(rank), timeout=30), 3)


def never_comes(rank):
    if rank == 1:
        time.sleep(2.5)
        return None
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank"):
        average(tree_of(rank), timeout=1)
    return 0.9 < time.monotonic() - begin < 2.4


def test_a_rank_that_is_three_seconds_late():
    assert run_processes(3, late) == [True] * 3


def test_a_rank_that_never_comes():
    assert run_processes(3, never_comes) == [True, None, True]

"""Ranks that are killed under MPI, and those that are left: over Open MPI with ULFM, they shrink and go on."""

import os
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import losing, mpi
from helpers.pages import LOST
from helpers.processes import descriptors, shared_memory

import funcavg
from funcavg import PeerLostError, _points, average, furthest
from funcavg.collectives.surviving import advice_for

pytestmark = pytest.mark.mpi
ULFM = ("--with-ft", "ulfm")


def survives(comm):
    from funcavg.collectives.mpi import survives_losses

    return survives_losses()


@pytest.fixture(scope="module")
def ulfm():
    """Skip where the MPI library, or its launcher, cannot go on without a rank."""
    command = mpi.launcher()
    if isinstance(command, str):
        mpi.skip(command)
    if "Open MPI" not in library():
        pytest.skip("this MPI library ends a job of which a rank dies")
    assert mpi.run_mpi(1, survives, options=ULFM) == [True]
    assert mpi.run_mpi(1, survives) == [False]


def library():
    return mpi.run_mpi(1, name_of_library)[0]


def name_of_library(comm):
    from mpi4py import MPI

    return MPI.Get_library_version()


def train(comm, case):
    """Shrink after a loss, as often as there is one."""
    group = [comm]

    def regroup():
        group[0].Revoke()
        group[0] = group[0].Shrink()
        return group[0]

    return losing.train_and_lose(comm.rank, case, comm, regroup, lambda group: group.Dup())


def assert_all_go_on(case, size=4):
    """Return the seconds until the call that was lost had ended, at most."""
    seen = mpi.run_mpi(size, train, case, options=ULFM, dies=(case.victim,), timeout=60)
    for words in (words for found in filter(None, seen) for words in found.words):
        assert re.search(r"comm\.Revoke\(\), then comm\.Shrink\(\)", words), words
    return losing.assert_all_went_on(case, seen)


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("mode", losing.MODES)
@pytest.mark.parametrize("point", losing.ONCE + losing.PER_BUCKET)
def test_survivors_shrink_and_go_on(mode, point):
    """A sample; tests/kills.py goes through all."""
    number = [*losing.MODES].index(mode) + (losing.ONCE + losing.PER_BUCKET).index(point)
    method = losing.METHODS[number % 3]
    case = losing.Case(mode, method, point, 0 if point in losing.ONCE else number % 5, number % 4)
    if not losing.can_be(case, 4):
        pytest.skip("there is no node")
    assert_all_go_on(case)


def goes_on(comm, node):
    """Rank 2 is killed in the middle of a call; return the seconds from then to the next right mean."""
    os.environ["FUNCAVG_NODE"] = node
    tree, number = {"w": np.full(10_000_000, np.float32(comm.rank))}, 5 if node == "one" else 2
    average(tree, comm, timeout=20)
    shared = Path(os.environ["MOMENT"])

    def reached(where, at=0):
        if comm.rank == 2 and (where, at) == ("arrived", number):
            shared.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    _points.reached = reached
    with pytest.raises(PeerLostError):
        average(tree, comm, timeout=20)
    comm.Revoke()
    left = comm.Shrink()
    assert furthest(1, left, timeout=20) is None
    assert (average(tree, left, timeout=20)["w"] == 0.5).all()
    return time.time() - float(shared.read_text())


def seconds_to_go_on(runs):
    """Return the seconds, of every run and node mode, on the slowest survivor."""
    seconds = {}
    for node in ("one", "off"):
        for number in range(runs):
            with tempfile.TemporaryDirectory() as folder:
                moment = str(Path(folder, "moment"))
                seen = mpi.run_mpi(3, goes_on, node, options=ULFM, dies=(2,), MOMENT=moment)
            seconds[node, number] = round(max(seen[:2]), 3)
    return seconds


def as_the_page_has_it(comm):
    """Rank 3 is killed when rank 0 has come through a round, and the others have not."""
    job = {name: getattr(funcavg, name) for name in ("PeerLostError", "average", "broadcast", "furthest")}
    job |= {"params": {"w": np.full(1000, float(comm.rank))}, "rounds": 0, "comm": comm}
    exec(LOST[1], job)
    assert (job["rounds"], job["params"]["w"][0]) == (1, 1.5)
    if comm.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    job["params"] = {"w": job["params"]["w"] + comm.rank}
    job["rounds"] += comm.rank == 0  # as if its call had returned
    exec(LOST[1], job)
    return job["rounds"], job["params"]["w"][0], job["comm"].size


@pytest.mark.usefixtures("ulfm")
def test_the_loop_of_the_page():
    assert mpi.run_mpi(4, as_the_page_has_it, options=ULFM, dies=(3,)) == [(3, 1.5, 3)] * 3 + [None]


def lost_on_the_way(comm, when):
    """Rank 3 is killed before a round, and rank 2 while those that are left see how far they are."""

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    job = {name: getattr(funcavg, name) for name in ("PeerLostError", "average", "broadcast", "furthest")}
    job |= {"params": {"w": np.full(1000, float(comm.rank))}, "rounds": int(comm.rank == 0), "comm": comm}
    if comm.rank == 3:
        die()
    if comm.rank == 2:
        job[when] = die
    exec(LOST[1], job)
    return job["rounds"], job["params"]["w"][0], job["comm"].size


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("when", ["furthest", "broadcast"])
def test_a_loss_while_ranks_go_on_from_one(when):
    assert mpi.run_mpi(4, lost_on_the_way, when, options=ULFM, dies=(2, 3))[:2] == [(2, 0.0, 2)] * 2


@pytest.mark.usefixtures("ulfm")
def test_the_next_mean_comes_within_a_second():
    """On a machine that does nothing else it takes 0.1 s."""
    assert min(seconds_to_go_on(1).values()) < 1


def lose_many(comm, losses):
    """Lose the group again and again; return what this process holds, after each."""
    group, tree, seen = comm, {"w": np.full(2_000_000, np.float32(comm.rank))}, []
    for number in range(losses):
        average(tree, group, timeout=20)
        with pytest.raises((PeerLostError, KeyboardInterrupt)):
            fail_once(group, tree, number)
        group.Revoke()
        group = group.Shrink()  # nobody has died, so the same ranks in another communicator
        seen.append((resident(), len(descriptors()), len(shared_memory())))
    return seen


def fail_once(group, tree, number):
    def reached(where, _=0):
        if where == "arrived" and group.rank == number % group.size:
            raise KeyboardInterrupt

    _points.reached = reached
    try:
        average(tree, group, timeout=20)
    finally:
        _points.reached = lambda where, number=0: None


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("node", ["one", "off"])
def test_what_losses_leave_behind(node):
    for seen in mpi.run_mpi(2, lose_many, 22, options=ULFM, FUNCAVG_NODE=node, timeout=100):
        (first, descriptors, mapped), (last, descriptors_at_end, mapped_at_end) = seen[1], seen[-1]
        assert last - first < 80e6, f"{(last - first) / 1e6:.0f} MB"
        assert descriptors_at_end <= descriptors + 2
        assert mapped_at_end <= mapped + 2


def slow_survivor(comm):
    """One is killed, one is slow, and one waits for the slow one."""
    from mpi4py import MPI

    tree = {"w": np.full(10_000_000, np.float32(comm.rank))}
    average(tree, comm, timeout=20)
    if comm.rank == 2:
        os.kill(os.getpid(), 9)
    if comm.rank == 1:
        time.sleep(4)
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match=r"lost: rank 2 of the group|rank 2 on this host|given up"):
        average(tree, comm, timeout=20)
    took = time.monotonic() - begin
    comm.Revoke()
    begin = time.monotonic()
    left = comm.Shrink()
    assert furthest(3, left, timeout=20) is None
    assert (average(tree, left, timeout=20)["w"] == 0.5).all()
    assert MPI.Comm.Compare(left, comm) != MPI.IDENT
    return took, time.monotonic() - begin


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("node", ["one", "off"])
def test_a_survivor_that_is_slow(node):
    seen = mpi.run_mpi(3, slow_survivor, options=ULFM, dies=(2,), FUNCAVG_NODE=node)
    assert all(took < 2.5 for took, _ in seen[:2]), seen  # rank 0 does not wait for rank 1 to come
    assert seen[1][1] < 3, seen


def revoked_by_the_user(comm):
    """One waits in a call; the other revokes the communicator, and shrinks it."""
    average(1.0, comm, timeout=20)
    begin = time.monotonic()
    if comm.rank == 1:
        with pytest.raises(PeerLostError, match="revoked"):
            average(1.0, comm, timeout=20)
        with pytest.raises(PeerLostError):
            average(1.0, comm, timeout=20)
    else:
        time.sleep(0.5)
        comm.Revoke()
        with pytest.raises(PeerLostError, match="this communicator has been revoked"):
            average(1.0, comm, timeout=20)
    left = comm.Shrink()
    assert average(float(comm.rank), left, timeout=20) == 0.5
    return time.monotonic() - begin


@pytest.mark.usefixtures("ulfm")
@pytest.mark.parametrize("node", ["one", "off"])
def test_the_user_revokes(node):
    assert max(mpi.run_mpi(2, revoked_by_the_user, options=ULFM, FUNCAVG_NODE=node)) < 5


def slow_to_connect(comm):
    """A rank gives up while the duplicate is being made."""
    from funcavg.collectives import mpi as over_mpi

    asked = over_mpi.is_gpu_aware
    if comm.rank == 2:
        over_mpi.is_gpu_aware = lambda *args: (time.sleep(4), asked(*args))[1]
    begin = time.monotonic()
    with pytest.raises(PeerLostError):
        average(1.0, comm, timeout=1 if comm.rank == 0 else 30)
    if comm.rank == 0:
        comm.Revoke()
    left = comm.Shrink()
    assert average(float(comm.rank), left, timeout=20) == 1.0
    return time.monotonic() - begin


@pytest.mark.usefixtures("ulfm")
def test_a_rank_gives_up_while_ranks_connect():
    assert max(mpi.run_mpi(3, slow_to_connect, options=ULFM)) < 15


def stopped_sender(comm):
    """What a stopped rank reads when it wakes is not what the survivor's memory holds by then."""
    tree = {"w": np.full(1_000_000, np.float32(comm.rank))}
    average(tree, comm, timeout=20)

    def reached(where, number=0):
        if where == "reduced" and number == 0:
            if comm.rank == 0:
                time.sleep(2)
            if comm.rank == 1:
                subprocess.Popen(["sh", "-c", f"sleep 4; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            if comm.rank == 2:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)

    _points.reached = reached
    x = {"w": np.full(1_000_000, np.float32(comm.rank))}
    try:
        seen = set(average(x, comm, donate=True, timeout=20)["w"].tolist())
    except PeerLostError:
        seen = {1.0}
    x["w"][:] = -1  # as a checkpoint that is loaded
    time.sleep(4 if comm.rank == 0 else 0)
    return seen


@pytest.mark.usefixtures("ulfm")
def test_a_stopped_rank_does_not_read_memory_that_is_used_again():
    assert mpi.run_mpi(3, stopped_sender, options=ULFM, dies=(2,), FUNCAVG_NODE="off")[:2] == [{1.0}] * 2


def test_where_a_job_cannot_go_on(request):
    """The words of the error say how it could."""
    del request
    words = mpi.run_mpi(2, lose_a_deadline)[0]
    if "Open MPI" in library():
        assert "start the job with `mpiexec --with-ft ulfm`" in words
    else:
        assert "MPICH ends a job of which a rank dies, and cannot go on without it (Open MPI can)" in words


def lose_a_deadline(comm):
    if comm.rank == 1:
        time.sleep(1.5)
        return ""
    with pytest.raises(PeerLostError) as caught:
        average(1.0, comm, timeout=0.5)
    return str(caught.value)


def asked(comm):
    from mpi4py import MPI

    from funcavg.collectives.mpi import survives_losses

    before = MPI.Query_thread()
    survives_losses()
    return before, MPI.Query_thread()


def test_asking_does_not_lower_the_level_of_threads():
    """Open MPI would, if asked at a lower one, and `start_average` then lose its thread."""
    ((before, after),) = mpi.run_mpi(1, asked)
    assert before == after


def test_advice():
    assert "comm.Revoke(), then comm.Shrink()" in advice_for("Open MPI v5.0.11", fault_tolerant=True)
    assert "Intel(R) MPI ends a job" in advice_for("Intel(R) MPI Library 2021.14", fault_tolerant=False)

"""After a loss: from whose parameters ranks go on, and what is forgotten of a group."""

import functools
import os
import time

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import dist
from helpers.processes import run_processes

import funcavg
from funcavg import FuncavgError, PeerLostError, average, furthest
from funcavg.collectives import Solo, as_collective
from funcavg.collectives.threads import Meeting, Threads
from funcavg.testing import run_ranks

STEPS = {
    "all alike": ([(3, True)] * 3, None),
    "one is further": ([(3, True), (4, True), (3, True)], 1),
    "the lowest of those that are further": ([(3, True), (4, True), (4, True)], 1),
    "one is torn": ([(3, True), (3, False), (3, True)], 0),
    "the first is torn": ([(3, False), (3, True), (3, True)], 1),
    "whoever is further is torn": ([(3, True), (9, False), (5, True)], 2),
    "steps of many digits": ([(2**62, True), (2**62 + 1, True), (0, True)], 1),
}


@pytest.mark.parametrize("case", STEPS)
def test_from_whose_parameters(case):
    said, root = STEPS[case]
    found = run_ranks(3, lambda group: furthest(said[group.rank][0], group, intact=said[group.rank][1]))
    assert found == [root] * 3


def test_nobody_is_whole():
    def fn(group):
        with pytest.raises(FuncavgError, match="none of the 2 ranks are whole .* load a checkpoint") as caught:
            furthest(group.rank, group, intact=False)
        assert not isinstance(caught.value, PeerLostError)  # a loop that goes on after one would try for ever
        return furthest(3, group)  # the group is usable

    assert run_ranks(2, fn) == [None, None]


@pytest.mark.parametrize(
    ("step", "error", "words"),
    [
        (-1, ValueError, "furthest: the step must be at least 0 and below"),
        (2**63, ValueError, "furthest: the step must be at least 0 and below"),
        (1.5, TypeError, "furthest: the step"),
        (True, TypeError, "furthest: the step"),
    ],
)
def test_bad_steps(step, error, words):
    with pytest.raises(error, match=words):
        furthest(step, Solo())


@pytest.mark.parametrize("wrong", [{"step": -1}, {"step": "3"}, {"step": 3, "intact": 1}])
def test_a_mistake_of_one_rank(wrong):
    """The others do not take it for one more loss."""

    def fn(group):
        if group.rank == 1:
            with pytest.raises((TypeError, ValueError)):
                furthest(group=group, **wrong)
        else:
            with pytest.raises(ValueError, match="furthest: rank 1 has passed a step that is no integer"):
                furthest(3, group)
        return furthest(3, group)

    assert run_ranks(3, fn) == [None] * 3


def test_alone():
    assert furthest(3, Solo()) is None
    assert furthest(np.int64(3), Solo()) is None
    with pytest.raises(FuncavgError, match="load a checkpoint"):
        furthest(3, Solo(), intact=False)
    with pytest.raises(ValueError, match="timeout"):
        furthest(3, Solo(), timeout=0)


def other_functions(rank, node):
    """Ranks that call different functions hear of it, in shared memory too, where payloads have no length."""
    os.environ["FUNCAVG_NODE"] = node
    average(float(rank), timeout=20)
    begin = time.monotonic()
    call = functools.partial(furthest, 3) if rank == 0 else functools.partial(average, 1.0)
    with pytest.raises(FuncavgError, match=f"rank {1 - rank} has called another function"):
        call(timeout=3)
    assert time.monotonic() - begin < 5
    return furthest(3, timeout=3) is None  # the group is usable


@pytest.mark.parametrize("node", ["one", "off"])
def test_ranks_that_call_different_functions(node):
    assert run_processes(2, other_functions, node) == [True] * 2


def outside(rank):
    group = dist.new_group([0, 1])
    return furthest(rank, group, timeout=20)


def test_a_rank_outside():
    assert run_processes(3, outside) == [1, 1, None]


def forget_a_loss(rank, node):
    """A rank was late, and all forget it; connections are made anew."""
    os.environ["FUNCAVG_NODE"] = node
    tree = {"w": np.full(400_000, float(rank))}
    average(tree, timeout=20)
    if rank == 1:
        time.sleep(1.5)
    with pytest.raises(PeerLostError):
        average(tree, timeout=0.5)
    with pytest.raises(PeerLostError, match="this group is spent"):
        average(tree)
    dist.barrier()
    for _ in range(2):
        funcavg.forget()
        assert (average(tree, timeout=20)["w"] == 0.5).all()
    return True


@pytest.mark.parametrize("node", ["one", "off"])
def test_forget(node):
    assert run_processes(2, forget_a_loss, node) == [True] * 2


def all_forget(comm, tree):
    """Twice, and each time the next call is right."""
    comm.Barrier()
    for _ in range(2):
        funcavg.forget(comm)
        assert (average(tree, comm, timeout=20)["w"] == 0.5).all()


def forget_over_mpi(comm):
    tree = {"w": np.full(400_000, float(comm.rank))}
    average(tree, comm, timeout=20)
    if comm.rank == 1:
        time.sleep(1.5)
    with pytest.raises(PeerLostError):
        average(tree, comm, timeout=0.5)
    all_forget(comm, tree)
    return True


@pytest.mark.mpi
@pytest.mark.parametrize("node", ["one", "off"])
def test_forget_over_mpi(node):
    assert mpi.run_mpi(2, forget_over_mpi, FUNCAVG_NODE=node) == [True] * 2


def test_forget_while_a_call_is_under_way():
    def fn(group):
        handle = funcavg.start_average(float(group.rank), group)
        with pytest.raises(RuntimeError, match="forget: start_average is still under way on this group"):
            funcavg.forget(group)
        return handle.wait()

    assert run_ranks(2, fn) == [0.5, 0.5]
    funcavg.forget(Solo())


def forget_again_and_again(rank):
    """One rank is always ahead: the other may not yet have seen that it has come to the last meeting."""
    from funcavg import _points

    os.environ["FUNCAVG_NODE"] = "one"
    _points.reached = lambda where, number=0: time.sleep(0.01) if (rank, where) == (0, "reduced") else None
    for _ in range(25):
        assert (average(np.full(3000, float(rank)), timeout=10) == 0.5).all()
        funcavg.forget()
    return True


def test_forget_is_no_meeting():
    assert run_processes(2, forget_again_and_again) == [True] * 2


def forget_in_a_fork(rank):
    average(float(rank), timeout=20)
    if (pid := os.fork()) == 0:
        try:
            funcavg.forget()
        except RuntimeError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    return average(float(rank), timeout=20)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forget_in_a_fork():
    assert run_processes(2, forget_in_a_fork) == [0.5] * 2


def one_has_returned(comm):
    """Of the call that is lost, one rank returns and the other raises; both forget."""
    from funcavg import _points

    tree = {"w": np.full(400_000, float(comm.rank))}
    average(tree, comm, timeout=20)

    def interrupt(where, number=0):
        if comm.rank == 0 and where == "copied_out":
            raise KeyboardInterrupt

    _points.reached = interrupt
    try:
        average(tree, comm, timeout=3)
        returned = True
    except (KeyboardInterrupt, PeerLostError):
        returned = False
    _points.reached = lambda where, number=0: None
    all_forget(comm, tree)
    return returned


@pytest.mark.mpi
def test_forget_where_one_has_returned():
    assert mpi.run_mpi(2, one_has_returned, FUNCAVG_NODE="one")[0] is False


class Named(Threads):
    """A user's transport, whose attributes are called as hooks of ours, and which compares as an array."""

    end, confirm, renew = 0.5, None, "new"
    configuration = np.zeros(2)


def test_a_transport_with_other_ideas_of_names():
    meeting = Meeting(2)
    assert run_ranks(2, lambda group: average(float(group.rank), Named(group.rank, meeting))) == [0.5, 0.5]


class Changing(Threads):
    """A user's transport that comes to join other ranks."""

    configuration = 0

    def join(self, rank, meeting):
        self.rank, self.size, self._meeting = rank, meeting.size, meeting


def test_a_transport_that_joins_other_ranks():
    """Growing, shrinking, swapped; and after an error, with as many."""
    meetings = {members: Meeting(len(members)) for members in [(0,), (0, 1), (1, 0)]}
    again = Meeting(2)
    leaf = np.arange(300_000.0)

    def fn(group):
        mine = Changing(group.rank, meetings[0, 1])
        for members in [(0, 1), (0,), (0, 1), (1, 0), (0, 1)]:
            if group.rank in members:
                mine.join(members.index(group.rank), meetings[members])
                assert np.array_equal(average(leaf + group.rank, mine), leaf + sum(members) / len(members))
        time.sleep(0.5 * group.rank)
        with pytest.raises(PeerLostError):
            average(leaf, mine, timeout=0.2)
        with pytest.raises(PeerLostError, match="this group is spent"):
            average(leaf, mine)
        mine.join(group.rank, again)
        mine.configuration += 1
        assert as_collective(mine) is mine
        return average(float(group.rank), mine)

    assert run_ranks(2, fn) == [0.5, 0.5]

"""Groups that are configured anew, in every way: the mean is always that of the ranks of now."""

import os
import signal
import subprocess
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import dist, jax, torch
from helpers.processes import descriptors, run_processes

import funcavg
from funcavg import PeerLostError, _points, average, start_average
from funcavg.collectives import as_collective

NODES = ["one", "off"]
MEMBERS = [(0,), (0, 1), (0, 1, 2), (2, 1, 0), (0, 2), (2, 0), (0, 1), (1, 2), (2,), (1, 0, 2)]
KINDS = ["Wrapper", "Silent"]
MORE_KINDS = [*KINDS, "Unnumbered", "Outer"]


def new_group(kind):
    from helpers import configured

    return getattr(configured, kind)()


def configure(group, folder, number, members, rank):
    """Give a rank's group these members, in this order of ranks."""
    if rank in members:
        group.configure(Path(folder, str(number)), members.index(rank), len(members), number)
    dist.barrier()


def tree_of(rank):
    return {"large": np.full(600_000, float(rank)), "small": torch.full((3,), float(rank))}


def assert_mean(tree, members):
    mean = sum(members) / len(members)
    assert (tree["large"] == mean).all(), (tree["large"][0], members)
    assert (tree["small"] == mean).all(), (tree["small"], members)


def through_configurations(rank, node, kind, folder):
    """Whoever holds the group follows it: calls, averagers, stand-ins, compiled programs, and calls begun before."""
    os.environ["FUNCAVG_NODE"] = node
    group = new_group(kind)
    averager = funcavg.periodic(period=1, group=group)
    weight = torch.nn.Parameter(torch.tensor(float(rank)))
    stand_in, state, compiled, kept = None, None, None, []
    for number, members in enumerate(MEMBERS):
        handle = None
        if number and rank in MEMBERS[number - 1]:
            handle = start_average(tree_of(rank), group)  # nothing is under way before wait()
        last = getattr(group, "_pg", None) if kind != "Outer" else None
        kept.append(last if kind == "Unnumbered" else None)  # so that it is another by identity only
        last = weakref.ref(last) if kind == "Wrapper" and last is not None and rank in members else list
        configure(group, folder, number, members, rank)
        assert not last(), "somebody keeps the connections of the last configuration"
        if rank in members:
            assert_mean(average(tree_of(rank), group) if handle is None else handle.wait(), members)
            stand_in = stand_in or funcavg.PeriodicModelAverager(1, process_group=group)
            state = averager.init(tree_of(rank)) if state is None else state
            for _ in range(3):
                assert_mean(average(tree_of(rank), group, timeout=20), members)
            tree, state = averager.update(tree_of(rank), state)
            assert_mean(tree, members)
            with torch.no_grad():
                weight.fill_(rank)
            weight.grad = torch.zeros(())
            stand_in.average_parameters([weight])
            assert weight.item() == sum(members) / len(members)
            if jax is not None:
                compiled = compiled or jax.jit(lambda x: average(x, group) * 2)
                doubled = compiled(jax.numpy.full(3, float(rank)))
                assert doubled.tolist() == [2 * sum(members) / len(members)] * 3
            collective = as_collective(group)
            assert (collective.rank, collective.size) == (members.index(rank), len(members))
        elif handle is not None:
            with pytest.warns(RuntimeWarning, match="dropped without wait"):
                del handle
        dist.barrier()
    return True


@pytest.mark.filterwarnings("ignore:a period of 1")
@pytest.mark.parametrize(
    ("kind", "node"), [(kind, node) for kind in MORE_KINDS for node in NODES if kind in KINDS or node == "one"]
)
def test_a_group_that_is_configured_anew(tmp_path, kind, node):
    assert run_processes(3, through_configurations, node, kind, str(tmp_path), timeout=110) == [True] * 3


class Injected(Exception):
    pass


def after_an_error(rank, node, kind, folder):
    os.environ["FUNCAVG_NODE"] = node
    group = new_group(kind)
    configure(group, folder, 0, (0, 1, 2), rank)
    assert_mean(average(tree_of(rank), group, timeout=20), (0, 1, 2))

    def fail(where, number=0):
        if rank == 1 and where == "arrived":
            raise Injected

    _points.reached = fail
    begin = time.monotonic()
    with pytest.raises((PeerLostError, Injected)):
        average(tree_of(rank), group, timeout=3)
    took = time.monotonic() - begin
    _points.reached = lambda where, number=0: None
    if kind in ("Wrapper", "Unnumbered"):
        assert took < 2, "whoever waits for a rank that has failed must hear of it"
        with pytest.raises(PeerLostError, match="this group is spent"):
            average(1.0, group)
    dist.barrier()
    configure(group, folder, 1, (1, 2, 0), rank)
    for _ in range(2):
        assert_mean(average(tree_of(rank), group, timeout=20), (0, 1, 2))
    return True


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_group_that_is_configured_anew_after_an_error(tmp_path, kind, node):
    assert run_processes(3, after_an_error, node, kind, str(tmp_path)) == [True] * 3


def in_another_thread(rank, node, folder, how):
    """The group changes while a rank waits in a call, for a rank that is not there any more."""
    os.environ["FUNCAVG_NODE"] = node
    group = new_group("Wrapper")
    configure(group, folder, 0, (0, 1, 2), rank)
    average(tree_of(rank), group, timeout=20)
    dist.barrier()
    if rank != 2:
        anew = threading.Timer(0.5, group.configure, (Path(folder, "1"), rank, 2, 1))
        anew.start()
        begin, tree = time.monotonic(), tree_of(rank)
        call = (lambda: average(tree, group, timeout=20)) if how == "call" else start_average(tree, group).wait
        with pytest.raises(PeerLostError):
            call()
        assert time.monotonic() - begin < 3
        assert (tree["large"] == rank).all()
        anew.join()
        for _ in range(2):
            assert_mean(average(tree_of(rank), group, timeout=20), (0, 1))
    dist.barrier()
    return True


@pytest.mark.parametrize("how", ["call", "handle"])
@pytest.mark.parametrize("node", NODES)
def test_a_group_that_is_configured_anew_by_another_thread(tmp_path, node, how):
    assert run_processes(3, in_another_thread, node, str(tmp_path), how) == [True] * 3


def in_two_configurations(rank, node, kind, folder):
    """Rank 0 is still where ranks 1 and 2 are not any more."""
    os.environ["FUNCAVG_NODE"] = node
    group = new_group(kind)
    configure(group, folder, 0, (0, 1, 2), rank)
    average(tree_of(rank), group, timeout=20)
    dist.barrier()
    if rank != 0:
        group.configure(Path(folder, "1"), rank - 1, 2, 1)
        assert_mean(average(tree_of(rank), group, timeout=20), (1, 2))
    else:
        begin = time.monotonic()
        with pytest.raises(PeerLostError):
            average(tree_of(rank), group, timeout=2)
        assert time.monotonic() - begin < 4
    dist.barrier()
    return True


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_in_two_configurations(tmp_path, kind, node):
    assert run_processes(3, in_two_configurations, node, kind, str(tmp_path)) == [True] * 3


def stopped_and_awake(rank, node, kind, folder):
    """A rank that everybody takes for dead speaks again, when the others have gone on without it."""
    os.environ["FUNCAVG_NODE"] = node
    group = new_group(kind)
    configure(group, folder, 0, (0, 1, 2), rank)
    average(tree_of(rank), group, timeout=20)
    dist.barrier()

    def stop(where, number=0):
        if rank == 2 and where == "arrived" and number == 1:
            subprocess.Popen(["sh", "-c", f"sleep 2.5; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)

    _points.reached = stop
    with pytest.raises(PeerLostError):
        average(tree_of(rank), group, timeout=1)
    _points.reached = lambda where, number=0: None
    if rank != 2:
        group.configure(Path(folder, "1"), rank, 2, 1)
        until, going = time.monotonic() + 3, True
        while going:
            assert_mean(average(tree_of(rank), group, timeout=20), (0, 1))
            going = average(float(time.monotonic() < until), group, timeout=20) == 1  # for both, or for none
    dist.barrier()
    configure(group, folder, 2, (0, 1, 2), rank)  # it may join again
    assert_mean(average(tree_of(rank), group, timeout=20), (0, 1, 2))
    return True


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", ["Wrapper", "Silent"])
def test_a_rank_that_was_stopped_and_speaks_again(tmp_path, kind, node):
    assert run_processes(3, stopped_and_awake, node, kind, str(tmp_path)) == [True] * 3


def in_pairs(rank, node, kind, folder):
    """Two pairs of ranks change partners: everybody's rank and size stay what they are."""
    os.environ["FUNCAVG_NODE"] = node
    group, seen = new_group(kind), []
    for number, pairs in enumerate([((0, 1), (2, 3)), ((0, 3), (2, 1)), ((0, 1), (2, 3))]):
        members = next(pair for pair in pairs if rank in pair)
        group.configure(Path(folder, f"{number}{members[0]}"), members.index(rank), 2, number)
        dist.barrier()
        for _ in range(2):
            assert_mean(average(tree_of(rank), group, timeout=20), members)
        seen.append(members)
        dist.barrier()
    return len(seen)


@pytest.mark.parametrize("kind", MORE_KINDS)
def test_partners_that_change(tmp_path, kind):
    assert run_processes(4, in_pairs, "one", kind, str(tmp_path)) == [3] * 4


def gone_in_a_call(rank, folder):
    """A group of one's own loses what moves its bytes."""
    group = new_group("Silent")
    configure(group, folder, 0, (0, 1), rank)
    average(tree_of(rank), group, timeout=20)

    def lose(where, number=0):
        if where == "copied_in" and rank == 0:
            group.now = None

    os.environ["FUNCAVG_NODE"] = "off"
    funcavg.forget(group)
    _points.reached = lose
    with pytest.raises(PeerLostError):
        average(tree_of(rank), group, timeout=3)
    _points.reached = lambda where, number=0: None
    with pytest.raises(PeerLostError):
        average(tree_of(rank), group, timeout=3)
    configure(group, folder, 1, (1, 0), rank)
    return average(float(rank), group, timeout=20)


def test_a_group_that_is_gone_in_a_call(tmp_path):
    assert run_processes(2, gone_in_a_call, str(tmp_path)) == [0.5, 0.5]


def mistake_without_connection(rank, folder):
    """The mistake is raised, not that the group is not connected."""
    group = new_group("Wrapper")
    configure(group, folder, 0, (0, 1), rank)
    averager = funcavg.periodic(period=1, group=group)
    state = averager.init({"w": np.ones(3)})
    group._pg = None
    with pytest.raises(ValueError, match="another tree than init"):
        averager.update({"v": np.ones(3)}, state)
    with pytest.raises(TypeError, match="whose ranks may be others at any time"):
        funcavg.hierarchical({2: 1, 4: 2}, group=group)
    return True


def test_a_mistake_while_the_group_is_not_connected(tmp_path):
    assert run_processes(2, mistake_without_connection, str(tmp_path)) == [True] * 2


def tangents(rank, folder):
    """The linear function that JAX has made is of other ranks than those of now."""
    group = new_group("Wrapper")
    configure(group, folder, 0, (0, 1, 2), rank)
    _, pushforward = jax.linearize(lambda x: average(x, group) * x, jax.numpy.full(3, float(rank)))
    configure(group, folder, 1, (0, 1), rank)
    if rank < 2:
        with pytest.raises(Exception, match="has been configured anew since"):
            pushforward(jax.numpy.ones(3))
    dist.barrier()
    return True


def test_tangents_in_another_configuration(tmp_path):
    if not jax:
        pytest.skip("no jax")
    assert run_processes(3, tangents, str(tmp_path)) == [True] * 3


def not_connected(rank, folder):
    group = new_group("Wrapper")
    with pytest.raises(PeerLostError, match=r"this Wrapper is connected to nobody now .*manager\.wait_quorum"):
        average(1.0, group)
    configure(group, folder, 0, (0, 1), rank)
    assert average(float(rank), group) == 0.5
    group._pg = None
    with pytest.raises(PeerLostError, match="connected to nobody now"):
        average(1.0, group)
    configure(group, folder, 1, (1, 0), rank)
    return average(float(rank), group)


def test_a_group_that_is_not_connected(tmp_path):
    assert run_processes(2, not_connected, str(tmp_path)) == [0.5, 0.5]


REFUSED = {
    "Untagged": "a Untagged, which cannot be used: it does not tell messages apart by their tags",
    "Elsewhere": "a Elsewhere, which cannot be used: what it receives does not reach the memory",
    "Baby": r"a Baby of 3 ranks, each of which says it is rank 0: the class overrides size\(\), but not rank\(\)",
}


def refused(rank, folder, kind):
    group = new_group(kind)
    configure(group, folder, 0, (0, 1), rank)
    for _ in range(2):
        with pytest.raises(TypeError, match=REFUSED[kind]):
            average(1.0, group, timeout=5)
    return True


@pytest.mark.parametrize("kind", REFUSED)
def test_a_group_that_cannot_be_served_is_refused_by_name(tmp_path, kind):
    assert run_processes(2, refused, str(tmp_path), kind) == [True] * 2


def of_accelerators_only(rank, folder):
    group = new_group("Wrapper")
    inner = dist.ProcessGroup(dist.FileStore(str(Path(folder, "store")), 2), rank, 2)
    group._pg = inner  # without a backend for the host
    with pytest.raises(TypeError, match=r"a Wrapper, which moves the memory of .* only\. .*ProcessGroupGloo"):
        average(1.0, group)
    return True


def test_a_group_that_moves_no_memory_of_the_host(tmp_path):
    assert run_processes(2, of_accelerators_only, str(tmp_path)) == [True] * 2


def numbers_of_ranks(rank, folder):
    group = new_group("Wrapper")
    configure(group, folder, 0, (0, 1), rank)
    with pytest.raises(TypeError, match="hierarchical: group is a Wrapper, whose ranks may be others at any time"):
        funcavg.hierarchical({2: 1, 4: 2}, group=group)
    with pytest.raises(
        TypeError, match="``process_group`` must be one of torch's own groups, got a Wrapper, whose ranks may be others"
    ):
        funcavg.HierarchicalModelAverager({2: 1, 4: 2}, process_group=group)
    return True


def test_a_hierarchy_by_numbers_is_refused(tmp_path):
    assert run_processes(2, numbers_of_ranks, str(tmp_path)) == [True] * 2


def passes(rank, folder, kind, framework):
    """A derivative over other ranks than the values would be a wrong number."""
    group = new_group(kind)
    configure(group, folder, 0, (0, 1, 2), rank)
    if framework == "torch":
        x = torch.full((3,), float(rank), requires_grad=True)
        loss = (average(x, group) ** 2).sum()
        backward = loss.backward
    else:
        value, pullback = jax.vjp(lambda x: (average(x, group) ** 2).sum(), jax.numpy.full(3, float(rank)))
        backward = lambda: pullback(jax.numpy.ones_like(value))
    configure(group, folder, 1, (0, 1), rank)
    if rank < 2:
        with pytest.raises(Exception, match="has been configured anew since") as caught:
            backward()
        assert framework == "jax" or caught.type is PeerLostError
        assert average(float(rank), group, timeout=20) == 0.5
    dist.barrier()
    return True


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_in_two_configurations(tmp_path, kind, framework):
    if framework == "jax" and jax is None:
        pytest.skip("no jax")
    assert run_processes(3, passes, str(tmp_path), kind, framework) == [True] * 3


def sockets_of(rank, folder):
    """Neither the session nor a compiled program keeps the connections of the last configuration open."""
    group = new_group("Wrapper")
    seen = []
    for number in range(8):
        configure(group, folder, number, (0, 1), rank)
        average(tree_of(rank), group, timeout=20)
        dist.barrier()
        seen.append(sum("socket" in link for link in descriptors()))
    return seen[-1] - seen[2]


def test_the_connections_of_the_last_configuration_are_closed(tmp_path):
    assert all(more <= 1 for more in run_processes(2, sockets_of, str(tmp_path)))


def messages_of(rank, kind, folder):
    """Count what goes over the group itself in a call whose configuration is known."""
    from funcavg.collectives.borrowed import BorrowedCollective

    os.environ["FUNCAVG_NODE"] = "one"
    group = new_group(kind)
    configure(group, folder, 0, (0, 1), rank)
    sent, start = [], BorrowedCollective.start_tagged

    def counted(self, group, send, receive, timeout):
        sent.append(sum(row.nbytes for _, row, _ in send))
        return start(self, group, send, receive, timeout)

    BorrowedCollective.start_tagged = counted
    average(tree_of(rank), group)
    sent.clear()
    average(tree_of(rank), group)
    return sent


@pytest.mark.parametrize(("kind", "sent"), [("Wrapper", []), ("Silent", [16])])
def test_at_most_one_small_message_more(tmp_path, kind, sent):
    """The tree itself goes through shared memory."""
    assert run_processes(2, messages_of, kind, str(tmp_path)) == [sent] * 2

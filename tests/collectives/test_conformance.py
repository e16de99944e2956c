"""One table of collectives, one table of cases: every transport must do all of it. A new one adds a row."""

import functools
import os
import queue
import threading
import time
import traceback

import ml_dtypes
import numpy as np
import optree
import pytest
from helpers import mpi
from helpers.frameworks import Skip, dist, torch
from helpers.processes import run_processes
from helpers.trees import assert_is_mean, bits

from funcavg import (
    Collective,
    PeerLostError,
    TreeMismatchError,
    average,
    broadcast,
    differences,
    start_average,
)
from funcavg.collectives import Solo, as_collective
from funcavg.testing import run_ranks

# A user's own transport, complete


class Mailboxes:
    """Ranks that have a queue for each pair of them."""

    def __init__(self, rank, boxes):
        self.rank, self.size, self._boxes = rank, len(boxes), boxes

    def _send(self, peer, row):
        self._boxes[self.rank][peer].put(bytes(row))

    def _receive(self, peer, timeout):
        try:
            return self._boxes[peer][self.rank].get(timeout=timeout)
        except queue.Empty:
            message = f"rank {self.rank} of {self.size} waited {timeout:g} s for rank(s) {peer}"
            raise PeerLostError(message) from None

    def gather(self, payload, timeout):
        for peer in range(self.size):
            self._send(peer, payload)
        return [self._receive(peer, timeout) for peer in range(self.size)]

    def exchange(self, send, receive, timeout):
        for peer in range(self.size):
            self._send(peer, send[peer])
        for peer in range(self.size):
            receive[peer] = np.frombuffer(self._receive(peer, timeout), np.uint8)

    def share(self, buffer, timeout):
        buffer[:] = [np.frombuffer(row, np.uint8) for row in self.gather(buffer[self.rank], timeout)]


# The table of collectives: a name, and how to run fn(group) on every rank of each size


def run_solo(size, fn):
    return [fn(Solo())]


def run_mailboxes(size, fn):
    boxes = [[queue.SimpleQueue() for _ in range(size)] for _ in range(size)]
    return run_ranks(size, lambda group: fn(Mailboxes(group.rank, boxes)))


def run_one_by_one(start):
    """Let each case have a group of its own, so that one that spends it spoils no other."""

    def run_all(size):
        return {name: outcome(start, size, case) for name, case in CASES.items()}

    return run_all


def outcome(start, size, case):
    try:
        return start(size, case), None
    except pytest.skip.Exception as reason:  # the case needs what is not installed
        return Skip(reason), None
    except Exception:
        return None, traceback.format_exc()


def run_gloo(size, node=""):
    """Run all cases in one job, each in a process group of its own."""
    return by_case(run_processes(size, all_cases_of_a_rank, node))


def run_mpi_job(size, node=""):
    """Likewise, each with a communicator of its own."""
    return by_case(mpi.run_mpi(size, all_cases_of_an_mpi_rank, timeout=100, FUNCAVG_NODE=node))


def by_case(ranks):
    return {
        name: ([rank[name][0] for rank in ranks], "".join(filter(None, (rank[name][1] for rank in ranks))) or None)
        for name in CASES
    }


def all_cases_of_a_rank(rank, node):
    os.environ["FUNCAVG_NODE"] = node
    outcomes = {}
    for name, case in CASES.items():
        group = dist.new_group()
        outcomes[name] = outcome(lambda _, fn: fn(group), 0, case)
        dist.barrier()
    return outcomes


def all_cases_of_an_mpi_rank(comm):
    outcomes = {}
    for name, case in CASES.items():
        group = comm.Dup()
        outcomes[name] = outcome(lambda _, fn: fn(group), 0, case)
        comm.Barrier()
    return outcomes


IN_MESSAGES = {"node": "off"}  # rather than in shared memory
COLLECTIVES = {
    "solo": (run_one_by_one(run_solo), [1]),
    "threads": (run_one_by_one(run_ranks), [1, 2, 3, 4, 5, 6]),
    "a user's own": (run_one_by_one(run_mailboxes), [1, 2, 3, 5]),
    "torch over Gloo": (run_gloo, [2, 3, 4]),
    "torch over Gloo, in messages": (functools.partial(run_gloo, **IN_MESSAGES), [2, 3]),
    "mpi4py": (run_mpi_job, [1, 2, 3, 4]),
    "mpi4py, in messages": (functools.partial(run_mpi_job, **IN_MESSAGES), [2, 3, 4]),
}
ROWS = [
    pytest.param(name, size, id=f"{name}, {size}", marks=[pytest.mark.mpi] if name.startswith("mpi4py") else [])
    for name, (_, sizes) in COLLECTIVES.items()
    for size in sizes
]

# The table of cases: each runs on every rank, checks what it can see there, and returns what all ranks must agree on

CASES = {}


def case(fn):
    CASES[fn.__name__.replace("_", " ")] = fn
    return fn


def facts(group):
    collective = as_collective(group)
    return collective, collective.rank, collective.size


def pattern(source, target, length):
    return np.full(length, 16 * source + target, np.uint8)


def full(shape, value):
    """Return a tensor, or an array where there is no torch."""
    return (torch or np).full(shape, value)


@case
def it_is_a_collective(group):
    collective, rank, size = facts(group)
    assert isinstance(collective, Collective)
    assert 0 <= rank < size
    return size


@case
def gather_is_in_rank_order(group):
    collective, rank, size = facts(group)
    for length in (1, 48, 70_000):
        assert collective.gather(bytes([rank]) * length, 10) == [bytes([r]) * length for r in range(size)]


@case
def exchange_moves_rows(group):
    collective, rank, size = facts(group)
    for length in (1, 100, 300_000):
        send = np.array([pattern(rank, peer, length) for peer in range(size)])
        before, receive = send.copy(), np.zeros_like(send)
        wait = collective.exchange(send, receive, 10)
        if wait is not None:
            wait()
        for peer in set(range(size)) - {rank}:
            np.testing.assert_array_equal(receive[peer], pattern(peer, rank, length))
        np.testing.assert_array_equal(send, before)


@case
def share_sends_one_row_to_all(group):
    collective, rank, size = facts(group)
    for length in (1, 100, 300_000):
        buffer = np.zeros((size, length), np.uint8)
        buffer[rank] = pattern(rank, 7, length)
        wait = collective.share(buffer, 10)
        if wait is not None:
            wait()
        np.testing.assert_array_equal(buffer, [pattern(peer, 7, length) for peer in range(size)])


@case
def several_transfers_are_under_way(group):
    """Waited for in the order of their starts within a verb, as the engine does."""
    collective, rank, size = facts(group)
    rounds = []
    for call in range(4):
        send, receive, shared = (np.zeros((size, 5000), np.uint8) for _ in range(3))
        send[:], shared[rank] = 10 * rank + call, 100 + 10 * rank + call
        rounds.append((receive, collective.exchange(send, receive, 10), shared, collective.share(shared, 10)))
    for call, (receive, exchanged, shared, all_shared) in enumerate(rounds):
        for wait in filter(None, (exchanged, all_shared)):
            wait()
        for peer in range(size):
            assert peer == rank or (receive[peer] == 10 * peer + call).all()
            assert (shared[peer] == 100 + 10 * peer + call).all()


def tree_of(rank, seed=0):
    rng = np.random.default_rng([seed, rank])
    tensor = torch.from_numpy if torch else np.asarray
    return {
        "float32": tensor(rng.normal(size=(3, 5)).astype(np.float32)),
        "float64": rng.normal(size=101),
        "bfloat16": tensor(rng.normal(size=7)).bfloat16() if torch else rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "float16": rng.normal(size=(2, 3)).astype(np.float16),
        "float8": rng.normal(size=9).astype(ml_dtypes.float8_e4m3fn),
        "complex": tensor(rng.normal(size=4) + 1j * rng.normal(size=4)),
        "number": float(rng.normal()),
        "nothing": [np.zeros(0), None, 3, True],
    }


def bits_of(tree):
    return [bits(leaf) for leaf in optree.tree_leaves(tree)]


def assert_mean(result, trees, weights=None):
    for name in set(result) - {"nothing"}:
        assert_is_mean(result[name], [tree[name] for tree in trees], weights)


@case
def average_means_and_agrees(group):
    _, rank, size = facts(group)
    results = [average(tree_of(rank, seed), group) for seed in range(3)]  # plans and memory are used again
    for seed, result in enumerate(results):
        assert_mean(result, [tree_of(r, seed) for r in range(size)])
    return [bits_of(result) for result in results]


@case
def average_of_many_buckets(group):
    """Larger than a bucket, and packed and unpacked leaves among them."""
    _, rank, size = facts(group)
    leaves = [np.arange(700_000.0) * (rank + 1), full((999, 1001), float(rank)).T, np.full(3, float(rank))]
    result = average(leaves, group)
    np.testing.assert_allclose(result[0], np.arange(700_000.0) * (size + 1) / 2, rtol=1e-14)
    assert (result[1] == (size - 1) / 2).all()
    assert result[2].tolist() == [(size - 1) / 2] * 3
    return result[0].tobytes()


@case
def donated_memory_is_written(group):
    _, rank, size = facts(group)
    tree = {"large": full((600_000,), float(rank)), "small": np.full(3, float(rank))}
    result = average(tree, group, donate=True)
    assert result["large"] is tree["large"]
    assert result["small"] is tree["small"]
    assert (tree["large"] == (size - 1) / 2).all()
    assert (tree["small"] == (size - 1) / 2).all()


@case
def equal_replicas_come_back(group):
    tree = tree_of(0)
    assert bits_of(average(tree, group)) == bits_of(tree)


@case
def weights_weigh(group):
    """The last rank has diverged, and has weight 0."""
    _, rank, size = facts(group)
    lost = size > 1 and rank == size - 1
    tree = {**tree_of(rank), **({"float32": full((3, 5), np.float32("nan")), "number": float("nan")} if lost else {})}
    result = average(tree, group, weight=0 if lost else 1.0 + rank)
    counted = size - 1 if size > 1 else 1
    assert_mean(result, [tree_of(r) for r in range(counted)], weights=[1.0 + r for r in range(counted)])
    return bits_of(result)


@case
def trees_that_differ_are_refused_alike(group):
    _, rank, size = facts(group)
    message = None
    try:
        average({"w": np.ones(3 + (rank == size - 1))}, group)
    except TreeMismatchError as error:
        message = str(error)
    assert (message is None) == (size == 1)
    assert average(1.0 + rank, group) == (1 + size) / 2  # the group is as good as before
    return message


@case
def a_mistake_on_one_rank_is_raised_on_all(group):
    _, rank, size = facts(group)
    with pytest.raises(TypeError, match=r"params_tree\['f'\] is a str: 'text'") as caught:
        average({"f": "text" if rank == size - 1 else 1.0}, group)
    assert average(1.0 + rank, group) == (1 + size) / 2
    return str(caught.value)


@case
def start_average_and_wait(group):
    _, rank, size = facts(group)
    handle = start_average(tree_of(rank), group)
    result = handle.wait()
    assert handle.done()
    assert_mean(result, [tree_of(r) for r in range(size)])
    return bits_of(result)


@case
def over_wires_ranks_get_the_same_bits(group):
    """Whether anything is encoded depends on who shares memory with whom, and no leaf here is far from its mean."""
    _, rank, size = facts(group)
    trees = [[np.random.default_rng([9, r]).normal(size=n).astype(np.float32) for n in (5, 3000)] for r in range(size)]
    means = [sum(leaf.astype(float) for leaf in leaves) / size for leaves in zip(*trees, strict=True)]
    found = []
    for wire, most in {"bfloat16": 1e-5, "int8": 2e-4, "int4": 0.03, "int2": 0.4}.items():
        result = average(trees[rank], group, wire=wire)
        for leaf, mean in zip(result, means, strict=True):
            assert ((leaf - mean) ** 2).sum() <= most * (mean**2).sum()
        later = start_average(trees[rank], group, wire=wire).wait()
        assert bits_of(later) == bits_of(result)
        found.append(bits_of(result))
    message = None
    try:
        average(trees[rank], group, wire="int4" if rank == size - 1 else "int8")
    except TreeMismatchError as error:
        message = str(error)
    assert (message is None) == (size == 1)
    assert message is None or ("wire int8" in message and "wire int4" in message)
    with pytest.raises(ValueError, match=r"wire must be one of 'bfloat16', .* got 'int1'"):
        average(trees[rank], group, wire="int1" if rank == size - 1 else None)
    assert average(1.0 + rank, group) == (1 + size) / 2
    return found


def replica_of(rank):
    """A tree of whatever can be broadcast, of several buckets, some leaves in memory of their own."""
    rng = np.random.default_rng(rank)
    return tree_of(rank) | {
        "large": rng.integers(0, 256, 700_001, np.uint8),
        "integers": rng.integers(-9, 9, (300_000, 2)),
        "turned": full((999, 301), float(rank)).T,
        "nan": np.array([0x7FC00000 + rank, 0xFF800001], np.uint32).view(np.float32),
        "nothing": [np.zeros(0), None, 3 * rank, rank == 1],
    }


@case
def broadcast_copies_every_leaf(group):
    _, rank, size = facts(group)
    for root in {0, size // 2, size - 1}:
        tree = replica_of(rank)
        result = broadcast(tree, group, root=root)
        assert bits_of(result) == bits_of(replica_of(root))
        assert bits_of(tree) == bits_of(replica_of(rank))
        assert result["large"] is not tree["large"]
        assert result["nothing"][1:] == [None, 3 * root, root == 1]
    return


@case
def broadcast_writes_to_donated_memory(group):
    _, rank, size = facts(group)
    tree = replica_of(rank)
    result = broadcast(tree, group, root=size - 1, donate=True)
    assert all(result[name] is tree[name] for name in tree if hasattr(tree[name], "shape"))
    assert bits_of(result) == bits_of(replica_of(size - 1))


@case
def broadcast_costs_what_it_says(group):
    """The root sends less than twice the bytes, and the others less than once; by verbs alone, as for an average."""
    collective, rank, size = facts(group)
    leaf = np.full(3_000_000, rank, np.uint8)
    broadcast([leaf], group, root=size - 1)  # connects, and looks for ranks of the same host
    before = getattr(collective, "bytes_sent", 0)
    broadcast([leaf], group, root=size - 1)
    sent = getattr(collective, "bytes_sent", 0) - before
    in_memory = collective.among if hasattr(collective, "among") else None
    if in_memory and os.environ.get("FUNCAVG_NODE") != "off":  # everyone reads the root's
        limit = (size - 1) * leaf.nbytes if rank == size - 1 else 0
    elif in_memory:
        limit = (2 * (size - 1) if rank == size - 1 else size - 2) * leaf.nbytes / size
    else:
        limit = 2 * (size - 1) * leaf.nbytes / size
    assert limit <= sent + (not hasattr(collective, "bytes_sent")) * limit
    assert sent <= limit + 2000


@case
def roots_that_differ_are_refused_alike(group):
    _, rank, size = facts(group)
    if size == 1:
        return None
    with pytest.raises(
        TreeMismatchError, match="rank 0 broadcast from rank 0,  rank 1 broadcast from rank 1"
    ) as caught:
        broadcast(1.0, group, root=int(rank > 0))
    assert broadcast(rank, group, root=1) == 1  # the group is as good as before
    return str(caught.value)


@case
def differences_name_leaves_and_ranks(group):
    _, rank, size = facts(group)
    tree = replica_of(0)
    assert differences(tree, group) == []
    if rank == size - 1 > 0:
        tree["turned"][7, 7] = -1.0
        tree["nothing"][2] = 4
    expected = [f"params_tree['nothing'][2] on rank {size - 1}", f"params_tree['turned'] on rank {size - 1}"]
    found = differences(tree, group)
    assert found == (expected if size > 1 else [])
    return found


@case
def gradients_flow(group):
    _, rank, size = facts(group)
    x = torch.arange(3.0) + rank
    slope = torch.func.grad(lambda leaf: (rank + 1) * average([leaf], group)[0].square().sum())(x)
    torch.testing.assert_close(slope, (torch.arange(3.0) + (size - 1) / 2) * (size + 1))


@case
def a_rank_that_does_not_come_is_given_up(group):
    """Within the timeout, inputs unchanged, and the group is spent. The last rank is the one that does not come."""
    _, rank, size = facts(group)
    if size == 1:
        return
    average(1.0, group)
    if rank == size - 1:
        time.sleep(1.0)
        return
    leaf = np.full(3, float(rank))
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="rank"):
        average([leaf], group, timeout=0.3)
    assert 0.25 < time.monotonic() - begin < 5
    assert leaf.tolist() == [float(rank)] * 3
    begin = time.monotonic()
    with pytest.raises(PeerLostError, match="average: this group is spent, since an earlier call on it failed"):
        average([leaf], group)
    assert time.monotonic() - begin < 0.1


@functools.cache
def outcomes(name, size):
    """Run all cases on one row, once."""
    return COLLECTIVES[name][0](size)


@pytest.mark.parametrize("case_name", CASES)
@pytest.mark.parametrize(("name", "size"), ROWS)
def test_conforms(name, size, case_name):
    results, failure = outcomes(name, size)[case_name]
    assert failure is None, failure
    for result in results if isinstance(results, list) else [results]:
        if isinstance(result, Skip):
            pytest.skip(result)
    assert len(results) == size
    assert all(result == results[0] for result in results)


def test_a_transport_that_loses_a_row_does_not_conform():
    """Meta-test: the cases notice."""

    class Careless(Mailboxes):
        def exchange(self, send, receive, timeout):
            super().exchange(np.roll(send, 1, axis=0), receive, timeout)

    boxes = [[queue.SimpleQueue() for _ in range(2)] for _ in range(2)]
    for broken in ("exchange moves rows", "average means and agrees"):
        _, failure = outcome(lambda n, fn: run_ranks(n, lambda g: fn(Careless(g.rank, boxes))), 2, CASES[broken])
        assert failure is not None


def test_calls_of_two_groups_do_not_mix():
    """A rank may be in two groups, and use them at the same time from two threads."""
    boxes = [[queue.SimpleQueue() for _ in range(2)] for _ in range(2)]

    def fn(group):
        other, results = Mailboxes(group.rank, boxes), {}
        thread = threading.Thread(target=lambda: results.update(other=average(10.0 * group.rank, other)))
        thread.start()
        results["first"] = average(float(group.rank), group)
        thread.join()
        return results["first"], results["other"]

    assert run_ranks(2, fn) == [(0.5, 5.0)] * 2

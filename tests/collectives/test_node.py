"""The node stage: its protocol in every interleaving, how ranks find each other, and what happens around it."""

import itertools
import logging
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from helpers.frameworks import dist, skip_without, torch
from helpers.processes import run_processes
from helpers.trees import assert_is_mean, bits

from funcavg import _points, average, start_average
from funcavg._engine.copies import copies
from funcavg._engine.crossing import weights_by_node
from funcavg._engine.session import session_of
from funcavg.collectives import as_collective, discovery
from funcavg.collectives.discovery import partition, slot_bytes
from funcavg.collectives.node import DONE, SLOTS, TAKEN, rules, schedule
from funcavg.collectives.segment import Address, Segment, open_segment

# The protocol. A rank's program is what `schedule` yields for some calls, each action with its rule. Ranks go through
# theirs at any speed, held up where a rule says so. An action has a beginning and an end, between which it reads
# and writes. Whoever reads a slot must find there what was meant for that bucket, complete, and nobody may write to it
# meanwhile: at every step, the last write of each writer, begun or done, must be the one of that bucket, and done.


def program(index, size, shards, delay, buckets, calls, slots, change):
    """Return a rank's steps: (action, (call, bucket), slot, rule, number of the bucket over all calls)."""
    table = change(rules(index, size, shards, crossing=delay > 0))
    return [
        (action, (call, k), k % slots, table[action], call * buckets + k)
        for call in range(calls)
        for action, k in schedule(buckets, delay)
        if index < shards or action not in ("reduce", "publish")
    ]


class Explorer:
    """All interleavings of a node's ranks. A state is, for each rank, twice its step, and one more within an action."""

    def __init__(self, size, *, shards=None, delay=0, buckets=7, calls=2, slots=SLOTS, change=lambda table: table):
        shards = shards or size
        self.programs = [program(i, size, shards, delay, buckets, calls, slots, change) for i in range(size)]
        self.reads = {"reduce": ("in", range(size)), "copy out": ("out", range(shards))}  # what, written by whom
        # What is reduced goes straight to the out-slot, but where it crosses.
        writes = {"copy in": "in", "publish" if delay else "reduce": "out"}
        self.told, self.begun = [], []  # for each rank, before each step: its words; the last writes that have begun
        self.counters = {}  # who counts a word
        for rank, steps in enumerate(self.programs):
            told, begun = [[0] * (1 + TAKEN)], [{}]
            for position, (action, item, slot, rule, number) in enumerate(steps):
                told.append(told[-1].copy())
                if rule.tells is not None:
                    told[-1][rule.tells] = number + 1
                    self.counters.setdefault(rule.tells, set()).add(rank)
                begun.append(begun[-1])
                if action in writes:
                    begun[-1] = {**begun[-1], (writes[action], slot): (item, position)}
            self.told.append(told)
            self.begun.append(begun)

    def may_begin(self, rank, state):
        *_, rule, number = self.programs[rank][state[rank] // 2]
        others = self.counters.get(rule.waits, set()) - {rank}
        return all(self.told[other][state[other] // 2][rule.waits] > number - rule.behind for other in others)

    def conflict(self, state):
        """Return what a rank that reads finds wrong, None if all is well."""
        for rank, place in enumerate(state):
            if place % 2 == 0:
                continue
            action, item, slot, *_ = self.programs[rank][place // 2]
            what, writers = self.reads.get(action, (None, ()))
            for writer in writers:
                inside, position = state[writer] % 2, state[writer] // 2
                wrote, at = self.begun[writer][position + inside].get((what, slot), (None, -1))
                if wrote != item or (writer != rank and inside and at == position):
                    return f"rank {rank} in {action} {item} finds {wrote} of rank {writer}"
        return None

    def explore(self):
        """Return the first conflict or deadlock, None if there is none."""
        start = (0,) * len(self.programs)
        seen, queue = {start}, deque([start])
        while queue:
            state = queue.popleft()
            stuck = True
            for rank, place in enumerate(state):
                if place == 2 * len(self.programs[rank]) or (place % 2 == 0 and not self.may_begin(rank, state)):
                    continue
                stuck = False
                following = (*state[:rank], place + 1, *state[rank + 1 :])
                if (found := self.conflict(following)) is not None:
                    return found
                if following not in seen:
                    seen.add(following)
                    queue.append(following)
            if stuck and state != tuple(2 * len(steps) for steps in self.programs):
                return f"deadlock at {state}"
        return None


NODES = [  # size, shards, delay
    *((2, 2, 0), (3, 3, 0), (2, 2, 4), (3, 3, 4), (2, 1, 4), (3, 2, 4), (3, 1, 4)),
    *((2, 2, 1), (3, 3, 1), (2, 1, 1), (3, 2, 1)),
]


@pytest.mark.parametrize("buckets", [1, 2, SLOTS + 2, SLOTS + 4, SLOTS + 5])
@pytest.mark.parametrize(("size", "shards", "delay"), NODES)
def test_no_slot_is_written_while_someone_may_read_it(size, shards, delay, buckets):
    """In two calls, both of which begin with slot 0."""
    assert Explorer(size, shards=shards, delay=delay, buckets=buckets).explore() is None


@pytest.mark.parametrize(("shards", "delay", "buckets"), [(4, 0, 6), (4, 4, 5), (2, 4, 6)])
def test_four_ranks(shards, delay, buckets):
    assert Explorer(4, shards=shards, delay=delay, buckets=buckets).explore() is None


def no_wait_before(action):
    return lambda table: {**table, action: table[action]._replace(waits=None)}


@pytest.mark.parametrize(("size", "shards", "delay"), [nodes for nodes in NODES if nodes[2] != 1])
def test_no_wait_can_be_left_out(size, shards, delay):
    """Nor is one kept that could be (with a delay of 1 some could, but nothing crosses so fast)."""
    tables = [rules(index, size, shards, crossing=delay > 0) for index in range(size)]
    waits = {action for table in tables for action, rule in table.items() if rule.waits}
    assert waits == {"reduce", "copy out"} | ({"copy in", "publish"} if size > shards else set())
    for action in waits:
        found = Explorer(size, shards=shards, delay=delay, buckets=9, calls=1, change=no_wait_before(action)).explore()
        assert found is not None, f"{action} need not wait"
        assert "deadlock" not in found


def test_two_slots_are_too_few_and_others_need_four():
    assert Explorer(2, slots=2).explore() is not None
    assert Explorer(2, slots=3).explore() is None
    assert Explorer(2, slots=3, delay=4, buckets=9).explore() is not None


def test_one_word_for_what_is_read_and_what_is_done_is_too_few():
    """A rank without a shard would wait for a mean that crosses only when it has filled more slots than there are."""

    def one_word(table):
        waits = table["copy in"].waits and DONE
        return {
            **table,
            "copy in": table["copy in"]._replace(waits=waits),
            "reduce": table["reduce"]._replace(tells=None),
        }

    found = Explorer(3, shards=2, delay=4, buckets=9, calls=1, change=one_word).explore()
    assert found is not None
    assert "deadlock" in found


CALLS = 2


def explore_copies(ranks, writers, buckets, drop=None):
    """Likewise for two broadcasts, in which some ranks fill the stage and all read it; return the first conflict."""
    steps = []
    for call in range(CALLS):
        steps += [(action, (call, k), k & 1) for action, k in copies(buckets)]
        steps.append(("meet", (call, buckets), 0))  # the closing gather
    meetings = [i for i, step in enumerate(steps) if step[0] == "meet"]
    if drop is not None:
        del steps[meetings[drop]]
    fills = {}  # the last fill of each slot that has begun at a position, and where
    begun = []
    for position, (action, item, slot) in enumerate(steps):
        if action == "fill":
            fills = {**fills, slot: (item, position)}
        begun.append(fills)
    begun.append(fills)
    arrived = [*itertools.accumulate(action == "meet" for action, *_ in steps), CALLS * 99]
    start = (0,) * ranks
    seen, queue = {start}, deque([start])
    while queue:
        state = queue.popleft()
        for rank, position in enumerate(state):
            if position == len(steps):
                continue
            action, item, slot = steps[position]
            if action == "take":
                for writer in range(writers):
                    wrote, at = begun[state[writer]].get(slot, (None, 0))
                    if wrote != item or (at == state[writer] and writer != rank):
                        return f"rank {rank} takes {item} and finds {wrote} of rank {writer}"
            if action == "meet" and any(arrived[other] < arrived[position] for other in state):
                continue
            following = (*state[:rank], position + 1, *state[rank + 1 :])
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return None


@pytest.mark.parametrize("buckets", [1, 2, 3, 5])
@pytest.mark.parametrize(("ranks", "writers"), [(2, 1), (3, 1), (2, 2), (3, 2)])
def test_no_stage_is_filled_while_someone_may_read_it(ranks, writers, buckets):
    """The root alone fills its own node's; of others each rank that has a shard."""
    assert explore_copies(ranks, writers, buckets) is None
    needed = [explore_copies(ranks, writers, buckets, drop) is not None for drop in range(2 * buckets + 1)]
    # But the one between two calls of which the first ends in slot 1: the second begins in the other.
    assert [drop for drop, it_is in enumerate(needed) if not it_is] == ([buckets] if buckets % 2 == 0 else [])


# Who is with whom


@pytest.mark.parametrize(
    ("pairs", "size", "nodes"),
    [
        ([], 3, [[0], [1], [2]]),
        ([(0, 1), (0, 2), (1, 2)], 3, [[0, 1, 2]]),
        ([(0, 1), (1, 2)], 3, [[0, 1], [2]]),
        ([(0, 2), (1, 3)], 4, [[0, 2], [1, 3]]),
        ([(1, 2), (2, 3), (1, 3)], 4, [[0], [1, 2, 3]]),
    ],
)
def test_nodes_are_cliques_of_mutual_reach(pairs, size, nodes):
    both = np.eye(size, dtype=int)
    for one, other in pairs:
        both[one, other] = both[other, one] = 1
    assert partition(both.tolist()) == nodes
    for one, other in pairs:  # reached from one side only
        lame = both.copy()
        lame[one, other] = 0
        assert not any(one in node and other in node for node in partition(lame.tolist()))


def test_slots_stay_in_the_cache_and_rows_to_other_nodes_are_long():
    assert all(SLOTS * (ranks + 1) * slot_bytes([ranks], ranks) <= 5 << 20 for ranks in range(1, 10))
    assert {slot_bytes([ranks], ranks) for ranks in range(5, 200)} == {128 << 10}
    assert {slot_bytes([ranks], ranks - 1) for ranks in range(2, 200)} == {1 << 20}
    for cores in (0, 1, 64):
        assert slot_bytes([2, 2], cores) == 1 << 20
        assert slot_bytes([1, 1, 2], cores) == 512 << 10
        assert slot_bytes([8] * 16, cores) == 4 << 20


def test_a_segment_is_opened_by_those_who_know_it_only():
    segment = Segment()
    try:
        address = segment.address
        os.close(open_segment(address))
        for stranger in (
            Address(address.pid, address.descriptor, b"\0" * 8),
            Address(address.pid, 0, address.nonce),
            Address(2**22 + 1, 3, address.nonce),
        ):
            with pytest.raises(FileNotFoundError):
                open_segment(stranger)
    finally:
        segment.close()


def test_a_segment_of_another_user_is_left_alone(monkeypatch):
    segment = Segment()
    try:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(PermissionError, match="another user's"):
            open_segment(segment.address)
    finally:
        segment.close()


def test_a_segments_memory_is_reserved():
    """Else, where memory is short, the first write to it dies of SIGBUS."""
    segment = Segment()
    try:
        segment.grow(1 << 20)
        assert os.fstat(segment.descriptor).st_blocks * 512 >= 1 << 20
    finally:
        segment.close()


def gathers_fast_and_slow(rank):
    average(1.0, timeout=20)
    node = session_of(as_collective())._node
    meet = node.meet

    def dawdle(timeout):
        meet(timeout)
        if rank == 1:
            time.sleep(0.2)

    node.meet = dawdle
    return [node.gather(payload + bytes([rank]), 20) for payload in (b"one", b"two", b"six")]


def test_a_fast_rank_does_not_overwrite_what_a_slow_one_still_reads():
    wanted = [[payload + b"\0", payload + b"\1"] for payload in (b"one", b"two", b"six")]
    assert run_processes(2, gathers_fast_and_slow) == [wanted] * 2


def test_weights_within_nodes_and_between_them():
    assert weights_by_node([[0, 1], [2, 3]], None) == ([None, None], None)
    assert weights_by_node([[0, 1, 2], [3]], None) == ([None, None], [3.0, 1.0])
    here, between = weights_by_node([[0, 1], [2, 3]], [1e308, 1e308, 0.0, 0.0])
    assert (here, between) == ([[1.0, 1.0], [0.0, 0.0]], [2.0, 0.0])
    (tiny, _), _ = weights_by_node([[0, 1], [2, 3]], [1e-300, 0.0, 1e300, 1e300])
    assert tiny[0] > tiny[1] == 0.0  # what is not 0 stays so


# Nodes of all forms give the right mean


def tree_of(rank):
    rng = np.random.default_rng(rank)
    return {
        "float32": torch.from_numpy(rng.normal(size=(700, 999)).astype(np.float32)),
        "transposed": torch.from_numpy(rng.normal(size=(300, 301))).T,
        "bfloat16": torch.from_numpy(rng.normal(size=70_001)).bfloat16(),
        "float16": rng.normal(size=(5, 3)).astype(np.float16),
        "float8": rng.normal(size=9).astype(ml_dtypes.float8_e4m3fn),
        "long": rng.normal(size=4).astype(np.longdouble),
        "complex": torch.from_numpy(rng.normal(size=4) + 1j * rng.normal(size=4)),
        "number": float(rng.normal()),
        "huge": np.full(5, np.finfo(np.float32).max, np.float32),
    }


HALF_ULP = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float8": 2.0**-4}


def assert_is_near_mean(name, got, leaves, weights):
    """Within the bound of partial means in float32: u is 2**-24."""
    got, *numbers = (np.asarray(leaf.double() if name == "bfloat16" else leaf) for leaf in (got, *leaves))
    kind = complex if name == "complex" else np.float64
    wanted = np.average([number.astype(kind) for number in numbers], axis=0, weights=weights)
    size = np.average([np.abs(number.astype(kind)) for number in numbers], axis=0, weights=weights)
    bound = HALF_ULP.get(name, 2.0**-24) * np.abs(wanted) + len(leaves) * 2.0**-24 * size
    bound += 2.0**-10 * (name == "float8") + 2.0**-25 * (name == "float16")  # half of the smallest subnormal
    assert (np.abs(got.astype(kind) - wanted) <= bound).all(), name


def in_nodes(rank, names):
    size = len(names)
    os.environ["FUNCAVG_NODE"] = names[rank]
    trees, results = [tree_of(r) for r in range(size)], []
    for weights in (None, [1.0 + r for r in range(size)], [0.0] * (size - 1) + [1.0]):
        result = average(tree_of(rank), weight=weights and weights[rank], timeout=20)
        for name in result:
            leaves = [tree[name] for tree in trees]
            if weights is not None and 0.0 in weights:
                assert bits(result[name]) == bits(leaves[-1]), name
            elif len(set(names)) == 1 or name == "huge":
                got, *leaves = (x.reshape(-1)[::997] if hasattr(x, "reshape") else x for x in (result[name], *leaves))
                assert_is_mean(got, leaves, weights)  # exact, and slow
            else:
                assert_is_near_mean(name, result[name], leaves, weights)
        results.append([bits(leaf) for leaf in result.values()])
    same = tree_of(99)
    again = average(same, timeout=20)
    assert [bits(leaf) for leaf in again.values()] == [bits(leaf) for leaf in same.values()]  # replicas never drift
    donated = average(same, donate=True, timeout=20)
    assert donated["float32"] is same["float32"]
    handle = start_average(tree_of(rank), timeout=20)
    results.append([bits(leaf) for leaf in handle.wait().values()])
    assert results[-1] == results[0]
    return results, session_of(as_collective())._node.nodes


@pytest.mark.parametrize(
    ("names", "nodes"),
    [
        ("aa", [[0, 1]]),
        ("aaa", [[0, 1, 2]]),
        ("aaaa", [[0, 1, 2, 3]]),
        ("aabb", [[0, 1], [2, 3]]),
        ("abab", [[0, 2], [1, 3]]),
        ("aaab", [[0, 1, 2], [3]]),
        ("abb", [[0], [1, 2]]),
        ("aabc", [[0, 1], [2], [3]]),
    ],
)
def test_nodes_of_all_forms(names, nodes):
    ranks = run_processes(len(names), in_nodes, list(names), timeout=100)
    assert all(rank == (ranks[0][0], nodes) for rank in ranks)


def without(rank, names, broken):
    os.environ["FUNCAVG_NODE"] = names[rank]
    if rank == 0 and broken == "memfd":
        os.memfd_create = lambda *args: (_ for _ in ()).throw(OSError(38, "Function not implemented"))
    if rank == 0 and broken == "memory":
        Segment.grow = _no_room(Segment.grow)
    if rank == 0 and broken == "map":
        Segment.map = lambda self, nbytes: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory"))
    if rank == 0 and broken == "reach":
        discovery.open_segment = lambda address: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    if rank == 0 and broken == "descriptors":
        _points.reached = _no_descriptors
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("funcavg").addHandler(handler)
    logging.getLogger("funcavg").setLevel(logging.INFO)
    result = average({"w": np.full(3, float(rank))}, timeout=20)["w"].tolist()
    average(1.0)
    node = session_of(as_collective())._node
    memory = [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:funcavg" in line]
    return result, node and node.nodes, lines, len(memory)


def _no_descriptors(where, number=0):
    """Have none left while the others' memory is opened."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if where == "published":
        limit = os.dup(0)
        os.close(limit)
    elif where == "attached":
        limit = most
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def _no_room(grow):
    def first_only(self, nbytes):
        if nbytes > 4096:
            raise OSError(28, "No space left on device")
        grow(self, nbytes)

    return first_only


@pytest.mark.parametrize(
    ("names", "broken", "nodes", "why"),
    [
        (["off"] * 3, "", None, "FUNCAVG_NODE=off"),
        (["off", "", ""], "", [[0], [1, 2]], "FUNCAVG_NODE=off"),
        ([""] * 3, "memfd", [[0], [1, 2]], "Function not implemented"),
        ([""] * 3, "memory", None, "No space left on device"),
        ([""] * 3, "map", [[0], [1, 2]], "Cannot allocate memory"),
        (
            [""] * 3,
            "reach",
            [[0], [1, 2]],
            "out of reach (PermissionError: [Errno 13] Permission denied: another user",
        ),
        ([""] * 3, "descriptors", [[0], [1, 2]], "(OSError: [Errno 24] Too many open files: '/proc/"),
        (["a", "a", "b"], "memory", None, "No space left on device"),
        (["a", "b", "b"], "memory", [[0], [1, 2]], ""),
    ],
)
def test_where_it_cannot_run_ranks_do_without(names, broken, nodes, why):
    for rank, (result, found, lines, memory) in enumerate(run_processes(3, without, names, broken)):
        assert result == [1.0] * 3
        assert found == nodes
        assert len(lines) == 1
        assert rank > 0 or why in lines[0]
        members = next((members for members in nodes or [] if rank in members), [rank])
        assert memory == (len(members) if len(members) > 1 else 0)


# Around it


def forks(rank):
    average(tree_of(rank), timeout=20)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            average(1.0)
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        inherited = "memfd:funcavg" in Path("/proc/self/maps").read_text()
        os.write(writer, b" INHERITED" if inherited else b" clean")
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    said = os.read(reader, 10_000).decode()
    return said, average(float(rank), timeout=20)


def test_a_forked_child_has_no_part_in_the_group():
    for said, mean in run_processes(2, forks):
        assert "this process was forked from the one that the group belongs to" in said
        assert said.endswith("clean")
        assert mean == 0.5


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.tensor(float(i * i))


# The child runs what Python runs at exit, but not the destructors of torch's process group: they wait for ever for the
# group's threads, which a forked child does not have.
FORKS = """
import atexit, os, sys
import torch, torch.distributed as dist
from funcavg import _points, average, start_average
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=int(sys.argv[1]), world_size=2)
average(torch.ones(3), timeout=20)
if dist.get_rank() == 1:
    import time; time.sleep(0.5)
handle = start_average(torch.ones(3), timeout=20)
child = os.fork()
if child == 0:
    atexit._run_exitfuncs()
    os._exit(0)
_, status = os.waitpid(child, 0)
handle.wait()
os._exit(status != 0)
"""


def test_a_child_exits_while_its_parent_averages(tmp_path):
    skip_without("torch")
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "store")]) for rank in range(2)]
    try:
        assert [rank.wait(60) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def loads_data(rank):
    multiprocessing.current_process()._config["daemon"] = False  # daemons may have no children
    average(tree_of(rank), timeout=20)
    total = 0.0
    for _ in range(2):
        for batch in torch.utils.data.DataLoader(
            Squares(), batch_size=8, num_workers=2, multiprocessing_context="fork"
        ):
            total += average(batch.sum() * (rank + 1), timeout=20).item()
    return total


def test_a_data_loader_with_forked_workers():
    assert run_processes(2, loads_data) == [1.5 * 2 * sum(i * i for i in range(32))] * 2


def many_times(rank):
    tree = {f"p{i}": torch.full((2_500,), float(rank)) for i in range(1000)}  # 10 MB

    def resident():
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024, len(
            list(Path("/proc/self/fd").iterdir())
        )

    for _ in range(150):
        average(tree, donate=True, timeout=20)
    before = resident()
    for _ in range(550):
        average(tree, donate=True, timeout=20)
    after = resident()
    return after[0] - before[0], after[1] - before[1]


def test_hundreds_of_averages_leave_memory_and_descriptors_as_they_are():
    for megabytes, descriptors in run_processes(2, many_times, timeout=110):
        assert megabytes < 5
        assert descriptors == 0


EXITS = """
import sys
import numpy as np, torch.distributed as dist, funcavg
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
assert funcavg.average(np.full(1_000_000, float(rank)))[0] == 0.5
dist.barrier()
"""


def test_a_process_exits_normally_with_a_window_open(tmp_path):
    skip_without("torch")
    ranks = [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", EXITS, str(tmp_path / "store"), str(rank)])
        for rank in range(2)
    ]
    assert [process.wait(60) for process in ranks] == [0, 0]


def two_groups(rank):
    import threading

    one, other = dist.new_group(), dist.new_group()
    alternately = [average(float(rank + i), (one, other)[i % 2], timeout=20) for i in range(20)]
    results = {}

    def work(name, group):
        results[name] = [average(np.full(300_000, float(rank + i)), group, timeout=30)[-1] for i in range(20)]

    threads = [threading.Thread(target=work, args=pair) for pair in (("one", one), ("other", other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    dist.barrier()
    return alternately, results


def test_two_groups_alternately_and_from_two_threads():
    wanted = [0.5 + i for i in range(20)]
    for alternately, results in run_processes(2, two_groups):
        assert alternately == wanted
        assert results == {"one": wanted, "other": wanted}


def beside_ddp(rank):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(6)])
    )
    means = []
    for step in range(10):
        handle = start_average({"w": torch.full((400_000,), float(rank + step))}, timeout=30)
        model(torch.full((4, 300), float(rank))).square().sum().backward()
        means.append(handle.wait()["w"][-1].item())
    gradient = [p.grad.sum().item() for p in model.parameters()]
    return means, gradient


def test_start_average_while_ddp_trains_on_the_same_group():
    ranks = run_processes(2, beside_ddp)
    assert ranks[0] == ranks[1]
    assert ranks[0][0] == [0.5 + step for step in range(10)]


def small_slots(rank):
    """Leaves that cross many small buckets."""
    discovery.slot_bytes = lambda *_: 4096
    leaves = [torch.arange(10_000.0) + rank, np.arange(7777.0) * rank, torch.full((33, 77), float(rank)).T]
    result = average(leaves, timeout=20)
    plans = session_of(as_collective())._plans
    buckets = max((plan.buckets for plan, _ in plans.values()), key=len)
    assert len(buckets) > 20
    assert len({id(bucket.theirs) for bucket in buckets}) <= SLOTS * len({bucket.mine.nbytes for bucket in buckets})
    return (
        torch.equal(result[0], torch.arange(10_000.0) + 1),
        np.array_equal(result[1], np.arange(7777.0)),
        (result[2] == 1).all().item(),
    )


def test_many_small_buckets():
    assert run_processes(3, small_slots) == [(True, True, True)] * 3

"""Steps that the kernel in C takes with leaves: where they lie is looked at before it touches them."""

import gc
import sys

import numpy as np
import pytest
from helpers.frameworks import dist, torch
from helpers.kernels import library_or_skip
from helpers.processes import run_processes

from funcavg import _points, average, mean
from funcavg._engine.session import session_of
from funcavg._engine.table import CHUNK, COPY, MEAN, Table
from funcavg.collectives import as_collective, discovery

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.fixture
def kernel():
    return library_or_skip()


def plans():
    return [planned for planned, _ in session_of(as_collective())._plans.values() if hasattr(planned, "table")]


def when(point, bucket, do):
    """Do something when a rank's call gets to a point of a bucket."""

    def reached(where, number=0):
        if (where, number) == (point, bucket):
            do()

    _points.reached = reached


def leaves_of(rank):
    """Many kinds in the same buckets, and lengths that leave a part of each bucket to be filled."""
    torch.manual_seed(rank)
    plain = [torch.randn(n) for n in (1, 7, 333)] + [torch.randn(3, 1, 5), torch.randn(()), torch.zeros(0, 4)]
    halves = [torch.randn(n).to(dtype) for n in (5, 64, 129) for dtype in (torch.float16, torch.bfloat16)]
    doubles = [torch.randn(n, dtype=torch.float64) for n in (3, 1001)]
    lazy = torch.randn(9, dtype=torch.complex64)
    others = [
        *(
            torch.randn(6, 4).T,
            torch.randn(20)[::2],
            lazy.conj(),
            torch._neg_view(torch.randn(9)),
            torch.randn(5).expand(2, 5),
        ),
        *(torch.randn(8, dtype=torch.complex64), torch.nn.Parameter(torch.randn(17)), torch.randn(300_001)),
        *(torch.arange(4), np.random.default_rng(rank).normal(size=11).astype("f4"), 0.5 + rank),
    ]
    negated = [torch._neg_view(torch.randn(9)) for _ in range(60)]  # whose memory is in order, but of other numbers
    return plain, halves, doubles, others, negated


def as_numbers(leaf):
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().resolve_conj().resolve_neg()
        return (leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy().copy()
    return np.array(leaf)


def can_be_donated(leaf):
    return not isinstance(leaf, torch.Tensor) or not (leaf.is_conj() or leaf.is_neg() or 0 in leaf.stride())


def every_kind(rank, size, kinds, donate):
    # Smaller slots than are ever made: leaves are cut, and there are more buckets than slots.
    discovery.slot_bytes = lambda *_: 1024
    trees = [[leaf for kind in kinds for leaf in leaves_of(k)[kind]] for k in range(size)]
    if donate:
        trees = [list(filter(can_be_donated, tree)) for tree in trees]
    tree, before = trees[rank], list(map(as_numbers, trees[rank]))
    wanted = list(map(as_numbers, mean(trees)))
    for _ in range(2):  # the second time by a plan that is there
        with torch.no_grad():
            results = average(tree, donate=donate, timeout=20)
        np.testing.assert_equal(list(map(as_numbers, results)), wanted)
        if donate:
            tree = list(filter(can_be_donated, [leaf for kind in kinds for leaf in leaves_of(rank)[kind]]))
        np.testing.assert_equal(list(map(as_numbers, tree)), before)
    plan = max(plans(), key=lambda plan: len(plan.buckets))
    assert not any(
        bucket.mine.reshape(-1)[len(bucket.mine.reshape(-1)) - len(bucket.padding) :].any()
        for bucket in plan.buckets[-2:]
    )
    actions = plan.table._rows["action"]
    packed = [i for i, step in enumerate(plan.steps) if step.bucket.own is None and step.action == "copy in"]
    return float((actions[packed] == COPY).mean()), bool((actions == MEAN).any())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("donate", [False, True])
def test_leaves_in_order_are_packed_in_c_and_others_beside_them(donate, size):
    for share, means in run_processes(size, every_kind, size, (0, 1, 2), donate):
        assert share == 1
        assert means
    for share, means in run_processes(size, every_kind, size, (0, 1, 2, 3), donate):
        assert 0 < share < 1  # a bucket with a leaf that C cannot reach is packed in Python
        assert means
    for share, _ in run_processes(size, every_kind, size, (4,), False):
        assert share == 0


def after_run(step, do):
    """Do something when C has first stopped behind a step, having taken as many at once as in any call."""
    run, done = Table.run, []

    def watched(*args, **options):
        position = run(*args, **options)
        if position > step and not done:
            done.append(do())
        return position

    Table.run = watched


def filled(rank, kind):
    """Many small leaves, or a few large ones, of 2.4 MB in all; and their means over two ranks."""
    leaves = [torch.full((1000,), float(rank + i)) for i in range(600)] if kind == "small" else None
    leaves = leaves or [torch.full((300_000,), float(rank + i)) for i in range(2)]
    return leaves, [0.5 + i for i in range(len(leaves))]


def moved(rank, kind, donate, when):
    discovery.slot_bytes = lambda *_: 64 << 10
    leaves, means = filled(rank, kind)
    old = [leaf.view(-1) for leaf in leaves]

    def move():
        for leaf, its in zip(leaves, old, strict=True):
            leaf.set_(leaf.clone())
            its.fill_(float("nan"))

    if rank == 0:
        when(move)
    results = average(leaves, donate=donate, timeout=20)
    (plan,) = plans()
    assert len(plan.buckets) > 30
    assert all(result is leaf for result, leaf in zip(results, leaves, strict=True)) == donate
    assert not any(its.isfinite().any() for its in old) or rank == 1
    return [float(result.min()) for result in results] == means == [float(result.max()) for result in results]


def copied_in(do):
    when("copied_in", 2, do)


def done(do):
    when("done", 2, do)


def early(do):
    after_run(0, do)


def late(do):
    after_run(50, do)


@pytest.mark.parametrize("kind", ["small", "large"])
@pytest.mark.parametrize(
    ("when", "donate"), [(copied_in, True), (done, True), (early, False), (early, True), (late, True)]
)
def test_leaves_that_move_under_way(when, kind, donate):
    assert run_processes(2, moved, kind, donate, when) == [True, True]


def freed(rank, kind, when, held):
    discovery.slot_bytes = lambda *_: 64 << 10
    leaves, _ = filled(rank, kind)
    average(leaves, donate=True, timeout=20)

    def free():
        for leaf in leaves:
            leaf.untyped_storage().resize_(0)
            leaf.untyped_storage().resize_(held)  # which may well lie at the same address

    if rank == 0:
        when(free)
    try:
        average(leaves, donate=True, timeout=3)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(("kind", "held"), [("small", 0), ("large", 0), ("large", 600_000)])
@pytest.mark.parametrize("when", [early, late])
def test_leaves_that_are_freed_under_way(when, kind, held):
    mine, other = run_processes(2, freed, kind, when, held)
    assert "RuntimeError: average: the memory of a tensor of shape [" in mine
    assert f"has been freed: its storage has {held} bytes now" in mine
    assert "PeerLostError" in other


def chunks(rank):
    discovery.slot_bytes = lambda *_: 4096
    leaves, _ = filled(rank, "small")
    average([*leaves, *filled(rank, "large")[0]], donate=True, timeout=20)
    (plan,) = plans()
    position = 0
    while position < len(plan.steps):
        chunk = plan.table._chunks[position]
        assert position < chunk.end <= position + CHUNK
        assert all(other is chunk for other in plan.table._chunks[position : chunk.end])
        looked_at = {leaf for touched in (*chunk.read, *chunk.written) for leaf in touched.large + touched.small}
        assert looked_at == {
            number
            for step in plan.steps[position : chunk.end]
            for (number, _, _), _, _ in step.bucket.ranges
            if step.action != "reduce" or step.bucket.own is not None
        }
        assert len(looked_at) <= CHUNK or chunk.end == position + 1
        position = chunk.end
    return len(set(map(id, plan.table._chunks)))


def test_python_looks_at_all_leaves_of_the_steps_that_c_takes():
    assert min(run_processes(2, chunks)) > 10


def saved(rank):
    leaf, rest = torch.full((10,), 1.0 + rank, requires_grad=True), [torch.ones(5) for _ in range(3)]
    with torch.no_grad():
        average([leaf, *rest], donate=True, timeout=20)
    loss = (leaf * leaf).sum()
    with torch.no_grad():
        average([leaf, *rest], donate=True, timeout=20)
    try:
        loss.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)


def test_autograd_notices_donated_leaves_that_c_has_written():
    assert run_processes(2, saved) == [True, True]


def saved_by_an_older_torch(rank):
    increment = torch.autograd.graph.increment_version

    def of_one(tensor):
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")
        increment(tensor)

    torch.autograd.graph.increment_version = of_one
    return saved(rank)


def test_autograd_notices_them_in_releases_that_are_told_of_one_at_a_time():
    assert run_processes(2, saved_by_an_older_torch) == [True, True]


def calls_per_bucket(rank, tree):
    """Count the functions that are called for each bucket of a call, beside those that wait for others."""
    discovery.slot_bytes = lambda *_: 16 << 10
    leaves = [torch.zeros(1 << 20)] if tree == "large" else [torch.zeros(64) for _ in range(16_000)]
    average(leaves, donate=True, timeout=20)
    (plan,) = plans()
    count, waiting = 0, 0

    def seen(frame, event, arg):
        nonlocal count, waiting
        if frame.f_code.co_name == "wait" and "node.py" in frame.f_code.co_filename:
            waiting += {"call": 1, "return": -1}.get(event, 0)
        elif not waiting:
            count += event in ("call", "c_call")

    dist.barrier()
    gc.disable()  # whose callbacks are others' calls
    sys.setprofile(seen)
    average(leaves, donate=True, timeout=20)
    sys.setprofile(None)
    assert len(plan.buckets) > 200
    return count / len(plan.buckets)


@pytest.mark.parametrize(("tree", "most"), [("large", 25), ("small", 50)])
def test_python_per_bucket(tree, most):
    # C takes many steps of a large leaf at once. Where many leaves are small, Python looks at each step's before.
    assert max(run_processes(2, calls_per_bucket, tree)) < most

"""Leaves cut into buckets: every element once, in order, and within the limit."""

import math

import numpy as np
import pytest
from helpers.frameworks import is_tensor, torch
from hypothesis import given, settings
from hypothesis import strategies as st

from funcavg._engine import buckets
from funcavg._engine.buckets import SLOTS, Slots, bucket_bytes, cut, host_memory, make_plan
from funcavg._trees.arrays import family_of

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
examples = settings(max_examples=300, deadline=None, derandomize=True)


@examples
@given(shape=shapes, data=st.data())
def test_cut_covers_every_element_once_and_in_order(shape, data):
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    if start == stop:
        return
    numbers = np.arange(count).reshape(shape)
    blocks = list(cut(shape, start, stop)) if shape else [((), ())]
    covered = [number for index, _ in blocks for number in np.ravel(numbers[index]).tolist()]
    assert covered == list(range(start, stop))
    assert [numbers[index].shape for index, _ in blocks] == [block for _, block in blocks]
    assert len(blocks) <= 2 * len(shape) + 1


@pytest.mark.parametrize(
    ("shape", "start", "stop", "blocks"),
    [
        ((10,), 0, 10, [((slice(0, 10),), (10,))]),
        ((10,), 3, 4, [((slice(3, 4),), (1,))]),
        ((3, 4), 4, 8, [((slice(1, 2),), (1, 4))]),
        ((3, 4), 5, 7, [((1, slice(1, 3)), (2,))]),
        ((2, 2, 2), 1, 4, [((0, 0, slice(1, 2)), (1,)), ((0, slice(1, 2)), (1, 2))]),
        ((2, 2, 2), 2, 7, [((0, slice(1, 2)), (1, 2)), ((1, slice(0, 1)), (1, 2)), ((1, 1, slice(0, 1)), (1,))]),
    ],
)
def test_cut_by_example(shape, start, stop, blocks):
    assert list(cut(shape, start, stop)) == blocks


def plan_of(arrays, size, limit):
    rows = [(i, family_of(array), family_of(array).describe(array)) for i, array in enumerate(arrays)]
    return make_plan(rows, size, Slots(host_memory, limit), limit)


arrays = st.builds(
    lambda shape, dtype, framework: framework(shape, dtype),
    st.lists(st.integers(0, 9), max_size=3),
    st.sampled_from(["float32", "float64", "float16"]),
    st.sampled_from(
        [np.zeros, lambda shape, name: torch.zeros(shape, dtype=getattr(torch, name))][: 2 if torch else 1]
    ),
)


@examples
@given(leaves=st.lists(arrays, max_size=8), size=st.integers(1, 6), large=st.sampled_from([96, 1000]))
def test_a_plan_moves_every_element_once(leaves, size, large):
    limit = 128
    for i, leaf in enumerate(leaves):  # each element is a number of its own
        values = 1 + np.arange(leaf.size if isinstance(leaf, np.ndarray) else leaf.numel()) + 0.125 * (i % 4)
        leaf[...] = torch.tensor(values).view(leaf.shape) if is_tensor(leaf) else values.reshape(leaf.shape)
    before = np.concatenate([np.ravel(leaf).astype(float) for leaf in leaves]) if leaves else np.zeros(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "LARGE", large)
        plan = plan_of(leaves, size, limit)
    results = [np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else torch.zeros_like(leaf) for leaf in leaves]
    packed = []
    for bucket in plan:
        assert bucket.mine.nbytes <= limit
        assert bucket.mine.shape == bucket.theirs.shape == (size, bucket.mine.nbytes // size)
        bucket.pack(leaves)
        packed += bucket.mine.view(bucket.element).reshape(-1).tolist()
        bucket.unpack(results)
        own = bucket.rows_in(leaves)
        if own is not None:  # what is sent from a leaf's own memory is what would have been packed
            np.testing.assert_array_equal(own, bucket.mine)
    assert sorted(number for number in packed if number) == sorted(before.tolist())
    for leaf, result in zip(leaves, results, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(result))


def test_a_plan_depends_only_on_what_ranks_agree_about():
    """Memory layout and framework may differ between ranks; where buckets begin must not."""
    one = [np.zeros((40, 30), np.float32), np.zeros(7), np.zeros(500, np.float32)]
    other = [torch.zeros(30, 40).T, torch.zeros(7, dtype=torch.float64), np.zeros(1000, np.float32)[::2]]
    plans = [
        [(bucket.element, bucket.mine.shape, len(bucket.padding)) for bucket in plan_of(leaves, 3, 1200)]
        for leaves in (one, other)
    ]
    assert plans[0] == plans[1]
    assert len(plans[0]) > 3


def test_padding_is_cleared():
    """What lies there from the bucket before must not be averaged: it could raise a warning."""
    (bucket,) = plan_of([np.ones(5)], size=3, limit=1000)
    bucket.mine[...] = 255
    bucket.pack([np.ones(5)])
    assert bucket.mine.reshape(-1).view(float).tolist() == [1, 1, 1, 1, 1, 0]


def test_large_leaves_are_sent_from_their_own_memory(monkeypatch):
    monkeypatch.setattr(buckets, "LARGE", 64)
    leaves = [np.arange(12.0), np.arange(12.0)[::-1], torch.arange(12.0, dtype=torch.float64)]
    plan = plan_of(leaves, size=2, limit=96)
    rows = [bucket.rows_in(leaves) for bucket in plan]
    assert np.shares_memory(rows[0], leaves[0])
    assert rows[1] is None  # not contiguous
    assert np.shares_memory(rows[2], leaves[2].numpy())


def test_how_large_buckets_are():
    """4 MiB, never over 16 MiB, and shards of at least 64 KiB where there is room."""
    assert bucket_bytes(2) == bucket_bytes(64) == 4 << 20
    assert bucket_bytes(128) == 8 << 20
    assert bucket_bytes(100_000) == 16 << 20


def test_memory_is_bounded_and_reused():
    made = []
    slots = Slots(lambda nbytes: made.append(nbytes) or np.empty(nbytes, np.uint8), 100)
    lent = [[memory.ctypes.data for memory in slots.lend(number, 1, 100)] for number in range(50)]
    assert made == [100] * 2 * SLOTS
    assert lent[0] == lent[SLOTS]
    assert all(landing == mine for mine, _, landing in lent)
    assert len({address for three in lent for address in three}) == 2 * SLOTS

"""Properties of `average`, on random trees and 1 to 6 ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import optree
import pytest
from helpers.frameworks import is_tensor, no_grad, torch
from helpers.trees import (
    VALUES,
    Point,
    Spec,
    assert_is_mean,
    bits,
    build,
    is_hollow,
    memory,
    numpy_dtype,
    plant,
    raw_memory,
    reals,
    refs_of,
    same_containers,
    specs,
    trees,
)
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from funcavg import average
from funcavg._engine import buckets as cutting
from funcavg._engine import session
from funcavg.testing import run_ranks

sizes = st.integers(1, 6)
examples = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,  # a failure is the same everywhere
    phases=[Phase.explicit, Phase.generate],  # examples are small, and shrinking them takes longer than a test may
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@contextmanager
def buckets(tiny: bool) -> Iterator[None]:
    """Cut small leaves as large ones are: buckets of 256 bytes, and sent from their own memory from 128 bytes on."""
    if not tiny:
        yield
        return
    with mock.patch.object(session, "bucket_bytes", return_value=256), mock.patch.object(cutting, "LARGE", 128):
        yield


def average_planted(tree, size, tiny=False, **options):
    """Average a drawn tree; return (before, after) of every rank. Options are functions of the rank."""

    def fn(group):
        planted = plant(tree, group.rank)
        with no_grad():
            return planted, average(planted, group, **{name: of(group.rank) for name, of in options.items()})

    with buckets(tiny):
        return run_ranks(size, fn)


@examples
@given(tree=trees(), size=sizes, tiny=st.booleans())
def test_result_is_the_mean(tree, size, tiny):
    """Within the promised bound, in every dtype, and the same bits on every rank."""
    ranks = average_planted(tree, size, tiny)
    befores, afters = ([optree.tree_leaves(side) for side in sides] for sides in zip(*ranks, strict=True))
    for i, ref in enumerate(refs_of(tree)):
        if ref.spec.averaged:
            assert_is_mean(afters[0][i], [leaves[i] for leaves in befores])
            assert len({bits(leaves[i]) for leaves in afters}) == 1


@examples
@given(tree=trees(), size=sizes, tiny=st.booleans())
def test_equal_replicas_come_back_bit_for_bit(tree, size, tiny):
    def fn(group):
        planted = plant(tree, rank=0)
        with no_grad():
            return planted, average(planted, group)

    with buckets(tiny):
        for before, after in run_ranks(size, fn):
            for one, other in zip(optree.tree_leaves(before), optree.tree_leaves(after), strict=True):
                if not any(number != number for number in reals(one)):  # payloads of NaN are nobody's promise
                    assert bits(one) == bits(other)


@examples
@given(tree=trees(), size=sizes, tiny=st.booleans())
def test_inputs_are_neither_written_nor_shared(tree, size, tiny):
    def fn(group):
        planted = plant(tree, group.rank)
        before = [raw_memory(leaf) for leaf in optree.tree_leaves(planted)]
        with no_grad():
            result = average(planted, group)
        assert [raw_memory(leaf) for leaf in optree.tree_leaves(planted)] == before
        taken = [span for span in map(memory, optree.tree_leaves(planted)) if span]
        for ref, leaf in zip(refs_of(tree), optree.tree_leaves(result), strict=True):
            span = memory(leaf)
            if ref.spec.averaged and span:
                assert all(span[1] <= begin or end <= span[0] for begin, end in taken)

    with buckets(tiny):
        run_ranks(size, fn)


@examples
@given(tree=trees(), size=sizes)
def test_the_tree_keeps_its_kind(tree, size):
    """Containers and key order; type, dtype, shape, memory format and requires_grad of leaves; the rest untouched."""
    for before, after in average_planted(tree, size):
        assert same_containers(before, after)
        rows = zip(refs_of(tree), optree.tree_leaves(before), optree.tree_leaves(after), strict=True)
        for ref, one, other in rows:
            if not ref.spec.averaged:
                assert other is one
                continue
            assert type(other) is type(one)
            if isinstance(one, np.ndarray) or is_tensor(one):
                assert (other.dtype, other.shape) == (one.dtype, one.shape)
            if is_tensor(one):
                assert (other.device, other.requires_grad, other.is_leaf) == (one.device, one.requires_grad, True)
                assert other.stride() == torch.empty_like(one).stride()
            if isinstance(one, np.ndarray):
                assert other.strides == np.empty_like(one).strides
                assert other.flags.writeable


@examples
@given(tree=trees(), size=sizes, tiny=st.booleans(), donate=st.booleans())
def test_ties_come_back_tied(tree, size, tiny, donate):
    """What was the same memory before is the same memory after, and what was not, is not."""
    donate = donate and all(ref.spec.donatable for ref in refs_of(tree))
    for before, after in average_planted(tree, size, tiny, donate=lambda rank: donate):
        spans = [[memory(leaf) for leaf in optree.tree_leaves(side)] for side in (before, after)]
        averaged = [i for i, ref in enumerate(refs_of(tree)) if ref.spec.averaged and spans[0][i]]
        for i in averaged:
            for j in averaged:
                assert (spans[0][i] == spans[0][j]) == (spans[1][i] == spans[1][j])
                if optree.tree_leaves(before)[i] is optree.tree_leaves(before)[j]:
                    assert optree.tree_leaves(after)[i] is optree.tree_leaves(after)[j]


@examples
@given(tree=trees(), size=sizes, tiny=st.booleans())
def test_donated_arrays_come_back_themselves(tree, size, tiny):
    """With the values that they would have come back with otherwise."""
    kept = optree.tree_map(lambda ref: ref if ref.spec.is_array and ref.spec.donatable else None, tree)
    assume(not is_hollow([ref.spec for ref in refs_of(kept)]))
    undonated = average_planted(kept, size, tiny)
    donated = average_planted(kept, size, tiny, donate=lambda rank: True)
    for (_, expected), (before, after) in zip(undonated, donated, strict=True):
        assert all(map(lambda a, b: a is b, optree.tree_leaves(before), optree.tree_leaves(after)))
        assert list(map(bits, optree.tree_leaves(after))) == list(map(bits, optree.tree_leaves(expected)))


weights = st.sampled_from([0, 1, 2.5, 1e-3, 3, 1e300, np.float32(0.7), np.int64(4), 0.0])


@examples
@given(data=st.data(), tree=trees(["ordinary", "small integers", "subnormal", "wide"]), tiny=st.booleans())
def test_weighted_mean(data, tree, tiny):
    drawn = data.draw(st.lists(weights, min_size=1, max_size=6).filter(any))
    ranks = average_planted(tree, len(drawn), tiny, weight=drawn.__getitem__)
    befores, afters = ([optree.tree_leaves(side) for side in sides] for sides in zip(*ranks, strict=True))
    for i, ref in enumerate(refs_of(tree)):
        if ref.spec.averaged:
            assert_is_mean(afters[0][i], [leaves[i] for leaves in befores], [float(w) for w in drawn])
            assert len({bits(leaves[i]) for leaves in afters}) == 1


@examples
@given(spec=specs(), size=st.integers(2, 6), lost=st.integers(0, 5), tiny=st.booleans())
def test_a_diverged_rank_of_weight_0_does_not_count(spec, size, lost, tiny):
    """Its values are never read, so the others' mean is what it would be without it, bit for bit."""
    assume(not is_hollow([spec]))
    lost = min(lost, size - 1)
    spec = Spec(spec.kind, spec.dtype, spec.shape, spec.layout, "small integers", spec.seed)

    def fn(group):
        leaf = build(Spec(**{**vars(spec), "values": "special"}) if group.rank == lost else spec, group.rank)
        with no_grad():
            return average(leaf, group, weight=float(group.rank != lost))

    with buckets(tiny):
        results = run_ranks(size, fn)
    if spec.averaged:
        assert_is_mean(results[0], [build(spec, rank) for rank in range(size) if rank != lost])
        assert len(set(map(bits, results))) == 1


@examples
@given(data=st.data(), tree=trees(), size=sizes)
def test_where_decides_what_is_averaged(data, tree, size):
    """Refused leaves are the very objects that went in, whatever their type; paths are optree's."""
    refs = refs_of(tree)
    refused = data.draw(st.sets(st.integers(0, max(len(refs) - 1, 0)), max_size=len(refs)))
    paths = optree.tree_paths(tree)
    strange = {paths[i] for i in refused if i < len(paths)}
    assume(not is_hollow([ref.spec for ref, path in zip(refs, paths, strict=True) if path not in strange]))
    asked = []

    def fn(group):
        planted = optree.tree_map_with_path(
            lambda path, leaf: "not a number" if path in strange else leaf, plant(tree, group.rank)
        )
        asked.clear()
        with no_grad():
            return planted, average(planted, group, where=lambda path: asked.append(path) or path not in strange)

    ranks = run_ranks(size, fn)
    assert set(asked) <= set(paths)
    befores, afters = ([optree.tree_leaves(side) for side in sides] for sides in zip(*ranks, strict=True))
    for i, (ref, path) in enumerate(zip(refs, paths, strict=True)):
        if path in strange:
            assert all(leaves[i] == "not a number" for leaves in afters)
        elif ref.spec.averaged:
            assert_is_mean(afters[0][i], [leaves[i] for leaves in befores])


# Single cases


def test_paths_given_to_where():
    seen = []
    tree = {"b": [1.0, 2.0], "a": {"w": 3.0}, 7: Point(4.0, 5.0)}
    average(tree, where=seen.append)
    assert sorted(map(repr, seen)) == sorted(map(repr, [("b", 0), ("b", 1), ("a", "w"), (7, 0), (7, 1)]))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("size", range(1, 7))
def test_sums_do_not_overflow_where_the_mean_does_not(dtype, size):
    from ml_dtypes import finfo

    limits = np.finfo(dtype) if dtype == "longdouble" else finfo(numpy_dtype(dtype))
    largest = np.array([limits.max, -limits.max, limits.max], numpy_dtype(dtype))
    for result in run_ranks(size, lambda group: average(largest, group)):
        np.testing.assert_array_equal(result, largest)


def test_lazily_conjugated_and_negated_tensors():
    """They share memory with other leaves, but are other numbers: no ties."""

    def fn(group):
        x = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0 * group.rank]))
        return average([x, x.conj(), x.conj().imag, x.imag], group)

    for x, conj, negated, imag in run_ranks(2, fn):
        assert torch.equal(x, torch.tensor([1 + 4j, 2 + 1j]))
        assert torch.equal(conj, torch.tensor([1 - 4j, 2 - 1j]))
        assert torch.equal(negated, torch.tensor([-4.0, -1.0]))
        assert torch.equal(imag, torch.tensor([4.0, 1.0]))


@pytest.mark.parametrize("wrap", [lambda x: x, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_a_negated_view_is_donated(wrap):
    def fn(group):
        x = torch.complex(torch.zeros(2), torch.tensor([4.0, 2.0 * group.rank]))
        with torch.no_grad():
            leaf = wrap(x.conj().imag)
            assert leaf.is_neg()
            return average(leaf, group, donate=True), leaf, x

    for result, leaf, x in run_ranks(2, fn):
        assert result is leaf
        assert leaf.tolist() == [-4.0, -1.0]
        assert x.imag.tolist() == [4.0, 1.0]


@pytest.mark.parametrize("make", [np.arange, torch.arange])
def test_unequal_views_of_one_memory_are_not_tied(make):
    """They begin at the same address: other strides, or another shape."""

    def fn(group):
        x = (make(4.0) * (group.rank + 1)).reshape(2, 2)
        views = [x, x.T, x[0], x[:, 0], x.reshape(4)]
        return [leaf.tolist() for leaf in average(views, group)]

    x = np.arange(4.0).reshape(2, 2) * 1.5
    assert run_ranks(2, fn) == [[leaf.tolist() for leaf in (x, x.T, x[0], x[:, 0], x.reshape(4))]] * 2


def test_interleaved_views_are_donated():
    """x[0::2] and x[1::2] have extents that meet, and no element in common."""

    def fn(group):
        whole = torch.arange(6.0) * group.rank
        average([whole[0::2], whole[1::2]], group, donate=True)
        return whole.tolist()

    assert run_ranks(2, fn) == [[0, 0.5, 1, 1.5, 2, 2.5]] * 2


def test_ties_on_one_rank_only():
    """They change neither what is agreed nor any value; since the two means differ, they cannot stay tied."""

    def fn(group):
        one = torch.full((3,), 1.0)
        return [leaf.tolist() for leaf in average([one, one if group.rank == 0 else one + 4], group)]

    assert run_ranks(2, fn) == [[[1.0] * 3, [3.0] * 3]] * 2


def test_a_small_leaf_keeps_no_large_memory_alive():
    """No arena: saving one leaf of the result saves that leaf."""

    def fn(group):
        tree = {"small": torch.zeros(3), "large": torch.zeros(1 << 20), "array": np.zeros(3)}
        result = average(tree, group)
        owner = result["array"]
        while owner.base is not None:
            owner = owner.base
        return result["small"].untyped_storage().nbytes(), owner.nbytes

    assert run_ranks(2, fn) == [(12, 24)] * 2


def test_order_of_a_plain_dict_does_not_matter():
    def fn(group):
        keys = ["a", "b", "c"][:: 1 - 2 * (group.rank % 2)]
        return list(average({key: float(ord(key) + group.rank) for key in keys}, group).items())

    expected = [("a", 97.5), ("b", 98.5), ("c", 99.5)]
    assert run_ranks(2, fn) == [expected, expected[::-1]]


@pytest.mark.parametrize("size", [1, 3])
def test_an_empty_tree(size):
    assert (
        run_ranks(size, lambda group: average({"nothing": [], "at all": None}, group))
        == [{"nothing": [], "at all": None}] * size
    )


def test_group_none_is_this_process_alone():
    leaf = np.array([1.0, np.nan])
    result = average({"w": leaf, "n": 3})
    assert result["w"] is not leaf
    np.testing.assert_array_equal(result["w"], leaf)
    assert result["n"] == 3


def test_every_value_group_in_the_strategy_is_drawn():
    """Meta-test: each value group gives what it is named for, so the properties above meet it."""
    drawn = {values: build(Spec("numpy", "float32", (2, 3, 2), values=values), 1) for values in VALUES}
    tiny = np.finfo(np.float32).smallest_normal
    assert (np.abs(drawn["subnormal"]) < tiny).any()
    assert (np.abs(drawn["huge"]) == np.finfo(np.float32).max).any()
    assert not np.isfinite(drawn["special"]).all()
    assert np.abs(drawn["wide"]).max() > 1e4 * np.abs(drawn["wide"]).min()

"""Trees of thousands of small leaves: nothing of a call is done leaf by leaf in Python."""

import sys

import numpy as np
import pytest
from helpers.frameworks import torch

import funcavg
from funcavg._engine import session
from funcavg.testing import run_ranks

LEAVES = 4000


class Echo:
    """Two ranks, the other of which does as this one does: so that one rank's work can be counted alone."""

    rank, size, stops_on_error = 0, 2, True

    def gather(self, payload, timeout):
        return [payload, payload]

    def exchange(self, send, receive, timeout):
        receive[1] = send[0]

    def share(self, buffer, timeout):
        buffer[1] = buffer[0]


def calls_of(fn):
    """Count the functions of Python and C that are called."""
    count = 0

    def seen(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        fn()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("donate", [False, True])
def test_a_call_calls_nothing_for_each_tensor(donate):
    group, tree = Echo(), {f"p{i}": torch.full((16,), float(i)) for i in range(LEAVES)}
    funcavg.average(tree, group, donate=donate)  # which remembers the layout and the plan
    assert calls_of(lambda: funcavg.average(tree, group, donate=donate)) < LEAVES


def test_a_call_calls_one_function_for_each_array():
    group, tree = Echo(), {f"p{i}": np.full(16, float(i)) for i in range(LEAVES)}
    funcavg.average(tree, group)
    assert calls_of(lambda: funcavg.average(tree, group)) < 2 * LEAVES  # np.ndarray.copy


SHAPES = [(), (1,), (7,), (3, 5), (4, 1, 3), (2, 3, 4)]


def of_many_kinds(rank):
    """Return small tensors of which some, and only some, may have results that are made as copies."""
    made = {}
    for i, shape in enumerate(SHAPES * 40):
        leaf = torch.arange(int(np.prod(shape)), dtype=torch.float32).reshape(shape) + rank + i
        made[f"plain{i}"] = leaf
        made[f"turned{i}"] = (leaf + 1).permute(tuple(reversed(range(leaf.ndim))))
        made[f"every second{i}"] = torch.stack([leaf, leaf - 1], -1)[..., 0]
        made[f"half{i}"] = leaf.to(torch.bfloat16)
        made[f"parameter{i}"] = torch.nn.Parameter(leaf - 2)
        made[f"complex{i}"] = torch.complex(leaf, -leaf)
    made["crosses"] = torch.full((300_000,), float(rank))  # from one bucket into the next
    made["last"] = torch.full((800_000,), float(rank))[:799_999]
    return made


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_results_are_as_if_each_leaf_had_been_alone(kind):
    def trees(rank):
        tree = of_many_kinds(rank)
        if kind == "numpy":
            tree = {k: v.detach().numpy() for k, v in tree.items() if v.dtype != torch.bfloat16}
        return tree

    def fn(group):
        with torch.no_grad():
            return funcavg.average(trees(group.rank), group)

    given = trees(0), trees(1)
    for results in run_ranks(2, fn):
        for key, result in results.items():
            one, other = (tree[key] for tree in given)
            assert type(result) is type(one)
            assert result.dtype == one.dtype
            if kind == "numpy":
                np.testing.assert_array_equal(result, (one + other) / 2)
                assert result.base is None or result.dtype.kind == "c", key
                assert result.strides == np.empty_like(one).strides, key
                continue
            assert torch.equal(result, (one + other) / 2), key
            assert result.stride() == torch.empty_like(one).stride(), key
            assert result.requires_grad == one.requires_grad
            storage = result.untyped_storage()
            assert storage.nbytes() == result.numel() * result.element_size(), key
            assert storage.resizable()
            assert result._base is None or result.is_complex()


def test_strides_of_dimensions_with_one_element_are_kept():
    """By them torch tells channels last."""

    def fn(group):
        leaf = torch.ones(4, 3, 1, 1).to(memory_format=torch.channels_last)
        return funcavg.average([leaf, torch.ones(4, 3, 1, 1), torch.ones(5)], group)

    last, first, _ = run_ranks(2, fn)[0]
    assert last.stride() == (3, 1, 3, 3)
    assert first.stride() == (3, 1, 1, 1)


def test_jax_arrays_are_put_back_where_they_were():
    """By a call of JAX's that is not public, which `device_put` would lead to leaf by leaf; without it, by that."""
    jax = pytest.importorskip("jax")
    device = jax.devices()[0]

    def fn(group):
        rank = group.rank
        tree = {
            "small": jax.numpy.full((3, 1), rank, "float32"),
            "complex": jax.numpy.full(3, rank * 1j, "complex64"),
            "half": jax.numpy.full(3, rank, "bfloat16"),
            "committed": jax.device_put(np.full(5, rank, "f"), device),
            "weak": jax.numpy.asarray(float(rank)),
            "large": jax.numpy.full(300_000, rank, "float32"),
        }
        return tree, funcavg.average(tree, group)

    for tree, result in run_ranks(2, fn):
        for key, leaf in tree.items():
            half = 0.5j if key == "complex" else 0.5
            assert (np.asarray(result[key]) == half).all(), key
            assert (result[key].aval, result[key].sharding) == (leaf.aval, leaf.sharding), key
            assert (result[key].committed, result[key].weak_type) == (leaf.committed, leaf.weak_type), key


def test_without_jaxs_own_way_of_putting_device_put_is_used(monkeypatch):
    pytest.importorskip("jax")
    from funcavg._trees.arrays import jax as family

    def missing(*_):
        raise AttributeError

    monkeypatch.setattr(family, "_put_each", missing)
    test_jax_arrays_are_put_back_where_they_were()


@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_results_do_not_change_with_the_next_call(kind, monkeypatch):
    """They are no views of buckets, which JAX would adopt where they are aligned."""
    kinds = pytest.importorskip("jax").numpy if kind == "jax" else np

    def aligned(nbytes):
        memory = np.empty(nbytes + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        return memory[begin : begin + nbytes]

    monkeypatch.setattr(session, "host_memory", aligned)
    group = Echo()
    first = funcavg.average([kinds.full(256, float(i)) for i in range(100)], group)
    before = [np.array(leaf) for leaf in first]
    funcavg.average([kinds.full(256, -1.0) for i in range(100)], group)
    np.testing.assert_array_equal([np.asarray(leaf) for leaf in first], before)


def test_a_deleted_array_is_named_in_a_tree_that_has_been_seen():
    jax = pytest.importorskip("jax")
    tree = [jax.numpy.full(256, float(i)) for i in range(3)]
    funcavg.average(tree, Echo())
    tree[1].delete()
    with pytest.raises(TypeError, match=r"\[1\] is a JAX array float32\[256\] whose memory has been deleted"):
        run_ranks(2, lambda group: funcavg.average(tree, group))

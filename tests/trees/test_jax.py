"""JAX leaves, outside of transformations: over every group, alone and beside other frameworks."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.frameworks import torch
from helpers.processes import run_processes

from funcavg import TreeMismatchError, average, should_average, start_average
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

jax = pytest.importorskip("jax")
jnp = jax.numpy
STEPS = [5, 9, 13]


def test_the_predicate_of_a_cond():
    at = jax.jit(lambda step: jax.lax.cond(should_average(step, warmup=5, period=4), lambda: True, lambda: False))
    assert [step for step in range(16) if at(step)] == STEPS


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_arrays_give_arrays(dtype):
    found = [step for step in range(16) if should_average(jax.numpy.asarray(step, dtype), warmup=5, period=4)]
    assert found == STEPS
    assert isinstance(should_average(jax.numpy.int32(5), warmup=5, period=4), jax.Array)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_other_arrays_are_refused(dtype):
    with pytest.raises(TypeError, match=f"step must be an integer, got a JAX value of dtype {dtype}"):
        should_average(jax.numpy.ones((), dtype), warmup=5, period=4)


DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "complex64"]


def leaves_of(rank):
    rng = np.random.default_rng(rank)
    tree = {name: jnp.asarray(rng.integers(-8, 8, (3, 5)), name) for name in DTYPES}
    tree["scalar"] = jnp.float32(rank)
    tree["empty"] = jnp.zeros((0, 3))
    tree["large"] = jnp.asarray(rng.normal(size=1_300_001), jnp.float32)
    return tree


def wanted(name, size):
    values = [np.asarray(leaves_of(rank)[name]) for rank in range(size)]
    broad = np.complex128 if values[0].dtype.kind == "c" else np.float64
    mean = sum(value.astype(broad) for value in values) / size
    return mean.astype(values[0].dtype if values[0].dtype.kind != "V" else np.float32).astype(values[0].dtype)


def check(result, size):
    for name, leaf in result.items():
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == leaves_of(0)[name].dtype
        assert np.asarray(leaf).tobytes() == wanted(name, size).tobytes(), name


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_over_threads(size, donate):
    def fn(group):
        tree = leaves_of(group.rank)
        before = {name: np.array(leaf) for name, leaf in tree.items()}
        check(average(tree, group, donate=donate), size)
        check(start_average(tree, group, donate=donate).wait(), size)
        for name, leaf in tree.items():  # immutable, donated or not
            assert np.asarray(leaf).tobytes() == before[name].tobytes()

    run_ranks(size, fn)


def over_gloo(rank, node):
    os.environ["FUNCAVG_NODE"] = node
    for _ in range(2):
        check(average(leaves_of(rank), timeout=30), 2)


@pytest.mark.parametrize("node", ["one", "off"])
def test_over_gloo(node):
    run_processes(2, over_gloo, node)


def test_one_job_in_three_frameworks():
    """The same bits for all, each in its own type; between them the digest knows no difference."""
    rng = [np.random.default_rng(rank) for rank in range(3)]
    values = [{"a": r.normal(size=(4, 3)).astype("f4"), "b": [r.normal(size=7).astype("f2")]} for r in rng]
    make = [torch.from_numpy, jnp.asarray, lambda array: array]
    kinds = [torch.Tensor, jax.Array, np.ndarray]

    def fn(group):
        own = make[group.rank]
        tree = {"a": own(values[group.rank]["a"]), "b": [own(values[group.rank]["b"][0])]}
        result = average(tree, group, weight=1 + group.rank)
        assert all(isinstance(leaf, kinds[group.rank]) for leaf in (result["a"], *result["b"]))
        return np.asarray(result["a"]).tobytes(), np.asarray(result["b"][0]).tobytes()

    first, *others = run_ranks(3, fn)
    assert others == [first] * 2
    exact = sum((1 + rank) * values[rank]["a"].astype("f8") for rank in range(3)) / 6
    assert np.allclose(np.frombuffer(first[0], "f4").reshape(4, 3), exact, rtol=1e-7)


def test_mixed_leaves_in_one_tree():
    def fn(group):
        value = np.full(3, float(group.rank), np.float32)
        tree = [value.copy(), torch.from_numpy(value.copy()), jnp.asarray(value), float(group.rank)]
        result = average(tree, group, donate=True)
        assert result[0] is tree[0]
        assert result[1] is tree[1]
        return [np.asarray(leaf).tolist() for leaf in result]

    assert run_ranks(2, fn) == [[[0.5] * 3, [0.5] * 3, [0.5] * 3, 0.5]] * 2


def test_what_passes_through():
    def fn(group):
        tree = {"key": jax.random.key(group.rank), "int": jnp.arange(3), "bool": jnp.ones(2, bool), "none": None}
        result = average(tree, group)
        return all(result[name] is tree[name] for name in tree)

    assert run_ranks(2, fn) == [True, True]


def test_kinds_are_kept():
    """Device, sharding, weak type, and whether it is committed to its device."""
    (device,) = jax.devices()[:1]
    leaves = [
        jnp.ones(3),
        jnp.asarray(1.0),
        jax.device_put(jnp.ones(3), device),
        jax.device_put(jnp.ones(3), jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",)), jax.P("x"))),
    ]
    assert {leaf.weak_type for leaf in leaves} == {leaf.committed for leaf in leaves} == {True, False}
    for leaf, result in zip(leaves, average(leaves, Solo()), strict=True):
        assert result is not leaf
        assert result.unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
        assert (result.weak_type, result.committed) == (leaf.weak_type, leaf.committed)
        assert result.sharding == leaf.sharding


def test_sharded_over_several_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from funcavg import average
from funcavg.testing import run_ranks
mesh = jax.make_mesh((2,), ("x",))
def fn(group):
    leaf = jax.device_put(jnp.arange(8.0) + group.rank, jax.sharding.NamedSharding(mesh, jax.P("x")))
    result = average(leaf, group)
    assert result.sharding == leaf.sharding and len(result.addressable_shards) == 2
    return np.asarray(result).tolist()
assert run_ranks(2, fn) == [[i + 0.5 for i in range(8)]] * 2
"""
    environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environ, timeout=100)


def test_ties():
    leaf = jnp.ones(3)
    for donate in (False, True):
        one, other, apart = average([leaf, leaf, jnp.ones(3)], Solo(), donate=donate)
        assert one is other
        assert one is not apart


def test_nothing_is_copied_on_the_way_in_or_out():
    from funcavg._trees.arrays.jax import JaxArrays

    family, leaf = JaxArrays(), jnp.arange(1000.0)
    assert family.carrier(leaf).ctypes.data == leaf.unsafe_buffer_pointer()
    carrier = family.fresh(leaf)
    assert family.finish(leaf, carrier).unsafe_buffer_pointer() == carrier.ctypes.data


@pytest.mark.parametrize("victim", [0, 1])
def test_a_deleted_array_is_named_on_every_rank(victim):
    def fn(group):
        leaf = jnp.ones(3)
        average([leaf], group)
        if group.rank == victim:
            leaf.delete()
        with pytest.raises(TypeError, match=rf"rank {victim}: .*params_tree\[0\] is a JAX array .* been deleted"):
            average([leaf], group)
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_a_mismatch_is_named():
    def fn(group):
        with pytest.raises(TreeMismatchError, match=r"params_tree\['w'\]:  rank 0 float32\[3\],  rank 1 bfloat16\[3\]"):
            average({"w": jnp.ones(3, [jnp.float32, jnp.bfloat16][group.rank])}, group)

    run_ranks(2, fn)


def test_an_array_of_several_processes(monkeypatch):
    monkeypatch.setattr(type(jnp.ones(3)), "is_fully_addressable", property(lambda self: False))
    with pytest.raises(TypeError, match=r"lies partly in other processes.*by an axis name inside shard_map"):
        average({"w": jnp.ones((3, 1, 41))}, Solo())  # of a shape that nobody has described yet


def test_containers_that_only_jax_can_walk():
    equinox, optax = pytest.importorskip("equinox"), pytest.importorskip("optax")
    struct = pytest.importorskip("flax.struct")

    @struct.dataclass
    class State:
        params: dict
        name: str = struct.field(pytree_node=False, default="state")

    def fn(group):
        layer = equinox.nn.Linear(2, 3, key=jax.random.key(group.rank))
        optimizer = optax.adam(1e-3).init({"w": jnp.full(3, float(group.rank))})
        tree = {"layer": layer, "state": State({"b": jnp.full(2, float(group.rank))}), "optimizer": optimizer}
        result = average(tree, group)
        assert type(result["layer"]) is equinox.nn.Linear
        assert result["layer"].in_features == 2
        assert result["state"].name == "state"
        seen = []
        average(tree, group, where=lambda path: seen.append(path) or True)
        assert {("layer", "weight"), ("state", "params", "b"), ("optimizer", 0, 1, "w")} <= set(seen)
        return np.asarray(result["layer"].weight), result["state"].params["b"].tolist()

    (one, half), (other, _) = run_ranks(2, fn)
    assert half == [0.5, 0.5]
    assert one.tobytes() == other.tobytes()
    separate = [equinox.nn.Linear(2, 3, key=jax.random.key(rank)).weight for rank in range(2)]
    assert np.allclose(one, (separate[0] + separate[1]) / 2)


def test_their_leaves_are_named_in_errors():
    equinox = pytest.importorskip("equinox")

    def fn(group):
        layer = equinox.nn.Linear(2, 3 + group.rank, key=jax.random.key(0))
        with pytest.raises(TreeMismatchError, match=r"params_tree\['layer'\]\.weight:  rank 0 float32\[3, 2\]"):
            average({"layer": layer}, group)

    run_ranks(2, fn)

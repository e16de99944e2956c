"""Streaming DiLoCo of odd leaves: narrow, tied, sharded, with NaN, and of replicas in one process."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.averaging import FRAMEWORKS, RATE, STARTS, TARGETS, Streaming
from helpers.frameworks import jax, jnp, skip_without, torch
from test_streaming import nothing_is_left  # noqa: F401  # for every test of this module, too

from funcavg import outer, stacked, streaming_diloco
from funcavg.averagers import _cutting
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

NARROW = {
    "numpy": lambda rows: np.array(rows, ml_dtypes.bfloat16),
    "torch": lambda rows: torch.tensor(rows, dtype=torch.bfloat16),
    "jax": lambda rows: jnp.array(rows, jnp.bfloat16),
}


@pytest.mark.parametrize("framework", NARROW)
@pytest.mark.parametrize("mix", [0.3, 0.7])
def test_of_16_bits_mixing_rounds_once(framework, mix):
    draw = np.random.default_rng(3)
    start, step = (draw.normal(size=200).astype(ml_dtypes.bfloat16) for _ in range(2))
    averager = streaming_diloco(1, fragments=1, mix=mix, outer=outer.sgd(0.5), group=Solo())
    params = NARROW[framework](start.astype(np.float32).tolist())
    own = NARROW[framework]((start + step).astype(np.float32).tolist())
    result, state = averager.update(own, averager.init(params))
    anchor = np.asarray(state.anchor[0].float() if framework == "torch" else state.anchor[0], np.float32)
    theta, weight = (start + step).astype(np.float32), np.float32(mix)
    wanted = anchor + weight * (theta - anchor) if mix <= 0.5 else theta + (1 - weight) * (anchor - theta)
    found = np.asarray(result.float() if framework == "torch" else result, np.float32)
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("delay", [0, 1])
def test_a_replica_that_has_diverged_heals_without_mixing_only(framework, delay):
    def fn(group, mix):
        averager = streaming_diloco(2, fragments=1, delay=delay, mix=mix, group=group)
        params = FRAMEWORKS[framework]([1.0, 2.0])
        state = averager.init(params)
        for _ in range(2):
            params = params * float("nan") if group.rank == 1 else params + 1
            params, state = averager.update(params, state, weight=1.0 - group.rank)
        return np.isnan(np.asarray(params)).tolist(), np.isnan(np.asarray(state.anchor[0])).any()

    assert run_ranks(2, lambda group: fn(group, 0.0)) == [([False] * 2, False)] * 2
    assert run_ranks(2, lambda group: fn(group, 0.25)) == [([False] * 2, False), ([True] * 2, False)]


def odd_tree(rank):
    return {
        "array": np.full((4, 2), float(rank), np.float32),
        "empty": np.zeros((0, 3)),
        "float": float(rank),
        "int": 3,
        "kept": np.full(2, float(rank)),
        "none": None,
        "scalar": np.float32(rank),
        "tensor": torch.full((3, 2), float(rank)),
        "zero": np.array(float(rank)),
        "complex": np.full(2, complex(rank, 1)),
    }


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("delay", [0, 1])
def test_inputs_are_not_written_to_nothing_shares_memory_and_what_is_not_of_the_fragment_is_the_same(delay, donate):
    def fn(group):
        averager = streaming_diloco(
            6, fragments=3, delay=delay, outer=outer.sgd(1.0), group=group, where=lambda path: path[0] != "kept"
        )
        params = odd_tree(group.rank)
        state = averager.init(params)
        for step in range(6):
            given, before = dict(params), {name: repr(leaf) for name, leaf in params.items()}
            anchors = [{name: repr(leaf) for name, leaf in anchor.items()} for anchor in state.anchor]
            earlier = state
            params, state = averager.update(params, state, donate=donate)
            assert list(params) == list(given)
            of_fragment = (
                set() if step % 2 == 0 else {n for n, leaf in state.anchor[step // 2].items() if leaf is not None}
            )
            for name, leaf in params.items():
                assert type(leaf) is type(given[name])
                if name not in of_fragment or (donate and name in ("array", "tensor", "zero", "complex", "empty")):
                    assert leaf is given[name]
                else:
                    assert repr(given[name]) == before[name]
                for anchor in state.anchor:
                    if isinstance(leaf, (np.ndarray, torch.Tensor)) and anchor[name] is not None:
                        assert not np.may_share_memory(np.asarray(anchor[name]), np.asarray(leaf))
            assert [{n: repr(leaf) for n, leaf in anchor.items()} for anchor in earlier.anchor] == anchors
        assert [
            np.asarray(params[name]).ravel()[:1].tolist() for name in ("array", "tensor", "float", "scalar", "zero")
        ] == [[0.5]] * 5
        assert params["complex"].tolist() == [0.5 + 1j] * 2
        assert params["kept"].tolist() == [group.rank] * 2

    run_ranks(2, fn)


def test_parameters_that_require_grad():
    def fn(group):
        for delay in (0, 1):
            weight = torch.nn.Parameter(torch.full((2, 2), float(group.rank)))
            averager = streaming_diloco(2, fragments=1, delay=delay, outer=outer.sgd(1.0), mix=0.5, group=group)
            state = averager.init([weight])
            result = [weight]
            for _ in range(2):
                result, state = averager.update(result, state)
            assert type(result[0]) is torch.nn.Parameter
            assert result[0].requires_grad
            assert not any(anchor[0].requires_grad for anchor in state.anchor)
            for _ in range(2):
                again, state = averager.update([weight], state, donate=True)
            assert again[0] is weight

    run_ranks(2, fn)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("tied", [(0,), (0, 1), (1,)])
def test_ties_are_kept_if_all_ranks_have_them_and_never_change_values(tied, delay):
    def fn(group):
        averager = streaming_diloco(4, fragments=2, delay=delay, outer=outer.sgd(0.5), group=group)
        a = torch.full((4, 3), 1.0 + group.rank)
        params = {"a": a, "b": a if group.rank in tied else torch.full((4, 3), 1.0 + group.rank), "c": torch.ones(4, 3)}
        state = averager.init(params)
        for step in range(8):
            params, state = averager.update(params, state)
            if step == 7:
                for name in "ab":
                    whole = torch.cat([anchor[name] for anchor in state.anchor if anchor[name] is not None])
                    assert torch.equal(params[name], whole)
        assert (params["a"] is params["b"]) == (tied == (0, 1))
        if len(tied) == 1 and group.rank in tied:
            for step in range(2):
                params = {**params, "b": params["a"]}
                if step < 1:
                    params, state = averager.update(params, state)
                elif delay:
                    with pytest.raises(ValueError, match="tied leaves"):
                        averager.update(params, state, donate=True)
        elif len(tied) == 1:
            for _ in range(2 if delay else 1):
                params, state = averager.update(params, state)
        return [params[name].tolist() for name in "ab"]

    one, other = run_ranks(2, fn)
    if tied == (0, 1):
        assert one == other


@pytest.mark.parametrize("array", [np.zeros, torch.zeros, jnp.zeros])
def test_anchors_keep_no_more_memory_than_their_rows(array):
    state = streaming_diloco(4, fragments=4, group=Solo()).init({"w": array((400, 25))})
    for anchor in state.anchor:
        leaf = anchor["w"]
        held = leaf.untyped_storage().nbytes() if hasattr(leaf, "untyped_storage") else leaf.nbytes
        assert held == leaf.nbytes == 100 * 25 * leaf.dtype.itemsize
        assert getattr(leaf, "base", None) is None


def test_ties_that_end_are_no_other_tree():
    """As those of functional steps do: every leaf that comes out is new."""

    def fn(group):
        averager = streaming_diloco(4, fragments=2, delay=1, group=group)
        a = np.ones((4, 3))
        params = {"a": a, "b": a, "c": np.ones((4, 3))}
        state = averager.init(params)
        for _ in range(8):
            params = {name: leaf - 0.1 * (1 + group.rank) for name, leaf in params.items()}
            params, state = averager.update(params, state)
        return params["a"].tobytes(), params["b"].tobytes()

    (one, other), _ = run_ranks(2, fn)
    assert one == other


# Replicas in one process.


@pytest.mark.parametrize("weights", [None, [1.0, 2.5]])
@pytest.mark.parametrize(
    "settings", [Streaming(6, 2, delay=2, mix=0.25, warmup=2), Streaming(4, 2), Streaming(3, 1, delay=1, mix=0.75)]
)
def test_over_an_axis_and_over_stacked_replicas(settings, weights):
    def step(averager, params, state, target, weight):
        theta = params["theta"] - RATE * (params["theta"] - target)
        return averager.update({"theta": theta}, state, weight=weight)

    def by_threads(group):
        averager, target = settings.averager(group), TARGETS[group.rank].reshape(4, 1)
        params, path = {"theta": STARTS[group.rank].reshape(4, 1)}, []
        state = averager.init(params)
        for _ in range(14):
            weight = None if weights is None else weights[group.rank]
            params, state = step(averager, params, state, target, weight)
            path.append(params["theta"])
        return np.stack(path)

    threads = np.stack(run_ranks(2, by_threads))
    starts, targets = (np.stack(rows[:2]).reshape(2, 4, 1) for rows in (STARTS, TARGETS))

    for own, group in ((np.array, stacked()), (torch.tensor, stacked())):
        averager, params, path = settings.averager(group), {"theta": own(starts)}, []
        state = averager.init(params)
        for _ in range(14):
            params, state = step(averager, params, state, own(targets), weights)
            path.append(np.asarray(params["theta"]).copy())
        np.testing.assert_array_equal(np.stack(path, 1), threads)

    def scanned(averager, params, target, weight):
        def body(carry, _):
            carry = step(averager, *carry, target, weight)
            return carry, carry[0]["theta"]

        return jax.lax.scan(body, (params, averager.init(params)), length=14)[1]

    with jax.enable_x64(True):
        first, aims = {"theta": jnp.asarray(starts)}, jnp.asarray(targets)
        given = None if weights is None else jnp.asarray(weights)
        together = jax.jit(lambda p, t: scanned(settings.averager(stacked()), p, t, weights))(first, aims)
        np.testing.assert_allclose(jnp.moveaxis(together, 1, 0), threads, rtol=1e-12)
        averager = settings.averager("replica")
        axes = (0, 0, None if weights is None else 0)
        mapped = jax.vmap(lambda p, t, w: scanned(averager, p, t, w), axes, axis_name="replica")
        np.testing.assert_allclose(jax.jit(mapped)(first, aims, given), threads, rtol=1e-12)


def test_leaves_of_several_kinds_in_a_program():
    def fn(group):
        params = {"w": jnp.full((4, 2), float(group.rank)), "rate": 1.0 + group.rank, "n": np.ones(3, np.float32)}
        averager = streaming_diloco(4, fragments=2, delay=1, outer=outer.sgd(1.0), group=group)
        found = []
        for step in (averager.update, jax.jit(averager.update)):
            now, state = params, averager.init(params)
            for _ in range(8):
                now, state = step(jax.tree.map(lambda leaf: leaf + 1, now), state)
            found.append([float(np.asarray(leaf).ravel()[0]) for leaf in jax.tree.leaves(now)])
        assert found[0] == pytest.approx(found[1], rel=1e-6)
        return found[0]

    one, other = run_ranks(2, fn)
    assert one == other


SHARDED = """
import contextlib
import jax, jax.numpy as jnp, numpy as np
import funcavg
from funcavg.testing import run_ranks
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

def fn(group, place, context, delay):
    with context():
        fragments = [lambda path: path[0] == "w", lambda path: True]
        averager = funcavg.streaming_diloco(4, fragments=fragments, delay=delay, mix=0.5, group=group)
        params = {"w": place(jnp.arange(32.0).reshape(8, 4)), "b": jnp.ones(3)}
        state = averager.init(params)
        for _ in range(9):
            params = jax.tree.map(lambda leaf: leaf - 1 - group.rank, params)
            params, state = averager.update(params, state)
        kept = params["w"].sharding, state.anchor[0]["w"].sharding
        return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(params)], kept

for delay in (0, 1):
    plain = run_ranks(2, lambda group: fn(group, lambda leaf: leaf, contextlib.nullcontext, delay))
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,))
        for spec in (P("x", None), P(None, "x"), P(None, None)):
            for context in (contextlib.nullcontext, lambda: jax.set_mesh(mesh)):
                sharding = NamedSharding(mesh, spec)
                place = lambda leaf: jax.device_put(leaf, sharding)
                placed = run_ranks(2, lambda group: fn(group, place, context, delay))
                for (found, kept), (wanted, _) in zip(placed, plain):
                    np.testing.assert_array_equal(found[0], wanted[0])
                    np.testing.assert_array_equal(found[1], wanted[1])
                    assert all(one.is_equivalent_to(sharding, 2) for one in kept), (kept, sharding)
"""


def test_arrays_of_jax_that_are_sharded():
    """By types that say so, too ("explicit"), of which reshapes and cuts are refused; here whole leaves."""
    skip_without("jax")
    environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", SHARDED], check=True, env=environ, timeout=100)


@pytest.mark.parametrize("count", [1, 40])
def test_idle_updates_do_not_read_the_anchors_again(monkeypatch, count):
    looked = []
    look_up = _cutting.Cutter._looked_up
    monkeypatch.setattr(_cutting.Cutter, "_looked_up", lambda *given: looked.append(1) or look_up(*given))
    params = {f"layer{k}": np.zeros(2) for k in range(60)}
    averager = streaming_diloco(80, fragments=count, delay=1, group=Solo())
    state = averager.init(params)
    for _ in range(50):
        params, state = averager.update(params, state)
    assert len(looked) <= 2

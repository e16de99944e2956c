"""Checks of average over an axis name, in a process of its own with two CPU devices and JAX's strict rules."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from funcavg import average, broadcast, should_average, start_average, streaming_diloco
from funcavg.collectives import Solo

P = jax.P
MESH = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
ROWS = jnp.array([[0.0, 1.0, 5.0], [2.0, 3.0, -1.0]])  # a row for each rank
MEAN = np.mean(np.asarray(ROWS), 0)


def under_shard_map(fn):
    return jax.shard_map(fn, mesh=MESH, in_specs=P("d"), out_specs=P("d"))


def under_old_shard_map(fn):
    return jax.shard_map(fn, mesh=MESH, in_specs=P("d"), out_specs=P("d"), check_vma=False)


def under_jit(fn):
    return jax.jit(under_shard_map(fn))


def under_pmap(fn):
    return jax.pmap(lambda row: fn(row[None])[0], axis_name="d")


def under_vmap(fn):
    return jax.vmap(lambda row: fn(row[None])[0], axis_name="d")


WAYS = [under_shard_map, under_old_shard_map, under_jit, under_pmap, under_vmap]


def plain(x):
    tree = {"x": x, "key": jax.random.key(3), "n": jnp.int32(7), "none": None, "float": 2.5}
    result = average(tree, "d")
    assert result["n"] is tree["n"]
    assert result["key"] is tree["key"]
    assert result["float"] == 2.5
    return result["x"]


def weighted(x):
    return average(x, "d", weight=lax.axis_index("d").astype(jnp.float32) * 3 + 1)


def only_the_second(x):
    return average(x, "d", weight=lax.axis_index("d").astype(jnp.float32))


def loss(fn):
    return lambda rows: (fn(rows) ** 2).sum()


def check(way):
    np.testing.assert_allclose(way(plain)(ROWS), [MEAN, MEAN], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(loss(way(plain)))(ROWS), [2 * MEAN, 2 * MEAN], rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(way(plain), (ROWS,), (ROWS,))[1], [MEAN, MEAN], rtol=1e-6)
    heavy = np.average(np.asarray(ROWS), 0, [1, 4])
    np.testing.assert_allclose(way(weighted)(ROWS), [heavy, heavy], rtol=1e-6)
    wanted = np.outer([1 / 5, 4 / 5], 2 * 2 * heavy)  # (w_i / sum w) times the sum of both ranks' cotangents
    np.testing.assert_allclose(jax.grad(loss(way(weighted)))(ROWS), wanted, rtol=1e-6)
    bad = ROWS.at[0].set(jnp.nan)
    np.testing.assert_allclose(way(only_the_second)(bad), [ROWS[1], ROWS[1]])
    np.testing.assert_allclose(jax.grad(loss(way(only_the_second)))(bad), [0 * ROWS[1], 4 * ROWS[1]])
    narrow = jnp.asarray([[256.0, 1.0], [2.0, 1.0]], jnp.bfloat16)  # 256 + 2 is no bfloat16
    result = way(lambda x: average(x, "d"))(narrow)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.astype(jnp.float32), [[129.0, 1.0]] * 2)
    np.testing.assert_allclose(jax.grad(loss(way(jax.checkpoint(plain))))(ROWS), [2 * MEAN, 2 * MEAN], rtol=1e-6)

    def steps(x):
        def step(x, number):
            x = lax.cond(should_average(number, warmup=2, period=3), plain, lambda x: x, x * jnp.float32(1.5))
            return x, None

        return lax.scan(step, x, jnp.arange(7))[0]

    factor = 1.5**7
    np.testing.assert_allclose(way(steps)(ROWS), factor * np.array([MEAN, MEAN]), rtol=1e-5)


def from_the_second(x):
    tree = {"x": x, "key": jax.random.key(lax.axis_index("d")), "n": lax.axis_index("d"), "half": x.astype("bfloat16")}
    result = broadcast(tree, "d", root=1)
    assert jax.typeof(result["x"]) == jax.typeof(x)
    others = result["n"], jax.random.bits(result["key"]) % 7, result["half"] * 0
    return result["x"] + sum(other.astype(x.dtype) for other in others)


for way in WAYS:
    check(way)
    wanted = ROWS[1] + 1 + int(jax.random.bits(jax.random.key(1)) % 7)
    np.testing.assert_array_equal(way(from_the_second)(ROWS), [wanted, wanted])

# A mesh whose axes are in the types of arrays, which is what jax.make_mesh makes of late.
EXPLICIT = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))


def under_explicit_axes(fn):
    mapped = jax.shard_map(fn, in_specs=P("d"), out_specs=P("d"))
    return lambda rows: jax.sharding.reshard(mapped(jax.sharding.reshard(rows, P("d"))), P())


with jax.set_mesh(EXPLICIT):
    check(under_explicit_axes)

MESH_2D = jax.make_mesh((1, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
both = jax.shard_map(lambda x: average(x, ("a", "b")), mesh=MESH_2D, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
np.testing.assert_allclose(both(ROWS), [MEAN, MEAN])
replicated = jax.shard_map(lambda x: average(x, "d"), mesh=MESH, in_specs=P(), out_specs=P())
np.testing.assert_array_equal(replicated(ROWS), ROWS)

# An averager whose state is of one kind at every step, whatever is under way.
averager = streaming_diloco(3, fragments=1, delay=1, mix=0.25, group="d")


def training(row):
    def step(carry, _):
        params, state = averager.update(0.5 * carry[0] + 1, carry[1])
        return (params, state), params

    return lax.scan(step, (row, averager.init(row)), length=7)[1]


wanted = jax.jit(jax.vmap(training, axis_name="d"))(ROWS)
np.testing.assert_allclose(under_jit(lambda rows: training(rows[0])[None])(ROWS), wanted, rtol=1e-6)

# A group of processes, in a program for both devices: it is called once, with whole arrays.
whole = jax.device_put(ROWS, jax.sharding.NamedSharding(MESH, P("d")))
halves = jax.jit(lambda x: average({"x": x, "sum": x.sum()}, Solo()))(whole)
np.testing.assert_array_equal(halves["x"], ROWS)
assert float(halves["sum"]) == float(ROWS.sum())
slope = jax.jit(jax.grad(lambda x: (average(x, Solo()) ** 2).sum()))(whole)
np.testing.assert_allclose(slope, 2 * ROWS)
explicit = jax.device_put(ROWS, jax.sharding.NamedSharding(EXPLICIT, P("d")))
for averaged in (average(explicit, Solo()), jax.jit(lambda x: average(x, Solo()))(explicit)):
    np.testing.assert_array_equal(averaged, ROWS)
    assert jax.typeof(averaged) == jax.typeof(explicit)

for attempt, kind, words in (
    (lambda: average(ROWS, "d"), ValueError, "no such axis is bound here"),
    (lambda: start_average(ROWS, "d"), RuntimeError, "use average"),
    (lambda: under_vmap(lambda x: average({"x": x, "s": "text"}, "d")["x"])(ROWS), TypeError, "params_tree['s']"),
    (lambda: under_vmap(lambda x: average(x, "d", weight=-1.0))(ROWS), ValueError, "at least 0"),
):
    with pytest.raises(kind, match=re.escape(words)):
        attempt()

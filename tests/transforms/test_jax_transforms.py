"""average inside jit, grad, jvp, vmap, scan, cond, checkpoint and their compositions: over axes and over groups."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import torch
from helpers.processes import run_processes

from funcavg import PeerLostError, TreeMismatchError, average, should_average, start_average
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

jax = pytest.importorskip("jax")
jnp = jax.numpy
STRICT = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise", "OMP_NUM_THREADS": "1"}
TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def test_over_an_axis():
    """In a process of its own, whose JAX has two devices."""
    script = Path(__file__).with_name("jax_axis.py")
    environ = os.environ | STRICT | TWO_DEVICES | {"PYTHONPATH": str(mpi.ROOT)}
    subprocess.run([sys.executable, str(script)], check=True, env=environ, timeout=110)


DISTRIBUTED = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, address = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(address, 2, rank)
import jax.numpy as jnp, numpy as np
from funcavg import average
mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
sharding = jax.sharding.NamedSharding(mesh, jax.P("d"))
whole = jax.make_array_from_process_local_data(sharding, np.full((1, 3), float(rank), np.float32), (2, 3))
mean = lambda x: average({"w": x}, "d")["w"]
step = jax.jit(jax.shard_map(mean, mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d")))
(mine,) = step(whole).addressable_shards
assert np.asarray(mine.data).tolist() == [[0.5] * 3]
try:
    average({"w": whole})
except RuntimeError as error:
    assert "jax.distributed runs 2 processes" in str(error)
try:
    average({"w": whole}, __import__("funcavg").collectives.Solo())
except TypeError as error:
    assert "params_tree['w'] is a JAX array float32[2, 3] that lies partly in other processes" in str(error), error
else:
    raise SystemExit("an array of two processes was averaged by one")
try:
    jax.jit(lambda x: average(x, __import__("funcavg").collectives.Solo()))(whole)
except ValueError as error:
    assert "of these only one might call it" in str(error), error
else:
    raise SystemExit("a program of two processes averaged over the group of one")
"""


def test_over_an_axis_of_two_processes():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environ = os.environ | {"PYTHONPATH": str(mpi.ROOT), "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
    ranks = [subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), address], env=environ) for rank in (0, 1)]
    assert [rank.wait(100) for rank in ranks] == [0, 0]


def everything(group, rank, size):
    """Return what each composition gives, and what it should."""
    weights = np.arange(1.0, size + 1)
    rows = np.arange(3.0) + np.arange(size)[:, None]
    x, mean, heavy = jnp.asarray(rows[rank], jnp.float32), rows.mean(0), np.average(rows, 0, weights)
    share = weights[rank] / weights.sum()

    def plain(x):
        return average({"x": x, "n": jnp.int32(2), "key": jax.random.key(0)}, group, timeout=30)["x"]

    def weighted(x):
        return average(x, group, weight=float(weights[rank]), timeout=30)

    def loss(fn, power=2):
        return lambda x: (fn(x) ** power).sum()

    def unused(x):
        plain(x)
        return x

    def steps(x):
        def step(x, number):
            return jax.lax.cond(should_average(number, warmup=2, period=3), plain, lambda x: x, x) + 1.0, None

        return jax.lax.scan(step, x, jnp.arange(8))[0]

    pair = jnp.stack([x, x + 1])
    yield "jit", jax.jit(plain)(x), mean
    yield "jit, weighted", jax.jit(weighted)(x), heavy
    traced = jax.jit(lambda x, w: average(x, group, weight=w, timeout=30))(x, jnp.float32(weights[rank]))
    yield "jit, with a traced weight", traced, heavy
    yield "grad", jax.grad(loss(plain))(x), 2 * mean
    yield "jit of grad", jax.jit(jax.grad(loss(plain)))(x), 2 * mean
    yield "grad of jit", jax.grad(jax.jit(loss(plain)))(x), 2 * mean
    yield "grad, weighted", jax.grad(loss(weighted))(x), 2 * size * share * heavy
    yield "value and grad", jax.jit(jax.value_and_grad(loss(weighted)))(x)[1], 2 * size * share * heavy
    yield "vjp", jax.vjp(weighted, x)[1](x)[0], share * rows.sum(0)
    yield "jvp", jax.jvp(weighted, (x,), (x,))[1], heavy
    yield "hessian", jax.jit(jax.hessian(loss(weighted, 3)))(x), np.diag(6 * size * share * heavy)
    yield "vmap", jax.vmap(plain)(pair), [mean, mean + 1]
    yield "vmap along the last dimension", jax.vmap(plain, in_axes=1, out_axes=1)(pair.T), np.array([mean, mean + 1]).T
    yield "vmap of grad", jax.jit(jax.vmap(jax.grad(loss(plain))))(pair), [2 * mean, 2 * mean + 2]
    yield "grad of vmap", jax.grad(loss(jax.vmap(plain)))(pair), [2 * mean, 2 * mean + 2]
    yield "checkpoint", jax.jit(jax.grad(loss(jax.checkpoint(plain))))(x), 2 * mean
    yield "scan and cond", jax.jit(steps)(x), mean + 8
    yield "grad of scan", jax.grad(loss(steps))(x), 2 * (mean + 8)
    yield "not used", jax.jit(unused)(x), rows[rank]
    with jax.disable_jit():
        yield "without jit", jax.jit(plain)(x), mean
    yield "donated", jax.jit(plain, donate_argnums=0)(x + 0), mean
    yield "eager", average(x, group, timeout=30), mean


def check(group, rank, size):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):  # of the thread
        for name, got, wanted in everything(group, rank, size):
            np.testing.assert_allclose(got, wanted, rtol=2e-5, err_msg=name)
    return True


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("size", [1, 2, 3])
def test_over_threads(size):
    assert run_ranks(size, lambda group: check(group, group.rank, size), timeout=100) == [True] * size


def over_gloo(rank):
    os.environ.update(TWO_DEVICES)
    assert jax.device_count() == 2
    return check(None, rank, 2)


def test_over_gloo():
    assert run_processes(2, over_gloo, timeout=100) == [True] * 2


def over_mpi(comm):
    assert jax.device_count() == 2
    return check(comm, comm.rank, comm.size)


@pytest.mark.mpi
@pytest.mark.parametrize("size", [2, 3])
def test_over_mpi(size):
    assert mpi.run_mpi(size, over_mpi, timeout=100, **STRICT, **TWO_DEVICES) == [True] * size


def test_derivatives_are_those_of_finite_differences():
    """The loss is the sum over ranks; each rank's parameters are moved in turn, and all ranks take the derivative."""

    def fn(group):
        x = jnp.asarray(np.random.default_rng(group.rank).normal(size=4), jnp.float32)

        def loss(x):
            return (average(x, group, weight=1.0 + group.rank) ** 3).sum()

        grad, found = jax.grad(loss)(x), []
        for rank in range(group.size):
            for i in range(4):
                shift = jnp.zeros(4).at[i].set(1e-2 if rank == group.rank else 0.0)
                difference = float(loss(x + shift) - loss(x - shift)) / 2e-2
                total = group.size * average(difference, group)
                if rank == group.rank:
                    found.append(total)
        np.testing.assert_allclose(grad, found, rtol=2e-2, atol=2e-3)

    run_ranks(2, fn, timeout=100)


def test_a_thousand_steps_are_those_of_the_eager_loop():
    def fn(group):
        x = jnp.asarray(np.random.default_rng(group.rank).normal(size=3), jnp.float32)
        drift = jnp.float32(1 + group.rank) / 64

        def step(x, number):
            at = should_average(number, warmup=100, period=4)
            return jax.lax.cond(at, lambda x: average(x, group), lambda x: x, x + drift), at

        compiled, fired = jax.jit(lambda x: jax.lax.scan(step, x, jnp.arange(1000)))(x)
        eager, count = x, 0
        for number in range(1000):
            eager = eager + drift
            if should_average(number, warmup=100, period=4):
                eager, count = average(eager, group), count + 1
        assert count == int(fired.sum()) == 225
        return np.asarray(compiled).tobytes() == np.asarray(eager).tobytes()

    assert run_ranks(2, fn, timeout=100) == [True] * 2


def test_failures_are_ours_in_compiled_programs_too():
    def fn(group):
        step = jax.jit(lambda x: average({"w": x}, group, timeout=1))
        with pytest.raises(TreeMismatchError, match=r"params_tree\['w'\]:  rank 0 float32\[3\],  rank 1 float32\[4\]"):
            step(jnp.ones(3 + group.rank))
        assert step(jnp.full(2, float(group.rank)))["w"].tolist() == [0.5, 0.5]
        negative = jax.jit(lambda x, w: average(x, group, weight=w))
        with pytest.raises(ValueError, match="rank 1: weight must be finite and at least 0, got -1.0"):
            negative(jnp.ones(2), jnp.float32([1, -1][group.rank]))
        with pytest.raises(ValueError, match="rank 0: weight must be finite and at least 0, got nan"):
            negative(jnp.ones(2), jnp.float32(jnp.nan))
        with pytest.raises(TypeError, match=r"rank 0: .*params_tree\['s'\] is a str"):
            jax.jit(lambda x: average({"x": x, "s": "text"} if group.rank == 0 else {"x": x}, group))(jnp.ones(2))
        if group.rank == 0:
            with pytest.raises(PeerLostError, match="waits for rank 1, which has returned"):
                step(jnp.ones(2))
            with pytest.raises(PeerLostError, match="this group is spent"):
                step(jnp.ones(2))

    run_ranks(2, fn, timeout=60)


def test_what_is_refused():
    group = Solo()
    with pytest.raises(RuntimeError, match="start_average: not inside JAX's transformations"):
        jax.jit(lambda x: start_average(x, group).wait())(jnp.ones(3))
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(lambda x: average(x, group), mesh=mesh, in_specs=jax.P("d"), out_specs=jax.P("d"))
    for fn in (mapped, jax.jit(mapped), jax.pmap(lambda x: average(x, group))):
        with pytest.raises(ValueError, match="Pass the axis name there, and average over the group outside"):
            fn(jnp.ones((1, 2)))
    with pytest.raises(ValueError, match="a weight per element of jax.vmap"):
        jax.vmap(lambda x, w: average(x, group, weight=w))(jnp.ones((2, 3)), jnp.ones(2))


def test_other_releases_of_jax(monkeypatch):
    from jax._src import callback

    from funcavg._transforms import jax_private

    monkeypatch.delattr(callback, "emit_python_callback")
    with pytest.raises(RuntimeError, match=r"is tested with JAX 0\.10\.2 to 0\.12, and finds its way in .* no more"):
        jax_private._private()


def slow(x):
    """Return something that JAX is still computing when it hands it over."""
    rows = jnp.full((400, 400), x.sum() * 1e-6 + 1e-3)
    return x + 0 * jax.lax.fori_loop(0, 60, lambda i, a: jnp.tanh(a @ a), rows)[0, 0]


def with_inputs_still_being_computed(comm):
    """One rank's inputs are late: its programs must not be overtaken, fail elsewhere, or call MPI from elsewhere."""
    import threading

    from funcavg import _points

    threads, _points.reached = [], lambda *_: threads.append(threading.current_thread())
    late = jax.jit(slow) if comm.rank == 0 else lambda x: x
    step = jax.jit(lambda x: average(x, comm, timeout=20))  # the first call on the communicator, which duplicates it
    result = step(late(jnp.full(3, float(comm.rank))))
    assert comm.allreduce(comm.rank) == comm.size * (comm.size - 1) // 2
    assert result.tolist() == [(comm.size - 1) / 2] * 3
    pending = step(late(jnp.full(3, 100.0 + comm.rank)))
    leaf = torch.full((3,), float(comm.rank), requires_grad=True)
    assert average(leaf, comm, timeout=20).tolist() == [(comm.size - 1) / 2] * 3
    assert pending.tolist() == [100 + (comm.size - 1) / 2] * 3
    assert set(threads) == {threading.main_thread()}
    ragged = jax.jit(lambda x: average({"w": x}, comm, timeout=20))
    with pytest.raises(TreeMismatchError, match=r"params_tree\['w'\]: "):
        ragged(late(jnp.ones(3 + comm.rank)))
    return average(np.float64(comm.rank), comm, timeout=20).item()


@pytest.mark.mpi
def test_inputs_that_are_still_being_computed():
    assert mpi.run_mpi(2, with_inputs_still_being_computed) == [0.5, 0.5]


def test_more_ranks_than_cores_with_inputs_that_are_late():
    def fn(group):
        step, late = jax.jit(lambda x: average(x, group, timeout=20)), jax.jit(slow)
        return [step(late(jnp.full(2, float(group.rank)))).tolist() for _ in range(2)]

    assert run_ranks(4, fn, timeout=100) == [[[1.5, 1.5]] * 2] * 4


def test_no_leaf_is_kept():
    """Not by what JAX remembers of a derivative either."""
    import gc
    import weakref

    def fn(group):
        x = jnp.full(1000, float(group.rank))
        jax.grad(lambda x: (average(x, group) ** 2).sum())(x)
        jax.jit(lambda x: average(x, group))(x)
        return weakref.ref(x)

    kept = run_ranks(2, fn)
    gc.collect()
    assert [ref() for ref in kept] == [None, None]


def test_one_ranks_mistake_is_everyones_in_compiled_programs_too():
    def fn(group):
        bad = group.rank == 1
        with pytest.raises(TypeError, match=r"rank 1: torch tensors cannot be averaged inside JAX's transformations"):
            jax.jit(lambda x: average({"x": x, "t": torch.ones(2) if bad else np.ones(2)}, group, timeout=20))(
                jnp.ones(2)
            )
        weighted = jax.jit(lambda x, w: average(x, group, weight=w, timeout=20))
        for weight in (jnp.ones(2), jnp.bool_(True)):
            own = weight if bad else jnp.float32(1)
            with pytest.raises(
                TypeError, match=r"rank 1: weight must be a number, at least 0, got (float32\[2\]|bool)"
            ):
                weighted(jnp.ones(2), own)
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_interruptions_and_frames():
    """Ctrl-C stays what it is, and no error holds arrays in memory of XLA's."""
    from funcavg import _points

    def interrupt(*_):
        raise KeyboardInterrupt

    def walk(traceback):
        while traceback is not None:
            yield traceback.tb_frame
            traceback = traceback.tb_next

    def fn(group):
        with pytest.raises(TreeMismatchError) as caught:
            jax.jit(lambda x: average(x, group))(jnp.ones(3 + group.rank))
        assert not any(
            "_transforms/jax.py" in frame.f_code.co_filename and "out" in frame.f_locals for frame in walk(caught.tb)
        )
        return True

    assert run_ranks(2, fn) == [True, True]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_points, "reached", interrupt)

        def stop(group):
            with pytest.raises((KeyboardInterrupt, PeerLostError)) as caught:
                jax.jit(lambda x: average(x, group, timeout=5))(jnp.ones(3))
            return caught.type

        assert KeyboardInterrupt in run_ranks(2, stop)


def test_a_traced_weight_keeps_its_precision():
    def fn(group):
        with jax.enable_x64(True):
            x, weight = jnp.asarray([1.0, 2.0]) * (1 + group.rank), jnp.asarray(0.1 + group.rank)
            compiled = jax.jit(lambda x, w: average(x, group, weight=w))(x, weight)
            return np.asarray(compiled).tobytes() == np.asarray(average(x, group, weight=float(weight))).tobytes()

    assert run_ranks(2, fn) == [True, True]


@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs"])
def test_under_debug_nans_no_average_happens_twice(option):
    """JAX would run a program with a NaN in it again, op by op, and average once more than the other ranks."""
    bad = {"jax_debug_nans": -1.0, "jax_debug_infs": 0.0}[option]  # whose logarithm is NaN, or -inf
    before = getattr(jax.config, option)
    jax.config.update(option, True)

    def fn(group):
        step = jax.jit(lambda p, x: (average(p, group, timeout=20), jnp.log(x)))
        nested = jax.jit(lambda p, x: (step(p, x)[0], jnp.log(x)))
        slope = jax.jit(jax.grad(lambda p, x: average(p, group, timeout=20) * jnp.log(x)))
        seen = []
        for program in (step, nested, slope):
            for i in range(3):
                try:
                    x = bad if (group.rank, i) == (1, 0) else 1
                    result = program(jnp.float32(10 * i + group.rank), jnp.float32(x))
                    seen.append(jnp.asarray(result[0] if isinstance(result, tuple) else result).item())
                except FloatingPointError as error:
                    seen.append(str(error).partition(" in a result of a compiled program that averages")[0])
        return seen

    try:
        one, other = run_ranks(2, fn)
    finally:
        jax.config.update(option, before)
    assert one[:6] == [0.5, 10.5, 20.5] * 2
    assert other[:6] == [option[10:13], 10.5, 20.5] * 2
    assert other[6] in ("nan", "inf")
    assert one[7:] == other[7:] == [0.0, 0.0]


def test_checkify_finds_a_nan_beside_an_average():
    from jax.experimental import checkify

    def fn(group):
        checked = jax.jit(checkify.checkify(lambda p, x: (average(p, group), jnp.log(x)), errors=checkify.nan_checks))
        said = []
        for i in range(2):
            error, (mean, _) = checked(jnp.float32(group.rank), jnp.float32(-1.0 if (group.rank, i) == (1, 0) else 1.0))
            said.append((mean.item(), bool(error.get())))
        return said

    assert run_ranks(2, fn) == [[(0.5, False), (0.5, False)], [(0.5, True), (0.5, False)]]


@pytest.mark.parametrize("option", ["jax_debug_nans", "jax_debug_infs"])
def test_outside_of_programs_debug_nans_looks_at_no_average(option):
    before = getattr(jax.config, option)
    jax.config.update(option, True)
    try:
        diverged = np.array([np.nan, np.inf], np.float32)
        assert str(average(jax.device_put(diverged), Solo()).tolist()) == "[nan, inf]"
        with jax.disable_jit():
            assert run_ranks(2, lambda group: jax.jit(lambda x: average(x, group))(jnp.float32(group.rank)).item()) == [
                0.5,
                0.5,
            ]
    finally:
        jax.config.update(option, before)

"""What JAX users have today: the predicate, also under jit, and a clear word about leaves."""

import pytest

from funcavg import average, should_average
from funcavg.testing import run_ranks

jax = pytest.importorskip("jax")
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


def test_leaves_are_refused_on_every_rank():
    def fn(group):
        tree = {"a": jax.numpy.ones(3) if group.rank == 1 else 1.0}
        with pytest.raises(
            TypeError, match=r"rank 1: .*params_tree\['a'\] is a JAX array of dtype float32 \(JAX leaves"
        ):
            average(tree, group)
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]

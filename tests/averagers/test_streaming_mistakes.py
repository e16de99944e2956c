"""Streaming DiLoCo where its user is wrong: every rank hears of it, and nothing hangs."""

import functools
import re

import numpy as np
import pytest
from helpers.frameworks import jax, jnp
from test_streaming import nothing_is_left  # noqa: F401  # for every test of this module, too

from funcavg import TreeMismatchError, average, streaming_diloco
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


def make(group, delay):
    return streaming_diloco(4, fragments=2, delay=delay, group=group, timeout=20)


BAD = {
    "another tree": (
        {"a": np.zeros(3), "b": np.zeros(2)},
        {},
        "another tree than init: .*float64.2. then, .*float64.3. now",
    ),
    "text": ({"a": "text", "b": np.zeros(2)}, {}, "is a str: 'text'"),
    "weight": (None, {"weight": -1.0}, "weight must be finite and at least 0, got -1.0"),
    "weight of text": (None, {"weight": "1"}, "weight must be a number, at least 0, got '1'"),
    "weight NaN": (None, {"weight": float("nan")}, "weight must be finite"),
}


@pytest.mark.parametrize(("delay", "at"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("name", BAD)
def test_a_mistake_where_a_fragment_is_sent_is_everyones(name, delay, at):
    """Of those that have begun to average in the background, it is raised by the update that would apply it."""
    bad, options, words = BAD[name]

    def fn(group):
        averager, params = make(group, delay), {"a": np.zeros(2), "b": np.zeros(2)}
        state = averager.init(params)
        for _ in range(at):
            params, state = averager.update(params, state)

        def go_on(params, state):
            if group.rank == 1:
                averager.update(bad or params, state, **options)
            params, state = averager.update(params, state)
            assert delay
            averager.update(params, state)

        with pytest.raises((ValueError, TypeError), match=words):
            go_on(params, state)
        return average(float(group.rank), group)

    assert run_ranks(2, fn, timeout=20) == [0.5, 0.5]


@pytest.mark.parametrize("weight", [1e-60, 1e-40, 1e60])
def test_weights_that_are_no_float32_are_refused_where_they_are_kept(weight):
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    averager = make(Solo(), 1)
    with pytest.raises(ValueError, match=f"kept as a float32 while .* got {re.escape(repr(weight))}. Only ratios"):
        averager.update(params, averager.init(params), weight=weight)
    if jax:
        with pytest.raises(ValueError, match="Only ratios"):
            jax.jit(functools.partial(averager.update, weight=weight))(params, averager.init(params))
    averager = make(Solo(), 0)
    _, state = averager.update(params, averager.init(params))
    averager.update(params, state, weight=weight)


def test_a_weight_in_a_program_that_is_no_number_is_refused_where_it_is_applied():
    def fn(group):
        averager, params = make(group, 1), {"a": jnp.zeros(2), "b": jnp.zeros(2)}
        step, state = jax.jit(lambda params, state, weight: averager.update(params, state, weight=weight)), None
        state = averager.init(params)
        params, state = step(params, state, jnp.nan)
        with pytest.raises(Exception, match="weight must be finite and at least 0, got -1"):
            jax.block_until_ready(step(params, state, jnp.nan))
        return True

    assert run_ranks(2, fn) == [True] * 2


def updates(averager, params, state, count):
    for _ in range(count):
        params, state = averager.update(params, state)
    return params, state


def read_only(shape):
    array = np.zeros(shape)
    array.flags.writeable = False
    return array


def test_what_cannot_be_donated_is_refused_before_anything_moves():
    """Without a delay on every rank; with one, where nobody waits for anybody, on the rank that applies it."""

    def fn(group, delay):
        averager, params = make(group, delay), {"a": np.ones(2), "b": np.ones(2)}
        state, wrong = averager.init(params), group.rank == 1
        params, state = averager.update(params, state)
        odd = {"a": read_only(2), "b": read_only(2)} if wrong else params
        if wrong or not delay:
            with pytest.raises(ValueError, match=r"\['a'\] is a read-only NumPy array"):
                averager.update(odd, state, donate=True)
        if delay:
            averager.update(params, state, donate=True)  # it is still there
        return average(float(group.rank), group)

    for delay in (0, 1):
        assert run_ranks(2, lambda group, d=delay: fn(group, d), timeout=20) == [0.5, 0.5]


def test_a_mistake_where_a_fragment_is_applied_can_be_mended():
    """It is raised on its rank alone, which can go on with the right tree: nobody waits for anybody there."""

    def fn(group):
        averager, params = make(group, 1), {"a": np.ones(2), "b": np.ones(2)}
        state = averager.init(params)
        params, state = averager.update({name: leaf + group.rank for name, leaf in params.items()}, state)
        if group.rank == 1:
            for bad in ({"a": np.zeros(3), "b": np.zeros(2)}, {"a": "text", "b": np.zeros(2)}):
                with pytest.raises((ValueError, TypeError)):
                    averager.update(bad, state)
        params, state = averager.update(params, state)
        return params["a"].tobytes()

    assert len(set(run_ranks(2, fn, timeout=20))) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"period": 6}, "options:  rank 0 .*of 2, period 4, delay 1.* rank 1 .*of 2, period 6, delay 1"),
        ({"fragments": 1}, "options:  rank 0 .*of 2, period 4, delay 1.* rank 1 .*of 1, period 4, delay 1"),
        ({"delay": 0}, "options:  rank 0 .*of 2, period 4, delay 1.* rank 1 .*of 2, period 4, delay 0"),
        ({"wire": "int8"}, "options:  rank 0 .*without wire, fragment 0 of 2.* rank 1 .*wire int8, fragment 0 of 2"),
    ],
)
def test_ranks_with_different_settings(options, words):
    """At init; and those that go on from a file, where they first communicate."""

    def fn(group):
        mine = {"period": 4, "fragments": 2, "delay": 1} | (options if group.rank == 1 else {})
        params = {"a": np.zeros(2), "b": np.zeros(2)}
        averager = streaming_diloco(**mine, group=group, timeout=20)
        if "wire" not in options:
            with pytest.raises(TreeMismatchError, match=words):
                averager.init(params)
        state = streaming_diloco(**mine).init(params)
        with pytest.raises(TreeMismatchError, match="fragment 0 of "):
            updates(averager, params, state, 6)
        return average(float(group.rank), group)

    assert run_ranks(2, fn, timeout=20) == [0.5, 0.5]


def test_ranks_whose_states_are_of_different_steps():
    def fn(group):
        averager, params = make(group, 1), {"a": np.zeros(2), "b": np.zeros(2)}
        state = averager.init(params)._replace(step=4 * group.rank)
        with pytest.raises(TreeMismatchError, match="delay 1, sent at step 0, .*delay 1, sent at step 4"):
            updates(averager, params, state, 2)
        return average(float(group.rank), group)

    assert run_ranks(2, fn, timeout=20) == [0.5, 0.5]


def test_states_of_other_settings_are_refused():
    params = {"a": np.zeros((4, 2))}

    def state_of(**options):
        return streaming_diloco(8, **options, group=Solo()).init(params)

    averager = streaming_diloco(8, fragments=2, delay=1, group=Solo())
    for options, words in (
        ({"fragments": 4, "delay": 1}, "this state is of 4 fragments, and fragments=2 now"),
        ({"fragments": 2}, r"what is sent is kept in vectors of \{'float64': 4\}, and this state, .* has none"),
    ):
        with pytest.raises(ValueError, match=words):
            averager.update(params, state_of(**options))
    for other in ({"a": np.zeros((5, 2))}, {"a": np.zeros((4, 2), np.float32)}, {"b": np.zeros((4, 2))}):
        with pytest.raises(ValueError, match="streaming_diloco: update was given another tree than init: "):
            averager.update(other, state_of(fragments=2, delay=1))

"""Streaming DiLoCo: torchft's recorded runs, the equations as a plain loop, `diloco` as a special case, resuming."""

import functools
import gc
import os
import pickle
import signal
import threading
import time
import weakref

import numpy as np
import optree
import pytest
from helpers import averaging
from helpers.averaging import FRAMEWORKS, RATE, STARTS, Streaming, train, x64
from helpers.frameworks import jax, jnp, optax, torch
from helpers.processes import run_processes
from test_averagers import fedavgm, nesterov, optax_outer, same, sgd_of_torch, torch_outer
from test_checkpoints import with_numpy, with_numpy_into_jax, with_numpy_into_tensors, with_orbax, with_torch

from funcavg import diloco, outer, streaming_diloco
from funcavg.averagers import _flights
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

WEIGHTS = [1.0, 0.0, 2.5]

# torchft's recorded runs: two fragments of one number, from 1; -2 a step; outer rate 2; period 6. Values after those
# steps that change more than that.
ORACLE = {
    (0, 0.0): ({3: -11, 9: -35, 15: -59}, {6: -23, 12: -47}),
    (0, 0.5): ({3: -8, 9: -24.5, 15: -40.25}, {6: -17, 12: -32}),
    (0, 1.0): ({}, {}),
    (1, 1.0): ({}, {}),
    (1, 0.0): ({3: -7, 9: -27, 15: -47}, {6: -19, 12: -39}),
    (1, 0.5): ({3: -6, 9: -21.5, 15: -35.75}, {6: -15, 12: -29}),
}
CUTS = [2, [lambda path: path[0] == "layer 0", lambda path: path[0] == "layer 1"]]


def recorded(changes):
    values = [1.0]
    for step in range(1, 16):
        values.append(changes.get(step, values[-1] - 2))
    return values


@pytest.mark.parametrize("cut", CUTS, ids=["number", "paths"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_torchfts_recorded_runs(framework, cut):
    def fn(group, delay, mix):
        options = {"fragments": cut, "delay": delay, "mix": mix, "outer": outer.sgd(2.0), "group": group}
        averager = streaming_diloco(6, **options)
        params = {f"layer {k}": FRAMEWORKS[framework]([1.0]) for k in range(2)}
        state, path = averager.init(params), [(1.0, 1.0)]
        for _ in range(15):
            params, state = averager.update({name: leaf - 2 for name, leaf in params.items()}, state)
            path.append(tuple(float(leaf[0]) for leaf in params.values()))
        return [list(layer) for layer in zip(*path, strict=True)]

    for (delay, mix), layers in ORACLE.items():
        wanted = [recorded(changes) for changes in layers]
        assert run_ranks(2, lambda group, d=delay, m=mix: fn(group, d, m)) == [wanted] * 2, (delay, mix)


# The equations.

SETTINGS = [
    Streaming(4, 2),
    Streaming(4, 2, delay=1, mix=0.5),
    Streaming(7, 2, delay=2, mix=0.25, warmup=3, weights=WEIGHTS),
    Streaming(5, 2, mix=0.75),
    Streaming(9, 4, delay=1, warmup=2, weights=WEIGHTS),
    Streaming(5, 4, mix=1.0),
    Streaming(3, 1, delay=2, mix=0.5, warmup=1),
    Streaming(1, 1, weights=WEIGHTS),
]


def paths(settings, framework="numpy", steps=20, size=2, **options):
    def fn(group):
        averager = settings.averager(group, **options)
        return train(averager, group, framework, steps, warmup=settings.warmup, weights=settings.weights)

    return run_ranks(size, fn)


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No group is held, and no thread is left, by what a run leaves under way."""
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while flying() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert flying() == []
    assert [flight for flight in _flights._UNDER_WAY.values() if not flight.has_landed] == []


def flying():
    return [thread.name for thread in threading.enumerate() if "start_average" in thread.name]


def near(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("size", [2, 3])
def test_is_the_loop_of_the_equations(size, framework):
    """Equal to the last bit, in float64, on workers that begin differently and train on different problems."""
    for settings in SETTINGS:
        if settings.weights:
            settings = settings._replace(weights=settings.weights[:size])  # noqa: PLW2901
        same(paths(settings, framework, size=size), averaging.streaming(nesterov, 20, size, settings))
        plain = outer.sgd(1.0, momentum=0.9)
        same(paths(settings, framework, size=size, outer=plain), averaging.streaming(fedavgm, 20, size, settings))


def test_outer_optimizers_of_torch_and_optax():
    settings = SETTINGS[2]._replace(weights=None)
    for factory in (sgd_of_torch, lambda params: torch.optim.AdamW(params, lr=0.1)):
        near(paths(settings, "torch", outer=factory), averaging.streaming(torch_outer(factory), 20, 2, settings))
    for transform in (optax.adam(0.1), optax.sgd(optax.linear_schedule(1, 0.1, 5), 0.9, nesterov=True)):
        near(paths(settings, "jax", outer=transform), averaging.streaming(optax_outer(transform), 20, 2, settings))


def test_each_fragment_has_an_outer_state_of_its_own_and_sees_the_tree_with_none_elsewhere():
    made, seen = [], []

    def factory(params):
        made.append([tuple(param.shape) for param in params])
        return torch.optim.SGD(params, lr=1.0)

    tree = {"a": torch.zeros(4, 2), "b": torch.zeros(3), "n": 3}
    state = streaming_diloco(4, fragments=2, outer=factory, group=Solo()).init(tree)
    assert made == [[(3, 2)], [(1, 2), (3,)]]
    assert len(state.outer) == 2

    def step(delta, state, anchor):
        seen.append({name: None if leaf is None else tuple(leaf.shape) for name, leaf in delta.items()})
        assert {**delta, "n": None} == delta
        return optree.tree_map(lambda leaf: -leaf, delta), state

    averager = streaming_diloco(4, fragments=2, delay=1, outer=outer.Outer(lambda anchor: 0, step), group=Solo())
    params, state = tree, averager.init(tree)
    for _ in range(4):
        params, state = averager.update(params, state)
    assert seen == [{"a": (3, 2), "b": None, "n": None}, {"a": (1, 2), "b": (3,), "n": None}]


def test_the_weight_at_the_sending_counts():
    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=2, outer=outer.sgd(1.0), group=group)
        params, path = np.zeros(1), []
        state = averager.init(params)
        for weight in ("never read", [1.0, 0.0][group.rank], -1.0, "never read"):
            params, state = averager.update(params + 1 + group.rank, state, weight=weight)
            path.append((float(params[0]), float(state.weight)))
        return path

    none = np.nan
    expected = [[(1.0, none), (2.0, 1.0), (3.0, 1.0), (2.0, none)], [(2.0, none), (4.0, 0.0), (6.0, 0.0), (2.0, none)]]
    np.testing.assert_equal(run_ranks(2, fn), expected)


# `diloco` is a special case.

OUTERS = {
    "nesterov": ("numpy", outer.nesterov(0.7, 0.9)),
    "sgd": ("torch", outer.sgd(0.5, 0.25)),
    "sgd of torch": ("torch", sgd_of_torch),
    "optax": ("jax", optax.adam(0.1)),
}


@pytest.mark.parametrize("name", OUTERS)
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_one_fragment_without_delay_is_diloco(name, weights):
    framework, rule = OUTERS[name]
    for warmup in (0, 3):

        def fn(group, make, warmup=warmup):
            return train(make(group), group, framework, 14, warmup=warmup, weights=weights)

        options = {"outer": rule, "warmup": warmup}
        ours = run_ranks(3, lambda g, o=options: fn(g, lambda g: streaming_diloco(4, fragments=1, group=g, **o)))
        same(ours, run_ranks(3, lambda g, o=options: fn(g, lambda g: diloco(4, group=g, **o))))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("wire", [None, "int8"])
@pytest.mark.parametrize("tied", [(0,), (0, 1), (1,)])
def test_one_fragment_is_diloco_with_ties_wires_and_donation(tied, wire, donate):
    if donate and len(tied) == 1:
        pytest.skip("is refused")

    def fn(group):
        ends = []
        for make in (lambda **o: streaming_diloco(2, fragments=1, **o), lambda **o: diloco(2, **o)):
            averager = make(group=group, wire=wire)
            draw = np.random.default_rng(group.rank)
            a = torch.from_numpy(draw.normal(size=(40, 30)).astype(np.float32))
            params = {"a": a, "b": a if group.rank in tied else a.clone(), "c": np.float32(group.rank), "d": 2.0}
            state = averager.init(params)
            sent = group.bytes_sent
            for _ in range(4):
                for leaf in {id(params[name]): params[name] for name in "ab"}.values():
                    leaf.mul_(0.5)
                params, state = averager.update(params, state, donate=donate)
            anchor = state.anchor[0] if isinstance(state.anchor, tuple) else state.anchor
            values = [np.asarray(leaf).tobytes() for tree in (params, anchor) for leaf in optree.tree_leaves(tree)]
            ends.append((values, params["a"] is params["b"], params["a"] is a, group.bytes_sent - sent))
        assert ends[0] == ends[1]
        assert ends[0][1] == (tied == (0, 1))
        return ends[0][0]

    one, other = run_ranks(2, fn)
    assert one == other


# Resuming.

RESUMED = Streaming(6, 2, delay=2, mix=0.25)  # sends after 1 and 4 of each period, applies after 3 and 6
STEPS = 12


def with_pickle(tree, folder):
    return pickle.loads(pickle.dumps(tree))


def whole_run(group, framework, rule, steps=STEPS, restore=None):
    """Train; with ``restore``, from the state that it gives. Return the state of (params, state) after each step."""
    averager = RESUMED.averager(group, outer=rule)
    own, rank = FRAMEWORKS[framework], group.rank
    if restore is None:
        params = {"theta": own(STARTS[rank]), "w": own(STARTS[rank].reshape(2, 2).astype(np.float32))}
        state = averager.init(params)
    else:
        params, state = restore
    after = [(params, state)]
    for _ in range(int(state.step), steps):
        theta = params["theta"] - RATE * averaging.gradient(params["theta"], rank, own)
        params, state = averager.update({"theta": theta, "w": params["w"] * 0.75}, state, weight=1.0 + rank)
        after.append((params, state))
    return after


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in optree.tree_leaves(tree)]


KEEPERS = [
    ("numpy", "nesterov", with_pickle),
    ("numpy", "nesterov", with_numpy),
    ("torch", "sgd of torch", with_torch),
    ("torch", "nesterov", with_numpy_into_tensors),
    ("jax", "optax", with_numpy_into_jax),
]


@pytest.mark.parametrize(("framework", "name", "keep"), KEEPERS)
def test_resuming_after_any_step_of_two_periods_is_exact_to_the_last_bit(framework, name, keep, tmp_path):
    rule = OUTERS[name][1]

    def without_a_break(group):
        with x64(framework):
            return whole_run(group, framework, rule)

    whole = run_ranks(2, without_a_break)
    for step in range(STEPS):

        def go_on(group, step=step):
            folder = tmp_path / f"{step} {group.rank}"
            folder.mkdir()
            with x64(framework):
                return bits(whole_run(group, framework, rule, restore=keep(whole[group.rank][step], folder))[-1])

        assert run_ranks(2, go_on) == [bits(after[-1]) for after in whole], step


def test_with_orbax(tmp_path):
    def fn(group):
        with x64("jax"):
            whole = whole_run(group, "jax", optax.adam(0.1), 6)
            for step in (1, 2):
                restored = with_orbax(whole[step], tmp_path / str(step))
                assert bits(whole_run(group, "jax", optax.adam(0.1), 6, restored)[-1]) == bits(whole[-1])

    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    run_ranks(1, fn)


def test_what_was_under_way_is_begun_again_by_the_first_update_that_does_not_need_it():
    settings = Streaming(6, 1, delay=4)

    def fn(group, restore, steps):
        after = two_fragments(group, settings, restore, steps)
        return after, id(group) in _flights._UNDER_WAY

    saved = run_ranks(2, lambda group: fn(group, None, 3))
    assert run_ranks(2, lambda group: fn(group, saved[group.rank][0], 4)[1]) == [True, True]


def steps_saved(rank, folder, kill_after, group=None):
    """Train over Gloo, from the last step that all ranks have saved; die after a step."""
    last = min(len(list(folder.glob(f"{r} *"))) for r in range(2)) - 1
    restore = None if last < 0 else pickle.loads((folder / f"{rank} {last:02}").read_bytes())
    averager = RESUMED.averager(group, outer=sgd_of_torch)
    params = {"theta": torch.tensor(STARTS[rank])}
    params, state = (params, averager.init(params)) if restore is None else restore
    while True:
        if restore is None or int(state.step) > last:
            draft = folder / f"draft {rank}"
            draft.write_bytes(pickle.dumps((params, state)))
            draft.rename(folder / f"{rank} {int(state.step):02}")
        if state.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step == STEPS:
            return bits((params, state))
        theta = params["theta"] - RATE * averaging.gradient(params["theta"], rank, torch.tensor)
        params, state = averager.update({"theta": theta}, state, weight=1.0 + rank)


def test_all_ranks_are_killed_and_go_on_to_the_same_bits(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = run_ranks(2, lambda group: steps_saved(group.rank, tmp_path / "whole", None, group))
    for step in (2, 4, 8):  # a fragment is under way, sent and not looked at since; and nothing is
        run_processes(2, steps_saved, tmp_path / "killed", step, dies=(0, 1))
    assert run_processes(2, steps_saved, tmp_path / "killed", None) == whole


def test_another_number_of_ranks_goes_on_where_nothing_is_under_way():
    """Saved by one of two ranks after a fragment was applied; then three, whose states begin equal."""
    settings = Streaming(4, 2, delay=1)
    (params, state), (_, other) = run_ranks(2, lambda group: two_fragments(group, settings, None, 8))
    assert bits(state) == bits(other)
    ends = run_ranks(3, lambda group: two_fragments(group, settings, (params, state), 9))
    thetas = [end["theta"] for end, _ in ends]
    assert len({bits(end.anchor)[0] for _, end in ends}) == 1
    assert len({theta.tobytes() for theta in thetas}) == 3
    (end, _), *_ = run_ranks(3, lambda group: two_fragments(group, settings, (params, state), 10))
    # By hand: the first fragment is sent after one step of the four, and applied after two.
    delta = averaging.mean([state.anchor[0]["theta"] - theta[:2] for theta in thetas])
    momentum = 0.9 * state.outer[0].momentum["theta"] + delta
    wanted = state.anchor[0]["theta"] - 0.7 * (delta + 0.9 * momentum)
    np.testing.assert_array_equal(end["theta"][:2], wanted)


def two_fragments(group, settings, restore, steps):
    averager = settings.averager(group)
    params = {"theta": STARTS[0]}
    params, state = (params, averager.init(params)) if restore is None else restore
    while state.step < steps:
        theta = params["theta"] - RATE * averaging.gradient(params["theta"], group.rank)
        params, state = averager.update({"theta": theta}, state)
    return params, state


def test_a_living_group_that_goes_back_to_a_state_goes_on_from_it():
    """On all ranks, whatever is under way, also where a rank never changes, and always sends the same."""

    def fn(group):
        def run(state, steps):
            averager, params = RESUMED.averager(group), state[0]
            state, ends = state[1] or averager.init(params), []
            for _ in range(steps):
                params = params + 1 if group.rank else np.concatenate(state.anchor)
                params, state = averager.update(params, state)
                ends.append((params, state))
            return ends

        start = np.zeros(4), None
        whole = run(start, 12)
        for step in (1, 2, 4, 7, 8, 9):  # of which a fragment is under way before and after
            run(whole[0], 6 + (step + 3) % 5)
            assert bits(run(whole[step], 12 - step - 1)[-1]) == bits(whole[-1])
        run(start, 5)
        assert bits(run(start, 12)) == bits(whole)  # from the very beginning, where init is collective

    run_ranks(2, fn)


def test_who_goes_back_with_other_parameters_sends_those():
    """With the same averager, at the same steps: only the bits tell what is under way from what is to be sent."""

    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=2, outer=outer.sgd(1.0), group=group)
        params = np.full(3, float(group.rank))
        start = params, averager.init(params)
        for count, change in ((3, 0.0), (4, 10.0)):
            params, state = start
            for _ in range(count):
                params, state = averager.update(params + change, state)
        return params[0]

    assert run_ranks(2, fn) == [20.5, 20.5]


@pytest.mark.parametrize("count", [0, 2])
def test_ranks_that_go_back_together_begin_anew_also_where_one_does_the_same_again(count):
    """To before what is under way, or has landed, was sent."""

    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=1, outer=outer.sgd(1.0), group=group, timeout=20)
        params = np.full(3, float(group.rank))
        start = params, averager.init(params)
        for changes in ([1.0 + group.rank] * (3 + count), [1.0 + 99 * group.rank] * 4):
            params, state = start
            for change in changes:
                params, state = averager.update(params + change, state)
        return params[0]

    assert run_ranks(2, fn) == [0.5 + 3 * (1 + 100) / 2] * 2


def test_what_has_landed_is_kept_no_longer_than_an_update_may_be_repeated():
    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=1, group=group)
        params = np.full(3, float(group.rank))
        state, kept = averager.init(params), []
        for _ in range(5):
            params, state = averager.update(params, state)
            kept.append(id(group) in _flights._UNDER_WAY)
        return kept

    assert run_ranks(2, fn) == [[False, False, True, True, False]] * 2


@pytest.mark.parametrize("foreach", [False, True])
def test_torch_optimizers_may_write_to_gradients(foreach):
    """As they do with momentum: updates can be repeated, and tied leaves are not stepped twice."""
    rule = lambda params: torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True, foreach=foreach)

    def fn(group):
        found = []
        for make in (diloco, functools.partial(streaming_diloco, fragments=1, delay=1)):
            leaf = torch.ones(5)
            averager, params = make(4, outer=rule, group=group), {"a": leaf, "b": leaf}
            state = averager.init(params)
            for _ in range(4):
                leaf = params["a"] + 1 + group.rank
                before = {"a": leaf, "b": leaf}, state
                params, state = averager.update(*before)
            assert params["a"] is params["b"]
            found.append(params["a"][0].item())
            if make is not diloco:
                assert torch.equal(averager.update(*before)[0]["a"], params["a"])
        return found

    expected = [1 + 0.7 * 1.9 * 1.5 * 4, 1 + 0.7 * 1.9 * 1.5 * 3]
    np.testing.assert_allclose(run_ranks(2, fn), [expected] * 2, rtol=1e-6)


# JAX.


def jax_run(averager, group, carry, weights, *, scanned, weighted):
    """Return the state after as many steps as there are weights, and all parameters on the way."""
    target = jnp.asarray(averaging.TARGETS[group.rank])

    def step(carry, weight):
        params, state = carry
        params = {"theta": params["theta"] - RATE * (params["theta"] - target), "n": params["n"]}
        carry = averager.update(params, state, weight=weight if weighted else None)
        return carry, carry[0]["theta"]

    if scanned:
        return jax.jit(lambda carry: jax.lax.scan(step, carry, weights))(carry)
    path = []
    for weight in weights:
        carry, theta = step(carry, weight)
        path.append(theta)
    return carry, jnp.stack(path)


@pytest.mark.parametrize(
    ("settings", "rule", "weighted"),
    [
        (Streaming(6, 2, delay=2, mix=0.25, warmup=2), outer.nesterov(0.7, 0.9), True),
        (Streaming(4, 4, mix=0.75), optax.adam(0.1), False),
        (Streaming(3, 1, delay=1), optax.adam(0.1), True),
    ],
)
def test_in_a_compiled_scan_and_from_there_eagerly_and_back(settings, rule, weighted):
    def fn(group):
        with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            averager = settings.averager(group, outer=rule)
            params = {"theta": jnp.asarray(STARTS[group.rank]), "n": jnp.int32(3)}
            begin, weights = (params, averager.init(params)), jnp.linspace(0.1, 1.0 + group.rank, 14)

            def run(carry, begin, end, scanned):
                some = weights[begin:end]
                return jax_run(averager, group, carry, some, scanned=scanned, weighted=weighted)

            (_, ended), eager = run(begin, 0, 14, False)
            (_, state), scanned = run(begin, 0, 14, True)
            np.testing.assert_allclose(scanned, eager, rtol=1e-12, atol=1e-14)
            for one, other in zip(optree.tree_leaves(state), optree.tree_leaves(ended), strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)
            for scanned_first in (True, False):
                carry, one = run(begin, 0, 7, scanned_first)  # a fragment is under way, in the first case
                (_, state), other = run(carry, 7, 14, not scanned_first)
                np.testing.assert_allclose(jnp.concatenate([one, other]), eager, rtol=1e-12, atol=1e-14)

    run_ranks(2, fn, timeout=100)
    jax.clear_caches()  # programs keep their groups


@pytest.mark.parametrize("before", [3, 7])
@pytest.mark.parametrize("narrow", [np.float64, np.float32])
def test_trees_of_numpy_and_of_numbers_in_programs(narrow, before):
    """JAX makes float32 of float64 there: what is sent still has its places, also if one goes on in the other."""

    def fn(group):
        averager = streaming_diloco(4, fragments=2, delay=1, mix=0.25, outer=outer.sgd(1.0), group=group)
        params = {"a": np.full((4, 2), 1 + group.rank, narrow), "b": np.ones(2), "c": 1.0 + group.rank}

        def step(carry, _=None):
            params, state = carry
            return averager.update(jax.tree.map(lambda leaf: leaf + 1 + group.rank, params), state), None

        def run(step, count=10, carry=None):
            carry = carry or (params, averager.init(params))
            for _ in range(count):
                carry, _ = step(carry)
            return carry

        compiled, after, ends = jax.jit(step), 10 - before, [run(step)]
        for one, other in ((compiled, compiled), (compiled, step), (step, compiled)):
            carry = run(one, before, (params, averager.init(params)))
            assert any(np.asarray(vector).any() for vector in carry[1].sent.values()) or group.size == 1
            ends.append(run(other, after, carry))
        ends.append(jax.lax.scan(step, (params, averager.init(params)), None, length=10)[0])
        for end, _ in ends:
            jax.tree.map(lambda leaf, other: np.testing.assert_allclose(leaf, other, rtol=1e-6), ends[0][0], end)
        assert [list(state.sent) for _, state in ends] == [["float64"]] * 5

    run_ranks(2, fn, timeout=100)
    jax.clear_caches()


@pytest.mark.parametrize("kinds", [(np.float64, np.float32), (np.float32, np.float64)])
@pytest.mark.parametrize("array", [np.full, jnp.full])
def test_leaves_of_two_widths_keep_their_bits(array, kinds):
    """They share a vector, of the wider kind; in programs, too."""

    def fn(group):
        with jax.enable_x64(True):
            averager = streaming_diloco(2, fragments=1, delay=1, outer=outer.sgd(1.0), group=group)
            params = {name: array(2, (1 + group.rank) / 3, kind) for name, kind in zip("ab", kinds, strict=True)}
            state = averager.init(params)
            assert [str(vector.dtype) for vector in state.sent.values()] == ["float64"]

            def step(carry, _=None):
                params, state = carry
                changed = {name: leaf + leaf.dtype.type(1 / 7) for name, leaf in params.items()}
                return averager.update(changed, state), None

            eager = params, state
            for _ in range(6):
                eager, _ = step(eager)
            compiled, _ = jax.lax.scan(step, (params, state), None, length=6)
            for params, _ in (eager, compiled):
                assert [leaf.dtype for leaf in params.values()] == list(kinds)
                for leaf in params.values():  # half of the steps come after their fragment was sent
                    assert abs(leaf[0] - (0.5 + 3 / 7)) < 8 * np.finfo(leaf.dtype).eps

    run_ranks(2, fn, timeout=100)
    jax.clear_caches()


def test_weights_are_the_same_in_programs_and_files():
    """None of these is a float32."""

    def fn(group):
        averager = streaming_diloco(2, fragments=1, delay=1, outer=outer.sgd(1.0), group=group)
        weight = 0.1 + 0.2 * group.rank
        draw = np.random.default_rng(group.rank)
        changes = [jnp.asarray(draw.normal(size=500), jnp.float32) for _ in range(6)]

        def run(steps, through=lambda state: state):
            params = jnp.zeros(500)
            state = averager.init(params)
            for step, change in zip(steps, changes, strict=True):
                params, state = step(params + change, state, weight=weight)
                state = through(state)
            return bits((params, state[1:-1])), repr(
                float(state.weight)
            )  # which is a number of any kind, as the step is

        eager, compiled = averager.update, jax.jit(averager.update)
        file = lambda state: state._replace(weight=float(np.float32(state.weight)))
        ends = [run([eager] * 6), run([compiled] * 6), run([compiled] * 3 + [eager] * 3), run([eager] * 6, file)]
        assert ends == [ends[0]] * 4

    run_ranks(2, fn, timeout=100)
    jax.clear_caches()  # programs keep their groups


def test_programs_leave_no_tracer_and_states_no_anchor_behind():
    averager, params = streaming_diloco(4, fragments=2, delay=1, group=Solo()), {"a": jnp.ones((4, 2))}
    with jax.checking_leaks():
        params, state = jax.jit(averager.update)(params, averager.init(params))
    params, state = averager.update(params, state)
    leaf = weakref.ref(state.anchor[0]["a"])
    assert leaf() is not None
    del state
    gc.collect()
    assert leaf() is None


def test_leaves_of_torch_beside_those_of_jax():
    def fn(group, kinds):
        params = {name: kinds[name](np.ones(4, np.float32)) for name in "jnt"}
        averager, seen = streaming_diloco(4, fragments=2, delay=1, group=group), []
        state = averager.init(params)
        for _ in range(8):
            params, state = averager.update({name: leaf + 1 + group.rank for name, leaf in params.items()}, state)
            seen.append([np.asarray(leaf).tolist() for leaf in params.values()])
        assert [type(leaf) for leaf in params.values()] == [type(kinds[name](np.ones(1))) for name in "jnt"]
        return seen

    mixed = run_ranks(2, lambda group: fn(group, {"j": jnp.asarray, "n": np.asarray, "t": torch.as_tensor}))
    plain = run_ranks(2, lambda group: fn(group, dict.fromkeys("jnt", np.asarray)))
    np.testing.assert_allclose(mixed, plain, rtol=1e-6)

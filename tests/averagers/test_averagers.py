"""Averagers: their methods against textbook loops, hand-computed tables, identities and independent implementations."""

import functools
import logging
from fractions import Fraction

import numpy as np
import pytest
from helpers import averaging, mpi
from helpers.averaging import FRAMEWORKS, RATE, SIZE, STARTS, local_sgd, local_training_and, train, x64
from helpers.frameworks import jax, jnp, optax, torch
from helpers.processes import run_processes

import funcavg
from funcavg import average, diloco, hierarchical, outer, periodic, stacked
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

WEIGHTS = [1.0, 0.0, 2.5]


def paths(make, framework="numpy", steps=20, size=SIZE, **options):
    return run_ranks(size, lambda group: train(make(group), group, framework, steps, **options))


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)  # to the last bit


def near(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


# The outer steps of the papers.


def nesterov(anchor, delta, u, lr=0.7, momentum=0.9):  # DiLoCo
    u = momentum * u + delta
    return anchor - lr * (delta + momentum * u), u


def slowmo(anchor, delta, u, alpha=1.0, beta=0.5, gamma=RATE):  # algorithm 1, lines 6 and 7
    u = beta * u + delta / gamma
    return anchor - alpha * gamma * u, u


def bmuf(anchor, delta, d, eta=0.875, zeta=1.0):  # classical block momentum, G = -delta
    d = eta * d + zeta * (-delta)
    return anchor + d, d


def fedavgm(anchor, delta, v, beta=0.9, eta=1.0):
    v = beta * v + delta
    return anchor - eta * v, v


@pytest.mark.parametrize("framework", FRAMEWORKS)
class TestAgainstTextbooks:
    """Equal to the last bit, in float64, on three workers that begin differently."""

    @pytest.mark.parametrize(("period", "warmup"), [(1, 0), (4, 0), (4, 6), (3, 3)])
    def test_local_and_post_local_sgd(self, framework, period, warmup):
        ours = paths(lambda g: periodic(period, warmup=warmup, group=g), framework, warmup=warmup)
        same(ours, local_sgd(20, period, warmup))

    @pytest.mark.parametrize("warmup", [0, 6])
    @pytest.mark.parametrize("weights", [None, WEIGHTS])
    def test_diloco(self, framework, warmup, weights):
        ours = paths(lambda g: diloco(4, warmup=warmup, group=g), framework, warmup=warmup, weights=weights)
        same(ours, local_training_and(nesterov, 20, 4, warmup, weights))

    def test_slowmo(self, framework):
        ours = paths(lambda g: diloco(4, outer=outer.sgd(1.0, momentum=0.5), group=g), framework)
        same(ours, local_training_and(slowmo, 20, 4))  # gamma is a power of two

    def test_bmuf(self, framework):
        ours = paths(lambda g: diloco(5, outer=outer.sgd(1.0, momentum=0.875), group=g), framework)
        same(ours, local_training_and(bmuf, 20, 5))

    def test_fedavgm(self, framework):
        counts = [10, 0, 25]
        ours = paths(lambda g: diloco(5, outer=outer.sgd(1.0, momentum=0.9), group=g), framework, weights=counts)
        same(ours, local_training_and(fedavgm, 20, 5, weights=counts))

    def test_hierarchical_sgd(self, framework):
        """Three ranks have no blocks but each and all: four do."""

        def fn(group):
            with x64(framework):
                averager = hierarchical({2: 2, 6: 4}, warmup=1, group=group)
                params = FRAMEWORKS[framework](STARTS[0] + group.rank)
                state, path = averager.init(params), []
                for _ in range(13):
                    params, state = averager.update(params + group.rank, state)
                    path.append(np.asarray(params).copy())
                return np.stack(path)

        thetas, wanted = [STARTS[0] + i for i in range(4)], []
        for t in range(13):
            thetas = [theta + i for i, theta in enumerate(thetas)]
            if t >= 1 and t % 6 == 0:
                thetas = [averaging.mean(thetas)] * 4
            elif t >= 1 and t % 2 == 0:
                thetas = [averaging.mean(thetas[:2])] * 2 + [averaging.mean(thetas[2:])] * 2
            wanted.append(thetas)
        same(run_ranks(4, fn), [np.stack(path) for path in zip(*wanted, strict=True)])

    def test_identities(self, framework):
        """Each method at the settings at which it is plain averaging, or gradient averaging."""
        at_ends = local_training_and(lambda anchor, delta, memory: (anchor - delta, memory), 20, 4)
        # DiLoCo with eta = 1, mu = 0; SlowMo with alpha = 1, beta = 0; BMUF with zeta = 1, eta = 0; FedAvgM, beta = 0
        for plain in (outer.sgd(1.0), outer.nesterov(1.0, 0.0)):
            same(paths(lambda g, plain=plain: diloco(4, outer=plain, group=g), framework), at_ends)
        # ... which is what averaging at the same steps gives, but for rounding: those of `periodic` begin one later.
        averaged = paths(lambda g: periodic(4, warmup=3, group=g), framework)
        near(averaged, at_ends)
        # One level is local SGD, where the warm-up is a multiple of the period; one rank alone is never changed.
        for anchor, warmup in (("step", 8), ("warmup", 8), ("warmup", 6)):
            level = paths(
                lambda g, a=anchor, w=warmup: hierarchical({4: g}, warmup=w, anchor=a, group=g),
                framework,
                warmup=warmup,
            )
            same(level, local_sgd(20, 4, warmup))
        alone = paths(lambda g: hierarchical({1: 1}, group=g), framework)
        same(alone, paths(lambda g: periodic(100, warmup=100, group=g), framework))
        same(paths(lambda g: periodic(1, group=g), framework, size=1), [alone[0]])


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_from_one_start_averaging_parameters_at_every_step_is_averaging_gradients(framework, monkeypatch):
    monkeypatch.setattr(averaging, "STARTS", [STARTS[0]] * SIZE)
    every = paths(lambda g: periodic(1, group=g), framework)
    synchronous = paths(lambda g: periodic(1, warmup=100, group=g), framework, warmup=20)
    near(every, synchronous)


def by_hand(make, drifts, steps, start=(0.0, 0.0), weights=(None, None)):
    """Return the paths of two workers whose every step adds a constant."""

    def fn(group):
        averager = make(group)
        params = np.array(start[group.rank])
        state, path = averager.init(params), []
        for _ in range(steps):
            params, state = averager.update(params + drifts[group.rank], state, weight=weights[group.rank])
            path.append(float(params))
        return path

    return run_ranks(2, fn)


def test_tables_computed_by_hand():
    """Workers 0 and 1 add 1 and 3 at every step."""
    # Local SGD, period 2. Steps 0, 2 and 4 average: (1 + 3)/2 = 2; (2+1+1, 2+3+3) = (4, 8) -> 6; (8, 12) -> 10.
    assert by_hand(lambda g: periodic(2, group=g), (1, 3), 5) == [[2, 3, 6, 7, 10], [2, 5, 6, 9, 10]]
    # Hierarchical, pairs of one rank every step and both every 2, from step 1: steps 2 and 4.
    # (3, 9) -> 6; (8, 12) -> 10.
    assert by_hand(lambda g: hierarchical({1: 1, 2: 2}, warmup=1, group=g), (1, 3), 5) == [
        [1, 2, 6, 7, 10],
        [3, 6, 6, 9, 10],
    ]
    # DiLoCo, period 2, eta 1/2, mu 1/2, from anchor (1 + 3)/2 = 2 though workers are at 1 and 3.
    # After two steps: 3 and 9. delta = ((2 - 3) + (2 - 9))/2 = -4. u = 0/2 - 4 = -4. 2 - (-4 - 2)/2 = 5.
    # After two more: 7 and 11. delta = (-2 - 6)/2 = -4. u = -2 - 4 = -6. 5 - (-4 - 3)/2 = 8.5.
    assert by_hand(lambda g: diloco(2, outer=outer.nesterov(0.5, 0.5), group=g), (1, 3), 4, (1.0, 3.0)) == [
        [2, 5, 6, 8.5],
        [6, 5, 8, 8.5],
    ]
    # SlowMo, tau 2, alpha 1, beta 1/2, from 0. After two steps: 2 and 6. delta = -4. u = -4. 0 + 4 = 4.
    # After two more: 6 and 10. delta = -4. u = -2 - 4 = -6. 4 + 6 = 10.
    assert by_hand(lambda g: diloco(2, outer=outer.sgd(1.0, 0.5), group=g), (1, 3), 4) == [[1, 4, 5, 10], [3, 4, 7, 10]]
    # FedAvgM, beta 1/2, workers of 1 and 3 examples. After two steps: 2 and 6. delta = -(2 + 3 * 6)/4 = -5. v = -5.
    # 0 + 5 = 5. After two more: 7 and 11. delta = 5 - (7 + 3 * 11)/4 = -5. v = -2.5 - 5 = -7.5. 5 + 7.5 = 12.5.
    fedavgm = by_hand(lambda g: diloco(2, outer=outer.sgd(1.0, 0.5), group=g), (1, 3), 4, weights=(1, 3))
    np.testing.assert_allclose(fedavgm, [[1, 5, 6, 12.5], [3, 5, 8, 12.5]], rtol=1e-15)
    # BMUF, zeta 1/2, eta 1/2: G = 4. D = 0/2 + 4/2 = 2. 0 + 2 = 2. Then G = 4. D = 2/2 + 2 = 3. 2 + 3 = 5.
    assert by_hand(lambda g: diloco(2, outer=outer.sgd(0.5, 0.5), group=g), (1, 3), 4) == [[1, 2, 3, 5], [3, 2, 5, 5]]


@pytest.mark.parametrize("make", [lambda g: diloco(4, group=g), lambda g: diloco(4, outer=outer.sgd(1.0), group=g)])
def test_the_sign_and_that_all_become_equal(make):
    """One outer step lowers the loss, and workers from different starts end the first synchronisation equal."""
    ours = paths(make, steps=4)
    assert len({path[-1].tobytes() for path in ours}) == 1
    assert len({path[-2].tobytes() for path in ours}) == SIZE
    assert averaging.excess(ours[0][-1]) < 0.5 * averaging.excess(averaging.mean(STARTS))


# Independent implementations.


def torch_outer(make):
    def step(anchor, delta, memory):
        if isinstance(memory, np.ndarray):
            param = torch.nn.Parameter(torch.tensor(anchor))
            memory = param, make([param])
        param, optimizer = memory
        param.grad = torch.tensor(delta)
        optimizer.step()
        return param.detach().numpy().copy(), memory

    return step


def optax_outer(transform):
    def step(anchor, delta, memory):
        with x64("jax"):
            memory = transform.init(jnp.asarray(anchor)) if isinstance(memory, np.ndarray) else memory
            updates, memory = transform.update(jnp.asarray(delta), memory, jnp.asarray(anchor))
            return np.asarray(optax.apply_updates(jnp.asarray(anchor), updates)), memory

    return step


def sgd_of_torch(params, nesterov=False):
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=nesterov)


def adam_of_torch(params):
    return torch.optim.AdamW(params, lr=0.1)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_outer_optimizers_are_those_of_torch_and_optax(framework, nesterov):
    own = outer.nesterov(0.7, 0.9) if nesterov else outer.sgd(0.7, 0.9)
    ours = paths(lambda g: diloco(4, outer=own, group=g), framework)
    near(ours, local_training_and(torch_outer(functools.partial(sgd_of_torch, nesterov=nesterov)), 20, 4))
    near(ours, local_training_and(optax_outer(optax.sgd(0.7, 0.9, nesterov=nesterov)), 20, 4))


def test_torch_optimizers_as_outer():
    for factory in (sgd_of_torch, adam_of_torch):
        ours = paths(lambda g, factory=factory: diloco(4, outer=factory, warmup=2, group=g), "torch", warmup=2)
        near(ours, local_training_and(torch_outer(factory), 20, 4, 2))


def test_a_state_can_be_gone_on_from_twice():
    """Optimizers of torch write to their state: to a copy of ours."""
    for rule in (sgd_of_torch, adam_of_torch, outer.nesterov(0.7, 0.9)):
        averager = diloco(1, outer=rule, group=Solo())
        params = {"w": torch.zeros(3)}
        _, state = averager.update({"w": torch.ones(3)}, averager.init(params))
        one, other = (averager.update({"w": torch.full((3,), 2.0)}, state) for _ in range(2))
        assert torch.equal(one[0]["w"], other[0]["w"])
        assert not torch.equal(one[0]["w"], state.anchor["w"])


def test_optax_transforms_as_outer():
    for transform in (optax.sgd(0.7, 0.9, nesterov=True), optax.adam(0.1), optax.sgd(optax.linear_schedule(1, 0.1, 5))):
        ours = paths(lambda g, t=transform: diloco(4, outer=t, group=g), "jax")
        near(ours, local_training_and(optax_outer(transform), 20, 4))


def beside_torchs_averagers(rank):
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

    levels = {2: 2, 4: 4}
    pairs = [
        (periodic(3, warmup=4), PeriodicModelAverager(period=3, warmup_steps=4)),
        (hierarchical(levels, warmup=3), HierarchicalModelAverager(levels, warmup_steps=3)),
        (hierarchical(levels), HierarchicalModelAverager(levels)),
    ]
    for ours, theirs in pairs:
        draw = torch.Generator().manual_seed(rank)
        # Dyadic numbers, whose means of four are exact: torch divides first, and sums in another order.
        params = {"w": torch.zeros(5, 3, dtype=torch.float64), "b": torch.full((7,), rank, dtype=torch.float64)}
        theirs_params = [torch.nn.Parameter(leaf.clone()) for leaf in params.values()]
        state = ours.init(params)
        for _ in range(10):
            for (name, leaf), param in zip(list(params.items()), theirs_params, strict=True):
                noise = torch.randint(-9, 9, leaf.shape, generator=draw).double()
                params[name] = leaf + noise
                param.data += noise
                param.grad = noise
            params, state = ours.update(params, state)
            theirs.average_parameters(theirs_params)
            for leaf, param in zip(params.values(), theirs_params, strict=True):
                assert torch.equal(leaf, param.detach())
    return True


def test_torchs_averagers_give_the_same_bits():
    assert run_processes(4, beside_torchs_averagers, timeout=100) == [True] * 4


# Every group.


def over_processes(rank, make):
    group = funcavg.collectives.as_collective()
    return train(make(None), group, "torch", 20)


def make_diloco(group):
    return diloco(4, warmup=2, group=group)


def make_hierarchical(group):
    return hierarchical({2: 1, 4: 2}, warmup=1, anchor="warmup", group=group)


def over_mpi(comm, make):
    return train(make(comm), comm, "numpy", 20)


@pytest.mark.parametrize("make", [make_diloco, make_hierarchical])
def test_over_gloo(make):
    same(run_processes(2, over_processes, make), paths(make, size=2))


@pytest.mark.mpi
def test_over_mpi():
    for make in (make_diloco, make_hierarchical):
        same(mpi.run_mpi(2, over_mpi, make), paths(make, size=2))


def jax_loop(averager, group, rank, steps, *, scanned):
    """Train by one compiled scan, or by an eager loop over one compiled step."""
    target = jnp.asarray(averaging.TARGETS[rank], jnp.float32)

    def step(carry, _):
        params, state = carry
        params = {"theta": params["theta"] - RATE * (params["theta"] - target)}
        params, state = averager.update(params, state)
        return (params, state), params["theta"]

    params = {"theta": jnp.asarray(STARTS[rank], jnp.float32)}
    carry = params, averager.init(params)
    if scanned:
        return np.asarray(jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)[1])
    path = []
    for _ in range(steps):
        carry, theta = step(carry, None)
        path.append(np.asarray(theta))
    return np.stack(path)


MAKERS = {
    **{name: method.make for name, method in averaging.METHODS.items()},
    "optax": lambda g: diloco(3, outer=optax.adam(0.1), group=g),
}


@pytest.mark.parametrize("name", MAKERS)
def test_in_a_compiled_scan(name):
    make = MAKERS[name]

    def fn(group):
        # optax.adam itself breaks the strict rules
        with jax.numpy_dtype_promotion("standard" if name == "optax" else "strict"), jax.numpy_rank_promotion("raise"):
            eager = jax_loop(make(group), group, group.rank, 14, scanned=False)
            scanned = jax_loop(make(group), group, group.rank, 14, scanned=True)
        np.testing.assert_allclose(scanned, eager, rtol=1e-5, atol=1e-6)

    run_ranks(2, fn, timeout=100)


@pytest.mark.parametrize("make", [lambda g: periodic(3, warmup=2, group=g), lambda g: diloco(3, warmup=2, group=g)])
def test_over_an_axis_and_over_stacked_replicas(make):
    """The same averager over two threads, over a named axis of vmap, and over stacked replicas."""
    threads = run_ranks(2, lambda group: jax_loop(make(group), group, group.rank, 14, scanned=False))
    starts, targets = (jnp.asarray(np.stack(rows[:2]), jnp.float32) for rows in (STARTS, averaging.TARGETS))

    def train_one(averager, params, target):
        def step(carry, _):
            params, state = carry
            params, state = averager.update(params - RATE * (params - target), state)
            return (params, state), params

        return jax.lax.scan(step, (params, averager.init(params)), length=14)[1]

    over_axis = jax.jit(jax.vmap(lambda p, t: train_one(make("replica"), p, t), axis_name="replica"))(starts, targets)
    together = train_one(make(stacked()), starts, targets)
    np.testing.assert_allclose(over_axis, threads, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.moveaxis(together, 1, 0), threads, rtol=1e-5, atol=1e-6)


# What a pair of pure functions promises.

LEAVES = {
    "numpy": lambda rank: np.full(3, float(rank), np.float32),
    "torch": lambda rank: torch.full((3,), float(rank)),
    "jax": lambda rank: jnp.full(3, float(rank)),
}


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("framework", LEAVES)
@pytest.mark.parametrize("make", [lambda g, w: periodic(1, group=g, where=w), lambda g, w: diloco(1, group=g, where=w)])
def test_inputs_are_not_written_to_and_nothing_shares_memory(make, framework, donate):
    def fn(group):
        leaf, kept = LEAVES[framework](group.rank), LEAVES[framework](group.rank)
        tree = {"w": leaf, "tied": leaf, "kept": kept, "n": 3, "none": None, "name": "text"}
        averager = make(group, lambda path: path[0] not in ("kept", "name"))
        state = averager.init(tree)
        anchor = np.asarray(getattr(state, "anchor", tree)["w"]).copy()
        result, after = averager.update(tree, state, donate=donate)
        if donate and framework != "jax":
            assert result["w"] is leaf
        else:
            assert np.asarray(leaf).tolist() == [group.rank] * 3
            assert not np.may_share_memory(np.asarray(result["w"]), np.asarray(leaf))
        assert result["tied"] is result["w"] or framework == "jax"
        assert all(result[name] is tree[name] for name in ("kept", "n", "none", "name"))
        if hasattr(state, "anchor"):
            np.testing.assert_array_equal(state.anchor["w"], anchor)
            assert (state.anchor["kept"], state.anchor["name"]) == (None, None)
            if framework != "jax":
                for name in ("w", "tied"):
                    assert not np.may_share_memory(np.asarray(result["w"]), np.asarray(after.anchor[name]))
        assert (state.step, after.step) == (0, 1)
        assert np.asarray(result["w"]).tolist() == [0.5] * 3

    run_ranks(2, fn)


def test_parameters_that_require_grad():
    def fn(group):
        weight = torch.nn.Parameter(torch.full((2,), float(group.rank)))
        for averager in (periodic(1, group=group), diloco(1, group=group), diloco(1, outer=sgd_of_torch, group=group)):
            state = averager.init([weight])
            (result,), state = averager.update([weight], state)
            assert type(result) is torch.nn.Parameter
            assert result.requires_grad
            assert result.tolist() == [0.5, 0.5]
            (again,), _ = averager.update([weight], state, donate=True)
            assert again is weight
            with torch.no_grad():
                weight.fill_(group.rank)

    run_ranks(2, fn)


def test_narrow_and_odd_leaves():
    def fn(group):
        tree = [torch.ones(3, dtype=torch.bfloat16), np.float32(group.rank), float(group.rank), np.ones((2, 0))]
        averager = diloco(1, outer=outer.nesterov(0.7, 0.9), group=group)
        state = averager.init(tree)
        result, state = averager.update(tree, state)
        result, state = averager.update(result, state)
        assert [type(leaf) for leaf in result] == [type(leaf) for leaf in tree]
        assert result[0].dtype == state.anchor[0].dtype == torch.bfloat16
        return float(result[1])

    one, other = run_ranks(2, fn)
    assert one == other


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("method", ["periodic", "hierarchical", "diloco"])
def test_another_tree_is_refused(method, at):
    """On every rank at a step that synchronises, else on the rank that has it."""
    makers = {
        "periodic": lambda g: periodic(2, group=g),
        "hierarchical": lambda g: hierarchical({2: g}, group=g),
        "diloco": lambda g: diloco(2, warmup=0, group=g),
    }

    def fn(group):
        averager = makers[method](group)
        tree = {"w": np.zeros(2)}
        state = averager.init(tree)
        for _ in range(at):
            tree, state = averager.update(tree, state)
        fires = at == (1 if method == "diloco" else 0)
        bad = {"w": np.zeros(3)} if group.rank == 1 else tree
        if group.rank == 1 or fires:
            words = "was given another tree than init"
            if method == "diloco":
                words += r": params_tree\['w'\]: float64\[2\] then, params_tree\['w'\]: float64\[3\] now"
            with pytest.raises(ValueError, match=words):
                averager.update(bad, state)
        else:
            averager.update(tree, state)
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_synchronisations_are_logged_with_the_bytes_of_the_formula(caplog):
    caplog.set_level(logging.INFO, "funcavg")
    tree = {"a": np.zeros(300, np.float32), "b": np.zeros((10, 6)), "n": 3}
    nbytes = 300 * 4 + 60 * 8

    def fn(group):
        averager = diloco(2, group=group)
        params, state = tree, averager.init(tree)
        before = group.bytes_sent
        for _ in range(5):
            params, state = averager.update(params, state)
        return group.bytes_sent - before

    each = (3 - 1) * (2 * nbytes // 3 + 48)
    assert run_ranks(3, fn) == [2 * each] * 3
    messages = [record.getMessage() for record in caplog.records if record.name == "funcavg"]
    for step in (1, 3):
        assert sum(f"diloco: step {step}, 2 leaves averaged, {each} bytes sent, 0." in text for text in messages) == 3
    assert sum("diloco, anchor: step 0, 2 leaves averaged" in text for text in messages) == 3
    assert len(messages) == 9


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: periodic(0), ValueError, "periodic: period must be at least 1, got 0"),
        (lambda: periodic(2, warmup=-1), ValueError, "periodic: warmup must be at least 0, got -1"),
        (lambda: periodic(2.0), TypeError, "periodic: period must be an integer, got 2.0"),
        (lambda: diloco(0), ValueError, "diloco: period must be at least 1, got 0"),
        (lambda: diloco(2, outer=3), TypeError, "diloco: outer must be of funcavg.outer, an optax transform, or a"),
        (lambda: hierarchical({}), TypeError, "levels must map periods to groups, at least one, got {}"),
        (lambda: hierarchical([4, 2]), TypeError, r"levels must map periods to groups, at least one, got \[4, 2\]"),
        (lambda: hierarchical({0: None}), ValueError, "hierarchical: period must be at least 1, got 0"),
        (lambda: hierarchical({4: None, 6: None}), ValueError, r"but 6 is none of 4: got \[4, 6\]"),
        (lambda: hierarchical({4: None}, anchor="end"), ValueError, 'anchor must be "step" or "warmup", got \'end\''),
        (lambda: hierarchical({4: 2}, group=Solo()), ValueError, "divides the 1 ranks of its group, got 2"),
        (lambda: hierarchical({4: 2}, group="data"), TypeError, "numbers of ranks are blocks of .*, got 'data'. Map"),
        (lambda: outer.sgd(-0.5), ValueError, "outer: lr must be at least 0 and finite, got -0.5"),
        (lambda: outer.sgd("1"), TypeError, "outer: lr must be a number, got '1' of type str"),
        (lambda: outer.nesterov(1.0, 1.0), ValueError, "momentum must be at least 0 and less than 1, got 1.0"),
        (lambda: periodic(2).init({"w": "text"}), TypeError, r"\['w'\] is a str: 'text'"),
        (
            lambda: diloco(1, outer=sgd_of_torch, group=Solo()).init(np.zeros(2)),
            TypeError,
            "a torch optimizer as outer is for trees of torch tensors, got .'ndarray'.",
        ),
        (
            lambda: diloco(1, outer=lambda params: 3, group=Solo()).init(torch.zeros(2)),
            TypeError,
            "outer must return a torch.optim.Optimizer, got 3",
        ),
    ],
)
def test_what_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@pytest.mark.parametrize(
    "rate",
    [
        *(0.5, np.float32(0.5), np.array(0.5), Fraction(1, 2), jax.numpy.float32(0.5)),
        *(torch.tensor(0.5), torch.tensor(0.5, dtype=torch.bfloat16)),
    ],
)
def test_outer_rates_of_every_kind(rate):
    updates, _ = outer.nesterov(rate, momentum=np.float64(0.5)).update(
        {"w": np.array([2.0])}, outer.MomentumState({"w": np.array([0.0])})
    )
    assert updates["w"].tolist() == [-1.5]
    assert updates["w"].dtype == np.float64


def test_an_outer_rate_of_0_leaves_the_anchor_as_it_is():
    averager = diloco(1, outer=outer.sgd(0.0), group=Solo())
    state = averager.init({"w": np.ones(2)})
    params, _ = averager.update({"w": np.full(2, 5.0)}, state)
    assert params["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rate", [np.ones(2), "1", True, torch.tensor(True), 1j, None])
def test_what_is_no_outer_rate(rate):
    with pytest.raises(TypeError, match="outer: lr must be a number, got"):
        outer.sgd(rate)

"""Averagers where something is odd: donated buffers, ranks outside, one rank's mistake, ties, other groups' ranks."""

import numpy as np
import pytest
from helpers import averaging, mpi
from helpers.averaging import local_sgd, local_training_and
from helpers.frameworks import dist, jax, jnp, optax, torch
from helpers.processes import run_processes

from funcavg import average, diloco, hierarchical, outer, periodic
from funcavg.collectives import Solo, as_collective
from funcavg.collectives.blocks import block_of
from funcavg.testing import run_ranks

WEIGHTS = [1.0, 0.0, 2.5]


def test_buffers_that_a_jax_loop_donates_are_its_own():
    averager, params = diloco(1, group=Solo()), {"w": jnp.ones(2)}
    state = averager.init(params)
    step = jax.jit(lambda params: {"w": params["w"] - 0.1}, donate_argnums=0)
    for _ in range(4):
        params, state = averager.update(step(params), state)
        assert params["w"].unsafe_buffer_pointer() != state.anchor["w"].unsafe_buffer_pointer()
    params, state = jax.jit(averager.update, donate_argnums=(0, 1))(params, state)
    assert params["w"].tolist() == state.anchor["w"].tolist()


def ranks_outside(rank):
    some, pair, other = dist.new_group([1, 3]), dist.new_group([0, 1]), dist.new_group([2, 3])
    found = []
    for averager in (
        periodic(1, group=some),
        diloco(1, group=some),
        diloco(1, warmup=1, group=some),
        hierarchical({1: 2}, group=some),
        hierarchical({1: some, 2: None}),
    ):
        params = {"w": torch.full((2,), float(rank))}
        result, state = averager.update(params, averager.init(params))
        assert state.step == 1
        found.append(result["w"].tolist()[0])
        if rank not in (1, 3) and len(found) < 5:
            assert result is params
    own = pair if rank < 2 else other
    averager = hierarchical({1: own, 3: None}, anchor="warmup", warmup=1)
    params = torch.full((2,), float(rank))
    state = averager.init(params)
    path = []
    for _ in range(5):
        params, state = averager.update(params, state)
        path.append(params.tolist()[0])
    return found, path


def test_ranks_outside_of_a_group_get_their_very_tree_back():
    results = run_processes(4, ranks_outside)
    # Nothing has been trained: diloco's outer step stays at the anchor, and its warm-up leaves parameters alone.
    assert [found for found, _ in results] == [
        [0, 0, 0, 0, 1.5],
        [2, 2, 1, 2, 1.5],
        [2, 2, 2, 2, 1.5],
        [2, 2, 3, 2, 1.5],
    ]
    assert [path for _, path in results] == [[rank, 1.5, 1.5, 1.5, 1.5] for rank in (0.0, 1.0, 2.0, 3.0)]


MAKERS = {
    **{name: method.make_eager for name, method in averaging.METHODS.items()},
    "diloco, taking its anchor anew": lambda g: diloco(2, warmup=1, group=g),
}


@pytest.mark.parametrize("bad", [{"w": "text"}, {"w": np.zeros(3)}], ids=["text", "shape"])
@pytest.mark.parametrize("name", MAKERS)
def test_one_ranks_mistake_is_everyones(name, bad):
    make = MAKERS[name]

    def fn(group):
        averager, tree = make(group), {"w": np.zeros(2)}
        state = averager.init(tree)
        with pytest.raises((TypeError, ValueError)):
            averager.update(bad if group.rank == 1 else tree, state)
        return average(float(group.rank), group)

    assert run_ranks(2, fn, timeout=20) == [0.5, 0.5]


def read_only():
    array = np.zeros(3)
    array.flags.writeable = False
    return [array]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (read_only, "is a read-only NumPy array"),
        (lambda: [(base := np.zeros(4))[:3], base[1:]], "overlap in memory without being equal views"),
        (lambda: [torch.ones(1).expand(3)], "is an expanded array"),
    ],
)
def test_what_cannot_be_donated_is_refused_on_every_rank_before_anything_moves(make, words):
    def fn(group):
        averager = diloco(1, group=group)
        tree = (
            make()
            if group.rank == 1
            else [type(leaf)(leaf) if torch.is_tensor(leaf) else leaf.copy() for leaf in make()]
        )
        if group.rank == 0 and torch.is_tensor(tree[0]):
            tree = [torch.ones(3)]
        state = averager.init(tree)
        with pytest.raises(ValueError, match=words):
            averager.update(tree, state, donate=True)
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


@pytest.mark.parametrize("tied", [(0,), (0, 1), (1,)])
def test_ties_are_kept_if_all_ranks_have_them_and_never_change_values(tied):
    def fn(group):
        averager = diloco(1, outer=outer.sgd(0.5), group=group)
        a = torch.full((3,), 1.0 + group.rank)
        tree = {"a": a, "b": a if group.rank in tied else torch.full((3,), 4.0)}
        state = averager.init(tree)
        result, state = averager.update(tree, state)
        result, state = averager.update(result, state)
        for name in "ab":
            assert torch.equal(result[name], state.anchor[name])
        assert (result["a"] is result["b"]) == (tied == (0, 1))
        if len(tied) == 1:
            with pytest.raises(ValueError, match="tied leaves"):
                averager.update({"a": a, "b": a} if group.rank in tied else dict(tree), state, donate=True)
        return [result[name].tolist() for name in "ab"]

    one, other = run_ranks(2, fn)
    assert one == other


def test_an_outer_optimizer_begins_anew_with_an_anchor_that_is_taken_anew():
    remembering = outer.Outer(lambda anchor: anchor, lambda delta, state, anchor: (state - anchor, state))  # goes back
    averager = diloco(1, outer=remembering, warmup=2, group=Solo())
    params = np.zeros(2)
    state = averager.init(params)
    for _ in range(2):
        params, state = averager.update(params + 50, state)
    params, _ = averager.update(params + 1, state)
    assert params.tolist() == [100.0, 100.0]


class Counting(torch.optim.SGD):
    """Remembers in its parameter group, as Prodigy and schedule-free optimizers do."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_torch_optimizers_keep_in_their_groups_is_kept():
    averager = diloco(1, outer=lambda params: Counting(params, lr=0.1), group=Solo())
    params = torch.zeros(2)
    state = averager.init(params)
    for k in (1, 2, 3):
        params, state = averager.update(params + 1, state)
        assert state.outer["param_groups"][0]["k"] == k


@pytest.mark.parametrize("choose", [lambda params: params[:1], lambda params: [torch.nn.Parameter(torch.zeros(2))]])
def test_torch_optimizers_of_other_parameters_are_refused(choose):
    averager = diloco(1, outer=lambda params: torch.optim.SGD(choose(params), lr=1.0), group=Solo())
    with pytest.raises(ValueError, match="must optimize the 2 parameters that it is given, and no others"):
        averager.init([torch.zeros(2), torch.zeros(2)])


def test_optax_is_for_jax_leaves():
    with pytest.raises(TypeError, match=r"an optax transform as outer is for trees of JAX arrays, got \['ndarray'\]"):
        diloco(1, outer=optax.sgd(1.0), group=Solo()).init([np.zeros(2), jnp.zeros(2)])


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def paths(make, **options):
    return run_ranks(3, lambda group: averaging.train(make(group), group, "numpy", 20, **options))


def test_weights_of_every_method():
    same(paths(lambda g: periodic(3, warmup=2, group=g), warmup=2, weights=WEIGHTS), local_sgd(20, 3, 2, WEIGHTS))
    same(paths(lambda g: hierarchical({3: g}, group=g), weights=WEIGHTS), local_sgd(20, 3, 0, WEIGHTS))


def test_a_warm_up_of_one_step():
    def nesterov(anchor, delta, u):
        u = 0.9 * u + delta
        return anchor - 0.7 * (delta + 0.9 * u), u

    same(paths(lambda g: diloco(4, warmup=1, group=g), warmup=1), local_training_and(nesterov, 20, 4, 1))


def test_bmuf_with_nesterov_momentum_as_fairseq_has_it():
    def bmuf(anchor, delta, d, eta=0.5, zeta=0.75):  # D <- eta D + zeta G; theta <- anchor - D; theta <- theta - eta D
        d = eta * d + zeta * delta
        return (anchor - d) - eta * d, d

    ours = paths(lambda g: diloco(4, outer=outer.sgd(0.75 * 1.5, momentum=0.5), group=g))
    for one, other in zip(ours, local_training_and(bmuf, 20, 4), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_heavy_ball_as_noloco_writes_it():
    def heavy_ball(anchor, delta, m, alpha=0.5, eta=0.25):
        m = alpha * m - eta * delta
        return anchor + m, m

    same(paths(lambda g: diloco(4, outer=outer.sgd(0.25, 0.5), group=g)), local_training_and(heavy_ball, 20, 4))


def test_hierarchical_options():
    def fn(group):
        averager = hierarchical({1: group}, group=group, where=lambda path: path == ("w",))
        tree = {"w": np.full(2, float(group.rank)), "own": np.full(2, float(group.rank))}
        result, _ = averager.update(tree, averager.init(tree), weight=[3.0, 1.0][group.rank], donate=True)
        assert result["w"] is tree["w"]
        assert result["own"] is tree["own"]
        return result["w"].tolist(), result["own"].tolist()

    assert run_ranks(2, fn) == [([0.25, 0.25], [0, 0]), ([0.25, 0.25], [1, 1])]


@pytest.mark.parametrize("levels", [{2: 4, 4: 2}, {2: 2, 4: 3}, {2: 0, 4: 2}])
def test_numbers_of_ranks_must_nest(levels):
    with pytest.raises(ValueError, match="each number of ranks must be a multiple of the one before, got"):
        hierarchical(levels, group=Solo())


@pytest.mark.parametrize("step", [np.uint8(255), np.int32(255), torch.tensor(255), jnp.int32(255)])
def test_steps_as_they_come_from_files(step):
    averager, tree = periodic(256, group=Solo()), np.zeros(2)
    _, state = averager.update(tree, averager.init(tree)._replace(step=step))
    assert int(state.step) == 256


def hierarchy_over(group, rank):
    averager = hierarchical({1: 2, 2: 4}, group=group)
    params = np.full(3, float(rank))
    state, path = averager.init(params), []
    for _ in range(3):
        params, state = averager.update(params + rank, state)
        path.append(float(params[0]))
    assert block_of(group, 2) is block_of(group, 2)  # made once
    return path


def by_hand():
    thetas, found = [0.0, 1.0, 2.0, 3.0], []
    for step in range(3):
        thetas = [theta + rank for rank, theta in enumerate(thetas)]
        size = 2 if step % 2 else 4
        thetas = [sum(thetas[rank // size * size :][:size]) / size for rank in range(4)]
        found.append(thetas)
    return [list(path) for path in zip(*found, strict=True)]


def over_gloo(rank):
    from torch.distributed.device_mesh import init_device_mesh

    reverse = dist.new_group([3, 2, 1, 0])
    own = as_collective(reverse).rank
    return (
        hierarchy_over(None, rank),
        hierarchy_over(init_device_mesh("cpu", (4,)), rank),
        (own, hierarchy_over(reverse, own)),
    )


def test_blocks_of_torch_groups():
    wanted = by_hand()
    for rank, (world, mesh, (own, reverse)) in enumerate(run_processes(4, over_gloo)):
        assert world == mesh == wanted[rank]
        assert reverse == wanted[own]


def blocks_of_a_part(rank):
    part = dist.new_group([0, 2, 3, 4])
    if rank == 1:
        return None
    own = as_collective(part).rank
    return own, hierarchy_over(part, own)


def test_blocks_of_a_part_of_the_ranks():
    wanted = by_hand()
    results = run_processes(5, blocks_of_a_part)
    assert all(path == wanted[own] for own, path in results[:1] + results[2:])


def over_mpi(comm):
    return hierarchy_over(comm, comm.rank)


@pytest.mark.mpi
def test_blocks_of_mpi_communicators():
    assert mpi.run_mpi(4, over_mpi) == by_hand()


def test_blocks_of_threads():
    assert run_ranks(4, lambda group: hierarchy_over(group, group.rank)) == by_hand()

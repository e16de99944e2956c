"""States are plain trees: whatever saves trees saves them, and training goes on to the last bit."""

import numpy as np
import optree
import pytest
from helpers import averaging
from helpers.averaging import RATE, x64
from helpers.frameworks import jax, optax, torch

from funcavg import averagers, diloco, outer
from funcavg.testing import run_ranks

MAKERS = {
    **{name: method.make for name, method in averaging.METHODS.items()},
    "sgd": lambda g: diloco(4, outer=outer.sgd(1.0), group=g),
    "torch": lambda g: diloco(4, outer=lambda p: torch.optim.AdamW(p, lr=0.1), group=g),
    "optax": lambda g: diloco(4, outer=optax.adam(0.1), group=g),
}


def with_torch(tree, folder):
    """The state as it is; `torch.load` must be told of the classes, which are not torch's."""
    torch.save(tree, folder / "state.pt")
    classes = [getattr(averagers, name) for name in averagers.__all__ if name.endswith("State")]
    torch.serialization.add_safe_globals([*classes, outer.MomentumState])
    return torch.load(folder / "state.pt", weights_only=True)


def with_numpy(tree, folder):
    """Its leaves alone: the structure is that of the state at hand."""
    leaves, structure = optree.tree_flatten(tree)
    np.savez(folder / "state.npz", *map(np.asarray, leaves))
    return optree.tree_unflatten(structure, list(np.load(folder / "state.npz").values()))


def with_numpy_into_tensors(tree, folder):
    restored = with_numpy(tree, folder)
    return optree.tree_map(lambda old, new: torch.from_numpy(new) if torch.is_tensor(old) else new, tree, restored)


def with_numpy_into_jax(tree, folder):
    return optree.tree_map(jax.numpy.asarray, with_numpy(tree, folder))


def with_safetensors(tree, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    leaves, structure = optree.tree_flatten(tree)
    named = {f"{i:05}": torch.as_tensor(leaf).contiguous() for i, leaf in enumerate(leaves)}
    safetensors.save_file(named, folder / "state.safetensors")
    return optree.tree_unflatten(
        structure, [leaf for _, leaf in sorted(safetensors.load_file(folder / "state.safetensors").items())]
    )


def with_orbax(tree, folder):
    orbax = pytest.importorskip("orbax.checkpoint")
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", tree)


CASES = [
    *((name, "torch", with_torch) for name in (*averaging.METHODS, "sgd", "torch")),
    *((name, "numpy", with_numpy) for name in (*averaging.METHODS, "sgd")),
    *((name, "torch", with_numpy_into_tensors) for name in ("diloco", "torch")),
    *((name, "torch", with_safetensors) for name in ("periodic", "diloco")),
    *((name, "jax", with_numpy_into_jax) for name in ("periodic", "diloco", "optax")),
]


def resume(name, framework, keep, group, folder, *, half=6, steps=14):
    """Train without a break, and with one in the middle of a period; return both ends."""
    own, rank = averaging.FRAMEWORKS[framework], group.rank
    folder = folder / str(rank)
    folder.mkdir()

    def go_on(params, state, steps):
        averager = MAKERS[name](group)
        state = averager.init(params) if state is None else state
        for _ in range(steps):
            params = {"theta": params["theta"] - RATE * averaging.gradient(params["theta"], rank, own)}
            params, state = averager.update(params, state)
        return params, state

    with x64(framework):
        params = {"theta": own(averaging.STARTS[rank])}
        whole = go_on(params, None, steps)
        saved = go_on(params, None, half)
        restored = keep(saved, folder)
        resumed = go_on(*restored, steps - half)
        return [np.asarray(tree[0]["theta"]).tobytes() for tree in (whole, resumed)]


@pytest.mark.parametrize(("name", "framework", "keep"), CASES)
def test_resuming_in_the_middle_of_a_period_is_exact_to_the_last_bit(name, framework, keep, tmp_path):
    (whole, resumed), (other, other_resumed) = run_ranks(
        2, lambda group: resume(name, framework, keep, group, tmp_path), timeout=100
    )
    assert whole == resumed
    assert other == other_resumed


@pytest.mark.parametrize("name", ["periodic", "diloco"])
def test_with_orbax(name, tmp_path):
    (ends,) = run_ranks(1, lambda group: resume(name, "jax", with_orbax, group, tmp_path), timeout=100)
    assert ends[0] == ends[1]


def test_another_number_of_ranks_goes_on_from_a_diloco_state(tmp_path):
    """Saved by one of two ranks right after a synchronisation, where the parameters are the anchor; then three."""

    def train(group, params, state, steps):
        averager = diloco(4, group=group)
        state = averager.init(params) if state is None else state
        for _ in range(steps):
            params, state = averager.update(params - RATE * averaging.gradient(params, group.rank), state)
        return params, state

    saved = run_ranks(2, lambda group: train(group, averaging.STARTS[0], None, 8))
    assert saved[0][0].tobytes() == saved[1][0].tobytes() == saved[0][1].anchor.tobytes()
    one, other = (optree.tree_leaves(state) for _, state in saved)
    assert [np.asarray(leaf).tobytes() for leaf in one] == [np.asarray(leaf).tobytes() for leaf in other]
    params, state = with_numpy(saved[1], tmp_path)
    ends = run_ranks(3, lambda group: train(group, params, state, 4))
    assert len({end.tobytes() for end, _ in ends}) == 1
    # By hand: four local steps each, then the outer step with the old momentum.
    thetas = []
    for rank in range(3):
        theta = params
        for _ in range(4):
            theta = theta - RATE * averaging.gradient(theta, rank)
        thetas.append(theta)
    delta = averaging.mean([params - theta for theta in thetas])
    momentum = 0.9 * state.outer.momentum + delta
    np.testing.assert_array_equal(ends[0][0], params - 0.7 * (delta + 0.9 * momentum))

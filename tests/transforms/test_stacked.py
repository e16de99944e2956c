"""Replicas stacked along an axis: torch, NumPy and JAX, as many ranks would average them."""

import warnings

import ml_dtypes
import numpy as np
import pytest
from helpers.frameworks import jax, jnp, torch

from funcavg import average, should_average, stacked, start_average
from funcavg.testing import run_ranks

FRAMEWORKS = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jnp.asarray}
WEIGHTS = [1.0, 0.0, 2.5]


def replicas(size, dtype="float32", shape=(5, 4)):
    rng = np.random.default_rng(size)
    values = rng.normal(size=(size, *shape))
    return (values + 1j * values[::-1] if dtype.startswith("complex") else values).astype(dtype)


def bits(array):
    return np.ascontiguousarray(np.asarray(array)).tobytes()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "complex64"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_bits_are_those_of_as_many_ranks(framework, dtype, axis, weights):
    own = FRAMEWORKS[framework]
    values = replicas(3, dtype)
    leaf = own(np.ascontiguousarray(np.moveaxis(values, 0, axis)))
    before = np.asarray(leaf).copy()
    result = average({"w": leaf, "n": 7}, stacked(axis), weight=weights)
    assert type(result["w"]) is type(leaf)
    assert (result["w"].dtype, result["w"].shape, result["n"]) == (leaf.dtype, leaf.shape, 7)
    ranks = run_ranks(
        3, lambda group: average(values[group.rank], group, weight=None if weights is None else weights[group.rank])
    )
    if dtype == "float64" and framework == "jax":  # without x64
        ranks = [rank.astype("float32") for rank in ranks]
        np.testing.assert_allclose(np.moveaxis(np.asarray(result["w"]), axis, 0), ranks, rtol=1e-6)
    else:
        assert bits(np.moveaxis(np.asarray(result["w"]), axis, 0)) == bits(ranks)
    assert bits(leaf) == bits(before)


@pytest.mark.parametrize("leaf", [torch.tensor, jnp.asarray], ids=["torch", "jax"])
def test_narrow_leaves(leaf):
    dtype = torch.bfloat16 if leaf is torch.tensor else jnp.bfloat16
    result = average(leaf([[256.0, 1.0], [2.0, 1.0]], dtype=dtype), stacked())
    assert result.tolist() == [[129.0, 1.0]] * 2
    assert average(np.ones((2, 3), ml_dtypes.float8_e4m3fn), stacked()).dtype == ml_dtypes.float8_e4m3fn


def test_donated_leaves_are_written_to():
    leaves = [np.array([[0.0, 2.0], [2.0, 4.0]]), torch.tensor([[0.0, 2.0], [2.0, 4.0]])]
    for result, leaf in zip(average(leaves, stacked(), donate=True), leaves, strict=True):
        assert result is leaf
        assert leaf.tolist() == [[1.0, 3.0]] * 2


@pytest.mark.parametrize("own", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
def test_leaves_that_lie_apart_in_memory(own):
    """Strided, read-only, and of one number a replica: through memory of their own, and donated as well."""
    memory = np.arange(12, dtype=np.float32)
    for leaf in (own(memory[::3]), own(memory[:8].reshape(4, 2)[:, 1]), own(memory).reshape(4, 3)[:, ::2]):
        before = np.asarray(leaf).copy()
        wanted = np.broadcast_to(before.mean(0, keepdims=True), before.shape)
        np.testing.assert_array_equal(average(leaf, stacked()), wanted)
        np.testing.assert_array_equal(leaf, before)
        assert average(leaf, stacked(), donate=True) is leaf
        np.testing.assert_array_equal(leaf, wanted)
    frozen = np.arange(4.0)
    frozen.flags.writeable = False
    assert average(frozen, stacked()).tolist() == [1.5] * 4


def test_what_passes_through():
    tree = {"f": 2.5, "i": np.arange(3), "key": jax.random.key(0), "none": None, "s": "text", "w": np.eye(2)}
    result = average(tree, stacked(), where=lambda path: path != ("s",))
    assert all(result[name] is tree[name] for name in ("i", "key", "none", "s"))
    assert (result["f"], result["w"].tolist()) == (2.5, [[0.5, 0.5]] * 2)
    assert average({}, stacked()) == {}
    assert average([np.ones((2, 0)), 1.0], stacked())[0].shape == (2, 0)


def test_parameters_ties_and_handles():
    weight = torch.nn.Parameter(torch.tensor([[0.0], [2.0]]))
    with torch.no_grad():
        result = average([weight, weight], stacked())
    assert type(result[0]) is torch.nn.Parameter
    assert result[0] is result[1]
    assert start_average(weight.detach(), stacked()).wait().tolist() == [[1.0], [1.0]]


def test_derivatives_in_torch():
    x = torch.from_numpy(replicas(3, "float64", (4,)))
    shares = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)

    def loss(x, weight):
        return (average({"x": x}, stacked(), weight=weight)["x"] ** 3).sum()

    for weight, share in ((None, torch.full((3,), 1 / 3, dtype=torch.float64)), (WEIGHTS, shares)):
        mean = (share[:, None] * x).sum(0)
        wanted = share[:, None] * 3 * (3 * mean**2)  # three replicas have the same cotangent
        torch.testing.assert_close(torch.func.grad(loss)(x, weight), wanted)
        leaf = x.clone().requires_grad_()
        loss(leaf, weight).backward()
        torch.testing.assert_close(leaf.grad, wanted)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), (0, None))(x[None], weight)[0], wanted)
        pushed = torch.func.jvp(lambda x, w=weight: average(x, stacked(), weight=w), (x,), (x,))[1]
        torch.testing.assert_close(pushed, mean.expand(3, 4))
    x[1] = torch.nan  # of weight 0: never read
    assert not torch.func.grad(loss)(x, WEIGHTS).isnan().any()


def test_under_jax():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        x = jnp.asarray(replicas(3, "float32", (4,)))
        for weight in (None, WEIGHTS):
            mean = np.average(np.asarray(x), 0, weight)
            result = jax.jit(lambda x, w=weight: average({"x": x, "n": 3}, stacked(), weight=w)["x"])(x)
            np.testing.assert_allclose(result, [mean] * 3, rtol=1e-5)
            share = np.asarray(WEIGHTS if weight else [1.0] * 3) / np.sum(weight or 3)
            grad = jax.grad(lambda x, w=weight: (average(x, stacked(), weight=w) ** 2).sum())(x)
            np.testing.assert_allclose(grad, np.outer(share, 6 * mean), rtol=1e-5)
        huge = jax.jit(lambda x: average(x, stacked(), weight=[1e39 * weight for weight in WEIGHTS]))(x)
        np.testing.assert_allclose(huge, [mean] * 3, rtol=1e-5)
        traced = jax.jit(lambda x, w: average(x, stacked(-2), weight=w))(x, jnp.asarray(WEIGHTS))
        np.testing.assert_allclose(traced, [mean] * 3, rtol=1e-5)


def test_local_sgd_of_replicas_is_that_of_ranks():
    """The same loop, once with a rank for each replica and once with all of them on one device."""
    data = torch.from_numpy(replicas(4, "float64", (12, 3)))  # replica, step, features

    def loss(params, x):
        return ((params["w"] @ x + params["b"] - x.sum()) ** 2).sum()

    def train(group, params, batches, grad):
        for step, x in enumerate(batches):
            grads = grad(params, x)
            params = {name: params[name] - 0.05 * grads[name] for name in params}
            if should_average(step, warmup=1, period=3):
                params = average(params, group)
        return params

    start = {"w": torch.ones(2, 3, dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    ranks = run_ranks(4, lambda group: train(group, start, data[group.rank], torch.func.grad(loss)))
    many = {name: torch.stack([leaf] * 4) for name, leaf in start.items()}
    together = train(stacked(), many, data.transpose(0, 1), torch.func.vmap(torch.func.grad(loss)))
    for name, leaf in together.items():
        torch.testing.assert_close(leaf, torch.stack([rank[name] for rank in ranks]), rtol=1e-13, atol=1e-13)


def test_stack_module_state():
    models = [torch.nn.Linear(3, 2) for _ in range(4)]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's
        params, buffers = torch.func.stack_module_state(models)
        result = average((params, buffers), stacked())[0]
    torch.testing.assert_close(result["weight"][2], torch.stack([model.weight for model in models]).mean(0))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: stacked(1.0), TypeError, "stacked: axis must be an integer, got 1.0 of type float"),
        (lambda: stacked(True), TypeError, "stacked: axis must be an integer, got True of type bool"),
        (
            lambda: average({"w": np.zeros((), np.float32)}, stacked()),
            ValueError,
            r"\['w'\]: float32\[\] has no such",
        ),
        (
            lambda: average([np.ones((2, 3))], stacked(2)),
            ValueError,
            r"stacked\(axis=2\), but .*\[0\]: float64\[2, 3\]",
        ),
        (
            lambda: average({"a": np.ones((2, 3)), "b": torch.ones(3)}, stacked()),
            ValueError,
            r"different numbers of replicas: 2 in .*\['a'\]: float64\[2, 3\], 3 in .*\['b'\]: float32\[3\]",
        ),
        (lambda: average(np.ones(2), stacked(), weight=1.0), TypeError, "one number for each, got 1.0"),
        (lambda: average(np.ones(2), stacked(), weight=[1.0]), ValueError, "weight has 1 numbers for 2 stacked"),
        (lambda: average(np.ones(2), stacked(), weight=[1.0, -1.0]), ValueError, "at least 0, got -1.0"),
        (
            lambda: average(np.ones(2), stacked(), weight=[0, 0]),
            ValueError,
            "of all 2 stacked replicas are 0",
        ),
        (lambda: average({"w": "text"}, stacked()), TypeError, r"\['w'\] is a str: 'text'"),
        (
            lambda: average(np.ones(2), stacked, weight=[1, 1]),
            TypeError,
            r"or funcavg.stacked\(\), got <function stacked",
        ),
        (
            lambda: jax.jit(lambda w: average(np.ones(2), stacked(), weight=w))(jnp.ones(2)),
            TypeError,
            "a traced weight is for JAX leaves",
        ),
        (
            lambda: torch.func.grad(lambda x: average(x, stacked(), donate=True).sum())(torch.ones(2)),
            ValueError,
            "donate=True under torch.func",
        ),
    ],
)
def test_what_is_refused(call, kind, words):
    with pytest.raises(kind, match=words):
        call()

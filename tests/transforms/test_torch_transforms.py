"""average as a function that torch differentiates and vectorises. The loss is the sum over ranks."""

import os

import numpy as np
import pytest
import torch
from helpers import mpi
from helpers.processes import run_processes
from torch.func import grad, jacrev, jvp, vjp, vmap

from funcavg import TreeMismatchError, average
from funcavg.testing import run_ranks

SIZE = 3
WEIGHTS = (1.0, 0.0, 2.5)


def start(rank):
    return torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64) * (rank + 1)


def weighted(values, weights=None):
    weights = weights or [1.0] * len(values)
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def adjoint(rank, cotangents, weights=None):
    """x̄_i = (w_i / Σw) Σ_j ȳ_j."""
    weights = weights or [1.0] * len(cotangents)
    return weights[rank] / sum(weights) * sum(cotangents)


def compositions(rank, size, group, weights, *, forward_mode):
    """Return {name: (got, expected)} on one rank; rank r weighs its loss by r + 1, so cotangents differ."""
    weight = None if weights is None else weights[rank]
    x, everyone = start(rank), [start(r) for r in range(size)]
    mean = weighted(everyone, weights)

    def mean_of(leaf):
        return average({"a": leaf, "n": 7}, group, weight=weight)["a"]

    def loss(leaf):
        return (rank + 1) * (mean_of(leaf) ** 2).sum()

    cotangents = [(r + 1) * 2 * mean for r in range(size)]
    batch = torch.stack([x, 2 * x])
    ours = {}
    ours["grad"] = grad(loss)(x), adjoint(rank, cotangents, weights)
    value, pull = vjp(mean_of, x)
    ours["vjp, forward"] = value, mean
    ours["vjp"] = (
        pull((rank + 1) * torch.ones(3, dtype=x.dtype))[0],
        adjoint(rank, [(r + 1) * torch.ones(3, dtype=x.dtype) for r in range(size)], weights),
    )
    if forward_mode:
        value, push = jvp(mean_of, (x,), (x**2,))
        ours["jvp, forward"] = value, mean
        ours["jvp"] = push, weighted([start(r) ** 2 for r in range(size)], weights)
    ours["vmap"] = vmap(mean_of)(batch), torch.stack([mean, 2 * mean])
    ours["vmap, another dimension"] = vmap(mean_of, in_dims=1, out_dims=1)(batch.T), torch.stack([mean, 2 * mean]).T
    ours["vmap(grad)"] = (
        vmap(grad(loss))(batch),
        torch.stack([adjoint(rank, cotangents, weights), adjoint(rank, [2 * c for c in cotangents], weights)]),
    )
    ours["grad(vmap)"] = grad(lambda b: (rank + 1) * (vmap(mean_of)(b) ** 2).sum())(batch), ours["vmap(grad)"][1]
    eye = torch.eye(3, dtype=x.dtype)
    ours["jacrev"] = jacrev(mean_of)(x), adjoint(rank, [eye] * size, weights)
    # The gradients sum to Σ_r 2 (r + 1) m over ranks, m the mean, so that is what the outer gradient is taken of.
    slope = sum(2 * (r + 1) for r in range(size)) * torch.ones(3, dtype=x.dtype)
    ours["grad(grad)"] = grad(lambda leaf: grad(loss)(leaf).sum())(x), adjoint(rank, [slope / size] * size, weights)
    leaf = x.clone().requires_grad_()
    loss(leaf).backward()
    ours["backward"] = leaf.grad, ours["grad"][1]
    return ours


def check(ours):
    for name, (got, expected) in ours.items():
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_compositions_over_threads(weights):
    # Not forward mode: torch keeps its level per process, so that two threads cannot be inside jvp at once.
    run_ranks(SIZE, lambda group: check(compositions(group.rank, SIZE, group, weights, forward_mode=False)))


def test_forward_mode_with_one_thread():
    run_ranks(1, lambda group: check(compositions(0, 1, group, None, forward_mode=True)))


def compositions_over_gloo(rank):
    for weights in (None, (1.0, 3.0)):
        check(compositions(rank, 2, None, weights, forward_mode=True))


def test_compositions_over_gloo():
    run_processes(2, compositions_over_gloo)


def compositions_over_mpi(comm):
    for weights in (None, (1.0, 3.0)):
        check(compositions(comm.rank, 2, comm, weights, forward_mode=True))


@pytest.mark.mpi
def test_compositions_over_mpi():
    mpi.run_mpi(2, compositions_over_mpi)


def test_gradient_against_finite_differences():
    def total_loss(shift):
        """Return the sum over ranks of a loss, with one element of rank 1's leaf moved."""

        def fn(group):
            leaf = start(group.rank)
            if group.rank == 1:
                leaf[0] += shift
            mean = average(leaf, group, weight=1 + group.rank)
            result = (mean * mean * mean).sum() * (group.rank + 1)
            return result.item()

        return sum(run_ranks(SIZE, fn))

    def fn(group):
        return grad(lambda x: (average(x, group, weight=1 + group.rank) ** 3).sum() * (group.rank + 1))(
            start(group.rank)
        )

    step = 1e-5
    measured = (total_loss(step) - total_loss(-step)) / (2 * step)
    assert abs(run_ranks(SIZE, fn)[1][0].item() - measured) < 1e-6


def test_a_rank_of_weight_0_gets_zeros_whatever_the_cotangents():
    def fn(group):
        pull = vjp(lambda x: average(x, group, weight=WEIGHTS[group.rank]), start(group.rank))[1]
        return pull(torch.full((3,), float("nan"), dtype=torch.float64))[0]

    results = run_ranks(SIZE, fn)
    assert torch.equal(results[1], torch.zeros(3, dtype=torch.float64))
    assert results[0].isnan().all()


def test_double_backward():
    def fn(group):
        leaf = start(group.rank).requires_grad_()
        first = torch.autograd.grad((average(leaf, group) ** 3).sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), leaf)[0]

    mean = weighted([start(r) for r in range(2)])
    for result in run_ranks(2, fn):  # first = 3 m², its sum over elements and ranks: d/dx_i = Σ_j 6 m / N
        torch.testing.assert_close(result, 6 * mean)


def test_without_grad_mode_there_is_no_graph_and_parameters_stay_parameters():
    def fn(group):
        tree = {
            "p": torch.nn.Parameter(torch.ones(2)),
            "frozen": torch.nn.Parameter(torch.ones(2), requires_grad=False),
            "t": torch.ones(2, requires_grad=True),
            "plain": torch.ones(2),
        }
        with torch.no_grad():
            result = average(tree, group)
        return [(type(leaf), leaf.requires_grad, leaf.grad_fn) for leaf in result.values()]

    parameter, tensor = torch.nn.Parameter, torch.Tensor
    expected = [(parameter, True, None), (parameter, False, None), (tensor, True, None), (tensor, False, None)]
    assert run_ranks(2, fn) == [expected, expected]


def test_mixed_trees_under_grad():
    def fn(group):
        def loss(x):
            tree = average({"t": x, "n": np.full(2, float(group.rank)), "f": float(group.rank), "i": 3}, group)
            assert tree["n"].tolist() == [0.5, 0.5]
            assert (tree["f"], tree["i"]) == (0.5, 3)
            return (tree["t"] ** 2).sum()

        return grad(loss)(torch.ones(2))

    assert all(torch.equal(result, torch.full((2,), 2.0)) for result in run_ranks(2, fn))


def test_complex_leaves():
    def fn(group):
        leaf = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128) * (group.rank + 1)
        leaf.requires_grad_()
        average(leaf.conj(), group).abs().pow(2).sum().backward()
        return leaf.grad

    mean = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128) * 1.5
    for result in run_ranks(2, fn):
        torch.testing.assert_close(result, 2 * mean)


@pytest.mark.parametrize("transform", [grad, lambda f: lambda x: f(x.requires_grad_())])
def test_donation_is_refused_on_every_rank(transform):
    def fn(group):
        def loss(x):
            return average([x], group, donate=group.rank == 1)[0].sum()

        with pytest.raises(ValueError, match=r"rank 1: donate=True (under torch.func transforms|, but)"):
            transform(loss)(torch.ones(3))
        return average(1.0, group)

    assert run_ranks(2, fn) == [1.0, 1.0]


def test_mistakes_reach_all_ranks_from_inside_a_transform():
    def fn(group):
        with pytest.raises(TypeError, match=r"rank 0: 1 of 2 leaves .* params_tree\[1\] is a str: 'text'"):
            grad(lambda x: average([x, "text" if group.rank == 0 else 1], group)[0].sum())(torch.ones(3))
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def mistakes_over_gloo(rank, node):
    """Agreement is made of tensors, which no transform may take for its own; here at the first call on the group."""
    os.environ["FUNCAVG_NODE"] = node

    def odd_leaf(x):
        return average({"x": x, "y": "text" if rank == 1 else 1.0})["x"].sum()

    def odd_tree(x):
        return average({"x": x, "y": 1.0} if rank else {"x": x})["x"].sum()

    words = []
    for transform in (torch.func.grad, torch.func.vmap, lambda fn: torch.func.vmap(torch.func.grad(fn))):
        for fn, kind in ((odd_leaf, TypeError), (odd_tree, TreeMismatchError)):
            with pytest.raises(kind) as caught:
                transform(fn)(torch.ones(2, 3) if transform is not torch.func.grad else torch.ones(3))
            words.append(str(caught.value))
    assert torch.func.grad(lambda x: x.sum() * average(float(rank)))(torch.ones(2)).tolist() == [0.5, 0.5]
    return words


@pytest.mark.parametrize("node", ["one", "off"])
def test_mistakes_inside_a_transform_reach_all_processes(node):
    one, other = run_processes(2, mistakes_over_gloo, node)
    assert one == other

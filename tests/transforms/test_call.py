"""A tree is taken apart once, and described once, whichever way it goes."""

import numpy as np
import optree
import pytest
from helpers.frameworks import jax, jnp, torch
from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE

from funcavg import average, stacked, start_average
from funcavg._trees import request
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


def gradient(tree, group):
    leaf = tree["w"].clone().requires_grad_()
    average({"w": leaf, "n": 1}, group)


def tree(ones):
    return {"w": ones(3), "n": 1}


WAYS = {
    "plain": (lambda group: average(tree(np.ones), group), 1, 1),
    "donated": (lambda group: average(tree(torch.ones), group, donate=True), 1, 1),
    "begun": (lambda group: start_average(tree(np.ones), group).wait(), 1, 1),
    "replicas": (lambda _: average(tree(torch.ones), stacked()), 1, 1),
    "replicas and a number": (lambda _: average({**tree(torch.ones), "lr": 0.5}, stacked(), donate=True), 1, 1),
    "axis": (lambda _: jax.vmap(lambda w: average({"w": w}, "i"), axis_name="i")(jnp.ones(3)), 1, 1),
    "recorded": (lambda group: gradient(tree(torch.ones), group), 1, 1),
    "transformed": (
        lambda group: torch.func.grad(lambda w: average({"w": w}, group)["w"].sum())(torch.ones(3)),
        2,  # once for the cotangents, an average of its own
        2,
    ),
    "batched": (
        lambda group: torch.func.vmap(lambda w: average({"w": w}, group)["w"])(torch.ones(2, 3)),
        2,  # and as the batch that it is
        1,
    ),
    "traced": (
        lambda group: jax.jit(lambda tree: average(tree, group)["w"])(tree(jnp.ones)),
        2,
        1,
    ),  # and when the program runs
}


class Unwalkable:
    walks = 0


def walk(_):
    Unwalkable.walks += 1
    raise ValueError("cannot be walked")


optree.register_pytree_node(Unwalkable, walk, lambda _, children: children, namespace=GLOBAL_NAMESPACE)


def test_a_tree_that_cannot_be_walked_is_everyones_mistake_whatever_the_way():
    """While JAX traces the weight, too, which alone would choose JAX's way."""

    def fn(group):
        if group.rank == 1:
            return average(1.0, group, weight=1.0)
        return jax.jit(lambda weight: average(Unwalkable(), group, weight=weight))(jnp.float32(1))

    def on_this_rank(group):
        with pytest.raises(ValueError, match="average: rank 0: cannot be walked. Nothing was sent"):
            fn(group)
        with pytest.raises(ValueError, match="average: rank 0: cannot be walked. Nothing was sent"):
            start_average(Unwalkable() if group.rank == 0 else 1.0, group).wait()

    Unwalkable.walks = 0
    run_ranks(2, on_this_rank)
    assert Unwalkable.walks == 2


@pytest.mark.parametrize("way", WAYS)
def test_a_tree_is_taken_apart_once_and_described_once(way, monkeypatch):
    run, most_described, most_flattened = WAYS[way]
    run(Solo())  # whatever is done once for all
    seen = {"flattened": 0, "described": 0}

    def counted(what, function):
        def call(*args, **kwargs):
            seen[what] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(optree, "tree_flatten", counted("flattened", optree.tree_flatten))
    monkeypatch.setattr(request, "layout_of", counted("described", request.layout_of))
    run(Solo())
    assert 1 <= seen["described"] <= most_described
    assert 1 <= seen["flattened"] <= most_flattened

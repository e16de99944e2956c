"""A tree is taken apart once, and described once, whichever way it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optree
import pytest
import torch

from funcavg import average, stacked, start_average
from funcavg._trees import request
from funcavg.collectives import Solo


def gradient(tree, group):
    leaf = tree["w"].clone().requires_grad_()
    average({"w": leaf, "n": 1}, group)


NUMPY, TORCH, JAX = ({"w": leaf, "n": 1} for leaf in (np.ones(3), torch.ones(3), jnp.ones(3)))
WAYS = {
    "plain": (lambda group: average(NUMPY, group), 1, 1),
    "donated": (lambda group: average(TORCH, group, donate=True), 1, 1),
    "begun": (lambda group: start_average(NUMPY, group).wait(), 1, 1),
    "replicas": (lambda _: average(TORCH, stacked()), 1, 1),
    "axis": (lambda _: jax.vmap(lambda w: average({"w": w}, "i"), axis_name="i")(JAX["w"]), 1, 1),
    "recorded": (lambda group: gradient(TORCH, group), 1, 1),
    "transformed": (
        lambda group: torch.func.grad(lambda w: average({"w": w}, group)["w"].sum())(TORCH["w"]),
        2,  # once for the cotangents, an average of its own
        2,
    ),
    "traced": (lambda group: jax.jit(lambda tree: average(tree, group)["w"])(JAX), 2, 1),  # and when the program runs
}


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
    monkeypatch.setattr(request, "_layout_of", counted("described", request._layout_of))
    run(Solo())
    assert 1 <= seen["described"] <= most_described
    assert 1 <= seen["flattened"] <= most_flattened

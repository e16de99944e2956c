"""A tree is taken apart once, and described once, whichever way it goes."""

import numpy as np
import optree
import pytest
from helpers.frameworks import jax, jnp, torch

from funcavg import average, stacked, start_average
from funcavg._trees import request
from funcavg.collectives import Solo


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
    "axis": (lambda _: jax.vmap(lambda w: average({"w": w}, "i"), axis_name="i")(jnp.ones(3)), 1, 1),
    "recorded": (lambda group: gradient(tree(torch.ones), group), 1, 1),
    "transformed": (
        lambda group: torch.func.grad(lambda w: average({"w": w}, group)["w"].sum())(torch.ones(3)),
        2,  # once for the cotangents, an average of its own
        2,
    ),
    "traced": (
        lambda group: jax.jit(lambda tree: average(tree, group)["w"])(tree(jnp.ones)),
        2,
        1,
    ),  # and when the program runs
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

"""A tree like the last one is recognised by torch's own test; whatever has changed must be seen by it."""

import pytest
from helpers.frameworks import torch

from funcavg._trees import Options, flatten, make_request


def request(tree):
    return make_request(flatten(tree), Options())


def changed_data(leaf):
    leaf.data = torch.zeros(3, 4, dtype=torch.float64)
    return leaf


def marked(leaf):
    leaf.tensor_model_parallel = True
    return leaf


CHANGES = {
    "dtype": torch.Tensor.double,
    "dtype, in place": changed_data,
    "shape": lambda leaf: leaf.reshape(4, 3),
    "strides": lambda leaf: torch.zeros(4, 3).t(),
    "expanded": lambda leaf: torch.zeros(1, 4).expand(3, 4),
    "requires_grad": lambda leaf: leaf.requires_grad_(),
    "parameter": lambda leaf: torch.nn.Parameter(leaf, requires_grad=False),
    "meta": lambda leaf: leaf.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "complex": lambda leaf: leaf.to(torch.complex64),
    "integer": torch.Tensor.int,
    "another kind": lambda leaf: leaf.numpy(),
    "a number": lambda leaf: 1.0,
    "a part": marked,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_tree_that_has_changed_is_described_anew(change):
    tree = [torch.zeros(3, 4) for _ in range(5)]
    before = request(tree)
    assert request(tree).layout is before.layout
    assert request([torch.ones(3, 4) for _ in range(5)]).layout is before.layout
    tree[2] = CHANGES[change](tree[2])
    after = request(tree)
    assert after.layout is not before.layout
    tree[2] = torch.zeros(3, 4)
    assert request(tree).layout is before.layout


def test_ties_are_found_in_a_tree_that_is_recognised():
    tree = [torch.zeros(3, 4) for _ in range(5)]
    assert not request(tree).ties
    tree[4] = tree[1]
    assert request(tree).ties == {4: 1}
    tree[4] = tree[1].view(3, 4)
    assert request(tree).ties == {4: 1}


def test_without_torchs_test_signatures_are_compared(monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    tree = {"another structure": [torch.zeros(3, 4) for _ in range(5)]}
    before = request(tree)
    assert request(tree).layout is before.layout
    tree["another structure"][2] = torch.zeros(3, 4, dtype=torch.float64)
    assert request(tree).layout is not before.layout

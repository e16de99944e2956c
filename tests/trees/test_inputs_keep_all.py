"""Whatever a user's objects could do before a call, they and the results can do after it."""

import os
import time
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import mpi
from helpers.processes import run_processes

from funcavg import (
    HierarchicalModelAverager,
    PeerLostError,
    PeriodicModelAverager,
    average,
    diloco,
    hierarchical,
    outer,
    periodic,
    stacked,
    start_average,
)
from funcavg._trees import flatten
from funcavg._trees.arrays.torch import Tensors
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

SIZES = [0, 5, 300_000, 1_200_000]  # elements of 4 bytes: none, a few, from 1 MiB on moved in place, from 4 MiB on huge
BFLOAT = 700_001


def tree_of(rank):
    leaves = {f"f{size}": torch.full((size,), float(rank)) for size in SIZES}
    leaves["c"] = torch.full((300_000,), 1j * rank)
    leaves["b"] = torch.full((BFLOAT,), rank, dtype=torch.bfloat16)
    leaves["t"] = torch.full((600, 700), float(rank)).t()
    return leaves


def parameters_of(rank):
    parameters = [torch.nn.Parameter(leaf) for name, leaf in tree_of(rank).items() if name != "f0"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    return parameters


def by_stand_in(make, rank, group):
    parameters = parameters_of(rank)
    make(group).average_parameters(parameters)
    return parameters


def by_averager(make, rank, group):
    averager, params = make(group), tree_of(rank)
    state = averager.init(params)
    for donate in (False, True):
        params, state = averager.update(params, state, donate=donate)
    return [tree_of(rank), params, state]


def of_gradients(rank, group):
    leaf = torch.full((300_000,), float(rank), requires_grad=True)
    mean = average({"w": leaf}, group)["w"]
    mean.sum().backward()
    return [leaf, mean, leaf.grad]


def of_replicas(rank, group):
    leaf = torch.arange(600_000.0).view(2, -1)
    return [leaf, average(leaf, stacked()), average(leaf, stacked(), donate=True), average(leaf, stacked(1))]


ENTRIES = {
    "average": average,
    "weighted": lambda tree, group: average(tree, group, weight=2.0),
    "donated": lambda tree, group: average(tree, group, donate=True),
    "begun": lambda tree, group: start_average(tree, group).wait(),
    "begun, donated": lambda tree, group: start_average(tree, group, donate=True).wait(),
}
OTHERS = {
    "periodic": partial(by_averager, lambda group: periodic(1, group=group)),
    "hierarchical": partial(by_averager, lambda group: hierarchical({1: group})),
    "diloco": partial(by_averager, lambda group: diloco(1, outer=outer.sgd(1.0), group=group)),
    "gradients": of_gradients,
    "replicas": of_replicas,
    "stand-in": partial(by_stand_in, lambda group: PeriodicModelAverager(1, process_group=group)),
}


def storages(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def fixed_after_calls(rank, group):
    """Return the names of ways in after which a storage, of an input or of a result, cannot be resized any more."""
    fixed = []
    for name, call in ENTRIES.items():
        tree = tree_of(rank)
        found = storages([tree, call(tree, group)])
        assert len(found) == 2 * len(tree)
        fixed += [name] * (not all(storage.resizable() for storage in found))
    for name, run in OTHERS.items():
        found = storages(run(rank, group))
        assert found
        fixed += [name] * (not all(storage.resizable() for storage in found))
    return fixed


def over_gloo(rank, node):
    os.environ["FUNCAVG_NODE"] = node
    found = storages(by_stand_in(lambda _: HierarchicalModelAverager({1: 2}), rank, None))
    return fixed_after_calls(rank, dist.group.WORLD) + ["hierarchical stand-in"] * (
        not all(storage.resizable() for storage in found)
    )


def over_mpi(comm):
    return fixed_after_calls(comm.rank, comm)


@pytest.mark.filterwarnings("ignore:When period is 1")
def test_over_threads():
    assert run_ranks(2, lambda group: fixed_after_calls(group.rank, group)) == [[], []]
    assert fixed_after_calls(0, Solo()) == []


@pytest.mark.parametrize("node", ["", "off"])
def test_over_gloo(node):
    assert run_processes(2, over_gloo, node) == [[], []]


@pytest.mark.mpi
@pytest.mark.parametrize("node", ["", "off"])
def test_over_mpi(node):
    assert mpi.run_mpi(2, over_mpi, FUNCAVG_NODE=node) == [[], []]


class Layer(torch.nn.Linear):
    """Files of version 1 have another weight than those of version 2, as layers of torchvision and mmcv do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, meta, *rest):
        if (meta.get("version") or 1) < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].T
        super()._load_from_state_dict(state_dict, prefix, meta, *rest)


def test_a_state_dict_keeps_the_versions_of_its_modules():
    module = torch.nn.Sequential(Layer(3, 3), torch.nn.ReLU())
    weight = module[0].weight.detach().clone()
    averager = diloco(1, group=Solo())
    for result in (
        average(module.state_dict(), Solo()),
        start_average(module.state_dict(), Solo()).wait(),
        average({"models": [module.state_dict(), 1]}, Solo())["models"][0],
        averager.update(module.state_dict(), averager.init(module.state_dict()))[0],
        average(module.state_dict(keep_vars=True), Solo()),  # recorded
    ):
        assert result._metadata == module.state_dict()._metadata
        module.load_state_dict(result)
        assert torch.equal(module[0].weight, weight)


def test_other_attributes_come_back_too():
    tree = OrderedDict(w=np.ones(2))
    tree.note = "mine"
    empty = torch.nn.ReLU().state_dict()
    result = average((tree, {"e": empty}), Solo())
    assert result[0].note == "mine"
    assert result[0] is not tree
    assert result[1]["e"]._metadata == empty._metadata


def test_memory_that_is_freed_under_way_is_an_error_and_no_crash():
    def fn(group):
        if group.rank == 1:
            time.sleep(0.5)
            return "late"
        leaves = [torch.ones(1_500_000) for _ in range(3)]
        handle = start_average(leaves, group, donate=True, timeout=5)
        for leaf in leaves:
            leaf.untyped_storage().resize_(0)
        with pytest.raises((RuntimeError, PeerLostError)):
            handle.wait()
        return "told"

    assert run_ranks(2, fn) == ["told", "late"]
    leaf = torch.ones(300_000)
    carrier = leaf.detach()
    leaf.untyped_storage().resize_(8)
    with pytest.raises(
        RuntimeError, match=r"of a tensor of shape \[300000\] has been freed: .* has 8 bytes now, of 1200000"
    ):
        Tensors().as_bytes(carrier)


def test_many_ordered_dicts_take_no_longer_than_dicts():
    def tree(kind):
        return kind((f"l{i}", kind(w=1.0)) for i in range(3000))

    def seconds(tree):
        flatten(tree)
        start = time.perf_counter()
        flatten(tree)
        return time.perf_counter() - start

    assert seconds(tree(OrderedDict)) < 20 * seconds(tree(dict))

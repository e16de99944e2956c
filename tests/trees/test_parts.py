"""What is a part of something is not averaged as if it were whole: FSDP, ZeRO-3, tensor parallelism."""

import functools
import gc
import os
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy, fully_shard

from funcavg import PeriodicModelAverager, TreeMismatchError, average, diloco, periodic, start_average
from funcavg.collectives import Solo
from funcavg.testing import run_ranks

CPU = torch.device("cpu")


def wrapped(rank, group=None, strategy=ShardingStrategy.FULL_SHARD):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return FSDP(module, group, use_orig_params=True, device_id=CPU, sharding_strategy=strategy)


def trained(module, rank):
    """Take a step, so that gradients are there."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.full((3, 4), 1.0 + rank)).sum().backward()
    optimizer.step()
    return optimizer


def with_grads(module):
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
        yield parameter


def heard(fn):
    try:
        fn()
    except Exception as error:
        return type(error), str(error)
    return "nothing"


def shards_are_refused(rank):
    module = wrapped(rank)
    parameters = dict(module.named_parameters())
    halves = FSDP(nn.Linear(4, 4, bias=False), use_orig_params=True, device_id=CPU)
    said = [
        heard(lambda: average({"w": halves.weight.detach()})),
        heard(lambda: PeriodicModelAverager(2).average_parameters([{"params": list(with_grads(halves))}])),
        heard(lambda: average({"w": module[0].weight.detach()})),
        heard(torch.no_grad()(lambda: average(parameters, donate=True))),
        heard(lambda: start_average({name: p.data for name, p in parameters.items()}).wait()),
        heard(lambda: diloco(1).init(parameters)),
    ]
    trained(module, rank)
    said.append(heard(lambda: PeriodicModelAverager(2).average_parameters(module.parameters())))
    return said


def test_shards_of_fsdp1_are_refused_on_every_rank_with_the_cure():
    one, other = run_processes(2, shards_are_refused)
    assert one == other
    for kind, words in one:
        assert kind is TreeMismatchError, words
        assert "(part 0 of 2 of an FSDP parameter)" in words
        assert "(part 1 of 2 of an FSDP parameter)" in words
        assert "average inside FullyShardedDataParallel.summon_full_params(module), or over a group of ranks" in words


def summoned(rank):
    """FSDP's ranks are pairs; the same rank of each pair holds the same shard, and forms a group of replicas."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    replicas = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    module = wrapped(rank, pairs[rank // 2])
    trained(module, rank // 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    mean = average(before | {}, replicas[rank % 2])  # copies: they carry no mark
    by_replicas = average({name: p.detach() for name, p in module.named_parameters()}, replicas[rank % 2])
    same = all(torch.equal(mean[name], by_replicas[name]) for name in mean)
    with FSDP.summon_full_params(module), torch.no_grad():
        full = {name: p.detach().clone() for name, p in module.named_parameters()}
        average(dict(module.named_parameters()), donate=True)
        averaged = {name: p.detach().clone() for name, p in module.named_parameters()}
    with FSDP.summon_full_params(module):
        kept = {name: p.detach().clone() for name, p in module.named_parameters()}
    kept_all = all(torch.equal(averaged[name], kept[name]) for name in kept)
    trained(module, rank)  # FSDP goes on: its storages can still be resized
    for parameter in module.parameters():
        parameter.grad = None
    return same, kept_all, {n: t.numpy() for n, t in full.items()}, {n: t.numpy() for n, t in averaged.items()}


def test_whole_parameters_and_replicas_of_shards_are_averaged():
    outcomes = run_processes(4, summoned)
    for same, kept, full, averaged in outcomes:
        assert same
        assert kept
        assert set(full) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        for name in full:
            expected = (outcomes[0][2][name] + outcomes[2][2][name]) / 2
            np.testing.assert_allclose(averaged[name], expected, rtol=1e-6)
            assert np.array_equal(averaged[name], outcomes[0][3][name])


def by_the_stand_in(rank):
    module = wrapped(rank)
    trained(module, rank)
    averager = PeriodicModelAverager(2)
    with FSDP.summon_full_params(module, with_grads=True):
        averager.average_parameters(module.parameters())
    plain = wrapped(rank, strategy=ShardingStrategy.NO_SHARD)  # DDP's strategy: parameters are whole
    with torch.no_grad():
        next(plain.parameters()).fill_(rank)
    return average(dict(plain.named_parameters()))["_fsdp_wrapped_module.0.weight"].unique().tolist()


def test_the_stand_in_averages_summoned_parameters_and_those_that_are_never_cut():
    assert run_processes(2, by_the_stand_in) == [[0.5], [0.5]]


def fsdp2(rank):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(400, 700, bias=False))  # of more than 1 MiB, and its parts, too
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    fully_shard(module, mesh=mesh)
    said = heard(lambda: average({"w": module[0].weight}))
    with torch.no_grad():
        module.unshard()
        module[0].weight.fill_(float(rank))
        average(dict(module.named_parameters()), donate=True)
        value = module[0].weight.unique().tolist()
        module.reshard()
    module(torch.ones(2, 400)).sum().backward()
    return said, value, tuple(module[0].weight.grad.to_local().shape)


def test_fsdp2_works_around_an_average():
    for said, value, shape in run_processes(2, fsdp2):
        assert said[0] is TreeMismatchError
        assert "S(0) at 0" in said[1]
        assert value == [0.5]
        assert shape == (350, 400)


def marked(values, **marks):
    parameter = nn.Parameter(torch.tensor(values))
    vars(parameter).update(marks)
    parameter.grad = torch.ones_like(parameter)
    return parameter


def partitioned(values, status, shape=(4, 4)):
    return marked(values, ds_id=3, ds_shape=torch.Size(shape), ds_status=types.SimpleNamespace(name=status))


def on_two_ranks(fn):
    return run_ranks(2, lambda group: heard(lambda: fn(group)))


@pytest.mark.filterwarnings("ignore:When period is 1")
def test_marks_of_zero_3_are_refused_until_gathered():
    for call in (
        lambda group: average({"w": partitioned([], "NOT_AVAILABLE"), "b": marked([1.0])}, group),
        lambda group: average([marked([1.0]), partitioned([2.0], "INFLIGHT")], group),
        lambda group: PeriodicModelAverager(1, process_group=group).average_parameters(
            [partitioned([], "NOT_AVAILABLE"), marked([1.0])]
        ),
    ):
        for kind, words in on_two_ranks(call):
            assert kind is TypeError
            assert "is a parameter of ZeRO-3, of whose [4, 4] elements this rank has none at hand" in words
            assert "deepspeed.zero.GatheredParameters" in words
    gathered = run_ranks(
        2, lambda group: average({"w": partitioned([float(group.rank)], "AVAILABLE", (1,)).detach()}, group)["w"].item()
    )
    assert gathered == [0.5, 0.5]


@pytest.mark.filterwarnings("ignore:When period is 1")
def test_marks_of_tensor_parallelism(monkeypatch):
    shard = functools.partial(marked, [1.0, 2.0], tensor_model_parallel=True, partition_dim=0, partition_stride=1)
    for call in (
        lambda group: average({"w": shard()}, group),
        lambda group: PeriodicModelAverager(1, process_group=group).average_parameters([shard()]),
    ):
        for kind, words in on_two_ranks(call):
            assert kind is TypeError
            assert "tensor-parallel shard (tensor_model_parallel=True, cut along dimension 0)" in words
            assert "pass parameter.detach()" in words
    whole = on_two_ranks(lambda group: average({"w": marked([1.0], tensor_model_parallel=False)}, group))
    assert whole == ["nothing", "nothing"]

    # Where Megatron says which shard this rank has, ranks of one shard may average, and others hear of it.
    local = {}
    parallel = types.SimpleNamespace(
        model_parallel_is_initialized=lambda: True,
        get_tensor_model_parallel_rank=lambda: local["rank"],
        get_tensor_model_parallel_world_size=lambda: 2,
    )
    monkeypatch.setitem(__import__("sys").modules, "megatron.core.parallel_state", parallel)
    local["rank"] = 1
    with torch.no_grad():
        replicas = run_ranks(2, lambda group: average({"w": shard()}, group)["w"].tolist())
    assert replicas == [[1.0, 2.0]] * 2


def test_leaves_without_a_single_element_are_an_error():
    for kind, words in on_two_ranks(lambda group: average({"a": torch.ones(0), "b": np.ones((2, 0)), "n": 1}, group)):
        assert kind is ValueError
        assert "rank 0: not one of the 2 averaged leaves has an element: params_tree['a']: float32[0], ..." in words
    assert average({"a": torch.ones(0), "b": 1.0}, Solo())["a"].shape == (0,)
    assert average({"n": 1}, Solo()) == {"n": 1}


def test_a_module_that_is_gone_leaves_no_trace():
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    from funcavg._trees.arrays import parts

    gc.collect()
    average({"w": torch.ones(1)}, Solo())
    assert len(parts._handles(FlatParamHandle)) == 0


def by_deepspeed(rank):
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        module = nn.Linear(4, 4)
    parameters = dict(module.named_parameters())
    said = [
        heard(torch.no_grad()(lambda: average(parameters))),
        heard(lambda: average({name: p.detach() for name, p in parameters.items()})),
    ]
    with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0), torch.no_grad():
        module.weight.fill_(rank)
        mean = average(dict(module.named_parameters()))["weight"].unique().tolist()
    return said, mean


def test_zero_3_itself():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    for said, mean in run_processes(2, by_deepspeed, timeout=110):
        assert [kind for kind, _ in said] == [TypeError, ValueError]
        assert "is a parameter of ZeRO-3" in said[0][1]
        assert "not one of the 2 averaged leaves has an element" in said[1][1]
        assert mean == [0.5]


def of_replicas_and_of_strangers(rank):
    """Each rank alone stands for a group of ranks that hold the same shard."""
    halves = FSDP(nn.Linear(4, 4, bias=False), use_orig_params=True, device_id=CPU)
    single = FSDP(nn.Linear(1, 1, bias=False), use_orig_params=True, device_id=CPU)  # of which one rank has nothing
    for make in (diloco, periodic):
        averager = make(1, group=Solo())
        params = {"w": halves.weight.detach()}
        state = averager.init(params)
        for _ in range(2):
            params, state = averager.update(params, state)
    with torch.no_grad():
        empty = average(dict(single.named_parameters()), Solo())
    halves(torch.ones(1, 4)).sum().backward()
    of_gradients = heard(lambda: average({"w": halves.weight.grad}))
    frozen = nn.Parameter(torch.ones(3))
    frozen._fsdp_flattened = True  # of a handle that nobody knows, as after gc.freeze()
    with pytest.warns(UserWarning, match=r"a parameter of FSDP of shape \[3\], of which cannot be told whether it is"):
        average({"w": frozen.detach().requires_grad_()} | {"v": frozen}, Solo())
    return [leaf.numel() for leaf in empty.values()], of_gradients


def test_shards_are_averaged_by_averagers_and_their_gradients_are_shards_too():
    outcomes = run_processes(2, of_replicas_and_of_strangers)
    assert sorted(sizes for sizes, _ in outcomes) == [[0], [1]]
    for _, (kind, words) in outcomes:
        assert kind is TreeMismatchError, words
        assert "part 0 of 2 of an FSDP parameter" in words

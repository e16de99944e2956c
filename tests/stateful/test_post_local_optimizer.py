"""PostLocalSGDOptimizer stands wherever an optimizer is expected: schedulers, closures, hooks, copies, trainers."""

import copy
import os
import pickle
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes

from funcavg import HierarchicalModelAverager, PeerLostError, PeriodicModelAverager, PostLocalSGDOptimizer
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


def made(group=None, kind=torch.optim.SGD, **options):
    model = torch.nn.Linear(2, 1)
    averager = PeriodicModelAverager(2, process_group=group or Solo())
    return model, PostLocalSGDOptimizer(kind(model.parameters(), **options), averager)


def take(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.5, step_size_up=2),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
        torch.optim.lr_scheduler.ReduceLROnPlateau,
    ],
)
def test_schedulers_reach_the_local_optimizer(scheduler):
    rates = []
    for wraps in (False, True):
        model, optimizer = made(lr=0.1, momentum=0.9)
        bound = scheduler(optimizer if wraps else optimizer.optim)
        seen = []
        for step in range(5):
            take(model, optimizer if wraps else optimizer.optim)
            bound.step(*[float(step)] * isinstance(bound, torch.optim.lr_scheduler.ReduceLROnPlateau))
            seen.append((optimizer.optim.param_groups[0]["lr"], optimizer.optim.param_groups[0].get("momentum")))
        rates.append(seen)
    assert rates[0] == rates[1]


def test_a_closure_computes_the_loss_again():
    def fn(group):
        model, optimizer = made(group, torch.optim.LBFGS, lr=0.1)
        calls = []

        def closure():
            optimizer.zero_grad()
            loss = (model(torch.ones(1, 2)) - group.rank).square().sum()
            loss.backward()
            calls.append(loss.item())
            return loss

        loss = optimizer.step(closure)
        assert loss.item() == calls[0]
        assert len(calls) > 1
        return model.weight.tolist()

    one, other = run_ranks(2, fn)
    assert one == other  # averaged after the step


def test_hooks_of_steps_and_states_run():
    model, optimizer = made(lr=0.1)
    said = []
    optimizer.register_step_pre_hook(lambda *_: said.append("before"))
    optimizer.register_step_post_hook(lambda *_: said.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"mine": 1})
    take(model, optimizer)
    assert said == ["before", "after"]
    assert optimizer.state_dict()["mine"] == 1
    assert optimizer.defaults is optimizer.optim.defaults
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = optimizer.nothing


def test_copies_have_a_step_of_their_own():
    model, optimizer = made(lr=0.1, momentum=0.9)
    take(model, optimizer)
    copied = copy.deepcopy(optimizer)
    take(model, optimizer)
    assert (optimizer.averager.step, copied.averager.step) == (2, 1)
    assert copied.averager.process_group is optimizer.averager.process_group
    assert copied.param_groups[0]["params"][0] is not optimizer.param_groups[0]["params"][0]
    assert len(copied.state) == len(optimizer.state) == 2


def pickled(rank):
    model = torch.nn.Linear(2, 1)
    optimizer = PostLocalSGDOptimizer(torch.optim.Adam(model.parameters()), PeriodicModelAverager(2, timeout=7))
    take(model, optimizer)
    loaded = pickle.loads(pickle.dumps(optimizer))
    other = PeriodicModelAverager(2, process_group=dist.new_group([0, 1]))
    hierarchy = HierarchicalModelAverager({2: 1, 4: 2})
    refusals = []
    for averager in (other, hierarchy):
        try:
            pickle.dumps(averager)
        except TypeError as error:
            refusals.append(str(error))
    copies = [copy.deepcopy(averager) for averager in (other, hierarchy)]
    return (
        (loaded.averager.step, loaded.averager.timeout, loaded.averager.process_group is dist.group.WORLD),
        len(loaded.state),
        refusals,
        [c.process_group is a.process_group for c, a in zip(copies, (other, hierarchy), strict=True)],
    )


def test_pickles_find_the_default_group_again_and_others_say_what_to_do():
    for averager, states, refusals, same in run_processes(2, pickled):
        assert averager == (1, 7.0, True)
        assert states == 2
        assert [words.partition(":")[0] for words in refusals] == ["PeriodicModelAverager", "HierarchicalModelAverager"]
        assert all("a process group cannot be pickled. Save state_dict()" in words for words in refusals)
        assert same == [True, True]


def trained_by_lightning(rank):
    import lightning
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(2, 1)

        def training_step(self, batch):
            return (self.model(batch[0]) - rank).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(3))
            return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)]

    torch.manual_seed(rank)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        plugins=LightningEnvironment(),  # asked to find out, it imports mpi4py, which raises where MPI has no library
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        barebones=False,
    )
    data = DataLoader(TensorDataset(torch.ones(28, 2)), batch_size=4)
    trainer.fit(module, data)
    return trainer.optimizers[0].averager.step, module.model.weight.tolist()


def test_lightning_trains_with_it():
    pytest.importorskip("lightning", reason="Lightning is not installed")
    (steps, one), (other_steps, other) = run_processes(2, trained_by_lightning, timeout=100)
    assert steps == other_steps == 7
    assert one == other  # the last step, of number 6, has averaged


def in_pairs(rank):
    """Of a default group whose timeout is 2 seconds, rank 1 of a pair comes late."""
    parent = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=2))
    averager = HierarchicalModelAverager({2: 2, 4: 4}, process_group=parent)
    averager.step = 2
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    if rank == 1:
        time.sleep(6)
        return None
    start = time.monotonic()
    try:
        averager.average_parameters([parameter])
    except PeerLostError as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


def test_groups_of_a_hierarchy_wait_as_long_as_their_parent():
    outcomes = run_processes(4, in_pairs)
    assert "of 2 s" in outcomes[0][0] or "waited 2 s" in outcomes[0][0], outcomes[0]
    assert 1.5 < outcomes[0][1] < 5
    assert outcomes[2][0] == outcomes[3][0] == "nothing"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_grad_scaler_unscales_before_a_fused_step(kind):
    """And does not take the wrapper for a fused optimizer, which would have to do so itself."""
    results = []
    for wraps in (False, True):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = kind([weight], lr=0.1, fused=True)
        if wraps:
            optimizer = PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(2, process_group=Solo()))
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        results.append(weight.item())
    assert results[0] == pytest.approx(results[1])
    assert results[1] == pytest.approx(0.9)


def test_copies_share_nothing_but_groups():
    class Mine(PeriodicModelAverager):
        pass

    averager = Mine(2, process_group=Solo())
    averager.seen = [1]
    copied = copy.deepcopy(averager)
    assert (copied.seen, copied.process_group is averager.process_group) == ([1], True)
    assert copied.seen is not averager.seen
    _, optimizer = made(lr=0.1)
    optimizer.mine = [2]
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert copy.deepcopy(optimizer).mine == [2]


def test_stand_ins_refuse_a_world_of_one_among_several_processes():
    code = """
import warnings; warnings.simplefilter("ignore")
import torch.distributed as dist, funcavg
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for make in (lambda: funcavg.PeriodicModelAverager(2), lambda: funcavg.HierarchicalModelAverager({2: 1})):
    try:
        make()
    except RuntimeError as error:
        print("has one rank here, but torchrun has started 2" in str(error))
funcavg.PeriodicModelAverager(2, process_group=dist.group.WORLD)
"""
    environ = os.environ | {"WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\nTrue\n", 0), done.stderr

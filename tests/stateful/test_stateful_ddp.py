"""Post-local SGD as torch documents it: DDP, its communication hook, and a model averager, on CPU."""

import io

import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager as TorchAverager
from torch.distributed.optim import PostLocalSGDOptimizer as TorchOptimizer
from torch.nn.parallel import DistributedDataParallel

from funcavg import PeriodicModelAverager, PostLocalSGDOptimizer

WARMUP, PERIOD, STEPS = 4, 3, 14
AVERAGED = [4, 7, 10, 13]


def train(rank, subgroup, kinds, steps=range(STEPS), checkpoint=None):
    """Train; return the parameters after every step, and a checkpoint."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    model = DistributedDataParallel(module)
    hook = PostLocalSGDState(process_group=None, subgroup=subgroup, start_localSGD_iter=WARMUP)
    model.register_comm_hook(hook, post_localSGD_hook)
    make_averager, make_optimizer = kinds
    local = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = make_optimizer(local, make_averager(period=PERIOD, warmup_steps=WARMUP))
    if checkpoint is not None:
        saved = torch.load(io.BytesIO(checkpoint))
        module.load_state_dict(saved["module"])
        optimizer.load_state_dict(saved["optimizer"])
        hook.iter = saved["hook"]  # torch saves it nowhere
    trace = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank))
        model(x).square().sum().backward()
        optimizer.step()
        trace.append(torch.cat([param.detach().reshape(-1).clone() for param in module.parameters()]))
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict(), "hook": hook.iter}, file)
    return trace, file.getvalue()


def both(rank, subgroup_size):
    subgroup, _ = dist.new_subgroups(group_size=subgroup_size)
    kinds = PeriodicModelAverager, PostLocalSGDOptimizer
    ours, _ = train(rank, subgroup, kinds)
    theirs, _ = train(rank, subgroup, (TorchAverager, TorchOptimizer))
    begun, checkpoint = train(rank, subgroup, kinds, range(9))  # in the middle of a period
    ended, _ = train(rank, subgroup, kinds, range(9, STEPS), checkpoint)
    return ours, theirs, begun + ended


@pytest.mark.parametrize(("size", "subgroup_size"), [(2, 1), (4, 2)])
def test_post_local_sgd(size, subgroup_size):
    ranks = run_processes(size, both, subgroup_size)
    for step in range(STEPS):
        ours = [rank[0][step] for rank in ranks]
        alike = [torch.equal(ours[0], other) for other in ours]
        if step < WARMUP or step in AVERAGED:
            assert all(alike)
        else:  # only subgroups are alike
            assert alike == [rank < subgroup_size for rank in range(size)]
        for mine, theirs, resumed in ranks:
            assert torch.equal(mine[step], resumed[step])
            if size == 2:
                assert torch.equal(mine[step], theirs[step])
            torch.testing.assert_close(mine[step], theirs[step], rtol=1e-5, atol=1e-6)

"""What needs a GPU is skipped without one; the decisions are pure functions, tested everywhere."""

import pytest
import torch
from processes import run_processes

from funcavg import average
from funcavg.collectives.torch import device_route
from funcavg.testing import run_ranks

gpu = pytest.mark.gpu
needs_one = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize(
    ("backend", "element", "weighted", "route"),
    [
        ("nccl", "float32", False, "average"),
        ("nccl", "float64", False, "average"),
        ("nccl", "float16", False, "exchange"),  # a ring would round at every hop
        ("nccl", "bfloat16", False, "exchange"),
        ("nccl", "float8_e4m3fn", False, "exchange"),
        ("nccl", "float32", True, "exchange"),  # the backend knows no weights
        ("gloo", "float32", False, "host"),
        (None, "bfloat16", True, "host"),
    ],
)
def test_which_way_leaves_of_an_accelerator_take(backend, element, weighted, route):
    assert device_route(backend, element, weighted=weighted) == route


@gpu
@needs_one
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("donate", [False, True])
def test_cuda_leaves_pass_through_the_host_where_the_transport_knows_no_gpu(dtype, donate):
    def fn(group):
        leaf = torch.full((1000, 7), 1 + group.rank, dtype=dtype, device="cuda")
        with torch.no_grad():
            result = average({"w": leaf}, group, donate=donate)["w"]
        return result is leaf, result

    for same, result in run_ranks(2, fn):
        assert same is donate
        assert result.device.type == "cuda"
        assert torch.equal(result, torch.full_like(result, 1.5))


def nccl_mean(rank):
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    group = dist.new_group([0, 1], backend="nccl")
    tree = {
        name: torch.full((3_000_001,), float(rank), dtype=getattr(torch, name), device="cuda")
        for name in ("float32", "float64", "bfloat16", "float16")
    }
    tree["host"] = torch.full((5,), float(rank))
    plain, weighted = average(tree, group), average(tree, group, weight=1 + 2 * rank)
    return [{name: leaf.cpu().unique() for name, leaf in result.items()} for result in (plain, weighted)]


@gpu
@needs_two
def test_nccl_averages_on_the_device():
    for plain, weighted in run_processes(2, nccl_mean):
        assert all(values.tolist() == [0.5] for values in plain.values())
        assert all(values.tolist() == [0.75] for values in weighted.values())

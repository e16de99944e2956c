"""How long does averaging take over Gloo, and against what? Rows go in turns, so that drift hits all alike.

OMP_NUM_THREADS=1 python tests/benchmarks/gloo.py [--ranks 2] [--turns 15] [--tree resnet50|many-small] [--memory]
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.algorithms.model_averaging.averagers as torch_averagers
import torch.multiprocessing as mp

import funcavg


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's 161 parameters (25.6 million elements)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [(width, width_in, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(out, width, 1, 1), (out,), (out,)]
            if block == 0:
                shapes += [(out, width_in, 1, 1), (out,), (out,)]
            width_in = out
    return [*shapes, (1000, 2048), (1000,)]


TREES = {"resnet50": resnet50, "many-small": lambda: [(256,)] * 4000, "flat400": lambda: [(10_000_000,)] * 10}


def rows(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.empty(0).expand(param.shape) if param.numel() == 0 else torch.zeros(1).expand(param.shape)
    theirs = copy.deepcopy(params)
    for param, original in zip(theirs, params, strict=True):
        param.grad = original.grad
    tree = {f"p{i}": param.detach().clone() for i, param in enumerate(params)}
    flat = torch.cat([param.detach().reshape(-1) for param in params])
    other = torch.empty_like(flat)
    averager = torch_averagers.PeriodicModelAverager(period=2)

    def torchs() -> None:
        averager.step = 0
        averager.average_parameters(theirs)

    shim = funcavg.PeriodicModelAverager(period=2)

    def ours() -> None:
        shim.step = 0
        shim.average_parameters(params)

    return {
        "memcpy": lambda: other.copy_(flat),
        "raw all-reduce": lambda: dist.all_reduce(flat),
        "torch's averager": torchs,
        "funcavg, donate": lambda: funcavg.average(tree, donate=True),
        "funcavg": lambda: funcavg.average(tree),
        "funcavg's shim": ours,
    }


def status(field: str) -> float:
    """Return a line of /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def worker(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.ranks)
    shapes = TREES[args.tree]()
    if args.memory:
        for donate in (True, False):
            funcavg.average({"warm": torch.ones(8_000_000)}, donate=True)
            tree = [torch.randn(shape) for shape in shapes]
            nbytes = sum(leaf.nbytes for leaf in tree) / 2**20
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before = status("VmRSS")
            result = funcavg.average(tree, donate=donate)
            extra = status("VmHWM") - before
            if rank == 0:
                print(f"{nbytes:.0f} MB tree, donate={donate}: {extra:.0f} MB extra", flush=True)
            del tree, result
        return
    timed = rows(shapes)
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(args.turns + 2):
        for name, run in timed.items():
            dist.barrier()
            start = time.perf_counter()
            run()
            dist.barrier()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        medians = {name: statistics.median(values) for name, values in times.items()}
        print(f"{args.tree}, {args.ranks} ranks, medians of {args.turns} turns")
        print(f"{'':18s}{'ms':>8s}{'min':>8s}{'/raw':>8s}{'torch/':>8s}")
        for name, value in medians.items():
            raw, torchs = value / medians["raw all-reduce"], medians["torch's averager"] / value
            print(f"{name:18s}{value:8.1f}{min(times[name]):8.1f}{raw:8.2f}{torchs:8.2f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tree", choices=TREES, default="resnet50")
    parser.add_argument("--memory", action="store_true", help="measure the peak of extra memory instead")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (args, f"{folder}/rendezvous"), args.ranks)


if __name__ == "__main__":
    main()

"""How long does averaging take over Gloo, and against what? Rows go in turns, so that drift hits all alike.

OMP_NUM_THREADS=1 python tests/benchmarks/gloo.py [--ranks 2] [--turns 15] [--tree T] [--memory]

FUNCAVG_NODE=off: without shared memory.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.algorithms.model_averaging.averagers as torch_averagers
import torch.multiprocessing as mp
from common import TREES, arguments, in_turns, show, show_memory

import funcavg


def rows(shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.empty(0).expand(param.shape) if param.numel() == 0 else torch.zeros(1).expand(param.shape)
    theirs = copy.deepcopy(params)
    for param, original in zip(theirs, params, strict=True):
        param.grad = original.grad
    tree = {f"p{i}": param.detach().clone() for i, param in enumerate(params)}
    halves = {name: leaf.bfloat16() for name, leaf in tree.items()}
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
        "funcavg, donate, bfloat16": lambda: funcavg.average(halves, donate=True),
    }


def worker(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.ranks)
    shapes = TREES[args.tree]()
    if args.memory:
        dist.barrier()
        show_memory(dist.group.WORLD, rank, shapes)
        return
    times = in_turns(rows(shapes), dist.barrier, args.turns)
    if rank == 0:
        title = f"{args.tree}, {args.ranks} ranks, medians of {args.turns} turns"
        show(title, times, {"/memcpy": "memcpy", "/raw": "raw all-reduce", "/torch": "torch's averager"})
    dist.destroy_process_group()


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, (args, f"{folder}/rendezvous"), args.ranks)


if __name__ == "__main__":
    main()

"""Five ways to train one model on several workers: what each one learns, and what it sends for that.

Every method is an averager, and all go through the loop in `train`, with the same steps, text and optimizer.

    python examples/compare_methods.py                          starts four workers of its own
    python examples/compare_methods.py --steps 60 --seeds 1     just to see it run

The learning rate is the best of three for synchronous training; `--rates` searches again. The others take it as it is.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from charlm import Params, adam, init_params, loss_fn, sample
from torch.func import grad_and_value
from tqdm import tqdm

import funcavg
from funcavg import average
from funcavg.collectives import as_collective

SYNCHRONOUS, DILOCO = "synchronous", "DiLoCo"
METHODS = (SYNCHRONOUS, "local SGD", "post-local SGD", "hierarchical SGD", DILOCO)
BATCH = 4  # windows of text in a step of a worker
VALIDATION = 512  # windows
POINTS = 20  # validations in a run
LINKS = {"100 Mbit/s": 1e8, "10 Gbit/s": 1e10}  # bits in a second


class Job(NamedTuple):
    """What a worker has: its text, and who it averages with."""

    text: torch.Tensor
    valid: torch.Tensor  # its part of the windows to validate on
    pair: Any  # the group of two workers that average more often than all do; None if there are too few workers
    referee: Any  # another group of all workers: validation is averaged here, where no bytes of a method are counted
    bar: tqdm


def make_averager(method: str, pair: Any, args: argparse.Namespace) -> tuple[funcavg.Averager, int]:
    """Return a method, and for how many steps it averages gradients."""
    warmup = args.steps // 20
    if method == SYNCHRONOUS:  # is all warm-up
        return funcavg.periodic(1, warmup=args.steps), args.steps
    if method == "local SGD":
        return funcavg.periodic(args.period), 0
    if method == "post-local SGD":
        return funcavg.periodic(args.period, warmup=warmup), warmup
    if method == "hierarchical SGD":
        return funcavg.hierarchical({args.period // 4: pair, args.period: None}), 0
    outer = funcavg.outer.nesterov(args.outer_rate, args.outer_momentum)
    return funcavg.diloco(args.outer_period, outer=outer, warmup=args.outer_warmup), args.outer_warmup


def train(method: str, rate: float, seed: int, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Train from the seed's parameters, and return how the run went."""
    rank, everyone = dist.get_rank(), as_collective()
    groups = [everyone] if job.pair is None else [everyone, as_collective(job.pair)]

    def sent() -> int:
        return sum(group.bytes_sent for group in groups)

    job.bar.set_description(f"{method}, seed {seed}")
    params = init_params(seed)
    zeros = {name: torch.zeros_like(param) for name, param in params.items()}
    inner = {"params": params, "mean": zeros, "square": zeros}
    counts, curve = [sent()], []  # bytes after every occasion to send some; bytes and validation losses
    averager, warmup = make_averager(method, job.pair, args)
    state = averager.init(params)
    counts.append(sent())
    for step in range(args.steps):
        met = everyone.bytes_sent
        batch = sample(job.text, BATCH, seed=seed, rank=rank, step=step)
        grads, _ = grad_and_value(loss_fn)(inner["params"], batch)
        if step < warmup:
            grads = average(grads, donate=True)
            counts.append(sent())
        inner = adam(inner, grads, rate * (1 - step / args.steps), step)
        inner["params"], state = averager.update(inner["params"], state, donate=True)
        if step + 1 == args.steps and everyone.bytes_sent == met:  # the model is the mean of the workers'
            inner["params"] = average(inner["params"], donate=True)
        counts.append(sent())
        if (step + 1) * POINTS % args.steps < POINTS:
            curve.append((counts[-1] - counts[0], validate(inner["params"], job)))
        job.bar.update()
    return {"method": method, "rate": rate, "seed": seed, "curve": curve, "synchronisations": len(set(counts)) - 1}


def validate(params: Params, job: Job) -> float:
    """Return the validation loss of the mean of the workers' models, in nats per character. Training never notices."""
    model = average(params, job.referee)
    with torch.no_grad():
        loss = torch.stack([len(part) * loss_fn(model, part) for part in job.valid.split(16)]).sum() / len(job.valid)
    return average(loss, job.referee, weight=len(job.valid)).item()

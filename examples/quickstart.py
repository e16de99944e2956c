"""Workers learn to read handwritten digits, twice, and send far fewer bytes the second time.

The first time they average their gradients at every step. The second time is post-local SGD: gradients are averaged
during a short warm-up, afterwards parameters, every few steps. Both are the loop in `train`; the first is all warm-up.

    python examples/quickstart.py                         starts two workers of its own
    torchrun --nproc-per-node 4 examples/quickstart.py    runs on workers that are there already
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from funcavg import average, should_average
from funcavg.collectives import as_collective

Params = dict[str, torch.Tensor]
Data = tuple[torch.Tensor, torch.Tensor]  # images, labels


class Run(NamedTuple):
    """What a training run leaves behind."""

    title: str
    params: Params
    losses: torch.Tensor  # of every step, averaged over workers
    averaged: list[int]  # the steps at which workers averaged
    sent: list[int]  # bytes that this worker had sent, after every step
    seconds: float


def train(title: str, model: torch.nn.Module, shard: Data, warmup: int, args: argparse.Namespace) -> Run:
    """Train on this worker's shard. The model says what to compute; the parameters are a plain dict."""

    def loss_fn(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return cross_entropy(functional_call(model, params, (x,)), y)

    images, labels = shard
    params = {name: param.detach() for name, param in model.named_parameters()}
    velocity = {name: torch.zeros_like(param) for name, param in params.items()}
    draw = torch.Generator().manual_seed(args.seed)
    losses, averaged, sent = [], [], []
    group = as_collective()  # it counts what this worker sends
    grad_and_value(loss_fn)(params, images[:1], labels[:1])  # the first call takes seconds to import what it needs
    dist.barrier()
    sent_before, start = group.bytes_sent, time.perf_counter()
    for step in tqdm(range(args.steps), f"{title:23}", disable=group.rank != 0):
        batch = torch.randint(len(images), (32,), generator=draw)
        grads, loss = grad_and_value(loss_fn)(params, images[batch], labels[batch])
        if step < warmup:  # during warm-up the gradients are averaged, as synchronous training does,
            grads = average(grads, donate=True)
            averaged.append(step)
        params, velocity = sgd(params, velocity, grads)
        if should_average(step, warmup=warmup, period=args.period):  # afterwards the parameters, every few steps
            params = average(params, donate=True)
            averaged.append(step)
        losses.append(loss)
        sent.append(group.bytes_sent - sent_before)
    params = average(params, donate=True)  # the end may lie within a period; the model is the mean of the workers'
    averaged.append(args.steps)
    sent[-1], seconds = group.bytes_sent - sent_before, time.perf_counter() - start
    return Run(title, params, average(torch.stack(losses)), averaged, sent, seconds)


def sgd(params: Params, velocity: Params, grads: Params) -> tuple[Params, Params]:
    """Take a step of gradient descent with momentum."""
    velocity = {name: 0.9 * velocity[name] + grads[name] for name in params}
    return {name: params[name] - 0.1 * velocity[name] for name in params}, velocity


def work(args: argparse.Namespace) -> None:
    """Be one of the workers: train twice from the same parameters, and compare."""
    torch.set_num_threads(1)  # workers share the cores
    torch.manual_seed(args.seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    (images, labels), test = load_data()
    rank, size = dist.get_rank(), dist.get_world_size()
    shard = images[rank::size], labels[rank::size]
    sync = train("gradients at every step", model, shard, args.steps, args)
    local = train("post-local SGD", model, shard, args.warmup, args)
    dist.destroy_process_group()
    if rank == 0:
        report(model, test, sync, local, args)


def load_data() -> tuple[Data, Data]:
    """Return scikit-learn's handwritten digits, 8 x 8 pixels each: three quarters to train on, one to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    split = train_test_split(images, labels, test_size=1 / 4, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = map(torch.from_numpy, split)
    return (images, labels), (test_images, test_labels)


def report(model: torch.nn.Module, test: Data, sync: Run, local: Run, args: argparse.Namespace) -> None:
    """Print the table, save the plot, and say whether post-local SGD has kept its promise."""
    images, labels = test
    percents = []
    print(f"\n{'method':25}{'test accuracy':>13}{'averagings':>13}{'sent per worker':>18}{'seconds':>10}")
    for run in (sync, local):
        correct = functional_call(model, run.params, (images,)).argmax(1) == labels
        percents.append(100 * correct.double().mean().item())
        sent = f"{run.sent[-1] / 1e6:.2f} MB"
        print(f"{run.title:25}{percents[-1]:11.1f} %{len(run.averaged):13}{sent:>18}{run.seconds:10.1f}")
    plot(sync, local, args)
    print(f"\nLoss curves saved to {args.plot.resolve()}")
    if local.sent[-1] == 0:
        print("A single worker sends nothing: start at least two to see what post-local SGD saves.")
        return
    fewer = sync.sent[-1] / local.sent[-1]
    met = percents[1] >= 95 and percents[0] - percents[1] <= 1 and fewer >= 6
    verdict = (
        f"Goal {'met' if met else 'missed'}: post-local SGD reads {percents[1]:.1f} % of the test digits (goal: 95 %), "
        f"synchronous training {percents[0]:.1f} % (goal: at most one point more), "
        f"and it sends {fewer:.1f} times fewer bytes (goal: 6 times)."
    )
    if not met:
        sys.exit(verdict)
    print(verdict)


def plot(sync: Run, local: Run, args: argparse.Namespace) -> None:
    """Save the loss curves, by step and by bytes sent."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    window = max(1, args.steps // 40)
    for run, color in ((sync, "tab:orange"), (local, "tab:blue")):
        smooth = np.convolve(run.losses, np.full(window, 1 / window), "valid")
        by_step.semilogy(range(window - 1, args.steps), smooth, color=color, label=run.title)
        megabytes = np.array(run.sent[window - 1 :]) / 1e6
        by_bytes.semilogy(megabytes, smooth, color=color, label=run.title)
        by_bytes.plot(megabytes[-1], smooth[-1], "o", color=color)
    bottom = {"transform": by_step.get_xaxis_transform(), "color": "tab:blue"}  # x in steps, y in parts of the height
    by_step.plot(local.averaged, [0.015] * len(local.averaged), "|", label="post-local SGD averages", **bottom)
    by_step.axvline(args.warmup, color="tab:blue", linestyle=":", label="its warm-up ends")
    by_step.set(title="by step", xlabel="step", ylabel=f"training loss (mean of {window} steps and all workers)")
    by_bytes.set(title="by bytes sent", xlabel="MB sent by each worker")
    for axes in (by_step, by_bytes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.plot, dpi=150)


def main() -> None:
    """Start the workers, unless somebody else has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="how many to start, where torchrun has not (default: 2)")
    parser.add_argument("--steps", type=int, default=1000, help="of each of the two runs (default: 1000)")
    parser.add_argument("--warmup", type=int, help="steps of post-local SGD's warm-up (default: a twentieth of all)")
    parser.add_argument("--period", type=int, default=16, help="steps between averagings after it (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("quickstart.png"), help="where the loss curves are saved")
    args = parser.parse_args()
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    try:
        should_average(0, warmup=args.warmup, period=args.period)
    except ValueError as error:
        parser.error(str(error))
    if min(args.workers, args.steps) < 1:
        parser.error(f"--workers and --steps must be at least 1, got {args.workers} and {args.steps}")
    if not args.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {args.plot.parent}")

    if "RANK" in os.environ:  # torchrun's worker
        dist.init_process_group("gloo")
        work(args)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(start, (args, f"{folder}/rendezvous"), args.workers)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:  # holds the worker's traceback
            sys.exit(f"{error}")


def start(rank: int, args: argparse.Namespace, rendezvous: str) -> None:
    """Meet the other workers, then work."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=args.workers)
    work(args)


if __name__ == "__main__":
    main()

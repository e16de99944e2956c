"""How rarely may workers average? Local SGD with many periods, simulated on one device, without a launcher.

Replicas of a small model learn to read handwritten digits side by side: their parameters are stacked, and torch.func's
`vmap` lets each take its own steps on its own shard. Shards differ, as a part of the digits is sorted by label. Where
workers of a real job would meet over a network, replicas meet in `average(params, stacked())`. All periods have the same
steps, batches and learning rate, and are trained from several starts, stacked as well, for a steadier mean.

Nothing is sent here, so megabytes are computed: to average B bytes over N workers, each has to send 2 B (N - 1) / N.

    python examples/simulate_replicas.py
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from funcavg import average, should_average, stacked

LEARNING_RATE = 0.5
BATCH = 16  # digits of each replica at each step
Params = dict[str, torch.Tensor]
Data = tuple[torch.Tensor, torch.Tensor]  # images, labels


class Run(NamedTuple):
    """What training with one period leaves behind."""

    period: int
    params: Params  # of the mean model, from every start
    averagings: int
    megabytes: float  # that each worker of a real job would send
    seconds: float


def make_model(start: int) -> torch.nn.Module:
    """Return the model with the parameters of one of the starts."""
    torch.manual_seed(start)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def loss_fn(params: Params, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the loss of one replica from one start."""
    return cross_entropy(functional_call(MODEL, params, (x,)), y)


MODEL = make_model(0)  # says what to compute; its own parameters are not used
grads_and_losses = vmap(vmap(grad_and_value(loss_fn)))  # of all replicas, and from all starts


def train(period: int, shards: Data, args: Namespace) -> Run:
    """Train all replicas from all starts. Leaves and batches have two dimensions more: replicas, then starts."""
    starts, _ = stack_module_state([make_model(start) for start in range(args.starts)])
    params = {name: torch.stack([leaf.detach()] * args.replicas) for name, leaf in starts.items()}
    nbytes = sum(leaf[0, 0].nbytes for leaf in params.values())  # of one replica from one start
    averagings = 0
    grads_and_losses(params, *next(draw_batches(shards, args)))  # the first call takes seconds to import what it needs
    begin = time.perf_counter()
    batches = tqdm(draw_batches(shards, args), f"period {period:5}", args.steps)
    for step, (x, y) in enumerate(batches, start=1):  # from 1, so that an averaging ends each period
        grads, _ = grads_and_losses(params, x, y)
        if step <= args.warmup:  # during warm-up the gradients are averaged, as synchronous training does,
            grads = average(grads, stacked(), donate=True)
        params = {name: params[name] - LEARNING_RATE * grads[name] for name in params}
        fires = should_average(step, warmup=args.warmup, period=period) or step == args.steps
        if step > args.warmup and fires:  # afterwards the parameters, once every period, and at the end
            params = average(params, stacked(), donate=True)
        averagings += step <= args.warmup or fires
    seconds = time.perf_counter() - begin
    megabytes = averagings * 2 * nbytes * (args.replicas - 1) / args.replicas / 1e6
    return Run(period, {name: leaf[0] for name, leaf in params.items()}, averagings, megabytes, seconds)


def draw_batches(shards: Data, args: Namespace) -> Iterator[Data]:
    """Yield the batches of all steps, which are the same for every period."""
    images, labels = shards
    draw = torch.Generator().manual_seed(0)
    replica = torch.arange(args.replicas)[:, None, None]
    for _ in range(args.steps):
        batch = torch.randint(images.shape[1], (args.replicas, args.starts, BATCH), generator=draw)
        yield images[replica, batch], labels[replica, batch]


def load_data() -> tuple[Data, Data]:
    """Return scikit-learn's handwritten digits, 8 x 8 pixels each: three quarters to train on, one to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    split = train_test_split(images, labels, test_size=1 / 4, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = map(torch.from_numpy, split)
    return (images, labels), (test_images, test_labels)


def make_shards(data: Data, args: Namespace) -> Data:
    """Return as many digits for each replica: a part of all digits sorted by label, the others in random places."""
    images, labels = data
    place, lot = torch.rand(2, len(labels), generator=torch.Generator().manual_seed(0))
    order = torch.where(lot < args.sorted, (labels + place) / 10, place).argsort()
    order = order[: len(order) // args.replicas * args.replicas].view(args.replicas, -1)
    return images[order], labels[order]


def report(runs: list[Run], data: Data, test: Data, args: Namespace) -> None:
    """Print the table, save the plot, and say what longer periods save and cost."""
    losses = torch.stack([vmap(loss_fn, (0, None, None))(run.params, *data) for run in runs])
    means = losses.mean(1).tolist()
    print(f"\n{'period':>6}{'averagings':>13}{'MB per worker':>16}{'loss':>10}{'test accuracy':>16}{'seconds':>10}")
    for run, mean in zip(runs, means, strict=True):
        logits = vmap(lambda params: functional_call(MODEL, params, (test[0],)))(run.params)
        percent = 100 * (logits.argmax(-1) == test[1]).double().mean().item()
        print(f"{run.period:6}{run.averagings:13}{run.megabytes:16.3f}{mean:10.4f}{percent:14.1f} %{run.seconds:10.1f}")
    plot(runs, losses, args)
    print("\nMB per worker: computed, for a network. Loss: the mean model's on all training data, mean over starts.")
    print(f"Loss against MB per worker saved to {args.plot.resolve()}")
    fewer, larger = runs[0].megabytes / runs[-1].megabytes, means[-1] / means[0]
    close = [run.period for run, mean in zip(runs, means, strict=True) if mean <= 1.1 * means[0]]
    print(f"Period {runs[-1].period} sends {fewer:.0f} times fewer bytes than period {runs[0].period}, ", end="")
    print(f"and has {larger:.1f} times its loss. The longest that adds at most a tenth to the loss is {max(close)}.")


def plot(runs: list[Run], losses: torch.Tensor, args: Namespace) -> None:
    """Save the final losses against megabytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    megabytes, means = [run.megabytes for run in runs], losses.mean(1)
    axes.plot(megabytes, losses, ".", color="tab:orange", label=["single starts", *["_"] * (args.starts - 1)])
    axes.plot(megabytes, means, "o-", color="tab:blue", label="mean, labelled with its period")
    for run, mean in zip(runs, means, strict=True):
        axes.annotate(f"{run.period}", (run.megabytes, mean), (6, 6), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="MB that each worker would send over a network")
    axes.set(ylabel="final training loss of the mean model", title=f"local SGD of {args.replicas} replicas")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(args.plot, dpi=150)


def parse_arguments() -> Namespace:
    """Read and check the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument(
        "--periods", type=int, nargs="+", default=[2**i for i in range(9)], help="(default: 1, 2 ... 256)"
    )
    parser.add_argument("--steps", type=int, default=1024, help="of each replica, for each period (default: 1024)")
    # By default there is no warm-up: it sends as much with every period, which blurs what is compared.
    parser.add_argument("--warmup", type=int, default=0, help="steps at first that average gradients (default: 0)")
    parser.add_argument("--starts", type=int, default=3, help="to take the mean over (default: 3)")
    parser.add_argument("--sorted", type=float, default=0.2, help="part of the digits, from 0 to 1 (default: 0.2)")
    parser.add_argument("--plot", type=Path, default="simulate_replicas.png", help="where the plot is saved")
    args = parser.parse_args()
    args.periods = sorted(set(args.periods))
    try:
        should_average(0, warmup=args.warmup, period=args.periods[0])
    except ValueError as error:
        parser.error(f"{error}")
    if min(args.steps, args.starts) < 1:
        parser.error(f"--steps and --starts must be at least 1, got {args.steps} and {args.starts}")
    if not 2 <= args.replicas <= 1000:  # one alone would send nothing, and there are 1347 digits
        parser.error(f"--replicas must be from 2 to 1000, got {args.replicas}")
    if not 0 <= args.sorted <= 1:
        parser.error(f"--sorted must be from 0 to 1, got {args.sorted}")
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot must end with .png, .pdf or .svg, got {args.plot}")
    if not args.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {args.plot.parent}")
    return args


def main() -> None:
    """Train once with each period, and compare."""
    args = parse_arguments()
    data, test = load_data()
    shards = make_shards(data, args)
    report([train(period, shards, args) for period in args.periods], data, test, args)


if __name__ == "__main__":
    main()

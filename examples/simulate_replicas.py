"""How rarely may workers average? Local SGD with many periods, simulated on one device, without a launcher.

Replicas of a small model learn to read handwritten digits side by side: their parameters are stacked, and torch.func's
`vmap` lets each take its own steps on its own shard. Shards differ, as a part of the digits is sorted by label. Where
workers of a real job would meet over a network, replicas meet in `average(params, stacked())`. Every period has the
same steps, batches and learning rate, and several starts, stacked as well, for a steadier mean.

Nothing is sent here, so megabytes are computed: to average B bytes over N workers, each sends 2 B (N - 1) / N.

    python examples/simulate_replicas.py
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from pathlib import Path

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
Run = tuple[Params, int, float]  # mean models of all starts, how often replicas have averaged, seconds


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
    return {name: leaf[0] for name, leaf in params.items()}, averagings, seconds  # by now, replicas are equal


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


def report(runs: dict[int, Run], data: Data, test: Data, args: Namespace) -> None:
    """Print the table, save the plot, and say what the longest period saves and costs."""
    periods, megabytes, losses = list(runs), [], []
    print(f"\n{'period':>6}{'averagings':>13}{'MB per worker':>16}{'loss':>10}{'test accuracy':>16}{'seconds':>10}")
    for period, (params, averagings, seconds) in runs.items():
        nbytes = sum(leaf[0].nbytes for leaf in params.values())  # of one start: a worker's
        megabytes.append(averagings * 2 * nbytes * (args.replicas - 1) / args.replicas / 1e6)
        losses.append(vmap(loss_fn, (0, None, None))(params, *data).numpy())
        logits = vmap(lambda params: functional_call(MODEL, params, (test[0],)))(params)
        percent = 100 * (logits.argmax(-1) == test[1]).double().mean().item()
        numbers = f"{period:6}{averagings:13}{megabytes[-1]:16.3f}{losses[-1].mean():10.4f}"
        print(f"{numbers}{percent:14.1f} %{seconds:10.1f}")
    print("\nMB per worker: computed, for a network. Loss: the mean model's on all training data, mean over starts.")
    plot(periods, megabytes, np.array(losses), args)
    print(f"Loss against MB per worker saved to {args.plot.resolve()}")
    fewer, times = f"{megabytes[0] / megabytes[-1]:.0f}", f"{losses[-1].mean() / losses[0].mean():.1f}"
    print(f"Period {periods[-1]} sends {fewer} times fewer bytes than period {periods[0]}, at {times} times its loss.")


def plot(periods: list[int], megabytes: list[float], losses: np.ndarray, args: Namespace) -> None:
    """Save the final losses, a row of starts for each period, against megabytes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.loglog(megabytes, losses, ".", color="tab:orange", label=["single starts", *["_"] * (args.starts - 1)])
    axes.loglog(megabytes, losses.mean(1), "o-", color="tab:blue", label="their mean, labelled with the period")
    for period, *place in zip(periods, megabytes, losses.mean(1), strict=True):
        axes.annotate(f"{period}", place, (6, 6), textcoords="offset points")
    for formatter in (axes.xaxis.set_major_formatter, axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.set(xlabel="MB that each worker would send over a network", ylabel="final training loss of the mean model")
    axes.set_title(f"{args.replicas} replicas, {args.steps} steps, averaged once every period")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(args.plot, dpi=150)


def parse_arguments() -> Namespace:
    """Read and check the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--periods", type=int, nargs="+", default=[2**i for i in range(9)], help="default: 1 2 ... 256")
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
    if args.plot.suffix not in (".png", ".pdf", ".svg") or not args.plot.parent.is_dir():
        parser.error(f"--plot must be a .png, .pdf or .svg in a folder that exists, got {args.plot}")
    return args


def main() -> None:
    """Train once with each period, and compare."""
    args = parse_arguments()
    data, test = load_data()
    shards = make_shards(data, args)
    report({period: train(period, shards, args) for period in args.periods}, data, test, args)


if __name__ == "__main__":
    main()

"""What does it do to the loss to average the last checkpoints of a run?

A small language model is trained at a constant learning rate, and saved now and then. At a constant rate the steps'
noise keeps it off the bottom of the valley that it is in: checkpoints lie around it, and their mean lies nearer. So the
mean of the last few often has a lower loss than any of them, for nothing but the reading of files. `funcavg.mean` reads
them one after another, in the memory of one.

    python examples/average_checkpoints.py

The command line does the same with files: `funcavg mean checkpoints/*.pt --output averaged.pt`.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from pathlib import Path

import charlm
import numpy as np
import torch
from charlm import Params
from torch.func import grad
from tqdm import tqdm

from funcavg import mean

BATCH, WINDOWS = 16, 500  # windows of text for each step, and for validation
RATE = 0.1


def train(text: torch.Tensor, folder: Path, steps: int, every: int, seed: int) -> list[Path]:
    """Train at a constant rate; save the parameters every few steps; return the files, oldest first."""
    params = charlm.init_params(seed)
    state = {"params": params, "velocity": {name: torch.zeros_like(leaf) for name, leaf in params.items()}}
    files = []
    for step in tqdm(range(steps), "training"):
        batch = charlm.sample(text, BATCH, seed=seed, rank=0, step=step)
        state = charlm.sgd(state, grad(charlm.loss_fn)(state["params"], batch), RATE)
        if (step + 1) % every == 0:
            files.append(folder / f"step-{step + 1:06}.pt")
            torch.save(state["params"], files[-1])
    return files


def checkpoints(files: Sequence[Path]) -> Iterator[Params]:
    """Load checkpoints one after another: when the next one comes, the one before is not needed any more."""
    for path in files:
        yield torch.load(path, weights_only=True)


def compare(files: Sequence[Path], counts: Sequence[int], valid: torch.Tensor) -> dict[int, float]:
    """Return the validation loss of the mean of the last 1, 2, ... checkpoints."""
    return {
        count: charlm.loss_fn(mean(checkpoints(files[-count:])), valid).item()
        for count in tqdm(counts, "averaging")
        if count <= len(files)
    }


def plot(path: Path, losses: dict[int, float], alone: Sequence[float]) -> None:
    """Save a picture: the loss of means, beside that of each checkpoint alone."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(losses.keys(), losses.values(), "o-", color="tab:blue", label="mean of the last checkpoints")
    back = range(1, len(alone) + 1)
    axes.plot(back, alone, "x", color="tab:orange", label="a checkpoint alone, counted from the last")
    axes.set(xlabel="checkpoints", ylabel="validation loss, nats per character", title="Averaging checkpoints")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Train, average, and show what came of it."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of training (default: 1200)")
    parser.add_argument("--every", type=int, default=20, help="steps from checkpoint to checkpoint (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw losses into this file")
    args = parser.parse_args()
    if not 1 <= args.every <= args.steps:
        parser.error(f"--every must be 1 to --steps ({args.steps}), got {args.every}")
    corpus = charlm.load_corpus()
    valid = charlm.spread(torch.cat(corpus.valid), WINDOWS)
    with tempfile.TemporaryDirectory() as folder:
        files = train(torch.cat(corpus.train), Path(folder), args.steps, args.every, args.seed)
        losses = compare(files, [1, 2, 3, 5, 8, 12, 16, 20], valid)
        alone = [charlm.loss_fn(params, valid).item() for params in checkpoints(files[: -1 - max(losses) : -1])]
    print("\nmean of the last   validation loss   against the last alone")
    for count, loss in losses.items():
        print(f"{count:3} checkpoint(s)   {loss:15.4f}   {100 * (loss / losses[1] - 1):+20.2f} %")
    best = min(losses, key=losses.__getitem__)
    print(
        f"\nThe mean of the last {best} has {losses[best]:.4f}; of these checkpoints alone the best has "
        f"{min(alone):.4f}, and the mean of their losses is {np.mean(alone):.4f}."
    )
    if args.plot:
        plot(args.plot, losses, alone)
        print(f"Losses saved to {args.plot}")


if __name__ == "__main__":
    main()

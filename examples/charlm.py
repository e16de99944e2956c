"""A small language model that reads Python, character by character: what the examples here train.

Its text is the source of Python's own standard library, so there is nothing to download. Everything is a function:
parameters are a plain dict, and the batch of a step depends on nothing but the seed, the rank and the step. That is why
a job that is resumed in the middle goes on exactly as if nothing had happened.
"""

from __future__ import annotations

import math
import string
import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy

Params = dict[str, torch.Tensor]
State = dict[str, Params]

CHARACTERS = sorted(set(string.printable) - set("\r\x0b\x0c"))
CODES = len(CHARACTERS) + 1  # the last code is for all other characters
LAYERS = 6
CONTEXT = 2**LAYERS  # a prediction sees so many characters before it
WINDOW = 2 * CONTEXT  # a window of text holds as many predictions, of its second half
WIDTH = 64

PACKAGES = ("asyncio", "collections", "concurrent/futures", "email", "http", "importlib", "json", "logging")
SHORTEST = 1000  # characters; shorter files are mostly empty, and one of them alone could not fill a window


class Corpus(NamedTuple):
    """Encoded files, one tensor of ``uint8`` codes each."""

    train: list[torch.Tensor]
    valid: list[torch.Tensor]
    digest: int  # of all text: another release of Python is another text


def load_corpus() -> Corpus:
    """Read the standard library's source, in the same order everywhere. Every 20th file is for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for folder in ("", *PACKAGES) for path in sorted((root / folder).glob("*.py"))]
    texts = [text for path in paths if len(text := path.read_text("utf-8")) >= SHORTEST]
    if len(texts) < 20:
        raise FileNotFoundError(f"this Python has no source of its standard library in {root}")
    files = [encode(text) for text in texts]
    digest = zlib.crc32("\0".join(texts).encode())
    return Corpus([file for i, file in enumerate(files) if i % 20], files[::20], digest)


def encode(text: str) -> torch.Tensor:
    """Return the codes of a text's characters."""
    table = np.full(128 + 1, CODES - 1, np.uint8)
    table[[ord(character) for character in CHARACTERS]] = np.arange(len(CHARACTERS))
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return torch.from_numpy(table[np.minimum(points, 128)])


def shard(files: list[torch.Tensor], rank: int, size: int) -> torch.Tensor:
    """Return one rank's text: whole files, so that ranks have unequal amounts of it."""
    if size > len(files):
        raise ValueError(f"there are {len(files)} files to train on, too few for {size} ranks")
    return torch.cat(files[rank::size])


def sample(text: torch.Tensor, count: int, *, seed: int, rank: int, step: int) -> torch.Tensor:
    """Return this step's batch: ``count`` windows of a text."""
    starts = np.random.default_rng([seed, rank, step]).integers(len(text) - WINDOW + 1, size=count)
    return windows(text, torch.from_numpy(starts))


def spread(text: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` windows that are spread evenly over a text."""
    return windows(text, torch.linspace(0, len(text) - WINDOW, count).long())


def windows(text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the windows of a text that begin at ``starts``, one in each row."""
    return text[starts[:, None] + torch.arange(WINDOW)].long()


def init_params(seed: int) -> Params:
    """Return parameters to start from: the same on every rank."""
    draw = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, variance: float) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) * math.sqrt(variance)

    params = {"embedding": normal(CODES, WIDTH, 1 / WIDTH)}
    for layer in range(LAYERS):
        params[f"weight{layer}"] = normal(2 * WIDTH, WIDTH, 1 / WIDTH)
        params[f"bias{layer}"] = torch.zeros(WIDTH)
    params["out"] = normal(WIDTH, CODES, 1 / WIDTH)
    return params


def loss_fn(params: Params, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean loss, in nats per character, of predicting the second half of each window.

    A dilated convolution: layer ``i`` joins each position with the one ``2**i`` before it, so after all layers a
    position has seen the `CONTEXT` characters up to it, and all positions share the work.
    """
    x = params["embedding"][batch[:, :-1]]
    for layer in range(LAYERS):
        reach = 2**layer
        pairs = torch.cat([x[:, :-reach], x[:, reach:]], -1)
        x = x[:, reach:] + torch.relu(pairs @ params[f"weight{layer}"] + params[f"bias{layer}"])
    logits = x @ params["out"]
    return cross_entropy(logits.flatten(0, 1), batch[:, CONTEXT:].flatten())


def sgd(state: State, grads: Params, rate: float) -> State:
    """Take a step of gradient descent with momentum: the state holds params and their velocity."""
    params = state["params"]
    velocity = {name: 0.9 * state["velocity"][name] + grads[name] for name in params}
    return {"params": {name: params[name] - rate * velocity[name] for name in params}, "velocity": velocity}


def adam(state: State, grads: Params, rate: float, step: int) -> State:
    """Take step number ``step`` of Adam: the state holds params, and moving means of gradients and of their squares."""
    params = state["params"]
    mean = {name: 0.9 * state["mean"][name] + 0.1 * grads[name] for name in params}
    square = {name: 0.95 * state["square"][name] + 0.05 * grads[name] ** 2 for name in params}
    # Both begin as zeros, and are that much too small.
    rate, unbias = rate / (1 - 0.9 ** (step + 1)), 1 / (1 - 0.95 ** (step + 1))
    moved = {name: params[name] - rate * mean[name] / ((unbias * square[name]).sqrt() + 1e-8) for name in params}
    return {"params": moved, "mean": mean, "square": square}


def plot(path: Path, losses: np.ndarray, valid: list[tuple[int, float]], title: str) -> None:
    """Save the loss curves: training losses, a row for each rank, and pairs of step and validation loss."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    steps = losses.shape[1]
    window = max(1, steps // 40)
    for rank, row in enumerate(losses):
        smooth = np.convolve(row, np.full(window, 1 / window), "valid")
        color = plt.get_cmap("Blues")(0.9 - 0.5 * rank / len(losses))
        label = f"training, {len(losses)} rank(s), mean of {window} steps"
        axes.plot(range(window, steps + 1), smooth, color=color, label=label if rank == 0 else None)
    axes.plot(*zip(*valid, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="nats per character", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)

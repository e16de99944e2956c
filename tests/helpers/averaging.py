"""What tests of averagers share: a problem with an exact answer, frameworks, and textbook loops in plain NumPy.

Worker i minimises ``sum(slope_i * (theta - target_i)**2) / 2``, by plain gradient steps of rate 1/8. All is float64,
and every operation of the loops rounds as those of the library do, so results are compared bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from funcavg import diloco, hierarchical, periodic, streaming_diloco
from helpers.frameworks import jax, torch

RATE = 0.125
SIZE = 3
TARGETS = [np.random.default_rng(10 + i).normal(size=4) for i in range(SIZE)]
SLOPES = [np.random.default_rng(20 + i).uniform(0.5, 1.5, size=4) for i in range(SIZE)]
STARTS = [np.random.default_rng(30 + i).normal(size=4) for i in range(SIZE)]
FRAMEWORKS = {"numpy": np.array, "torch": torch.tensor, "jax": jax.numpy.asarray}


class Method(NamedTuple):
    """A row of the table of methods: two ways to make it for a group of two, each over all of its ranks."""

    make: Callable[[Any], Any]  # averages in the middle of its steps, and is in the middle of a period after 6
    make_eager: Callable[[Any], Any]  # averages at its first update


METHODS = {
    "periodic": Method(lambda g: periodic(3, warmup=2, group=g), lambda g: periodic(1, group=g)),
    "hierarchical": Method(
        lambda g: hierarchical({2: 1, 4: 2}, warmup=3, group=g), lambda g: hierarchical({1: g}, group=g)
    ),
    "diloco": Method(lambda g: diloco(3, warmup=2, group=g), lambda g: diloco(1, group=g)),
    "streaming": Method(
        lambda g: streaming_diloco(6, fragments=2, delay=2, mix=0.25, warmup=2, group=g),  # after 6, one is under way
        lambda g: streaming_diloco(1, fragments=1, group=g),
    ),
}


def x64(framework: str) -> Any:
    """Let JAX have float64, in this thread."""
    return jax.enable_x64(True) if framework == "jax" else contextlib.nullcontext()


def gradient(theta: Any, i: int, own: Any = np.asarray) -> Any:
    return own(SLOPES[i]) * (theta - own(TARGETS[i]))


def excess(theta: Any) -> float:
    """Return the sum of all workers' losses, less what it is at best."""
    best = sum(s * t for s, t in zip(SLOPES, TARGETS, strict=True)) / sum(SLOPES)
    return float((sum(SLOPES) * (np.asarray(theta) - best) ** 2).sum() / 2)


def train(averager: Any, group: Any, framework: str, steps: int, *, warmup: int = 0, weights: Any = None) -> np.ndarray:
    """Return this worker's parameters after every step."""
    from funcavg import average

    own, rank = FRAMEWORKS[framework], group.rank
    with x64(framework):
        params = {"theta": own(STARTS[rank]), "count": 7}
        state, path = averager.init(params), []
        for step in range(steps):
            grads = {"theta": gradient(params["theta"], rank, own)}
            if step < warmup:
                grads = average(grads, group)
            params = {**params, "theta": params["theta"] - RATE * grads["theta"]}
            weight = None if weights is None else weights[rank]
            params, state = averager.update(params, state, weight=weight)
            assert params["count"] == 7
            assert state.step == step + 1
            path.append(np.asarray(params["theta"]).copy())
        return np.stack(path)


def mean(rows: list[np.ndarray], weights: list[float] | None = None) -> np.ndarray:
    """Return the (weighted) mean of a textbook: one sum over workers, in their order, and one division."""
    if weights is None:
        return sum(rows[1:], rows[0]) / len(rows)
    scaled = [weight / max(weights) for weight in weights]
    return sum(w * row for w, row in zip(scaled, rows, strict=True)) / sum(scaled)


def local_step(thetas: list[np.ndarray], *, synchronous: bool) -> list[np.ndarray]:
    grads = [gradient(theta, i) for i, theta in enumerate(thetas)]
    if synchronous:
        grads = [mean(grads)] * len(thetas)
    return [theta - RATE * grad for theta, grad in zip(thetas, grads, strict=True)]


def local_sgd(steps: int, period: int, warmup: int = 0, weights: Any = None) -> list[np.ndarray]:
    """Stich 2019, algorithm 1; with a warm-up Lin et al. 2020, algorithm 2. Return every worker's path."""
    thetas, paths = list(STARTS), []
    for t in range(steps):
        thetas = local_step(thetas, synchronous=t < warmup)
        if t >= warmup and (t - warmup) % period == 0:
            thetas = [mean(thetas, weights)] * SIZE
        paths.append(thetas)
    return [np.stack(path) for path in zip(*paths, strict=True)]


def local_training_and(outer: Any, steps: int, period: int, warmup: int = 0, weights: Any = None) -> list[np.ndarray]:
    """DiLoCo, algorithm 1, but for its last two lines: ``outer(anchor, pseudo-gradient, memory)`` is the method's."""
    thetas, paths = list(STARTS), []
    anchor, memory = mean(thetas), np.zeros(4)
    for t in range(steps):
        thetas = local_step(thetas, synchronous=t < warmup)
        if t + 1 == warmup:
            anchor = mean(thetas, weights)
        if t + 1 > warmup and (t + 1 - warmup) % period == 0:
            delta = mean([anchor - theta for theta in thetas], weights)
            anchor, memory = outer(anchor, delta, memory)
            thetas = [anchor] * SIZE
        paths.append(thetas)
    return [np.stack(path) for path in zip(*paths, strict=True)]


class Streaming(NamedTuple):
    """Settings of streaming DiLoCo."""

    period: int
    fragments: int  # of the four numbers, in order, as many each
    delay: int = 0
    mix: float = 0.0
    warmup: int = 0
    weights: Any = None

    def averager(self, group: Any, **options: Any) -> Any:
        chosen = {"fragments": self.fragments, "delay": self.delay, "mix": self.mix, "warmup": self.warmup}
        return streaming_diloco(self.period, **chosen | options, group=group)


def streaming(outer: Any, steps: int, size: int, settings: Streaming) -> list[np.ndarray]:
    """Streaming DiLoCo, from its equations: fragment k is sent after step a_k - tau of a period, applied after a_k."""
    period, fragments, delay, mix, warmup, weights = settings
    thetas, paths = STARTS[:size], []
    anchor, sent = mean(thetas), None
    parts = np.split(np.arange(4), fragments)
    memories = [np.zeros(len(part)) for part in parts]
    for t in range(1, steps + 1):
        thetas = local_step(thetas, synchronous=t <= warmup)
        if t == warmup:
            anchor = mean(thetas, weights)
        for k, part in enumerate(parts):
            own = (k + 1) * period // fragments + warmup
            if t >= own - delay and (t - own + delay) % period == 0:
                sent = mean([anchor[part] - theta[part] for theta in thetas], weights)
            if t >= own and (t - own) % period == 0:
                anchor, thetas = anchor.copy(), [theta.copy() for theta in thetas]
                anchor[part], memories[k] = outer(anchor[part], sent, memories[k])
                for theta in thetas:
                    new, old = anchor[part], theta[part]
                    if mix == 0:
                        theta[part] = new
                    elif mix <= 0.5:
                        theta[part] = new + mix * (old - new)
                    else:
                        theta[part] = old + (1 - mix) * (new - old)
        paths.append(thetas)
    return [np.stack(path) for path in zip(*paths, strict=True)]

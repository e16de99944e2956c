"""Workers learn to read handwritten digits in JAX, twice, and average far less often the second time.

The first time they average their gradients at every step. The second time is post-local SGD: gradients are averaged
during a short warm-up, afterwards parameters, every few steps. Both are `train`, one scan that is compiled as a whole;
the first is all warm-up. And `train` is the same on devices and in processes, but for the group that it is given:

    python examples/jax_local_sgd.py                         the devices of one process; a CPU is made to be two
    mpiexec -n 2 python -m mpi4py examples/jax_local_sgd.py  processes with arrays of their own, the ranks of an MPI job
"""

from __future__ import annotations

import os
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from funcavg import average, should_average
from funcavg.collectives import as_collective, launched_ranks

Model = eqx.nn.MLP
Data = tuple[jax.Array, jax.Array]  # images, labels
P = jax.P
optimizer = optax.sgd(0.1, momentum=0.9)


class Run(NamedTuple):
    """What a training run leaves behind."""

    title: str
    model: Model
    losses: np.ndarray  # of every step, averaged over workers
    averaged: np.ndarray  # the steps at which workers averaged
    seconds: float  # without those that JAX compiles for


def train(
    params: Model, opt_state: optax.OptState, data: Data, *, static: Model, group: Any, warmup: int, args: Namespace
) -> tuple[Model, jax.Array, jax.Array]:
    """Train on this worker's data. Return the mean model, the mean losses, and whether each step has averaged."""
    images, labels = data
    key = jax.random.key(args.seed)

    def loss_fn(params: Model, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = jax.vmap(eqx.combine(params, static))(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def average_if(condition: jax.Array, tree: Any) -> Any:  # workers are at the same step, so all take the same branch
        return jax.lax.cond(condition, lambda tree: average(tree, group), lambda tree: tree, tree)

    def advance(state: tuple[Model, optax.OptState], step: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        params, opt_state = state
        batch = jax.random.randint(jax.random.fold_in(key, step), (32,), 0, len(images))
        loss, grads = jax.value_and_grad(loss_fn)(params, images[batch], labels[batch])
        in_warmup = step < warmup  # during warm-up the gradients are averaged, as synchronous training does,
        updates, opt_state = optimizer.update(average_if(in_warmup, grads), opt_state, params)
        fires = should_average(step, warmup=warmup, period=args.period)  # afterwards the parameters, every few steps
        params = average_if(fires, optax.apply_updates(params, updates))
        return (params, opt_state), (loss, in_warmup | fires)

    (params, _), (losses, averaged) = jax.lax.scan(advance, (params, opt_state), jnp.arange(args.steps))
    params, losses = average((params, losses), group)  # the end may lie within a period; the model is the workers' mean
    return params, losses, averaged


def on_devices(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let every device of this process do the work of one worker, on its own part of the data."""

    def on_one(params: Model, opt_state: optax.OptState, data: Data) -> Any:
        # Workers begin with the same parameters, and go on to have their own. shard_map must be told: otherwise they
        # are one for all, and jax.grad sums over workers at every step, without an error.
        replica = jax.lax.pcast((params, opt_state), "worker", to="varying")
        return jax.tree.map(lambda leaf: leaf[None], work(*replica, data))

    mesh = jax.sharding.Mesh(jax.devices(), ("worker",))
    on_all = jax.shard_map(on_one, mesh=mesh, in_specs=(P(), P(), P("worker")), out_specs=P("worker"))
    return lambda *inputs: jax.tree.map(lambda leaf: leaf[0], on_all(*inputs))  # they all return the same


def run(title: str, model: Model, data: Data, comm: Any, warmup: int, args: Namespace) -> Run:
    """Compile the training, for all devices or for this rank, and run it."""
    params, static = eqx.partition(model, eqx.is_array)  # what is averaged and carried through a scan is arrays only
    work = partial(train, static=static, group=comm or "worker", warmup=warmup, args=args)
    inputs = params, optimizer.init(params), data
    program = jax.jit(work if comm else on_devices(work)).lower(*inputs).compile()
    if comm:
        comm.Barrier()  # ranks do not compile equally fast
    start = time.perf_counter()
    params, losses, averaged = jax.block_until_ready(program(*inputs))
    seconds = time.perf_counter() - start
    steps = np.append(np.flatnonzero(averaged), args.steps)
    return Run(title, eqx.combine(params, static), np.asarray(losses), steps, seconds)


def load_data(workers: int) -> tuple[Data, Data]:
    """Return scikit-learn's digits: three quarters to train on, as many for each worker, and one to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    split = train_test_split(images, labels, test_size=1 / 4, stratify=labels, random_state=0)
    images, test_images, labels, test_labels = map(jnp.asarray, split)
    even = len(images) // workers * workers
    return (images[:even], labels[:even]), (test_images, test_labels)


def report(test: Data, sync: Run, local: Run, args: Namespace) -> None:
    """Print the table, save the plot, and say whether post-local SGD has kept its promise."""
    images, labels = test
    percents = []
    print(f"{'method':25}{'test accuracy':>13}{'averagings':>13}{'seconds':>10}")
    for one in (sync, local):
        percents.append(100 * float((jax.vmap(one.model)(images).argmax(1) == labels).mean()))
        print(f"{one.title:25}{percents[-1]:11.1f} %{len(one.averaged):13}{one.seconds:10.1f}")
    plot(sync, local, args)
    print(f"\nLoss curves saved to {args.plot.resolve()}")
    fewer = len(sync.averaged) / len(local.averaged)
    met = percents[1] >= 95 and percents[0] - percents[1] <= 1 and fewer >= 6
    verdict = (
        f"Goal {'met' if met else 'missed'}: post-local SGD reads {percents[1]:.1f} % of the test digits (goal: 95 %), "
        f"synchronous training {percents[0]:.1f} % (goal: at most one point more), "
        f"and it averages {fewer:.1f} times less often (goal: 6 times)."
    )
    if not met:
        sys.exit(verdict)
    print(verdict)


def plot(sync: Run, local: Run, args: Namespace) -> None:
    """Save the loss curves, and mark where post-local SGD averages."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    window = max(1, args.steps // 40)
    for one, color in ((sync, "tab:orange"), (local, "tab:blue")):
        smooth = np.convolve(one.losses, np.full(window, 1 / window), "valid")
        axes.semilogy(range(window - 1, args.steps), smooth, color=color, label=one.title)
    bottom = {"transform": axes.get_xaxis_transform(), "color": "tab:blue"}  # x in steps, y in parts of the height
    axes.plot(local.averaged, [0.015] * len(local.averaged), "|", label="post-local SGD averages", **bottom)
    axes.axvline(args.warmup, color="tab:blue", linestyle=":", label="its warm-up ends")
    axes.set(xlabel="step", ylabel=f"training loss (mean of {window} steps and all workers)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.plot, dpi=150)


def find_ranks(parser: ArgumentParser) -> Any:
    """Return the communicator of an MPI job: there is one if a launcher has started several ranks. Else None."""
    launched = launched_ranks(os.environ)
    if launched is None:
        return None
    try:
        from mpi4py import MPI

        as_collective(MPI.COMM_WORLD)  # refuses ranks that another MPI's launcher has started
    except (ImportError, RuntimeError) as error:
        parser.error(f"{launched[1]} has started {launched[0]} ranks, which takes mpi4py and that MPI library: {error}")
    return MPI.COMM_WORLD


def parse_arguments(parser: ArgumentParser) -> Namespace:
    """Read and check the command line."""
    parser.add_argument("--steps", type=int, default=1000, help="of each of the two runs (default: 1000)")
    parser.add_argument("--warmup", type=int, help="steps of post-local SGD's warm-up (default: a twentieth of all)")
    parser.add_argument("--period", type=int, default=16, help="steps between averagings after it (default: 16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default="jax_local_sgd.png", help="where the loss curves are saved")
    args = parser.parse_args()
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    try:
        should_average(0, warmup=args.warmup, period=args.period)
    except ValueError as error:
        parser.error(f"{error}")
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot must end with .png, .pdf or .svg, got {args.plot}")
    if not args.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {args.plot.parent}")
    return args


def main() -> None:
    """Find the workers, let them train twice from the same parameters, and compare."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    comm = find_ranks(parser)
    first = not comm or comm.rank == 0  # the rank that speaks
    try:
        args = parse_arguments(parser) if first else None
    except SystemExit as error:
        args = error.code
    args = comm.bcast(args) if comm else args  # if something is wrong, the others end only after it has been said
    if not isinstance(args, Namespace):
        sys.exit(args)

    flags = os.environ.get("XLA_FLAGS", "")
    if not comm and "device_count" not in flags and jax.config.jax_num_cpu_devices < 0:  # the user has not chosen
        jax.config.update("jax_num_cpu_devices", 2)
    workers = comm.size if comm else jax.device_count()
    if workers < 2:
        parser.error("there is one worker only: use mpiexec -n 2, or JAX_PLATFORMS=cpu, which makes two of a CPU")
    data, test = load_data(workers)
    if comm:
        data = jax.tree.map(lambda leaf: jnp.split(leaf, workers)[comm.rank], data)
    model = Model(64, 10, width_size=256, depth=1, key=jax.random.key(args.seed))
    sync = run("gradients at every step", model, data, comm, args.steps, args)
    local = run("post-local SGD", model, data, comm, args.warmup, args)
    if first:
        report(test, sync, local, args)


if __name__ == "__main__":
    main()

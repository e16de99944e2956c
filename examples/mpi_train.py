"""Train a small language model on MPI ranks by post-local SGD, in a job that can be killed and resumed.

Gradients are averaged during a short warm-up, afterwards parameters, every few steps. Ranks have unequal amounts of
text, and count accordingly.

    mpiexec -n 2 python -m mpi4py examples/mpi_train.py
    mpiexec -n 2 python -m mpi4py examples/mpi_train.py --method streaming

With `--method streaming` the model is averaged in four fragments, each at its own step, and each of them travels while
the next step is computed (streaming DiLoCo, with an outer optimizer that averages).

Killed at any time and started again, it goes on from its checkpoint, mpi_train.pt, and ends with the same bits.
`python -m mpi4py` sees to it that all ranks end when one fails. On a cluster, see mpi_train.sbatch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from charlm import Params, init_params, load_corpus, loss_fn, plot, sample, sgd, shard, spread
from mpi4py import MPI
from torch.func import grad_and_value
from tqdm import tqdm

from funcavg import Averager, average, outer, should_average, streaming_diloco
from funcavg.averagers import StreamingState
from funcavg.collectives import as_collective
from funcavg.outer import MomentumState

Tree = dict[str, Any]

COMM = MPI.COMM_WORLD
VALIDATION = 1024  # windows
POST_LOCAL, STREAMING = METHODS = ("post-local", "streaming")
TITLES = {POST_LOCAL: "post-local SGD", STREAMING: "streaming DiLoCo, in fragments"}
FRAGMENTS, DELAY = 4, 1


def train(args: argparse.Namespace) -> None:
    """Be one of the ranks: resume if there is something to resume from, train, and report."""
    corpus = load_corpus()
    try:
        as_collective(COMM)
        text = shard(corpus.train, COMM.rank, COMM.size)
    except (RuntimeError, ValueError) as error:  # the launcher is another MPI's, or there are too many ranks
        give_up(f"{error}")
    valid = spread(torch.cat(corpus.valid), VALIDATION)[COMM.rank :: COMM.size]
    # All that a step depends on: from a checkpoint of other settings, this job would go on to another end.
    settings = {name: getattr(args, name) for name in ("method", "steps", "warmup", "period", "batch", "rate", "seed")}
    settings |= {"ranks": COMM.size, "text": corpus.digest}

    params = init_params(args.seed)
    # The momentum is averaged with the parameters: after an average ranks differ in nothing, and one file holds all.
    state = {"params": params, "velocity": {name: torch.zeros_like(param) for name, param in params.items()}}
    # One fragment may be on its way on the group of the parameters: what else is averaged takes another.
    others = COMM.Dup() if args.method == STREAMING else COMM
    averager = streaming(args) if args.method == STREAMING else None
    if averager is not None:
        state["averager"] = averager.init(params)
    losses = torch.zeros(COMM.size, args.steps)  # a row for each rank
    log: Tree = {"valid": [], "averagings": 0, "sent": 0, "seconds": 0.0}  # rank 0's counts for all
    first = saved = resume(args, settings, state, losses, log)

    grad_and_value(loss_fn)(params, spread(text, 1))  # the first call takes seconds to import what it needs
    COMM.Barrier()
    groups = {as_collective(COMM), as_collective(others)}
    sent_before, start = sum(group.bytes_sent for group in groups) - log["sent"], time.perf_counter() - log["seconds"]
    bar = tqdm(total=args.steps, initial=first, desc=TITLES[args.method], unit="step", disable=COMM.rank != 0)
    for step in range(first, args.steps):
        batch = sample(text, args.batch, seed=args.seed, rank=COMM.rank, step=step)
        grads, losses[COMM.rank, step] = grad_and_value(loss_fn)(state["params"], batch)
        if in_warmup := step < args.warmup:  # during warm-up the gradients are averaged,
            grads = average(grads, others, weight=len(text), donate=True)
        state |= sgd(state, grads, args.rate * (1 - step / args.steps))
        ends = step + 1 == args.steps  # perhaps within a period; the model is the mean of the ranks'
        fires = should_average(step, warmup=args.warmup, period=args.period)
        if averager is not None:  # whenever it is time for a fragment
            state["params"], state["averager"] = averager.update(
                state["params"], state["averager"], weight=len(text), donate=True
            )
            if ends:
                state["params"] = average(state["params"], others, weight=len(text), donate=True)
        elif fires or ends:
            state = average(state, COMM, weight=len(text), donate=True)  # afterwards the parameters, every few steps
        fires = fires or ends
        log["averagings"] += in_warmup + fires
        bar.update()
        # Between two averages ranks hold different parameters: a checkpoint waits for the next one. (In streaming
        # DiLoCo they always do, and each rank's state is saved, with what is under way.)
        if (in_warmup or fires) and (ends or (step + 1) // args.every > saved // args.every):
            saved = step + 1
            log["sent"] = sum(group.bytes_sent for group in groups) - sent_before
            log["valid"].append((saved, validate(state["params"], valid, others)))
            log["seconds"] = time.perf_counter() - start
            COMM.Allgather(MPI.IN_PLACE, losses.numpy())
            kept = all_states(state) if args.method == STREAMING else state
            checkpoint = {"settings": settings, "step": saved, "state": kept, "losses": losses, "log": log}
            if COMM.rank == 0:
                save(args.checkpoint, checkpoint)
    bar.close()
    if COMM.rank == 0:
        report(state["params"], losses.numpy(), log, args)


def streaming(args: argparse.Namespace) -> Averager:
    """Return the averager of `--method streaming`."""
    averages = outer.sgd(1.0)
    return streaming_diloco(
        args.period, fragments=FRAGMENTS, delay=DELAY, outer=averages, warmup=args.warmup, group=COMM
    )


def validate(params: Params, valid: torch.Tensor, group: Any) -> float:
    """Return the validation loss. Each rank reads some of the windows, and the mean over ranks is an average, too.

    (Of streaming DiLoCo, each reads them with the model that it has.)
    """
    with torch.no_grad():
        loss = torch.stack([len(part) * loss_fn(params, part) for part in valid.split(16)]).sum() / len(valid)
        return average(loss, group, weight=len(valid)).item()


def all_states(state: Tree) -> list[torch.Tensor]:
    """Return every rank's state, each as the bytes of a file; on rank 0 only."""
    file = io.BytesIO()
    torch.save(state, file)
    files = COMM.gather(file.getvalue())
    return [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in files or ()]


def save(path: Path, checkpoint: Tree) -> None:
    """Write a checkpoint whole or not at all: whenever the job is killed, ``path`` is this one or the one before."""
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def resume(args: argparse.Namespace, settings: Tree, state: Tree, losses: torch.Tensor, log: Tree) -> int:
    """Fill in what the checkpoint holds, on every rank, and return the step to go on from: 0 if there is none.

    Rank 0 reads and tells: ranks could see different files, and must agree on the step.
    """
    found, mistake = load(args, settings) if COMM.rank == 0 else ({}, "")
    step = np.array([-1 if mistake else found.get("step", 0)])
    COMM.Bcast(step)
    if step[0] < 0:
        give_up(mistake)
    if step[0] > 0:
        log.update(found.get("log", {}))
        kinds = state
        if args.method == STREAMING:  # each rank has its own
            content = COMM.scatter([file.numpy().tobytes() for file in found["state"]] if COMM.rank == 0 else None)
            with torch.serialization.safe_globals([StreamingState, MomentumState]):
                state.update(torch.load(io.BytesIO(content), weights_only=True))
            kinds = {}
        mine = [losses, *(leaf for kind in kinds for leaf in state[kind].values())]
        if COMM.rank == 0:
            theirs = [found["losses"], *(found["state"][kind][name] for kind in kinds for name in state[kind])]
            for new, old in zip(mine, theirs, strict=True):
                new.copy_(old)
        for leaf in mine:
            COMM.Bcast(leaf.numpy())
    return int(step[0])


def load(args: argparse.Namespace, settings: Tree) -> tuple[Tree, str]:
    """Return the checkpoint, empty if there is none yet, and what is wrong with it or with where files are to go."""
    for path in (args.checkpoint, args.plot):
        if not path.parent.is_dir():
            return {}, f"there is no folder {path.parent}"
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        return {}, f"--plot must end with .png, .pdf or .svg, got {args.plot}"
    if not args.checkpoint.exists():
        return {}, ""
    try:
        found = torch.load(args.checkpoint, weights_only=True)
        theirs = {name: found["settings"][name] for name in settings}
    except Exception as error:  # whatever a file that is no checkpoint makes of its reader
        reason = error if isinstance(error, OSError) else type(error).__name__
        return {}, f"{args.checkpoint} is no checkpoint of this example ({reason})"
    differ = [f"{name} {theirs[name]}, not {settings[name]}" for name in settings if theirs[name] != settings[name]]
    if differ:
        return {}, f"{args.checkpoint} is of a run with {', '.join(differ)}: use its settings, or another file"
    return found, ""


def give_up(mistake: str) -> NoReturn:
    """End the job, with one line from rank 0. All ranks come here, so none ends the job before it is written."""
    if COMM.rank == 0:
        sys.stderr.write(f"mpi_train.py: error: {mistake}\n")
        sys.stderr.flush()
    COMM.Barrier()
    sys.exit(1)


def report(params: Params, losses: np.ndarray, log: Tree, args: argparse.Namespace) -> None:
    """Print the table, beside what averaging gradients at every step would send, and save the plot."""
    nats, sent = log["valid"][-1][1], log["sent"] / 1e6
    bits = nats / math.log(2)
    synchronous = args.steps * 2 * sum(param.nbytes for param in params.values()) * (COMM.size - 1) / COMM.size / 1e6
    lines = [
        f"{'method':38}{'nats/char':>10}{'bits/char':>11}{'averagings':>12}{'sent per worker':>17}{'seconds':>9}",
        f"{TITLES[args.method]:38}{nats:10.3f}{bits:11.3f}{log['averagings']:12}{sent:14.2f} MB{log['seconds']:9.1f}",
        f"{'gradients at every step, as computed':38}{'':21}{args.steps:12}{synchronous:14.2f} MB",
    ]
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    plot(
        args.plot, losses, log["valid"], f"{TITLES[args.method]}: {args.warmup} steps of warm-up, period {args.period}"
    )
    sys.stdout.write(f"Loss curves saved to {args.plot.resolve()}, the model to {args.checkpoint.resolve()}\n")


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default=POST_LOCAL, help="how to average (default: post-local)")
    parser.add_argument("--steps", type=int, default=3000, help="of each rank (default: 3000)")
    parser.add_argument("--warmup", type=int, help="steps that average gradients (default: a twentieth of all)")
    parser.add_argument("--period", type=int, default=16, help="steps between averagings after them (default: 16)")
    parser.add_argument("--batch", type=int, default=8, help="windows of text in a step of a rank (default: 8)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate, falling to 0 (default: 0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoint", type=Path, default="mpi_train.pt", help="resume from this file if it exists, and save to it"
    )
    parser.add_argument(
        "--every", type=int, default=200, help="validate and save at the first averaging after so many (default: 200)"
    )
    parser.add_argument("--plot", type=Path, default="mpi_train.png", help="save the loss curves to this file")
    args = parser.parse_args()
    args.warmup = args.steps // 20 if args.warmup is None else args.warmup
    try:
        should_average(0, warmup=args.warmup, period=args.period)
        if args.method == STREAMING:
            streaming(args)
    except ValueError as error:
        parser.error(f"{error}")
    for name in ("steps", "batch", "every", "rate"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, got {args.seed}")
    return args


def main() -> None:
    """Train, unless the command line is wrong: then rank 0 says why, and the others end only after it has."""
    unseen = io.StringIO() if COMM.rank != 0 else None
    try:
        with contextlib.redirect_stdout(unseen or sys.stdout), contextlib.redirect_stderr(unseen or sys.stderr):
            args = parse_arguments()
    except SystemExit:
        COMM.Barrier()
        raise
    torch.set_num_threads(1)  # ranks share the cores
    train(args)


if __name__ == "__main__":
    main()

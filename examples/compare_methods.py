r"""Ways to train a language model on several workers: how well each one learns, and how much it sends for that.

Every method is an averager, and all go through the loop in `train`: the same steps, text and optimizer, Adam.

    python examples/compare_methods.py                          starts four workers of its own, and takes forty minutes
    python examples/compare_methods.py --steps 60 --seeds 1     only to see it run

The learning rate is the one, of three, that is best for synchronous training: --rates 0.01 0.015 0.02 tries them again.
The other methods take it as it is.

Streaming DiLoCo has as many steps in a period as DiLoCo, in four fragments, each of which travels for one step of
training, or for five.

DiLoCo sends its pseudo-gradients as a code, too: int8, int4 and int2, and int4 often, whose period of 8 steps costs as
many bytes as 60 without a code. The outer rate and momentum of that are the best by the loss on seed 100, which is none
of the table's. To try them again:

    for rate in 0.7 1.0 1.2; do for momentum in 0 0.2 0.4; do
        python examples/compare_methods.py --methods "DiLoCo int4 often" --first-seed 100 --seeds 1 \
            --often-rate $rate --often-momentum $momentum
    done; done
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from charlm import Params, adam, init_params, load_corpus, loss_fn, sample, shard, spread
from torch.func import grad_and_value
from tqdm import tqdm

import funcavg
from funcavg import average
from funcavg.collectives import as_collective

Run = dict[str, Any]  # what a training run leaves behind, for JSON

SYNCHRONOUS, LOCAL, POST_LOCAL, HIERARCHICAL, DILOCO, INT8, INT4, INT2, OFTEN, STREAMING, LATE = METHODS = (
    "synchronous", "local SGD", "post-local SGD", "hierarchical SGD", "DiLoCo",
    "DiLoCo int8", "DiLoCo int4", "DiLoCo int2", "DiLoCo int4 often", "streaming DiLoCo", "streaming, 5 late",
)  # fmt: skip
WIRES = {INT8: "int8", INT4: "int4", INT2: "int2", OFTEN: "int4"}  # how their pseudo-gradients travel


class Goal(NamedTuple):
    """What a method promises, against another."""

    method: str
    base: str
    more: float  # percent of the other's loss
    fewer: float = 0  # times as few bytes


GOALS = [
    Goal(DILOCO, SYNCHRONOUS, 5, 50),
    Goal(INT8, DILOCO, 0.1),
    Goal(INT4, DILOCO, 0.3),
    Goal(INT2, DILOCO, 1),
    Goal(OFTEN, SYNCHRONOUS, 3, 57),
    Goal(STREAMING, DILOCO, 1),
    Goal(LATE, DILOCO, 1),
]
VALIDATION = 512  # windows
EVERY = 60  # steps between validations
# Of DiLoCo's kind:
DASHED = {INT8: "plum", INT4: "orchid", INT2: "mediumvioletred", OFTEN: "indigo", STREAMING: "olive", LATE: "teal"}
LINKS = {"100 Mbit/s": 1e8, "10 Gbit/s": 1e10}  # bits in a second


class Job(NamedTuple):
    """What a worker has."""

    text: torch.Tensor
    valid: torch.Tensor  # its part of the windows to validate on
    pair: Any  # the group of two workers that average more often than all do; None if there are no pairs
    referee: Any  # all workers, once more: validation averages here, where no bytes of a method are counted
    bar: tqdm


def make_averager(method: str, pair: Any, args: argparse.Namespace) -> tuple[funcavg.Averager, int]:
    """Return a method, and for how many steps it averages gradients."""
    if method == SYNCHRONOUS:  # is all warm-up
        return funcavg.periodic(1, warmup=args.steps), args.steps
    if method == LOCAL:
        return funcavg.periodic(args.period), 0
    if method == POST_LOCAL:
        return funcavg.periodic(args.period, warmup=args.steps // 20), args.steps // 20
    if method == HIERARCHICAL:
        return funcavg.hierarchical({args.period // 4: pair, args.period: None}), 0
    period, rate, momentum = args.outer_period, args.outer_rate, args.outer_momentum
    if method in (STREAMING, LATE):  # what a fragment's mean is mixed with has gone on for one step, or for five
        delay, mix = (1, 0.0) if method == STREAMING else (5, 0.5)
        outer = funcavg.outer.nesterov(rate, momentum)
        return funcavg.streaming_diloco(period, fragments=args.fragments, delay=delay, mix=mix, outer=outer), 0
    if method == OFTEN:
        period, rate, momentum = args.often_period, args.often_rate, args.often_momentum
    return funcavg.diloco(period, outer=funcavg.outer.nesterov(rate, momentum), wire=WIRES.get(method)), 0


def train(method: str, rate: float, seed: int, job: Job, args: argparse.Namespace) -> Run:
    """Train from the seed's parameters."""
    rank, everyone = dist.get_rank(), as_collective()
    groups = [everyone] if job.pair is None else [everyone, as_collective(job.pair)]

    def sent() -> int:
        return sum(group.bytes_sent for group in groups)

    job.bar.set_description(f"{method}, seed {seed}")
    zeros = {name: torch.zeros_like(param) for name, param in init_params(seed).items()}
    inner = {"params": init_params(seed), "mean": zeros, "square": zeros}
    sent_to_all, counts, curve = everyone.bytes_sent, [sent()], []  # what was sent after each occasion to send
    streams, applied = method in (STREAMING, LATE), 0  # fragments: what they send comes while training goes on
    averager, warmup = make_averager(method, job.pair, args)
    state = averager.init(inner["params"])
    counts.append(sent())
    for step in range(args.steps):
        before = everyone.bytes_sent
        batch = sample(job.text, args.batch, seed=seed, rank=rank, step=step)
        grads, _ = grad_and_value(loss_fn)(inner["params"], batch)
        if step < warmup:  # during warm-up the gradients are averaged,
            grads = average(grads, donate=True)
            counts.append(sent())
        rising, falling = min(1, 20 * (step + 1) / args.steps), 1 - step / args.steps
        inner = adam(inner, grads, rate * rising * falling, step)
        anchors = state.anchor if streams else None
        inner["params"], state = averager.update(inner["params"], state, donate=True)  # then whatever the method says
        applied += streams and state.anchor is not anchors
        counts.append(sent())
        within = everyone.bytes_sent == before or streams
        if step + 1 == args.steps and within:  # the end lies within a period, or other fragments' do,
            funcavg.forget(everyone)  # and maybe one is still under way
            inner["params"] = average(inner["params"], donate=True)  # and the model is the mean of the workers'
            counts.append(sent())
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            curve.append((counts[-1] - counts[0], validate(inner["params"], job)))
        job.bar.update()
    averagings = 2 + applied if streams else len(set(counts)) - 1  # 2: the first anchor, and the end
    run = {"method": method, "rate": rate, "seed": seed, "loss": curve[-1][1], "averagings": averagings}
    return run | {"sent": curve[-1][0], "sent_to_all": everyone.bytes_sent - sent_to_all, "curve": curve}


def validate(params: Params, job: Job) -> float:
    """Return the validation loss, in nats per character, of the mean of the workers' models. Training never notices."""
    model = average(params, job.referee)
    with torch.no_grad():
        loss = torch.stack([len(part) * loss_fn(model, part) for part in job.valid.split(16)]).sum() / len(job.valid)
    loss = average(loss, job.referee, weight=len(job.valid)).item()
    return loss if math.isfinite(loss) else math.inf


def work(rank: int, args: argparse.Namespace, folder: str) -> None:
    """Be one of the workers: train with every method from every seed. Rank 0 writes down what came of it."""
    torch.set_num_threads(1)  # workers share the cores
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=args.workers)
    corpus = load_corpus()
    text, valid = shard(corpus.train, rank, args.workers), spread(torch.cat(corpus.valid), VALIDATION)
    pair = dist.new_subgroups(2)[0] if args.workers == 4 else None
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    plan = [(method, seed) for seed in seeds for method in args.methods]
    tries = args.rates if len(args.rates) > 1 else []
    bar = tqdm(total=(len(tries) + len(plan)) * args.steps, unit="step", disable=rank != 0)
    job = Job(text, valid[rank :: args.workers], pair, dist.new_group(), bar)
    tried = [train(SYNCHRONOUS, rate, args.first_seed, job, args) for rate in tries]
    best = min(tried, key=lambda run: run["loss"])["rate"] if tried else args.rates[0]  # the same bits on every rank
    runs = [train(method, best, seed, job, args) for method, seed in plan]
    bar.close()
    dist.destroy_process_group()
    if rank == 0:
        settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
        results = {"settings": settings, "tried": tried, "runs": runs}
        Path(folder, "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the table, save the plot, and say whether DiLoCo has kept its promise."""
    for run in results["tried"]:
        print(f"{SYNCHRONOUS}, learning rate {run['rate']:g}: validation loss {run['loss']:.3f}")
    rate = results["runs"][0]["rate"]
    if astray := {run["method"] for run in results["runs"] if not math.isfinite(run["loss"])}:
        sys.exit(f"At learning rate {rate:g} the loss is infinite: {', '.join(sorted(astray))}. Try lower --rates.")
    runs = {method: [run for run in results["runs"] if run["method"] == method] for method in args.methods}
    links = "".join(f"{f'at {link}':>15}" for link in LINKS)
    print(f"\n{'method':18}{'validation loss':>16}{'averagings':>12}{'sent per worker':>17}{'fewer bytes':>13}{links}")
    losses = {method: statistics.fmean(run["loss"] for run in each) for method, each in runs.items()}
    sent = {method: each[0]["sent"] for method, each in runs.items()}  # with every seed, but for some bytes of greeting
    for method, each in runs.items():
        deviation = f" ± {statistics.stdev(run['loss'] for run in each):.3f}" if len(each) > 1 else ""
        fewer = f"{sent[SYNCHRONOUS] / sent[method]:.1f} x" if SYNCHRONOUS in runs else "-"
        seconds = "".join(f"{8 * sent[method] / bits:13.3g} s" for bits in LINKS.values())
        columns = f"{f'{losses[method]:.3f}{deviation}':>16}{each[0]['averagings']:12}{sent[method] / 1e6:14.2f} MB"
        print(f"{method:18}{columns}{fewer:>13}{seconds}")
    print(f"\nLoss: nats per character, mean ± standard deviation of {args.seeds} seed(s), at learning rate {rate:g}.")
    print("Seconds: computed, what the bytes would take on links of this speed.")
    if HIERARCHICAL in runs:
        part = 1 - runs[HIERARCHICAL][0]["sent_to_all"] / sent[HIERARCHICAL]
        print(f"Of {HIERARCHICAL}'s bytes {100 * part:.0f} % go to the other worker of a pair, which may share a host.")
    plot(runs, args)
    print(f"Curves saved to {args.plot.resolve()}")
    verdicts = [judge(goal, runs) for goal in GOALS if {goal.method, goal.base} <= set(runs)]
    print("".join(f"Goal met: {words}\n" for met, words in verdicts if met), end="")
    if missed := [f"Goal missed: {words}" for met, words in verdicts if not met]:
        sys.exit("\n".join(missed))


def judge(goal: Goal, runs: dict[str, list[Run]]) -> tuple[bool, str]:
    """Return whether a method has kept its promise, and words. Losses are compared in pairs of the same seed."""
    pairs = list(zip(runs[goal.method], runs[goal.base], strict=True))
    each = [100 * (run["loss"] / base["loss"] - 1) for run, base in pairs]
    more, error = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
    digits = 1 if goal.fewer else 2
    spread = f" ± {error:.{digits}f}" if len(each) > 1 else ""
    base = f"{SYNCHRONOUS} training" if goal.base == SYNCHRONOUS else goal.base
    words = f"{goal.method}'s validation loss is {abs(more):.{digits}f}{spread} % "
    words += f"{'above' if more > 0 else 'below'} that of {base} (goal: at most {goal.more} % above"
    if not goal.fewer:
        return more <= goal.more + 2 * error, f"{words}, or within two standard errors of that)."
    fewer = pairs[0][1]["sent"] / pairs[0][0]["sent"]
    words += f"), and it sends {fewer:.1f} times fewer bytes (goal: {goal.fewer} times)."
    return more <= goal.more and fewer >= goal.fewer, words


def plot(runs: dict[str, list[Run]], args: argparse.Namespace) -> None:
    """Save the validation losses, by bytes sent."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 5), layout="constrained")
    ends = {}
    for method, each in runs.items():
        color = DASHED.get(method, f"C{METHODS.index(method)}")
        megabytes = [sent / 1e6 for sent, _ in each[0]["curve"]]
        points = list(zip(*([loss for _, loss in run["curve"]] for run in each), strict=True))  # a loss for each seed
        means = list(map(statistics.fmean, points))
        axes.plot(megabytes, means, "--" if method in DASHED else ".-", color=color, label=method)
        if method not in DASHED:
            axes.fill_between(megabytes, list(map(min, points)), list(map(max, points)), color=color, alpha=0.2)
        axes.plot(megabytes[-1], means[-1], "o", color=color, markersize=9)
        ends[method] = megabytes[-1], means[-1]
    if {SYNCHRONOUS, DILOCO} <= set(ends):
        (most, loss), (least, _) = ends[SYNCHRONOUS], ends[DILOCO]
        axes.axhspan(loss, 1.05 * loss, color="grey", alpha=0.15, label="synchronous, and up to 5 % more")
        arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (least, 0.98 * loss), (most, 0.98 * loss), arrowprops=arrow)
        axes.text((most * least) ** 0.5, 0.975 * loss, f"{most / least:.0f} times fewer bytes", ha="center", va="top")
    axes.set(xscale="log", xlabel="MB sent by each worker", ylabel="validation loss, nats per character")
    axes.set_title(f"{args.workers} workers, {args.steps} steps, {args.seeds} seed(s); a dot every {EVERY} steps")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(y=0.08)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(args.plot, dpi=150)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, choices=(2, 3, 4), default=4, help="how many to start (default: 4)")
    parser.add_argument("--steps", type=int, default=1200, help="of each run (default: 1200)")
    parser.add_argument("--batch", type=int, default=8, help="windows of text in a step of a worker (default: 8)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method (default: 5)")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it (default: 0)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="(default: all, hierarchical SGD for 4 workers)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.015], help="learning rates (default: 0.015)")
    parser.add_argument("--period", type=int, default=16, help="of all methods but DiLoCo, in steps (default: 16)")
    parser.add_argument("--outer-period", type=int, default=60, help="DiLoCo's, in steps (default: 60)")
    parser.add_argument("--outer-rate", type=float, default=1.0, help="of DiLoCo's outer optimizer (default: 1.0)")
    parser.add_argument("--outer-momentum", type=float, default=0.5, help="likewise (default: 0.5)")
    parser.add_argument("--often-period", type=int, default=8, help=f"of {OFTEN}, in steps (default: 8)")
    parser.add_argument("--often-rate", type=float, default=1.0, help="of its outer optimizer (default: 1.0)")
    parser.add_argument("--often-momentum", type=float, default=0.2, help="likewise (default: 0.2)")
    parser.add_argument("--fragments", type=int, default=4, help=f"of {STREAMING} (default: 4)")
    parser.add_argument("--plot", type=Path, default=Path("compare_methods.png"), help="where the curves are saved")
    parser.add_argument("--save", type=Path, help="where everything measured is saved, as JSON")
    args = parser.parse_args()
    possible = [method for method in METHODS if method != HIERARCHICAL or args.workers == 4]
    args.methods = list(dict.fromkeys(args.methods or possible))
    if not set(args.methods) <= set(possible):
        parser.error(f"{HIERARCHICAL} averages pairs and all, and needs --workers 4, got {args.workers}")
    for name, least in (("steps", 1), ("batch", 1), ("seeds", 1), ("first_seed", 0)):
        if (value := getattr(args, name)) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not all(0 < rate < math.inf for rate in args.rates):
        parser.error(f"--rates must be positive, got {' '.join(map(str, args.rates))}")
    for name, path in (("plot", args.plot), ("save", args.save)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name}: there is no folder {path.parent}")
    if args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--plot must end with .png, .pdf or .svg, got {args.plot}")
    try:
        for method in args.methods:
            make_averager(method, None, args)
    except ValueError as error:
        parser.error(f"{error}")
    return args


def main() -> None:
    """Start the workers, and report what they have found."""
    args = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores
    # Workers play hosts: inside one host a wire changes nothing. What they send is counted alike for all methods.
    os.environ["FUNCAVG_NODE"] = "off"
    with tempfile.TemporaryDirectory() as folder:
        try:
            mp.spawn(work, (args, folder), args.workers)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:  # holds the worker's traceback
            sys.exit(f"{error}")
        text = Path(folder, "results.json").read_text(encoding="utf-8")
    if args.save is not None:
        args.save.write_text(text, encoding="utf-8")
    report(json.loads(text), args)


if __name__ == "__main__":
    main()

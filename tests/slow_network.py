"""Two hosts on one machine, joined by a slow link: network namespaces, a veth pair, and tc's token bucket.

As a script, run by root, it prints the tables of the docs' performance page. ``FUNCAVG_NODE`` tells ranks which host
they are on, so only those of one host meet in shared memory. Whatever goes to the other crosses the link, whose
interfaces count it. Stores are files, which a cut link leaves alone.
"""

import contextlib
import faulthandler
import functools
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from funcavg import PeerLostError, average, broadcast, diloco, outer, streaming_diloco
from funcavg._engine import kernel_in_use
from funcavg.testing import run_ranks
from funcavg.wires.codecs import NAMES

LINK = "slow0"  # the interface of either host
COUNTER = f"/sys/class/net/{LINK}/statistics/tx_bytes"
RATE = 200e6  # bit/s
SIZES = [4_000_000, 3_000_000, 2_000_000, 990_000, 5000, 3000, 1500, 499, 1]  # of leaves, float32
NBYTES = 4 * sum(SIZES)  # 40 MB
TURNS = 5
TIMEOUT = 4.0  # seconds, of the average whose link is cut
LIMIT = 110  # seconds, after which a rank says where it is, and ends
Ranks = list[subprocess.Popen[str]]
# Rows of the table: ranks per host, and what they call.
RAW = "1 | raw `dist.all_reduce` of one flat buffer"
DONATED, FRESH = "1 | `average(tree, donate=True)`", "1 | `average(tree)`"
RAW_OF_TWO, DONATED_OF_TWO = RAW.replace("1", "2"), DONATED.replace("1", "2")
OFF = f"{DONATED_OF_TWO} without shared memory (`FUNCAVG_NODE=off`)"
EACH, COPIED = "1 | `dist.broadcast` of each leaf", "1 | `broadcast(tree, donate=True)`"
EACH_OF_TWO, COPIED_OF_TWO = EACH.replace("1", "2"), COPIED.replace("1", "2")
MEANS = [RAW, DONATED, FRESH, RAW_OF_TWO, DONATED_OF_TWO, OFF]
WIRED = {f"{ranks} | `average(tree, donate=True, wire={wire!r})`": (ranks, wire) for ranks in (1, 2) for wire in NAMES}
# ‖result - mean‖² / ‖mean‖² of these values, at most
ERRORS = {"bfloat16": 1e-5, "int8": 1.1e-4, "int4": 2.2e-2, "int2": 0.30}


def run(command: str) -> str:
    """Run a command; return its output, or raise an OSError that says what failed."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`{command}` failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def two_hosts(rate: float = RATE) -> Iterator[list[str]]:
    """Make two namespaces and their link, of so many bit/s; yield their names; delete them."""
    hosts = [f"funcavg-{os.getpid()}-{letter}" for letter in "ab"]
    # The bucket holds two of the largest segments that TCP hands down, and 1 ms of the rate.
    limit = f"tbf rate {rate / 1e3:.0f}kbit burst {max(128, rate / 8e6):.0f}kb latency 50ms"
    try:
        for host in hosts:
            run(f"ip netns add {host}")
        run(f"ip link add {LINK} netns {hosts[0]} type veth peer name {LINK} netns {hosts[1]}")
        for number, host in enumerate(hosts, 1):
            run(f"ip -n {host} address add 10.0.0.{number}/24 dev {LINK}")
            run(f"ip -n {host} link set lo up")  # ranks of one host connect, too
            run(f"ip -n {host} link set {LINK} up")
            run(f"tc -n {host} qdisc add dev {LINK} root {limit}")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(OSError):
                run(f"ip netns delete {host}")


@contextlib.contextmanager
def ranks_on(hosts: Sequence[str], per_host: Sequence[int], *task: str) -> Iterator[tuple[Ranks, dist.Store]]:
    """Start ranks that do a task; yield them, and the store in which they meet; kill them."""
    places = [host for host, count in zip(hosts, per_host, strict=True) for _ in range(count)]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    environ |= {"GLOO_SOCKET_IFNAME": LINK, "WORLD_SIZE": str(len(places))}
    ranks: Ranks = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "store"))
        try:
            for rank, host in enumerate(places):
                command = ["ip", "netns", "exec", host, sys.executable, __file__, "rank", path, *task]
                own = {"FUNCAVG_NODE": host, "RANK": str(rank)}
                ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ | own))
            yield ranks, dist.FileStore(path)
        finally:
            for process in ranks:
                with process:  # closes the pipe, and waits
                    process.kill()


def wait_until(condition: Callable[[], bool], ranks: Ranks) -> None:
    """Wait, unless a rank fails: each does after `LIMIT` at the latest."""
    while not condition():
        codes = [process.poll() for process in ranks]
        assert not any(codes), f"exit codes of ranks: {codes}; what they say is on stderr"
        time.sleep(0.005)


def results(ranks: Ranks) -> list[Any]:
    """Return what the ranks' tasks return."""
    wait_until(lambda: None not in [process.poll() for process in ranks], ranks)
    return [json.loads(process.communicate()[0]) for process in ranks]


class Row(NamedTuple):
    """One way to average, or to copy, 40 MB, as measured."""

    seconds: float  # of the slowest rank; the median of all turns
    sent: list[float]  # bytes, by either host over the link; medians, too
    is_right: bool  # the mean, or rank 0's values, in the same bits on all ranks, in all turns
    error: float  # ‖result - mean‖² / ‖mean‖², the largest of all turns


def measure(hosts: Sequence[str], names: Sequence[str]) -> dict[str, Row]:
    """Measure some rows, in turns in the same processes, two on each host."""
    with ranks_on(hosts, [2, 2], "time_averages", *names) as (ranks, _):
        outcomes = results(ranks)
    rows = {}
    for name in names:
        members = [outcome[name] for outcome in outcomes if outcome[name]]  # each of them a list of turns
        slowest = [max(turn["seconds"] for turn in same) for same in zip(*members, strict=True)]
        sent = [statistics.median(turn["sent"] for turn in member) for member in (members[0], members[-1])]
        every = [turn for member in members for turn in member]
        is_right = all(turn["is_mean"] for turn in every) and len({turn["digest"] for turn in every}) == 1
        rows[name] = Row(statistics.median(slowest), sent, is_right, max(turn["nmse"] for turn in every))
    return rows


def cut_and_mend(hosts: Sequence[str], per_host: Sequence[int]) -> tuple[float, list[dict[str, Any]]]:
    """Cut the link during an average, and mend it when all ranks have noticed; return when, and what they found."""
    with ranks_on(hosts, per_host, "lose_link") as (ranks, store):
        wait_until(lambda: int(run(f"ip netns exec {hosts[0]} cat {COUNTER}")) > NBYTES / 4, ranks)
        run(f"ip -n {hosts[0]} link set {LINK} down")
        cut_at = time.monotonic()
        wait_until(lambda: store.check([f"lost/{rank}" for rank in range(len(ranks))]), ranks)
        run(f"ip -n {hosts[0]} link set {LINK} up")
        store.set("mended", "")
        return cut_at, results(ranks)


# What ranks do. Their values repeat, so that means are soon known; buckets begin at other places of the period.


def values_of(rank: int) -> torch.Tensor:
    """Return the period of a rank's values."""
    return torch.randn(10_000, generator=torch.Generator().manual_seed(rank))


def tree_in(flat: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a tree whose leaves lie in a flat buffer."""
    return {f"leaf{i}": leaf for i, leaf in enumerate(flat.split(SIZES))}


def judge(tree: dict[str, torch.Tensor], ranks: Sequence[int], wire: str | None = None) -> dict[str, Any]:
    """Say whether leaves are the mean of ranks' values, up to the rounding of what crosses, and give their digest."""
    flat = torch.cat(list(tree.values()))
    mean = sum(values_of(rank).double() for rank in ranks) / len(ranks)
    largest = max(values_of(rank).abs().max().item() for rank in ranks)
    error = flat.view(-1, len(mean)) - mean
    is_mean = error.abs().max().item() <= len(ranks) * largest * 2**-23
    nmse = (error.square().mean() / mean.square().mean()).item()
    if wire is not None:
        is_mean = nmse <= ERRORS[wire]
    return {"is_mean": is_mean, "nmse": nmse, "digest": hashlib.blake2b(flat.numpy().data).hexdigest()}


def time_averages(rank: int, _: dist.Store, *names: str) -> dict[str, list[dict[str, Any]]]:
    """Return what each turn of some rows took and gave; no turns of rows that this rank has no part in."""
    one, two = (0, 2), (0, 1, 2, 3)  # ranks on each host
    pair, everyone, apart = dist.new_group(one), dist.new_group(two), dist.new_group(two)
    for group in (pair, everyone):
        average({"w": torch.ones(8)}, group)  # the first call finds the node
    os.environ["FUNCAVG_NODE"] = "off"  # for the next new group only
    average({"w": torch.ones(8)}, apart)
    mine = values_of(rank).repeat(NBYTES // 40_000)
    flat = torch.empty_like(mine)
    all_reduce = lambda tree, group: dist.all_reduce(flat, group=group)
    donate = lambda tree, group: average(tree, group, donate=True)
    each = lambda tree, group: [dist.broadcast(leaf, 0, group=group) for leaf in tree.values()] and tree
    copy = lambda tree, group: broadcast(tree, group, donate=True)
    ways = {
        RAW: (all_reduce, pair, one),
        DONATED: (donate, pair, one),
        FRESH: (average, pair, one),
        RAW_OF_TWO: (all_reduce, everyone, two),
        DONATED_OF_TWO: (donate, everyone, two),
        OFF: (donate, apart, two),
        EACH: (each, pair, one),
        COPIED: (copy, pair, one),
        EACH_OF_TWO: (each, everyone, two),
        COPIED_OF_TWO: (copy, everyone, two),
    }
    for name, (count, wire) in WIRED.items():
        way = functools.partial(average, donate=True, wire=wire)
        ways[name] = way, (pair, everyone)[count - 1], (one, two)[count - 1]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn, name in itertools.product(range(TURNS), names):
        if rank == 0:
            print(f"turn {turn + 1} of {TURNS}: {name}", file=sys.stderr)
        way, group, members = ways[name]
        flat.copy_(mine)
        before = int(Path(COUNTER).read_text())
        dist.barrier()
        begin = time.perf_counter()
        result = way(tree_in(flat), group) if rank in members else None
        seconds = time.perf_counter() - begin
        dist.barrier()
        sent = int(Path(COUNTER).read_text()) - before
        if rank in members:
            result = result or tree_in(flat / len(members))  # an all-reduce returns nothing, and leaves sums
            of = members if name in MEANS or name in WIRED else members[:1]
            wire = WIRED[name][1] if name in WIRED else None
            turns[name].append({"seconds": seconds, "sent": sent} | judge(result, of, wire))
    return turns


# Training: 8 MB of parameters in fragments of 2 MB; a step computes for 50 ms.
PERIOD, FRAGMENTS, DELAY = 32, 4, 7  # 8 steps from one fragment to the next: 7 while one travels
TRAINED = 2_000_000  # float32
STEP = 0.05  # seconds


class Period(NamedTuple):
    """A period of training on one rank."""

    seconds: float
    in_steps: float  # seconds of them that were steps
    background: float  # seconds of processor of other threads: where there is no idle core, steps are slower by these


def train(rank: int, _: dist.Store, *wires: str) -> dict[str, list[Period]]:
    """Return periods without averages, with `diloco` and with `streaming_diloco`, over some wires, "" for none.

    A step multiplies matrices until `STEP` is over. Periods are in turns.
    """
    matrix, out = torch.rand(256, 256), torch.empty(256, 256)
    methods: dict[str, Any] = {"nothing": None}
    for wire in wires:
        settings = {"outer": outer.nesterov(0.7, 0.9), "wire": wire or None}
        methods[f"`diloco` {wire}".strip()] = diloco(PERIOD, **settings)
        streaming = streaming_diloco(PERIOD, fragments=FRAGMENTS, delay=DELAY, **settings)
        methods[f"`streaming_diloco` {wire}".strip()] = streaming
    trees = {name: {f"layer{k}": torch.zeros(250, 1000) for k in range(TRAINED // 250_000)} for name in methods}
    states = {name: averager and averager.init(trees[name]) for name, averager in methods.items()}
    periods: dict[str, list[Period]] = {name: [] for name in methods}
    for turn, (name, averager) in itertools.product(range(1 + TURNS), methods.items()):
        if rank == 0:
            print(f"turn {turn} of {TURNS}: {name}", file=sys.stderr)
        params, state = trees[name], states[name]
        in_steps = 0.0
        dist.barrier()
        begin, others = time.perf_counter(), time.process_time() - time.thread_time()
        for _ in range(PERIOD):  # with its last step nothing is under way
            step = time.perf_counter()
            while time.perf_counter() < step + STEP:
                torch.mm(matrix, matrix, out=out)
            for leaf in params.values():
                leaf[0] += rank + 1
            in_steps += time.perf_counter() - step
            if averager:
                params, state = averager.update(params, state, donate=True)
        if turn:  # the first finds the node, and its memory
            others = time.process_time() - time.thread_time() - others
            periods[name].append(Period(time.perf_counter() - begin, in_steps, others))
        trees[name], states[name] = params, state
    return periods


def lose_link(rank: int, store: dist.Store) -> dict[str, Any]:
    """Average while the link is cut, and when it is mended once more over a new group; return what came of it."""
    ranks = range(dist.get_world_size())
    params = tree_in(values_of(rank).repeat(NBYTES // 40_000))
    before = judge(params, [rank])
    average({"w": torch.ones(8)})  # the group is warm
    error = ""
    try:
        average(params, timeout=TIMEOUT)
    except PeerLostError as lost:
        error = str(lost)
    found = {"error": error, "lost_at": time.monotonic(), "unchanged": judge(params, [rank]) == before}
    dist.destroy_process_group()
    store.set(f"lost/{rank}", "")
    store.wait(["mended"])
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=len(ranks))
    return found | judge(average(params), ranks)


def work(path: str, task: str, *args: str) -> None:
    """Be a rank."""
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    tasks = {"time_averages": time_averages, "lose_link": lose_link, "train": train}
    try:
        store, rank, size = dist.FileStore(path), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=dist.PrefixStore("first", store), rank=rank, world_size=size)
        print(json.dumps(tasks[task](rank, store, *args)), flush=True)
        dist.barrier()  # nobody leaves while another still talks to it
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # torch's destructors could hang


def errors_of_means(wire: str, size: int, *, heavy: bool) -> float:
    """Return ‖result - mean‖² / ‖mean‖² over ranks that are threads, each of which counts as a host."""
    scales = np.exp(np.random.default_rng(99).normal(0, 1, (64, 1))) if heavy else 1.0

    def values(rank: int) -> Any:
        rng = np.random.default_rng(1000 * size + rank)
        drawn = rng.standard_t(3, (64, 1024)) if heavy else rng.standard_normal((64, 1024))
        return (drawn * scales).astype(np.float32)

    results = run_ranks(size, lambda group: average(values(group.rank), group, wire=wire))
    assert len({result.tobytes() for result in results}) == 1
    mean = sum(values(rank).astype(np.float64) for rank in range(size)) / size
    return float(((results[0] - mean) ** 2).sum() / (mean**2).sum())


def print_averages() -> None:
    """Print how long 40 MB take, in all ways."""
    with two_hosts() as hosts:
        rows = measure(hosts, MEANS) | measure(hosts, [EACH, COPIED, EACH_OF_TWO, COPIED_OF_TWO])
    print("| ranks per host | how | seconds | × raw | MB each way | Mbit/s |\n|--:|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        times, megabytes = row.seconds / rows[RAW].seconds, max(row.sent) / 1e6
        print(f"| {name} | {row.seconds:.2f} | {times:.2f} | {megabytes:.1f} | {8 * megabytes / row.seconds:.0f} |")


def crossover(rates: Sequence[float], ratios: Sequence[float]) -> str:
    """Return up to which rate ratios are below 1, between two measured ones by interpolation over their logarithms."""
    above = next((k for k, ratio in enumerate(ratios) if ratio > 1), None)
    if above is None:
        return f"more than {rates[-1]:.0f}"
    if above == 0:
        return f"less than {rates[0]:.0f}"
    (low, high), (one, other) = rates[above - 1 : above + 1], ratios[above - 1 : above + 1]
    return f"{low * (high / low) ** ((1 - one) / (other - one)):.0f}"


def print_wires(rates: Sequence[float]) -> None:
    """Print what each wire takes at some rates, in units of a raw all-reduce of one rank on each host."""
    print(f"\nThe kernel: {kernel_in_use()}")
    print("\n| Mbit/s | ranks per host | how | seconds | × raw | MB, × raw | NMSE |\n|--:|--:|---|--:|--:|--:|--:|")
    ratios: dict[str, list[float]] = {name: [] for name in WIRED}  # of seconds over a wire, and without, at each rate
    for rate in rates:
        with two_hosts(rate) as hosts:
            rows = measure(hosts, [RAW, DONATED, DONATED_OF_TWO, *WIRED])
        for name, (count, _) in WIRED.items():
            ratios[name].append(rows[name].seconds / rows[(DONATED, DONATED_OF_TWO)[count - 1]].seconds)
        for name, row in rows.items():
            assert row.is_right, name
            times, part = row.seconds / rows[RAW].seconds, max(row.sent) / max(rows[RAW].sent)
            error = f"{row.error:.1e}" if name in WIRED else "0"
            print(f"| {rate / 1e6:.0f} | {name} | {row.seconds:.3f} | {times:.3f} | {part:.4f} | {error} |", flush=True)
    print("\n| ranks per host | how | faster than without up to, Mbit/s |\n|--:|---|--:|")
    for name, found in ratios.items():
        print(f"| {name} | {crossover([rate / 1e6 for rate in rates], found)} |")
    sizes = (2, 4, 8, 16, 32)
    print(f"\n| NMSE of the mean of N ranks | {' | '.join(f'N = {size}' for size in sizes)} |")
    print(f"|---|{'--:|' * len(sizes)}")
    for wire, heavy in itertools.product(NAMES, (False, True)):
        found = [errors_of_means(wire, size, heavy=heavy) for size in sizes]
        print(f"| {wire}, {'t₃ rows' if heavy else 'Gauss'} | {' | '.join(f'{error:.2e}' for error in found)} |")


def print_training(rate: float, slower: float) -> None:
    """Print how much of the time is computing, on a link of some rate, and over int4 on one so many times slower."""
    print(f"\n| Mbit/s | how | seconds for {PERIOD} steps | computing | processor in the background |")
    print("|--:|---|--:|--:|--:|")
    for speed, wire in ((rate, ""), (rate / slower, "int4")):
        with two_hosts(speed) as hosts, ranks_on(hosts, [1, 1], "train", wire) as (ranks, _):
            outcomes = results(ranks)
        for name in outcomes[0]:
            both = [[Period(*period) for period in outcome[name]] for outcome in outcomes]
            seconds = statistics.median(one.seconds for turns in both for one in turns)
            share = min(statistics.median(one.in_steps / one.seconds for one in turns) for turns in both)
            background = statistics.median(one.background / one.seconds for turns in both for one in turns)
            cells = f"{speed / 1e6:.1f} | {name} | {seconds:.2f} | {100 * share:.1f} % | {100 * background:.1f} %"
            print(f"| {cells} |", flush=True)


def main() -> None:
    """Print the tables: all of them; with "wires" those of wires, with "training" that of training, at some rates."""
    what, rates = sys.argv[1:2], [1e6 * float(rate) for rate in sys.argv[2:]]
    if not what:
        print_averages()
    if what in ([], ["wires"]):
        print_wires(rates or [200e6, 1e9, 2e9, 5e9, 10e9])
    if what in ([], ["training"]):
        print_training(*(rates or [66e6]), 7)


if __name__ == "__main__":
    work(*sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main()

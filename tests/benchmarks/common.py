"""What the benchmarks share: trees, turns, and the table."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import funcavg


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of ResNet-50's 161 parameters (25.6 million elements)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            out = 4 * width
            shapes += [(width, width_in, 1, 1), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            shapes += [(out, width, 1, 1), (out,), (out,)]
            if block == 0:
                shapes += [(out, width_in, 1, 1), (out,), (out,)]
            width_in = out
    return [*shapes, (1000, 2048), (1000,)]


TREES = {
    "resnet50": resnet50,
    "thousand-small": lambda: [(256,)] * 1000,
    "many-small": lambda: [(256,)] * 4000,
    "flat400": lambda: [(10_000_000,)] * 10,
}


def in_turns(timed: dict[str, Callable[[], Any]], barrier: Callable[[], Any], turns: int) -> dict[str, list[float]]:
    """Time each between barriers, in turns, so that drift hits all alike. Return milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(turns + 2):
        for name, run in timed.items():
            barrier()
            start = time.perf_counter()
            run()
            barrier()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def show(title: str, times: dict[str, list[float]], baselines: dict[str, str]) -> None:
    """Print medians, and as ratios to the rows of ``baselines``: {heading: row}."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    width = max(map(len, medians))
    print(title)
    print(f"{'':{width}s}{'ms':>8s}{'min':>8s}" + "".join(f"{heading:>10s}" for heading in baselines))
    for name, value in medians.items():
        ratios = "".join(f"{value / medians[row]:10.2f}" for row in baselines.values())
        print(f"{name:{width}s}{value:8.1f}{min(times[name]):8.1f}{ratios}", flush=True)


def status(field: str) -> float:
    """Return a line of /proc/self/status in MB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def show_memory(group: Any, rank: int, shapes: list[tuple[int, ...]]) -> None:
    """Print by how much a process grows at its peak: at the first call, which makes the window and all else."""
    tree = [torch.randn(shape) for shape in shapes]
    nbytes = sum(leaf.nbytes for leaf in tree) / 2**20
    funcavg.average([torch.ones(3)], funcavg.collectives.Solo())  # imports; the group is met below, with its window
    for donate in (True, False):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = status("VmRSS")
        result = funcavg.average(tree, group, donate=donate)
        if rank == 0:
            print(f"{nbytes:.0f} MB tree, donate={donate}: {status('VmHWM') - before:.0f} MB extra", flush=True)
        del result


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--tree", choices=TREES, default="resnet50")
    parser.add_argument("--memory", action="store_true", help="measure the peak of extra memory instead")
    return parser

"""How much memory a wire takes beside what an average takes without one."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import dist
from helpers.processes import run_processes

from funcavg import average

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, which tells the peak")
ALLOWED = 32  # MB


def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def growth(rank, hosts, wires):
    """Return by how much this process is larger, at its peak, than before the first call, for each call in turn."""
    os.environ["FUNCAVG_NODE"] = hosts[rank]
    tree = {k: np.ones(2_500_000, np.float32) for k in range(4)}
    group = dist.new_group()
    average(tree[0][:10], group, wire="int4")
    before, peaks = status("VmRSS"), []
    for wire in wires:
        Path("/proc/self/clear_refs").write_text("5")
        average(tree, group, wire=wire, donate=True)
        peaks.append(status("VmHWM") - before)
    return peaks


@pytest.mark.parametrize("wire", ["bfloat16", "int8", "int4"])
def test_a_wire_takes_little_more_than_without_also_after_exact_averages(wire):
    for exact, wired in run_processes(2, growth, ("off", "off"), (None, wire)):
        assert wired <= exact + ALLOWED

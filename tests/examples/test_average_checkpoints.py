"""The example of averaged checkpoints: its table, and what averaging does to the loss."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  # the example needs it

for name in ("matplotlib", "tqdm"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "average_checkpoints.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_the_mean_of_a_few_has_a_lower_loss_than_any_of_them(tmp_path):
    done = run("--steps", 200, "--every", 10, "--plot", tmp_path / "losses.png")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(?m)^ *(\d+) checkpoint\(s\) +([\d.]+) +([+-][\d.]+) %$", done.stdout)
    assert [int(count) for count, *_ in rows] == [1, 2, 3, 5, 8, 12, 16, 20]
    losses = {int(count): float(loss) for count, loss, _ in rows}
    for count, loss, percent in rows:
        assert float(percent) == pytest.approx(100 * (float(loss) / losses[1] - 1), abs=0.02), count
    summary = re.search(
        r"mean of the last (\d+) has ([\d.]+); of these checkpoints alone the best has ([\d.]+)", done.stdout
    )
    best, loss, alone = int(summary[1]), float(summary[2]), float(summary[3])
    assert best > 1
    assert loss == min(losses.values()) < alone
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_a_wrong_interval_is_a_line():
    done = run("--steps", 5, "--every", 6)
    assert done.returncode == 2
    assert "--every must be 1 to --steps (5), got 6" in done.stderr

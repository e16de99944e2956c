"""The job goes on without a worker that kills itself, under each engine that is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import mpi
from helpers.frameworks import skip_without

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "go_on.py"
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(folder, *command, timeout=110):
    done = subprocess.run(
        command, env=ENVIRON, cwd=folder, capture_output=True, text=True, check=False, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_goes_on(output, step, steps):
    """It says who was lost, when there was a mean again, and the loss falls all the while."""
    assert f"worker 1 kills itself at step {step}\n" in output
    seconds, before, after = map(
        float, re.search(r"next mean after ([\d.]+) s; loss before ([\d.]+), after ([\d.]+)\n", output).groups()
    )
    losses = [float(loss) for loss in re.findall(r"(?m)^step +\d+  loss ([\d.]+)$", output)]
    assert after < before
    assert f"done: {steps} steps, loss {losses[-1]:.3f}" in output
    assert losses[-1] < losses[0] - 0.3
    return seconds


def test_torchrun(tmp_path):
    skip_without("torch")
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=1")
    output = run(tmp_path, *launch, JOB, "torchrun", "--steps", "96", "--kill", "1@48")
    assert "lost: torchrun has started all again from step 32" in output
    assert assert_goes_on(output, 48, 96) < 60


@pytest.mark.mpi
def test_ulfm(tmp_path):
    command = mpi.launcher()
    if isinstance(command, str):
        mpi.skip(command)
    version = [sys.executable, "-c", "from mpi4py import MPI; print(MPI.Get_library_version())"]
    if "Open MPI" not in subprocess.run(version, capture_output=True, text=True, check=True).stdout:
        pytest.skip("this MPI library ends a job of which a rank dies")
    launch = (*command, "--with-ft", "ulfm", "-n", "3", sys.executable)
    for step in (48, 96):  # in the middle, and in the last round
        output = run(tmp_path, *launch, JOB, "ulfm", "--steps", "96", "--kill", f"1@{step}")
        assert re.search(r"lost: average: rank 0 of 3.*rank (1|2)", output)
        assert assert_goes_on(output, step, 96) < 5


def test_torchft(tmp_path):
    skip_without("torchft")
    for step, steps in ((48, 480), (96, 96)):  # in the middle, and in the last round
        output = run(tmp_path, sys.executable, JOB, "torchft", "--steps", str(steps), "--kill", f"1@{step}")
        assert "worker 1 is started again\n" in output
        assert re.search(r"lost: average: rank \d of [23]", output)
        assert assert_goes_on(output, step, steps) < 10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ulfm", "--kill", "one"], "--kill must be WORKER@STEP, such as 1@64, got one"),
        (["ulfm", "--kill", "1@65"], "workers average at multiples of 16 steps, got 65"),
        (["slurm"], "invalid choice: 'slurm'"),
        (["ulfm", "--steps", "0"], "--steps and --period must be at least 1, got 0 and 16"),
    ],
)
def test_mistakes(arguments, words):
    skip_without("torch")
    done = subprocess.run([sys.executable, JOB, *arguments], env=ENVIRON, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr

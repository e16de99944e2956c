"""The MPI job trains, can be killed and resumed without losing a bit, and says in one line what is wrong."""

import io
import re
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import mpi

from funcavg.averagers import StreamingState
from funcavg.outer import MomentumState

pytestmark = pytest.mark.mpi
ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "mpi_train.py"
STEPS = 200
SHORT = ("--steps", STEPS, "--warmup", 20, "--period", 8, "--batch", 4, "--every", 20)
PARAMETERS = 98 * 64 + 6 * (128 * 64 + 64) + 64 * 98


def start(size, *args):
    return mpi.start(size, JOB, *args)


def mpiexec(size, *args, timeout=50):
    return mpi.mpiexec(size, JOB, *args, timeout=timeout)


def table(text):
    """Return (nats, bits, averagings, MB) of the job, and (averagings, MB) of synchronous training."""
    ours = re.search(r"(?m)^post-local SGD +([\d.]+) +([\d.]+) +(\d+) +([\d.]+) MB +[\d.]+$", text)
    theirs = re.search(r"(?m)^gradients at every step, as computed +(\d+) +([\d.]+) MB$", text)
    return tuple(map(float, ours.groups())), tuple(map(float, theirs.groups()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the output of a run from beginning to end, its checkpoint and its plot."""
    folder = tmp_path_factory.mktemp("whole")
    done = mpiexec(2, *SHORT, "--checkpoint", folder / "model.pt", "--plot", folder / "curves.png")
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, torch.load(folder / "model.pt", weights_only=True), folder / "curves.png"


def die_after_a_checkpoint(path, *args):
    """Kill a job as soon as it has saved something."""
    job, deadline = (
        start(2, *SHORT, *args, "--checkpoint", path, "--plot", path.with_suffix(".png")),
        time.monotonic() + 50,
    )
    try:
        while not path.exists():
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        said = mpi.kill(job)
    assert path.exists(), said


def test_the_job_trains_and_reports(whole):
    output, errors, checkpoint, plot = whole
    (nats, bits, averagings, sent), synchronous = table(output)
    fired = len(range(20, STEPS, 8))
    assert averagings == 20 + fired + 1  # and the end
    assert synchronous == (STEPS, pytest.approx(STEPS * 4 * PARAMETERS / 1e6, abs=0.01))
    # Each averaging of the parameters is one of the momentum, too; a validation averages one number.
    assert sent == pytest.approx((20 + 2 * (fired + 1)) * 4 * PARAMETERS / 1e6, abs=0.02)
    assert bits == pytest.approx(nats / 0.6931, abs=0.002)
    assert nats == pytest.approx(checkpoint["log"]["valid"][-1][1], abs=0.001)
    steps, valid = zip(*checkpoint["log"]["valid"], strict=True)
    # The first averagings from 20, 40, 60, ... steps on, and the end.
    assert steps == (20, 45, 61, 85, 101, 125, 141, 165, 181, STEPS)
    assert valid[-1] < valid[0] < 4.58  # what a guess costs: the logarithm of 98
    assert checkpoint["losses"].shape == (2, STEPS)
    for row in checkpoint["losses"]:
        assert row[:5].mean() > 3.5
        assert row[-20:].mean() < 3
    assert not torch.equal(*checkpoint["losses"])
    assert errors.count(f"| 0/{STEPS} [") == 1  # one progress bar
    assert plot.stat().st_size > 10_000
    assert f"Loss curves saved to {plot}, the model to " in output


def test_a_killed_job_goes_on_and_ends_with_the_same_bits(whole, tmp_path):
    path = tmp_path / "model.pt"
    path.with_name("model.pt.draft").write_bytes(b"a job that was killed while it was writing")
    for _ in range(3):  # where this process is held up, the job may have come to its end
        die_after_a_checkpoint(path)
        if (first := torch.load(path, weights_only=True)["step"]) < STEPS:
            break
        path.unlink()
    assert 20 <= first < STEPS

    done = mpiexec(2, *SHORT, "--checkpoint", path, "--plot", path.with_suffix(".png"))
    assert done.returncode == 0, done.stderr
    assert f"| {first}/{STEPS} [" in done.stderr  # the progress bar begins there
    assert f"| {first - 1}/{STEPS} [" not in done.stderr
    assert table(done.stdout) == table(whole[0])
    expected, resumed = whole[2], torch.load(path, weights_only=True)
    for kind in ("params", "velocity"):
        assert list(resumed["state"][kind]) == list(expected["state"][kind])
        for name, leaf in expected["state"][kind].items():
            assert torch.equal(resumed["state"][kind][name], leaf), name
    assert torch.equal(resumed["losses"], expected["losses"])
    assert resumed["log"]["valid"] == expected["log"]["valid"]

    again = mpiexec(2, *SHORT, "--checkpoint", path, "--plot", path.with_suffix(".png"))  # there is nothing left to do
    assert (again.returncode, table(again.stdout)) == (0, table(whole[0]))


def final(path):
    """Return the step of a checkpoint, and the parameters of either rank."""
    found = torch.load(path, weights_only=True)
    with torch.serialization.safe_globals([StreamingState, MomentumState]):
        states = [torch.load(io.BytesIO(file.numpy().tobytes()), weights_only=True) for file in found["state"]]
    return found["step"], [state["params"] for state in states]


def test_streaming_is_killed_and_ends_with_the_same_bits(tmp_path):
    method, whole, path = ("--method", "streaming"), tmp_path / "whole.pt", tmp_path / "model.pt"
    done = mpiexec(2, *SHORT, *method, "--checkpoint", whole, "--plot", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert "streaming DiLoCo" in done.stdout
    for _ in range(3):
        die_after_a_checkpoint(path, *method)
        if (first := final(path)[0]) < STEPS:
            break
        path.unlink()
    assert 20 <= first < STEPS
    done = mpiexec(2, *SHORT, *method, "--checkpoint", path, "--plot", tmp_path / "curves.png")
    assert done.returncode == 0, done.stderr
    assert f"| {first}/{STEPS} [" in done.stderr
    (steps, expected), (_, resumed) = final(whole), final(path)
    assert steps == STEPS
    for one, other in zip(expected, resumed, strict=True):
        assert all(torch.equal(other[name], leaf) for name, leaf in one.items())
    assert all(torch.equal(expected[1][name], leaf) for name, leaf in expected[0].items())  # the end is an average


def lines(done):
    """Return what the job itself has said: a launcher adds words of its own."""
    assert "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if "mpi_train.py: " in line]


def test_a_bad_checkpoint_is_one_line(whole, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80 no checkpoint")
    done = mpiexec(2, *SHORT, "--checkpoint", path, "--plot", path.with_suffix(".png"))
    assert done.returncode != 0
    assert lines(done) == [f"mpi_train.py: error: {path} is no checkpoint of this example (UnpicklingError)"]
    assert path.read_bytes() == b"\x80 no checkpoint"

    torch.save(whole[2], path)
    done = mpiexec(0, *SHORT, "--seed", 3, "--checkpoint", path, "--plot", path.with_suffix(".png"))
    assert done.returncode != 0
    differ = "seed 0, not 3, ranks 2, not 1: use its settings, or another file"
    assert lines(done) == [f"mpi_train.py: error: {path} is of a run with {differ}"]


def test_bad_arguments_are_refused_by_one_rank_for_all():
    done = mpiexec(2, "--period", 0)
    assert done.returncode != 0
    assert lines(done)[-1] == "mpi_train.py: error: should_average: period must be at least 1, got 0"
    assert done.stderr.count("period must be") == 1


def test_without_a_launcher_the_job_is_one_rank(tmp_path):
    files = ["--checkpoint", tmp_path / "model.pt", "--plot", tmp_path / "curves.png"]
    done = mpiexec(0, "--steps", 8, "--warmup", 2, "--period", 2, "--batch", 2, *files)
    assert done.returncode == 0, done.stderr
    ours, synchronous = table(done.stdout)
    assert ours[2:] == (2 + 3 + 1, 0)
    assert synchronous == (8, 0)


def test_the_slurm_script_is_one():
    script = JOB.with_suffix(".sbatch")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    text = script.read_text(encoding="utf-8")
    body = text.index("set -uo pipefail")
    assert text.startswith("#!/bin/bash\n")
    assert text.rindex("\n#SBATCH") < body  # Slurm stops reading at the first command
    options = re.findall(r" (--[a-z]+) ", text[text.index("python -m mpi4py") :])
    source = JOB.read_text(encoding="utf-8")
    assert options == [option for option in options if f'"{option}"' in source] == ["--checkpoint", "--every", "--plot"]

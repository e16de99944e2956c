"""The JAX example trains on devices and on MPI ranks alike, and says in one line what is wrong."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi

for name in ("jax", "equinox", "optax", "sklearn", "matplotlib"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[2]
JOB = ROOT / "examples" / "jax_local_sgd.py"

# The job, but that it saves both runs before it reports on them.
SAVING = f"""
import sys
sys.path.insert(0, {str(JOB.parent)!r})
import jax, numpy as np, jax_local_sgd as job

report = job.report

def save(test, *runs_and_args):
    *runs, args = runs_and_args
    arrays = {{f"{{i}} {{name}}": getattr(run, name) for i, run in enumerate(runs) for name in ("losses", "averaged")}}
    for i, run in enumerate(runs):
        leaves = jax.tree_util.tree_leaves_with_path(job.eqx.filter(run.model, job.eqx.is_array))
        arrays |= {{f"{{i}} {{jax.tree_util.keystr(path)}}": leaf for path, leaf in leaves}}
    np.savez(args.plot.with_suffix(".npz"), **arrays)
    report(test, *runs_and_args)

job.report = save
job.main()
"""


@pytest.fixture(autouse=True)
def nobody_has_chosen_devices(monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def table(text):
    """Return {method: (accuracy, averagings)}."""
    rows = re.findall(r"(?m)^(\S.*\S) +([\d.]+) % +(\d+) +[\d.]+$", text)
    return {method: (float(accuracy), int(averagings)) for method, accuracy, averagings in rows}


def test_the_example_trains_on_two_simulated_devices_and_meets_its_goal(tmp_path):
    picture = tmp_path / "curves.png"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(JOB), "--steps", "300", "--plot", str(picture)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    sync, local = table(done.stdout)["gradients at every step"], table(done.stdout)["post-local SGD"]
    assert (sync[1], local[1]) == (301, 15 + len(range(15, 300, 16)) + 1)
    verdict = (
        rf"Goal met: post-local SGD reads {local[0]} % of the test digits \(goal: 95 %\), synchronous training "
        rf"{sync[0]} % \(goal: at most one point more\), and it averages {301 / local[1]:.1f} times less often"
    )
    assert re.search(verdict, done.stdout)
    assert local[0] >= 95
    assert f"Loss curves saved to {picture}\n" in done.stdout

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    for color in ("tab:orange", "tab:blue"):
        assert (np.abs(pixels - mpl.colors.to_rgb(color)).max(-1) < 0.02).sum() > 500


@pytest.mark.mpi
def test_devices_and_mpi_ranks_learn_the_same_and_one_rank_reports(tmp_path):
    found = []
    for ranks in (0, 2):
        settings = ("--steps", 100, "--warmup", 20, "--period", 8, "--plot", tmp_path / f"{ranks}.png")
        done = mpi.mpiexec(ranks, "-c", SAVING, *settings)
        assert done.returncode != 0  # the goal is missed
        assert done.stdout.count("post-local SGD ") == 1
        assert len(re.findall(r"Goal missed: post-local SGD reads .* averages 3\.3 times less often", done.stderr)) == 1
        found.append((np.load(tmp_path / f"{ranks}.npz"), table(done.stdout)))
    (devices, shown), (processes, shown_too) = found
    assert shown == shown_too
    assert [averagings for _, averagings in shown.values()] == [101, 31]
    assert sorted(devices) == sorted(processes)
    assert len(devices) == 2 * (2 + 4)  # losses and steps, two layers of weights and biases
    for name in devices:
        np.testing.assert_allclose(devices[name], processes[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(devices["0 averaged"], range(101))
    np.testing.assert_array_equal(devices["1 averaged"], [*range(20), *range(20, 100, 8), 100])
    np.testing.assert_allclose(devices["0 losses"][:21], devices["1 losses"][:21], rtol=1e-6)
    assert (devices["0 losses"] != devices["1 losses"]).sum() > 50  # after warm-up, workers have gone on their own


@pytest.mark.mpi
def test_bad_arguments_are_refused_by_one_rank_for_all():
    done = mpi.mpiexec(2, JOB, "--period", 0)
    assert done.returncode != 0
    assert done.stderr.count("error: should_average: period must be at least 1, got 0") == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Return a function that runs the example with arguments that it refuses, and returns its last line."""
    spec = importlib.util.spec_from_file_location("jax_local_sgd", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    for launcher in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(launcher, raising=False)

    def refuse(*args):
        monkeypatch.setattr(sys, "argv", [str(JOB), *args])
        with pytest.raises(SystemExit, match="^2$"):
            job.main()
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--period", "0"], "should_average: period must be at least 1, got 0"),
        (["--warmup", "-1"], "should_average: warmup must be at least 0, got -1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--plot", "/no/such/folder/curves.png"], "--plot: there is no folder /no/such/folder"),
        (["--plot", "curves.nonsense"], "--plot must end with .png, .pdf or .svg, got curves.nonsense"),
    ],
)
def test_bad_arguments_are_refused_before_training(arguments, message, refusal):
    assert refusal(*arguments) == f"jax_local_sgd.py: error: {message}"


def test_ranks_without_mpi4py_are_told_so(refusal, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert refusal().startswith(
        "jax_local_sgd.py: error: MPICH's mpiexec has started 2 ranks, which takes mpi4py and that MPI library: "
    )


def test_a_single_device_is_refused(refusal, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")  # the user's choice is kept
    monkeypatch.setattr("jax.device_count", lambda: 1)
    assert refusal().startswith("jax_local_sgd.py: error: there is one worker only: ")

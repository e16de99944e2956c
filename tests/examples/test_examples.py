"""The main job runs, and what the README shows is what happens."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import skip_without, torch
from helpers.processes import run_processes

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")
HEADER = "method  test accuracy  averagings  sent per worker  seconds"
PARAMETERS = 64 * 256 + 256 + 256 * 10 + 10
CLAIM = 48  # bytes that a rank sends each other rank before it averages


def run(*command):
    for framework in ("torch", "sklearn", "matplotlib"):
        skip_without(framework)
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=100, check=False, cwd="/"
    )


def squeeze(line):
    """Return a line of the table with its columns two blanks apart."""
    return re.sub(r" {2,}", "  ", line.strip())


def table(text):
    """Return {method: (accuracy, averagings, bytes in MB, seconds)}."""
    lines = text.splitlines()
    start = [squeeze(line) for line in lines].index(HEADER)
    rows = [
        re.fullmatch(r"(\S.*\S) +([\d.]+) % +(\d+) +([\d.]+) MB +([\d.]+)", line) for line in lines[start + 1 :][:2]
    ]
    return {row[1]: (float(row[2]), int(row[3]), float(row[4]), float(row[5])) for row in rows}


def check_table(text, *, size, steps, warmup, period):
    sync, local = table(text)["gradients at every step"], table(text)["post-local SGD"]
    fired = len(range(warmup, steps, period))
    assert (sync[1], local[1]) == (steps + 1, warmup + fired + 1)
    for row in (sync, local):
        each = (size - 1) * (2 * 4 * PARAMETERS / size + CLAIM)  # rows of a bucket are padded by a few bytes
        assert row[2] == pytest.approx(row[1] * each / 1e6, abs=0.006, rel=1e-3)
        assert row[3] > 0
    assert local[0] >= 95
    assert sync[0] - local[0] <= 1.05  # printed with one decimal
    assert sync[2] / local[2] >= 6
    verdict = (
        rf"Goal met: post-local SGD reads {local[0]} % of the test digits \(goal: 95 %\), synchronous training "
        rf"{sync[0]} % \(goal: at most one point more\), and it sends {sync[2] / local[2]:.1f} times fewer bytes "
        rf"\(goal: 6 times\)\."
    )
    assert re.search(verdict, text)


def test_the_quickstart_starts_two_workers_and_meets_its_goal(tmp_path):
    picture = tmp_path / "curves.png"
    done = run(QUICKSTART, "--steps", 300, "--plot", picture)
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, size=2, steps=300, warmup=15, period=16)
    assert "post-local SGD         : 100%" in done.stderr  # the progress bar
    assert f"Loss curves saved to {picture}\n" in done.stdout

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape == (675, 1650, 3)
    for color in ("tab:orange", "tab:blue"):  # both curves, in both halves
        drawn = np.abs(pixels - mpl.colors.to_rgb(color)).max(-1) < 0.02
        assert drawn[:, :825].sum() > 500
        assert drawn[:, 825:].sum() > 500


def test_the_quickstart_runs_under_torchrun(tmp_path):
    done = run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 3, QUICKSTART),
        *("--steps", 200, "--warmup", 8, "--period", 20, "--plot", tmp_path / "curves.png"),
    )
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, size=3, steps=200, warmup=8, period=20)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_the_quickstart_says_when_it_misses_its_goal(tmp_path):
    done = run(QUICKSTART, "--steps", 4, "--plot", tmp_path / "curves.png")
    assert done.returncode == 1
    assert re.search(r"Goal missed: post-local SGD reads [\d.]+ % .* and it sends 2\.5 times fewer bytes", done.stderr)


def test_a_worker_that_fails_shows_its_traceback(tmp_path):
    done = run(QUICKSTART, "--workers", 1, "--steps", 1, "--plot", tmp_path / "curves.nonsense")
    assert done.returncode == 1
    assert re.search(r"(?s)Process 0 terminated.*in plot.*ValueError: Format 'nonsense' is not supported", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--period", "0"], "period must be at least 1, got 0"),
        (["--warmup", "-1"], "warmup must be at least 0, got -1"),
        (["--workers", "0"], "--workers and --steps must be at least 1, got 0 and 1000"),
        (["--steps", "0"], "--workers and --steps must be at least 1, got 2 and 0"),
        (["--plot", "/no/such/folder/curves.png"], "--plot: there is no folder /no/such/folder"),
    ],
)
def test_the_quickstart_refuses_bad_arguments_before_it_starts_workers(arguments, message, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    quickstart = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)
    spec.loader.exec_module(quickstart)
    monkeypatch.setattr(sys, "argv", ["quickstart.py", *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        quickstart.main()
    assert capsys.readouterr().err.endswith(f"error: should_average: {message}\n".replace("should_average: --", "--"))


def test_the_readme_shows_the_table_that_the_quickstart_prints():
    sync, local = table(README)["gradients at every step"], table(README)["post-local SGD"]
    assert (sync[1], local[1]) == (1001, 111)


def test_the_readmes_extras_exist_and_never_replace_a_users_torch():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"'\.\[(\w+)\]'", README)
    assert {"examples", "test", "torch"} <= set(extras)
    for extra in extras:
        assert re.search(rf"(?m)^{extra} = \[", project)
    assert re.search(r'(?m)^torch = \["torch>=[\d.]+"\]$', project)


def readme_block(language, word):
    """Return the one code block of the README that holds a word."""
    (block,) = [b for b in re.findall(rf"(?ms)^```{language}\n(.*?)^```", README) if word in b]
    return block


def make_job(rank, steps):
    """Return what the README's loops are given."""
    draw = torch.Generator().manual_seed(1 + rank)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    for i, param in enumerate(model.parameters()):
        torch.nn.init.normal_(param, generator=torch.Generator().manual_seed(i))
    batches = [(torch.randn(4, 3, generator=draw), torch.randn(4, 2, generator=draw)) for _ in range(steps)]
    return {"model": model, "batches": batches}


def run_block(rank, code, steps, result):
    job = make_job(rank, steps)
    exec(compile(code, "<README.md>", "exec"), job)
    return [param.detach() for param in eval(result, job)]


def post_local_sgd(size, steps):
    """Return what every rank should have, from plain autograd in one process."""
    jobs = [make_job(rank, steps) for rank in range(size)]
    replicas = [list(job["model"].parameters()) for job in jobs]

    def average_in_place(columns):
        for column in zip(*columns, strict=True):
            mean = torch.stack(list(column)).mean(0)
            for leaf in column:
                leaf.copy_(mean)

    for step in range(steps):
        grads = []
        for job in jobs:
            x, y = job["batches"][step]
            loss = torch.nn.functional.mse_loss(job["model"](x), y)
            grads.append(torch.autograd.grad(loss, list(job["model"].parameters())))
        with torch.no_grad():
            if step < 100:
                average_in_place(grads)
            for params, grad in zip(replicas, grads, strict=True):
                for param, g in zip(params, grad, strict=True):
                    param.sub_(0.1 * g)
            if step >= 100 and (step - 100) % 4 == 0:
                average_in_place(replicas)
    return [[param.detach() for param in params] for params in replicas]


@pytest.mark.parametrize("steps", [100, 109, 111])  # the end of warm-up, an averaging, and between two
def test_the_readmes_functional_loop_is_post_local_sgd(steps):
    code = readme_block("python", "functional_call")
    results = run_processes(2, run_block, code, steps, "params.values()")
    for result, expected in zip(results, post_local_sgd(2, steps), strict=True):
        for ours, theirs in zip(result, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    same = [torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True)]
    assert all(same) if steps < 111 else not any(same)


def test_the_readmes_diff_changes_no_bit():
    diff = readme_block("diff", "PostLocalSGDOptimizer")
    assert len(re.findall(r"(?m)^[-+]", diff)) == 3
    torchs, ours = ("".join(line[1:] or "\n" for line in diff.splitlines(True) if line[0] != drop) for drop in "+-")
    assert "funcavg" in ours
    assert "funcavg" not in torchs
    before = run_processes(2, run_block, torchs, 111, "model.parameters()")
    after = run_processes(2, run_block, ours, 111, "model.parameters()")
    for theirs, mine in zip(before, after, strict=True):
        for x, y in zip(theirs, mine, strict=True):
            assert torch.equal(x, y)
    assert not torch.equal(after[0][0], after[1][0])  # the end lies between two averagings
    for result, expected in zip(after, post_local_sgd(2, 111), strict=True):
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)

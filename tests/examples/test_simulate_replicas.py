"""The simulation does what its table says: local SGD of replicas, and the bytes that as many workers would send."""

import importlib.util
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

for name in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(name)

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "simulate_replicas.py"
NBYTES = 4 * (64 * 32 + 32 + 32 * 10 + 10)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("simulate_replicas", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    """Run the example from a folder that is not the clone's."""
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        cwd="/",
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_a_small_sweep(tmp_path):
    picture = tmp_path / "sweep.png"
    done = run("--periods", 64, 1, 12, 1, "--steps", 128, "--starts", 2, "--plot", picture)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"(?m)^ *(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) % +([\d.]+)$", done.stdout)
    assert [(int(row[0]), int(row[1])) for row in rows] == [(1, 128), (12, 11), (64, 2)]  # 12: one more at the end
    for _, averagings, megabytes, loss, percent, _ in rows:
        assert float(megabytes) == pytest.approx(int(averagings) * 2 * NBYTES * 7 / 8 / 1e6, abs=0.0005)
        assert 0 < float(loss) < 1
        assert float(percent) > 80
    assert float(rows[0][3]) < float(rows[2][3])
    assert "period    64: 100%" in done.stderr  # the progress bar
    assert re.search(r"Period 64 sends 64 times fewer bytes than period 1, at [\d.]+ times its loss\.", done.stdout)
    assert f"Loss against MB per worker saved to {picture}\n" in done.stdout

    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape == (750, 1200, 3)
    for color in ("tab:orange", "tab:blue"):
        drawn = np.abs(pixels - mpl.colors.to_rgb(color)).max(-1) < 0.02
        for part in (drawn[:, :400], drawn[:400], drawn[400:]):  # at few megabytes; at high and at low losses
            assert part.sum() > 20


def by_hand(example, period, shards, args):
    """Return every start's mean model after local SGD with models and an optimizer that belong to one replica."""
    results = []
    for start in range(args.starts):
        models = [example.make_model(start) for _ in range(args.replicas)]
        optimizers = [torch.optim.SGD(model.parameters(), example.LEARNING_RATE) for model in models]
        for step, (x, y) in enumerate(example.draw_batches(shards, args), start=1):
            for r, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x[r, start]), y[r, start]).backward()
                if step > args.warmup:
                    optimizer.step()
            with torch.no_grad():
                for leaves in zip(*(model.parameters() for model in models), strict=True):
                    if step <= args.warmup:
                        mean = torch.stack([leaf.grad for leaf in leaves]).mean(0)
                        for leaf in leaves:
                            leaf.sub_(example.LEARNING_RATE * mean)
                    elif (step - args.warmup) % period == 0 or step == args.steps:
                        mean = torch.stack(leaves).mean(0)
                        for leaf in leaves:
                            leaf.copy_(mean)
        results.append(dict(models[0].named_parameters()))
    return {name: torch.stack([result[name].detach() for result in results]) for name in results[0]}


def small_job(example, **settings):
    args = Namespace(**{"replicas": 3, "starts": 2, "steps": 10, "warmup": 0, "sorted": 0.5} | settings)
    return example.make_shards(example.load_data()[0], args), args


def test_period_1_is_synchronous_sgd_on_the_mean_gradient(example):
    shards, args = small_job(example)
    params, averagings, _ = example.train(1, shards, args)
    assert averagings == 10
    for start in range(args.starts):
        model = example.make_model(start)
        optimizer = torch.optim.SGD(model.parameters(), example.LEARNING_RATE)
        for x, y in example.draw_batches(shards, args):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[:, start]).flatten(0, 1), y[:, start].flatten()).backward()
            optimizer.step()
        for name, leaf in model.named_parameters():
            torch.testing.assert_close(params[name][start], leaf.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("period", "warmup", "averagings"), [(4, 0, 3), (3, 4, 6), (5, 0, 2), (2, 10, 10), (99, 0, 1)])
def test_longer_periods_and_a_warmup_are_post_local_sgd(example, period, warmup, averagings):
    shards, args = small_job(example, warmup=warmup)
    params, counted, _ = example.train(period, shards, args)
    assert counted == averagings
    for name, leaf in by_hand(example, period, shards, args).items():
        torch.testing.assert_close(params[name], leaf, rtol=1e-4, atol=1e-6)


def test_shards_differ_by_as_much_as_is_asked_for(example):
    data, _ = example.load_data()
    labels_per_replica = []
    for part in (0, 0.2, 1):
        images, labels = example.make_shards(data, Namespace(replicas=8, sorted=part))
        assert images.shape == (8, len(data[1]) // 8, 64)
        known = {(*image.tolist(), label.item()) for image, label in zip(*data, strict=True)}
        dealt = {
            (*image.tolist(), label.item()) for image, label in zip(images.flatten(0, 1), labels.flatten(), strict=True)
        }
        assert dealt <= known
        assert len(dealt) == labels.numel()  # none twice
        shares = torch.stack([torch.bincount(shard, minlength=10) for shard in labels]) / labels.shape[1]
        labels_per_replica.append((1 / (shares**2).sum(1)).mean().item())  # how many, if they were equally frequent
    iid, default, apart = labels_per_replica
    assert iid > 9 > default > 6 > 3 > apart


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--periods", "4", "0"], "should_average: period must be at least 1, got 0"),
        (["--periods", "often"], "argument --periods: invalid int value: 'often'"),
        (["--warmup", "-1"], "should_average: warmup must be at least 0, got -1"),
        (["--steps", "0"], "--steps and --starts must be at least 1, got 0 and 3"),
        (["--starts", "0"], "--steps and --starts must be at least 1, got 1024 and 0"),
        (["--replicas", "1"], "--replicas must be from 2 to 1000, got 1"),
        (["--replicas", "1001"], "--replicas must be from 2 to 1000, got 1001"),
        (["--sorted", "nan"], "--sorted must be from 0 to 1, got nan"),
        (["--plot", "a.txt"], "--plot must be a .png, .pdf or .svg in a folder that exists, got a.txt"),
        (["--plot", "/no/a.png"], "--plot must be a .png, .pdf or .svg in a folder that exists, got /no/a.png"),
    ],
)
def test_bad_arguments(example, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulate_replicas.py", *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        example.main()
    assert capsys.readouterr().err.endswith(f"error: {message}\n")

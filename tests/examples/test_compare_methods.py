"""The comparison of methods: its table, its bytes, its verdict, and what it refuses."""

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

for name in ("torch", "matplotlib"):
    pytest.importorskip(name)

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_methods.py"
PARAMETERS = 98 * 64 + 6 * (128 * 64 + 64) + 64 * 98
CLAIM = 48  # bytes that a rank sends each other rank before it averages
BYTES = {"int8": 1.016, "int4": 0.504, "int2": 0.254}  # of an element
STEPS = 25
ROW = r"(?m)^{} +([\d.]+)(?: ± [\d.]+)? +(\d+) +([\d.]+) MB +([\d.]+) x +([\d.e-]+) s +([\d.e-]+) s$"


def run(*arguments):
    return subprocess.run(
        [sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )


def each(size, element=4):
    """Return what a rank sends in one averaging over so many ranks, with so many bytes for an element."""
    return (size - 1) * (2 * element * PARAMETERS / size + CLAIM)


def row(text, method):
    """Return (loss, averagings, MB, times fewer bytes, seconds at 100 Mbit/s and at 10 Gbit/s)."""
    return tuple(map(float, re.search(ROW.format(method), text).groups()))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    files = ("--plot", folder / "methods.png", "--save", folder / "results.json")
    few = ("--steps", STEPS, "--batch", 1, "--seeds", 1, "--outer-period", 10, "--fragments", 1)
    return run(*few, *files), folder


def test_the_table_has_every_methods_averagings_and_bytes(quick):
    done, folder = quick
    warmup = STEPS // 20
    local = len(range(0, STEPS, 16)) + 1  # and the end
    post_local = warmup + len(range(warmup, STEPS, 16)) + 1
    pairs = len([step for step in range(0, STEPS, 4) if step % 16])
    periods = {"DiLoCo int8": 10, "DiLoCo int4": 10, "DiLoCo int2": 10, "DiLoCo int4 often": 8}
    wires = {  # only what periods end with travels as a code
        method: (1 + STEPS // period + 1, 2 * each(4) + STEPS // period * each(4, BYTES[method.split()[1]]))
        for method, period in periods.items()
    }
    expected = {
        "synchronous": (STEPS, STEPS * each(4)),
        "local SGD": (local, local * each(4)),
        "post-local SGD": (post_local, post_local * each(4)),
        "hierarchical SGD": (local + pairs, local * each(4) + pairs * each(2)),
        "DiLoCo": (1 + STEPS // 10 + 1, (1 + STEPS // 10 + 1) * each(4)),  # the first anchor, periods, the end
    } | wires
    # Of streaming DiLoCo, one fragment may have been begun before the end.
    late = expected["DiLoCo"][1] + each(4)
    count = expected["DiLoCo"][0]
    expected |= {"streaming DiLoCo": (count, expected["DiLoCo"][1]), "streaming, 5 late": (count, late)}
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [result["method"] for result in results["runs"]] == list(expected)
    for result, (method, (averagings, sent)) in zip(results["runs"], expected.items(), strict=True):
        loss, *found = row(done.stdout, method)
        assert found[0] == result["averagings"] == averagings
        # Rows of a bucket are padded by a few bytes, the last block of a leaf by more.
        assert result["sent"] == pytest.approx(sent, rel=0.01 if method in wires else 1e-3)
        assert found[1] == pytest.approx(result["sent"] / 1e6, abs=0.006)
        assert found[2] == pytest.approx(results["runs"][0]["sent"] / result["sent"], abs=0.06)
        assert found[3] == pytest.approx(8 * result["sent"] / 100e6, rel=0.006)
        assert found[4] == pytest.approx(8 * result["sent"] / 10e9, rel=0.006)
        assert loss == pytest.approx(result["loss"], abs=6e-4)
        assert 2 < loss < 4  # a guess costs 4.58, the logarithm of 98
        assert result["curve"][-1] == [result["sent"], result["loss"]]
    part = 100 * pairs * each(2) / expected["hierarchical SGD"][1]
    assert f"Of hierarchical SGD's bytes {part:.0f} % go to the other worker of a pair" in done.stdout


def test_the_goal_is_missed_in_a_few_steps_and_the_exit_code_says_so(quick):
    done, folder = quick
    fewer = row(done.stdout, "DiLoCo")[3]
    assert done.returncode == 1
    assert re.search(
        r"Goal missed: DiLoCo's validation loss is [\d.]+ % (above|below) that of synchronous training "
        rf"\(goal: at most 5 % above\), and it sends {fewer:.1f} times fewer bytes \(goal: 50 times\)\.",
        done.stderr,
    )
    fewer = row(done.stdout, "DiLoCo int4 often")[3]
    assert re.search(
        rf"Goal missed: DiLoCo int4 often's .* sends {fewer:.1f} times fewer .* \(goal: 57 times", done.stderr
    )
    assert (
        len(re.findall(r"(?m)^Goal (?:met|missed): DiLoCo int\d's .* that of DiLoCo \(", done.stdout + done.stderr))
        == 3
    )
    assert "Traceback" not in done.stderr
    assert f"streaming, 5 late, seed 0: 100%|██████████| {11 * STEPS}/{11 * STEPS} [" in done.stderr  # one progress bar
    assert f"Curves saved to {folder / 'methods.png'}\n" in done.stdout
    assert (folder / "methods.png").stat().st_size > 10_000


def test_some_methods_some_rates_and_two_workers(tmp_path):
    files = ("--plot", tmp_path / "methods.svg", "--save", tmp_path / "results.json")
    some = ("--workers", 2, "--methods", "synchronous", "local SGD", "--steps", 8, "--batch", 1, "--seeds", 2)
    done = run(*some, "--first-seed", 7, "--rates", 1e-3, 1e-2, 1e9, *files)
    assert done.returncode == 0, done.stderr  # DiLoCo is not here to miss a goal
    tried = dict(re.findall(r"(?m)^synchronous, learning rate (\S+): validation loss (\S+)$", done.stdout))
    assert list(tried) == ["0.001", "0.01", "1e+09"]
    assert min(tried, key=lambda rate: float(tried[rate])) == "0.01"
    assert "mean ± standard deviation of 2 seed(s), at learning rate 0.01.\n" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {run["rate"] for run in results["runs"]} == {0.01}
    # Searching and repeating change nothing: the same seed ends with the same bits.
    assert results["tried"][1]["curve"] == results["runs"][0]["curve"]
    local = [run for run in results["runs"] if run["method"] == "local SGD"]
    assert [run["averagings"] for run in local] == [2, 2]
    assert [run["sent"] for run in local] == [pytest.approx(2 * each(2), rel=1e-3)] * 2
    assert [run["seed"] for run in local] == [7, 8]
    assert local[0]["loss"] != local[1]["loss"]


@pytest.fixture
def example(monkeypatch):
    """Return the example, as a module."""
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    spec = importlib.util.spec_from_file_location("compare_methods", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_methods", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("losses", "sent", "verdict"),
    [
        ((1.5, 1.57), 9_000_000, "Goal met: DiLoCo's validation loss is 4.7 % above .* 50.0 times fewer"),
        ((1.5, 1.48), 9_000_000, "Goal met: DiLoCo's validation loss is 1.3 % below .* 50.0 times fewer"),
        ((1.5, 1.58), 9_000_000, "Goal missed: DiLoCo's validation loss is 5.3 % above .* 50.0 times fewer"),
        ((1.5, 1.57), 9_100_000, "Goal missed: DiLoCo's validation loss is 4.7 % above .* 49.5 times fewer"),
        ((math.inf, 1.57), 9_000_000, "At learning rate 0.5 the loss is infinite: synchronous. Try lower --rates."),
    ],
)
def test_the_verdict(example, losses, sent, verdict, tmp_path, capsys):
    arguments = {"methods": ["synchronous", "DiLoCo"], "workers": 4, "steps": 60, "seeds": 1}
    runs = [
        {"method": method, "rate": 0.5, "loss": loss, "averagings": 7, "sent": moved, "curve": [(moved, loss)]}
        for method, loss, moved in zip(arguments["methods"], losses, (450_000_000, sent), strict=True)
    ]
    args = argparse.Namespace(**arguments, plot=tmp_path / "methods.png")
    if "met" in verdict:
        example.report({"tried": [], "runs": runs}, args)
        assert re.search(verdict, capsys.readouterr().out)
    else:
        with pytest.raises(SystemExit, match=verdict):
            example.report({"tried": [], "runs": runs}, args)


@pytest.mark.parametrize(
    ("method", "percents", "fewer", "met", "words"),
    [  # of the other's loss, for each seed
        ("DiLoCo int8", (100.1,), 1, True, r"0.10 % above that of DiLoCo \(goal: at most 0.1 % above, or within two "),
        ("DiLoCo int8", (100.2,), 1, False, "0.20 % above"),  # one seed has no error
        ("DiLoCo int8", (100.1, 100.3), 1, True, "0.20 ± 0.10 % above"),  # 0.2 <= 0.1 + 2 * 0.1
        ("DiLoCo int8", (100.2, 100.3), 1, False, "0.25 ± 0.05 % above"),
        ("DiLoCo int4", (100.3, 100.2), 1, True, r"0.25 ± 0.05 % above that of DiLoCo \(goal: at most 0.3 %"),
        ("DiLoCo int2", (99, 98), 1, True, r"1.50 ± 0.50 % below that of DiLoCo \(goal: at most 1 %"),
        (
            "DiLoCo int4 often",
            (102, 104),
            57,
            True,
            r"3.0 ± 1.0 % above that of synchronous training \(goal: at most 3 %",
        ),
        ("DiLoCo int4 often", (102, 104), 56, False, "and it sends 56.0 times fewer bytes .goal: 57 times"),
        ("DiLoCo int4 often", (103, 104), 57, False, "3.5 ± 0.5 % above"),
    ],
)
def test_wires_are_judged_in_pairs_of_the_same_seed(example, method, percents, fewer, met, words):
    (goal,) = [goal for goal in example.GOALS if goal.method == method]
    bases = [{"loss": 1.5 + seed, "sent": 57_000} for seed in range(len(percents))]  # seeds differ more than wires do
    pairs = list(zip(percents, bases, strict=True))
    runs = [{"loss": base["loss"] * (percent - 1e-9) / 100, "sent": 57_000 / fewer} for percent, base in pairs]
    found, said = example.judge(goal, {goal.method: runs, goal.base: bases})
    assert found is met
    assert re.search(words, said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seeds", "-1"], "--seeds must be at least 1, got -1"),
        (["--first-seed", "-1"], "--first-seed must be at least 0, got -1"),
        (["--workers", "5"], "argument --workers: invalid choice: 5 (choose from 2, 3, 4)"),
        (["--methods", "gossip"], "argument --methods: invalid choice: 'gossip' (choose from"),
        (["--methods", "hierarchical SGD", "--workers", "2"], "hierarchical SGD averages pairs and all, and needs"),
        (["--rates", "0.1", "nan"], "--rates must be positive, got 0.1 nan"),
        (["--period", "0"], "periodic: period must be at least 1, got 0"),
        (["--period", "9"], "hierarchical: each period must be a multiple of the one before, but 9 is none of 2"),
        (["--outer-period", "0"], "diloco: period must be at least 1, got 0"),
        (["--often-period", "0"], "diloco: period must be at least 1, got 0"),
        (["--outer-rate", "-1"], "outer: lr must be at least 0 and finite, got -1.0"),
        (["--outer-momentum", "1"], "outer: momentum must be at least 0 and less than 1, got 1.0"),
        (["--plot", "/no/such/folder/methods.png"], "--plot: there is no folder /no/such/folder"),
        (["--plot", "methods.txt"], "--plot must end with .png, .pdf or .svg, got methods.txt"),
        (["--save", "/no/such/folder/results.json"], "--save: there is no folder /no/such/folder"),
    ],
)
def test_bad_arguments_are_refused_before_workers_start(example, arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", *arguments])
    with pytest.raises(SystemExit, match="^2$"):
        example.main()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert line.startswith(f"compare_methods.py: error: {message}")

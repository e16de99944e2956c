"""The script that merges benches over several libraries: its words, its refusals, and real results."""

import copy
import json
import sys
from pathlib import Path

import compare
import pytest
from helpers import mpi
from helpers.frameworks import skip_without

MACHINE = {
    "system": "Linux x86_64",
    "model": "AMD EPYC",
    "family": 23,
    "number": 1,
    "cores": 2,
    "virtual": False,
    "cpus": 2,
    "cpus_of_rank_0": 2,
    "caches": [],
    "huge_pages": None,
    "load": [0.25, 0.5, 0.75],
    "threads": "1",
    "kernel": "C (AVX2)",
}
TIMES = {
    "nothing but the barriers": [0.1, 0.1, 0.1, 0.1],
    "memcpy": [10.0, 10.0, 10.0, 10.0],
    "one all-reduce of a flat buffer": [14.0, 15.0, 15.0, 16.0],
    "one all-reduce per leaf": [10.0, 20.0, 20.0, 300.0],
    "torch's averager": [80.0, 80.0, 80.0, 80.0],
    "funcavg": [40.0, 40.0, 40.0, 40.0],
    "funcavg, donate": [18.0, 19.0, 21.0, 90.0],
}


def result(library="MPICH 5.0.2", times=TIMES, **other):
    return {
        "funcavg": "0.1.0",
        "machine": MACHINE,
        "memcpy_GB_per_s": {"rank 0 alone": 9.5},
        "tree": {"name": "resnet50", "leaves": 161, "dtypes": ["float32"], "left_out": 0, "bytes": 102_228_128},
        "kind": "torch",
        "device": "cpu",
        "ranks": 2,
        "library": library,
        "turns": 4,
        "rows": [{"name": name, "turns_ms": turns} for name, turns in times.items()],
    } | other


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return what writes a result into a file."""
    monkeypatch.chdir(tmp_path)
    return lambda name, found: Path(name).write_text(found if isinstance(found, str) else json.dumps(found))


def cells(output):
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line[:2] == "| "]
    return lines[0], {(line[0], line[1]): line[2:] for line in lines[1:]}


def test_a_table_of_two_libraries(written, capsys):
    slow = TIMES | {"memcpy": [20.0] * 4, "one all-reduce of a flat buffer": [100.0, 100.0, 100.0, 100.0]}
    written("a.json", result())
    written("b.json", result("Intel MPI 2021.18", slow))
    assert compare.main(["a.json", "b.json"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    heading, found = cells(output)
    assert heading == ["library", "row", "ms", "x memcpy", "/ funcavg, donate", "it is", "/ funcavg", "it is"]
    assert len(found) == 2 * len(TIMES)
    mpich, intel = "MPICH 5.0.2", "Intel MPI 2021.18"
    assert found[mpich, "memcpy"] == ["10.0", "1.00", "0.50", "–", "0.25", "–"]
    # The middle half of funcavg, donate: 18.75 to 38.25.
    assert found[mpich, "one all-reduce of a flat buffer"] == ["15.0", "1.50", "0.75", "behind", "0.38", "behind"]
    assert found[mpich, "one all-reduce per leaf"] == ["20.0", "2.00", "1.00", "even", "0.50", "even"]
    assert found[mpich, "torch's averager"] == ["80.0", "8.00", "4.00", "ahead", "2.00", "ahead"]
    assert found[mpich, "funcavg"] == ["40.0", "4.00", "2.00", "–", "1.00", "–"]
    assert found[intel, "funcavg, donate"][:2] == ["20.0", "1.00"]  # of its own memcpy
    assert found[intel, "one all-reduce of a flat buffer"] == ["100.0", "5.00", "5.00", "ahead", "2.50", "ahead"]
    assert (
        f"\n{mpich}: funcavg, donate is ahead of torch's averager; even with one all-reduce per leaf; behind one "
        f"all-reduce of a flat buffer.\n"
    ) in output
    assert output.startswith("resnet50: 161 torch leaves of float32, 102 MB; 2 ranks. ms: medians of 4 turns")
    assert "b.json: Intel MPI 2021.18\nmachine: Linux x86_64, AMD EPYC (family 23" in output
    assert "load before the run: 0.25, 0.50, 0.75" in output


def test_rounds_of_a_library_are_pooled(written, capsys):
    written("a.json", result())
    written("b.json", result(times=TIMES | {"torch's averager": [1000.0] * 5}))
    assert compare.main(["a.json", "b.json", "--markdown"]) == 0
    output = capsys.readouterr().out
    _, found = cells(output)
    assert len(found) == len(TIMES)
    assert found["MPICH 5.0.2", "torch's averager"][0] == "1000.0"
    assert "medians of 8 turns" in output
    assert output.startswith("| library ")
    assert "machine:" not in output


def test_without_donation_what_there_is_is_compared(written, capsys):
    jax = {name: turns for name, turns in TIMES.items() if name != "funcavg, donate"} | {"funcavg in jit": [7.0] * 4}
    written("a.json", result(times=jax, kind="jax"))
    written("b.json", result("Open MPI", {"memcpy": [1.0], "one all-reduce per leaf": [2.0]}, kind="jax"))
    assert compare.main(["a.json", "b.json"]) == 0
    output = capsys.readouterr().out
    heading, found = cells(output)
    assert heading[4:] == ["/ funcavg", "it is", "/ funcavg in jit", "it is"]
    assert found["MPICH 5.0.2", "one all-reduce of a flat buffer"][2:] == ["0.38", "behind", "2.14", "ahead"]
    assert found["Open MPI", "one all-reduce per leaf"] == ["2.00", "2.00", "–", "–", "–", "–"]
    assert "\nOpen MPI: nothing of funcavg was timed.\n" in output


def changed(**tree):
    return {"tree": result()["tree"] | tree}


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed(name="gpt2"), "differ in their tree: resnet50 and gpt2; measure both with the same --tree"),
        (changed(dtypes=["bfloat16"]), "differ in their dtypes: float32 and bfloat16; measure both with the same --dt"),
        (changed(bytes=7), "differ in their bytes: 102228128 and 7; measure both with the same --tree"),
        ({"kind": "jax"}, "differ in their kind of leaves: torch and jax; measure both with the same --leaves"),
        ({"device": "cuda"}, "differ in their device: cpu and cuda; measure both with the same --device"),
        ({"ranks": 4}, "differ in their number of ranks: 2 and 4; measure both with the same --ranks"),
        ({"funcavg": "0.2"}, "differ in their release of funcavg: 0.1.0 and 0.2; measure both with the same func"),
        (
            {"machine": MACHINE | {"kernel": "off"}},
            "differ in their kernel: C (AVX2) and off; measure both with the sam",
        ),
        (
            {"machine": MACHINE | {"model": "Xeon"}},
            "differ in their processor: AMD EPYC and Xeon; measure both with th",
        ),
    ],
)
def test_what_cannot_be_compared(written, capsys, other, says):
    written("a.json", result())
    written("b.json", result("Open MPI", **other))
    assert compare.main(["a.json", "b.json"]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"compare: a.json and b.json {says}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("| memcpy |", "a.json: cannot be read as JSON (Expecting value: "),
        ("{}", "a.json: no result of this release's `funcavg bench --json`: it lacks 'rows'"),
        ("[]", "a.json: no result of this release's `funcavg bench --json`: it lacks list indices"),
        (result(machine="a line"), "a.json: no result of this release's `funcavg bench --json`: it lacks string ind"),
        (result(times={"funcavg": [1.0]}), "a.json: expected a row 'memcpy', whose time is the unit, got funcavg"),
    ],
)
def test_what_is_no_result(written, capsys, text, says):
    written("a.json", text)
    assert compare.main(["a.json"]) == 2
    assert capsys.readouterr().err.startswith(f"compare: {says}")


def test_a_plot(written):
    skip_without("matplotlib")
    written("a.json", result())
    few = copy.deepcopy(TIMES)
    del few["one all-reduce per leaf"]
    written("b.json", result("Open MPI v5", few))
    assert compare.main(["a.json", "b.json", "--plot", "both.svg"]) == 0
    assert "Open MPI v5" in Path("both.svg").read_text()
    assert compare.main(["a.json", "--plot", "both.doc"]) == 2


@pytest.mark.mpi
def test_runs_by_turns(written, capsys):
    mpi.start(0, "-c", "").communicate()  # skips where there is no MPI
    start = ["run", sys.executable, "--tree=thousand-small", "--leaves=numpy", "--turns=1"]
    assert compare.main([*start, "--rounds", "2", "--keep", "kept"]) == 0
    output = capsys.readouterr().out
    kept = sorted(map(str, Path("kept").iterdir()))
    assert [name[5:8] for name in kept] == ["01-", "02-"]
    assert output.startswith("thousand-small: 1000 numpy leaves of float32, 1.02 MB; 2 ranks. ms: medians of 2 turns")
    assert compare.main(kept) == 0
    assert cells(capsys.readouterr().out) == cells(output)


def test_runs_that_fail(written, capsys):
    assert compare.main(["run", "nowhere/bin/python"]) == 2
    assert capsys.readouterr().err.startswith(
        "compare: nowhere/bin/python: no such file; expected the Python of an env"
    )
    assert compare.main(["run", sys.executable, "--tree=nosuch"]) == 2
    assert "the bench has failed: funcavg bench: " in capsys.readouterr().err

"""`funcavg mean`: files of several formats in, the file of their mean out, in the memory of one model."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trees import bits

from funcavg import average
from funcavg.cli import main, mean, report, trees
from funcavg.testing import run_ranks

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
ROOT = Path(__file__).parents[2]
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def model(seed, dtypes=FLOATS):
    rng = torch.Generator().manual_seed(seed)
    state = OrderedDict((str(dtype)[6:], torch.randn(37, 5, generator=rng).to(dtype)) for dtype in dtypes)
    state["layer.steps"] = torch.tensor(7)
    state["mask"] = torch.tensor([True, False])
    state["empty"] = torch.zeros(0, 3)
    return state


def save(path, state):
    if path.suffix == ".safetensors":
        safetensors.save_file({name: leaf.contiguous() for name, leaf in state.items()}, path, {"format": "pt"})
    elif path.suffix == ".npz":
        np.savez(path, **{name: leaf.numpy() for name, leaf in state.items()})
    elif path.suffix == ".ckpt":
        torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"lr": 0.1}}, path)
    else:
        torch.save(state, path)
    return str(path)


def load(path):
    if path.suffix == ".safetensors":
        return safetensors.load_file(path)
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    held = torch.load(path, weights_only=True)
    return held["state_dict"] if path.suffix == ".ckpt" else held


def average_of(states, weights=None):
    """Return what ranks with these trees get."""

    def fn(group):
        return average(states[group.rank], group, weight=None if weights is None else weights[group.rank])

    return run_ranks(len(states), fn)[0]


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, leaf in wanted.items():
        assert (found[name].dtype, found[name].shape) == (leaf.dtype, leaf.shape), name
        assert bits(found[name]) == bits(leaf), name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What comes out

NUMPYS = [torch.float32, torch.float64, torch.float16, torch.complex64]
OTHERS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("inputs", "output", "dtypes"),
    [
        ((".safetensors",) * 3, ".safetensors", OTHERS),
        ((".pt", ".pth", ".bin"), ".pth", FLOATS),
        ((".ckpt",) * 2, ".ckpt", FLOATS),
        ((".npz",) * 2, ".npz", NUMPYS),
        ((".npz", ".pt", ".ckpt"), ".npz", NUMPYS),
        ((".safetensors", ".ckpt", ".pt"), ".safetensors", OTHERS),
        ((".safetensors", ".safetensors"), ".pt", OTHERS),
        ((".npz",), ".pt", NUMPYS),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_bits_are_those_of_average(folder, capsys, inputs, output, dtypes, weighted):
    states = [model(seed, dtypes) for seed in range(len(inputs))]
    files = [save(folder / f"{i}{suffix}", state) for i, (suffix, state) in enumerate(zip(inputs, states, strict=True))]
    weights = [0.5 + i for i in range(len(files))] if weighted else None
    options = ["--weights", *map(str, weights)] if weighted else []
    assert main(["mean", *files, "--output", f"out{output}", *options]) == 0
    assert_same(load(folder / f"out{output}"), average_of(states, weights))
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    nbytes = sum(leaf.nbytes for leaf in states[0].values())
    assert line.startswith(
        f"out{output}: the mean of {len(files)} file(s), {len(states[0])} leaves, {nbytes:,} bytes, "
    )
    assert line.endswith(" s")


def test_memory_formats_and_parts_of_leaves(folder, monkeypatch):
    """Leaves larger than what is read at a time, of any strides, compressed and in Fortran's order."""
    monkeypatch.setattr(mean, "LONGEST", 1 << 13)
    states = [{"t": torch.randn(300, 40).t(), "v": torch.randn(4, 90, 90)[:, ::2], "f": torch.randn(99)} for _ in "ab"]
    torch.save(states[0], "a.pt")
    np.savez_compressed("b.npz", **{name: np.asfortranarray(leaf.numpy()) for name, leaf in states[1].items()})
    for out in ("o.pt", "o.npz", "o.safetensors"):
        assert main(["mean", "a.pt", "b.npz", "--output", out]) == 0
        assert_same(load(folder / out), average_of(states))


def test_shards_and_folders(folder):
    import json

    states = [model(seed, OTHERS) for seed in range(2)]
    for i, state in enumerate(states):
        (folder / f"m{i}").mkdir()
        names = list(state)
        index = {}
        for part, chosen in enumerate((names[:3], names[3:])):
            save(folder / f"m{i}" / f"part-{part}.safetensors", {name: state[name] for name in chosen})
            index |= dict.fromkeys(chosen, f"part-{part}.safetensors")
        (folder / f"m{i}" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert main(["mean", "m0", "m1/model.safetensors.index.json", "--output", "o.safetensors"]) == 0
    assert_same(load(folder / "o.safetensors"), average_of(states))
    for name in ("m0", "m1/model.safetensors.index.json", "o.safetensors"):
        assert sum(trees.read(name).numel().values()) == 5 * 37 * 5


def test_the_readers_of_bench_are_these(folder):
    for name in ("a.pt", "b.ckpt", "c.npz", "d.safetensors"):
        save(folder / name, model(0, [torch.float32]))
        spec = trees.read(name)
        assert {leaf: (found.dtype, found.shape) for leaf, found in spec.leaves.items()} == {
            "float32": ("float32", (37, 5)),
            "empty": ("float32", (0, 3)),
        }
        assert spec.left_out == 2


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_checkpoints_of_trainers(folder, key):
    for i in range(2):
        optimizer = {"state": {0: {"momentum": torch.full((2,), float(i))}}, "param_groups": [{"lr": 0.1}]}
        torch.save({key: {"w": torch.full((2,), float(i))}, "optimizer": optimizer, "epoch": i}, f"{i}.pt")
    assert main(["mean", "0.pt", "1.pt", "--output", "o.pt"]) == 0
    held = torch.load("o.pt", weights_only=True)
    assert held[key]["w"].tolist() == [0.5, 0.5]
    assert held["epoch"] == 0
    assert held["optimizer"]["state"][0]["momentum"].tolist() == [0, 0]  # the first file's
    assert held["optimizer"]["param_groups"] == [{"lr": 0.1}]


def test_metadata_is_that_of_the_first_safetensors_file(folder):
    for i in range(2):
        safetensors.save_file({"w": torch.ones(2) * i}, f"{i}.safetensors", {"author": f"rank {i}"})
    torch.save({"w": torch.ones(2)}, "a.pt")
    assert main(["mean", "a.pt", "1.safetensors", "0.safetensors", "--output", "o.safetensors"]) == 0
    with safetensors.safe_open("o.safetensors", "pt") as file:
        assert file.metadata() == {"author": "rank 1"}


def test_tied_tensors_stay_tied_or_become_copies(folder, capsys):
    for i in range(2):
        shared = torch.full((3,), float(i))
        torch.save({"a": shared, "b": shared, "c": shared[1:]}, f"{i}.pt")
    assert main(["mean", "0.pt", "1.pt", "--output", "o.pt"]) == 0
    assert capsys.readouterr().err == ""
    held = torch.load("o.pt")
    assert held["a"].data_ptr() == held["b"].data_ptr() == held["c"].data_ptr() - 4
    assert held["c"].tolist() == [0.5, 0.5]
    assert main(["mean", "0.pt", "1.pt", "--output", "o.safetensors"]) == 0
    assert capsys.readouterr().err == "funcavg mean: tied, and copies in o.safetensors: b = a\n"
    assert {name: leaf.tolist() for name, leaf in safetensors.load_file("o.safetensors").items()} == {
        "a": [0.5] * 3,
        "b": [0.5] * 3,
        "c": [0.5] * 2,
    }


def test_what_is_not_averaged_is_the_first_files(folder, capsys):
    for i in range(2):
        save(folder / f"{i}.npz", {"w": torch.ones(2) * i, "seen": torch.tensor(i), "b": torch.ones(2) * i})
    assert main(["mean", "0.npz", "1.npz", "--output", "o.npz", "--where", "^w$"]) == 0
    said = capsys.readouterr().err
    assert said == "funcavg mean: not averaged, and not the same in all files; o.npz has the first one's: seen, b\n"
    assert {name: leaf.tolist() for name, leaf in load(folder / "o.npz").items()} == {
        "w": [0.5, 0.5],
        "seen": 0,
        "b": [0, 0],
    }


def test_a_file_of_weight_0_is_never_read_into_the_mean(folder):
    save(folder / "0.npz", {"w": torch.tensor([1.0])})
    save(folder / "1.npz", {"w": torch.tensor([float("nan")])})
    assert main(["mean", "0.npz", "1.npz", "--output", "o.npz", "--weights", "2", "0"]) == 0
    assert np.load("o.npz")["w"].tolist() == [1.0]


def index(name, weight_map):
    import json

    Path(name).write_text(json.dumps({"weight_map": weight_map}))
    return name


def test_a_leaf_is_taken_from_the_shard_that_the_index_names(folder, capsys):
    save(folder / "p1.safetensors", {"a": torch.zeros(2)})
    save(folder / "p2.safetensors", {"a": torch.full((2,), 100.0), "b": torch.ones(1), "stale": torch.ones(1)})
    found = index("m.index.json", {"a": "p1.safetensors", "b": "p2.safetensors"})
    assert main(["mean", found, found, "--output", "o.safetensors"]) == 0
    assert_same(load(folder / "o.safetensors"), {"a": torch.zeros(2), "b": torch.ones(1)})
    index("gone.json", {"a": "p1.safetensors", "gone": "p2.safetensors"})
    index("odd.json", {"a": "p1.foo"})
    Path("p1.foo").write_text("")
    Path("config.json").write_text("{}")
    for name, says in {
        "gone.json": "leaf 'gone' is not in p2.safetensors, where it should be",
        "odd.json": "it names p1.foo, which is no file of arrays",
        "config.json": "it is no index of shards, which has a weight_map",
    }.items():
        capsys.readouterr()
        assert main(["mean", name, found, "--output", "o.safetensors"]) == 1
        assert capsys.readouterr().err == f"funcavg mean: {name}: cannot be read as .json: {says}\n"


def test_ties_of_one_file_only_are_refused_in_a_pt(folder, capsys):
    shared = torch.zeros(3)
    torch.save({"a": shared, "b": shared}, "tied.pt")
    torch.save({"a": torch.ones(3), "b": torch.full((3,), 5.0)}, "apart.pt")
    assert main(["mean", "tied.pt", "apart.pt", "--output", "o.pt"]) == 1
    assert "shares memory in tied.pt with another leaf" in capsys.readouterr().err
    assert not Path("o.pt").exists()
    assert main(["mean", "tied.pt", "apart.pt", "--output", "o.safetensors"]) == 0
    assert safetensors.load_file("o.safetensors")["b"].tolist() == [2.5] * 3


def test_what_is_no_array_is_told(folder, capsys):
    for i in range(2):
        torch.save({"w": torch.ones(2) * i, "epoch": i, "name": "run"}, f"{i}.pt")
    assert main(["mean", "0.pt", "1.pt", "--output", "o.pt"]) == 0
    assert capsys.readouterr().err == (
        "funcavg mean: not averaged, and not the same in all files; o.pt has the first one's: epoch\n"
    )
    assert main(["mean", "0.pt", "1.pt", "--output", "o.safetensors"]) == 0
    assert "no arrays, and left out of o.safetensors, which holds nothing else: epoch, name" in capsys.readouterr().err
    with safetensors.safe_open("o.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_that_can_be_meant_in_two_ways(folder, capsys):
    torch.save({"state_dict": {"w": torch.ones(1)}, "model": {"w": torch.ones(1)}}, "both.pt")
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "names.pt")
    np.savez("meta.npz", __metadata__=np.ones(2))
    for name, says in {
        "both.pt": "it has arrays under 'state_dict' and 'model'",
        "names.pt": "two of its leaves are called 'a.b'",
    }.items():
        assert main(["mean", name, name, "--output", "o.pt"]) == 1
        assert says in capsys.readouterr().err
    assert main(["mean", "meta.npz", "meta.npz", "--output", "o.safetensors"]) == 2
    assert "leaf '__metadata__' has a name that a .safetensors file keeps for itself" in capsys.readouterr().err


def test_a_trainers_arguments_are_no_model(folder):
    (folder / "m").mkdir()
    torch.save({"w": torch.ones(2)}, "m/pytorch_model.bin")
    torch.save({"lr": 0.1}, "m/training_args.bin")
    assert main(["mean", "m", "m", "--output", "o.bin"]) == 0


@pytest.mark.parametrize("out", ["o.npz", "o.safetensors"])
def test_a_dtype_that_only_torch_has(folder, capsys, out):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # once in a process torch says that its support is experimental
        torch.save({"w": torch.ones(2).to(torch.complex32)}, "a.pt")
    assert main(["mean", "a.pt", "a.pt", "--output", out]) == 2
    assert capsys.readouterr().err.endswith("file cannot hold: choose .pt\n")


def test_an_output_keeps_its_mode_and_may_have_a_long_name(folder):
    save(folder / "a.npz", {"w": torch.ones(2)})
    name = "o" * 240 + ".npz"
    assert main(["mean", "a.npz", "a.npz", "--output", name]) == 0
    (folder / name).chmod(0o600)
    assert main(["mean", "a.npz", "a.npz", "--output", name]) == 0
    assert (folder / name).stat().st_mode & 0o777 == 0o600


# Mistakes, and failures in the middle


@pytest.fixture
def inputs(folder):
    state = {"w": torch.ones(3), "b": torch.ones(2)}
    for suffix in ("pt", "npz", "safetensors"):
        save(folder / f"good.{suffix}", state)
    save(folder / "less.safetensors", {"w": torch.ones(3)})
    save(folder / "more.npz", state | {"c": torch.ones(1)})
    save(folder / "shape.pt", state | {"w": torch.ones(4)})
    save(folder / "dtype.safetensors", state | {"w": torch.ones(3).half()})
    save(folder / "brain.pt", state | {"w": torch.ones(3).bfloat16()})
    torch.save({"w": torch.ones(3), "b": print}, "code.pt")
    for name in ("good.pt", "good.safetensors", "good.npz"):
        data = Path(name).read_bytes()
        Path(f"cut.{name[5:]}").write_bytes(data[: len(data) // 2])
    big = {"w": torch.arange(30_000.0)}
    save(folder / "big.npz", big)
    data = bytearray(Path("big.npz").read_bytes())
    data[len(data) // 2] ^= 1  # the header is whole, and what it says of the bytes is not
    Path("flipped.npz").write_bytes(bytes(data))
    Path("o.safetensors").write_text("as it was")
    return folder


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        ("good.pt less.safetensors", 1, "less.safetensors: there is no leaf 'b', and good.pt has it"),
        ("good.pt more.npz", 1, "good.pt: there is no leaf 'c', and more.npz has it"),
        ("good.npz shape.pt", 1, "shape.pt: leaf 'w' is float32[4], and float32[3] in good.npz"),
        ("good.npz dtype.safetensors", 1, "dtype.safetensors: leaf 'w' is float16[3], and float32[3] in good.npz"),
        ("good.npz cut.pt", 1, "cut.pt: cannot be read as .pt: "),
        ("good.npz cut.safetensors", 1, "cut.safetensors: cannot be read as .safetensors: "),
        ("good.npz cut.npz", 1, "cut.npz: cannot be read as .npz: "),
        ("big.npz flipped.npz", 1, "flipped.npz: leaf 'w' cannot be read: Bad CRC-32"),
        ("good.npz code.pt", 1, "code.pt: cannot be read as .pt: "),
        ("good.npz absent.pt", 2, "absent.pt: no such file"),
        ("good.npz good.txt", 2, "good.txt: its name must end with one of .safetensors, .npz, .pt"),
        ("good.npz good.pt --weights 1", 2, "--weights: 2 file(s) need as many weights, got 1"),
        ("good.npz good.pt --weights 0 0", 2, "--weights: they must be finite, not negative, and not all 0, got 0 0"),
        ("good.npz good.pt --weights 1 nan", 2, "--weights: they must be finite"),
        ("good.npz good.pt --weights 1 -1", 2, "--weights: they must be finite"),
        ("good.npz good.pt --where [", 2, "--where [: no regular expression"),
        ("good.npz good.pt --where bias", 2, "no leaf is averaged: --where bias is found in none"),
        ("good.npz good.pt --output absent/o.npz", 2, "--output absent/o.npz: there is no such folder"),
        ("good.npz good.pt --output o.txt", 2, "--output o.txt: the name must end with one of "),
        ("good.npz good.pt --output ./good.pt", 2, "--output ./good.pt: that is one of the files to be averaged"),
        ("brain.pt brain.pt --output o.npz", 2, "leaf 'w' is bfloat16[3], which a .npz file cannot hold"),
    ],
)
def test_a_mistake_is_one_line_and_no_output(inputs, capsys, args, code, says):
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    output = [] if "--output" in args else ["--output", "o.safetensors"]
    assert main(["mean", *args.split(), *output]) == code
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"funcavg mean: {says}"), line
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


@pytest.mark.parametrize("out", ["o.pt", "o.npz", "o.safetensors"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_leaves_what_was_there(inputs, monkeypatch, out, error):
    Path(out).write_text("as it was")
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}

    def broken(*args):
        raise error

    monkeypatch.setattr(mean, "mean_into", broken)
    try:
        assert main(["mean", "good.pt", "good.npz", "--output", out]) == 130
    except MemoryError:
        assert error is MemoryError
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


def test_a_full_disk_is_one_line(inputs, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["mean", "good.pt", "good.npz", "--output", "o.safetensors"]) == 1
    assert capsys.readouterr().err.endswith("o.safetensors: cannot be written: No space left on device\n")
    assert Path("o.safetensors").read_text() == "as it was"
    assert not list(inputs.glob("*.partial")) + list(inputs.glob(".*"))


COMMAND = [sys.executable, "-m", "funcavg", "mean"]
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_job_that_is_ended_leaves_nothing(folder, number):
    state = {f"w{i}": torch.zeros(2_000_000) for i in range(40)}
    save(folder / "0.safetensors", state)
    job = subprocess.Popen([*COMMAND, *["0.safetensors"] * 8, "--output", "o.safetensors"], env=ENVIRON)
    deadline = time.monotonic() + 60
    while not (found := list(folder.glob(".*"))) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert found, "it never began to write"
    job.send_signal(number)
    assert job.wait(60) == 128 + number
    assert [path.name for path in folder.iterdir()] == ["0.safetensors"]


# In the memory of one model

# VmHWM is ru_maxrss, but begins anew with a program: that of pytest is not counted.
PEAK = """
import sys
from funcavg.cli import main
args = sys.argv[1:]
if "torch" in args[0]:
    import torch
if args[1:]:
    assert main(["mean", *args[1:]]) == 0
print("peak", int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""


def peak(*args):
    done = subprocess.run([sys.executable, "-c", PEAK, *args], env=ENVIRON, capture_output=True, text=True, check=True)
    return int(done.stdout.rpartition("peak ")[2])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".npz"])
def test_the_peak_is_one_model_however_many_files(folder, suffix):
    """Twenty files of 64 MB, mapped pages included."""
    state = {"large": torch.zeros(12_000_000), "turned": torch.zeros(1000, 2000).t(), "small": torch.zeros(2_000_000)}
    nbytes = sum(leaf.nbytes for leaf in state.values())
    if suffix == ".safetensors":
        state["turned"] = state["turned"].contiguous()
    files = [save(folder / f"m{i}{suffix}", state) for i in range(2)]
    framework = "torch" if suffix == ".pt" else "none"
    least = peak(framework)
    found = peak(framework, *(files * 10), "--output", f"o{suffix}")
    assert found < least + nbytes + 200_000_000, (found, least)


def test_an_optimizers_state_is_not_kept_in_memory(folder):
    """60 MB of weights, and 240 of moments, which the output has from the first file."""
    weights = {f"w{i}": torch.full((3_000_000,), 1.0) for i in range(5)}
    moments = {i: {"a": torch.full((6_000_000,), 2.0), "b": torch.full((6_000_000,), 3.0)} for i in range(5)}
    torch.save({"state_dict": weights, "optimizer_states": [moments]}, "a.ckpt")
    least = peak("torch")
    found = peak("torch", *["a.ckpt"] * 4, "--output", "o.ckpt")
    assert found < least + 60_000_000 + 130_000_000, (found, least)
    held = torch.load("o.ckpt", weights_only=True, mmap=True)
    assert all(leaf.unique().tolist() == [1.0] for leaf in held["state_dict"].values())
    for state in held["optimizer_states"][0].values():
        assert (state["a"].unique().tolist(), state["b"].unique().tolist()) == ([2.0], [3.0])


def test_progress_is_by_bytes(folder, monkeypatch):
    counted = []

    class Bar:
        def __enter__(self):
            return counted.append

        def __exit__(self, *_):
            pass

    totals = []
    monkeypatch.setattr(mean, "progress", lambda total, unit: totals.append((total, unit)) or Bar())
    files = [save(folder / f"{i}.npz", {"w": torch.ones(3_000_000)}) for i in range(2)]
    assert main(["mean", *files, "--output", "o.npz"]) == 0
    assert totals == [(24_000_000, "B")]
    assert sum(counted) == 24_000_000
    assert len(counted) > 2
    assert report.progress is not mean.progress

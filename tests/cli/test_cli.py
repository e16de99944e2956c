"""The commands measure and diagnose; a user's mistake is one line and a code, never a traceback."""

import argparse
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import skip_without, torch
from helpers.processes import interruptible

import funcavg
from funcavg.cli import bench, checks, doctor, environment, jobs, machine, main, report, rows, trees, trials
from funcavg.testing import run_ranks
from funcavg.wires.codecs import NAMES

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]


def command(*args, start=(sys.executable, "-m"), **environ):
    return subprocess.run(
        [*start, "funcavg", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environ,
    )


def measured(done):
    """Return the JSON of a bench, and its rows by name."""
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result, {row["name"]: row for row in result["rows"]}


# Mistakes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Be in a folder with files that nobody can average."""
    monkeypatch.chdir(tmp_path)
    for name in ("bad.safetensors", "bad.npz", "bad.pt"):
        Path(name).write_bytes(b"these are not the weights that you look for")
    np.savez("integers.npz", a=np.arange(3), b=np.arange(3, dtype=np.uint8))
    np.savez("objects.npz", a=np.array([object()]))
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            "bench --tree nosuch",
            "no tree is called 'nosuch': take resnet50, gpt2, thousand-small, many-small, a file",
        ),
        ("bench --tree nosuch.npz", "nosuch.npz: no such file"),
        ("bench --tree bad.safetensors", "bad.safetensors: cannot be read as .safetensors: "),
        ("bench --tree bad.npz", "bad.npz: cannot be read as .npz: it is no zip archive"),
        ("bench --tree bad.pt", "bad.pt: cannot be read as .pt: torch.load(weights_only=True) takes tensors in"),
        ("bench --tree module.pt", "module.pt: cannot be read as .pt: torch.load(weights_only=True) takes tensors in"),
        (
            "bench --tree objects.npz",
            "objects.npz: cannot be read as .npz: leaf 'a' cannot be read: Object arrays cannot be loaded",
        ),
        ("bench --tree integers.npz", "integers.npz: nothing in it is averaged; its 2 leaves are of int64, uint8"),
        (
            "bench --tree integers.npz --dtype bfloat16",
            (
                "--dtype bfloat16 is for the named trees (resnet50, gpt2, thousand-small, many-small): the leaves of "
                "integers.npz have dtypes of their own; leave --dtype out"
            ),
        ),
        ("bench --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        (
            "bench --wire int8 int3",
            "argument --wire: invalid choice: 'int3' (choose from 'bfloat16', 'int8', 'int4', 'int2')",
        ),
        ("bench --plot curve.doc", "--plot curve.doc: the name must end with one of ."),
        ("bench --plot nowhere/curve.png", "--plot nowhere/curve.png: there is no such folder"),
        ("bench --turns 0", "--ranks and --turns must be at least 1, got 2 and 0"),
        ("bench --turns many", "argument --turns: invalid int value: 'many' (`funcavg bench --help`"),
        ("bench --leaves numpy --device cuda", "--device cuda is for torch leaves, not for --leaves numpy"),
        ("bench --backend mpi --device cuda", "--device cuda needs a job over torch.distributed: --backend torch, or"),
        ("bench --ranks 99 --device cuda", "--device cuda: 99 ranks need 99 GPUs, and torch finds "),
        ("doctor everything", "nothing is called 'everything': threads, torch, nccl, jax, mpi, lost, node"),
        ("doctor --timeout 0", "--timeout must be 1 to 3600 seconds, got 0"),
        ("dance", "invalid choice: 'dance'"),
        ("", "the following arguments are required: bench | doctor | mean"),
    ],
)
def test_a_mistake_is_one_line(folder, capsys, args, says):
    assert main(args.split()) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("funcavg")
    assert says in errors
    assert errors.count("\n") == 1


def test_a_wire_that_is_none_is_one_line(capsys):
    assert main(["bench", "--wire", "int8", "int3"]) == 2
    errors = capsys.readouterr().err
    assert re.search(
        r"^funcavg: argument --wire: invalid choice: 'int3' \(choose from '?bfloat16.*int8.*int4.*int2'?\) \(", errors
    )
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "missing", "environ", "says"),
    [
        ("bench", "torch mpi4py", {}, "neither torch nor mpi4py is installed: pip install torch, or pip"),
        ("bench --backend mpi", "mpi4py", {}, "an MPI job needs mpi4py, which is not installed: pip install"),
        ("bench --leaves jax", "jax", {}, "--leaves jax needs jax, which is not installed: pip install jax"),
        ("bench --plot a.png", "matplotlib", {}, "--plot needs matplotlib, which is not installed"),
        ("bench", "torch", {"WORLD_SIZE": "2", "RANK": "0"}, "torchrun has started 2 ranks, and a job over torch"),
        ("bench", "mpi4py", {"PMI_SIZE": "2", "PMI_RANK": "0"}, "MPICH's mpiexec has started 2 ranks, and an MPI job"),
        ("bench --backend torch", "", {"PMI_SIZE": "2", "PMI_RANK": "0"}, "needs MASTER_ADDR and MASTER_PORT"),
    ],
)
def test_a_library_that_is_not_there_is_one_line(folder, capsys, monkeypatch, args, missing, environ, says):
    for library in missing.split():
        monkeypatch.setitem(sys.modules, library, None)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(args.split()) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert says in errors
    assert errors.count("\n") == 1


def test_a_file_whose_library_is_not_there(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(environment.CliError, match=r"^bad\.pt: \.pt files need torch: pip install torch$"):
        trees.read("bad.pt")


def test_a_rank_that_may_be_alone_speaks_for_itself(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    assert main(["bench"]) == 2  # rank 0 may be fine: where it is not, the launcher ends this rank meanwhile
    assert waited == [1]
    assert capsys.readouterr().err.startswith(
        "funcavg bench: rank 1: MPICH's mpiexec has started 2 ranks, and an MPI job"
    )


def test_what_ranks_agree_on_is_said_once(capsys, monkeypatch):
    def run(args):
        raise jobs.AgreedError("all of us")

    monkeypatch.setattr(bench, "run", run)
    monkeypatch.setenv("PMI_SIZE", "2")
    for rank, says in (("0", "funcavg bench: all of us\n"), ("1", "")):
        monkeypatch.setenv("PMI_RANK", rank)
        assert main(["bench"]) == 2
        assert capsys.readouterr().err == says


class Threads(jobs.Job):
    """Ranks that are threads."""

    def __init__(self, group):
        self.rank, self.size, self._group = group.rank, group.size, group

    def group(self):
        return self._group


def test_words_of_any_script_and_length_reach_the_others():
    def worker(group):
        def read():
            raise environment.CliError("モデル🙂" * 1000)

        with pytest.raises(jobs.AgreedError) as caught:
            jobs.agree(Threads(group), read)
        return str(caught.value)

    assert run_ranks(2, worker) == [("モデル🙂" * 1000)[: jobs.LONGEST]] * 2


@pytest.mark.parametrize("bad", [{1}, {0, 1}])
def test_a_file_that_one_rank_cannot_read_ends_all(bad):
    def worker(group):
        def read():
            if group.rank in bad:
                raise environment.CliError("model.npz: no such file")
            return "fine"

        with pytest.raises(environment.CliError) as caught:
            jobs.agree(Threads(group), read)
        return str(caught.value)

    who = "rank 1 of 2: " if bad == {1} else ""
    assert run_ranks(2, worker) == [f"{who}model.npz: no such file"] * 2


def test_ranks_with_different_files_do_not_start():
    def worker(group):
        def read():
            return trees.Spec("model.npz", {"w": trees.Leaf("float32", (2 + group.rank // 2,))})

        with pytest.raises(jobs.AgreedError) as caught:
            jobs.agree(Threads(group), read, same=lambda spec: spec)
        return str(caught.value)

    says = "ranks 0 and 2 of 3 differ: in the tree, the options, or what is installed"
    assert run_ranks(3, worker) == [says] * 3


def test_ranks_that_all_can_go_on():
    assert run_ranks(2, lambda group: jobs.agree(Threads(group), lambda: group.rank)) == [0, 1]


def test_variables_of_a_launcher_do_not_reach_jobs_inside():
    user = {"OMPI_MCA_btl": "self,tcp", "SLURM_JOB_ID": "7", "HOME": "/root"}
    assert environment.unlaunched(user) == user
    job = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1", "MASTER_PORT": "1"}
    assert environment.unlaunched(user | job) == {"HOME": "/root"}
    assert environment.unlaunched(user | {"PMI_SIZE": "1", "PMI_RANK": "0", "PMI_FD": "9"}) == user


# Trees


@pytest.mark.parametrize(
    ("name", "leaves", "elements"),
    [
        ("resnet50", 161, 25_557_032),  # as torchvision's and Hugging Face's models have them
        ("gpt2", 148, 124_439_808),
        ("thousand-small", 1000, 256_000),
        ("many-small", 4000, 1_024_000),
    ],
)
def test_named_trees_are_the_models(name, leaves, elements):
    spec = trees.read(name)
    assert (len(spec.leaves), spec.numel(), spec.nbytes) == (leaves, {"float32": elements}, 4 * elements)
    half = trees.read(name, "float16")
    assert (len(half.leaves), half.numel(), half.nbytes) == (leaves, {"float16": elements}, 2 * elements)
    assert half.name == name


@pytest.fixture
def files(tmp_path):
    """Return files that hold models."""
    skip_without("torch")
    from safetensors.torch import save_file

    nested = {"a": {"w": torch.ones(3, 2), "n": torch.arange(4)}, "b": [torch.ones(5, dtype=torch.bfloat16), 3]}
    torch.save(nested, tmp_path / "new.pt")
    torch.save(nested, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    flat = {"a.w": nested["a"]["w"], "a.n": nested["a"]["n"], "b.0": nested["b"][0]}
    save_file(flat, tmp_path / "model.safetensors")
    np.savez(
        tmp_path / "model.npz", **{"a.w": np.ones((3, 2), ">f4"), "b.0": np.ones(5, np.float16), "n": np.arange(2)}
    )
    return tmp_path


@pytest.mark.parametrize(
    ("file", "half", "left_out"),
    [
        ("new.pt", "bfloat16", 2),
        ("old.pt", "bfloat16", 2),
        ("model.safetensors", "bfloat16", 1),
        ("model.npz", "float16", 1),
    ],
)
def test_files_are_read(files, file, half, left_out):
    spec = trees.read(str(files / file))
    assert spec == (file, {"a.w": ("float32", (3, 2)), "b.0": (half, (5,))}, left_out)
    assert spec.nbytes == 6 * 4 + 5 * 2


def test_folders_indices_and_checkpoints_are_read(tmp_path):
    """As hubs and trainers lay them."""
    from safetensors.torch import save_file

    one, other = {"a": torch.ones(3, 2)}, {"b": torch.ones(5).to(torch.float8_e8m0fnu), "c": torch.ones(2)}
    expected = {"a": ("float32", (3, 2)), "b": ("float8_e8m0fnu", (5,)), "c": ("float32", (2,))}
    hf = tmp_path / "hf"
    hf.mkdir()
    for number, shard in enumerate([one, other], 1):
        save_file(shard, hf / f"model-0000{number}-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors"} | dict.fromkeys("bc", "model-00002-of-00002.safetensors")
    with pytest.raises(
        environment.CliError, match=r"hf: 2 files could be the model \(model-00001-of-00002.safetensors, .* index"
    ):
        trees.read(str(hf))
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for tree in (hf, index):
        assert trees.read(str(tree)) == ("model.safetensors.index.json", expected, 0)
    assert trees.read(str(hf)).nbytes == 8 * 4 + 5
    torch.save(
        {"state_dict": one | other, "epoch": 3, "optimizer_states": [{"x": torch.ones(9)}]}, tmp_path / "last.ckpt"
    )
    assert trees.read(str(tmp_path / "last.ckpt")) == ("last.ckpt", expected, 0)
    (hf / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        environment.CliError, match="cannot be read as .json: it names model-00002-of-00002.safetensors, which is"
    ):
        trees.read(str(hf))
    (tmp_path / "empty").mkdir()
    with pytest.raises(environment.CliError, match=r"empty: a folder without a model: no .safetensors"):
        trees.read(str(tmp_path / "empty"))


@pytest.mark.parametrize("zipped", [True, False])
def test_tied_leaves_are_one(tmp_path, zipped):
    shared = torch.ones(30, 2)
    held = {"embedding": shared, "head": shared, "transposed": shared.T, "part": shared[3:], "empty": torch.ones(0)}
    torch.save(held, tmp_path / "tied.bin", _use_new_zipfile_serialization=zipped)
    assert list(trees.read(str(tmp_path / "tied.bin")).leaves) == ["embedding", "empty", "part", "transposed"]


def test_leaves_that_torchs_averager_or_mpi_cannot_sum(tmp_path):
    torch.save({"z": torch.ones(4, dtype=torch.complex64), "h": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "z.pt")
    spec = trees.read(str(tmp_path / "z.pt"))

    class Some(jobs.MPIJob):
        rank, size, library = 0, 2, "MPI"

        def __init__(self):
            pass

        def group(self):
            return None

    args = argparse.Namespace(leaves="numpy", device="cpu", wire=[])
    found, notes = rows.make_rows(Some(), spec, args, contextlib.ExitStack())
    names = [*BASES, "funcavg", "funcavg, donate", "funcavg, FUNCAVG_NODE=off", OFF]
    assert [row.name for row in found] == names
    assert notes == [
        "MPI has no sum of bfloat16, so there is no plain all-reduce of this tree",
        "torch's averager does not average complex64",
    ]


def test_a_file_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "caught",)

    torch.save({"w": torch.ones(2), "trap": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(environment.CliError, match=r"trap\.pt: cannot be read as \.pt: torch\.load"):
        trees.read(str(tmp_path / "trap.pt"))
    assert not (tmp_path / "caught").exists()


@pytest.mark.parametrize("kind", ["torch", "numpy", "jax"])
def test_arrays_are_those_of_the_file(files, kind):
    made = trees.arrays(trees.read(str(files / "model.safetensors")), kind)
    assert {name: (str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape)) for name, leaf in made.items()} == {
        "a.w": ("float32", (3, 2)),
        "b.0": ("bfloat16", (5,)),
    }
    assert float(abs(made["a.w"]).sum()) > 0
    assert type(made["a.w"]).__module__.partition(".")[0] in (kind, "jaxlib")


# bench

BASES = ["nothing but the barriers", "memcpy", "memcpy, rank 0 alone"]
COMMON = {
    *BASES,
    "one all-reduce of a flat buffer",
    "one all-reduce per leaf",
    "torch's averager",
    "funcavg",
    "funcavg, FUNCAVG_NODE=off",
}
OFF = "funcavg, donate, FUNCAVG_NODE=off"
TORCH = COMMON | {"funcavg, donate", OFF, "funcavg's PeriodicModelAverager"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a file of 40 MB: large enough to see who holds a copy of it."""
    path = tmp_path_factory.mktemp("model") / "model.npz"
    np.savez(path, **{f"w{i}": np.zeros((500, 2000), np.float32) for i in range(10)}, step=np.int64(3))
    return path


def test_bench_starts_two_ranks(model, tmp_path):
    skip_without("torch")
    done = command("bench", "--tree", model, "--turns", 5, "--json", "--plot", tmp_path / "bench.png")
    result, found = measured(done)
    assert set(found) == TORCH
    assert result["ranks"] == 2
    tree = {"name": "model.npz", "leaves": 10, "dtypes": ["float32"], "left_out": 1, "bytes": 40_000_000}
    assert result["tree"] == tree
    assert result["memcpy_GB_per_s"] == {
        "rank 0 alone": found["memcpy, rank 0 alone"]["GB_per_s"],
        "each of 2 at once": found["memcpy"]["GB_per_s"],
    }
    assert result["machine"].keys() == machine.describe().keys()
    assert "Gloo" in result["library"]
    for row in result["rows"]:
        assert len(row["turns_ms"]) == 5
        assert min(row["turns_ms"]) <= row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
        assert row["GB_per_s"] == pytest.approx(0.04 / (row["median_ms"] / 1e3))
        assert row["memcpys"] == pytest.approx(row["median_ms"] / found["memcpy"]["median_ms"])
    for name in ("funcavg", "funcavg, donate", "funcavg, FUNCAVG_NODE=off"):  # two ranks send the tree once, each
        assert 40_000_000 <= found[name]["bytes_sent"] < 40_100_000
        assert found[name]["bytes_sent_is"] == "counted"
        assert f"rank 0 of 2 meets {0 if 'off' in name else 1} other rank" in found[name]["node_stage"]
    assert found["torch's averager"]["bytes_sent"] == 40_000_000
    assert found["memcpy"]["bytes_sent"] == 0
    assert found["funcavg"]["extra_bytes"] > 38_000_000  # the result
    assert found["funcavg, donate"]["extra_bytes"] < 25_000_000  # a window
    assert found["torch's averager"]["extra_bytes"] > 38_000_000  # its flat copy
    fastest = {name: min(row["turns_ms"]) for name, row in found.items()}
    assert fastest["memcpy"] < fastest["one all-reduce of a flat buffer"]
    assert fastest["funcavg, donate"] < fastest["torch's averager"]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert done.stderr == ""


def test_bench_takes_the_ranks_of_torchrun():
    skip_without("torch")
    done = command("bench", "--tree", "thousand-small", "--turns", 2, "--rows", "torch's", "donate", start=TORCHRUN)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.match(
        r"thousand-small: 1000 torch leaves of float32, 1\.02 MB; 2 ranks, torch .* \(Gloo\); medians of 2 turns",
        lines[0],
    )
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert table[0] == ["", "ms", "spread", "GB/s", "/ torch's", "/ memcpy", "MB sent", "MB extra"]
    byname = {row[0]: row[1:] for row in table[1:]}
    assert list(byname) == [*BASES, "torch's averager", "funcavg, donate", OFF]
    assert byname["torch's averager"][3] == byname["memcpy"][4] == "1.00"
    assert [line.partition(":")[0] for line in lines[-7:-2]] == [
        "machine",
        "kernel",
        "caches",
        "transparent huge pages",
        "memcpy",
    ]
    ours, theirs = float(byname["funcavg, donate"][0]), float(byname["torch's averager"][0])
    assert float(byname["funcavg, donate"][3]) == pytest.approx(ours / theirs, rel=0.02, abs=0.0051)  # two digits
    assert re.match(r"Averaging thousand-small over 2 ranks takes [\d.]+ ms \(funcavg, donate", lines[-1])


@pytest.mark.parametrize(
    ("leaves", "names"),
    [
        ("numpy", COMMON | {"funcavg, donate", OFF}),
        ("jax", COMMON | {"funcavg in jit"}),
    ],
)
def test_bench_averages_other_arrays(files, leaves, names):
    result, found = measured(
        command("bench", "--tree", files / "model.safetensors", "--turns", 1, "--leaves", leaves, "--json")
    )
    assert set(found) == names
    assert result["kind"] == leaves


def test_bench_averages_a_named_tree_of_another_dtype():
    skip_without("torch")
    result, found = measured(
        command("bench", "--tree", "thousand-small", "--dtype", "bfloat16", "--turns", 1, "--json")
    )
    assert set(found) == TORCH  # torch's averager works, and Gloo sums
    assert (result["tree"]["dtypes"], result["tree"]["bytes"]) == (["bfloat16"], 512_000)
    assert found["funcavg, donate"]["bytes_sent"] < 530_000  # by two ranks, of two bytes each
    assert result["sentence"].startswith("Averaging thousand-small in bfloat16 over 2 ranks takes ")
    assert report.title(result).startswith("thousand-small: 1000 torch leaves of bfloat16, 0.512 MB; 2 ranks, ")


BYTES = {"bfloat16": 2, "int8": 1.016, "int4": 0.504, "int2": 0.254}  # of an element over a wire


@pytest.mark.parametrize("leaves", ["numpy", "jax"])
def test_bench_over_wires(model, leaves):
    """Ranks of this host count as hosts, and send what the wires' codes take."""
    skip_without("torch")
    if leaves == "jax":
        skip_without("jax")
    args = ("bench", "--tree", model, "--turns", 1, "--leaves", leaves, "--wire", *BYTES, "--json")
    names = {wire: f"funcavg{', donate' * (leaves == 'numpy')}, FUNCAVG_NODE=off, {wire}" for wire in BYTES}
    result, found = measured(command(*args, "--rows", *names.values()))
    assert set(found) == {*BASES, *names.values()}
    for wire, name in names.items():
        assert found[name]["bytes_sent"] == pytest.approx(10_000_000 * BYTES[wire], rel=0.02)
        assert found[name]["bytes_sent_is"] == "counted"
        assert "rank 0 of 2 meets 0 other rank" in found[name]["node_stage"]
    assert any("over a wire (bfloat16, int8, int4, int2) as if" in note for note in result["notes"])
    lines = report.text(result).splitlines()
    (shown,) = (line for line in lines if f"| {names['int8']} " in line)
    assert shown.split("|")[-3].strip() == f"{found[names['int8']]['bytes_sent'] / 1e6:.1f}"  # MB sent


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bench_over_mpi_of_what_libraries_need_not_sum(dtype):
    skip_without("torch")
    args = ("bench", "--backend", "mpi", "--tree", "thousand-small", "--dtype", dtype, "--turns", "1", "--json")
    result, found = measured(mpi.mpiexec(0, "-m", "funcavg", *args))
    sums = "from mpi4py import MPI; import numpy; MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, numpy.ones(1, numpy.float16))"
    if dtype == "float16" and mpi.mpiexec(0, "-c", sums).returncode == 0:
        assert set(found) == TORCH
        return
    assert set(found) == TORCH - {"one all-reduce of a flat buffer", "one all-reduce per leaf"}
    assert any(f"has no sum of {dtype}" in note for note in result["notes"])


@pytest.mark.mpi
def test_a_library_that_does_not_sum_float16():
    code = """
from funcavg.cli import jobs
job = jobs.MPIJob()
def refuse(*args):
    raise KeyError("e")
class Library:
    COMM_SELF, IN_PLACE, Exception = type("Comm", (), {"Allreduce": refuse}), None, job._mpi.Exception
job._mpi = Library
print(job.sums("float16"), job.sums("float32"))
"""
    done = mpi.mpiexec(0, "-c", code)
    assert (done.returncode, done.stdout) == (0, "False True\n"), done.stderr


@pytest.mark.mpi
@pytest.mark.parametrize("alone", [True, False])
def test_bench_over_mpi(alone):
    skip_without("torch")
    args = ("-m", "funcavg", "bench", "--tree", "thousand-small", "--turns", "3", "--json")
    done = mpi.mpiexec(0, *args, "--ranks", "2", "--backend", "mpi") if alone else mpi.mpiexec(2, *args)
    result, found = measured(done)
    assert set(found) == TORCH
    assert (result["ranks"], result["tree"]["bytes"]) == (2, 1_024_000)
    assert re.match("MPICH|Open MPI|Intel MPI", result["library"])


@pytest.mark.mpi
def test_a_launcher_of_another_library():
    mpi.start(0, "-c", "").communicate()  # skips where there is no MPI
    done = command("bench", PMI_SIZE="", OMPI_COMM_WORLD_SIZE="3", OMPI_COMM_WORLD_RANK="0")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.match(
        r"funcavg bench: Open MPI's mpiexec has started 3 ranks, but MPI.COMM_WORLD has 1: the launcher is not that of "
        r"mpi4py's library, (MPICH|Open MPI|Intel MPI) ",
        done.stderr.splitlines()[-1],
    )


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """Have an mpiexec that starts processes which know nothing of each other."""
    mpi.start(0, "-c", "").communicate()
    (tmp_path / "mpiexec").write_text('#!/bin/sh\nshift 2; "$@" && "$@"\n')
    (tmp_path / "mpiexec").chmod(0o755)
    monkeypatch.setenv("MPIEXEC", str(tmp_path / "mpiexec"))


@pytest.mark.mpi
def test_an_mpiexec_that_connects_nobody(alone, capsys):
    done = command("bench", "--backend", "mpi", "--tree", "thousand-small")
    assert done.returncode == 2
    says = "funcavg has started 2 ranks, but MPI.COMM_WORLD has 1: the launcher is not that of mpi4py's library, "
    assert f"funcavg bench: {says}" in done.stderr
    assert main(["doctor", "mpi", "--timeout", "60"]) == 1
    assert re.search(r"(?m)^MPI +failed +2 ranks were started, but each has a COMM_WORLD of 1", capsys.readouterr().out)


@pytest.mark.mpi
def test_a_job_of_one_rank():
    done = mpi.mpiexec(0, "-m", "funcavg", "bench", "--backend=mpi", "--ranks=1", "--tree=thousand-small", "--turns=1")
    assert done.returncode == 0, done.stderr
    assert "; 1 rank, " in done.stdout


@pytest.mark.parametrize("backend", ["torch", pytest.param("mpi", marks=pytest.mark.mpi)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ranks_end_with_the_command(backend, number):
    if backend == "torch":
        skip_without("torch")
    if backend == "mpi":
        mpi.start(0, "-c", "").communicate()
    args = [
        sys.executable,
        "-m",
        "funcavg",
        "bench",
        "--turns",
        "9999",
        "--tree",
        "thousand-small",
        "--backend",
        backend,
    ]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with interruptible():  # processes inherit whether SIGINT is ignored
        process = subprocess.Popen(args, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ranks = []
        while len(ranks) < 2:  # until both have loaded their library
            assert process.poll() is None
            time.sleep(0.1)
            ranks = [pid for pid in mpi.children(process.pid) if is_rank(pid)]
        time.sleep(3)
        process.send_signal(number)
        process.wait(20)
        deadline = time.monotonic() + 5
        while any(Path(f"/proc/{pid}/maps").exists() and is_rank(pid) for pid in ranks):
            assert time.monotonic() < deadline, "ranks live on"
            time.sleep(0.1)
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    finally:
        for pid in (*mpi.children(process.pid), process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def is_rank(pid):
    with contextlib.suppress(OSError):
        return (
            b"numpy" in Path(f"/proc/{pid}/maps").read_bytes()
            and b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
    return False


@pytest.mark.mpi
def test_a_mistake_in_an_mpi_job_is_one_line():
    mpi.start(0, "-c", "").communicate()
    start = [*environment.mpiexec(os.environ), "-n", "2", sys.executable, "-m"]
    done = command("bench", "--tree", "nosuch", start=start)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.count("funcavg bench: no tree is called 'nosuch'") == 1


def test_rows_take_turns():
    order = []

    class Alone(jobs.Job):
        rank, size = 0, 1

        def barrier(self):
            order.append("barrier")

    ways = [rows.Row(name, lambda name=name: order.append(name)) for name in ("memcpy", "ours")]
    progress = []
    times = bench._in_turns(Alone(), ways, 3, lambda: progress.append(1))
    turns = [tuple(order[i : i + 6]) for i in range(0, len(order), 6)]
    turn = ("barrier", "memcpy", "barrier", "barrier", "ours", "barrier")
    assert len(turns) == bench.WARM_UP + 3
    assert set(turns) == {turn, (*turn[3:], *turn[:3])}  # each once, in an order of its own
    assert len(progress) == 2 * (bench.WARM_UP + 3)
    assert [len(times[name]) for name in ("memcpy", "ours")] == [3, 3]


def test_node_settings_are_those_of_the_user_again(monkeypatch):
    monkeypatch.setenv("FUNCAVG_NODE", "a")
    with rows.node_setting("off"):
        assert os.environ["FUNCAVG_NODE"] == "off"
    assert os.environ["FUNCAVG_NODE"] == "a"
    with rows.node_setting(None):
        assert os.environ["FUNCAVG_NODE"] == "a"
    monkeypatch.delenv("FUNCAVG_NODE")
    with rows.node_setting("off"):
        pass
    assert "FUNCAVG_NODE" not in os.environ


@pytest.mark.parametrize(
    ("medians", "says"),
    [
        (
            {"memcpy": 10, "one all-reduce per leaf": 16, "torch's averager": 60, "funcavg": 15, "funcavg, donate": 20},
            (
                "20.0 ms (funcavg, donate): 2.0 times as long as a memcpy, 1.25 times as long as one all-reduce per "
                "leaf and 0.33 times as long as torch's averager"
            ),
        ),
        ({"memcpy": 10, "funcavg": 9.5}, "9.50 ms (funcavg): 0.9 times as long as a memcpy"),
    ],
)
def test_the_last_sentence(medians, says):
    found = [{"name": name, "median_ms": value} for name, value in medians.items()]
    assert report.sentence("m", 2, found) == f"Averaging m over 2 ranks takes {says}."


def test_the_last_sentence_without_ours():
    said = report.sentence("m", 2, [{"name": "memcpy", "median_ms": 1.5}])
    assert said == "Nothing of funcavg was timed; a memcpy of m takes 1.50 ms."


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_on_a_terminal(monkeypatch, shown):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with report.progress(12, unit="call", shown=shown) as advance:
        for _ in range(12):
            advance()
        assert (" 0/12 " in sys.stderr.getvalue()) == shown


def test_rows_that_are_not_there():
    done = command("bench", "--tree", "thousand-small", "--rows", "nccl")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "funcavg bench: no row has one of ['nccl'] in its name: nothing but the barriers; memcpy;"
    )
    assert done.stderr.count("\n") == 1


def test_rank_0_copies_alone():
    class Rank(jobs.Job):
        def __init__(self, rank):
            self.rank, self.size, self.library, self.copies = rank, 2, "MPI", 0

        def buffer(self, numel, dtype):
            return self

        def __setitem__(self, where, what):
            self.copies += 1

        def sums(self, dtype):
            return False

    copies = []
    for rank in (0, 1):
        job = Rank(rank)
        byname = {row.name: row for row in rows._baselines(job, trees.read("thousand-small"), [])}
        for name in BASES[1:]:
            byname[name].run()
            copies.append(job.copies)
    assert copies == [1, 2, 1, 1]


def test_a_plot_of_any_rows(tmp_path):
    report.plot(tmp_path / "a.svg", "title", [{"name": "memcpy", "median_ms": 1.0, "quartiles_ms": [0.9, 1.2]}])
    assert "title" in (tmp_path / "a.svg").read_text()


# doctor


def test_what_works_works(capsys):
    skip_without("torch")
    assert main(["doctor", "threads", "torch", "node", "--timeout", "60"]) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    assert re.search(r"(?m)^funcavg +\d+\.\d+\.\d+, numpy [\d.]+, optree [\d.]+, Python 3", output)
    assert re.search(r"(?m)^launcher +none: a single process", output)
    assert re.search(r"(?m)^threads +ok +2 ranks average 4 MB, the first time in [\d.]+ s", output)
    assert re.search(r"(?m)^wires +bfloat16, int8, int4, int2; written by (C|NumPy)", output)
    errors = r"bfloat16 0\.2\d* %, int8 [01]\.\d+ %, int4 1\d %, int2 [45]\d %"
    said = re.sub(r"\n {24}", " ", output)
    assert re.search(rf"(?m)^threads, wires +ok +3 ranks get the same bits .* errors of {errors}", said)
    assert re.search(rf"(?m)^torch +ok +{re.escape(torch.__version__)}; backends: Gloo", output)
    assert re.search(r"(?m)^torch, Gloo +ok +2 ranks average 4 MB", output)
    assert re.search(r"(?m)^shared memory +ok", output)
    assert re.search(r"(?m)^node stage +ok +rank 0 of 2 meets 1 other rank", output)
    assert output.endswith("\nOf what was asked for, all works.\n")


def test_no_node_stage_and_why(capsys, monkeypatch):
    monkeypatch.setenv("FUNCAVG_NODE", "off")
    assert main(["doctor", "node", "--json", "--timeout", "60"]) == 1
    result = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in result["found"]}
    assert not result["ok"]
    assert "FUNCAVG_NODE=off" in found["environment"]["details"]
    assert found["shared memory"]["state"] == "ok"
    assert found["node stage"]["state"] == "no"
    assert re.search(
        "meets 0 other .*; off on this rank: FUNCAVG_NODE=off", re.sub(r"\s+", " ", found["node stage"]["details"])
    )


@pytest.mark.parametrize(("asked", "code"), [("torch", 1), ("jax", 1), ("mpi", 1), ("lost", 1), ("threads", 0)])
def test_what_is_not_installed_does_not_work(capsys, monkeypatch, asked, code):
    for library in ("torch", "jax", "mpi4py", "torchft"):
        monkeypatch.setitem(sys.modules, library, None)
    assert main(["doctor", asked]) == code
    assert ("absent  not installed: pip install" in capsys.readouterr().out) == bool(code)


def test_doctor_reports_the_job_it_is_in():
    skip_without("torch")
    done = command("doctor", "torch", "--timeout", "60", start=TORCHRUN)
    assert done.returncode == 0, done.stderr
    assert re.search(r"(?m)^launcher +torchrun, 2 ranks \(WORLD_SIZE=2, RANK=0\)", done.stdout)
    assert re.search(r"(?m)^this job +ok +torch .* \(Gloo\): 2 ranks average 4 MB", done.stdout)
    assert done.stdout.count("Of what was asked for, all works.") == 1


@pytest.mark.mpi
@pytest.mark.parametrize("size", [0, 2])
def test_doctor_tries_mpi(size):
    done = mpi.mpiexec(size, "-m", "funcavg", "doctor", "mpi", "node", "--timeout", "60")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert re.search(
        r"(?m)^mpi4py +ok +[\d.]+; (MPICH|Open MPI|Intel MPI) .*; threads: multiple; .* GPU memory", done.stdout
    )
    assert re.search(rf"(?m)^{'this job' if size else 'MPI'} +ok .*2 ranks average 4 MB", done.stdout)
    assert re.search(r"(?m)^node stage +ok +rank 0 of 2 meets 1 other rank", done.stdout)
    assert done.stdout.endswith("\nOf what was asked for, all works.\n")


ULFM = ("--with-ft", "ulfm")


@pytest.fixture(scope="module")
def lost():
    """Return the rows of what goes on after a loss, with lines joined, and the exit code."""
    done = command("doctor", "lost", "--timeout", "60")
    assert done.stderr == ""
    return re.sub(r"\n {24}", " ", done.stdout), done.returncode


def test_going_on_with_torchft(lost):
    if not environment.has("torchft"):
        assert re.search(r"(?m)^torchft +absent +not installed: pip install torchft$", lost[0])
        pytest.skip("torchft is not installed")
    assert re.search(
        r"(?m)^torchft +ok +\d+\.\d\S*; a ProcessGroupGloo of one replica is configured, and averages \(", lost[0]
    )


def test_going_on_with_torchrun(lost):
    skip_without("torch")
    assert re.search(r"(?m)^torchrun +ok +is installed; restarts all workers after a loss \(--max-restarts\)", lost[0])
    assert lost[1] == 0
    assert re.search(r"(?m)^Of what was asked for, enough works. After a loss, jobs can .*torchrun\.$", lost[0])


@pytest.mark.mpi
def test_going_on_with_mpi(lost):
    mpi.start(0, "-c", "").communicate()
    library = environment.mpi_name(environment.mpi_library(os.environ))
    if library.startswith("Open MPI v5"):
        says = f"ok +{library}: 2 ranks go on without a third that was killed, after [\\d.]+ s .mpiexec --with-ft ulfm"
    else:
        says = f"no +{re.escape(library)} ends a job of which a rank dies; .*Open MPI"
    assert re.search(rf"(?m)^MPI, ULFM +{says}", lost[0])


@pytest.mark.mpi
@pytest.mark.parametrize("options", [(), ULFM])
def test_going_on_with_the_mpi_job_that_doctor_is_in(options):
    mpi.start(0, "-c", "").communicate()
    is_open_mpi = "Open MPI" in environment.mpi_library(os.environ)
    if options and not is_open_mpi:
        pytest.skip("the launcher has no such options")
    job = mpi.start(2, "-m", "funcavg", "doctor", "lost", "--timeout", "60", options=options)
    output = re.sub(r"\n {24}", " ", job.communicate(timeout=60)[0])
    says = f"ends a job of which a rank dies; {'it goes on where it has ULFM' if is_open_mpi else 'Open MPI can'}"
    says = "this job goes on without a rank that dies" if options else says
    assert re.search(rf"(?m)^MPI, ULFM +{'ok' if options else 'no'} .*{says}", output)


def test_ranks_that_cannot_be_lost(monkeypatch):
    """Releases and launchers without ULFM are not given its options, which they would refuse."""
    for library, launcher, options in (
        ("Open MPI v5.0.11, package", "mpiexec", ["-n", "3"]),
        ("Open MPI v4.1.6, package", "mpiexec", []),
        ("Open MPI v5.0.11, package", "/usr/bin/srun", []),
        ("MPICH Version: 5.0.2", "mpiexec", []),
    ):
        monkeypatch.setattr(trials, "mpi_library", lambda *_, library=library: library)
        monkeypatch.setattr(trials, "mpiexec", lambda *_, launcher=launcher: [launcher])
        assert trials._ulfm({}, 1.0) == ([launcher, *ULFM, *options] if options else [])


def test_a_torchft_that_cannot_be_imported(monkeypatch, tmp_path, capsys):
    (tmp_path / "torchft").mkdir()
    (tmp_path / "torchft" / "__init__.py").write_text(
        "import sys; print('much to say' * 1000, file=sys.stderr); raise ImportError('built for another torch')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, [tmp_path, ROOT])))
    monkeypatch.delitem(sys.modules, "torchft", raising=False)
    broken, *_ = (trial for trial in trials.TRIALS if trial.name == "torchft")
    monkeypatch.setattr(doctor, "TRIALS", [broken])
    for asked in (["lost"], []):
        assert main(["doctor", *asked, "--timeout", "60"]) == 1
        assert re.search(r"(?m)^torchft +failed +ImportError: built for another torch \(", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("import time; time.sleep(60)", "no end within 1 s; --timeout gives it more"),
        ("import signal; signal.alarm(1); signal.pause()", "no end within 1 s; --timeout gives it more"),
        ("raise OSError('broken')", "OSError: broken"),
        ("import os; os._exit(3)", "ended with code 3, and said nothing"),
        ("print('x' * 100000, flush=True); raise OSError('after much')", "OSError: after much"),
        ("print('hello')", "hello"),
    ],
)
def test_a_check_that_fails_says_why(code, says):
    with pytest.raises(environment.CliError) as caught:
        trials._run([[sys.executable, "-c", code]], dict(os.environ), 1.0 if "time" in code else 20.0)
    assert str(caught.value).replace("within 20 s", "within 1 s") == says


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("", "rank 0 of 2 cannot connect to the others: Timed out"),
        ("torch", "which is not installed: pip install torch"),
    ],
)
def test_a_job_that_cannot_be_connected_is_a_finding(capsys, monkeypatch, missing, says):
    if not missing:
        skip_without("torch")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    finding = doctor._this_job(["torch"], 1.0)
    assert (finding.what, finding.state) == ("torch", "failed")
    assert says in finding.details
    assert main(["doctor", "threads", "--timeout", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [found["state"] for found in result["found"] if found["name"] in ("this job", "threads")] == ["failed", "ok"]


@pytest.mark.mpi
def test_the_jobs_own_ranks_decide_whether_they_share_memory():
    mpi.start(0, "-c", "").communicate()
    each = [sys.executable, "-c", APART, "doctor", "node"]
    done = subprocess.run(
        [*environment.mpiexec(os.environ), "-n", "2", *each],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1, done.stdout
    assert re.search(r"(?m)^shared memory +ok", done.stdout)
    assert re.search(r"(?m)^node stage +no +rank 0 of 2 meets 0 other rank\(s\)", done.stdout)


APART = """
import os, sys
from mpi4py import MPI
os.environ["FUNCAVG_NODE"] = str(MPI.COMM_WORLD.rank)
from funcavg.cli import main
sys.exit(main())
"""


def test_an_mpi_library_that_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("class rc: pass")
    (tmp_path / "mpi4py" / "MPI.py").write_text("import time; time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(environment, "has", lambda library: True)
    begin = time.monotonic()
    with pytest.raises(environment.CliError, match="mpi4py does not load its MPI library within 1 s"):
        environment.mpiexec(os.environ, timeout=1)
    assert time.monotonic() - begin < 20


def test_the_rank_that_fails_is_heard_and_not_the_one_that_waits():
    codes = ["import time; time.sleep(60)", "raise OSError('the reason')"]
    begin = time.monotonic()
    with pytest.raises(environment.CliError, match=r"^OSError: the reason$"):
        trials._run([[sys.executable, "-c", code] for code in codes], dict(os.environ), 60.0)
    assert time.monotonic() - begin < 20


def test_a_wrong_mean_is_noticed(monkeypatch):
    right = funcavg.average

    def wrong(tree, group, **options):
        means = right(tree, group, **options)
        means["large"][7] += 1
        return means

    monkeypatch.setattr(funcavg, "average", wrong)
    with pytest.raises(
        environment.CliError, match=r"rank . of 2 got a wrong mean of 'large': element 7 must be 7.5, and is 8.5"
    ):
        run_ranks(2, checks.average_ranks)


@pytest.mark.parametrize(
    ("rank", "error", "says"),
    [
        (1, 1e-6, "over wire int4 ranks got means of different bits"),
        (None, 1.0, "over wire int4 the mean has a relative error of 1"),
        (None, np.nan, "over wire int4 the mean has a relative error of nan"),
    ],
)
def test_a_wrong_mean_over_a_wire_is_noticed(monkeypatch, rank, error, says):
    right = funcavg.average

    def wrong(tree, group, wire):
        mean = right(tree, group, wire=wire)
        return mean * np.float32(1 + error) if wire == "int4" and rank in (None, group.rank) else mean

    monkeypatch.setattr(funcavg, "average", wrong)
    with pytest.raises(environment.CliError, match=says):
        checks._wires()


def test_each_wire_is_tried_by_doctor():
    assert tuple(checks.BOUNDS) == NAMES


def test_verdicts():
    found = [trials.Finding("mpi", "MPI", trials.FAILED, ""), trials.Finding("jax", "JAX", trials.ABSENT, "")]
    assert doctor._verdict(found, []) == (1, "Of what is installed, this does not work: MPI.")
    assert doctor._verdict(found, ["jax"]) == (1, "Of what was asked for, this does not work: JAX.")
    assert doctor._verdict(found[1:], []) == (0, "Of what is installed, all works.")
    lost = [
        trials.Finding("lost", name, state, "")
        for name, state in (("torchft", trials.ABSENT), ("MPI, ULFM", trials.NO), ("torchrun", trials.OK))
    ]
    able = "After a loss, jobs can go on with: torchrun."
    assert doctor._verdict(lost, []) == (0, "Of what is installed, all works.")
    assert doctor._verdict(lost, ["lost"]) == (0, f"Of what was asked for, enough works. {able}")
    bad = "Of what was asked for, this does not work:"
    assert doctor._verdict(found + lost, ["lost", "mpi"]) == (1, f"{bad} MPI. {able}")
    assert doctor._verdict(lost[:2], ["lost"]) == (1, f"{bad} torchft; MPI, ULFM.")


def test_everyone_who_asks_is_told_how(capsys):
    for args in (["--help"], ["bench", "--help"], ["doctor", "--help"], ["mean", "--help"]):
        with pytest.raises(SystemExit) as leaving:
            main(args)
        assert leaving.value.code == 0
    output = capsys.readouterr().out
    assert all(
        word in output for word in ("torchrun -m funcavg bench", "--tree", "Exit code 0", "mpiexec -n 4 funcavg bench")
    )

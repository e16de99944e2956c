"""`funcavg mean` of every format: the mean of ranks, whole or not there, in the memory of one model."""

import json
import os
import re
import signal
import subprocess
import sys
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import skip_without, torch

import funcavg
from funcavg.cli import files as reading
from funcavg.cli import main, mean, trees, writing
from funcavg.testing import run_ranks

ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FLOATS = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"]
INTEGERS = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Be in a folder of one's own, and leave the process's signals as they were."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def need(*libraries):
    """Skip the test where one is not installed."""
    for library in libraries:
        skip_without(library)


def save(name, tree, **metadata):
    """Write a flat tree of NumPy arrays or torch tensors."""
    if name.endswith(".safetensors"):
        need("safetensors")
        if torch and any(isinstance(leaf, torch.Tensor) for leaf in tree.values()):
            from safetensors.torch import save_file
        else:
            from safetensors.numpy import save_file
        save_file(
            {key: leaf.clone() if torch and isinstance(leaf, torch.Tensor) else leaf for key, leaf in tree.items()},
            name,
            metadata or None,
        )
    elif name.endswith(".npz"):
        (np.savez_compressed if "small" in name else np.savez)(
            name, **{key: np.asarray(leaf) for key, leaf in tree.items()}
        )
    else:
        torch.save({key: torch.as_tensor(leaf) for key, leaf in tree.items()}, name)
    return name


def load(name):
    """Read a flat tree by its format's own library: of torch tensors, except from .npz."""
    if name.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(name)
    if name.endswith(".npz"):
        with np.load(name) as file:
            return dict(file)
    return torch.load(name, weights_only=True)


def bits(leaf):
    """Return dtype, shape and bytes of an array of either kind."""
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.name, leaf.shape, leaf.tobytes()
    flat = leaf.detach().contiguous().reshape(-1)
    return str(leaf.dtype).removeprefix("torch."), tuple(leaf.shape), flat.view(torch.uint8).numpy().tobytes()


def replicas(count, dtypes=FLOATS, seed=0):
    """Return trees of random torch tensors."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        tree = {}
        for dtype in dtypes:
            kind = getattr(torch, dtype)
            draw = torch.complex64 if kind.is_complex else torch.float64 if dtype == "float64" else torch.float32
            tree[dtype] = torch.randn(37, 5, generator=generator, dtype=draw).to(kind)
        made.append(tree)
    return made


def average_of(trees, weights=None):
    """Return what `funcavg.average` gives on as many ranks."""

    def rank(group):
        weight = None if weights is None else weights[group.rank]
        return funcavg.average(trees[group.rank], group, **({} if weight is None else {"weight": weight}))

    return run_ranks(len(trees), rank)[0]


def succeed(capsys, *args):
    """Run the command; return its last line, and what it has said besides."""
    assert main(["mean", *map(str, args)]) == 0
    output, errors = capsys.readouterr()
    assert output.count("\n") == 1
    return output, errors


# What is written


@pytest.mark.parametrize("suffix", [".npz", "-small.npz", ".safetensors", ".pt", ".bin"])
def test_it_is_the_exact_mean_rounded_once(capsys, suffix):
    if not suffix.endswith(".npz"):
        need("torch", "safetensors")
    generator = np.random.default_rng(0)
    made = [{"w": generator.standard_normal((3, 7), np.float32), "b": np.float32(number)} for number in range(3)]
    names = [save(f"{number}{suffix}", {k: np.asarray(v) for k, v in tree.items()}) for number, tree in enumerate(made)]
    output, errors = succeed(capsys, *names, "--output", f"out{suffix}")
    assert re.fullmatch(rf"out{suffix}: the mean of 3 file\(s\), 2 leaves, 88 bytes, \d+\.\d\d s\n", output)
    assert errors == ""
    found = load(f"out{suffix}")
    exact = [
        float(sum(map(Fraction, map(float, cell))) / 3) for cell in zip(*[tree["w"].flat for tree in made], strict=True)
    ]
    assert np.array_equal(np.asarray(found["w"]), np.array(exact, np.float32).reshape(3, 7))
    assert bits(found["b"]) == ("float32", (), np.float32(1).tobytes())


@pytest.mark.parametrize("weights", [None, [3.0, 0.0, 0.25, 1.0]])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_it_is_average_over_ranks_to_the_last_bit(capsys, monkeypatch, suffix, weights):
    need("torch", "safetensors")
    monkeypatch.setattr(mean, "LONGEST", mean.SHORTEST)  # more than one part, of larger leaves
    monkeypatch.setattr(mean, "TOGETHER", 1)
    made = [
        tree | {"large": torch.randn(3000, generator=torch.Generator().manual_seed(i))}
        for i, tree in enumerate(replicas(4))
    ]
    names = [save(f"{number}{suffix}", tree) for number, tree in enumerate(made)]
    options = [] if weights is None else ["--weights", *weights]
    for out in ("out.safetensors", "out.pt"):
        succeed(capsys, *names, "--output", out, *options)
        found, expected = load(out), average_of(made, weights)
        assert {name: bits(leaf) for name, leaf in found.items()} == {
            name: bits(leaf) for name, leaf in expected.items()
        }


def test_npz_of_any_order_and_byte_order(capsys, monkeypatch):
    monkeypatch.setattr("funcavg.cli.archives.SPOOLED", 10)
    made = [
        {
            "fortran": np.asfortranarray(np.random.default_rng(i).standard_normal((6, 7))),
            "big": np.random.default_rng(i).standard_normal(5).astype(">f4"),
            "wide": np.full(3, i, np.longdouble) / 3,
            "z": np.full(2, i + 1j * i, np.complex128),
            "empty": np.ones((0, 3)),
        }
        for i in range(3)
    ]
    names = [save(f"{i}.npz", tree) for i, tree in enumerate(made)]
    succeed(capsys, *names, "--output", "out.npz")
    found, expected = load("out.npz"), average_of(made)
    assert list(found) == list(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype.newbyteorder("=")
        assert np.array_equal(found[name], leaf)


def test_formats_mix_and_one_file_is_converted(capsys):
    need("torch", "safetensors")
    made = replicas(4, ["float16", "float32", "float64"])
    nested = [{"a": {"x": tree["float16"], "y": tree["float32"]}, "b": [tree["float64"]]} for tree in made]
    flat = [{"a.x": tree["float16"], "a.y": tree["float32"], "b.0": tree["float64"]} for tree in made]
    torch.save(nested[0], "0.pt")
    save("1.safetensors", flat[1])
    save("2.npz", flat[2])
    torch.save({"model": nested[3], "step": 7}, "3.pth")
    expected = {name: bits(leaf) for name, leaf in average_of(flat).items()}
    names = ["0.pt", "1.safetensors", "2.npz", "3.pth"]
    for out in ("out.safetensors", "out.npz"):
        succeed(capsys, *names, "--output", out)
        assert {name: bits(leaf) for name, leaf in load(out).items()} == expected
    succeed(capsys, *names, "--output", "out.pt")
    found = load("out.pt")
    assert [bits(found["a"]["x"]), bits(found["a"]["y"]), bits(found["b"][0])] == list(expected.values())
    succeed(capsys, *reversed(names), "--output", "out.pt")  # the structure of the first file of torch's: 3.pth
    assert load("out.pt")["step"] == 7
    succeed(capsys, "2.npz", "--output", "one.pt")
    assert {name: bits(leaf) for name, leaf in load("one.pt").items()} == {
        name: bits(leaf) for name, leaf in flat[2].items()
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_model(capsys, suffix):
    need("torch", "safetensors")
    from safetensors import safe_open

    made = replicas(2, ["float32", "float64"])
    for number, tree in enumerate(made):
        Path(f"model{number}").mkdir()
        names = {name: f"model-{place}{suffix}" for place, name in enumerate(tree)}
        for name, leaf in tree.items():
            save(f"model{number}/{names[name]}", {name: leaf}, **({"by": "us"} if suffix != ".bin" else {}))
        Path(f"model{number}/model{suffix}.index.json").write_text(json.dumps({"weight_map": names}))
    expected = {name: bits(leaf) for name, leaf in average_of(made).items()}
    index = f"model1/model{suffix}.index.json"
    for out in ("out.safetensors", "out.pt"):
        succeed(capsys, "model0", index, "--output", out)
        assert {name: bits(leaf) for name, leaf in load(out).items()} == expected
    with safe_open("out.safetensors", framework="pt") as file:
        assert file.metadata() == ({"by": "us"} if suffix != ".bin" else {"format": "pt"})
    assert main(["mean", "model0", index, "--output", f"model1/model-1{suffix}"]) == 2
    assert "that is one of the files to be averaged" in capsys.readouterr().err


def test_what_is_no_float_is_kept_and_named_where_it_differs(capsys):
    need("torch", "safetensors")
    made = []
    for number in range(2):
        tree = {dtype: torch.ones(4, dtype=getattr(torch, dtype)) for dtype in INTEGERS}
        made.append(tree | {"w": torch.full((2,), float(number)), "num_batches_tracked": torch.tensor(5 + number)})
    for suffix, out in ((".safetensors", "out.safetensors"), (".pt", "out.pt"), (".pt", "out.npz")):
        names = [save(f"{number}{suffix}", tree) for number, tree in enumerate(made)]
        _, errors = succeed(capsys, *names, "--output", out)
        assert errors.count("\n") == 1
        said = f"not averaged, and not the same in all files; {out} has the first one's: num_batches_tracked"
        assert errors == f"funcavg mean: {said}\n"
        found = load(out)
        assert {name: bits(leaf) for name, leaf in found.items()} == {
            name: bits(leaf) for name, leaf in (made[0] | {"w": torch.full((2,), 0.5)}).items()
        }


def test_where_chooses_leaves(capsys):
    made = [{"body.w": np.full(3, float(i)), "head.w": np.full(2, float(i)), "head.b": np.ones(2)} for i in range(2)]
    names = [save(f"{i}.npz", tree) for i, tree in enumerate(made)]
    _, errors = succeed(capsys, *names, "--output", "out.npz", "--where", r"^body\.|w$^")
    assert errors.endswith("out.npz has the first one's: head.w\n")
    assert {name: leaf.tolist() for name, leaf in load("out.npz").items()} == {
        "body.w": [0.5] * 3,
        "head.w": [0.0] * 2,
        "head.b": [1.0] * 2,
    }
    succeed(capsys, *names, "--output", "out.npz", "--where", "ead")  # found anywhere in the name
    assert load("out.npz")["head.w"].tolist() == [0.5] * 2


def test_a_file_of_weight_0_is_not_looked_at(capsys):
    names = [save(f"{i}.npz", {"w": np.full(3, [1.0, np.nan, 2.0][i])}) for i in range(3)]
    succeed(capsys, *names, "--output", "out.npz", "--weights", 2, 0, 2)
    assert load("out.npz")["w"].tolist() == [1.5] * 3


def test_metadata_of_the_first_safetensors_file_stays(capsys):
    need("torch", "safetensors")
    from safetensors import safe_open

    tree = {"w": torch.ones(3), "h": torch.ones(3, dtype=torch.float16), "b": torch.ones(1, dtype=torch.uint8)}
    save("0.pt", tree)
    save("1.safetensors", tree, format="pt", step="1")
    save("2.safetensors", tree, format="np")
    for names, expected in (
        (["0.pt", "1.safetensors", "2.safetensors"], {"format": "pt", "step": "1"}),
        (["2.safetensors", "1.safetensors"], {"format": "np"}),
        (["0.pt"], {"format": "pt"}),  # transformers reads no file without
    ):
        succeed(capsys, *names, "--output", "out.safetensors")
        with safe_open("out.safetensors", framework="pt") as file:
            assert file.metadata() == expected
            assert all(file.get_tensor(name).data_ptr() % file.get_tensor(name).element_size() == 0 for name in tree)


# What torch's files have besides


def test_tied_leaves_stay_tied_and_are_copies_in_safetensors(capsys):
    need("torch", "safetensors")
    inputs = []
    for number in range(3):
        shared = torch.full((30, 2), float(number))
        held = {"embedding": shared, "head": shared, "transposed": shared.T, "part": shared[3:], "own": torch.ones(2)}
        torch.save(held, f"{number}.pt")
        inputs.append(Path(f"{number}.pt").read_bytes())
    names = [f"{number}.pt" for number in range(3)]
    _, errors = succeed(capsys, *names, "--output", "out.pt")
    assert errors == ""
    found = load("out.pt")
    assert torch.equal(found["embedding"], torch.ones(30, 2))
    assert found["transposed"].stride() == (1, 2)
    found["embedding"][7] = 5  # one memory
    for name, part in (
        ("head", found["head"][7]),
        ("transposed", found["transposed"][:, 7]),
        ("part", found["part"][4]),
    ):
        assert part.tolist() == [5.0, 5.0], name
    _, errors = succeed(capsys, *names, "--output", "out.safetensors")
    assert errors == "funcavg mean: tied, and copies in out.safetensors: head = embedding\n"
    found = load("out.safetensors")
    assert {name: (tuple(leaf.shape), set(leaf.flatten().tolist())) for name, leaf in found.items()} == {
        "embedding": ((30, 2), {1.0}),
        "head": ((30, 2), {1.0}),
        "transposed": ((2, 30), {1.0}),
        "part": ((27, 2), {1.0}),
        "own": ((2,), {1.0}),
    }
    assert [Path(name).read_bytes() for name in names] == inputs  # what was mapped to be written to stays as it was


@pytest.mark.parametrize(
    "make",
    [lambda w: {"a": w, "b": w}, lambda w: {"a": w, "b": w[1:]}, lambda w: {"a": w[:1].expand(6, 4)}],
    ids=["tied", "part", "expanded"],
)
def test_files_that_are_not_tied_alike(capsys, make):
    need("torch", "safetensors")
    torch.save(make(torch.ones(6, 4)), "0.pt")
    other = {name: torch.randn(leaf.shape) for name, leaf in make(torch.ones(6, 4)).items()}
    if "b" in other:
        other["a"] = torch.ones(6, 4)  # as in the first file, and its mean, too
    torch.save(other, "1.pt")
    Path("out.pt").write_bytes(b"old")
    assert main(["mean", "0.pt", "1.pt", "--output", "out.pt"]) == 1
    errors = capsys.readouterr().err
    assert re.match(
        r"funcavg mean: leaf '[ab]' shares memory in 0\.pt with another leaf, or its own elements do", errors
    )
    assert errors.count("\n") == 1
    assert Path("out.pt").read_bytes() == b"old"
    succeed(capsys, "0.pt", "1.pt", "--output", "out.safetensors")
    expected = average_of([{name: leaf.contiguous() for name, leaf in torch.load("0.pt").items()}, other])
    assert {name: bits(leaf) for name, leaf in load("out.safetensors").items()} == {
        name: bits(leaf) for name, leaf in expected.items()
    }


def test_views_of_one_storage_and_of_any_layout(capsys, monkeypatch):
    need("torch")
    monkeypatch.setattr(mean, "LONGEST", mean.SHORTEST)
    made = []
    for number in range(2):
        flat = torch.randn(6000, generator=torch.Generator().manual_seed(number))
        held = {
            "a": flat[:3000].view(60, 50),
            "b": flat[3000:5000].view(50, 40).T,
            "steps": flat[5000::3],
            "one": flat[5001],
        }
        held["image"] = torch.randn(2, 30, 50, 2).to(memory_format=torch.channels_last)
        held["z"] = torch.randn(40, 50, dtype=torch.complex64).T
        torch.save(held, f"{number}.pt")
        made.append(held)
    succeed(capsys, "0.pt", "1.pt", "--output", "out.pt")
    found, expected = (
        load("out.pt"),
        average_of([{name: leaf.contiguous() for name, leaf in tree.items()} for tree in made]),
    )
    assert {name: bits(leaf) for name, leaf in found.items()} == {name: bits(leaf) for name, leaf in expected.items()}
    assert [found[name].stride() for name in made[0]] == [leaf.stride() for leaf in made[0].values()]


def test_a_lightning_checkpoint_comes_back_as_one(capsys):
    need("torch")
    modules = [torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)) for _ in range(2)]
    for number, module in enumerate(modules):
        optimizer = {"state": {0: {"exp_avg": torch.full((2,), float(number))}}, "param_groups": [{"lr": 0.1}]}
        torch.save(
            {
                "epoch": number,
                "state_dict": module.state_dict(),
                "optimizer_states": [optimizer],
                "hyper_parameters": {"a": 1},
            },
            f"{number}.ckpt",
        )
    succeed(capsys, "1.ckpt", "0.ckpt", "--output", "out.ckpt")
    found = load("out.ckpt")
    assert (found["epoch"], found["hyper_parameters"]) == (1, {"a": 1})
    assert found["optimizer_states"][0]["state"][0]["exp_avg"].tolist() == [1.0, 1.0]
    assert list(found["state_dict"]) == list(modules[0].state_dict())
    assert found["state_dict"]._metadata == modules[0].state_dict()._metadata
    modules[0].load_state_dict(found["state_dict"])
    halves = [torch.load(f"{number}.ckpt")["state_dict"]["0.weight"].double() for number in range(2)]
    assert torch.equal(modules[0][0].weight.detach(), (sum(halves) / 2).float())


def test_what_is_no_array_is_kept_or_left_out(capsys):
    need("torch", "safetensors")
    for number in range(2):
        torch.save({"w": torch.full((2,), float(number)), "step": number, "name": "net"}, f"{number}.pt")
    _, errors = succeed(capsys, "0.pt", "1.pt", "--output", "out.pt")
    assert errors == "funcavg mean: not averaged, and not the same in all files; out.pt has the first one's: step\n"
    assert {name: value for name, value in load("out.pt").items() if name != "w"} == {"step": 0, "name": "net"}
    _, errors = succeed(capsys, "0.pt", "1.pt", "--output", "out.safetensors")
    assert "no arrays, and left out of out.safetensors, which holds nothing else: name, step\n" in errors


def test_files_of_old_are_read_as_a_whole_and_say_so(capsys):
    need("torch")
    tree = {"w": torch.arange(4.0)}
    tree["tied"] = tree["w"]
    torch.save(tree, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(tree, "new.pt")
    for names in (["old.pt", "new.pt"], ["new.pt", "old.pt"]):
        _, errors = succeed(capsys, *names, "--output", "out.pt")
        assert errors == "funcavg mean: in the format before torch 1.6, and in memory as a whole: old.pt\n"
        found = load("out.pt")
        assert torch.equal(found["w"], tree["w"])
        assert found["w"].data_ptr() == found["tied"].data_ptr()


def test_what_is_said_of_shards(capsys):
    need("torch", "safetensors")
    weight = torch.ones(3)
    torch.save({"a": weight, "b": weight}, "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"c": weight, "step": 3}, "new.bin")
    index = {"weight_map": {"a": "old.bin", "b": "old.bin", "c": "new.bin"}}
    Path("model.bin.index.json").write_text(json.dumps(index))
    _, errors = succeed(capsys, "model.bin.index.json", "--output", "out.safetensors")
    assert errors.splitlines() == [
        "funcavg mean: in the format before torch 1.6, and in memory as a whole: model.bin.index.json",
        "funcavg mean: tied, and copies in out.safetensors: b = a",
        "funcavg mean: no arrays, and left out of out.safetensors, which holds nothing else: step",
    ]


# Mistakes


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("a.npz", "the following arguments are required: --output"),
        ("--output o.npz", "the following arguments are required: FILE"),
        ("a.npz --output o.npz --weights x", "argument --weights: invalid float value: 'x'"),
        ("a.npz b.npz --output o.npz --weights 1", "--weights: 2 file(s) need as many weights, got 1"),
        ("a.npz b.npz --output o.npz --weights 0 0", "finite, not negative, and not all 0, got 0 0"),
        ("a.npz b.npz --output o.npz --weights 1 -1", "finite, not negative, and not all 0, got 1 -1"),
        ("a.npz b.npz --output o.npz --weights 1 nan", "finite, not negative, and not all 0, got 1 nan"),
        ("a.npz b.npz --output o.npz --weights inf 1", "finite, not negative, and not all 0, got inf 1"),
        ("a.npz --output o.npz --where (", "--where (: no regular expression: missing )"),
        ("a.npz --output o.npz --where nothing", "no leaf is averaged: --where nothing is found in none"),
        ("whole.npz --output o.npz", "no leaf is averaged"),
        ("a.npz b.npz --output b.npz", "--output b.npz: that is one of the files to be averaged; name another"),
        ("a.npz b.npz --output link.npz", "--output link.npz: that is one of the files to be averaged"),
        (
            "a.npz --output o.doc",
            "--output o.doc: the name must end with one of .safetensors, .npz, .pt, .pth, .bin, .c",
        ),
        ("a.npz --output nowhere/o.npz", "--output nowhere/o.npz: there is no such folder"),
        ("a.npz --output folder.npz", "--output folder.npz: that is a folder; name a file"),
        ("a.npz nosuch.npz --output o.npz", "nosuch.npz: no such file"),
        ("a.npz a.doc --output o.npz", "a.doc: its name must end with one of .safetensors, .npz, .pt"),
        ("big.npz --output o.safetensors", "leaf 'z' is complex128[2], which a .safetensors file cannot hold: choose"),
        ("words.npz --output o.safetensors", "leaf 'words' is <U3[1], which a .safetensors file cannot hold: choose"),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, args, says):
    for name in "ab":
        save(f"{name}.npz", {"w": np.ones(3)})
    save("whole.npz", {"n": np.arange(3)})
    save("big.npz", {"z": np.ones(2, complex)})
    save("words.npz", {"w": np.ones(2), "words": np.array(["abc"])})
    Path("link.npz").symlink_to("b.npz")
    Path("folder.npz").mkdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert main(["mean", *args.split()]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("funcavg")
    assert says in errors
    assert errors.count("\n") == 1
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_dtype_that_npz_does_not_have(capsys):
    need("torch", "safetensors")
    save("a.safetensors", {"h": torch.ones(3, dtype=torch.bfloat16)})
    assert main(["mean", "a.safetensors", "--output", "out.npz"]) == 2
    assert "leaf 'h' is bfloat16[3], which a .npz file cannot hold: choose .safetensors" in capsys.readouterr().err


def cut(name):
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: len(data) - 100])


def flip(name):
    """Damage bytes of the first array in an archive, and nothing else."""
    with zipfile.ZipFile(name) as archive:
        info = archive.infolist()[0]
    data = bytearray(Path(name).read_bytes())
    lengths = data[info.header_offset + 26 : info.header_offset + 30]
    begin = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    data[begin + info.compress_size // 2] ^= 0xFF
    Path(name).write_bytes(data)


def forge(name):
    """Change the checksum of the first array in an archive."""
    data = bytearray(Path(name).read_bytes())
    data[data.index(b"PK\1\2") + 16] ^= 0xFF
    Path(name).write_bytes(data)


def as_tensors(tree):
    return {name: torch.as_tensor(leaf) for name, leaf in tree.items()}


W = {"w": np.random.default_rng(0).standard_normal((5000, 4), np.float32), "v": np.ones(3, np.float32)}


@pytest.mark.parametrize(
    ("bad", "make", "says"),
    [
        ("b.npz", lambda n: (save(n, W), cut(n)), "b.npz: cannot be read as .npz: it is no zip archive"),
        ("b-small.npz", lambda n: (save(n, W), flip(n)), "b-small.npz: leaf 'w' cannot be read: "),
        ("b.npz", lambda n: (save(n, W), flip(n)), "b.npz: leaf 'w' cannot be read: Bad CRC-32 for file 'w.npy'"),
        ("b-small.npz", lambda n: (save(n, W), forge(n)), "b-small.npz: leaf 'w' cannot be read: Bad CRC-32"),
        ("b.npz", lambda n: (save(n, W), forge(n)), "b.npz: leaf 'w' cannot be read: Bad CRC-32"),
        ("b.safetensors", lambda n: (save(n, W), cut(n)), "b.safetensors: cannot be read as .safetensors: "),
        (
            "b.pt",
            lambda n: (save(n, W), cut(n)),
            "b.pt: cannot be read as .pt: torch.load(weights_only=True) takes ten",
        ),
        ("b.pt", lambda n: Path(n).write_bytes(b""), "b.pt: cannot be read as .pt: torch.load"),
        ("b.npz", lambda n: save(n, {"w": W["w"]}), "b.npz: there is no leaf 'v', and a.npz has it"),
        ("b.npz", lambda n: save(n, W | {"x": W["v"]}), "a.npz: there is no leaf 'x', and b.npz has it"),
        (
            "b.npz",
            lambda n: save(n, W | {"v": np.ones((3, 1), np.float32)}),
            "b.npz: leaf 'v' is float32[3, 1], and float32[3] in a",
        ),
        ("b.npz", lambda n: save(n, W | {"v": np.ones(3)}), "b.npz: leaf 'v' is float64[3], and float32[3] in a.npz"),
        (
            "b.npz",
            lambda n: save(n, W | {"v": np.array([object()])}),
            "b.npz: cannot be read as .npz: leaf 'v' cannot be read: Object arrays",
        ),
        (
            "b.pt",
            lambda n: torch.save(torch.nn.Linear(2, 2), n),
            "Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not",
        ),
        (
            "b.pt",
            lambda n: torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, n),
            "two of its leaves are called 'a.b'",
        ),
        (
            "b.pt",
            lambda n: torch.save({"model": as_tensors(W), "state_dict": as_tensors(W)}, n),
            "arrays under 'state_dict' and 'model'",
        ),
        ("b.pt", lambda n: torch.save({"w": torch.ones(2, 2).to_sparse()}, n), "leaf 'w' is a sparse_coo tensor"),
    ],
)
@pytest.mark.parametrize("out", ["out.npz", "out.safetensors", "out.pt"])
def test_a_bad_file_is_one_line_and_nothing_is_written(capsys, folder, bad, make, says, out):
    if not bad.endswith(".npz") or not out.endswith(".npz"):
        need("torch", "safetensors")
    save("a.npz", W)
    make(bad)
    Path(out).write_bytes(b"old")
    assert main(["mean", "a.npz", bad, "--output", out]) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("funcavg mean: ")
    assert says in errors
    assert errors.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"a.npz", bad, out}
    assert Path(out).read_bytes() == b"old"
    assert main(["mean", "a.npz", bad, "--output", f"new{out}"]) == 1
    assert not Path(f"new{out}").exists()


def test_a_file_that_is_cut_while_it_is_read(capsys, monkeypatch):
    need("safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        save(name, W)
    before = writing.sink_for
    monkeypatch.setattr(mean, "sink_for", lambda *args: (cut("b.safetensors"), before(*args))[1])
    assert main(["mean", "a.safetensors", "b.safetensors", "--output", "out.npz"]) == 1
    assert "b.safetensors: leaf 'w' cannot be read: the file ends 100 bytes too early" in capsys.readouterr().err


def test_what_nobody_can_average(capsys):
    np.savez("a.npz", w=np.ones(3), v=np.ones(3, "V2"))  # what NumPy makes of ml_dtypes' bfloat16
    assert main(["mean", "a.npz", "--output", "out.npz"]) == 1
    assert capsys.readouterr().err == "funcavg mean: a.npz: leaf 'v' is |V2[3], which cannot be averaged, nor kept\n"


@pytest.mark.parametrize("out", ["out.npz", "out.safetensors", "out.pt"])
@pytest.mark.parametrize("ends_by", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_there(monkeypatch, folder, out, ends_by):
    if out != "out.npz":
        need("torch", "safetensors")
    names = [save(f"{number}.npz", {"w": np.ones(3), "v": np.ones(3)}) for number in range(2)]
    Path(out).write_bytes(b"old")
    calls = []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            assert any(path.name.endswith(".partial") for path in folder.iterdir())
            signal.raise_signal(ends_by)

    monkeypatch.setattr(mean, "mean_into", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(["mean", *names, "--output", out])
    except SystemExit as leaving:
        code = leaving.code
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 128 + ends_by
    assert sorted(path.name for path in folder.iterdir()) == ["0.npz", "1.npz", out]
    assert Path(out).read_bytes() == b"old"


@pytest.mark.parametrize("out", ["out.npz", "out.safetensors", "out.pt"])
def test_a_full_disk_is_one_line(folder, out):
    if out != "out.npz":
        need("torch", "safetensors")
    save("a.npz", {"w": np.ones((1000, 100)), "v": np.ones((1000, 100))})
    Path(out).write_bytes(b"old")
    code = "import sys; from funcavg.cli import main; from resource import *; setrlimit(RLIMIT_FSIZE, (10**6, 10**6)); "
    done = subprocess.run(
        [sys.executable, "-c", code + f"sys.exit(main(['mean', 'a.npz', '--output', '{out}']))"],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRON,
    )
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(rf"funcavg mean: \S*{out}: cannot be written: .*\n", done.stderr)
    assert sorted(path.name for path in folder.iterdir()) == ["a.npz", out]
    assert Path(out).read_bytes() == b"old"


def test_the_file_has_the_rights_of_any_new_file_or_of_the_one_before_and_links_stay(capsys):
    save("a.npz", {"w": np.ones(3)})
    Path("real.npz").write_bytes(b"")
    Path("real.npz").chmod(0o604)
    Path("link.npz").symlink_to("real.npz")
    before = os.umask(0o027)
    try:
        succeed(capsys, "a.npz", "--output", "link.npz")
        succeed(capsys, "a.npz", "--output", "new.npz")
    finally:
        os.umask(before)
    assert Path("link.npz").is_symlink()
    assert load("real.npz")["w"].tolist() == [1.0] * 3
    assert Path("real.npz").stat().st_mode & 0o777 == 0o604
    assert Path("new.npz").stat().st_mode & 0o777 == 0o640


# What it takes


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_torch_is_not_needed_and_not_imported(suffix):
    need("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    code = """
import sys
sys.modules.update(dict.fromkeys({hidden}))
import numpy as np
from funcavg.cli import main
code = main(["mean", "a{suffix}", "b{suffix}", "--output", "out{suffix}"])
assert sys.modules.get("torch") is None
sys.exit(code)
"""
    tree = {"w": np.ones(3, np.float32)}
    if suffix == ".safetensors":
        tree["h"] = np.ones(3, ml_dtypes.bfloat16)
    for name in "ab":
        save(f"{name}{suffix}", tree)

    def run(hidden):
        return subprocess.run(
            [sys.executable, "-c", code.format(hidden=hidden, suffix=suffix)],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRON,
        )

    for hidden in ([], ["torch"]):
        done = run(hidden)
        assert (done.returncode, done.stderr) == (0, "")
    done = run(["torch", "ml_dtypes"])
    if suffix == ".safetensors":
        assert done.returncode == 2
        assert (
            done.stderr == "funcavg mean: leaf 'h' is bfloat16, which needs ml_dtypes or torch: pip install ml_dtypes\n"
        )
    else:
        assert done.returncode == 0


@pytest.mark.parametrize(
    ("library", "args"), [("safetensors", "a.safetensors --output o.npz"), ("torch", "a.npz --output o.pt")]
)
def test_a_library_that_is_not_there(capsys, monkeypatch, library, args):
    save("a.npz", {"w": np.ones(3)})
    Path("a.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["mean", *args.split()]) == 2
    assert f"files need {library}: pip install {library}" in capsys.readouterr().err


GROWTH = """
import importlib, sys
from pathlib import Path
from funcavg.cli import main

def status(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

for library in sys.argv.pop(1).split():
    importlib.import_module(library)
Path("/proc/self/clear_refs").write_text("5")  # of the peak, which else is that of importing torch
before = status("VmRSS")
code = main(sys.argv[1:])
print(status("VmHWM") - before)
sys.exit(code)
"""


def growth(libraries, *args):
    """Return by how much resident memory grows at most while a command runs, mapped pages included, in MB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, libraries, "mean", *args],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRON,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1]) / 1e3


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
@pytest.mark.parametrize(
    ("suffix", "out", "models"),
    [
        (".safetensors", "out.safetensors", 0),
        (".safetensors", "out.pt", 1),
        (".pt", "out.pt", 1),
        (".pt", "out.safetensors", 0),
        ("-transposed.pt", "out.npz", 1),  # a part of such a leaf takes all its pages, of one file at a time
        ("-small.npz", "out.npz", 0),
    ],
)
def test_memory_is_that_of_one_model(suffix, out, models):
    """40 files of 20 MB: sixty MB beside the model, and nothing for each file."""
    if suffix != "-small.npz":
        need("torch", "safetensors")
    generator = np.random.default_rng(0)
    arrays = {"w": generator.standard_normal((1500, 2500), np.float32), "v": np.ones((2500, 500), np.float32)}
    if "transposed" in suffix:
        arrays = {name: torch.as_tensor(array).T for name, array in arrays.items()}
    names = [save(f"0{suffix}", arrays)]
    for number in range(1, 40):
        os.link(names[0], f"{number}{suffix}")
        names.append(f"{number}{suffix}")
    grown = growth("torch" if ".pt" in suffix + out else "numpy", *names, "--output", out)
    assert 20 * models - 5 < grown < 20 * models + 60


class Terminal:
    """A stream that remembers, and is a terminal."""

    def __init__(self):
        self.said = ""

    def write(self, text):
        self.said += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    names = [save(f"{number}.npz", {"w": np.ones(1000)}) for number in range(2)]
    monkeypatch.setattr(sys, "stderr", Terminal())
    succeed(capsys, *names, "--output", "out.npz")
    assert "/16.0k " in sys.stderr.said
    assert "B/s" in sys.stderr.said


def test_bench_reads_the_same_files():
    need("torch")
    torch.save(
        {"model": {"w": torch.ones(3, 2), "n": torch.ones(2, dtype=torch.int32)}, "optimizer": torch.ones(9)}, "a.ckpt"
    )
    assert trees.read("a.ckpt") == ("a.ckpt", {"w": ("float32", (3, 2))}, 1)
    np.savez_compressed("a.npz", w=np.asfortranarray(np.ones((3, 2), np.float16)))
    assert trees.read("a.npz") == ("a.npz", {"w": ("float16", (3, 2))}, 0)
    assert trees.open_file is reading.open_file is mean.open_file

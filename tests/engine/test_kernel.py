"""The kernel in C: the bits of the other one, at any address, in any mode; and when it is loaded."""

import copy
import os
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import torch
from helpers.kernels import LEVELS, PYTHON, assert_sanitizers_find_nothing, library_or_skip, using
from helpers.trees import limits_of, numpy_dtype
from hypothesis import given, settings
from hypothesis import strategies as st

import funcavg
from funcavg._engine import engine, kernel
from funcavg._engine.kernel import DTYPES, choose, library
from funcavg._engine.mean import Means, Sums, mean_into, scaled
from funcavg.testing import run_ranks

ROOT = Path(kernel.__file__).resolve().parents[2]
FOLDER = Path(kernel.__file__).parent
SOURCES = sorted(FOLDER.glob("*.[ch]"))
FLAGS = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
PAIRS = [(element, element) for element in DTYPES] + [
    *(("float16", "float32"), ("bfloat16", "float32"), ("float32", "float16"), ("float32", "bfloat16"))
]
examples = settings(max_examples=150, deadline=None, derandomize=True)


def codes(memory, element):
    """Return an element's bits, those of every NaN alike."""
    array = memory.view(numpy_dtype(element))
    numbers = memory.view(f"u{array.itemsize}").copy()
    numbers[array != array] = 0
    return numbers


def mean_of(found, level, shards, weights, element, into="", *, out=None, offset=0):
    """Run a kernel on copies of shards, at addresses that are off by some bytes; return what it wrote, twice."""
    into = into or element
    nbytes = len(shards[0]) // numpy_dtype(element).itemsize * numpy_dtype(into).itemsize
    moved = [shifted(shard, offset) for shard in shards]
    written = moved[out] if out is not None else shifted(np.zeros(nbytes, np.uint8), offset)
    also = shifted(np.zeros(nbytes, np.uint8), offset)
    with using(found, level):
        mean_into(written, moved, weights, element, into, also)
    assert written.tobytes() == also.tobytes()
    for k, (shard, before) in enumerate(zip(moved, shards, strict=True)):
        assert k == out or shard.tobytes() == before.tobytes()
    return codes(written.copy(), into)


def shifted(memory, offset):
    room = np.zeros(len(memory) + 64, np.uint8)
    begin = -room.__array_interface__["data"][0] % 32 + offset
    room[begin : begin + len(memory)] = memory
    return room[begin : begin + len(memory)]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.77]])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_every_half_with_64_others(element, size, weights, level):
    """All 65536 values of either half, with the special ones, neighbours of ties, and any others."""
    found = library_or_skip()
    limits = limits_of(numpy_dtype(element))
    special = [0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, limits.max, -limits.max, limits.smallest_normal]
    special += [limits.smallest_subnormal, -limits.smallest_subnormal, 1 + limits.eps, 1 - limits.eps / 2, 0.5, 3]
    others = np.array(special, numpy_dtype(element)).view(np.uint16)
    others = np.concatenate([others, np.random.default_rng(0).integers(0, 1 << 16, 48, np.uint16)])
    every = np.arange(1 << 16, dtype=np.uint16)
    for part in np.split(others, 8):
        columns = [np.repeat(every, 8), np.tile(part, 1 << 16), np.tile(np.roll(others, 5)[:8], 1 << 16)]
        shards = [column.view(np.uint8) for column in columns[:size]]
        given_weights = weights and weights[:size]
        expected = mean_of(None, None, shards, given_weights, element)
        np.testing.assert_array_equal(mean_of(found, level, shards, given_weights, element), expected)


KINDS = ["any bits", "ordinary", "equal", "zeros", "tiny", "largest", "some are largest", "NaN"]


def shards_of(kind, element, length, size, seed):
    """Return shards of any bits, or of numbers of which something is special."""
    dtype, rng = numpy_dtype(element), np.random.default_rng(seed)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    sign = np.array(1 << (8 * dtype.itemsize - 1), unsigned)
    any_bits = [rng.integers(0, 256, length * dtype.itemsize, np.uint8).view(unsigned) for _ in range(size)]
    if kind == "ordinary":
        return [rng.normal(size=length).astype(dtype).view(np.uint8) for _ in range(size)]
    if kind == "equal":
        return [any_bits[0].view(np.uint8)] * size
    if kind == "zeros":
        any_bits = [bits & sign for bits in any_bits]
    elif kind == "tiny":  # about as many are subnormal as are not
        any_bits = [bits & (sign | tiny_bits(element)) for bits in any_bits]
    elif kind in ("largest", "some are largest"):
        top = np.array([limits_of(dtype).max], dtype).view(unsigned)
        for bits in any_bits:
            largest = (top - rng.integers(0, 3, length).astype(unsigned)) | (bits & sign)
            bits[...] = np.where(rng.random(length) < 0.02, largest, bits) if kind != "largest" else largest
        if kind == "largest" and seed % 2:  # of one sign: all sums overflow
            any_bits = [bits & ~sign for bits in any_bits]
    elif kind == "NaN":  # whose last bits are set, too: rounding must not carry into the sign
        any_bits = [np.where(bits & 1, ~np.zeros_like(bits) ^ (bits & sign), bits) for bits in any_bits]
    return [bits.view(np.uint8) for bits in any_bits]


def tiny_bits(element):
    """Return the bits that subnormal numbers may have, and the lowest of an exponent."""
    dtype = numpy_dtype(element)
    return np.array([limits_of(dtype).smallest_normal], dtype).view(f"u{dtype.itemsize}")[0] * 2 - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_all_kinds_of_numbers(pair, size, kind):
    found, (element, into) = library_or_skip(), pair
    rng = np.random.default_rng(size)
    for seed in range(4):
        shards = shards_of(kind, element, 1100, size, seed)
        for weights in (None, list(rng.uniform(0.1, 1, size))):
            expected = mean_of(None, None, shards, weights, element, into)
            for level in LEVELS:
                got = mean_of(found, level, shards, weights, element, into)
                np.testing.assert_array_equal(got, expected)


drawn = st.builds(
    shards_of,
    st.shared(st.sampled_from(KINDS), key="kind"),
    st.shared(st.sampled_from(list(DTYPES)), key="element"),
    st.one_of(st.integers(1, 70), st.integers(1000, 1050), st.sampled_from([2048, 3001])),
    st.integers(1, 6),
    st.integers(0, 9999),
)
WEIGHTS = st.sampled_from([0.0, 1.0, 1.0, 0.3, 2.7, 1e-300, 5e-324, 1e300, np.finfo(float).max])


@examples
@given(element=st.shared(st.sampled_from(list(DTYPES)), key="element"), shards=drawn, data=st.data())
def test_any_weights_lengths_and_addresses(element, shards, data):
    found, size = library_or_skip(), len(shards)
    into = data.draw(st.sampled_from([into for one, into in PAIRS if one == element]))
    weights = data.draw(st.none() | st.lists(WEIGHTS, min_size=size, max_size=size).filter(any))
    expected = mean_of(None, None, shards, weights, element, into)
    out = data.draw(st.none() | st.integers(0, size - 1)) if element == into else None
    offset = data.draw(st.sampled_from([0, 0, 1, 2, 4, 8, 13]))
    for level in LEVELS:
        got = mean_of(found, level, shards, weights, element, into, out=out, offset=offset)
        np.testing.assert_array_equal(got, expected)


@examples
@given(element=st.shared(st.sampled_from(list(DTYPES)), key="element"), shards=drawn, data=st.data())
def test_one_after_another_too(element, shards, data):
    """Between two shards the sums may be copied, and go on apart."""
    found, size = library_or_skip(), len(shards)
    weights = data.draw(st.lists(WEIGHTS.filter(bool), min_size=size, max_size=size))
    scales = scaled(weights)
    results = []
    for which, level in [(None, None), *((found, level) for level in LEVELS)]:
        with using(which, level):
            sums, memory = Sums(element), np.empty_like(shards[0])
            for shard, scale in zip(shards, scales, strict=True):
                memory[...] = shard
                other = copy.deepcopy(sums)
                sums.add(memory, scale)
            sums.mean_into(memory, sum(scales))
            results.append(codes(memory, element))
            other.add(shards[-1].copy(), scales[-1])
            other.mean_into(memory, sum(scales))
            results.append(codes(memory.copy(), element))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_denormal_numbers_are_never_flushed(pair, level):
    """Whatever the thread's mode, which is as before afterwards."""
    found, (element, into) = library_or_skip(), pair
    for size, weights in [(2, None), (3, None), (3, [1.0, 0.5, 0.3])]:
        shards = shards_of("tiny", element, 1500, size, 0)
        expected = mean_of(found, level, shards, weights, element, into)
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush denormal numbers")
        try:
            got = mean_of(found, level, shards, weights, element, into)
            with using(found, level):
                sums = Sums(element)
                for shard, scale in zip(shards, weights or [1.0] * size, strict=True):
                    sums.add(shard, scale)
                memory = np.empty_like(shards[0])
                sums.mean_into(memory, sum(weights or [1.0] * size))
            flushed = float(torch.tensor([1e-40]) * 1.0) == 0.0
        finally:
            torch.set_flush_denormal(False)
        assert flushed
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(
            codes(memory, element), mean_of(found, level, shards, weights, element), strict=True
        )


def test_the_source_compiles_without_a_warning(tmp_path):
    for name in ("gcc", "clang"):
        if shutil.which(name):
            for source in FOLDER.glob("*.c"):
                command = [name, *FLAGS, "-O3", "-fno-trapping-math", "-c", "-o", tmp_path / "kernel.o", source]
                subprocess.run(command, check=True)
                subprocess.run([*command, "-O0"], check=True)
                if name == "gcc":
                    hasty = subprocess.run([*command, "-ffast-math"], capture_output=True, text=True, check=False)
                    assert "built with -ffast-math" in hasty.stderr
            break
    else:
        pytest.skip("no C compiler")


DRIVER = """
#include "kernel.c"
#include <stdlib.h>
int main(void)
{
    for (int from = 0; from < 4; from++) for (int into = 0; into < 4; into++)
    for (size_t length = 0; length < 2100; length += length < 40 ? 1 : 171)
    for (int count = 1; count < 4; count++) for (int weighted = 0; weighted < 2; weighted++)
    for (int level = 0; level <= funcavg_level(); level++) for (int odd = 0; odd < 2; odd++) {
        if (from != into && (from == FLOAT64 || into == FLOAT64 || (from != FLOAT32 && into != FLOAT32))) continue;
        double weights[] = {1.0, 0.5, 0.25};
        struct means means = {count, weighted ? weights : NULL, 3.0, from, into, level};
        char *memory[3], *out = malloc(length * SIZES[into] + odd), *also = malloc(length * SIZES[into] + odd);
        const void *shards[3];
        for (int k = 0; k < 3; k++) { /* of exact lengths, at addresses that may be odd */
            memory[k] = malloc(length * SIZES[from] + odd);
            for (size_t i = 0; i < length * SIZES[from] + odd; i++) memory[k][i] = (char)(rand() >> 5);
            shards[k] = memory[k] + odd;
        }
        funcavg_mean(&means, shards, out + odd, odd ? NULL : also, length * SIZES[from]);
        double *total = malloc(length * sizeof(double)), *first = malloc(length * sizeof(double));
        uint8_t *flags = malloc(length);
        means.into = from;
        for (int k = 0; k < 3; k++)
            funcavg_add(&means, shards[k], weights[k], k == 0, total, first, flags, length * SIZES[from]);
        funcavg_write(&means, memory[0] + odd, 1.75, total, first, flags, length * SIZES[from]);
        free(total); free(first); free(flags); free(out); free(also);
        for (int k = 0; k < 3; k++) free(memory[k]);
    }
    return 0;
}
"""


def test_sanitizers_find_nothing(tmp_path):
    assert_sanitizers_find_nothing(tmp_path, DRIVER)


def test_the_library_is_of_this_source():
    """In a clone, `pip install -e .` builds it anew."""
    found = library_or_skip()
    assert [source.name for source in SOURCES] == ["kernel.c", "kernel.h", "wires.c"]
    assert found.source == zlib.crc32(b"".join(source.read_bytes() for source in SOURCES))


def test_a_library_of_another_source_is_not_used(tmp_path):
    library_or_skip()
    shutil.copy(kernel.LIBRARY, tmp_path)
    path = str(tmp_path / Path(kernel.LIBRARY).name)
    assert choose({}, path)[0] is not None  # there is nothing to compare it with
    for changed in SOURCES:
        for source in SOURCES:
            shutil.copy(source, tmp_path)
        assert choose({}, path)[0] is not None
        (tmp_path / changed.name).write_text(changed.read_text() + "/* changed */")
        found, which = choose({}, path)
        assert found is None
        assert "was built from another source than the one beside it" in which


# When it is loaded


def test_the_kernel_that_is_asked_for(tmp_path):
    for setting in ("off", "OFF"):
        assert choose({"FUNCAVG_KERNEL": setting}) == (None, f"NumPy and torch (FUNCAVG_KERNEL={setting})")
    for setting in ("on", "1", "none"):
        with pytest.raises(ValueError, match=f"FUNCAVG_KERNEL must be off or require, or not be set, got '{setting}'"):
            choose({"FUNCAVG_KERNEL": setting})
    found = library_or_skip()
    for setting in ("", "require"):
        again, which = choose({"FUNCAVG_KERNEL": setting})
        assert again is not None
        assert which == kernel.LEVELS[again.level]
        assert again.level == found.level


def test_without_the_library(tmp_path):
    missing, broken = tmp_path / "missing.so", tmp_path / "broken.so"
    broken.write_text("no library", encoding="utf-8")
    for path, why in [(missing, "not built when funcavg was installed"), (broken, "invalid ELF header|file too short")]:
        found, which = choose({}, str(path))
        assert found is None
        assert which.startswith(PYTHON + " (the C kernel ")
        with pytest.raises(RuntimeError, match=f"FUNCAVG_KERNEL=require, but the C kernel .*({why}).*C compiler"):
            choose({"FUNCAVG_KERNEL": "require"}, str(path))


@pytest.mark.parametrize(
    ("version", "why"), [(0, "interface 0, and this release"), (kernel.VERSION, "undefined symbol: funcavg_")]
)
def test_a_library_of_another_release(version, why, tmp_path):
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    other = tmp_path / "other.so"
    (tmp_path / "other.c").write_text(f"int funcavg_version(void) {{ return {version}; }}", encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", other, tmp_path / "other.c"], check=True)
    found, which = choose({}, str(other))
    assert found is None
    assert why in which


def test_it_is_loaded_when_it_is_needed():
    code = """
import sys, os, numpy as np, funcavg
from funcavg._engine import kernel
assert kernel._chosen.cache_info().currsize == 0
from funcavg._engine.mean import mean_into
x = np.zeros(8, np.uint8)
mean_into(x, [x, x], None, "float32")
print(kernel.kernel_in_use())
"""
    for setting in ("off", ""):
        environ = {**os.environ, "FUNCAVG_KERNEL": setting}
        said = subprocess.check_output([sys.executable, "-c", code], text=True, env=environ).strip()
        assert said == choose(environ)[1]


def test_what_it_does_not_know_is_left_to_numpy_and_torch():
    with using(library_or_skip()):
        assert library("longdouble") is library("float8_e5m2") is library("bfloat16", "float8_e5m2") is None
        assert library("bfloat16", "float32") is not None


def test_a_setting_that_is_wrong_on_one_rank_is_everyones_error(monkeypatch):
    rank_of_thread = threading.local()

    def kernel_of_rank():
        if rank_of_thread.rank == 1:
            choose({"FUNCAVG_KERNEL": "on"})

    def of_rank(group):
        rank_of_thread.rank = group.rank
        with pytest.raises(ValueError, match=r"rank 1.*must be off or require") as error:
            funcavg.average({"w": np.ones(3)}, group)
        return str(error.value)

    monkeypatch.setattr(engine, "kernel_in_use", kernel_of_rank)
    said = run_ranks(3, of_rank)
    assert said[0] == said[1] == said[2]


def test_shards_in_pieces_are_refused():
    means = Means("float32", 2)
    with pytest.raises((ValueError, RuntimeError), match="strides|contiguous"):
        means.operand(np.zeros(16, np.uint8)[::2])


def test_what_is_in_use_is_said():
    for setting, words in [("off", ["NumPy and torch (FUNCAVG_KERNEL=off)"]), ("", [*kernel.LEVELS, PYTHON])]:
        code = "from funcavg._engine.kernel import kernel_in_use; print(kernel_in_use())"
        environ = {**os.environ, "FUNCAVG_KERNEL": setting}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert any(done.stdout.strip().startswith(word) for word in words)

"""Wires in C: the bytes and bits of NumPy's, of any numbers in any pieces, at any address, in any mode."""

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from helpers.frameworks import torch
from helpers.kernels import LEVELS, assert_sanitizers_find_nothing, library_or_skip, using

from funcavg._engine import coders, kernel
from funcavg._engine.coders import coder_of
from funcavg.wires.codecs import NAMES, codec_of
from funcavg.wires.rotated import signs

FOLDER = Path(kernel.__file__).parent
LIMITS = [float(np.finfo(np.float32).max), 65504.0, 0.75]
EDGES = [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 600, 1023, 1024, 1025, 2048, 5000]
CUTS = [[length] for length in EDGES] + [
    [1] * 40,
    [40, 3, 1024, 1, 600, 256, 31, 32, 33, 5000, 7],
    [1024] * 5 + [64, 1024, 1025, 17],
    [int(n) for n in np.random.default_rng(0).integers(1, 1500, 20)],
]


def any_bits(rng, count):
    return rng.integers(0, 1 << 32, count, np.uint32).view(np.float32)


def any_number(rng, count):
    numbers = any_bits(rng, count)
    return np.where(np.isfinite(numbers), numbers, np.float32(1))


def any_scale(rng, count):
    """Numbers whose size changes from one to the next run of 700: from less than the smallest to the largest."""
    with np.errstate(over="ignore"):
        scales = np.exp2(np.repeat(rng.uniform(-152, 128, count // 700 + 1), 700)[:count])
        return np.clip(rng.normal(size=count) * scales, -LIMITS[0], LIMITS[0]).astype(np.float32)


def one_scale(power):
    return lambda rng, count: np.ldexp(rng.uniform(-1, 1, count).astype(np.float32), power)


def with_special(rng, count):
    """Numbers, of which a few are not, so that most blocks are sound."""
    numbers = rng.normal(size=count).astype(np.float32)
    some = rng.random(count) < 1 / 2000
    some[rng.integers(count)] = True
    return np.where(some, rng.choice(np.array([np.nan, -np.nan, np.inf, -np.inf, 3e38], np.float32), count), numbers)


def spikes(rng, count):
    """Little beside a few large numbers; of these some blocks have one."""
    numbers = rng.normal(size=count) * rng.choice([0, 1e-4], count)
    return np.where(rng.random(count) < rng.choice([1e-3, 1e-2]), rng.choice([-3.0, 1e4], count), numbers).astype(
        np.float32
    )


def rotate_into_spikes(rng, count):
    """The signs themselves, so that all of a block is one number once it has rotated."""
    row = np.concatenate([signs(mean=False), signs(mean=True)])
    return np.resize(row, count) * np.float32(rng.normal())


def ties(rng, count):
    """Halves of what is rounded to."""
    numbers = rng.integers(-254, 255, count).astype(np.float32) / 2
    numbers[::200] = 127
    return numbers


def rounded_ties(rng, count):
    """What lies between two bfloat16, and next to it."""
    return (
        (any_bits(rng, count).view(np.uint32) & 0xFFFF0000 | rng.choice([0x7FFF, 0x8000, 0x8001], count))
        .astype(np.uint32)
        .view(np.float32)
    )


KINDS = {
    "normal": lambda rng, count: rng.normal(size=count).astype(np.float32),
    "heavy": lambda rng, count: rng.standard_t(1.1, count).astype(np.float32),
    "any bits": any_bits,
    "any number": any_number,
    "any scale": any_scale,
    "largest": one_scale(128),
    "small": one_scale(-100),
    "about the smallest normal": one_scale(-118),
    "scales are denormal": one_scale(-124),
    "denormal": one_scale(-130),
    "smallest": one_scale(-146),
    "zeros": lambda rng, count: rng.choice(np.array([0.0, -0.0], np.float32), count),
    "almost zeros": lambda rng, count: np.where(rng.random(count) < 0.01, one_scale(0)(rng, count), np.float32(-0.0)),
    "equal": lambda rng, count: np.full(count, rng.normal(), np.float32),
    "signs": lambda rng, count: rng.choice(np.array([1, -1], np.float32), count),
    "special": with_special,
    "spikes": spikes,
    "rotate into spikes": rotate_into_spikes,
    "ties": ties,
    "between bfloat16": rounded_ties,
}


def pieces_of(lengths):
    ends = np.cumsum(lengths)
    return np.stack([ends - lengths, lengths], axis=1)


def shifted(values, offset):
    """Return a copy, at an address that is off by some bytes."""
    room = np.zeros(values.nbytes + 64 + offset, np.uint8)
    begin = -room.__array_interface__["data"][0] % 64 + offset
    moved = room[begin : begin + values.nbytes].view(values.dtype)
    moved[:] = values
    return moved


def coder_in_c(name, pieces, level=None):
    with using(library_or_skip(), level):
        coder = coder_of(codec_of(name), pieces)
    assert type(coder) is coders._InC
    return coder


def encoded(coder, row, *, mean, offset=0):
    """Return the code, and check that nothing is written beside it."""
    code = shifted(np.full(coder.width + 8, 0xAB, np.uint8), offset)
    before = row.tobytes()
    coder.encode(row, code, mean=mean)
    assert (code[coder.width :] == 0xAB).all()
    assert row.tobytes() == before
    return code[: coder.width].copy()


def decoded(coder, code, limit, *, mean, offset=0):
    """Return the numbers' bits, and check that nothing is written beside them."""
    row = shifted(np.full(coder.length + 3, 7.5, np.float32), offset)
    coder.decode(code, row, limit, mean=mean)
    assert (row[coder.length :] == 7.5).all()
    return row[: coder.length].copy().view(np.uint32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_all_kinds_of_numbers_in_all_pieces(name, kind):
    rng = np.random.default_rng([len(name), *kind.encode()])
    for k, lengths in enumerate(CUTS):
        pieces, mean, limit = pieces_of(lengths), bool(k % 2), LIMITS[k % 3]
        row, numpys = KINDS[kind](rng, sum(lengths)), codec_of(name).coder(pieces)
        code = encoded(numpys, row, mean=mean)
        numbers = decoded(numpys, code, limit, mean=mean)
        for level in LEVELS:
            coder = coder_in_c(name, pieces, level)
            assert (coder.width, coder.length) == (numpys.width, numpys.length)
            for offset in (0, 1, 4, 13)[k % 4 :: 2]:
                np.testing.assert_array_equal(encoded(coder, shifted(row, offset), mean=mean, offset=offset), code)
                got = decoded(coder, shifted(code, offset), limit, mean=mean, offset=offset)
                np.testing.assert_array_equal(got, numbers)


@pytest.mark.parametrize("name", NAMES)
def test_codes_that_nobody_has_written(name):
    """Any scales: negative, infinite, NaN; any integers."""
    rng = np.random.default_rng(1)
    for lengths in [[20], [256] * 40, [64, 100, 200, 400, 800, 1024] * 4, [33, 31, 1024, 1, 255]]:
        pieces = pieces_of(lengths)
        numpys = codec_of(name).coder(pieces)
        for limit in LIMITS:
            code = rng.integers(0, 256, numpys.width, np.uint8)
            expected = codes(decoded(numpys, code, limit, mean=True))
            for level in LEVELS:
                got = decoded(coder_in_c(name, pieces, level), code, limit, mean=True)
                np.testing.assert_array_equal(codes(got), expected)


def codes(bits):
    """Return bits, those of every NaN alike: of infinity times 0, C does not say which it is."""
    return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FC00000), bits)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, -1e-45, 1e-39, 1e-38, np.nan, -np.nan, np.inf, 3e38, 1.0, -1.0])
@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
def test_special_scales(name, scale):
    """All integers by each of them."""
    pieces = pieces_of([256, 1024, 64, 20])
    numpys = codec_of(name).coder(pieces)
    code = np.random.default_rng(2).integers(0, 256, numpys.width, np.uint8)
    begins = np.concatenate([kind.codes for kind in numpys._kinds])
    for begin in begins:
        code[begin : begin + 4] = np.array([scale], np.float32).view(np.uint8)
    expected = codes(decoded(numpys, code, LIMITS[0], mean=False))
    for level in LEVELS:
        got = decoded(coder_in_c(name, pieces, level), code, LIMITS[0], mean=False)
        np.testing.assert_array_equal(codes(got), expected)


@pytest.mark.parametrize("kind", ["any scale", "scales are denormal", "denormal", "smallest", "normal"])
@pytest.mark.parametrize("name", NAMES)
def test_denormal_numbers_are_never_flushed(name, kind):
    """Whatever the thread's mode, which is as before afterwards. NumPy decodes to the same bits in it."""
    pieces = pieces_of([5000, 20, 600])
    row, numpys = KINDS[kind](np.random.default_rng(3), 5620), codec_of(name).coder(pieces)
    code = encoded(numpys, row, mean=True)
    numbers = decoded(numpys, code, LIMITS[0], mean=True)
    written = [coder_in_c(name, pieces, level) for level in LEVELS]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        again = [encoded(coder, row, mean=True) for coder in written]
        read = [decoded(coder, code, LIMITS[0], mean=True) for coder in [numpys, *written]]
        flushed = float(torch.tensor([1e-40]) * 1.0) == 0.0
    finally:
        torch.set_flush_denormal(False)
    assert flushed
    for got in again:
        np.testing.assert_array_equal(got, code)
    for got in read:
        np.testing.assert_array_equal(got, numbers)


@pytest.mark.parametrize("name", NAMES)
def test_threads_at_once(name):
    """What one works with is no other's."""
    pieces, rows = pieces_of([5000, 64, 3000]), np.random.default_rng(4).normal(size=(2, 8064)).astype(np.float32)
    numpys, coder = codec_of(name).coder(pieces), coder_in_c(name, pieces)
    expected = [encoded(numpys, row, mean=False) for row in rows]
    numbers = [decoded(numpys, code, LIMITS[0], mean=False) for code in expected]
    right, together = [[], []], threading.Barrier(2)

    def work(k):
        together.wait()
        for _ in range(200):
            code = encoded(coder, rows[k], mean=False)
            same = np.array_equal(code, expected[k])
            right[k].append(same and np.array_equal(decoded(coder, code, LIMITS[0], mean=False), numbers[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [[True] * 200] * 2


# Who writes


class Halves:
    name = "halves"

    def encode(self, numbers):
        return numbers.astype(np.float16).view(np.uint8)

    def decode(self, code, length):
        return code.view(np.float16).astype(np.float32)


def test_what_c_does_not_know_or_is_not_there_for_is_numpys():
    pieces = pieces_of([100])
    with using(library_or_skip()):
        assert type(coder_of(codec_of(Halves()), pieces)).__module__ == "funcavg.wires.codecs"
    with using(None):
        for name in NAMES:
            assert type(coder_of(codec_of(name), pieces)) is type(codec_of(name).coder(pieces))


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_c_must_not_use_is_refused(name):
    coder = coder_in_c(name, pieces_of([100, 50]))
    row, code = np.zeros(150, np.float32), np.zeros(coder.width, np.uint8)
    fixed_row, fixed_code = row.copy(), code.copy()
    fixed_row.flags.writeable = fixed_code.flags.writeable = False
    coder.encode(fixed_row, code, mean=False)
    coder.decode(fixed_code, row, 1.0, mean=False)
    bad_rows = [
        row[:-1],
        np.zeros(300, np.float32)[::2],
        row.astype(np.float64),
        row.reshape(1, 150),
        row.view(np.int32),
    ]
    bad_codes = [code[:-1], np.zeros(2 * coder.width, np.uint8)[::2], code.view(np.int8), code.reshape(1, -1)]
    bad_rows.append(np.zeros((150, 0), np.float32))  # as long, and no memory
    bad_codes.append(np.zeros((coder.width, 0), np.uint8))
    for bad in bad_rows:
        with pytest.raises(ValueError, match="a row must have 150 float32, got writable|must lie in one piece"):
            coder.encode(bad, code, mean=False)
    for bad in [*bad_rows, fixed_row]:
        with pytest.raises(ValueError, match="a row must have 150 float32, got|must lie in one piece"):
            coder.decode(code, bad, 1.0, mean=False)
    for bad in bad_codes:
        with pytest.raises(
            ValueError, match=f"a row must have {coder.width} uint8, got writable|must lie in one piece"
        ):
            coder.decode(bad, row, 1.0, mean=False)
    for bad in [*bad_codes, fixed_code]:
        with pytest.raises(ValueError, match=f"a row must have {coder.width} uint8, got|must lie in one piece"):
            coder.encode(row, bad, mean=False)


def test_pieces_are_copied_and_lie_in_their_row():
    pieces = pieces_of([100, 50])
    coder, other = coder_in_c("int8", pieces), coder_in_c("int8", np.asfortranarray(pieces))
    row = np.random.default_rng(5).normal(size=150).astype(np.float32)
    expected = encoded(coder, row, mean=False)
    pieces[:] = 0
    np.testing.assert_array_equal(encoded(coder, row, mean=False), expected)
    np.testing.assert_array_equal(encoded(other, row, mean=False), expected)
    for bad in ([[-4, 10]], [[0, 10], [10, -5]]):
        with pytest.raises(ValueError, match="pieces must"):
            coder_in_c("int8", np.array(bad))


def test_coders_keep_what_c_reads():
    """Two threads that make the first coders at once have a table each, of which the cache keeps one."""
    row = np.random.default_rng(6).normal(size=2048).astype(np.float32)
    coders._masks.cache_clear()
    coder = coder_in_c("int4", pieces_of([2048]))
    expected = encoded(coder, row, mean=False)
    table = weakref.ref(coders._masks())
    coders._masks.cache_clear()
    gc.collect()
    assert table() is not None
    np.testing.assert_array_equal(encoded(coder, row, mean=False), expected)


DRIVER = """
#include "wires.c"
#include <stdlib.h>
extern int32_t funcavg_level(void);
int main(void)
{
    uint32_t signs[2 * LARGEST];
    for (int k = 0; k < 2 * LARGEST; k++) signs[k] = k % 3 ? 0 : 0x80000000;
    for (int bits = 2; bits <= 16; bits *= 2)
    for (int64_t length = 1; length < 3200; length += length < 70 ? 1 : 331)
    for (int level = 0; level <= funcavg_level(); level++) for (int odd = 0; odd < 2; odd++) {
        struct wire wire = {
            bits, level, signs, {.26, .52, .8, 1.1, 1.4, 1.8, 2.4}, {39, 116, 197, 283, 377, 485, 621, 820}
        };
        int64_t pieces[4] = {0, length, length, 40};
        size_t width = bits == 16 ? 2 * 40 : next(bits, 40).width;
        if (bits == 16) width += 2 * (size_t)length;
        for (size_t left = (size_t)length; bits < 16 && left > 0; left -= next(bits, left).length)
            width += next(bits, left).width;
        size_t nbytes = 4 * (size_t)(length + 40); /* of exact lengths, at addresses that may be odd */
        char *numbers = malloc(nbytes + odd), *code = malloc(width + odd);
        for (int kind = 0; kind < 4; kind++) {
            for (size_t i = 0; i < nbytes / 4; i++) {
                uint32_t u = (uint32_t)rand() << 9 ^ (uint32_t)rand();
                float x = (float)(u >> 8) * (kind == 1 ? 1e-45f : 1e30f);
                memcpy(numbers + odd + 4 * i, kind ? (void *)&x : (void *)&u, 4);
            }
            if (kind < 3) funcavg_encode(&wire, pieces, 2, numbers + odd, code + odd, kind == 2);
            else for (size_t i = 0; i < width; i++) code[odd + i] = (char)(rand() >> 5);
            funcavg_decode(&wire, pieces, 2, code + odd, numbers + odd, kind == 2, 3e38f);
        }
        free(numbers); free(code);
    }
    return 0;
}
"""


def test_sanitizers_find_nothing(tmp_path):
    assert_sanitizers_find_nothing(tmp_path, DRIVER, "-fno-math-errno", FOLDER / "kernel.c")

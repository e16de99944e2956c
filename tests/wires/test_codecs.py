"""What a wire writes, number by number: against slow references in whole numbers, and what must hold of each block."""

import math
import threading
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from helpers.frameworks import torch

from funcavg.wires.codecs import BITS, NAMES, codec_of
from funcavg.wires.rotated import CENTROIDS, signs, thresholds

FLOAT = np.finfo(np.float32)
BLOCK = 1024
SPREAD = {"int8": 256, "int4": 1024, "int2": 1024}  # numbers in a block
NMSE = {"bfloat16": 3e-6, "int8": 5e-5, "int4": 9.8e-3, "int2": 0.136}  # of one encoding, Gauss


def through(wire, numbers, *pieces, mean=False, limit=float(FLOAT.max)):
    """Encode and decode a row, cut into pieces of these lengths; return it, and how long the code is."""
    numbers = np.asarray(numbers, np.float32)
    lengths = pieces or (len(numbers),)
    begins = np.cumsum(lengths) - lengths
    coder = codec_of(wire).coder(np.stack([begins, lengths], axis=1).astype(np.int64))
    code, result = np.full(coder.width, 0xAA, np.uint8), np.full(len(numbers), 7, np.float32)
    coder.encode(numbers, code, mean=mean)
    coder.decode(code, result, limit, mean=mean)
    return result, coder.width


def nmse(result, numbers):
    scale = float(np.abs(numbers).max())
    result, numbers = np.asarray(result, np.float64) / scale, np.asarray(numbers, np.float64) / scale
    return ((result - numbers) ** 2).sum() / (numbers**2).sum()


def gauss(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def rows_of_t3(seed=0, rows=256):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, (rows, BLOCK)) * np.exp(rng.normal(0, 1, (rows, 1)))).astype(np.float32).ravel()


@pytest.mark.parametrize("wire", NAMES)
@pytest.mark.parametrize("scale", [1e-38, 1e-37, 1e-34, 1e-30, 1e-18, 1.0, 1e18, 1e30, 3e37])
def test_the_error_is_that_of_the_table_whatever_the_scale(wire, scale):
    numbers = (gauss(1 << 16).astype(np.float64) * scale).astype(np.float32)
    allowed = NMSE[wire] if scale > 1e-37 or wire != "bfloat16" else 1e-5  # few digits are left of a denormal bfloat16
    assert nmse(through(wire, numbers)[0], numbers) <= allowed


@pytest.mark.parametrize(("wire", "least", "most"), [("int8", 2e-4, 4e-4), ("int4", 9e-3, 1e-2), ("int2", 0.12, 0.14)])
def test_rows_of_other_scales_and_heavy_tails_cost_little(wire, least, most):
    numbers = rows_of_t3()
    assert least <= nmse(through(wire, numbers)[0], numbers) <= most


# A rotated block, in Python's own whole numbers


def hadamard(values):
    """Return the transform of a list of integers, by its definition."""
    values = list(values)
    h = 1
    while h < len(values):
        for i in range(0, len(values), 2 * h):
            for j in range(i, i + h):
                values[j], values[j + h] = values[j] + values[j + h], values[j] - values[j + h]
        h *= 2
    return values


def rotated(numbers, bits, *, mean=False):
    """Return the decoded block, as wires are described: exact but for thresholds and scale."""
    size, flips = len(numbers), signs(mean=mean)
    exponent = math.frexp(max(abs(float(x)) for x in numbers))[1]
    whole = [round(Fraction(float(x)) * Fraction(2) ** (13 - exponent)) for x in numbers]  # ties to even
    spread = hadamard(v * int(s) for v, s in zip(whole, flips, strict=False))
    energy = sum(r * r for r in spread)
    rms = math.sqrt(energy / size)
    levels, middles = CENTROIDS[bits], [m * rms for m in thresholds(bits)]
    near = [(-1 if r < 0 else 1) * levels[sum(abs(r) > m for m in middles)] for r in spread]
    product, length = sum(r * q for r, q in zip(spread, near, strict=True)), sum(q * q for q in near)
    factor = energy / product
    if factor * factor * length > 2 * energy:
        factor = product / length
    scale = np.float32(math.ldexp(factor, exponent - 13) / size)
    return np.array([np.float32(h) * scale * s for h, s in zip(hadamard(near), flips, strict=False)], np.float32)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("size", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize("kind", ["gauss", "spike", "equal", "small", "heavy"])
@pytest.mark.parametrize("mean", [False, True])
def test_a_rotated_block_is_what_whole_numbers_say(bits, size, kind, mean):
    numbers = {
        "gauss": gauss(size),
        "spike": np.eye(1, size, 5, dtype=np.float32)[0] * 3,
        "equal": np.full(size, -0.3, np.float32),
        "small": gauss(size) * np.float32(1e-30),
        "heavy": rows_of_t3(rows=1)[:size],
    }[kind]
    expected = rotated(numbers, bits, mean=mean)
    result, width = through(f"int{bits}", numbers, mean=mean)
    assert width == 4 + size * bits // 8
    assert result.tobytes() == expected.tobytes()


def test_centroids_are_lloyds_and_maxs_for_a_normal_distribution():
    """Each is the mean of what is nearest to it, up to its rounding to whole numbers of a 300th."""
    for levels in CENTROIDS.values():
        cuts = [0.0, *((one + other) / 600 for one, other in pairwise(levels)), 40.0]
        density = [math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in cuts]
        below = [(1 + math.erf(x / math.sqrt(2))) / 2 for x in cuts]
        for k, level in enumerate(levels):
            centre = (density[k] - density[k + 1]) / (below[k + 1] - below[k])
            assert abs(300 * centre - level) <= 2


@pytest.mark.parametrize("wire", ["int4", "int2"])
def test_rotated_blocks_are_unbiased(wire):
    """<Q(x), x> is ‖x‖², for each block."""
    numbers = rows_of_t3(rows=64)
    result = through(wire, numbers)[0].astype(np.float64).reshape(-1, BLOCK)
    blocks = numbers.astype(np.float64).reshape(-1, BLOCK)
    assert (result * blocks).sum(1) == pytest.approx((blocks**2).sum(1), rel=1e-3)  # V is rounded


@pytest.mark.parametrize("wire", ["int4", "int2"])
def test_a_spike_is_not_blown_up(wire):
    """Rotated, it is ±1 everywhere: an unbiased scale would be exact, but one beside noise would not."""
    worst = 0.0
    for seed in range(50):
        numbers = gauss(BLOCK, seed) * np.float32(10.0 ** -(seed % 7))
        numbers[seed] += 30
        worst = max(worst, nmse(through(wire, numbers)[0], numbers))
    assert worst <= 1.0  # 92 without a bound on the scale


def test_a_block_that_rotates_into_one_spike_is_not_blown_up():
    for wire, most in (("int4", 0.9), ("int2", 0.99)):
        numbers = signs(mean=False).copy()  # times the signs it is all ones: H makes it one number, and zeros
        assert nmse(through(wire, numbers)[0], numbers) <= most


def test_two_vectors_of_signs():
    """With one for rows and means, the second error undoes a part of the first, and equal inputs shrink by 3 %."""
    numbers = gauss(1 << 18)

    def shrinks_by(second):
        once = through("int2", numbers)[0]  # of the other rank, which has the same
        twice = through("int2", (numbers + once) / 2, mean=second)[0].astype(np.float64)
        return 1 - twice @ numbers / (numbers.astype(np.float64) @ numbers)

    assert abs(shrinks_by(True)) <= 0.003
    assert shrinks_by(False) >= 0.02
    assert abs((signs(mean=True) * signs(mean=False)).mean()) <= 0.1


# Short pieces, and leaves


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 255, 256, 257, 600, 1023, 1024, 1025, 5000])
def test_how_long_a_code_is(wire, length):
    """A tail is one block of the power of two that it needs, 64 to 1024; fewer than 32 numbers go as int8."""
    numbers = gauss(length)
    result, width = through(wire, numbers)
    block, bits = SPREAD[wire], BITS[wire]
    whole, tail = divmod(length, block)
    if wire == "int8" or tail < 32:
        rest = 4 + tail * (tail > 1) if tail else 0  # one number is its scale
    else:
        rest = 4 + max(64, 1 << (tail - 1).bit_length()) * bits // 8
    assert width == whole * (4 + block * bits // 8) + rest
    assert nmse(result, numbers) <= {"int8": 1e-4, "int4": 0.03, "int2": 0.3}[wire]


@pytest.mark.parametrize("wire", NAMES)
def test_no_block_holds_numbers_of_two_leaves(wire):
    """What one leaf holds has no say in another's bits."""
    lengths = [700, 3, 64, 1, 1500, 40, 256]
    leaves = [gauss(n, seed) for seed, n in enumerate(lengths)]
    whole, _ = through(wire, np.concatenate(leaves), *lengths)
    for k in range(len(leaves)):
        others = [leaf if i == k else leaf * np.float32(1e6) for i, leaf in enumerate(leaves)]
        begin = sum(lengths[:k])
        changed = through(wire, np.concatenate(others), *lengths)[0][begin : begin + lengths[k]]
        assert changed.tobytes() == whole[begin : begin + lengths[k]].tobytes()
        assert changed.tobytes() == through(wire, leaves[k])[0].tobytes()


# Numbers that are none, zeros, the largest and the smallest


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_number_that_is_none_comes_back_as_nan_as_a_whole(wire, bad):
    block = SPREAD[wire]
    numbers = gauss(4 * block + 40)
    clean = through(wire, numbers)[0]
    for place in (block + 7, 4 * block + 39):
        spoilt = numbers.copy()
        spoilt[place] = bad
        result = through(wire, spoilt)[0]
        begin = place // block * block
        inside = slice(begin, min(begin + block, len(numbers)))
        assert (result[inside].view(np.uint32) == 0x7FC00000).all()
        result[inside] = clean[inside]
        assert result.tobytes() == clean.tobytes()


def test_bfloat16_keeps_what_is_no_number_where_it_is():
    numbers = gauss(1000)
    clean = through("bfloat16", numbers)[0]
    numbers[[3, 500, 999]] = np.nan, np.inf, -np.inf
    result = through("bfloat16", numbers)[0]
    assert np.isnan(result[3])
    assert result[[500, 999]].tolist() == [np.inf, -np.inf]
    assert np.delete(result, [3, 500, 999]).tobytes() == np.delete(clean, [3, 500, 999]).tobytes()
    odd = np.array([0x7F800001, 0xFFFFFFFF, 0x7FFF8000], np.uint32).view(np.float32)  # rounding would lose these
    assert np.isnan(through("bfloat16", odd)[0]).all()


def test_bfloat16_is_rounded_as_torch_rounds_it():
    numbers = np.random.default_rng(0).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    numbers = numbers[np.abs(numbers) <= 255 * 2.0**120]  # what is larger becomes that, and not infinite
    assert through("bfloat16", numbers)[0].tobytes() == torch.from_numpy(numbers).bfloat16().float().numpy().tobytes()


@pytest.mark.parametrize("wire", NAMES)
def test_zeros_come_back_as_zeros(wire):
    numbers = gauss(3000)
    numbers[1024:2048] = 0
    numbers[1500:1600] = -0.0
    result = through(wire, numbers)[0]
    assert (result[1024:2048] == 0).all()
    if wire != "bfloat16":
        assert not result[1024:2048].view(np.uint32).any()  # not even signs


@pytest.mark.parametrize(
    ("wire", "limit"), [(w, m) for w in NAMES for m in (float(FLOAT.max), 65504.0) if m > 65504 or w != "bfloat16"]
)
def test_what_is_finite_comes_back_finite(wire, limit):
    """An error upwards of the largest number must not make it infinite."""
    for seed in range(20):
        numbers = np.clip(gauss(2000, seed), -1, 1) * np.float32(limit)
        result = through(wire, numbers, limit=limit)[0]
        assert np.abs(result).max() <= limit


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
def test_denormal_numbers_and_a_thread_that_flushes_them(wire):
    """A decoded row must have the same bits on all ranks, also on one whose threads flush denormal numbers."""
    numbers = np.concatenate([gauss(2000) * np.float32(s) for s in (1e-36, 1e-38, 1e-40, 1e-43)])
    pieces = np.array([[0, len(numbers)]])
    coder = codec_of(wire).coder(pieces)
    code = np.empty(coder.width, np.uint8)
    coder.encode(numbers, code, mean=False)
    results, flushes = [], []

    def decode(flush):
        if flush:
            flushes.append(torch.set_flush_denormal(True))
        result = np.empty(len(numbers), np.float32)
        coder.decode(code, result, float(FLOAT.max), mean=False)
        results.append(result)
        coder.encode(numbers, code.copy(), mean=False)  # must not fail

    for flush in (False, True):
        thread = threading.Thread(target=decode, args=[flush])
        thread.start()
        thread.join()
    if not flushes[0]:
        pytest.skip("this processor cannot flush denormal numbers")
    tiny = np.abs(results[0]) < FLOAT.tiny
    assert (results[0].view(np.uint32)[tiny] != 0).any()
    assert results[0].tobytes() == results[1].tobytes()


def test_a_scale_is_never_inverted():
    """1 / s is infinite for s below 3e-39: x / s is not."""
    numbers = np.array([1e-38, -1e-38, 5e-39, 1e-41], np.float32)
    assert through("int8", numbers)[0] == pytest.approx(numbers, rel=0.01, abs=1e-40)

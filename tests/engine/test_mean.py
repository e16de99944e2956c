"""The kernel: every dtype, rounded once."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from helpers.frameworks import skip_without, torch
from helpers.kernels import each_kernel, using
from helpers.trees import GPU, NUMPY_FLOATS, TORCH_FLOATS, assert_is_mean, bits, build, limits_of, numpy_dtype
from helpers.trees import Spec as S

from funcavg._engine import arithmetic, mean
from funcavg._engine.mean import Means, Sums, mean_into, scaled, tensor_mean_into

ELEMENTS = sorted({*NUMPY_FLOATS, *TORCH_FLOATS})
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
on_both = pytest.mark.usefixtures(each_kernel.__name__)
SMALL = [name for name in ELEMENTS if name != "longdouble" and numpy_dtype(name).itemsize == 1]


def kernel(arrays, weights=None, into=None):
    """Run the kernel on typed arrays; ``into`` names the shard that the mean replaces."""
    dtype = arrays[0].dtype
    shards = [np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy() for array in arrays]
    out = np.empty_like(shards[0]) if into is None else shards[into]
    mean_into(out, shards, weights, "longdouble" if dtype.type is np.longdouble else dtype.name)
    return out.view(dtype)


@on_both
@pytest.mark.parametrize("values", ["ordinary", "subnormal", "huge", "wide", "special"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("element", ELEMENTS)
def test_keeps_the_bound(element, size, values):
    arrays = [build(S("numpy", element, (40,), values=values), rank) for rank in range(size)]
    assert_is_mean(kernel(arrays), arrays)
    weights = [1.5 * rank for rank in range(size)] if size > 1 else [0.3]
    if values != "huge":
        assert_is_mean(kernel(arrays, weights), arrays, weights)


@on_both
@pytest.mark.parametrize("into", [0, 1, 2])
@pytest.mark.parametrize("element", ELEMENTS)
def test_may_replace_any_shard(element, into):
    """Huge values too: the sums are then taken a second time, from shards that must still be there."""
    for size in {2, 3} - {into}:
        if into < size:
            for values in ("ordinary", "huge"):
                arrays = [build(S("numpy", element, (40,), values=values), rank) for rank in range(size)]
                np.testing.assert_array_equal(kernel(arrays, into=into), kernel(arrays))


@on_both
@pytest.mark.parametrize("element", SMALL)
def test_every_pair_of_bytes(element):
    """All 65536 pairs of an 8-bit dtype and narrower: rounded once, never twice."""
    codes = np.arange(256, dtype=np.uint8)
    one, other = (pair.reshape(-1).view(numpy_dtype(element)) for pair in np.meshgrid(codes, codes))
    with np.errstate(all="ignore"):
        exact = (one.astype(np.float64) + other.astype(np.float64)) / 2
    np.testing.assert_array_equal(kernel([one, other]).astype(np.float64), exact.astype(one.dtype).astype(np.float64))


@on_both
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
def test_means_near_a_tie_are_rounded_once(element):
    """Means a hair off the middle between two neighbours: in float32, on the way, the hair is lost."""
    dtype = numpy_dtype(element)
    eps, hair = float(ml_dtypes.finfo(dtype).eps), 2.0**-24 if element == "float16" else 2.0**-40
    for halves, side, steps in [(1, 1, 1), (3, -1, 1), (1, -1, 0), (3, 1, 2)]:  # from 1, in eps
        arrays = [np.array([number], dtype) for number in (2, 2, 2 * halves * eps, side * hair)]
        assert kernel(arrays)[0] == 1 + steps * eps


@on_both
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_shards_come_back(element, size):
    for values in ("ordinary", "subnormal", "huge"):
        array = build(S("numpy", element, (200,), values=values), 0)
        for weights in (None, [0.1 + rank for rank in range(size)]):
            assert bits(kernel([array] * size, weights)) == bits(array)


@on_both
def test_weights_of_any_magnitude():
    arrays = [np.array([1.0, 2.0, 1e300]), np.array([3.0, 4.0, 1e300]), np.full(3, np.nan)]
    for scale in (1.0, 1e-310, 1e300, np.finfo(float).max):
        np.testing.assert_allclose(kernel(arrays, [scale, scale / 3, 0.0]), [1.5, 2.5, 1e300], rtol=1e-13)


@on_both
def test_blocks_do_not_show(monkeypatch):
    arrays = [build(S("numpy", name, (13,), values="wide"), rank) for name in ("float32",) for rank in range(3)]
    whole = kernel(arrays)
    monkeypatch.setattr(mean, "BLOCK", 4)
    np.testing.assert_array_equal(kernel(arrays), whole)


@on_both
def test_warns_of_nothing():
    """Infinities and NaN are the user's own business; warnings are errors here."""
    for name in ("float32", "float64", "float16", "bfloat16"):
        arrays = [np.array([np.inf, np.nan, 1], numpy_dtype(name)), np.array([-np.inf, 1, np.nan], numpy_dtype(name))]
        assert np.isnan(kernel(arrays).astype(float)).all()


def one_after_another(arrays, weights=None):
    """Give the kernel's sums a shard at a time, in memory that is used again."""
    name = "longdouble" if arrays[0].dtype.type is np.longdouble else arrays[0].dtype.name
    sums, memory = Sums(name), np.empty(arrays[0].nbytes, np.uint8)
    scales = [1.0] * len(arrays) if weights is None else scaled(weights)
    for array, scale in zip(arrays, scales, strict=True):
        memory[...] = array.view(np.uint8)
        if scale:
            sums.add(memory, scale)
    sums.mean_into(memory, sum(scale for scale in scales if scale))
    return memory.view(arrays[0].dtype)


def bits_but_of_nan(array):
    """There are many NaN, and which one comes out is nobody's promise."""
    strange = array != array
    return strange.tobytes() + bits(array[~strange])


@on_both
@pytest.mark.parametrize("values", ["ordinary", "small integers", "subnormal", "huge", "wide", "special"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_one_after_another_gives_the_same_bits(element, values, monkeypatch):
    for block in (mean.BLOCK, 4):
        monkeypatch.setattr(mean, "BLOCK", block)
        for size in (1, 2, 3, 4, 5):
            arrays = [build(S("numpy", element, (41,), values=values, seed=block), rank) for rank in range(size)]
            for weights in (None, [1.0] * size, [2.0 * (rank != 1) + 0.3 * rank for rank in range(size)]):
                assert bits_but_of_nan(one_after_another(arrays, weights)) == bits_but_of_nan(kernel(arrays, weights))
                assert bits_but_of_nan(one_after_another([arrays[0]] * size, weights)) == bits_but_of_nan(arrays[0])


@on_both
@pytest.mark.parametrize("element", SMALL)
def test_every_pair_of_bytes_one_after_another(element):
    codes = np.arange(256, dtype=np.uint8)
    pair = [half.reshape(-1).view(numpy_dtype(element)) for half in np.meshgrid(codes, codes)]
    assert bits_but_of_nan(one_after_another(pair)) == bits_but_of_nan(kernel(pair))


@on_both
@pytest.mark.parametrize("mean_of", [kernel, one_after_another])
@pytest.mark.parametrize("element", ["float64", "longdouble"])
def test_a_sum_that_overflows_costs_nobody_an_ulp(element, mean_of):
    """Neither its neighbours nor itself: as if exponents had no end."""
    rng = np.random.default_rng(0)
    for size in (2, 3, 5):
        ordinary = [rng.uniform(-7.9, 7.9, 400).astype(element) for _ in range(size)]
        tiny = [array * np.finfo(element).smallest_subnormal for array in ordinary]
        far = np.ldexp(np.ones(1, element), np.finfo(element).maxexp - 3)
        large = [array * far for array in ordinary]
        results = mean_of([np.concatenate(group) for group in zip(tiny, ordinary, large, strict=True)])
        with np.errstate(over="ignore"):
            assert np.isinf(sum(large)).any()
        assert bits(results[:400]) == bits(kernel(tiny))
        assert bits(results[400:800]) == bits(kernel(ordinary))
        assert bits(results[800:]) == bits(kernel(ordinary) * far)
    limit = np.finfo(element).max
    below = np.nextafter(limit, 0)
    for numbers in ([limit, limit, below], [limit] * 6 + [below], [limit, below] * 3, [-limit, below, limit, -below]):
        arrays = [np.array([number], element) for number in numbers]
        assert_is_mean(mean_of(arrays), arrays)
    for size in (3, 4, 6):  # where rounded sums and weights take some of these means beyond the limit
        arrays = [np.array([limit, below], element)[rng.integers(2, size=500)] for _ in range(size)]
        for _ in range(10):
            weighted = mean_of(arrays, list(rng.uniform(0.1, 1, size)))
            assert ((limit * (1 - 2.0**-48) <= weighted) & (weighted <= limit)).all()
    mixed = [np.array([limit, limit, limit, np.inf], element), np.array([limit, limit, limit, 1], element)]
    mixed.append(np.array([np.inf, -np.inf, np.nan, -np.inf], element))
    np.testing.assert_array_equal(mean_of(mixed), [np.inf, -np.inf, np.nan, np.nan])


@on_both
@pytest.mark.parametrize("element", ELEMENTS)
def test_zeros_of_both_signs(element):
    """-0.0 == 0.0, yet their mean is the sum's zero, of however many."""
    for size in (2, 3, 4):
        arrays = [np.array([-0.0 if rank == 0 else 0.0, -0.0]).astype(numpy_dtype(element)) for rank in range(size)]
        if np.signbit(arrays[0].astype(float)[0]):  # not every dtype of 8 bits has a -0.0
            for mean_of in (kernel, one_after_another):
                assert np.signbit(mean_of(arrays).astype(float)).tolist() == [False, True]


@pytest.mark.parametrize("values", ["ordinary", "subnormal", "wide", "special"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", TORCH_FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_in_place_of_bytes(device, name, size, values):
    """What runs in an accelerator's memory; float64 replicas come back too."""
    tensors = [build(S("torch", name, (13,), values=values), rank).to(device) for rank in range(size)]
    out = torch.empty_like(tensors[0])
    tensor_mean_into(out, tensors, None)
    assert_is_mean(out.cpu(), [tensor.cpu() for tensor in tensors])
    weights = [0.5 + rank for rank in range(size)]
    tensor_mean_into(out, tensors, weights)
    assert_is_mean(out.cpu(), [tensor.cpu() for tensor in tensors], weights)
    tensor_mean_into(out, [tensors[0]] * size, weights)
    if values != "special":  # the payload of NaN may change
        assert torch.equal(out.view(torch.uint8), tensors[0].view(torch.uint8))


@pytest.mark.parametrize("values", ["ordinary", "subnormal", "wide"])
@pytest.mark.parametrize("name", TORCH_FLOATS)
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_one_after_another(device, name, values, monkeypatch):
    monkeypatch.setattr(mean, "DEVICE_BLOCK", 4)
    for size in (1, 2, 3, 5):
        tensors = [build(S("torch", name, (13,), values=values), rank).to(device) for rank in range(size)]
        for weights in ([1.0] * size, [0.5 + rank for rank in range(size)]):
            out, expected, memory = (torch.empty_like(tensors[0]) for _ in range(3))
            tensor_mean_into(expected, tensors, weights)
            sums = Sums(name, on_device=True)
            for tensor, scale in zip(tensors, scaled(weights), strict=True):
                sums.add(memory.copy_(tensor), scale)
            sums.mean_into(out, sum(scaled(weights)))
            assert bits(out.cpu()) == bits(expected.cpu())


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_tensors(device, monkeypatch):
    """Weight 0 is never read, no weight is too large, and blocks do not show."""
    monkeypatch.setattr(mean, "DEVICE_BLOCK", 4)
    for name in TORCH_FLOATS:
        dtype = getattr(torch, name)
        tensors = [torch.full((9,), value).to(device, dtype) for value in (1.0, 4.0, float("nan"))]
        out = torch.empty_like(tensors[0])
        for scale in (1.0, 1e-310, np.finfo(float).max):
            tensor_mean_into(out, tensors, [scale, scale, 0.0])
            assert_is_mean(out.cpu(), [tensor.cpu() for tensor in tensors[:2]])
        tensor_mean_into(out, tensors, [1.0, 3.0, 0.0])
        assert_is_mean(out.cpu(), [tensor.cpu() for tensor in tensors[:2]], [1.0, 3.0])


def test_float16_and_bfloat16_without_torch():
    """NumPy's own way for the same dtypes gives the same bits, and so does C."""
    skip_without("torch")
    code = """
import ml_dtypes, numpy as np, sys
from funcavg._engine.mean import mean_into
rng = np.random.default_rng(0)
for name in ("float16", "bfloat16", "float8_e5m2"):
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    for size in (2, 3, 5):
        shards = [rng.normal(size=500).astype(dtype) for _ in range(size)]
        out = np.empty_like(shards[0])
        mean_into(out.view(np.uint8), [shard.view(np.uint8) for shard in shards], None, name)
        print(out.tobytes().hex())
assert "torch" not in sys.modules
"""
    with_torch = "import torch\n" + code.replace("assert", "#")
    runs = [("off", code), ("off", with_torch), ("", code)]
    said = [
        subprocess.check_output([sys.executable, "-c", text], text=True, env={**os.environ, "FUNCAVG_KERNEL": setting})
        for setting, text in runs
    ]
    assert said[0] == said[1] == said[2]
    assert len(said[0].split()) == 9


def test_two_narrow_shards_under_a_default_device():
    def flat(tensor):
        return tensor.view(torch.uint8).numpy()

    shards = [torch.full((9,), float(i)).bfloat16() for i in range(2)]
    out = torch.zeros(9, dtype=torch.bfloat16)
    arithmetic._OF_THREAD.__dict__.clear()
    with torch.device("meta"), using(None):
        mean_into(flat(out), [flat(shard) for shard in shards], None, "bfloat16")
    assert out.tolist() == [0.5] * 9


@on_both
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("element", ["float16", "bfloat16", "float32", "float64"])
def test_an_overflow_changes_no_neighbour(element, size):
    """Of any bits, subnormal ones too, near the largest number or not."""
    rng = np.random.default_rng(size)
    dtype = numpy_dtype(element)
    for weights in (None, [1.0 - 0.3 * rank for rank in range(size)]):
        arrays = [rng.integers(0, 256, 999 * dtype.itemsize, np.uint8).view(dtype) for _ in range(size)]
        before = kernel(arrays, weights)
        for array in arrays:
            array[500] = limits_of(dtype).max
        after = kernel(arrays, weights)
        assert after[500] == limits_of(dtype).max
        before[500] = after[500]
        assert bits_but_of_nan(after) == bits_but_of_nan(before)


@on_both
@pytest.mark.parametrize("into", [None, 0, 1, 2])
@pytest.mark.parametrize("length", [1, 40, 2 * mean.BLOCK + 5])
@pytest.mark.parametrize("element", ELEMENTS)
def test_a_mean_is_written_to_a_second_place_too(element, length, into):
    for size in (2, 3):
        arrays = [build(S("numpy", element, (length,)), rank) for rank in range(size)]
        shards = [array.view(np.uint8).copy() for array in arrays]
        name = "longdouble" if element == "longdouble" else arrays[0].dtype.name
        out = np.zeros_like(shards[0]) if into is None or into >= size else shards[into]
        also = np.zeros_like(shards[0])
        mean_into(out, shards, None, name, also=also)
        expected = kernel(arrays)
        assert bits(also.view(expected.dtype)) == bits(out.view(expected.dtype)) == bits(expected)


@on_both
@pytest.mark.parametrize("element", ["float32", "bfloat16", "float64", "longdouble", "float8_e5m2"])
def test_means_are_prepared_once(element):
    """For buckets of several lengths, in memory that is looked at once."""
    dtype = numpy_dtype(element)
    for weights in (None, [2.0, 0.0, 1.0]):
        means = Means(element, 3, weights)
        memory = [np.zeros(70000 * dtype.itemsize, np.uint8) for _ in range(5)]
        operands, targets = list(map(means.operand, memory[:3])), list(map(means.target, memory[3:]))
        for length in (70000, 1, 2048):
            arrays = [build(S("numpy", element, (length,), seed=length), rank) for rank in range(3)]
            for part in memory[3:]:
                part[...] = 7
            for part, array in zip(memory, arrays, strict=False):
                part[: array.nbytes] = array.view(np.uint8)
            means.write(targets[0], operands, length * dtype.itemsize, targets[1])
            for part in memory[3:]:
                assert bits(part[: length * dtype.itemsize].view(dtype)) == bits(kernel(arrays, weights))
                assert (part[length * dtype.itemsize :] == 7).all()
            means.write(operands[1], operands, length * dtype.itemsize)
            assert bits(memory[1][: length * dtype.itemsize].view(dtype)) == bits(kernel(arrays, weights))


@on_both
def test_memory_of_other_lengths_is_refused():
    """The kernel in C would write beyond its end."""
    four, eight = np.zeros(4, np.uint8), np.zeros(8, np.uint8)
    for out, shards, into, also in [
        (four, [eight, eight], "", None),
        (eight, [eight, four], "", None),
        (four, [four, four], "bfloat16", None),
        (eight, [eight, eight], "", four),
    ]:
        with pytest.raises(ValueError, match="they and it have"):
            mean_into(out, shards, None, "float32", into, also)
    sums = Sums("float32")
    sums.add(eight, 1.0)
    with pytest.raises(ValueError, match="expected length"):
        sums.add(four, 1.0)
    with pytest.raises(ValueError, match="expected length"):
        sums.mean_into(four, 1.0)


LATE_TORCH = """
import numpy as np
from funcavg._engine.mean import Means
memory = np.ones(16, np.uint8)
before = Means("float16", 2).operand(memory)
import torch
assert type(Means("float16", 2).operand(memory)) is type(before), "a plan's views are kept"
"""


def test_views_stay_of_one_kind_when_torch_is_imported_later():
    skip_without("torch")
    environ = os.environ | {"FUNCAVG_KERNEL": "off"}
    subprocess.run([sys.executable, "-c", LATE_TORCH], env=environ, check=True, timeout=100)


def test_products_are_rounded_alike_everywhere():
    """No multiplication is fused with an addition: torch's would be where it is vectorised, and not in the rest."""
    arrays = [build(S("numpy", "float64", (1003,)), rank) for rank in range(3)]
    weights = [1.0, 0.3, 0.7]
    out = torch.empty(1003, dtype=torch.float64)
    tensor_mean_into(out, [torch.from_numpy(array) for array in arrays], weights)
    assert bits(out) == bits(kernel(arrays, weights))

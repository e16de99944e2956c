"""Trees and leaves: how they are named, described, averaged or passed through."""

from collections import OrderedDict, defaultdict

import ml_dtypes
import numpy as np
import pytest
from helpers.frameworks import torch
from helpers.trees import ML_DTYPES, Layer, Point

from funcavg import average
from funcavg._trees import containers
from funcavg._trees.arrays import family_of
from funcavg._trees.arrays.base import is_expanded, memory_span
from funcavg.testing import run_ranks

F8 = ml_dtypes.float8_e4m3fn


@pytest.mark.parametrize(
    ("leaf", "text", "element", "shape"),
    [
        (1.5, "float64[]", "float64", ()),
        (1j, "complex128[]", "float64", (2,)),
        (np.float16(1), "float16[]", "float16", ()),
        (np.zeros((2, 3), np.float32), "float32[2, 3]", "float32", (2, 3)),
        (np.zeros(2, ">f4"), "float32[2]", "float32", (2,)),
        (np.zeros((2, 0), complex), "complex128[2, 0]", "float64", (2, 0, 2)),
        (np.zeros(2, F8), "float8_e4m3fn[2]", "float8_e4m3fn", (2,)),
        (F8(1), "float8_e4m3fn[]", "float8_e4m3fn", ()),
        (torch.zeros(2, 3), "float32[2, 3]", "float32", (2, 3)),
        (torch.zeros((), dtype=torch.bfloat16), "bfloat16[]", "bfloat16", ()),
        (torch.zeros(2, dtype=torch.complex64), "complex64[2]", "float32", (2, 2)),
        (torch.nn.Parameter(torch.zeros(2)), "float32[2]", "float32", (2,)),
        (True, "bool", None, ()),
        (7, "int", None, ()),
        (np.True_, "bool[]", None, ()),
        (np.int32(7), "int32[]", None, ()),
        (np.zeros(2, np.uint8), "uint8[2]", None, ()),
        (np.zeros(2, ml_dtypes.int4), "int4[2]", None, ()),
        (torch.zeros(2, dtype=torch.int64), "int64[2]", None, ()),
        (torch.zeros(2, dtype=torch.bool), "bool[2]", None, ()),
    ],
)
def test_what_is_agreed_about_a_leaf(leaf, text, element, shape):
    described = family_of(leaf).describe(leaf)
    assert (described.text, described.element, described.shape) == (text, element, shape)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_numpy_and_torch_mean_the_same_dtype(name):
    """One rank may hold NumPy arrays where another holds tensors."""
    if not hasattr(torch, name):
        return

    def fn(group):
        leaf = np.array([1.0, 0.5], getattr(ml_dtypes, name))
        if group.rank == 1:
            leaf = torch.from_numpy(leaf.view(f"i{leaf.itemsize}")).view(getattr(torch, name))
        result = average({"w": leaf}, group)["w"]
        assert type(result) is type(leaf)
        assert result.dtype == leaf.dtype
        return (result.double().numpy() if group.rank else result.astype(float)).tolist()

    assert run_ranks(2, fn) == [[1.0, 0.5]] * 2


def test_byte_orders_may_differ():
    def fn(group):
        leaf = np.array([1.0, 2.0, 3.0], [">f8", "<f8", ">f8"][group.rank]) * (1 + group.rank)
        leaf = leaf.astype([">f8", "<f8", ">f8"][group.rank])
        result = average(leaf, group)
        assert result.dtype.byteorder == leaf.dtype.byteorder
        return result.tolist()

    assert run_ranks(3, fn) == [[2.0, 4.0, 6.0]] * 3


def test_python_floats_average_exactly_and_stay_python_floats():
    results = run_ranks(4, lambda group: average([0.1 * group.rank, 1j * group.rank], group))
    assert [[type(leaf) for leaf in result] for result in results] == [[float, complex]] * 4
    assert results[0] == [pytest.approx(0.15, rel=1e-15), 1.5j]


def test_a_tensor_that_torch_wants_a_graph_for_is_averaged_all_the_same():
    def fn(group):
        leaf = torch.full((2,), float(group.rank), requires_grad=True)
        return average({"w": leaf}, group)["w"].detach().tolist()

    assert run_ranks(2, fn) == [[0.5, 0.5]] * 2


def test_inference_tensors():
    def fn(group):
        with torch.inference_mode():
            leaf = torch.full((2,), float(group.rank))
            given = average(leaf, group, donate=True)
            assert given is leaf
            return average(leaf + group.rank, group).tolist()

    assert run_ranks(2, fn) == [[1.0, 1.0]] * 2


def test_names_of_leaves_are_as_one_would_write_them():
    tree = {
        "layer 1": [1.0, Point(2.0, Layer(3.0, None))],
        7: OrderedDict(a=(4.0,)),
        ("k", 1): defaultdict(list, b=5.0),
    }
    spec = containers.flatten(tree).spec
    assert set(containers.names(spec)) == {
        "params_tree['layer 1'][0]",
        "params_tree['layer 1'][1].x",
        "params_tree['layer 1'][1].y.weight",
        "params_tree[7]['a'][0]",
        "params_tree[('k', 1)]['b']",
    }
    assert ("layer 1", 1, 1, "weight") in containers.paths(spec)


def test_the_same_leaf_alone_is_a_tree():
    assert average(2.5) == 2.5
    assert containers.names(containers.flatten(2.5).spec) == ["params_tree"]


@pytest.mark.parametrize(
    "array", [np.zeros((3, 4))[::-1], np.zeros((3, 4)).T[1:], np.zeros(9)[::-2], np.zeros(()), np.zeros((0, 3))]
)
def test_memory_span(array):
    low, high = np.lib.array_utils.byte_bounds(array)
    begin, end = memory_span(array.shape, array.strides, array.itemsize)
    address = array.__array_interface__["data"][0]
    if array.size:
        assert (address + begin, address + end) == (low, high)
    else:
        assert begin == end


@pytest.mark.parametrize(
    ("array", "expanded"),
    [
        (np.broadcast_to(1.0, 3), True),
        (np.broadcast_to(1.0, (3, 1)), True),
        (np.broadcast_to(1.0, 1), False),
        (np.zeros((0, 3)), False),  # NumPy gives it strides of 0
        (np.zeros(3), False),
    ],
)
def test_is_expanded(array, expanded):
    assert is_expanded(array.shape, array.strides) is expanded


def test_memory_formats_are_kept():
    tensors = {
        "channels last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.zeros(3, 4).T,
        "permuted": torch.zeros(2, 3, 4).permute(2, 0, 1),
        "large channels last": torch.zeros(2, 64, 100, 100).to(memory_format=torch.channels_last),
    }
    for result in run_ranks(2, lambda group: average(tensors, group)):
        assert {name: leaf.stride() for name, leaf in result.items()} == {
            name: leaf.stride() for name, leaf in tensors.items()
        }
        assert result["channels last"].is_contiguous(memory_format=torch.channels_last)
    fortran = run_ranks(2, lambda group: average(np.asfortranarray(np.zeros((3, 4))), group))[0]
    assert fortran.flags.f_contiguous


def test_large_leaves_average_in_every_layout():
    """Over 4 MiB, where result memory is had in another way."""

    def fn(group):
        leaves = [
            torch.full((1100, 1000), float(group.rank)),
            torch.full((1100, 1000), float(group.rank)).T,
            torch.full((1100, 1000), group.rank * 1j),
            torch.nn.Parameter(torch.full((1100, 1000), float(group.rank))),
            np.full((1100, 1000), float(group.rank))[::-1],
        ]
        with torch.no_grad():
            results = average(leaves, group)
        assert [type(result) for result in results] == [type(leaf) for leaf in leaves]
        assert results[3].requires_grad
        return [
            np.unique(np.asarray(result.detach() if i < 4 else result)).tolist() for i, result in enumerate(results)
        ]

    assert run_ranks(2, fn) == [[[0.5], [0.5], [0.5j], [0.5], [0.5]]] * 2

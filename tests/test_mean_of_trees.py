"""`mean`: what `average` returns over as many ranks, from a list of trees or from an iterator."""

import gc
import re
import subprocess
import sys
import tracemalloc
import warnings
import weakref
from collections import OrderedDict, deque
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optree
import pytest
from helpers.frameworks import is_tensor, jnp, no_grad, skip_without, torch
from helpers.trees import (
    Point,
    bits,
    memory,
    plant,
    raw_memory,
    reals,
    refs_of,
    same_containers,
    trees,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from funcavg import TreeMismatchError, average, mean
from funcavg._engine import mean as kernel
from funcavg.testing import run_ranks

ROOT = Path(__file__).parents[1]
FORMS = [list, iter]
examples = settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@contextmanager
def unheard():
    """Let integers differ."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield heard


def over_ranks(made, weights=None):
    """Average as many ranks, and return the first one's result."""

    def fn(group):
        with no_grad():
            return average(made[group.rank], group, weight=None if weights is None else weights[group.rank])

    return run_ranks(len(made), fn)[0]


def values(leaf):
    """Return a leaf's bits, but any NaN as the same: which one comes out is nobody's promise."""
    return "NaN" if any(number != number for number in reals(leaf)) else bits(leaf)


def assert_same_bits(one, other):
    for left, right in zip(optree.tree_leaves(one), optree.tree_leaves(other), strict=True):
        assert type(left) is type(right)
        if values(left) == "NaN":  # element by element
            np.testing.assert_array_equal(reals(left), reals(right))
        else:
            assert bits(left) == bits(right)


# The same numbers


@examples
@given(tree=trees(), size=st.integers(1, 6), form=st.sampled_from(FORMS), block=st.sampled_from([3, kernel.BLOCK]))
def test_the_bits_of_average(tree, size, form, block):
    made = [plant(tree, rank) for rank in range(size)]
    with pytest.MonkeyPatch.context() as patch, unheard():
        patch.setattr(kernel, "BLOCK", block)
        assert_same_bits(mean(form(made)), over_ranks(made))


@examples
@given(
    tree=trees(),
    weights=st.lists(st.sampled_from([0, 1, 2.5, 1e-3, 3, 1e300, 0.1]), min_size=1, max_size=5).filter(any),
    form=st.sampled_from(FORMS),
)
def test_the_bits_of_a_weighted_average(tree, weights, form):
    made = [plant(tree, rank) for rank in range(len(weights))]
    with unheard():
        assert_same_bits(mean(form(made), weights), over_ranks(made, weights))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, [2, 0, 1]])
def test_the_bits_of_average_with_jax(form, weights):
    made = [
        {
            "w": jnp.linspace(-1, 1, 50).reshape(5, 10) * (rank + 0.3),
            "half": jnp.arange(7, dtype=jnp.bfloat16) / (rank + 3),
            "complex": jnp.ones(3) + 1j * rank / 3,
            "weak": jnp.asarray(rank / 7),
            "step": jnp.asarray(5),
            "empty": jnp.ones((0, 3)),
        }
        for rank in range(3)
    ]
    result, expected = mean(form(made), weights), over_ranks(made, weights)
    for name, leaf in result.items():
        assert (type(leaf), leaf.dtype, leaf.aval) == (type(made[0][name]), made[0][name].dtype, expected[name].aval)
        assert np.asarray(leaf).tobytes() == np.asarray(expected[name]).tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_kinds_of_arrays_may_differ(form):
    """The first tree's come back."""
    made = [{"w": torch.tensor([1.0, 2.0])}, {"w": np.array([3, 4], np.float32)}, {"w": jnp.array([5.0, 6.0])}]
    assert mean(form(made))["w"].tolist() == [3, 4]
    for _ in made:
        made.append(made.pop(0))
        assert type(mean(form(made))["w"]) is type(made[0]["w"])
        assert mean(form(made))["w"].tolist() == [3, 4]


# The result


@examples
@given(tree=trees(), size=st.integers(1, 4), form=st.sampled_from(FORMS))
def test_the_tree_keeps_its_kind_and_the_inputs_their_values(tree, size, form):
    made = [plant(tree, rank) for rank in range(size)]
    everything = [leaf for planted in made for leaf in optree.tree_leaves(planted)]
    before = list(map(raw_memory, everything))
    with unheard():
        result = mean(form(made))
    assert list(map(raw_memory, everything)) == before
    assert same_containers(made[0], result)
    taken = [span for span in map(memory, everything) if span]
    leaves, firsts = optree.tree_leaves(result), optree.tree_leaves(made[0])
    spans = [[memory(leaf) for leaf in side] for side in (firsts, leaves)]
    for i, (ref, one, other) in enumerate(zip(refs_of(tree), firsts, leaves, strict=True)):
        if spans[1][i]:
            assert all(spans[1][i][1] <= begin or end <= spans[1][i][0] for begin, end in taken)
        if not ref.spec.averaged:
            assert type(other) is type(one)
            assert bits(other) == bits(one)
        if is_tensor(one):
            assert (other.device, other.requires_grad, other.is_leaf) == (one.device, one.requires_grad, True)
            assert other.stride() == torch.empty_like(one).stride()
        elif isinstance(one, np.ndarray):
            assert other.strides == np.empty_like(one).strides
            assert other.flags.writeable
        for j in range(i):
            if ref.spec.averaged and refs_of(tree)[j].spec.averaged and spans[0][i] and spans[0][j]:
                assert (spans[0][i] == spans[0][j]) == (spans[1][i] == spans[1][j])
                if one is firsts[j]:
                    assert other is leaves[j]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", [0, 1, 2])
def test_ties_in_some_trees_only(form, other):
    """Then two means differ, and cannot stay tied; from the first tree on, or later."""
    made = []
    for rank in range(3):
        leaf = np.full(3, float(rank))
        made.append([leaf, leaf + 6 if rank == other else leaf])
    assert [leaf.tolist() for leaf in mean(form(made))] == [[1.0] * 3, [3.0] * 3]
    assert mean(form(made), [1, 0, 1])[0].tolist() == [1.0] * 3


@pytest.mark.parametrize("form", FORMS)
def test_lazily_conjugated_and_negated_tensors(form):
    made = []
    for rank in range(3):
        x = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0 * rank]))
        made.append([x, x.conj(), x.conj().imag, x.imag])
    expected = over_ranks(made)
    for one, other in zip(mean(form(made)), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_no_part_of_a_graph(form):
    weight = torch.nn.Parameter(torch.ones(2))
    made = [{"w": weight, "x": weight * 2, "frozen": torch.ones(2)}, {"w": weight, "x": weight * 3, "frozen": weight}]
    result = mean(form(made))
    assert isinstance(result["w"], torch.nn.Parameter)
    assert [leaf.requires_grad for leaf in result.values()] == [True, True, False]
    assert all(leaf.grad_fn is None for leaf in result.values())
    assert result["x"].tolist() == [2.5, 2.5]


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_comes_back_as_one(form):
    modules = [torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)) for _ in range(3)]
    result = mean(form([module.state_dict() for module in modules]))
    assert isinstance(result, OrderedDict)
    assert result._metadata == modules[0].state_dict()._metadata
    modules[1].load_state_dict(result)
    for name, leaf in over_ranks([module.state_dict() for module in (modules[0], modules[1], modules[2])]).items():
        assert leaf.shape == result[name].shape


def test_one_tree_is_copied():
    tree = {"w": np.arange(3.0), "n": np.arange(3)}
    for form in FORMS:
        result = mean(form([tree]))
        assert result["w"].tolist() == [0, 1, 2]
        assert result["w"] is not tree["w"]
        assert not np.shares_memory(result["n"], tree["n"])


# Where trees come from


def test_trees_may_lie_in_the_same_memory():
    """As when a model is loaded again and again: every tree is read before the next is made."""
    buffers = {
        "float32": np.zeros(5, np.float32),
        "float64": np.zeros(5),
        "count": np.zeros(1, np.int64),
        "half": np.zeros((2, 2), np.float16).T,
        "tensor": torch.zeros(5, dtype=torch.float64),
        "frozen": torch.zeros(2),
    }

    def load():
        for number in (1, 2, 6):
            for leaf in buffers.values():
                leaf[...] = number
            yield buffers

    with pytest.warns(UserWarning, match=r"2 leaves are not averaged") as heard:
        result = mean(load(), where=lambda path: path != ("frozen",))
    assert len(heard) == 1
    found = {name: set(leaf.flatten().tolist()) for name, leaf in result.items()}
    assert found == {name: {1} if name in ("count", "frozen") else {3.0} for name in buffers}


@pytest.mark.parametrize(
    "form",
    [list, tuple, deque, iter, lambda made: (tree for tree in made), lambda made: dict(enumerate(made)).values()],
    ids=["list", "tuple", "deque", "iterator", "generator", "values of a dict"],
)
def test_what_trees_come_in(form):
    assert mean(form([{"w": 1.0}, {"w": 3.0}])) == {"w": 2.0}


def test_a_tree_is_let_go_before_the_next_is_made():
    gone = []

    class Array(np.ndarray):
        pass

    def make():
        alive = []
        for number in range(4):
            gc.collect()
            gone.append(all(one() is None for one in alive))
            array = np.full(3, float(number))
            holder = array.view(Array)  # which can be referred to weakly
            alive.append(weakref.ref(holder))
            tree = {"w": np.asarray(holder.view(np.ndarray)), "n": 1}
            del array, holder
            yield tree
            del tree

    assert mean(make())["w"].tolist() == [1.5] * 3
    assert gone == [True] * 4


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np
import funcavg
dtype, form, n = np.dtype(sys.argv[1]), sys.argv[2], 20 << 20
def checkpoints():
    for k in range(30):
        yield {f"layer{i}": np.full(n // 4 // dtype.itemsize, 1 + k % 3, dtype) for i in range(4)}
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
funcavg.mean([{"w": np.ones(3, dtype)}] * 3), funcavg.mean(iter([{"w": np.ones(3, dtype)}] * 3))
trees = list(checkpoints()) if form == "list" else checkpoints()
before = peak()
result = funcavg.mean(trees)
assert all((leaf == 2).all() for leaf in result.values())
print((peak() - before) * 1024 / n)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize(
    ("dtype", "form", "expected"),
    [("float32", "iterator", 1 + 2), ("float64", "iterator", 1 + 2 + 1 / 8), ("float32", "list", 1)],
)
def test_memory(dtype, form, expected):
    """In trees of 20 MB: one, and sums; the result takes the place of the last tree. From a list, the result."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype, form], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert expected - 0.2 < float(done.stdout) < expected + 0.35


# What is not averaged


@pytest.mark.parametrize("form", FORMS)
def test_equal_leaves_warn_of_nothing(form):
    def tree():
        return {
            "w": 1.0,
            "int": 3,
            "bool": np.array([True]),
            "tensor": torch.tensor([1, 2]),
            "jax": jnp.array([1, 2]),
            "key": __import__("jax").random.key(3),
            "text": "adam",
            "none": None,
            "nan": np.array([np.nan, -0.0]),
            "half": torch.tensor([float("nan")], dtype=torch.bfloat16),
            "float8": torch.ones(2).to(torch.float8_e4m3fn),
            "wide": np.longdouble(1) / 3,
            "sparse": torch.eye(2).to_sparse(),
        }

    refused = ("text", "nan", "half", "float8", "wide", "sparse")
    result = mean(form([tree(), tree(), tree()]), where=lambda path: path[0] not in refused)
    assert list(result) == list(tree())
    assert result["text"] == "adam"


CHANGES = {
    "an integer": (1, 2, "int"),
    "a NumPy array": (np.array([1, 2]), np.array([1, 3]), r"int64\[2\]"),
    "a tensor": (torch.tensor([True]), torch.tensor([False]), r"bool\[1\]"),
    "JAX": (jnp.array([1]), jnp.array([2]), r"int32\[1\]"),
    "text": ("a", "b", "where refuses it"),
    "another type": ("a", 3.0, "where refuses it"),
    "another shape": (np.ones(2), np.ones(3), "where refuses it"),
    "another dtype": (np.zeros(2), np.zeros(2, int), "where refuses it"),
    "a refused float": (torch.ones(2), torch.tensor([1.0, 2.0]), "where refuses it"),
    "what cannot be compared": (object(), object(), "where refuses it"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("first", "other", "text"), CHANGES.values(), ids=CHANGES)
def test_the_first_is_kept_and_a_warning_says_so(first, other, text, form):
    made = [{"w": 1.0, "n": first}, {"w": 2.0, "n": first}, {"w": 6.0, "n": other}, {"w": 7.0, "n": other}]
    where = (lambda path: path != ("n",)) if text == "where refuses it" else None
    with pytest.warns(UserWarning, match="not averaged") as heard:
        result = mean(form(made), where=where)
    assert result["w"] == 4.0
    assert result["n"] is first or bits(result["n"]) == bits(first)
    (warning,) = heard
    assert warning.filename == __file__
    assert str(warning.message).startswith("mean: a leaf is not averaged, and not the same in all trees; the first ")
    assert re.search(rf"params_tree\['n'\]: {text}, in tree 2\n", str(warning.message))
    assert "num_batches_tracked" in str(warning.message)


def test_keys_of_jax_differ():
    import jax

    made = [{"w": 1.0, "key": jax.random.key(seed)} for seed in (0, 1)]
    with pytest.warns(UserWarning, match=r"params_tree\['key'\]: key<fry>\[\], in tree 1"):
        assert mean(made)["key"] is made[0]["key"]


def test_many_differences_make_one_warning():
    made = [{"w": 1.0, "n": list(range(k, k + 9))} for k in range(4)]
    with pytest.warns(UserWarning, match=r"(?s)9 leaves are.*\['n'\]\[4\].*\.\.\. and 4 more") as heard:
        assert mean(made)["n"] == list(range(9))
    assert len(heard) == 1
    assert str(heard[0].message).count("in tree 1") == 5


# Mistakes


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"w": np.zeros(3), "n": 1}, r"params_tree\['w'\]:  tree 0 float64\[2\],  tree 2 float64\[3\]"),
        ({"w": np.zeros(2, "f4"), "n": 1}, r"params_tree\['w'\]:  tree 0 float64\[2\],  tree 2 float32\[2\]"),
        ({"w": np.zeros(2)}, r"params_tree\['n'\]:  tree 0 int,  tree 2 has no such leaf"),
        ({"w": np.zeros(2), "n": 1, "x": 1.0}, r"params_tree\['x'\]:  tree 0 has no such leaf,  tree 2 float64\[\]"),
        ({"w": np.zeros(2), "n": True}, r"params_tree\['n'\]:  tree 0 int,  tree 2 bool"),
        ([np.zeros(2), 1], r"params_tree\[0\]:  tree 0 has no such leaf,  tree 2 float64\[2\]"),
    ],
)
def test_trees_that_do_not_match(other, words, form):
    made = [{"w": np.zeros(2), "n": 1}, {"w": np.zeros(2), "n": 1}, other]
    with pytest.raises(TreeMismatchError, match=rf"(?s)^mean: tree 2 does not match the first\.\n.*{words}"):
        mean(form(made))


def test_another_order():
    pairs = [("a", 1.0), ("b", 2.0)]
    with pytest.raises(TreeMismatchError, match="the same leaves in another order"):
        mean([OrderedDict(pairs), OrderedDict(pairs[::-1])])
    assert mean([dict(pairs), dict(pairs[::-1])]) == dict(pairs)


@pytest.mark.parametrize(
    ("trees", "words"),
    [
        ({"w": 1.0}, r"got a dict, which is a tree itself\. Pass a list of trees"),
        (OrderedDict(w=1.0), r"got a collections\.OrderedDict, which is a tree itself"),
        (Point(1.0, 2.0), r"got a helpers\.trees\.Point, a NamedTuple, which is a tree itself"),
        (np.zeros((2, 3)), r"got a numpy\.ndarray, an array\. .* see funcavg\.stacked"),
        (torch.zeros(2, 3), r"got a torch\.Tensor, an array"),
        (jnp.zeros((2, 3)), r"an array"),
        ("trees", r"got a str\. Pass a list of trees"),
        (b"trees", r"got a bytes"),
        (3.0, r"got a float"),
        (None, r"got a NoneType"),
    ],
)
def test_what_is_not_trees(trees, words):
    with pytest.raises(TypeError, match=rf"^mean: trees must be a list of trees, or an iterator that makes .*{words}"):
        mean(trees)


@pytest.mark.parametrize("form", FORMS)
def test_a_mistake_in_a_tree_names_it(form):
    with pytest.raises(TypeError, match=r"^mean: tree 1: 1 of 2 leaves can .* params_tree\['n'\] is a str: 'a'"):
        mean(form([{"w": 1.0, "n": 2.0}, {"w": 1.0, "n": "a"}]))
    with pytest.raises(RuntimeError, match=r"^mean: tree 0: where raised ZeroDivisionError"):
        mean(form([{"w": 1.0}]), where=lambda path: 1 / 0)
    with pytest.raises(ValueError, match=r"^mean: tree 0: not one of the 1 averaged leaves has an element"):
        mean(form([{"w": np.zeros(0)}]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("count", "weights", "kind", "words"),
    [
        (0, None, ValueError, "got no tree"),
        (0, [], ValueError, "got no tree"),
        (2, [], ValueError, "weights has 0 numbers for"),
        (2, [1], ValueError, "weights has 1 numbers for 2 trees"),
        (2, [1, 2, 3], ValueError, "weights has 3 numbers for 2 trees. Pass one for each"),
        (2, [0, 0.0], ValueError, "the weights of all 2 trees are 0"),
        (2, [1, -1], ValueError, "weight must be finite and at least 0, got -1"),
        (2, [1, float("nan")], ValueError, "weight must be finite and at least 0, got nan"),
        (2, [1, "2"], TypeError, "weights must be a sequence of numbers"),
        (2, "12", TypeError, "weights must be a sequence of numbers"),
        (2, 1.0, TypeError, "weights must be a sequence of numbers, one for each tree, got 1.0 of type float"),
        (2, {"w": 1.0}, TypeError, r"Pass the trees in one list, mean\(\[one, other\]\)"),
        (2, np.ones((2, 2)), TypeError, "weights must be a sequence of numbers"),
    ],
)
def test_counts_and_weights(count, weights, kind, words, form):
    with pytest.raises(kind, match=f"^mean: .*{words}"):
        mean(form([{"w": 1.0}] * count), weights)


@pytest.mark.parametrize("weights", [[1, 3], (1, 3), np.array([1, 3]), iter([1, 3]), torch.tensor([1.0, 3.0])])
def test_weights_of_any_kind(weights):
    assert mean([{"w": 1.0}, {"w": 5.0}], weights) == {"w": 4.0}


@pytest.mark.parametrize("form", FORMS)
def test_a_tree_of_weight_0_is_not_read(form):
    strange = {"w": np.array([np.nan, np.inf]), "n": 1}
    fine = {"w": np.array([1.0, 2.0]), "n": 1}
    for position in range(3):
        made, weights = [fine, fine], [2.0, 2.0]
        made.insert(position, strange)
        weights.insert(position, 0)
        assert mean(form(made), weights)["w"].tolist() == [1.0, 2.0]


def test_an_error_of_the_iterator_comes_through():
    def load():
        yield {"w": 1.0}
        raise FileNotFoundError("step_7")

    with pytest.raises(FileNotFoundError, match="step_7"):
        mean(load())


# Transforms


def test_not_while_jax_traces():
    import jax

    with pytest.raises(RuntimeError, match=r"^mean: not while JAX traces"):
        jax.jit(lambda x: mean([{"w": x}, {"w": 2 * x}]))(jnp.ones(2))


def test_not_under_torch_func():
    for transform in (torch.func.grad, torch.func.vmap):
        with pytest.raises(RuntimeError, match=r"^mean: not under a transform of torch\.func"):
            transform(lambda x: mean([{"w": x}, {"w": 2 * x}])["w"].sum())(torch.ones(2))


def test_not_where_torch_records():
    from torch.fx.experimental.proxy_tensor import make_fx

    with pytest.raises(RuntimeError, match=r"^mean: not under make_fx"):
        make_fx(lambda x: mean([x, 2 * x]))(torch.ones(2))


def test_inside_a_compiled_step():
    skip_without("torch")
    step = torch.compile(lambda x: mean([x + 1, x + 3]) * 2, backend="eager")
    assert step(torch.zeros(2)).tolist() == [4, 4]


# On a GPU


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weights", [None, [1, 0, 3]])
@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("places", ["ggg", "ghh", "hgg"])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(places, name, weights, form):
    """The result lies where the first tree does, and has the bits that it has on the host."""
    generator = torch.Generator().manual_seed(0)
    host = [torch.randn(3, 50, generator=generator).to(getattr(torch, name)).T for _ in places]
    made = [leaf.to("cuda" if place == "g" else "cpu") for place, leaf in zip(places, host, strict=True)]
    result = mean(form(made), weights)
    assert result.device == made[0].device
    torch.testing.assert_close(result.cpu(), mean(host, weights), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_on_a_gpu():
    """One tree, sums, and the result, which is there from the beginning."""
    mean(iter([torch.ones(8, device="cuda")] * 3))
    torch.cuda.reset_peak_memory_stats()
    before, n = torch.cuda.memory_allocated(), 64 << 20
    result = mean(torch.full((n // 4,), float(k % 3), device="cuda") for k in range(9))
    assert (result == 1).all()
    assert (torch.cuda.max_memory_allocated() - before) / n < 4.5


def test_integers_of_several_frameworks_may_be_equal():
    """And of another byte order; no warning, which would be an error here."""
    trees = [{"n": torch.tensor(3), "b": torch.tensor([True])}, {"n": np.array(3), "b": np.array([True])}]
    trees.append({"n": np.array(3, ">i8"), "b": np.array([True])})
    assert mean(trees)["n"].item() == 3
    with pytest.warns(UserWarning, match=r"params_tree\['n'\]: int64\[\], in tree 1"):
        mean([trees[0], {"n": np.array(4), "b": np.array([True])}])


def test_weights_that_cannot_be_told_from_0_once_scaled():
    weights, trees = [1e-200, 1e200], [{"w": np.array([np.inf, 1, 0.0])}, {"w": np.array([2, 1, -0.0])}]
    wanted = run_ranks(2, lambda group: average(trees[group.rank], group, weight=weights[group.rank]))[0]["w"]
    with np.errstate(all="ignore"):
        for found in (mean(trees, weights), mean(iter(trees), weights)):
            assert np.array_equal(np.isnan(found["w"]), np.isnan(wanted))
            assert found["w"][1:].tobytes() == wanted[1:].tobytes()


def test_leaves_that_do_not_lie_in_order_are_not_all_copied_at_once():
    trees = [{"w": np.asfortranarray(np.random.default_rng(i).normal(size=(500, 400)))} for i in range(20)]
    tracemalloc.start()
    found = mean(trees)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 * found["w"].nbytes
    wanted = run_ranks(20, lambda group: average(trees[group.rank], group))[0]
    assert found["w"].tobytes() == wanted["w"].tobytes()

"""Keys of every type: matched on all ranks, and seen by `where` as they are; what cannot be averaged has its cure."""

import collections
import dataclasses
import enum
import io
from collections import OrderedDict, defaultdict

import numpy as np
import optree
import pytest
from helpers.frameworks import jax, jnp, torch

from funcavg import TreeMismatchError, average, periodic
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


class Layer(enum.Enum):
    FIRST = 1
    SECOND = 2


@dataclasses.dataclass(frozen=True)
class Key:
    name: str


class Nameless:
    """A key without an order or a repr() of its own."""


KEYS = [
    [Layer.FIRST, Layer.SECOND],
    [Key("b"), Key("a"), Key("c")],
    [1, "a", (2, "x"), None, Layer.FIRST, 2.5],
    [frozenset([1]), frozenset([2])],
    [1j, 2j, 0j],
    ["b", "a"],
    [2, 1],
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("container", [dict, lambda pairs: defaultdict(list, pairs)])
def test_plain_dicts_are_matched_by_key_in_whatever_order_they_were_filled(keys, container):
    def fn(group):
        names = keys if group.rank == 0 else keys[::-1]
        tree = container({key: [{"w": np.full(2, 10.0 * keys.index(key) + group.rank)}, 1] for key in names})
        result = average({"deep": (tree, 0.5)}, group)["deep"][0]
        assert type(result) is type(tree)
        assert list(result) == names
        return {key: value[0]["w"].tolist() for key, value in result.items()}

    expected = {key: [10.0 * i + 0.5] * 2 for i, key in enumerate(keys)}
    assert run_ranks(2, fn) == [expected, expected]


def test_averagers_know_such_a_tree_again():
    averager = periodic(1, group=Solo())
    state = averager.init({Layer.FIRST: 1.0, Layer.SECOND: 2.0})
    params, _ = averager.update({Layer.SECOND: 2.0, Layer.FIRST: 1.0}, state)
    assert list(params) == [Layer.SECOND, Layer.FIRST]


def test_an_ordered_dict_keeps_its_order():
    def fn(group):
        keys = [Layer.FIRST, Layer.SECOND][:: 1 - 2 * group.rank]
        with pytest.raises(TreeMismatchError, match="the same leaves in another order; a plain dict is matched by key"):
            average(OrderedDict((key, 1.0) for key in keys), group)

    run_ranks(2, fn)


def test_keys_that_ranks_cannot_agree_about_are_named():
    text = (
        r"average: rank 0: params_tree\['k'\] is a dict of which ranks cannot agree about the order: its keys, of type "
        r"Nameless, can neither be compared nor told apart by their repr\(\). Give them an order"
    )

    def fn(group):
        with pytest.raises(TypeError, match=text):
            average({"k": {Nameless(): 1.0, Nameless(): 2.0}, "w": 1.0}, group)
        return average(1.0 * group.rank, group)

    assert run_ranks(2, fn) == [0.5, 0.5]


@pytest.mark.parametrize("count", [1, 2])
def test_an_optimizers_state_is_keyed_by_parameters(count):
    def fn(group):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        optimizer = torch.optim.Adam(params)
        for param in params:
            param.grad = torch.ones(3)
        optimizer.step()
        with pytest.raises(TypeError) as caught:
            average({"m": [optimizer.state]}, group)
        average(optimizer.state_dict(), group)
        return str(caught.value)

    for words in run_ranks(2, fn):
        assert words.startswith(
            "average: rank 0: params_tree['m'][0] is a dict whose keys are tensors, of type Parameter, which no other "
            "rank has. optimizer.state is keyed by parameters: pass optimizer.state_dict()"
        )
        assert "\n" not in words


def test_where_sees_every_key_that_jax_reports():
    class Bag(dict):
        pass

    jax.tree_util.register_pytree_with_keys(
        Bag, lambda bag: (list(bag.items()), tuple(bag)), lambda keys, values: Bag(zip(keys, values, strict=True))
    )

    class Named(enum.Enum):
        KEY = "k"

    @dataclasses.dataclass(frozen=True)
    class Idx:
        idx: int  # has an attribute that JAX's own keys have, too

    keys = ["local", 3, (1, "t"), Named.KEY, Idx(7)]
    seen = []

    def fn(group):
        bag = Bag({key: jnp.ones(1) * group.rank for key in keys})
        result = average({"bag": [bag]}, group, where=lambda path: seen.append(path) or "local" not in path)
        return [result["bag"][0][key].item() for key in keys]

    assert run_ranks(2, fn) == [[0.0, 0.5, 0.5, 0.5, 0.5], [1.0, 0.5, 0.5, 0.5, 0.5]]
    assert set(seen) == {("bag", 0, key) for key in keys}
    mixed = Bag({"x": [jnp.ones(1), {"y": jnp.ones(1)}]})
    seen.clear()
    average(mixed, Solo(), where=lambda path: seen.append(path) or True)
    assert set(seen) == {("x", 0), ("x", 1, "y")}  # JAX's own keys are what they hold


def test_static_fields_that_cannot_be_compared_are_fine_in_every_call():
    def register(kind, hashable):
        class Static:
            def __init__(self, w, mask):
                self.w, self.mask = w, mask

        def flat(node):
            return (node.w,), node.mask

        if kind == "jax":
            jax.tree_util.register_pytree_node(Static, flat, lambda mask, children: Static(children[0], mask))
        else:
            optree.register_pytree_node(
                Static, flat, lambda mask, children: Static(children[0], mask), namespace=GLOBAL_NAMESPACE
            )
        return Static

    from optree.registry import __GLOBAL_NAMESPACE as GLOBAL_NAMESPACE

    for kind in ("jax", "optree"):
        static = register(kind, hashable=False)

        def fn(group, static=static):
            means = []
            for call in range(3):
                node = static(np.full(2, float(call + group.rank)), np.arange(3))
                result = average({"n": node}, group)["n"]
                assert result.mask is node.mask
                means.append(result.w.tolist())
            averager = periodic(1, group=group)
            state = averager.init({"n": node})
            averager.update({"n": node}, state)
            return means

        assert run_ranks(2, fn) == [[[0.5] * 2, [1.5] * 2, [2.5] * 2]] * 2


@dataclasses.dataclass
class Unregistered:
    w: float


class Rows:
    def to_numpy(self):
        return np.ones(2)


class Foreign:
    def __array__(self):
        return np.ones(2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: io.BytesIO(b"x"),
            r"_io.BytesIO, which holds bytes, as the extra state of a module does \(leave it out",
        ),
        (
            lambda: collections.UserDict(w=1.0),
            r"collections.UserDict, a mapping whose type is not registered \(pass dict",
        ),
        (
            lambda: Unregistered(1.0),
            r"Unregistered, a dataclass that is not registered \(register it with jax.tree_util",
        ),
        ({"w": 1.0}.values, r"dict_values, a view of a dict \(pass list"),
        ({"w": 1.0}.keys, r"dict_keys, a view of a dict \(pass list"),
        (lambda: {1.0, 2.0}, r"set, whose order ranks cannot agree about \(pass a sorted list\)"),
        (lambda: (x for x in "ab"), r"generator, which can be read only once \(pass list"),
        (Rows, r"Rows, which averages as the array that it holds \(pass its to_numpy\(\)\)"),
        (Foreign, r"Foreign, an array of another library \(pass numpy.asarray"),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            r"nested tensor of dtype float32 \(pass list\(leaf.unbind\(\)\)",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            r"(tensor subclass torch.nested.*NestedTensor|nested tensor)",
        ),
        (
            lambda: torch.fx.Proxy(torch.fx.Node(torch.fx.Graph(), "x", "placeholder", "x", (), {})),
            r"torch.fx.proxy.Proxy, which stands for a value while torch.fx records \(average outside of it\)",
        ),
        (lambda: torch.eye(2).to_sparse(), r"sparse_coo tensor of dtype float32 \(pass leaf.to_dense\(\)\)"),
        (lambda: torch.eye(2).to_sparse_csr(), r"sparse_csr tensor of dtype float32 \(pass leaf.to_dense\(\)\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
def test_what_cannot_be_averaged_says_what_to_do(make, words):
    with pytest.raises(TypeError, match=r"params_tree\['x'\] is a (.*\.)?" + words) as caught:
        average({"x": make(), "w": 1.0}, Solo())
    assert "Please" not in str(caught.value)
    assert "issue" not in str(caught.value)

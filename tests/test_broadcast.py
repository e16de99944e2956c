"""Starting alike: every leaf of the root, bit for bit, on every rank."""

import os
import struct
import warnings
from collections import OrderedDict
from functools import partial

import ml_dtypes
import numpy as np
import optree
import pytest
from helpers import mpi
from helpers.frameworks import dist, jax, jnp, torch
from helpers.processes import run_processes
from helpers.trees import bits, build, memory, plant, raw_memory, refs_of, same_containers, trees
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from funcavg import TreeMismatchError, average, broadcast, differences, stacked
from funcavg.collectives import Solo, as_collective
from funcavg.testing import run_ranks

leaves = optree.tree_leaves


def from_root(trees_of_ranks, root=0, **options):
    """Broadcast over as many threads; return every rank's result."""
    return run_ranks(
        len(trees_of_ranks), lambda group: broadcast(trees_of_ranks[group.rank], group, root=root, **options)
    )


def refused(trees_of_ranks, kind, **options):
    """Return the words in which all ranks refuse."""

    def fn(group):
        options_here = {name: value(group.rank) if callable(value) else value for name, value in options.items()}
        with pytest.raises(kind) as caught:
            broadcast(trees_of_ranks[group.rank], group, **options_here)
        assert average(1.0, group) == 1.0  # the group is as good as before
        return str(caught.value)

    (words,) = set(run_ranks(len(trees_of_ranks), fn))
    return words


# Every leaf


@settings(max_examples=100, deadline=None)
@given(tree=trees(), root=st.integers(0, 2))
def test_trees_of_any_kind_become_the_roots(tree, root):
    planted = [plant(tree, rank) for rank in range(3)]
    sizes = [np.prod(np.shape(build(ref.spec, 0))) for ref in refs_of(tree)]
    assume(not sizes or any(sizes))
    before = [[raw_memory(leaf) for leaf in leaves(one)] for one in planted]
    results = from_root(planted, root)
    assert [[raw_memory(leaf) for leaf in leaves(one)] for one in planted] == before
    for rank, result in enumerate(results):
        assert same_containers(result, planted[rank])
        for got, own, wanted in zip(leaves(result), leaves(planted[rank]), leaves(planted[root]), strict=True):
            assert type(got) is type(own)
            assert bits(got) == bits(wanted)
            here, there = memory(got), memory(own)
            assert not (here and there) or here[1] <= there[0] or there[1] <= here[0]


@settings(max_examples=50, deadline=None)
@given(tree=trees(), root=st.integers(0, 1))
def test_donated_trees_are_written_in_place(tree, root):
    assume(all(ref.spec.donatable for ref in refs_of(tree)))
    sizes = [np.prod(np.shape(build(ref.spec, 0))) for ref in refs_of(tree)]
    assume(not sizes or any(sizes))
    planted = [plant(tree, rank) for rank in range(2)]
    wanted = [bits(leaf) for leaf in leaves(planted[root])]
    with torch.no_grad():
        results = run_ranks(2, lambda group: donated(planted[group.rank], group, root))
    for result, own in zip(results, planted, strict=True):
        assert [bits(leaf) for leaf in leaves(result)] == wanted
        arrays = (np.ndarray, torch.Tensor)
        pairs = zip(leaves(result), leaves(own), strict=True)
        assert all(got is leaf for got, leaf in pairs if isinstance(leaf, arrays))


def donated(tree, group, root):
    with torch.no_grad():
        return broadcast(tree, group, root=root, donate=True)


FLOATS = [
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "float4_e2m1fn",
]


@pytest.mark.parametrize("name", [*FLOATS, "int4", "uint2", "bool", "uint64", "longdouble", "complex128"])
def test_every_bit_of_every_dtype(name):
    """All patterns of 8 bits, NaNs with payloads among them; of wider dtypes, many."""
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    patterns = (
        np.arange(256, dtype=np.uint8) if dtype.itemsize == 1 else np.random.default_rng(0).integers(0, 256, 4096)
    )
    patterns = patterns.astype(np.uint8) & (1 if name == "bool" else 255)
    value = patterns.view(dtype) if name != "longdouble" else np.array([np.pi, -np.nan, np.inf], dtype) / 3
    for result in from_root([np.zeros_like(value), value], root=1):
        assert result.dtype == dtype
        assert bits(result) == bits(value)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float32", "int8", "uint16", "complex64", "bool"])
@pytest.mark.parametrize("layout", ["plain", "turned", "conjugated", "negated"])
def test_tensors_of_any_dtype_and_view(name, layout):
    dtype = getattr(torch, name)
    raw = (torch.arange(96 * 3) % (2 if name == "bool" else 256)).to(torch.uint8)
    value = raw.view(dtype).view(4, -1)
    if layout == "turned":
        value = value.t()
    elif layout == "conjugated":
        value = value.conj()
    elif layout == "negated" and dtype.is_complex:
        value = value.conj().imag
    for root in (0, 1):
        for result in from_root([value if rank == root else torch.zeros_like(value) for rank in range(2)], root):
            assert bits(result) == bits(value.resolve_conj().resolve_neg())
            assert result.shape == value.shape


def test_other_arrays_of_numpys():
    record = np.dtype([("x", "<i4"), ("y", "<f8"), ("flag", "?")])
    tree = {
        "time": np.array(["2024-02-29"], "M8[ns]"),
        "text": np.array(["ä", "longer"]),
        "record": np.array([(1, 2.5, True)] * 3, record),
        "raw": np.array([b"\x00\x01\x02"], "V3"),
        "swapped": np.arange(3, dtype=">i4"),
        "pairs": np.array([1 + 2j], ">c8"),
    }
    other = {name: np.zeros_like(leaf) for name, leaf in tree.items()} | {"swapped": np.zeros(3, "<i4")}
    result = from_root([tree, other])[1]
    for name, leaf in tree.items():
        assert result[name].tolist() == leaf.tolist(), name
        assert result[name].dtype == other[name].dtype


def test_numbers():
    tree = {"true": True, "most": 2**64 - 1, "least": -(2**63), "f": float("nan"), "c": -0.0 + 1j, "n": np.int16(-3)}
    tree["nan"] = struct.unpack("<d", struct.pack("<Q", 0x7FF8DEADBEEF0001))[0]
    other = {name: type(leaf)(0) for name, leaf in tree.items()}
    result = from_root([other, tree], root=1)[0]
    assert [type(leaf) for leaf in result.values()] == [type(leaf) for leaf in tree.values()]
    assert (result["true"], result["most"], result["least"], result["n"]) == (True, 2**64 - 1, -(2**63), -3)
    assert struct.pack("<dd", result["f"], result["nan"]) == struct.pack("<dd", tree["f"], tree["nan"])
    assert str(result["c"]) == str(tree["c"])


def test_keys_and_arrays_of_jax():
    def tree_of(seed):
        return {
            "key": jax.random.key(seed),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 3),
            "old": jax.random.PRNGKey(seed),
            "int4": jnp.arange(5, dtype=jnp.int4) + seed,
            "bool": jnp.arange(3) > seed,
            "weak": jnp.asarray(1.0 * seed),
            "nan": jnp.array([0x7FC00000 + seed], jnp.uint32).view(jnp.float32),
            "none": jnp.zeros((0, 3)),
        }

    for result in from_root([tree_of(1), tree_of(2)], root=1):
        for (name, got), wanted in zip(result.items(), tree_of(2).values(), strict=True):
            assert isinstance(got, jax.Array), name
            assert (got.dtype, got.shape, getattr(got, "weak_type", 0)) == (
                *(wanted.dtype, wanted.shape),
                getattr(wanted, "weak_type", 0),
            )
            read = jax.random.key_data if "key" in name else np.asarray
            assert bits(np.asarray(read(got))) == bits(np.asarray(read(wanted))), name
        assert jax.random.normal(result["key"]) == jax.random.normal(jax.random.key(2))


def test_what_has_no_bits_is_refused_on_every_rank():
    assert "rank 1: 1 of 1 leaves cannot be taken as bits: params_tree is a str: 'sgd'" in refused(
        [1.0, "sgd"], TypeError
    )
    words = refused([{"n": 0}, {"n": 2**64}], TypeError)
    assert "params_tree['n'] is a int that needs more than 64 bits: 18446744073709551616" in words
    assert refused([{"n": 2**64 - 1}, {"n": -(2**63) - 1}], TypeError)
    assert "are objects" in refused([np.array([None])] * 2, TypeError)
    assert "in another byte order" in refused([np.zeros(2, ">U3")] * 2, TypeError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to have no such tensors one day
        quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    assert "quantised" in refused([quantised] * 2, TypeError)
    assert "nn.Module" in refused([torch.nn.Linear(1, 1)] * 2, TypeError)


# As average keeps trees


def test_parameters_ties_and_attributes_are_kept():
    def tree_of(rank):
        shared = torch.nn.Parameter(torch.full((3,), float(rank)))
        state = OrderedDict(a=shared, b=shared, steps=torch.tensor(rank))
        state._metadata = {"version": 1}
        return state

    for result in from_root([tree_of(0), tree_of(1)], root=1):
        assert result["a"] is result["b"]
        assert isinstance(result["a"], torch.nn.Parameter)
        assert result["a"].requires_grad
        assert result["a"].is_leaf
        assert result._metadata == {"version": 1}
        assert (result["a"].tolist(), result["steps"].item()) == ([1.0] * 3, 1)


def test_ties_of_one_rank_only():
    one = np.ones(2, int)
    assert from_root([[one, one], [np.zeros(2, int), np.zeros(2, int)]])[1][0].tolist() == [1, 1]
    results = from_root([[np.zeros(2, int), np.ones(2, int)], [one, one]])
    assert results[1][0].tolist() == [0, 0]
    assert results[1][1].tolist() == [1, 1]


def test_memory_formats_are_kept():
    ours, theirs = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.arange(96.0).view(2, 3, 4, 4)
    result = from_root([theirs, ours])[1]
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(result, theirs)


def test_where_leaves_others_as_they_are():
    trees_of_ranks = [{"w": np.ones(2), "name": "run 1"}, {"w": np.zeros(2), "name": "run 2"}]
    results = from_root(trees_of_ranks, where=lambda path: path != ("name",))
    assert [result["name"] for result in results] == ["run 1", "run 2"]
    assert results[1]["w"].tolist() == [1, 1]


def test_optimizers_start_alike():
    def state_of(rank):
        weight = torch.nn.Parameter(torch.full((2,), float(rank)))
        optimizer = torch.optim.Adam([weight], lr=0.1 * (rank + 1))
        weight.square().sum().backward()
        optimizer.step()
        return optimizer.state_dict()

    results = from_root([state_of(1), state_of(2)], where=lambda path: path[-1] != "decoupled_weight_decay")
    assert results[0]["param_groups"][0]["lr"] == results[1]["param_groups"][0]["lr"] == 0.2
    assert torch.equal(results[0]["state"][0]["exp_avg"], results[1]["state"][0]["exp_avg"])
    fresh = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))])
    fresh.load_state_dict(results[1])


def test_alone_and_outside():
    leaf = np.arange(3)
    result = broadcast([leaf], Solo())[0]
    assert result.tolist() == [0, 1, 2]
    assert result is not leaf
    assert broadcast([leaf], Solo(), donate=True)[0] is leaf


# Mistakes


@pytest.mark.parametrize(
    ("root", "kind", "words"),
    [
        (2, ValueError, "root must be a rank of the group, 0 to 1, got 2"),
        (-1, ValueError, "root must be a rank of the group, 0 to 1, got -1"),
        ("first", TypeError, "root must be a rank of the group, got 'first' of type str"),
        (True, TypeError, "root must be a rank of the group, got True of type bool"),
        (1.0, TypeError, "got 1.0 of type float"),
        (None, TypeError, "got None of type NoneType"),
        (np.array([0, 1]), TypeError, "got array([0, 1]) of type ndarray"),
    ],
)
def test_roots_that_are_none(root, kind, words):
    assert words in refused([1.0, 1.0], kind, root=root)
    assert "rank 1: root must be" in refused([1.0, 1.0], kind, root=lambda rank: root if rank else 0)


def test_a_root_may_be_numpys():
    assert from_root([1, 2], root=np.int64(1)) == [2, 2]


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ({"w": np.ones(2)}, {"v": np.ones(2)}, r"params_tree['w']:  rank 0 float64[2],  rank 1 has no such leaf"),
        (np.ones(2, "i4"), np.ones(2, "i8"), "params_tree:  rank 0 int32[2],  rank 1 int64[2]"),
        (np.ones(2, bool), np.ones(3, bool), "params_tree:  rank 0 bool[2],  rank 1 bool[3]"),
        (1, True, "params_tree:  rank 0 int,  rank 1 bool"),
    ],
)
def test_trees_that_differ_are_refused(one, other, words):
    message = refused([one, other], TreeMismatchError)
    assert message.startswith("broadcast: ranks passed trees that do not match")
    assert words in message


def test_masks_that_differ_are_refused():
    words = refused([{"w": 1}] * 2, TreeMismatchError, where=lambda rank: None if rank else (lambda path: False))
    assert "params_tree['w']" in words


def test_another_function_on_another_rank_is_refused():
    def fn(group):
        with pytest.raises(TreeMismatchError) as caught:
            (broadcast, differences, average)[group.rank]({"w": np.ones(2)}, group)
        return str(caught.value).partition(": ")

    heads = run_ranks(3, fn)
    assert [head for head, *_ in heads] == ["broadcast", "differences", "average"]
    assert len({words for *_, words in heads}) == 1
    assert "options:  rank 0 broadcast from rank 0,  rank 1 differences" in heads[0][2]


def test_donation_that_cannot_be():
    broad = np.broadcast_to(np.zeros(1, int), (3,))
    assert "donate=True, but params_tree is a read-only NumPy array" in refused([broad] * 2, ValueError, donate=True)
    lazy = torch.zeros(2, dtype=torch.complex64).conj().imag
    assert "a lazily negated view" in refused([lazy] * 2, ValueError, donate=True)
    overlapping = np.zeros(4, int)
    words = refused([[overlapping[:3], overlapping[1:]]] * 2, ValueError, donate=True)
    assert "overlap in memory" in words


def test_stacked_replicas_have_no_ranks():
    with pytest.raises(TypeError, match="broadcast: over stacked replicas there are no ranks"):
        broadcast(torch.ones(2, 3), stacked())


def under_each(call):
    """Yield ways to call it while something traces or transforms."""
    yield lambda: torch.func.vmap(call)(torch.ones(2, 3))
    yield lambda: torch.func.grad(lambda x: call(x).sum())(torch.ones(3))
    yield lambda: jax.jit(call)(jnp.ones(3))
    yield lambda: jax.vmap(call)(jnp.ones((2, 3)))


def refused_under_each(group):
    found = []
    for function in (broadcast, lambda x, group: differences({"x": x}, group)):
        for way in under_each(partial(function, group=group)):
            with pytest.raises(RuntimeError, match="where leaves have no bits to be read") as caught:
                way()
            found.append(str(caught.value))
            assert broadcast(as_collective(group).rank, group, root=1) == 1
    return found


def test_refused_while_something_traces():
    pytest.importorskip("jax")
    assert len(run_ranks(2, refused_under_each)[0]) == 8


def in_a_process(rank):
    from torch.fx.experimental.proxy_tensor import make_fx

    def recorded(call):
        return make_fx(lambda x: call(x))  # noqa: PLW0108  # it counts the arguments of what it is given

    for call in (broadcast, differences):  # not in threads, of which only one can record
        with pytest.raises(RuntimeError, match="called under make_fx, or torch.export, where leaves have no bits"):
            recorded(call)(torch.ones(3))
    return refused_under_each(dist.group.WORLD)


def test_refused_while_something_traces_in_processes():
    pytest.importorskip("jax")
    one, other = run_processes(2, in_a_process)
    assert one == other


def test_gradients_end_there():
    """Outside of transforms it makes new leaves, whatever is recorded."""
    weight = torch.ones(2, requires_grad=True)
    result = from_root([weight * 2, weight * 3])[1]
    assert result.is_leaf
    assert result.requires_grad


# Over an axis of JAX's


@pytest.mark.parametrize("compiled", [False, True])
def test_over_an_axis(compiled):
    def fn(rank):
        tree = {
            "f": jnp.stack([rank * -0.0, jnp.float32(jnp.nan)]),
            "h": rank.astype(jnp.bfloat16),
            "tiny": rank.astype(jnp.float8_e5m2),
            "i": rank.astype(jnp.int8),
            "b": rank > 1,
            "c": rank + 1j * rank,
            "four": rank.astype(jnp.int4),
            "key": jax.random.key(rank),
            "n": 3,
            "none": None,
        }
        return broadcast(tree, "ranks", root=2)

    mapped = jax.vmap(
        fn,
        axis_name="ranks",
        out_axes={**dict.fromkeys(["f", "h", "tiny", "i", "b", "c", "four", "key", "none"], 0), "n": None},
    )
    result = (jax.jit(mapped) if compiled else mapped)(jnp.arange(4))
    assert result["f"].view(jnp.uint32).tolist() == [[0x80000000, 0x7FC00000]] * 4
    for name, wanted in {"h": 2, "tiny": 2, "i": 2, "b": True, "c": 2 + 2j, "four": 2}.items():
        assert result[name].tolist() == [wanted] * 4, name
    assert (jax.random.key_data(result["key"]) == jax.random.key_data(jax.random.key(2))).all()
    assert result["n"] == 3


def test_over_an_axis_arrays_of_numpys_stay_as_they_are():
    wide = np.array([2**40 + 1, 5])
    result = jax.vmap(lambda r: broadcast({"x": wide, "r": r}, "d", root=1)["r"], axis_name="d")(jnp.arange(2))
    assert result.tolist() == [1, 1]
    kept = []
    jax.vmap(lambda r: kept.append(broadcast({"x": wide, "r": r}, "d")["x"]) or r, axis_name="d")(jnp.arange(2))
    assert kept[0] is wide


def test_over_an_axis_with_a_wrong_root():
    with pytest.raises(ValueError, match="broadcast: root must be a rank of the axis, 0 to 3, got 4"):
        jax.vmap(lambda x: broadcast(x, "ranks", root=4), axis_name="ranks")(jnp.arange(4))
    with pytest.raises(ValueError, match="broadcast: group='ranks' is an axis name, but no such axis is bound here"):
        broadcast(jnp.arange(4), "ranks")


# Several hosts


HOSTS = [["a", "b"], ["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"], ["a", "a", "b", "b"], ["a", "b", "a", "b"]]


def large_tree(rank):
    rng = np.random.default_rng(rank)
    return [rng.integers(0, 256, 9_000_001, np.uint8), np.arange(5.0) + rank, rng.normal(size=(999, 301)).T, rank]


def over_hosts(group, names, barrier):
    collective = as_collective(group)
    os.environ["FUNCAVG_NODE"] = names[collective.rank]
    sent = []
    for root in range(collective.size):
        for donate in (False, True):
            tree, before = large_tree(collective.rank), collective.bytes_sent
            result = broadcast(tree, group, root=root, donate=donate)
            sent.append((root, collective.bytes_sent - before))
            assert list(map(bits, result)) == list(map(bits, large_tree(root))), (root, donate)
            assert donate or list(map(bits, tree)) == list(map(bits, large_tree(collective.rank)))
    assert average(float(collective.rank), group) == (collective.size - 1) / 2
    barrier()
    return sent[2:]  # the first call has looked for hosts


def over_gloo(rank, names):
    return over_hosts(dist.group.WORLD, names, dist.barrier)


def over_mpi(comm, names):
    return over_hosts(comm, names, comm.Barrier)


@pytest.mark.parametrize("names", HOSTS, ids="".join)
def test_hosts_over_gloo(names):
    check_bytes(run_processes(len(names), over_gloo, names), names)


@pytest.mark.mpi
@pytest.mark.parametrize("names", [["a", "b", "c"], ["a", "a", "b", "b"], ["a", "b", "a", "b"]], ids="".join)
def test_hosts_over_mpi(names):
    check_bytes(mpi.run_mpi(len(names), over_mpi, names), names)


def check_bytes(ranks, names):
    """Nobody sends more than twice the bytes to other hosts, and to its own as often as there are others in it."""
    nbytes = sum(np.asarray(leaf).nbytes for leaf in large_tree(0)[:3])
    for rank, calls in enumerate(ranks):
        neighbours = names.count(names[rank]) - 1
        for root, sent in calls:
            in_memory = neighbours * nbytes
            limit = (2 * nbytes + in_memory) if names[root] == names[rank] else nbytes + in_memory
            assert sent <= 1.02 * limit + 4000, (rank, root)

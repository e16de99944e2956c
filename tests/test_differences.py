"""Staying alike: which leaves are not the same bits on all ranks."""

import os
import struct

import ml_dtypes
import numpy as np
import optree
import pytest
from helpers import mpi
from helpers.frameworks import dist, jax, jnp, torch
from helpers.processes import run_processes
from helpers.trees import bits, plant, trees
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from funcavg import TreeMismatchError, average, broadcast, differences, stacked
from funcavg._engine.digests import Digest, digests_of
from funcavg._trees import Options, flatten, make_request
from funcavg.collectives import Solo, as_collective
from funcavg.testing import run_ranks


def between(*trees_of_ranks, **options):
    """Return the differences, which are the same on every rank."""
    found = run_ranks(len(trees_of_ranks), lambda group: differences(trees_of_ranks[group.rank], group, **options))
    assert all(names == found[0] for names in found)
    return found[0]


def digest_of(leaf):
    (digest,) = digests_of(make_request(flatten(leaf), Options(purpose="differences")))
    return digest


# What is different


@settings(max_examples=100, deadline=None)
@given(tree=trees(), odd=st.integers(0, 2))
def test_any_tree_differs_where_its_bits_do(tree, odd):
    """Against bits taken one by one. Two ranks have the same tree, the third another."""
    planted = [plant(tree, 5 + (rank == odd)) for rank in range(3)]
    leaves = [optree.tree_leaves(one) for one in planted]
    assume(not leaves[0] or any(np.size(leaf) for leaf in leaves[0]))
    places = [accessor.codify("params_tree") for accessor in optree.tree_accessors(planted[0])]
    on = "ranks 1 and 2" if odd == 0 else f"rank {odd}"
    wanted = [f"{name} on {on}" for name, *row in zip(places, *leaves, strict=True) if len(set(map(bits, row))) > 1]
    assert between(*planted) == wanted


@pytest.mark.parametrize("count", [1, 7, 1023, 1024, 8192, 8193, 70_000, 300_001])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_a_single_bit_anywhere(count, width):
    ours = np.random.default_rng(count).integers(0, 256, count * width, np.uint8)
    rng = np.random.default_rng(width)
    for place in {0, len(ours) - 1, *rng.integers(0, len(ours), 5).tolist()}:
        theirs = ours.copy()
        theirs[place] ^= 1 << rng.integers(8)
        assert digest_of(ours.view(f"u{width}")) != digest_of(theirs.view(f"u{width}"))


def test_changes_that_sums_would_miss():
    """Pairs of sign flips, swapped elements, moved blocks, and lengths that differ only in zeros."""
    ours = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    changed = []
    for one, other in [(1, 3), (0, 2), (1, 16385), (5, 5 + 2 * 8192), (0, 99_999)]:
        flipped, swapped = ours.copy(), ours.copy()
        flipped[[one, other]] *= -1
        swapped[[one, other]] = swapped[[other, one]]
        changed += [flipped, swapped]
    changed += [np.roll(ours, 2 * 8192), np.roll(ours, 1), ours[::-1].copy(), -ours]
    digests = {digest_of(leaf) for leaf in [ours, *changed]}
    assert len(digests) == 1 + len(changed)
    zeros = {digest_of(np.zeros(n, np.uint8)) for n in [1, 7, 8, 8192, 65536, 65537, 131072, 1 << 20]}
    assert len(zeros) == 8


def test_no_two_of_many_digests_are_equal():
    """200 000 leaves of few bits: a hash of 40 bits would have a collision with a chance of 98 %."""
    rows = np.zeros((200_000, 9), np.uint8)
    rows[:, :8] = np.arange(200_000, dtype="<u8")[:, None].view(np.uint8)
    found = set()
    for row in rows:
        digest = Digest()
        digest.update(row)
        found.add(digest.digest())
    assert len(found) == 200_000


def test_digests_stay_what_they_are():
    """Ranks may run other releases of what funcavg is built on."""
    data = np.arange(1 << 20, dtype=np.uint32).view(np.uint8)
    found = {}
    for length in (0, 5, 9_000, 70_000, 1 << 20, (1 << 22) - 3):
        digest = Digest()
        digest.update(data[:length])
        found[length] = digest.digest().hex()
    assert found == FOUND


FOUND = {
    0: "ca08ea5bca49cc18",
    5: "d36cf7eb300f45b5",
    9_000: "fb46dedd1f5c3c5f",
    70_000: "6212444c5f2990ae",
    1 << 20: "8c2ad1c813c81ac2",
    (1 << 22) - 3: "99bfaee616517f4f",
}


def test_signs_of_zero_and_payloads_count():
    payload = struct.unpack("<d", struct.pack("<Q", 0x7FF8DEADBEEF0001))[0]
    assert between([0.0, float("nan")], [-0.0, float("nan")]) == ["params_tree[0] on rank 1"]
    assert between(float("nan"), payload) == ["params_tree on rank 1"]
    assert between(payload, payload) == []


def test_memory_formats_and_byte_orders_do_not():
    values = np.arange(2 * 3 * 20 * 20, dtype=np.float32).reshape(2, 3, 20, 20)
    tensor = torch.from_numpy(values)
    spaced = torch.zeros(2, 3, 20, 40)[..., ::2].copy_(tensor)
    same = [
        *(values, np.asfortranarray(values), values.astype(">f4"), values[::-1].copy()[::-1], jnp.asarray(values)),
        *(tensor, tensor.to(memory_format=torch.channels_last), spaced, torch.nn.Parameter(tensor)),
    ]
    assert between(*same) == []
    broad = np.broadcast_to(np.float32(3), (700, 900))
    assert between(broad, broad.copy(), np.full((900, 700), 3, np.float32).T) == []
    read_only = np.arange(5)
    read_only.setflags(write=False)
    assert between(read_only, np.arange(5)) == []


def test_padding_of_long_doubles_does_not():
    one, other = (np.full(3 * 16, fill, np.uint8).view(np.longdouble) for fill in (0, 255))
    for value in (one, other):
        value[...] = np.longdouble(1) / 3
    assert between(one, other) == []
    other[2] = 1
    assert between(one, other) == ["params_tree on rank 1"]
    assert between(one + 0j, one + 0j) == []
    assert between(one + 0j, other + 0j) == ["params_tree on rank 1"]


def test_every_kind_of_leaf():
    def tree_of(rank):
        return {
            "key": jax.random.key(rank),
            "bits": np.array([rank], np.uint64),
            "float8": np.array([rank], ml_dtypes.float8_e5m2),
            "text": np.array([str(rank)]),
            "flag": rank > 0,
            "number": 2**63 + rank,
            "fraction": 0.5 * rank,
            "tensor": torch.tensor([rank], dtype=torch.bfloat16),
            "none": None,
            "empty": np.zeros((0, 3)),
        }

    names = sorted(set(tree_of(0)) - {"none", "empty"})
    assert between(tree_of(0), tree_of(1)) == [f"params_tree['{name}'] on rank 1" for name in names]
    assert between(tree_of(1), tree_of(1)) == []


def test_names_come_in_the_trees_order_with_all_ranks_that_differ():
    trees_of_ranks = [{"b": float(rank > 2), "a": [0, rank], "c": rank in (1, 4)} for rank in range(6)]
    assert between(*trees_of_ranks) == [
        "params_tree['a'][1] on ranks 1-5",
        "params_tree['b'] on ranks 3-5",
        "params_tree['c'] on ranks 1 and 4",
    ]


def test_thousands_of_leaves_in_several_pieces():
    ours = {f"{i:04}": i for i in range(9000)}
    theirs = ours | {"0000": -1, "4095": -1, "4096": -1, "8999": -1}
    names = [f"params_tree['{name}'] on rank 1" for name in ("0000", "4095", "4096", "8999")]
    assert between(ours, theirs) == names


def test_where_looks_at_some():
    assert between({"w": 1, "name": "x"}, {"w": 1, "name": "y"}, where=lambda path: path == ("w",)) == []


def test_tied_leaves_are_read_once(monkeypatch):
    read = []
    update = Digest.update
    monkeypatch.setattr(Digest, "update", lambda self, data: read.append(len(data)) or update(self, data))
    leaf = np.arange(1000.0)
    assert len(set(digests_of(make_request(flatten([leaf, leaf, leaf + 0]), Options(purpose="differences"))))) == 1
    assert read == [8000, 8000]


# Around it


def test_other_structures_are_refused():
    def fn(group):
        with pytest.raises(TreeMismatchError, match="differences: ranks passed trees that do not match") as caught:
            differences({"w": np.zeros(2 + group.rank)}, group)
        assert differences(3, group) == []
        return str(caught.value)

    one, other = run_ranks(2, fn)
    assert one == other
    assert "rank 0 float64[2],  rank 1 float64[3]" in one


def test_alone_over_axes_and_over_replicas():
    assert differences({"w": np.ones(2)}, Solo()) == []
    with pytest.raises(TypeError, match="can be taken|cannot be taken as bits: params_tree is a str"):
        differences("text", Solo())
    with pytest.raises(ValueError, match="differences: group='ranks' is an axis name"):
        differences(jnp.ones(2), "ranks")
    with pytest.raises(TypeError, match="differences: over stacked replicas there are no ranks"):
        differences(torch.ones(2, 3), stacked())


def in_step(group, barrier):
    """Digests over each transport, and the group goes on."""
    rank = as_collective(group).rank
    tree = {"w": np.arange(100_000.0), "n": [0] * 300}
    for node in ("one", "off"):
        os.environ["FUNCAVG_NODE"] = node
    before = as_collective(group).bytes_sent
    assert differences(tree, group) == []
    tree["w"][-1] += rank == 1
    assert differences(tree, group) == ["params_tree['w'] on rank 1"]
    mended = broadcast(tree, group)
    assert differences(mended, group) == []
    assert average(float(rank), group) == 0.5
    barrier()
    return as_collective(group).bytes_sent - before


def over_gloo(rank, node):
    os.environ["FUNCAVG_NODE"] = node
    return in_step(dist.group.WORLD, dist.barrier)


def over_mpi(comm):
    return in_step(comm, comm.Barrier)


@pytest.mark.parametrize("node", ["one", "off"])
def test_over_gloo(node):
    run_processes(2, over_gloo, node)


@pytest.mark.mpi
def test_over_mpi():
    mpi.run_mpi(2, over_mpi)


def test_changes_of_high_bits_in_two_rows_do_not_cancel():
    """Signs of the last element of a word, and of two in the word below it; found by review of an earlier digest."""
    ours = np.random.default_rng(0).normal(size=(16, 16384)).astype(np.float32)
    theirs = ours.copy()
    theirs[0, 5] *= -1
    theirs[1, 4:6] *= -1
    assert between(ours, theirs) == ["params_tree on rank 1"]
    words = np.random.default_rng(1).integers(0, 2**63, (2, 8192), np.uint64)
    for one in range(0, 64, 3):
        for others in ((one, one - 32), (one,), (one, (one + 29) % 64)):
            changed = words.copy()
            changed[0] ^= np.uint64(1) << np.uint64(one)
            for bit in others:
                changed[1] ^= np.uint64(1) << np.uint64(bit % 64)
            assert digest_of(changed) != digest_of(words)


def test_units_of_scalars_are_part_of_the_agreement():
    for unit in ("s", "ms"):
        assert between(np.timedelta64(3, unit), np.timedelta64(3, unit)) == []

    def fn(group):
        with pytest.raises(TreeMismatchError):
            broadcast(np.timedelta64(90, ("s", "ms")[group.rank]), group)
        return True

    assert run_ranks(2, fn) == [True, True]

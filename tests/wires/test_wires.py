"""What `average` promises with a wire, over threads, which count as hosts, and between hosts of ranks' making."""

import contextlib
import logging
import math
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from helpers.frameworks import dist, jax, torch
from helpers.kernels import PYTHON, library_or_skip, using
from helpers.late import Late
from helpers.processes import run_processes

import funcavg
from funcavg import PeerLostError, TreeMismatchError, _points, average, start_average
from funcavg._engine.buckets import Slots, bucket_bytes, host_memory, make_plan
from funcavg._engine.codes import codes_of
from funcavg._trees import Options, flatten, make_request
from funcavg.cli import trees
from funcavg.testing import run_ranks
from funcavg.wires.codecs import NAMES, codec_of

BYTES = {"bfloat16": 2, "int8": 1 + 4 / 256, "int4": 0.5 + 4 / 1024, "int2": 0.25 + 4 / 1024}  # of an element
# Error of the mean of two ranks and more: that of what they send, and that of the mean.
GAUSS = {"bfloat16": 1e-5, "int8": 1.1e-4, "int4": 2.2e-2, "int2": 0.30}
HEAVY = {"bfloat16": 1e-5, "int8": 8e-4, "int4": 2.2e-2, "int2": 0.30}
FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def gauss(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape or (5000,)).astype(dtype)


def heavy(seed, rows=32):
    """Student's t with 3 degrees of freedom, in rows whose scales are those of many layers, alike on all ranks."""
    rng, scales = np.random.default_rng(seed), np.exp(np.random.default_rng(99).normal(0, 1, (rows, 1)))
    return (rng.standard_t(3, (rows, 1024)) * scales).astype(np.float32)


def tree_of(rank):
    return {
        "large": gauss(rank, 300, 1024),  # has buckets of its own
        "small": [gauss(100 + rank, n) for n in (1, 31, 64, 700, 5000)],
        "half": gauss(200 + rank, 3000, dtype=np.float16),
        "double": gauss(300 + rank, 100, dtype=np.float64),
        "complex": gauss(400 + rank, 600).astype(np.complex64),
        "count": 7,
    }


def leaves_of(tree):
    return [np.asarray(leaf) for leaf in flatten(tree).leaves]


def bits_of(tree):
    return b"".join(leaf.tobytes() for leaf in leaves_of(tree))


def error_of(results, rows, weights=None):
    """Return ‖result - mean‖² / ‖mean‖²."""
    rows = np.stack([np.asarray(row, np.float64).ravel() for row in rows])
    mean = np.average(rows, axis=0, weights=weights)
    return ((np.asarray(results, np.float64).ravel() - mean) ** 2).sum() / (mean**2).sum()


def averaged(size, trees_of_ranks, **options):
    """Return the result, which all of so many threads must have got in the same bits."""
    results = run_ranks(size, lambda group: average(trees_of_ranks[group.rank], group, **options))
    assert len({bits_of(result) for result in results}) == 1
    return results[0]


# 1. How many bytes


@pytest.mark.parametrize("wire", NAMES)
@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_a_resnet_takes_the_bytes_of_the_table(wire, size):
    shapes = [leaf.shape for leaf in trees.read("resnet50", None).leaves.values()]
    assert len(shapes) == 161
    layout = make_request(flatten([np.empty(shape, np.float32) for shape in shapes]), Options()).layout
    limit = bucket_bytes(size)
    rows = list(zip(range(161), layout.families, layout.leaves, strict=True))
    plan = make_plan(rows, size, Slots(host_memory, limit), limit)
    codes = codes_of(codec_of(wire), plan, range(size))
    assert len(codes) == len(plan)
    assert size * sum(code.width for code in codes.values()) <= 1.06 * BYTES[wire] * sum(map(math.prod, shapes))


@pytest.mark.parametrize("wire", NAMES)
def test_numbers_alone_cost_no_more_than_without(wire):
    tree = [np.float32(k) / 3 for k in range(400)]

    def sent(group, wire):
        result = average(tree, group, wire=wire)
        if wire != "bfloat16":
            assert result == tree  # they are their own code
        return group.bytes_sent

    assert max(run_ranks(2, lambda group: sent(group, wire))) <= max(run_ranks(2, lambda group: sent(group, None)))


@pytest.mark.parametrize("wire", NAMES)
def test_what_is_sent_is_counted(wire):
    def sent(group):
        average(gauss(group.rank, 300_000), group, wire=wire)
        return group.bytes_sent

    for size in (2, 4):
        expected = 2 * (size - 1) / size * 300_000 * BYTES[wire]
        assert run_ranks(size, sent)[0] == pytest.approx(expected, rel=0.01)


# The mean


@pytest.mark.parametrize("wire", NAMES)
def test_the_error_of_the_mean_does_not_grow_with_the_number_of_ranks(wire):
    found = {}
    for size in (2, 8, 32):
        for make, most in ((lambda seed: gauss(seed, 1 << 15), GAUSS), (heavy, HEAVY)):
            rows = [make(1000 * size + rank) for rank in range(size)]
            found[size, make is heavy] = error = error_of(averaged(size, rows, wire=wire), rows)
            assert error <= most[wire]
    for kind in (False, True):
        assert found[32, kind] <= 1.6 * found[2, kind]


def reference(wire, hosts, count):
    """Return the mean of hosts' means, which cross in ``count`` rows: row k is summed by host ``k % len(hosts)``."""
    length, size = len(hosts[0]) // count, len(hosts)
    coder = codec_of(wire).coder(np.array([[0, length]]))

    def through(row, *, mean):
        code, result = np.empty(coder.width, np.uint8), np.empty(length, np.float32)
        coder.encode(row, code, mean=mean)
        coder.decode(code, result, 3e38, mean=mean)
        return result

    means = []
    for k in range(count):
        rows = [host[k * length : (k + 1) * length] for host in hosts]
        rows = [row if i == k % size else through(row, mean=False) for i, row in enumerate(rows)]
        mean = (sum(row.astype(np.float64) for row in rows) / size).astype(np.float32)
        means.append(through(mean, mean=True))
    return np.concatenate(means)


@pytest.mark.parametrize("wire", NAMES)
@pytest.mark.parametrize("kernel", ["C", PYTHON])
def test_a_rank_sends_its_code_and_averages_its_own_row_as_it_is(wire, kernel):
    """Two ranks and one leaf, from the codec alone: what each decodes and sums, and the code of that."""
    pair = [gauss(1, 6000), gauss(2, 6000)]
    with using(library_or_skip() if kernel == "C" else None):
        assert averaged(2, pair, wire=wire).tobytes() == reference(wire, pair, 2).tobytes()


@pytest.mark.parametrize("wire", NAMES)
@pytest.mark.parametrize("size", [2, 3])
def test_a_tree_of_all_kinds(wire, size):
    given = [tree_of(rank) for rank in range(size)]
    result, exact = averaged(size, given, wire=wire), averaged(size, given)
    assert result["count"] == 7
    assert result["double"].tobytes() == exact["double"].tobytes()
    if wire == "bfloat16":
        assert result["half"].tobytes() == exact["half"].tobytes()
    small = 1.1e-4 if wire != "bfloat16" else 1e-5  # fewer than 32 elements of a row go as int8
    for k, leaf in enumerate(result["small"]):
        most = small if leaf.size <= 31 else GAUSS[wire] * (1 if leaf.size > 2000 else 2)
        assert error_of(leaf, [tree["small"][k] for tree in given]) <= most
    for name in ("large", "half"):
        assert error_of(result[name], [tree[name] for tree in given]) <= GAUSS[wire]
    assert error_of(result["complex"].real, [tree["complex"].real for tree in given]) <= 2 * GAUSS[wire]


# 2. What is exact


@pytest.mark.parametrize("wire", NAMES)
def test_what_no_wire_touches(wire):
    exactly = {"double": np.float64, "long": np.longdouble, "eight": ml_dtypes.float8_e4m3fn}
    if wire == "bfloat16":
        exactly |= {"half": np.float16, "brain": ml_dtypes.bfloat16}
    given = [{k: gauss(rank, 3000).astype(d) for k, d in exactly.items()} | {"n": np.arange(9)} for rank in range(3)]
    wired, exact = (run_ranks(3, lambda group: average(given[group.rank], group, wire=w)) for w in (wire, None))
    for rank in range(3):  # a longdouble's padding is anything
        assert all(map(np.array_equal, leaves_of(wired[rank]), leaves_of(exact[rank])))
    alone = gauss(1)
    assert averaged(1, [alone], wire=wire).tobytes() == alone.tobytes()


@pytest.mark.parametrize("wire", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_are_decoded_in_float32_and_rounded_once(wire, dtype):
    narrow = [gauss(rank, 4096).astype(FLOATS[dtype]) for rank in range(2)]
    wide = averaged(2, [row.astype(np.float32) for row in narrow], wire=wire)
    assert averaged(2, narrow, wire=wire).tobytes() == wide.astype(FLOATS[dtype]).tobytes()


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_finite_comes_back_finite(wire, dtype):
    largest = float(ml_dtypes.finfo(FLOATS[dtype]).max)
    rows = [(np.clip(gauss(rank, 4096), -1, 1) * np.float32(largest)).astype(FLOATS[dtype]) for rank in range(2)]
    assert np.isfinite(averaged(2, rows, wire=wire).astype(np.float64)).all()


# 3. Numbers that are none


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_spoils_its_block_and_nothing_else(wire, bad):
    block = 256 if wire == "int8" else 1024
    given = [gauss(rank, 8 * 1024) for rank in range(2)]
    clean = averaged(2, given, wire=wire)
    given[1] = given[1].copy()
    given[1][3 * block + 5] = bad  # in the other rank's row, and in its own
    spoilt = averaged(2, given, wire=wire)
    inside = slice(3 * block, 4 * block)
    assert np.isnan(spoilt[inside]).all()
    spoilt[inside] = clean[inside]
    assert spoilt.tobytes() == clean.tobytes()


# 4. Agreement


def raised(fn):
    try:
        fn()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("other", [None, "int4"])
def test_ranks_that_differ_in_the_wire_all_hear_of_both(other):
    def differ(group):
        found = raised(lambda: average(gauss(1), group, wire="int8" if group.rank == 0 else other))
        return found, average(np.float32(group.rank), group, wire="int8")  # the group stays usable

    outcomes = run_ranks(3, differ)
    (kind, words), _ = outcomes[0]
    assert kind is TreeMismatchError
    assert "rank 0 without weight, over wire int8" in words
    assert f"rank 1 without weight, over {'no wire' if other is None else 'wire int4'}" in words
    assert [found for found, _ in outcomes] == [(kind, words)] * 3
    assert all(abs(mean - 1) < 0.01 for _, mean in outcomes)


@pytest.mark.parametrize("begin", [average, lambda *given, **options: start_average(*given, **options).wait()])
@pytest.mark.parametrize("wrong", ["int3", "INT8", "", 8, object()])
def test_an_unknown_wire_is_raised_by_every_rank_alike(begin, wrong):
    def mistaken(group):
        found = raised(lambda: begin(gauss(1), group, wire=wrong if group.rank == 1 else "int8"))
        return found, average(np.float32(group.rank), group)

    outcomes = run_ranks(3, mistaken)
    (kind, words), _ = outcomes[0]
    assert kind is (ValueError if isinstance(wrong, str) else TypeError)
    assert "rank 1: wire must be one of 'bfloat16', 'int8', 'int4', 'int2'" in words
    assert repr(wrong) in words
    assert [found for found, _ in outcomes] == [(kind, words)] * 3
    assert [mean for _, mean in outcomes] == [1.0] * 3


# 6. As without


@pytest.mark.parametrize("wire", NAMES)
def test_weights(wire):
    rows = [gauss(rank, 4096) for rank in range(3)]
    weights = [1.0, 0.0, 2.5]

    def weighted(group):
        row = rows[group.rank] if weights[group.rank] else np.full(4096, np.nan, np.float32)  # is never read
        return average(row, group, weight=weights[group.rank], wire=wire)

    results = run_ranks(3, weighted)
    assert len({result.tobytes() for result in results}) == 1
    assert error_of(results[0], rows, weights) <= 1.4 * GAUSS[wire]  # of fewer than 2 ranks


def test_a_rank_of_weight_0_encodes_nothing_of_its_leaves():
    class Finite:
        name = "finite"

        def encode(self, numbers):
            assert np.isfinite(numbers).all()
            return numbers.astype(np.float16).view(np.uint8)

        def decode(self, code, length):
            return code.view(np.float16).astype(np.float32)

    def weighted(group):
        row = gauss(1) if group.rank else np.full(5000, np.nan, np.float32)
        return average(row, group, wire=Finite(), weight=float(group.rank))

    one, other = run_ranks(2, weighted)
    assert one.tobytes() == other.tobytes()


def test_whatever_numpy_is_told_to_raise():
    rows = [gauss(rank) * np.float32(scale) for rank in range(2) for scale in (1, 1e-38)]
    with using(None):

        def strict(group):
            with np.errstate(all="raise"):
                return [average(row, group, wire=w) for w in NAMES for row in rows[2 * group.rank :][:2]]

        run_ranks(2, strict)


@pytest.mark.parametrize("wire", NAMES)
def test_donation_ties_start_average_and_inputs(wire):
    def call(group):
        given = tree_of(group.rank)
        given["tied"] = given["large"]
        before = bits_of(given)
        plain = average(given, group, wire=wire)
        assert bits_of(given) == before
        assert plain["tied"] is plain["large"]
        later = start_average(given, group, wire=wire).wait()
        assert bits_of(later) == bits_of(plain)
        del given["tied"], plain["tied"]
        donated = average(given, group, wire=wire, donate=True)
        assert donated["large"] is given["large"]
        assert bits_of(donated) == bits_of(plain)
        return bits_of(plain)

    assert len(set(run_ranks(2, call))) == 1


@pytest.mark.parametrize("wire", NAMES)
def test_in_jit(wire):
    def call(group):
        params = {"w": jax.numpy.asarray(gauss(group.rank, 4096)), "n": 3}
        eager = average(params, group, wire=wire)
        compiled = jax.jit(lambda w: average(w, group, wire=wire))(params["w"])
        assert np.asarray(compiled).tobytes() == np.asarray(eager["w"]).tobytes()
        return np.asarray(compiled).tobytes()

    assert len(set(run_ranks(2, call))) == 1


def in_torch_grad(group):
    torch.func.grad(lambda w: average(w, group, wire="int8").sum())(torch.ones(3))


def in_torch_vmap(group):
    torch.func.vmap(lambda w: average(w, group, wire="int8"))(torch.ones(2, 3))


def while_torch_records(group):
    average(torch.ones(3, requires_grad=True), group, wire="int8")


def in_jax_jvp(group):
    jax.jvp(lambda w: average(w, group, wire="int8"), (jax.numpy.ones(3),), (jax.numpy.ones(3),))


def in_jax_grad(group):
    jax.jit(jax.grad(lambda w: average(w, group, wire="int8").sum()))(jax.numpy.ones(3))


def in_jax_transpose(group):
    jax.linear_transpose(lambda w: average(w, group, wire="int8"), jax.numpy.ones(3))(jax.numpy.ones(3))


@pytest.mark.parametrize(
    "derive", [in_torch_grad, in_torch_vmap, while_torch_records, in_jax_jvp, in_jax_grad, in_jax_transpose]
)
def test_derivatives_are_refused(derive):
    def refused(group):
        found = raised(lambda: derive(group))
        return found, average(np.float32(group.rank), group)

    outcomes = run_ranks(2, refused)
    assert {kind for (kind, _), _ in outcomes} == {ValueError}
    assert all("wire='int8' under" in words for (_, words), _ in outcomes)
    assert [mean for _, mean in outcomes] == [0.5, 0.5]


def test_who_has_no_wire_says_what_to_use():
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"wire='int4' over stacked replicas: .* funcavg.testing.run_ranks"):
        average(rows, funcavg.stacked(), wire="int4")
    with pytest.raises(ValueError, match=r"wire='int4' over the axis 'i': .* group of processes"):
        jax.vmap(lambda row: average(row, "i", wire="int4"), axis_name="i")(rows)
    for group in (funcavg.stacked(), "i"):
        with pytest.raises(ValueError, match=r"diloco: wire='int4' is for groups of processes or threads"):
            funcavg.diloco(2, group=group, wire="int4").init(rows)
    for method in (lambda **o: funcavg.periodic(2, **o), lambda **o: funcavg.hierarchical({2: None}, **o)):
        with pytest.raises(TypeError, match="wire"):
            method(wire="int4")


# Methods


def test_diloco_uses_the_wire_for_changes_only(caplog):
    def train(group):
        averager = funcavg.diloco(2, warmup=1, outer=funcavg.outer.sgd(1.0), group=group, wire="int4")
        params = {"w": gauss(group.rank, 4096), "n": 1}
        state = averager.init(params)
        first = state.anchor["w"]
        assert first.tobytes() == average(params, group)["w"].tobytes()  # exact
        params = {"w": gauss(10 + group.rank, 4096), "n": 1}
        params, state = averager.update(params, state)
        anchor = state.anchor["w"].copy()
        assert anchor.tobytes() == average(params, group)["w"].tobytes()
        params = {"w": anchor + np.float32(1e-3) * gauss(20 + group.rank, 4096), "n": 1}
        for _ in range(2):
            params, state = averager.update(params, state)
        return anchor, params["w"], state.anchor["w"]

    with caplog.at_level(logging.INFO, "funcavg"):
        (anchor, *outcome), (_, *other) = run_ranks(2, train)
    assert bits_of(outcome) == bits_of(other)
    changes = [np.float32(1e-3) * gauss(20 + rank, 4096) for rank in range(2)]
    assert 1e-3 <= error_of(outcome[0].astype(np.float64) - anchor, changes) <= 2.2e-2
    lines = [record.getMessage() for record in caplog.records]
    assert sum("leaves averaged over wire int4, " in line for line in lines) == 2
    assert sum("diloco, anchor" in line and "wire" not in line for line in lines) == 4


def test_an_unknown_wire_of_diloco_is_raised_by_every_rank_alike():
    def mistaken(group):
        averager = funcavg.diloco(2, group=group, wire="int3" if group.rank == 1 else "int8")
        return raised(lambda: averager.init({"w": gauss(1)})), average(np.float32(group.rank), group)

    outcomes = run_ranks(2, mistaken)
    assert [kind for (kind, _), _ in outcomes] == [ValueError] * 2
    assert all("wire must be one of 'bfloat16', 'int8', 'int4', 'int2', or None" in w for (_, w), _ in outcomes)
    assert [mean for _, mean in outcomes] == [0.5] * 2


# Frameworks, kernels and modes


@pytest.mark.parametrize("wire", NAMES)
def test_the_same_bits_with_the_kernel_and_without_under_autocast_and_with_less_precise_products(wire):
    found = {}
    for which in ("C", PYTHON):
        with using(library_or_skip() if which == "C" else None):
            for mode in ("plainly", "under autocast", "medium"):

                def call(group, mode=mode):
                    tree = {k: torch.from_numpy(gauss(group.rank + k, 3000)) for k in range(3)}
                    tree["b"] = tree[0].bfloat16()
                    with (
                        torch.autocast("cpu", torch.bfloat16) if mode == "under autocast" else contextlib.nullcontext()
                    ):
                        result = average(tree, group, wire=wire)
                    return b"".join(result[k].float().numpy().tobytes() for k in result)

                before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("medium" if mode == "medium" else before)
                try:
                    found[which, mode] = run_ranks(3, call)
                finally:
                    torch.set_float32_matmul_precision(before)
    assert len({bits for ranks in found.values() for bits in ranks}) == 1


def narrow_tree(rank):
    """bfloat16 and float16 leaves with what roundings differ about: NaN, denormal numbers, ties."""
    row = gauss(rank, 4096)
    row[5], row[1500:2500] = np.nan, row[1500:2500] * np.float32(1e-38)
    return {"b": row.astype(ml_dtypes.bfloat16), "h": (gauss(rank, 4096) * np.float32(1e-5)).astype(np.float16)}


def narrow_bits(rank, off):
    os.environ["FUNCAVG_NODE"] = "off"
    if rank == off:
        os.environ["FUNCAVG_KERNEL"] = "off"
        torch.set_flush_denormal(True)
    group = dist.new_group()
    return [bits_of(average(narrow_tree(rank), group, wire=wire)) for wire in NAMES[1:]]


@pytest.mark.parametrize("off", [0, 1])
def test_narrow_leaves_have_the_same_bits_whatever_a_rank_calculates_with(off):
    one, other = run_processes(2, narrow_bits, off)
    assert one == other


def test_frameworks_meet():
    def call(group):
        row = gauss(group.rank, 3000)
        given = [torch.from_numpy(row), jax.numpy.asarray(row), row][group.rank]
        return np.asarray(average(given, group, wire="int4")).tobytes()

    assert len(set(run_ranks(3, call))) == 1


# Between hosts


def on_hosts(rank, hosts, off):
    """Average over all wires; return bits, what was sent, and whether the same tree came back without a wire."""
    os.environ["FUNCAVG_NODE"] = hosts[rank]
    if rank in off:
        os.environ["FUNCAVG_KERNEL"] = "off"
    given, seen = tree_of(rank), {}
    group = dist.new_group()
    exact = average(given, group)
    counted = funcavg.collectives.as_collective(group)
    seen["one leaf"] = {wire: average(gauss(rank, 6000), group, wire=wire).tobytes() for wire in NAMES}
    spoilt = gauss(rank, 6000)
    spoilt[17] = np.nan if rank == 1 else 0
    seen["spoilt"] = np.isnan(average(spoilt, group, wire="int8")).nonzero()[0].tolist()
    for wire in NAMES:
        before = counted.bytes_sent
        result = average(given, group, wire=wire)
        sent = counted.bytes_sent - before
        assert bits_of(start_average(given, group, wire=wire).wait()) == bits_of(result)
        weighted = average(given, group, wire=wire, weight=float(rank != 1))
        donated = average({k: np.copy(v) for k, v in given.items() if k != "small"}, group, wire=wire, donate=True)
        assert donated["large"].tobytes() != given["large"].tobytes()
        errors = {name: error_of(result[name], [exact[name]]) for name in ("large", "half", "double")}
        assert raised(lambda: average(given, group, wire="int3"))[0] is ValueError
        seen[wire] = [bits_of(result), bits_of(weighted), bits_of(donated)], errors, sent
    torch_tree = {"b": torch.full((3000,), float(rank)).bfloat16(), "w": torch.from_numpy(gauss(rank, 70, 50))}
    seen["torch"] = [t.float().numpy().tobytes() for t in average(torch_tree, group, wire="int8").values()], {}, 0
    return seen


REFERENCES = {("a", "b"): [(0,), (1,)], ("a", "a", "b", "b"): [(0, 1), (2, 3)], ("off", "off"): [(0,), (1,)]}


@pytest.mark.parametrize(
    ("hosts", "off"),
    [
        (("a", "b"), ()),
        (("a", "a"), ()),
        (("a", "a", "b"), (1,)),
        (("a", "a", "b", "b"), (0, 3)),
        (("off", "off"), (1,)),
    ],
    ids=str,
)
def test_between_hosts_and_not_within(hosts, off):
    ranks = run_processes(len(hosts), on_hosts, hosts, off, timeout=100)
    one_host = len(set(hosts)) == 1 and hosts[0] != "off"
    for wire in NAMES:
        assert all(rank[wire][0] == ranks[0][wire][0] for rank in ranks)
        errors = ranks[0][wire][1]
        if one_host:  # nothing changes, not even by a bit
            assert not any(errors.values())
        else:
            assert 1e-7 <= errors["large"] <= GAUSS[wire]
            assert errors["double"] <= 1e-30
            assert errors["half"] <= GAUSS[wire]
    assert all(rank["torch"][0] == ranks[0]["torch"][0] for rank in ranks)
    assert all(rank["spoilt"] == ([17] if one_host else list(range(256))) for rank in ranks)
    if hosts in REFERENCES:
        means = [np.mean([gauss(rank, 6000) for rank in host], axis=0, dtype=np.float64) for host in REFERENCES[hosts]]
        means = [mean.astype(np.float32) for mean in means]
        for wire in NAMES:
            expected = reference(wire, means, len(hosts)).tobytes()
            assert {rank["one leaf"][wire] for rank in ranks} == {expected}
    if hosts in (("off", "off"), ("a", "b")):
        for wire in NAMES:  # elements of float32, and complex64; of float16; of float64
            sent = (307_200 + 5796 + 1200) * BYTES[wire] + 3000 * min(BYTES[wire], 2) + 100 * 8
            assert ranks[0][wire][2] == pytest.approx(sent, rel=0.02)


@pytest.mark.parametrize("donate", [False, True])
def test_transfers_that_are_late_see_codes_only(donate):
    """Of what the engine has overwritten before it waits, a late transfer would see the wrong bytes."""

    def call(group, late):
        group = Late(group.rank, group._meeting) if late else group
        given = [gauss(group.rank + k, 1_500_000) for k in range(12)]  # more buckets than there are slots
        return bits_of(average(given, group, wire="int8", donate=donate))

    assert run_ranks(2, lambda group: call(group, late=True)) == run_ranks(2, lambda group: call(group, late=False))


@pytest.mark.parametrize("point", ["arrived", "reduced"])
@pytest.mark.parametrize("donate", [False, True])
def test_a_rank_that_is_lost_in_the_middle_leaves_leaves_as_they_are(monkeypatch, point, donate):
    doomed, passed = [], []

    def reached(where, number=0):
        passed.append(where)
        if where == point and number == 1 and threading.get_ident() in doomed:
            raise OSError("lost")

    monkeypatch.setattr(_points, "reached", reached)

    def lose(group):
        if group.rank == 2:
            doomed.append(threading.get_ident())
        given = {"large": gauss(group.rank, 3_000_000), "small": gauss(group.rank, 70)}
        before = bits_of(given)
        with pytest.raises((PeerLostError, OSError)):
            average(given, group, wire="int4", timeout=5, donate=donate)
        assert donate or bits_of(given) == before
        return True

    assert run_ranks(3, lose) == [True] * 3
    assert "copied_in" in passed


def test_wires_are_not_imported_before_they_are_used():
    import subprocess
    import sys

    program = (
        "import sys, numpy as np, funcavg; from funcavg.testing import run_ranks\n"
        "run_ranks(2, lambda g: funcavg.average(np.ones(3), g)); funcavg.diloco(2)\n"
        "print([name for name in sys.modules if 'wire' in name or name.endswith('.codes')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

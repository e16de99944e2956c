"""A codec of a user's own, in 25 lines, is a wire; what is wrong with one, every rank hears alike."""

import os
import re

import numpy as np
import pytest
from helpers.frameworks import dist
from helpers.processes import run_processes

from funcavg import FuncavgError, PeerLostError, TreeMismatchError, average, diloco
from funcavg.collectives import as_collective
from funcavg.testing import run_ranks
from funcavg.wires import Wire


class Exponents:
    """A sign and an exponent, a byte a number: the nearest power of two, within 2**-120 to 2**6."""

    name = "exponents"

    def encode(self, numbers):
        mantissas, exponents = np.frexp(numbers)  # 0.5 to 1
        powers = np.clip(exponents - (np.abs(mantissas) < 0.75) + 120, 0, 126).astype(np.uint8)
        powers[~np.isfinite(numbers)] = 127
        powers[numbers == 0] = 0
        return powers | (np.signbit(numbers).astype(np.uint8) << 7)

    def decode(self, code, length):
        powers = (code & 127).astype(np.int32)
        numbers = np.ldexp(np.float32(1), powers - 120)
        numbers[powers == 127] = np.nan
        numbers[powers == 0] = 0
        return np.where(code >> 7, -numbers, numbers).astype(np.float32)


SIZE = 3
LEAVES = {"large": (3, 70_001), "small": (5,), "one": ()}


def tree_of(rank):
    draw = np.random.default_rng(rank)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in LEAVES.items()} | {
        "exact": draw.standard_normal(7),  # float64
        "step": 7,
    }


def the_mean(name):
    return np.mean([tree_of(rank)[name] for rank in range(SIZE)], axis=0, dtype=np.float64)


def averages(group):
    """Return what a rank gets, and what it has sent."""
    mean = average(tree_of(group.rank), group, wire=Exponents())
    again = average(tree_of(group.rank), group, wire=Exponents(), weight=float(group.rank != 1))
    return [{name: np.asarray(leaf).tobytes() for name, leaf in tree.items()} for tree in (mean, again)]


def averages_of_a_process(rank):
    os.environ["FUNCAVG_NODE"] = "off"  # processes of one host meet in its memory, which no wire writes
    group = as_collective(dist.group.WORLD)
    return averages(group), group.bytes_sent


def test_it_is_a_wire():
    assert isinstance(Exponents(), Wire)


def test_all_ranks_get_the_same_bits_over_threads_and_over_gloo():
    threads = run_ranks(SIZE, averages)
    processes, sent = zip(*run_processes(SIZE, averages_of_a_process), strict=True)
    assert threads[0] == threads[1] == threads[2] == processes[0] == processes[1] == processes[2]
    elements = sum(np.prod(shape, dtype=int) for shape in LEAVES.values())
    for nbytes in sent:  # of two averages, each there and back
        assert nbytes == pytest.approx(2 * 2 * elements * (SIZE - 1) / SIZE, rel=0.02)


def test_its_mean_is_near_and_what_it_does_not_encode_is_exact():
    mean = run_ranks(SIZE, lambda group: average(tree_of(group.rank), group, wire=Exponents()))[1]
    error = np.linalg.norm(mean["large"] - the_mean("large")) / np.linalg.norm(the_mean("large"))
    assert 0.1 < error < 0.4
    np.testing.assert_allclose(mean["exact"], the_mean("exact"), rtol=1e-15)
    assert mean["step"] == 7


def test_it_never_gets_numbers_of_two_leaves_nor_of_two_ranks():
    seen = []

    class Looking(Exponents):
        def encode(self, numbers):
            seen.append(numbers.copy())
            return super().encode(numbers)

    def fn(group):
        tree = {name: np.full(1000 + k, 10.0 * k + group.rank, np.float32) for k, name in enumerate("abc")}
        return average(tree, group, wire=Looking())

    run_ranks(2, fn)
    of_leaves = [numbers for numbers in seen if len(numbers) not in (7, 1024)]  # with which it is tried
    assert len(of_leaves) > 6
    assert all(len(set(numbers.tolist())) == 1 for numbers in of_leaves)


def test_diloco_takes_it():
    def fn(group):
        averager = diloco(1, group=group, wire=Exponents())
        params = {"w": np.full(3, 1.0, np.float32)}
        state = averager.init(params)
        params, state = averager.update({"w": params["w"] - np.float32(2.0**-4)}, state)
        return params["w"].tolist()

    one, other = run_ranks(2, fn)
    assert one == other


# Mistakes


def changed(**members):
    return type("Changed", (Exponents,), members)()


def zeros(dtype, factor=1):
    return lambda self, code, length: np.zeros(factor * length, dtype)


WRONG = {
    "decodes to another dtype": (
        changed(decode=zeros(np.float64)),
        TypeError,
        r"wire 'exponents': decode must return a vector of 7 float32, got float64\[7\]",
    ),
    "decodes to another length": (
        changed(decode=zeros(np.float32, 2)),
        TypeError,
        r"wire 'exponents': decode must return a vector of 7 float32, got float32\[14\]",
    ),
    "encodes to another dtype": (
        changed(encode=lambda self, numbers: numbers),
        TypeError,
        r"wire 'exponents': encode must return a vector of uint8, got float32\[7\]",
    ),
    "encodes to bytes": (
        changed(encode=lambda self, numbers: b"code"),
        TypeError,
        r"wire 'exponents': encode must return a vector of uint8, got bytes",
    ),
    "raises": (
        changed(encode=lambda self, numbers: numbers.no_such_thing),
        RuntimeError,
        "wire 'exponents': encode of 7 numbers raised AttributeError: 'numpy.ndarray' object has no attribute",
    ),
    "has no name": (changed(name=None), TypeError, "or an object with a name and the functions encode and decode"),
    "has a name of ours": (changed(name="int8"), ValueError, "needs a name of its own, of at most 64 .*, got 'int8'"),
    "has an empty name": (changed(name=""), ValueError, "needs a name of its own, of at most 64 .*, got ''"),
    "has a name of two lines": (changed(name="a\nb"), ValueError, "letters, digits, '_', '.' and '-', got 'a.nb'"),
    "is a class": (Exponents, TypeError, r"wire must be an object, got the class Exponents: pass Exponents\(...\)"),
    "saves nothing": (
        changed(encode=lambda self, numbers: np.zeros(4096, np.uint8), decode=zeros(np.float32)),
        ValueError,
        "returned 4096 bytes for 1024 numbers, which is no shorter than float32: no leaf would be encoded",
    ),
    "has a length that depends on values": (
        changed(encode=lambda _, numbers: np.zeros(4 + int(numbers.any()), np.uint8), decode=zeros(np.float32)),
        ValueError,
        r"encode returned 5 bytes for 7 numbers, and 4 for as many zeros",
    ),
    "is no codec": (7, TypeError, "or an object with a name and the functions encode and decode"),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("who", [(0, 1), (1,)], ids=["all ranks", "one rank"])
def test_what_is_wrong_is_said_on_every_rank_before_anything_moves(what, who):
    wire, error, says = WRONG[what]
    name = "exponents" if isinstance(wire, int) or not isinstance(wire.name, str) else wire.name

    def fn(group):
        mine = wire if group.rank in who else changed(name=name)
        with pytest.raises(error, match=says) as caught:
            average({"w": np.ones(1 << 20, np.float32)}, group, wire=mine)
        return str(caught.value), group.bytes_sent, float(average(np.float32(group.rank), group))

    one, other = run_ranks(2, fn)
    assert one[0] == other[0]
    assert max(one[1], other[1]) < 1 << 17  # words, and nothing of the tree
    assert "Nothing was sent and the inputs are unchanged, on every rank." in one[0]
    assert one[2] == other[2] == 0.5


@pytest.mark.parametrize("other", [None, "int8", "an own one"])
def test_ranks_with_different_wires(other):
    def fn(group):
        theirs = changed(name="another") if other == "an own one" else other
        with pytest.raises(TreeMismatchError) as caught:
            average({"w": np.ones(50, np.float32)}, group, wire=Exponents() if group.rank == 0 else theirs)
        return str(caught.value)

    one, another = run_ranks(2, fn)
    assert one == another
    assert "wire exponents" in one
    assert {None: "over no wire", "int8": "wire int8", "an own one": "wire another"}[other] in one


class Cut:
    """The upper bytes of each number."""

    name = "cut"

    def __init__(self, kept, lost=0):
        self.kept, self.lost = kept, lost

    def encode(self, numbers):
        return numbers.view(np.uint8).reshape(-1, 4)[:, 4 - self.kept :].ravel()

    def decode(self, code, length):
        numbers = np.zeros((length, 4), np.uint8)
        numbers[:, 4 - self.kept :] = code.reshape(length, self.kept)
        return numbers.view(np.float32).ravel() + np.float32(self.lost)


@pytest.mark.parametrize("other", [Cut(3), Cut(2, 1)], ids=["other bytes", "other numbers"])
def test_codecs_of_one_name_that_are_not_alike(other):
    def fn(group):
        with pytest.raises(TreeMismatchError) as caught:
            average({"w": np.ones(50, np.float32)}, group, wire=other if group.rank else Cut(2))
        return str(caught.value), average(np.float32(group.rank), group, wire=Cut(2))

    (one, mean), (another, _) = run_ranks(2, fn)
    assert one == another
    assert len(set(re.findall(r"wire cut \(checksum [0-9a-f]{8}\)", one))) == 2
    assert mean == 0.5


def test_what_it_raises_later_spends_the_group_and_reaches_who_waits():
    def fn(group):
        wire = changed(encode=lambda _, numbers: Exponents.encode(_, numbers) if numbers[-1] < 9 else 1 / 0)
        given = np.full(3000, 8.0 + group.rank, np.float32)
        with pytest.raises((RuntimeError, FuncavgError)) as caught:
            average(given, group, wire=wire, timeout=5)
        assert (given == 8.0 + group.rank).all()
        with pytest.raises(PeerLostError, match="this group is spent"):
            average(given, group)
        return type(caught.value), str(caught.value)

    (waits, _), (raises, says) = run_ranks(2, fn)
    assert (waits, raises) == (PeerLostError, RuntimeError)
    assert "wire 'exponents': encode of 1500 numbers raised ZeroDivisionError: division by zero" in says

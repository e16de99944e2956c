"""What the docs say of wires, beside the codecs of other libraries (`peers_wires.py`), holds in a small sample."""

import pytest
from peers_wires import BYTES, OURS, PCCL, PEERS, PRIME, SIZES, errors_of_means, errors_of_one_code

from funcavg.wires.codecs import NAMES

LENGTH = 1 << 14
ONE_CODE = {"bfloat16": (2e-6, 4e-6), "int8": (4e-5, 6e-5), "int4": (8e-3, 1.1e-2), "int2": (0.11, 0.15)}


@pytest.fixture(scope="module")
def means():
    return errors_of_means(LENGTH)


@pytest.fixture(scope="module")
def codes():
    return errors_of_one_code(LENGTH)


def test_every_wire_is_compared(means, codes):
    assert tuple(OURS) == tuple(BYTES) == NAMES
    assert set(means) == set(codes) == {*OURS.values(), *PEERS}
    assert SIZES == (2, 8, 32)


@pytest.mark.parametrize("wire", NAMES)
def test_our_errors_do_not_grow_with_the_ranks(means, wire):
    found = means[OURS[wire]]
    assert found[8] <= 1.6 * found[2]
    assert found[32] <= 1.6 * found[2]


def test_errors_of_rings_that_encode_at_each_hop_grow(means):
    assert means[PCCL][32] > 10 * means[PCCL][2]
    assert means[PRIME][32] > 2 * means[PRIME][2]
    assert means[OURS["int8"]][32] < means[PRIME][32] < means[PCCL][32]


@pytest.mark.parametrize("wire", NAMES)
def test_errors_are_those_of_the_table(codes, wire):
    least, most = ONE_CODE[wire]
    assert least < codes[OURS[wire]]["Gauss"] < most


def test_rotated_codes_do_not_depend_on_what_numbers_look_like(codes):
    for wire in ("int4", "int2"):
        found = codes[OURS[wire]]
        assert max(found.values()) <= 1.15 * min(found.values())


def test_one_range_for_all_loses_small_leaves(codes):
    for name in (PCCL, PRIME):
        assert codes[name]["t3 rows"] > 50 * codes[OURS["int8"]]["t3 rows"]

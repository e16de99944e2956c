"""Averaging over a slow link, and over one that is cut: two hosts as network namespaces (`slow_network.py`)."""

import os

import pytest
from slow_network import (
    COPIED,
    COPIED_OF_TWO,
    DONATED,
    DONATED_OF_TWO,
    FRESH,
    NBYTES,
    RATE,
    RAW,
    TIMEOUT,
    WIRED,
    cut_and_mend,
    measure,
    two_hosts,
)

pytestmark = pytest.mark.timeout(180)  # ranks give up before


@pytest.fixture
def hosts():
    try:
        with two_hosts() as names:
            yield names
    except OSError as reason:
        if os.environ.get("FUNCAVG_REQUIRE_NETNS"):
            pytest.fail(f"FUNCAVG_REQUIRE_NETNS is set, but {reason}")
        pytest.skip(str(reason))


def test_an_average_takes_as_long_as_the_tree_takes_to_cross_the_link_once(hosts):
    rows = measure(hosts, [RAW, DONATED, FRESH, DONATED_OF_TWO])
    for name, row in rows.items():
        assert row.is_right, name
        assert min(row.sent) >= NBYTES, name  # from either host, half of its values and half of the means
        assert 8 * max(row.sent) / row.seconds <= 1.05 * RATE, f"{name}: the link is faster than it should be"
        assert row.seconds <= 1.1 * rows[RAW].seconds, name
        assert max(row.sent) <= 1.05 * max(rows[RAW].sent), name
    assert rows[DONATED_OF_TWO].seconds <= 1.1 * rows[DONATED].seconds


def test_a_wire_divides_the_time(hosts):
    """By four, in bytes; in time, what a busy machine lets it."""
    chosen = [name for name, (_, wire) in WIRED.items() if wire == "int8"]
    rows = measure(hosts, [RAW, *chosen])
    for name in chosen:
        assert rows[name].is_right, name
        assert max(rows[name].sent) <= 0.26 * max(rows[RAW].sent), name
        assert rows[name].seconds <= 0.5 * rows[RAW].seconds, name


def test_a_broadcast_crosses_the_link_once_however_many_ranks_a_host_has(hosts):
    for name, row in measure(hosts, [COPIED, COPIED_OF_TWO]).items():
        assert row.is_right, name
        assert max(row.sent) <= 1.05 * NBYTES, name
        assert row.seconds <= 1.1 * 8 * NBYTES / RATE + 0.1, name


@pytest.mark.parametrize("ranks_per_host", [(2, 2), (2, 1)], ids=str)
def test_a_link_is_cut_and_mended(hosts, ranks_per_host):
    """Of two ranks here and one there, one of the two waits for nothing but its neighbour in shared memory."""
    cut_at, ranks = cut_and_mend(hosts, ranks_per_host)
    for rank in ranks:
        assert "waited" in rank["error"]
        # A second more: a wait may begin when the link is cut already, and ranks share cores with each other.
        assert rank["lost_at"] - cut_at <= TIMEOUT + 1
        assert rank["unchanged"]
        assert rank["is_mean"]
    assert len({rank["digest"] for rank in ranks}) == 1

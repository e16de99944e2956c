"""The ranks that users test with: threads that never leave anybody hanging."""

import threading
import time

import numpy as np
import pytest

from funcavg import PeerLostError, average
from funcavg.testing import run_ranks


def test_results_come_in_rank_order():
    def fn(group):
        time.sleep(0.05 * (3 - group.rank))
        return group.rank, group.size

    assert run_ranks(3, fn) == [(0, 3), (1, 3), (2, 3)]


def test_the_cause_is_raised_with_its_rank_not_its_consequence():
    def fn(group):
        if group.rank == 2:
            time.sleep(0.05)  # others wait by then, and lose a peer
            raise KeyError("the cause")
        return average(1.0, group)

    start = time.monotonic()
    with pytest.raises(KeyError, match="the cause") as caught:
        run_ranks(4, fn)
    assert time.monotonic() - start < 5
    assert caught.value.funcavg_rank == 2
    assert caught.value.__notes__ == ["raised on rank 2 of 4 (funcavg.testing.run_ranks)"]


def test_who_waits_for_a_rank_that_has_returned_is_told():
    def fn(group):
        return None if group.rank == 1 else average(1.0, group)

    with pytest.raises(PeerLostError, match="rank 0 of 2 waits for rank 1, which has returned"):
        run_ranks(2, fn)


def test_a_rank_that_never_comes():
    leave = threading.Event()

    def fn(group):
        if group.rank == 1:
            leave.wait(10)
            return "late"
        with pytest.raises(PeerLostError, match=r"rank 0 of 2 waited 0.2 s for rank\(s\) 1\."):
            average(np.ones(3), group, timeout=0.2)
        with pytest.raises(PeerLostError, match="this group is spent"):
            average(np.ones(3), group)
        leave.set()
        return "told"

    assert run_ranks(2, fn) == ["told", "late"]


def test_a_late_rank_is_waited_for():
    def fn(group):
        time.sleep(0.5 * group.rank)
        return average(float(group.rank), group, timeout=10)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_a_rank_that_hangs_by_itself_is_shown():
    leave = threading.Event()

    def sleeps_forever(group):
        leave.wait(30)

    with pytest.raises(TimeoutError, match=r"rank\(s\) 0, 1 of 2 still run after 0.3 s(.|\n)*in sleeps_forever"):
        run_ranks(2, sleeps_forever, timeout=0.3)
    leave.set()


@pytest.mark.parametrize(("n", "kind", "text"), [(0, ValueError, "at least 1, got 0"), (2.0, TypeError, "got 2.0 of")])
def test_how_many(n, kind, text):
    with pytest.raises(kind, match=text):
        run_ranks(n, lambda group: None)

"""The pipeline: buffers are touched only when the transport is done with them, and a failed group stays failed."""

import numpy as np
import pytest
from helpers.frameworks import torch
from helpers.late import Late

from funcavg import PeerLostError, average
from funcavg._engine import Agreement, buckets, move, reach_agreement, session
from funcavg._engine.agree import agree
from funcavg._trees import Claim, Options, flatten, make_request
from funcavg.collectives.threads import Threads
from funcavg.testing import run_ranks


def test_ties_are_kept_where_only_places_differ():
    def fn(group, differ):
        claim = Claim(bytes(16), [], b"tied", b"placed", donates_ties=True)
        return agree(group, claim._replace(**{differ: bytes([group.rank])}), 5.0)

    assert run_ranks(2, lambda group: fn(group, "places")) == [Agreement(None, same_ties=True, same_places=False)] * 2
    for refused in run_ranks(2, lambda group: fn(group, "ties")):
        assert "whose tree holds the same memory twice" in str(refused)


@pytest.fixture
def tiny_buckets(monkeypatch):
    monkeypatch.setattr(session, "bucket_bytes", lambda size: 64)
    monkeypatch.setattr(buckets, "LARGE", 96)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("leaf", [np.array, torch.tensor])
@pytest.mark.usefixtures("tiny_buckets")
def test_many_buckets_on_their_way(size, donate, leaf):
    def fn(group):
        group = Late(group.rank, group._meeting)
        results = []
        for call in range(3):  # slots are reused between calls
            rng = np.random.default_rng(100 * call + group.rank)
            tree = [leaf(rng.normal(size=n)) for n in (500, 3, 1, 40, 7, 333)]
            results.append([np.asarray(x).copy() for x in average(tree, group, donate=donate)])
        return results

    ranks = run_ranks(size, fn)
    for call in range(3):
        rngs = [np.random.default_rng(100 * call + rank) for rank in range(size)]
        for i, n in enumerate((500, 3, 1, 40, 7, 333)):
            expected = sum(rng.normal(size=n) for rng in rngs) / size
            for result in ranks:
                np.testing.assert_allclose(result[call][i], expected, rtol=1e-12)
                np.testing.assert_array_equal(result[call][i], ranks[0][call][i])


class Breaks(Threads):
    """Fails on one rank at the n-th transfer, as a peer that dies in the middle."""

    def __init__(self, group, rank, at):
        super().__init__(group.rank, group._meeting)
        self.left = at if group.rank == rank else -1

    def _swap(self, post, timeout):
        if self.left == 0:
            self._meeting.leave(self.rank, "was killed")
            raise OSError("cable cut")
        self.left -= 1
        return super()._swap(post, timeout)


@pytest.mark.parametrize("breaking", [0, 2])
@pytest.mark.parametrize("at", range(12))
@pytest.mark.usefixtures("tiny_buckets")
def test_a_failure_in_the_middle_leaves_inputs_alone_and_the_group_spent(breaking, at):
    def fn(group):
        group = Breaks(group, breaking, at)
        tree = {"a": np.arange(60.0) + group.rank, "b": torch.arange(5.0) + group.rank}
        before = {"a": tree["a"].copy(), "b": tree["b"].clone()}
        failure = None
        try:
            average(tree, group, timeout=5)
        except (PeerLostError, OSError) as error:
            failure = str(error)
        np.testing.assert_array_equal(tree["a"], before["a"])
        assert torch.equal(tree["b"], before["b"])
        if failure is not None:
            with pytest.raises(PeerLostError, match="this group is spent, since an earlier call on it failed"):
                average(tree, group)
        return failure

    failures = run_ranks(3, fn)
    assert failures[breaking] == "cable cut"
    for rank in {0, 1, 2} - {breaking}:  # whoever is not yet done when it happens
        assert failures[rank] is None or f"waits for rank {breaking}, which was killed" in failures[rank]


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.usefixtures("tiny_buckets")
def test_memory_that_may_be_freed_after_an_error_is_out_of_reach_of_late_transfers(stops):
    """Of compiled programs: XLA frees it, whatever a transport still does."""

    class Watched(Late):
        stops_on_error, seen = stops, ()

        def exchange(self, send, receive, timeout):
            self.seen += (send, receive)
            return super().exchange(send, receive, timeout)

        def share(self, buffer, timeout):
            self.seen += (buffer,)
            return super().share(buffer, timeout)

    def fn(group):
        group = Watched(group.rank, group._meeting)
        leaf, out = np.full(500, float(group.rank)), np.empty(500)
        request = make_request(flatten([leaf]), Options(timeout=10), wrapped=True)
        agreement = reach_agreement(request, group)
        assert move(request, agreement, group, [out])[0] is out
        assert (out == 0.5).all()
        return [any(np.may_share_memory(array, seen) for seen in group.seen) for array in (leaf, out)]

    assert run_ranks(2, fn) == [[stops, stops]] * 2

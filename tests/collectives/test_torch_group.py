"""Ring three: spawned Gloo processes."""

import pytest
import torch
from helpers.processes import RankFailed, run_processes

from funcavg import average


def mean_of_ranks(rank):
    return average({"w": torch.full((3,), float(rank))})["w"]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_default_group_averages(size):
    for result in run_processes(size, mean_of_ranks):
        assert torch.equal(result, torch.full((3,), (size - 1) / 2))


def hang(rank):
    if rank == 1:
        import time

        time.sleep(60)


def test_a_hung_rank_shows_where_it_is():
    with pytest.raises(RankFailed, match="rank 1 hangs after 5 s at\n(.|\n)*in hang"):
        run_processes(2, hang, timeout=5)


def large_and_read_only(rank):
    import numpy as np

    leaf = np.full(1_000_003, float(rank))
    leaf.flags.writeable = False
    result = average([leaf, leaf[::-2]])
    return [np.unique(x).tolist() for x in result]


def test_large_read_only_arrays_warn_of_nothing():
    assert run_processes(2, large_and_read_only) == [[[0.5], [0.5]]] * 2

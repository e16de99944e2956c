"""With whom: what can be passed as ``group`` over torch.distributed."""

import os
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes

from funcavg import PeerLostError, average, start_average
from funcavg.collectives import Solo, as_collective
from funcavg.collectives.torch import TorchCollective


def subgroups(rank):
    """Ranks 0 and 1, ranks 1 and 2; rank 3 alone; a rank outside gets its very tree back."""
    pair, other, alone = dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([3])
    tree = {"w": torch.full((2,), float(rank)), "bad": "text"}
    for group, members in ((pair, (0, 1)), (other, (1, 2)), (alone, (3,))):
        if rank in members:
            expected = sum(members) / len(members)
            assert average({"w": tree["w"]}, group)["w"].tolist() == [expected] * 2
            assert average({"w": tree["w"]}, group, donate=False)["w"] is not tree["w"]
        else:
            assert average(tree, group) is tree
            handle = start_average(tree, group)
            assert handle.done()
            assert handle.wait() is tree
    return average(float(rank))


def test_subgroups():
    assert run_processes(4, subgroups) == [1.5] * 4


def meshes(rank):
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    assert average(float(rank), init_device_mesh("cpu", (4,))) == 1.5
    return average(float(rank), mesh["rows"]), average(float(rank), mesh["columns"])


def test_device_meshes():
    assert run_processes(4, meshes) == [(1.0, 0.5), (2.0, 0.5), (1.0, 2.5), (2.0, 2.5)]


def our_traffic_is_private(rank):
    """The user's own asynchronous calls are under way on the same group, in another order on each rank."""
    sent, received = torch.full((100_000,), float(rank)), torch.zeros(100_000)
    work = None
    if rank == 0:
        work = dist.irecv(received, 1)
    result = average(float(rank))
    if rank == 1:
        dist.send(sent, 0)
    handle = start_average(np.full(200_000, float(rank)))
    total = torch.full((50_000,), float(rank))
    dist.all_reduce(total)
    averaged = handle.wait()
    if work is not None:
        work.wait()
        assert (received == 1).all()
    assert (total == 1).all()
    assert (averaged == 0.5).all()
    return result


def test_our_traffic_never_mixes_with_the_users():
    assert run_processes(2, our_traffic_is_private) == [0.5, 0.5]


def one_collective(rank):
    group = dist.new_group()
    collective = as_collective(group)
    assert isinstance(collective, TorchCollective)
    assert as_collective(group) is collective
    assert as_collective() is as_collective(dist.group.WORLD) is not collective
    assert (collective.rank, collective.size) == (rank, 3)
    assert repr(collective) == f"<rank {rank} of 3 of a torch process group>"
    average(1.0, collective)
    before = collective.bytes_sent
    average(np.zeros(30_000), group)
    sent = collective.bytes_sent - before - 2 * 48  # agreement
    assert sent == 2 * 240_000 * 2 // 3  # 2 B (N - 1) / N
    return sent


def test_the_same_group_gives_the_same_collective():
    assert run_processes(3, one_collective) == [320_000] * 3


class Foreign(dist.ProcessGroup):
    """A process group that torch.distributed does not know, as torchft's are: it cannot be duplicated."""

    def __init__(self, inner):
        super().__init__(inner.rank(), inner.size())
        self.inner, self.threads = inner, set()

    def send(self, tensors, peer, tag):
        import threading

        self.threads.add(threading.current_thread().name)
        return self.inner.send(tensors, peer, tag)

    def recv(self, tensors, peer, tag):
        return self.inner.recv(tensors, peer, tag)


def foreign_groups(rank, path):
    store = dist.FileStore(path, 2)
    group = Foreign(dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=20)))
    leaf = np.full(1_500_000, float(rank))
    assert (average(leaf, group) == 0.5).all()
    handle = start_average([leaf, float(rank)], group)
    assert handle.done()  # nothing is under way: it is averaged inside wait()
    with pytest.raises(RuntimeError, match="average: start_average is still under way on this group"):
        average(1.0, group)
    large, small = handle.wait()
    assert (large == 0.5).all()
    assert group.threads == {"MainThread"}  # its calls are in the caller's order
    with pytest.raises(TypeError, match=r"rank 1: .* params_tree is a str"):
        average("text" if rank == 1 else 1.0, group)
    if rank == 0:
        with pytest.raises(PeerLostError, match="rank 0 of 2 (waited for|met) rank 1(.|\n)* make a new one"):
            average(1.0, group, timeout=0.5)
    else:
        with pytest.warns(RuntimeWarning, match=r"dropped without wait\(\)"):
            start_average(1.0, group)
        time.sleep(1)
    # Nothing was sent for the dropped handle: the next call must not be taken for it.
    with pytest.raises(PeerLostError, match="this group is spent"):
        average(1.0, group)
    return small


def test_groups_that_cannot_be_duplicated(tmp_path):
    assert run_processes(2, foreign_groups, str(tmp_path / "store")) == [0.5, 0.5]


def many_groups(rank, nodes):
    """Groups are not kept alive, nor taken for one another, when they come and go."""
    os.environ["FUNCAVG_NODE"] = nodes[rank]
    import gc
    import weakref

    gone = []
    for round_number in range(5):
        group = dist.new_group()
        assert average(float(rank + round_number), group) == (len(nodes) - 1) / 2 + round_number
        gone.append(weakref.ref(as_collective(group)))
        dist.destroy_process_group(group)
        del group
    gc.collect()
    return [ref() is None for ref in gone]


@pytest.mark.parametrize("nodes", ["aa", "aab"])
def test_groups_come_and_go(nodes):
    assert run_processes(len(nodes), many_groups, nodes) == [[True] * 5] * len(nodes)


def test_solo_is_a_mean_of_one():
    assert (Solo.rank, Solo.size, as_collective().size) == (0, 1, 1)
    leaf = torch.arange(3.0)
    assert torch.equal(average(leaf, Solo(), weight=3), leaf)
    assert average(leaf, Solo(), donate=True) is leaf
    with pytest.raises(ValueError, match="average: the weights of all 1 ranks are 0"):
        average(leaf, Solo(), weight=0)
    with pytest.raises(TypeError, match=r"average: 1 of 1 leaves .* is a str: 'text'"):
        average({"w": "text"}, Solo())


def test_a_failure_alone_spends_nothing():
    """Calls of a single process have nobody to disagree with, and may overlap."""

    def interrupted(path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        average({"w": 1.0}, where=interrupted)
    handles = [start_average({"w": float(i)}) for i in range(3)]
    assert [handle.wait() for handle in handles] == [{"w": 0.0}, {"w": 1.0}, {"w": 2.0}]


def shard_and_dtensor(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((3,), float(rank))
    tree = {"d": DTensor.from_local(local, mesh, [Replicate()], run_check=False), "t": local}
    result = average(tree, mesh)
    return [
        (type(result[key]).__name__, local.tolist())
        for key, local in (("d", result["d"].to_local()), ("t", result["t"]))
    ]


def test_a_dtensor_and_its_own_shard_are_not_ties():
    expected = [("DTensor", [0.5] * 3), ("Tensor", [0.5] * 3)]
    assert run_processes(2, shard_and_dtensor) == [expected, expected]

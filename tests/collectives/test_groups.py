"""With whom: what can be passed as ``group`` over torch.distributed."""

import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.processes import run_processes

from funcavg import PeerLostError, average, start_average
from funcavg.collectives import Solo, as_collective
from funcavg.collectives.blocks import block_of
from funcavg.collectives.torch import TorchCollective, _timeout_of


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
    # Nothing was sent for the dropped handle: the next call must not be taken for it. (Gloo has closed its connections,
    # and a group that tells nothing may have been configured anew, so it is tried.)
    with pytest.raises(PeerLostError):
        average(1.0, group, timeout=5)
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


def own_timeouts(rank):
    """What a user has set is the collective's, and what `hierarchical` makes of a group has it, too."""
    seen = [as_collective().default_timeout]
    for options in (
        {},
        {"timeout": timedelta(minutes=30)},
        {"timeout": timedelta(hours=2)},
        {"timeout": timedelta(0, 7)},
    ):
        group = dist.new_group(**options)
        collective = as_collective(group)
        seen.append((collective.default_timeout, as_collective(block_of(group, 2)).default_timeout))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=9), group)
    seen.append(collective.default_timeout)
    dist.destroy_process_group(group)
    return [*seen, collective.default_timeout]


def test_a_groups_own_timeout():
    expected = [None, (None, None), (None, None), (7200.0, 7200.0), (7.0, 7.0), 9.0, None]
    assert run_processes(4, own_timeouts) == [expected] * 4


@pytest.mark.parametrize(
    ("config", "minutes", "seconds"),
    [
        ("cuda:nccl", 10, None),
        ("cuda:nccl", 30, 1800.0),
        ("cpu:gloo,cuda:nccl", 30, None),
        ("cpu:gloo,cuda:nccl", 10, 600.0),
        ("cpu:gloo", 10, 600.0),
    ],
)
def test_the_default_timeout_depends_on_the_backend(monkeypatch, config, minutes, seconds):
    """NCCL's is ten minutes, all others' thirty. (A stand-in: this torch may have no NCCL.)"""
    group = SimpleNamespace(
        _get_backend=lambda device: SimpleNamespace(options=SimpleNamespace(_timeout=timedelta(minutes=minutes)))
    )
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    defaults = {"nccl": timedelta(minutes=10), "gloo": timedelta(minutes=30)}
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_timeout", defaults.get)
    assert _timeout_of(group) == seconds


def no_timeout_to_be_had(rank, path):
    group = Foreign(dist.ProcessGroupGloo(dist.FileStore(path, 2), rank, 2, timedelta(seconds=20)))
    timeout = as_collective(group).default_timeout
    dist.barrier()  # a rank that is gone before the other has connected would fail it
    return timeout


def test_a_group_that_does_not_say_its_timeout(tmp_path):
    assert run_processes(2, no_timeout_to_be_had, str(tmp_path / "store")) == [None, None]


class Plain(dist.Store):
    """A store of a user's own, which cannot be cloned."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def set(self, key, value):
        return self.inner.set(key, value)

    def get(self, key):
        return self.inner.get(key)

    def add(self, key, amount):
        return self.inner.add(key, amount)

    def check(self, keys):
        return self.inner.check(keys)

    def wait(self, *args):
        return self.inner.wait(*args)


def in_a_store_of_ones_own(rank, path):
    dist.destroy_process_group()
    store = Plain(dist.FileStore(path, 2))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    return average(np.full(3, float(rank)), timeout=20).tolist()


def test_a_store_without_clone(tmp_path):
    assert run_processes(2, in_a_store_of_ones_own, str(tmp_path / "store")) == [[0.5] * 3] * 2


FAKE = """
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from funcavg import average
from funcavg.collectives import Solo
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
assert average(1.0, Solo()) == 1.0
try:
    average(1.0, timeout=5)
except ValueError as error:
    print(error)
"""


def test_a_fake_group_is_refused():
    done = subprocess.run([sys.executable, "-c", FAKE], capture_output=True, text=True, check=False, timeout=60)
    assert "torch's 'fake', which moves nothing: rank 0 has none of the 3 other ranks" in done.stdout, done.stderr


def no_such_interface(rank):
    group = dist.new_group()
    if rank == 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo,eth999"
    begin = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        average(1.0, group, timeout=20)
    assert time.monotonic() - begin < 5
    assert not isinstance(caught.value, PeerLostError)
    with pytest.raises(PeerLostError, match="this group is spent"):
        average(1.0, group)
    return str(caught.value)


def test_an_interface_that_one_host_does_not_have():
    """It is raised on every rank, in the same words: nobody is lost."""
    said = run_processes(3, no_such_interface)
    assert len(set(said)) == 1
    words = (
        r"average: rank 1: GLOO_SOCKET_IFNAME is 'lo,eth999', of which Gloo says: .*Unable to find address for: eth999"
        r"\. The interfaces of this rank's host are .*lo.*: name one of them"
    )
    assert re.match(words, said[0]), said[0]


def no_descriptors(rank):
    """Rank 0 has none left when it is to connect."""
    import resource

    group = dist.new_group()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if rank == 1:
        with pytest.raises(PeerLostError):
            average(1.0, group, timeout=3)
        return "lost"
    from funcavg.collectives import connecting

    make, limits = dist.ProcessGroupGloo, resource.getrlimit(resource.RLIMIT_NOFILE)

    def with_few(*args):
        few = os.dup(0)
        os.close(few)
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            return make(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    with_few.create_device = make.create_device
    connecting.dist = SimpleNamespace(**vars(dist) | {"ProcessGroupGloo": with_few})
    with pytest.raises(RuntimeError) as caught:
        average(1.0, group, timeout=3)
    assert not isinstance(caught.value, PeerLostError), caught.value
    return str(caught.value)


def test_descriptors_that_have_run_out_are_no_lost_peer():
    said, lost = run_processes(2, no_descriptors)
    assert lost == "lost"
    assert re.match(r"average: rank 0 of 2 has no file descriptors left .*Too many open files.*`ulimit -n`", said), said


def test_a_world_of_one_that_its_launcher_has_made_is_meant():
    """As `torchrun --nproc-per-node 1` in each task of an srun, for trainings that are independent."""
    code = """
import torch.distributed as dist, funcavg
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print(funcavg.average(1.5))
"""
    task = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    for launched, expected in (({"WORLD_SIZE": "1", "RANK": "0"}, "1.5"), ({}, "srun has started 2")):
        environ = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environ | task | launched,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert expected in done.stdout + done.stderr

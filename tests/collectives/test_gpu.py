"""What needs a GPU is skipped without one; the decisions are pure functions, tested everywhere.

Two ranks may share one GPU here: over NCCL as if on two hosts, over MPI in memory that the host can read as well.
"""

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers import mpi
from helpers.processes import run_processes
from helpers.trees import GPU, assert_is_mean

from funcavg import PeerLostError, _device, _points, average, broadcast, differences, start_average, streaming_diloco
from funcavg._average import start_with
from funcavg._engine import flight
from funcavg._engine.buckets import make_plan
from funcavg._engine.copies import DeviceCopyLane
from funcavg._engine.device_slots import DeviceSlots
from funcavg._engine.lanes import Cargo, DeviceLane
from funcavg._trees import Options
from funcavg._trees.arrays import torch as arrays
from funcavg._trees.arrays.torch import Tensors
from funcavg.collectives import Solo, as_collective
from funcavg.collectives.torch import DeviceVerbs, TorchCollective, device_route
from funcavg.stateful import PeriodicModelAverager
from funcavg.testing import run_ranks

FAKED = (1, 17, 3, 1)  # a shape that no other test has: what is known of one is remembered
SLOW = 200_000_000  # cycles, a tenth of a second, for which a stream has something else to do


@pytest.mark.parametrize(
    ("backend", "element", "weighted", "route"),
    [
        ("nccl", "float32", False, "average"),
        ("nccl", "float64", False, "average"),
        ("nccl", "float16", False, "exchange"),  # a ring would round at every hop
        ("nccl", "bfloat16", False, "exchange"),
        ("nccl", "float8_e4m3fn", False, "exchange"),
        ("nccl", "float32", True, "exchange"),  # the backend knows no weights
        ("gloo", "float32", False, "host"),
        (None, "bfloat16", True, "host"),
    ],
)
def test_which_way_leaves_of_an_accelerator_take(backend, element, weighted, route):
    assert device_route(backend, element, weighted=weighted) == route


def gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


def written_late(value, size=1_000_000):
    """Return a leaf whose values its stream has yet to write."""
    leaf = torch.zeros(size, device="cuda")
    torch.cuda.synchronize()
    torch.cuda._sleep(SLOW)
    return leaf.add_(value)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("donate", [False, True])
def test_cuda_leaves_pass_through_the_host_where_the_transport_knows_no_gpu(dtype, donate):
    def fn(group):
        leaf = torch.full((1000, 7), 1 + group.rank, dtype=dtype, device="cuda")
        with torch.no_grad():
            result = average({"w": leaf}, group, donate=donate)["w"]
        return result is leaf, result

    for same, result in run_ranks(2, fn):
        assert same is donate
        assert result.device.type == "cuda"
        assert torch.equal(result, torch.full_like(result, 1.5))


@gpu
def test_the_host_waits_for_the_stream_that_writes_a_leaf():
    def fn(group):
        with torch.cuda.stream(torch.cuda.Stream()):
            leaf = written_late(group.rank)
            plain = average(leaf, group).unique().tolist()
        with torch.cuda.stream(torch.cuda.Stream()):
            handle = start_average(written_late(group.rank), group)
        return plain, handle.wait().unique().tolist()

    assert run_ranks(2, fn) == [([0.5], [0.5])] * 2


def rows_of_the_host(rank):
    """The verbs for device memory move the right rows; here of the host's, over Gloo, in the same calls."""
    verbs = DeviceVerbs(dist.group.WORLD, as_collective(dist.group.WORLD))
    send = torch.tensor([[10 * rank + peer] * 5 for peer in range(verbs.size)], dtype=torch.uint8)
    receive = torch.zeros_like(send)
    verbs.exchange(send, receive, 20)()
    exchanged = receive[:, 0].tolist()
    send[rank] = 100 + rank
    verbs.share(send, 20)()
    return exchanged, send[:, 0].tolist()


def test_the_verbs_for_device_memory_move_the_right_rows():
    shared = [100, 101, 102]
    assert run_processes(3, rows_of_the_host) == [([r, 10 + r, 20 + r], shared) for r in range(3)]


def lane_of_the_host(rank):
    """The lane of device memory, over many more buckets than it has slots; here in the host's memory."""
    verbs = DeviceVerbs(dist.group.WORLD, as_collective(dist.group.WORLD))
    family, slots = Tensors(), DeviceSlots("cpu")
    leaves = [torch.arange(count, dtype=torch.float32).bfloat16() + rank for count in (5000, 3, 0, 70)]
    results = [torch.zeros_like(leaf) for leaf in leaves]
    plan = make_plan([(i, family, family.describe(leaf)) for i, leaf in enumerate(leaves)], 2, slots, 512)
    seen = []
    for weights in (None, [1.0, 3.0]):
        with slots.in_turn():
            lane = DeviceLane(plan, verbs, rank, slots, verbs.averages_natively(weighted=True))
            lane.carry(Cargo(leaves, results, weights, 20.0, land_in_results=False, send_from_leaves=False))
        seen.append([leaf.clone() for leaf in results])
    return len(plan), seen


def test_the_lane_for_device_memory_averages():
    numbers = [torch.arange(count, dtype=torch.float32).bfloat16() for count in (5000, 3, 0, 70)]
    for buckets, seen in run_processes(2, lane_of_the_host):
        assert buckets > 10
        for results, weights in zip(seen, (None, [1.0, 3.0]), strict=True):
            for result, leaf in zip(results, numbers, strict=True):
                assert_is_mean(result, [leaf, leaf + 1], weights)


def copies_of_the_host(rank):
    """The lane that copies device memory, over a broadcast of the group's own; here in the host's memory."""
    verbs = DeviceVerbs(dist.group.WORLD, as_collective(dist.group.WORLD))
    family, slots = Tensors().exact(), DeviceSlots("cpu")
    leaves = [torch.full((count,), 7 * rank + 1, dtype=torch.int16) for count in (5000, 3, 0, 70)]
    plan = make_plan([(i, family, family.describe(leaf)) for i, leaf in enumerate(leaves)], 3, slots, 512)
    seen = []
    for root in range(3):
        results = [torch.zeros_like(leaf) for leaf in leaves]
        with slots.in_turn():
            lane = DeviceCopyLane(plan, verbs, rank, root)
            lane.carry(Cargo(leaves, results, None, 20.0, land_in_results=False, send_from_leaves=False))
        seen.append([leaf.unique().tolist() for leaf in results])
    return len(plan), seen


def test_the_lane_for_device_memory_copies():
    for buckets, seen in run_processes(3, copies_of_the_host):
        assert buckets > 10
        assert seen == [[[7 * root + 1], [7 * root + 1], [], [7 * root + 1]] for root in range(3)]


class Work:
    """A collective of NCCL's: not over, over, or failed."""

    def __init__(self, over, error=None):
        self.over, self.error, self.waited = over, error, False

    def is_completed(self):
        return self.over

    def wait(self, timeout):
        self.waited = True
        if self.error:
            raise RuntimeError(self.error)


class Stub(SimpleNamespace):
    __hash__ = object.__hash__


def nccl_of(*works):
    """Return the verbs of a rank whose collectives are these, and a list that tells whether NCCL was aborted."""
    aborted = []
    backend = SimpleNamespace(abort=lambda: aborted.append(True))

    def allreduce(tensors, options):
        work = left.pop(0)
        if isinstance(work, Exception):
            raise work
        return work

    left, group = list(works), Stub(allreduce=allreduce, _get_backend=lambda device: backend)
    group.rank, group.size = (lambda: 0), (lambda: 2)
    owner = TorchCollective(group, None)
    return DeviceVerbs(group, owner), owner, aborted  # the verbs keep the group


def test_a_collective_of_nccl_that_is_late_is_aborted_and_no_stream_waits_for_it():
    work = Work(over=False)
    verbs, owner, aborted = nccl_of(work)
    wait = verbs.average(torch.ones(3), 0.2)
    with pytest.raises(PeerLostError, match=r"rank 0 of 2 waited [0-4]\.\d s of 0\.2 s for NCCL"):
        wait()
    owner.abort()
    assert aborted
    assert not work.waited


def test_a_collective_of_nccl_that_fails_is_a_lost_peer():
    text = "[PG ID 0 Rank 0] NCCL error: remote process exited.\nException raised from check (most recent call first):"
    for works in ([Work(over=True, error=text)], [RuntimeError(text)]):
        verbs, _, _ = nccl_of(*works)
        with pytest.raises(
            PeerLostError, match=r"rank 0 of 2 waited (for|to start) NCCL .*s: NCCL error: remote.*exited\.$"
        ):
            verbs.average(torch.ones(3), 5.0)()


def test_nccl_is_left_alone_where_nothing_is_under_way():
    verbs, owner, aborted = nccl_of(Work(over=True))
    verbs.average(torch.ones(3), 5.0)()
    owner.abort()
    assert not aborted


def test_signals_are_handled_while_nccl_connects():
    """In its first collective, inside the library; here inside another one, which lets no handler run either."""

    class Preempted(Exception):
        pass

    def connect(*_):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000)
        return Work(over=True)

    def handle(*_):
        heard.append(time.monotonic())
        if len(heard) == 2:
            raise Preempted

    heard, before = [], signal.signal(signal.SIGUSR2, handle)
    try:
        for call in (1, 2):
            verbs, _, aborted = nccl_of()
            verbs._group.allreduce = connect
            sent = time.monotonic() + 0.3
            timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR2))
            timer.start()
            if call == 1:
                verbs.average(torch.ones(3), 5.0)()
            else:
                with pytest.raises(Preempted):
                    verbs.average(torch.ones(3), 5.0)
                assert time.monotonic() - sent < 1.0
            assert heard[-1] - sent < 0.5
            assert bool(aborted) == (call == 2)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_next_call_waits_for_the_stream_of_the_last(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def record_event(self):
            return self.name

        def wait_event(self, event):
            said.append(f"{self.name} waits for {event}")

    slots = DeviceSlots("cpu")
    slots.lend(0, 2, 4)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda memory, stream: said.append(f"{stream.name} uses it"))
    for name in "ab":
        monkeypatch.setattr(_device, "current_stream", lambda device, name=name: Stream(name))
        with slots.in_turn():
            said.append(f"{name} works")
    assert said == ["a uses it", "a works", "b waits for a", "b uses it", "b works"]


@pytest.mark.parametrize("aside", [True, False])
def test_only_what_is_said_to_go_aside_is_averaged_in_a_thread_beside_other_streams(aside, monkeypatch):
    said = []

    class Noted:
        def __init__(self, devices):
            said.append(("marked", *devices))

        def wait(self):
            said.append("comes after the mark")

    @contextlib.contextmanager
    def side_streams(devices):
        said.append(("own streams", threading.current_thread() is not threading.main_thread(), *devices))
        yield
        said.append("done there")

    monkeypatch.setattr(arrays, "_accelerator", lambda leaf: "cuda:7")  # it says so
    monkeypatch.setattr(flight, "Mark", Noted)
    monkeypatch.setattr(flight, "side_streams", side_streams)
    monkeypatch.setattr(flight, "use_here", lambda results: said.append(("used here", len(results))))
    leaf = torch.full(FAKED, 7.0)
    handle = start_with(Options(aside=aside), {"w": leaf}, Solo())
    assert torch.equal(handle.wait()["w"], leaf)
    own = [("own streams", True, "cuda:7")] * aside
    done = ["done there"] * aside
    assert said == [("marked", "cuda:7"), *own, "comes after the mark", *done, ("used here", int(aside))]


@pytest.mark.parametrize("aside", [True, False])
def test_what_goes_aside_goes_by_way_of_the_host(aside, monkeypatch):
    """Where no order of NCCL's collectives, which the training may use, is touched."""
    asked = []

    def fn(group):
        group.device_verbs = asked.append
        leaf = torch.full(FAKED, float(group.rank))
        return start_with(Options(aside=aside), leaf, group).wait().unique().tolist()

    monkeypatch.setattr(arrays, "_accelerator", lambda leaf: "cuda:7")  # it says so
    monkeypatch.setattr(_device, "current_stream", lambda device: None)
    assert run_ranks(2, fn) == [[0.5]] * 2
    assert asked == ([] if aside else ["cuda"] * 2)


def test_streams_of_a_threads_own(monkeypatch):
    said = []

    class Stream:
        def __init__(self, device):
            self.device = device

        def record_event(self):
            return SimpleNamespace(synchronize=lambda: said.append("waited"))

    @contextlib.contextmanager
    def within(stream):
        said.append(f"in a stream of {stream.device}")
        yield
        said.append("left")

    monkeypatch.setattr(torch, "xpu", SimpleNamespace(current_stream=Stream, Stream=Stream, stream=within))
    with _device.side_streams(["cpu", "xpu:1"]):
        said.append("works")
    assert said == ["in a stream of xpu:1", "works", "waited", "left"]
    recorded = []
    tensor = SimpleNamespace(device="xpu:1", record_stream=lambda stream: recorded.append(stream.device))
    _device.use_here([torch.ones(2), tensor])
    assert recorded == ["xpu:1"]


def streamed(group, device):
    """Train by streaming DiLoCo, two steps under way; return what comes of it, and seconds of the first sending."""
    averager = streaming_diloco(8, fragments=2, delay=2, mix=0.25, group=group)
    params = {name: torch.linspace(0, 1, 300_000, device=device).view(300, 1000) for name in "ab"}
    state, seconds = averager.init(params), 0.0
    for step in range(20):
        draw = torch.Generator().manual_seed(100 * step + group.rank)
        params = {name: leaf + torch.randn(leaf.shape, generator=draw).to(device) for name, leaf in params.items()}
        if device != "cpu" and step == 1:
            torch.cuda.synchronize()
            torch.cuda._sleep(SLOW)
        begin = time.perf_counter()
        params, state = averager.update(params, state)
        seconds = time.perf_counter() - begin if step == 1 else seconds
    assert {vector.device.type for vector in state.sent.values()} == {torch.device(device).type}
    return [leaf.cpu() for leaf in params.values()], seconds


@gpu
def test_fragments_of_a_gpu_travel_beside_what_it_computes():
    expected = run_ranks(2, lambda group: streamed(group, "cpu"))
    for (found, seconds), (params, _) in zip(
        run_ranks(2, lambda group: streamed(group, "cuda")), expected, strict=True
    ):
        assert seconds < 0.05  # who sends does not wait for what is queued
        for leaf, other in zip(found, params, strict=True):
            torch.testing.assert_close(leaf, other, rtol=0, atol=1e-5)  # a GPU fuses products and sums


def nccl_group(rank):
    """Return an NCCL group of two ranks, which share a GPU if there is one only: NCCL allows it on different hosts."""
    if torch.cuda.device_count() == 1:
        os.environ.update(NCCL_HOSTID=f"host{rank}", NCCL_SOCKET_IFNAME="lo")
    torch.cuda.set_device(rank % torch.cuda.device_count())
    return dist.new_group([0, 1], backend="nccl")


def nccl_tree(rank):
    names = ("float32", "float64", "bfloat16", "float16", "complex64", "float8_e5m2")
    large = [torch.full((3_000_001,), float(rank), device="cuda").to(getattr(torch, name)) for name in names]
    small = [torch.full((3, 5), float(rank), device="cuda").t() for _ in range(9)]
    return [*large, *small, torch.full((5,), float(rank))]


def nccl_means(rank):
    group = nccl_group(rank)
    tree = nccl_tree(rank)
    plain, weighted = average(tree, group), average(tree, group, weight=1 + 2 * rank)
    untouched = all(map(torch.equal, tree, nccl_tree(rank)))
    donated = average(tree, group, donate=True)
    in_place = all(one is other for one, other in zip(tree, donated, strict=True))
    results = (plain, 0.5), (weighted, 0.75), (donated, 0.5)
    wrong = [
        leaf.dtype for tree, mean in results for leaf in tree if not torch.equal(leaf, torch.full_like(leaf, mean))
    ]
    return untouched, in_place, wrong, {leaf.device.type for leaf in plain[:-1]}


@gpu
def test_nccl_averages_on_the_device():
    assert run_processes(2, nccl_means, timeout=100) == [(True, True, [], {"cuda"})] * 2


def nccl_equal_replicas(rank):
    """Random bits, the same on both ranks, where funcavg sums: they come back bit for bit."""
    group = nccl_group(rank)
    torch.manual_seed(0)
    tree = [torch.randn(100_003, device="cuda").to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    plain, weighted = average(tree[:2], group), average(tree, group, weight=0.1 + 0.7 * rank)
    return all(map(torch.equal, [*plain, *weighted], [*tree[:2], *tree]))


@gpu
def test_equal_replicas_come_back_where_nccl_does_not_sum():
    assert run_processes(2, nccl_equal_replicas, timeout=100) == [True, True]


def nccl_streams(rank):
    """The second call packs while the first, on another stream, has yet to unpack the same memory."""
    group = nccl_group(rank)
    average(torch.zeros(1, device="cuda"), group)
    one, other, reached = torch.cuda.Stream(), torch.cuda.Stream(), _points.reached
    late, early = torch.full((1_000_000,), 10.0, device="cuda"), torch.full((1_000_000,), float(rank), device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(one):
        late.add_(rank)
        _points.reached = lambda point, number: point == "reduced" and torch.cuda._sleep(SLOW)
        first = average(late, group)
        _points.reached = reached
    with torch.cuda.stream(other):
        second = average(early, group)
    with torch.cuda.stream(one):
        handle = start_average(written_late(rank), group)
    third = handle.wait()
    torch.cuda.synchronize()
    return [tensor.unique().tolist() for tensor in (first, second, third)]


@gpu
def test_calls_on_several_streams_do_not_meet_in_the_buckets():
    assert run_processes(2, nccl_streams, timeout=100) == [[[10.5], [0.5], [0.5]]] * 2


def nccl_wire(rank):
    """With a wire, leaves travel by way of the host, where they are encoded as the host's own are."""
    group = nccl_group(rank)
    host = {
        "w": torch.randn(300_000, generator=torch.Generator().manual_seed(rank)),
        "b": torch.full((70,), 1.0 + rank),
    }
    tree = {name: leaf.cuda() for name, leaf in host.items()}
    found = []
    for wire in ("bfloat16", "int8", "int4", "int2"):
        result = average(tree, group, wire=wire)
        later = start_average(tree, group, wire=wire).wait()
        assert {leaf.device.type for leaf in result.values()} == {"cuda"}
        of_host = average(host, group, wire=wire)
        found += [torch.equal(leaf[name].cpu(), of_host[name]) for leaf in (result, later) for name in host]
    return found


@gpu
def test_with_a_wire_leaves_of_a_gpu_get_the_bits_of_the_hosts():
    assert run_processes(2, nccl_wire, timeout=100) == [[True] * 16] * 2


def nccl_broadcast(rank):
    group = nccl_group(rank)
    tree = {
        "late": written_late(rank),
        "count": torch.tensor(rank, device="cuda"),
        "half": torch.full((40_000_000,), rank, dtype=torch.bfloat16, device="cuda"),
        "host": torch.tensor([rank]),
    }
    with torch.no_grad():
        result = broadcast(tree, group, root=1)
    seen = [leaf.unique().tolist() for leaf in result.values()]
    with torch.no_grad():
        donated = broadcast(tree, group, root=1, donate=True)
    return seen, [leaf.unique().tolist() for leaf in donated.values()], differences(donated, group), differences(tree)


@gpu
def test_nccl_broadcasts():
    assert run_processes(2, nccl_broadcast, timeout=100) == [([[1]] * 4, [[1]] * 4, [], [])] * 2


def nccl_shim(rank):
    group = nccl_group(rank)
    model = torch.nn.Linear(100, 100, device="cuda")
    model(torch.ones(100, device="cuda")).sum().backward()
    averager = PeriodicModelAverager(period=2, process_group=group)
    values = []
    for step in range(3):
        for param in model.parameters():
            param.data.fill_(10.0 * step + rank)
        averager.average_parameters(model.parameters())
        values.append([param.unique().tolist() for param in model.parameters()])
    return values


@gpu
def test_the_stand_in_averages_a_model_over_nccl():
    rank0, rank1 = run_processes(2, nccl_shim, timeout=100)
    assert rank0[0] == rank1[0] == [[0.5], [0.5]]
    assert (rank0[1], rank1[1]) == ([[10.0], [10.0]], [[11.0], [11.0]])
    assert rank0[2] == rank1[2] == [[20.5], [20.5]]


def nccl_lost_before_a_call(rank):
    group = nccl_group(rank)
    leaf = torch.full((1_000_000,), float(rank), device="cuda")
    average(leaf, group)
    if rank == 1:
        os._exit(1)
    started = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 0 of 2"):
        average(leaf, group, donate=True, timeout=3)
    return time.monotonic() - started < 6 and leaf.unique().tolist() == [0.0]


@gpu
def test_a_rank_that_is_gone_is_noticed_before_nccl_is_called():
    assert run_processes(2, nccl_lost_before_a_call, timeout=100, dies=(1,)) == [True, None]


class Over(Exception):
    """Rank 1 leaves a call in the middle."""


def nccl_late_in_the_middle(rank):
    """Rank 1 has agreed, and comes to NCCL too late."""
    group = nccl_group(rank)
    leaf = torch.full((1_000_000,), float(rank), device="cuda")
    average(leaf, group)
    reached = _points.reached

    def late(point, number):
        time.sleep(8)
        raise Over

    _points.reached = late if rank == 1 else reached
    started = time.monotonic()
    with pytest.raises(Over if rank == 1 else PeerLostError) as raised:
        average(leaf, group, donate=True, timeout=5)
    seconds = time.monotonic() - started
    unchanged = leaf.unique().tolist() == [float(rank)]  # and nothing on the stream waits for NCCL any more
    _points.reached = reached
    dist.barrier()
    return str(raised.value), seconds, unchanged, average(leaf, nccl_group(rank), timeout=20).unique().tolist()


@gpu
def test_a_rank_that_comes_too_late_to_nccl():
    (message, seconds, *rest), (_, _, *others) = run_processes(2, nccl_late_in_the_middle, timeout=100)
    assert re.search(r"rank 0 of 2 waited 5\.\d s of 5 s for NCCL\. The group is spent", message), message
    assert 5 <= seconds < 8
    assert rest == others == [True, [0.5]]


def nccl_dead_in_the_middle(rank, bucket):
    group = nccl_group(rank)
    leaf = torch.full((30_000_000,), float(rank), device="cuda")
    average(leaf, group)
    if rank == 1:
        _points.reached = lambda point, number: (point, number) == ("copied_in", bucket) and os._exit(1)
    with pytest.raises(PeerLostError, match="rank 0 of 2") as raised:
        average(leaf, group, timeout=8)
    return str(raised.value), leaf.unique().tolist()


@gpu
@pytest.mark.parametrize("bucket", [0, 1])
def test_a_rank_that_dies_when_nccl_is_called(bucket):
    (message, values), _ = run_processes(2, nccl_dead_in_the_middle, bucket, timeout=100, dies=(1,))
    assert "NCCL" in message, message
    assert "frame" not in message, message
    assert values == [0.0]


HOST_READABLE = """
#include <dlfcn.h>
#include <stddef.h>
static void *driver(const char *name) { return dlsym(dlopen("libcuda.so.1", RTLD_NOW), name); }
void *take(ptrdiff_t size, int device, void *stream) {
    int (*allocate)(void **, size_t) = driver("cuMemAllocHost_v2");
    void *memory = 0;
    return allocate(&memory, size) ? 0 : memory;
}
void give(void *memory, ptrdiff_t size, int device, void *stream) {
    int (*release)(void *) = driver("cuMemFreeHost");
    release(memory);
}
"""


def over_mpi(comm, library):
    from funcavg.collectives.mpi import MPIDeviceVerbs

    allocator = torch.cuda.memory.CUDAPluggableAllocator(library, "take", "give")
    torch.cuda.memory.change_current_allocator(allocator)
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    leaves = [torch.zeros(3_000_001, dtype=dtype, device="cuda") for dtype in dtypes]
    average(leaves, comm, donate=True)
    assert isinstance(as_collective(comm).device_verbs("cuda"), MPIDeviceVerbs)
    seen = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for weight in (1, 1 + 2 * comm.rank):
            torch.cuda._sleep(SLOW)
            for leaf in leaves:
                leaf.fill_(comm.rank)
            average(leaves, comm, weight=weight, donate=True)
            seen.append([leaf.unique().tolist() for leaf in leaves])
    return seen


@gpu
@pytest.mark.mpi
def test_mpi_moves_device_memory(tmp_path):
    """The library of a wheel knows no GPU, so tensors lie in memory that both sides can read. The way is the same."""
    source, library = tmp_path / "host_readable.c", tmp_path / "host_readable.so"
    source.write_text(HOST_READABLE)
    subprocess.run([shutil.which("cc") or "gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    expected = [[[0.5]] * 3, [[0.75]] * 3]
    assert mpi.run_mpi(2, over_mpi, str(library), timeout=100, FUNCAVG_MPI_GPU="1") == [expected] * 2


JAX = """
import jax, jax.numpy as jnp
from funcavg import average, start_average
from funcavg.testing import run_ranks

assert jax.default_backend() == "gpu", jax.default_backend()

def fn(group):
    tree = {"w": jnp.full((1_000_000,), float(group.rank)), "b": jnp.full((7,), group.rank, jnp.bfloat16), "n": 3}
    eager, handle = average(tree, group), start_average({"w": tree["w"] + 1}, group)
    kind = {leaf.devices().pop().platform for leaf in (eager["w"], eager["b"])}
    later = handle.wait()["w"]
    jitted = jax.jit(lambda tree: average(tree, group))({"w": tree["w"] + 2, "b": tree["b"]})
    values = [set(map(float, leaf)) for leaf in (eager["w"][:9], eager["b"], later[:9], jitted["w"][-9:], jitted["b"])]
    return kind, eager["n"], values

for result in run_ranks(2, fn):
    assert result == ({"gpu"}, 3, [{0.5}, {0.5}, {1.5}, {2.5}, {0.5}]), result
print("averaged")
"""


@gpu
def test_jax_arrays_on_a_gpu():
    environ = os.environ | {"JAX_PLATFORMS": "", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def run(code):
        args = [sys.executable, "-c", code]
        return subprocess.run(args, env=environ, capture_output=True, text=True, timeout=60, check=False)

    if "gpu" not in run("import jax; print(jax.default_backend())").stdout:
        pytest.skip("jax finds no GPU")
    done = run(JAX)
    assert done.stdout.strip() == "averaged", done.stderr

"""Signal handlers run within a second wherever a call waits, and what they raise ends the call."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import mpi
from helpers.processes import run_processes

from funcavg import PeerLostError, _points, average, start_average
from funcavg._engine import session_of
from funcavg.collectives import Solo
from funcavg.collectives.waiting import Waiter

LATE = 4.0  # seconds that the peer lets this rank wait; a handler that waits for it runs 3.5 later
SIGNAL = signal.SIGUSR2  # helpers.processes has another use for SIGUSR1


class Preempted(RuntimeError):
    """Of the kind that torch raises for a lost connection: it is not to be taken for one."""


class Bell:
    """Sends this process a signal soon; notes when it was sent, and when its handler ran."""

    def __init__(self, *, raising=False):
        self.sent = self.heard = 0.0
        self.raising = raising

    def __enter__(self):
        self.before = signal.signal(SIGNAL, self.handle)
        self.timer = threading.Timer(0.5, self.ring)
        self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.join()
        signal.signal(SIGNAL, self.before)

    def ring(self):
        self.sent = time.monotonic()
        os.kill(os.getpid(), SIGNAL)

    def handle(self, *_):
        self.heard = time.monotonic()
        if self.raising:
            raise Preempted("the scheduler wants the node")

    def took(self):
        return self.heard - self.sent if self.heard else float("inf")


def tree_of(rank):
    return {"large": torch.arange(600_000.0) + rank, "small": np.full(3, float(rank))}


def is_mean(tree):
    return bool(torch.equal(tree["large"], torch.arange(600_000.0) + 0.5) and (tree["small"] == 0.5).all())


def is_unchanged(tree, rank):
    return bool(torch.equal(tree["large"], torch.arange(600_000.0) + rank) and (tree["small"] == rank).all())


def at_work():
    """Return the names of functions in which threads of funcavg's own are busy, for half a second."""
    until = time.monotonic() + 0.5
    while True:  # a thread that has said that it is done may still be on its way back
        frames = sys._current_frames()
        ours = [frames.get(t.ident) for t in threading.enumerate() if t.name.startswith("funcavg")]
        busy = [frame.f_code.co_name for frame in ours if frame is not None and frame.f_code.co_name != "_serve"]
        if not busy or time.monotonic() > until:
            return busy
        time.sleep(0.01)


def here(rank, group):
    """At the first step of a call."""
    if rank == 1:
        time.sleep(LATE)


def within(rank, group):
    """In the middle of a call: the peer is late with its second bucket."""
    if rank == 1:

        def reached(where, number=0):
            if (where, number) == ("copied_in", 1):
                _points.reached = lambda where, number=0: None
                time.sleep(LATE)

        _points.reached = reached


def connecting(rank, group):
    """The peer has met this rank in the store, and is slow to connect."""
    if rank == 1:
        from funcavg.collectives import connecting

        class Slow:
            distributed_c10d, DistError = dist.distributed_c10d, dist.DistError

            def ProcessGroupGloo(self, *args):
                time.sleep(LATE)
                return dist.ProcessGroupGloo(*args)

        connecting.dist = Slow()


def scenario(rank, group, warm, obstacle, raising, call=average):
    if warm:
        call(tree_of(rank), group)
    obstacle(rank, group)
    tree = tree_of(rank)
    if rank == 1:
        try:
            return is_mean(call(tree, group, timeout=4)), 0.0
        except (PeerLostError, RuntimeError):
            return raising, 0.0
    with Bell(raising=raising) as bell:
        if not raising:
            return is_mean(call(tree, group)), bell.took()
        with pytest.raises(Preempted, match="the scheduler wants the node"):
            call(tree, group)
        raised = time.monotonic() - bell.sent
    assert is_unchanged(tree, rank)
    if obstacle.__name__ not in ("connecting", "silent"):  # which touch no memory of the call's, and end by themselves
        assert at_work() == []
    words = r"this group is spent, since an earlier call on it was interrupted by a signal \(Preempted: the scheduler"
    with pytest.raises(PeerLostError, match=words):
        average(1.0, group)
    return is_unchanged(tree, rank), max(bell.took(), raised)


def over_gloo(rank, node, warm, obstacle, raising):
    os.environ["FUNCAVG_NODE"] = node
    return scenario(rank, dist.group.WORLD, warm, obstacle, raising)


def nothing_is_written_late(rank):
    """Donated memory stays as the interrupted call has left it, whatever the peer still sends."""
    os.environ["FUNCAVG_NODE"] = "off"
    average(tree_of(rank))
    within(rank, None)
    tree = tree_of(rank)
    if rank == 1:
        with pytest.raises(PeerLostError):
            average(tree, donate=True, timeout=4)
        return True
    with Bell(raising=True), pytest.raises(Preempted):
        average(tree, donate=True)
    left = tree["large"].clone(), tree["small"].copy()
    assert at_work() == []
    time.sleep(LATE)
    return bool(torch.equal(tree["large"], left[0]) and (tree["small"] == left[1]).all())


def test_nothing_is_written_late():
    assert run_processes(2, nothing_is_written_late) == [True, True]


def over_mpi(comm, warm, obstacle, raising):
    return scenario(comm.rank, comm, warm, obstacle, raising)


def compiled(rank, raising):
    os.environ["FUNCAVG_NODE"] = "off"
    import jax
    import jax.numpy as jnp

    def call(tree, group, **options):
        leaves = {key: jnp.asarray(np.asarray(leaf)) for key, leaf in tree.items()}
        means = jax.jit(lambda tree: average(tree, group, **options))(leaves)
        return {"large": torch.from_numpy(np.array(means["large"])), "small": np.asarray(means["small"])}

    return scenario(rank, dist.group.WORLD, True, here, raising, call)


def all_is_well(outcomes):
    (right, took), (also, _) = outcomes
    assert right
    assert also
    assert took < LATE / 2
    return True


@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize(
    ("node", "warm", "obstacle"),
    [("off", True, here), ("off", True, within), ("off", False, here), ("off", False, connecting), ("one", True, here)],
    ids=["agreement", "bucket", "store", "connecting", "memory"],
)
def test_over_torch(node, warm, obstacle, raising):
    assert all_is_well(run_processes(2, over_gloo, node, warm, obstacle, raising))


@pytest.mark.mpi
@pytest.mark.parametrize("raising", [False, True])
@pytest.mark.parametrize(("node", "warm"), [("off", True), ("off", False), ("one", True)])
def test_over_mpi(node, warm, raising):
    assert all_is_well(mpi.run_mpi(2, over_mpi, warm, here, raising, FUNCAVG_NODE=node))


@pytest.mark.parametrize("raising", [False, True])
def test_inside_jit(raising):
    pytest.importorskip("jax")
    assert all_is_well(run_processes(2, compiled, raising))


SERVER = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""


def silent_store(rank, port, pid, raising):
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port, is_master=False), rank=rank, world_size=2)
    average(1.0, dist.new_group())
    group = dist.new_group()
    dist.barrier()

    def silent(rank, group):
        if rank == 0:
            os.kill(pid, signal.SIGSTOP)
            subprocess.Popen(["sh", "-c", f"sleep {LATE}; kill -CONT {pid}"])
        else:
            time.sleep(1.0)

    return scenario(rank, group, False, silent, raising)


@pytest.mark.parametrize("raising", [False, True])
def test_a_store_whose_server_is_silent(raising):
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline())
            assert all_is_well(run_processes(2, silent_store, port, server.pid, raising))
        finally:
            server.kill()


def in_the_background(rank):
    """A wait for a handle that is interrupted can be repeated: the call goes on in its own thread."""
    os.environ["FUNCAVG_NODE"] = "off"
    average(1.0)
    handle = start_average(tree_of(rank)) if rank == 0 else None
    if rank == 1:
        time.sleep(LATE)
        return is_mean(average(tree_of(rank))), 0.0
    with Bell(raising=True) as bell, pytest.raises(Preempted):
        handle.wait()
    return is_mean(handle.wait()), bell.took()


def test_in_the_background():
    assert all_is_well(run_processes(2, in_the_background))


def other_threads_wait_themselves(rank):
    os.environ["FUNCAVG_NODE"] = "off"
    means = []
    thread = threading.Thread(target=lambda: means.append(average(float(rank))))
    thread.start()
    thread.join()
    return means, [t.name for t in threading.enumerate() if t.name.startswith("funcavg")]


def test_threads_in_which_no_handler_runs_wait_themselves():
    assert run_processes(2, other_threads_wait_themselves) == [([0.5], [])] * 2


def with_a_dead_neighbour(rank, folder):
    """Rank 0 is late. Rank 1 waits for it, while rank 2 goes; then rank 1 is interrupted."""
    os.environ["FUNCAVG_NODE"] = "off"
    average(tree_of(rank))
    if rank == 2:
        while not Path(folder, "waiting").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os._exit(0)
    if rank == 0:
        time.sleep(LATE + 4)
        return 0.0
    Path(folder, "waiting").touch()
    with Bell(raising=True) as bell:
        with pytest.raises(Preempted):
            average(tree_of(rank), timeout=30)
        return time.monotonic() - bell.sent


def test_a_dead_neighbour_does_not_keep_an_interrupted_wait_waiting(tmp_path):
    _, took, _ = run_processes(3, with_a_dead_neighbour, str(tmp_path), dies=(2,))
    assert took < LATE / 2


def test_signals_that_come_while_a_wait_is_ended_do_not_keep_it_from_ending():
    """Two that are pending at once, as Ctrl-C under a launcher that sends its own; and one during the end."""
    waiter, over, log = Waiter(), threading.Event(), []

    def interrupt():
        log.append("begun")
        if len(log) == 1:
            signal.raise_signal(SIGNAL)
        log.append("ended")
        over.set()

    def handle(number, _):
        raise Preempted(number)

    before = {number: signal.signal(number, handle) for number in (SIGNAL, signal.SIGTERM)}
    try:
        threading.Timer(0.2, lambda: [os.kill(os.getpid(), number) for number in before]).start()
        with pytest.raises(Preempted):
            waiter.run(lambda: over.wait(20), interrupt)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert log[-1] == "ended"
    assert over.is_set()
    assert at_work() == []


class Composed:
    def __call__(self, *_):
        raise Preempted("composed")


@pytest.mark.parametrize(
    "handler", [Composed(), functools.partial(lambda _, *__: Composed()(), "x"), signal.default_int_handler], ids=str
)
def test_handlers_of_every_form_are_known_as_such(handler):
    group, before = Solo(), signal.signal(SIGNAL, handler)
    try:
        with pytest.raises((Preempted, KeyboardInterrupt)) as caught:
            signal.raise_signal(SIGNAL)
        session_of(group).spend(caught.value, late_writes=False)
    finally:
        signal.signal(SIGNAL, before)
    with pytest.raises(PeerLostError, match="an earlier call on it was interrupted by a signal"):
        average(1.0, group)


EXITS = """
import os, signal, sys, threading, time
os.environ["FUNCAVG_NODE"] = "off"
rank, store = int(sys.argv[1]), sys.argv[2]
import torch.distributed as dist
from funcavg import average
from funcavg.collectives import connecting
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dist.barrier()
if rank == 1:
    make = dist.ProcessGroupGloo
    class Slow:
        distributed_c10d, DistError = dist.distributed_c10d, dist.DistError
        def ProcessGroupGloo(self, *args):
            time.sleep(1.6)
            return make(*args)
    connecting.dist = Slow()
    try:
        average(1.0, timeout=6)
    except Exception:
        pass
    os._exit(0)
def stop(*_):
    sys.exit(7)  # after a checkpoint, say
signal.signal(signal.SIGTERM, stop)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
average(1.0)
"""


def test_a_process_that_exits_while_it_connects_keeps_its_exit_status(tmp_path):
    """Also where the peer comes while the interpreter ends."""
    command = [sys.executable, "-c", EXITS]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE) for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert ranks[0].returncode == 7, said[0].decode()

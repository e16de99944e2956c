"""Streaming DiLoCo over the network: slow links, all transports, one group for several, and ranks that leave."""

import gc
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from helpers import mpi
from helpers.averaging import Streaming, train
from helpers.frameworks import dist, skip_without, torch
from helpers.processes import run_processes
from test_averagers import same
from test_streaming import nothing_is_left  # noqa: F401  # for every test of this module, too

from funcavg import PeerLostError, average, diloco, forget, outer, start_average, streaming_diloco
from funcavg.averagers import _flights
from funcavg.collectives import as_collective
from funcavg.collectives.threads import Threads
from funcavg.testing import run_ranks


class Slow(Threads):
    """A rank of threads whose every byte takes its time."""

    def __init__(self, group, rate):
        super().__init__(group.rank, group._meeting)
        self._rate = rate  # bytes per second

    def exchange(self, send, receive, timeout):
        time.sleep(send[self.rank].nbytes * (self.size - 1) / self._rate)
        super().exchange(send, receive, timeout)

    def share(self, buffer, timeout):
        time.sleep(buffer[self.rank].nbytes * (self.size - 1) / self._rate)
        super().share(buffer, timeout)


def test_training_goes_on_while_fragments_travel_and_no_step_sends_much():
    """Over a link so slow that `diloco` computes 60 % of the time; 8 steps from one fragment to the next."""
    period, step, nbytes = 16, 0.03, 1 << 20
    rate = nbytes / (period * step * 0.4 / 0.6)

    def fn(group, make, steps):
        group = Slow(group, rate)
        averager = make(group)
        params = {"w": np.ones((16, nbytes // 64), np.float32)}
        state, computing, bursts = averager.init(params), 0.0, []
        begin = time.monotonic()
        for _ in range(steps):
            start, sent = time.monotonic(), group.bytes_sent
            time.sleep(step)
            computing += time.monotonic() - start
            params, state = averager.update(params, state, donate=True)
            bursts.append(group.bytes_sent - sent)
        return computing / (time.monotonic() - begin), max(bursts)

    def plain(group):
        return diloco(period, group=group)

    def streaming(group):
        return streaming_diloco(period, fragments=2, delay=7, group=group)

    for _ in range(3):  # other processes may want the cores, too
        whole = run_ranks(2, lambda group: fn(group, plain, 2 * period))
        ours = run_ranks(2, lambda group: fn(group, streaming, 2 * period + 1))
        assert all(burst <= 1.1 / 2 * most for (_, burst), (_, most) in zip(ours, whole, strict=True))
        shares = [share for share, _ in whole], [share for share, _ in ours]
        if max(shares[0]) < 0.65 and min(shares[1]) > 0.93:
            break
    assert max(shares[0]) < 0.65, shares
    assert min(shares[1]) > 0.85, shares  # 0.97 where nobody else computes


@pytest.mark.parametrize(
    ("shapes", "fragments", "part"),
    [
        ([(16, 100), (33, 10), (7,)], 3, 1 / 3),
        ([(1, 1000)] * 4 + [(5, 100)], 3, 2000 / 4500),  # no cut of such rows is better
        ([(10, 100), (50,), (20, 50)], [lambda path: path[0] == 1, lambda path: True], 2000 / 2050),
    ],
)
def test_no_step_sends_more_than_the_largest_fragment(shapes, fragments, part):
    def fn(group, averager):
        params, sent = [np.ones(shape, np.float32) for shape in shapes], []
        state = averager.init(params)
        for _ in range(12):
            before = group.bytes_sent
            params, state = averager.update(params, state)
            sent.append(group.bytes_sent - before)
        return max(sent)

    settings = {"fragments": fragments, "delay": 0}  # so that the update that sends has sent
    whole = run_ranks(2, lambda group: fn(group, diloco(12, group=group)))
    ours = run_ranks(2, lambda group: fn(group, streaming_diloco(12, group=group, **settings)))
    assert all(one <= 1.1 * part * all_of_it for one, all_of_it in zip(ours, whole, strict=True)), (ours, whole)


def gloo_or_mpi(comm, settings):
    if isinstance(comm, int):
        with_dtensors(comm)
    group = as_collective(None if isinstance(comm, int) else comm)
    framework = "torch" if isinstance(comm, int) else "numpy"
    return train(settings.averager(group), group, framework, 14)


SETTINGS = Streaming(6, 2, delay=2, mix=0.25)


def with_dtensors(rank):
    """Which are not cut, and whose local parts travel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate

    mesh, ends = init_device_mesh("cpu", (2,)), []
    for wrap in (lambda leaf: DTensor.from_local(leaf, mesh, [Replicate()], run_check=False), lambda leaf: leaf):
        averager = streaming_diloco(4, fragments=[lambda path: path[0] == "w", lambda path: True], delay=1, mix=0.5)
        params = {"w": wrap(torch.full((4, 3), float(rank))), "b": torch.zeros(3)}
        state = averager.init(params)
        for _ in range(4):
            params, state = averager.update({name: leaf + 1 + rank for name, leaf in params.items()}, state)
        assert type(params["w"]) is type(wrap(torch.zeros(3))) is type(state.anchor[0]["w"])
        ends.append(params["w"].to_local() if isinstance(params["w"], DTensor) else params["w"])
    assert torch.equal(*ends)


def arrives_by_itself(comm):
    """Say, of both fragments, whether what one update has sent arrives although this thread does something else."""
    group, found = as_collective(None if isinstance(comm, int) else comm), []
    params = {"w": np.full((64, 1000), float(group.rank))}
    averager = streaming_diloco(8, fragments=2, delay=2, group=group)
    state = averager.init(params)
    for _ in range(8):
        params, state = averager.update(params, state)
        flight = _flights._UNDER_WAY.get(id(group))
        if flight is not None and not flight.has_landed:
            deadline = time.monotonic() + 20
            while not flight.handle.done() and time.monotonic() < deadline:
                time.sleep(0.01)
            found.append(flight.handle.done() and not flight.handle._flight._waits_for_caller)
    return found


@pytest.mark.parametrize("node", ["on", "off"])
def test_fragments_arrive_by_themselves(node, monkeypatch):
    assert run_ranks(2, arrives_by_itself) == [[True] * 4] * 2
    monkeypatch.setenv("FUNCAVG_NODE", node)
    skip_without("torch")
    assert run_processes(2, arrives_by_itself) == [[True] * 4] * 2


@pytest.mark.mpi
def test_fragments_arrive_by_themselves_over_mpi():
    assert mpi.run_mpi(2, arrives_by_itself) == [[True] * 4] * 2


def over_threads(framework):
    return run_ranks(2, lambda group: train(SETTINGS.averager(group), group, framework, 14))


def test_over_gloo():
    same(run_processes(2, gloo_or_mpi, SETTINGS), over_threads("torch"))


@pytest.mark.mpi
def test_over_mpi():
    same(mpi.run_mpi(2, gloo_or_mpi, SETTINGS), over_threads("numpy"))


@pytest.mark.parametrize("delay", [0, 2])
def test_over_a_wire_all_ranks_have_the_same_anchors_and_send_less(delay):
    def fn(group, wire):
        averager = streaming_diloco(6, fragments=2, delay=delay, wire=wire, group=group)
        params = {"w": np.random.default_rng(group.rank).normal(size=(64, 256)).astype(np.float32)}
        state = averager.init(params)
        sent = group.bytes_sent
        for _ in range(12):
            params, state = averager.update({"w": params["w"] * np.float32(0.9 - 0.01 * group.rank)}, state)
        return [anchor["w"].tobytes() for anchor in state.anchor], group.bytes_sent - sent

    (one, few), (other, _) = run_ranks(2, lambda group: fn(group, "int4"))
    assert one == other
    (exact, many), _ = run_ranks(2, lambda group: fn(group, None))
    assert exact != one
    assert many > 7 * few


def test_synchronisations_are_logged(caplog):
    caplog.set_level(logging.INFO, "funcavg")

    def fn(group, delay):
        averager = streaming_diloco(4, fragments=2, delay=delay, wire="int8", group=group)
        params = {"a": np.zeros((2, 8), np.float32), "b": np.zeros((2, 4), np.float32), "n": 3}
        state = averager.init(params)
        for _ in range(4):
            before = params, state
            params, state = averager.update(params, state)
        if delay:  # what has landed is not averaged again, and no line says so
            averager.update(*before)

    seconds = r"\d+ bytes sent, \d+\.\d{6} seconds"
    for delay, waited in ((0, "$"), (1, " waited$")):
        caplog.clear()
        run_ranks(2, lambda group, d=delay: fn(group, d))
        lines = [record.getMessage() for record in caplog.records if record.name == "funcavg"]
        for k, step in ((0, 1), (1, 3)):
            text = f"streaming_diloco, fragment {k} of 2: step {step}, 1 leaves averaged over wire int8, {seconds}"
            assert sum(re.match(text + waited, line) is not None for line in lines) == 2, lines
        assert sum(line.startswith("streaming_diloco, anchor: step 0, 2 leaves averaged, ") for line in lines) == 2
        assert len(lines) == 6
        assert all(int(re.search(r"(\d+) bytes", line)[1]) > 48 for line in lines)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_rank_that_is_late_is_waited_for_as_long_as_the_user_says(delay):
    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=delay, group=group, timeout=1.0)
        params = np.full(2, float(group.rank))
        state, begin = averager.init(params), time.monotonic()
        try:
            for step in range(4):
                if group.rank == 1 and step == 3 - delay:  # which sends
                    time.sleep(4)
                    return None
                params, state = averager.update(params, state)
        except PeerLostError as error:
            return step, "waited 1 s for rank" in str(error), time.monotonic() - begin < 3
        return None

    assert run_ranks(2, fn) == [(3, True, True), None]


def interrupted(rank):
    """Press Ctrl-C while the update that sends waits for its new thread, or before that; do it again."""
    start, armed = threading.Thread.start, []

    def start_late(thread):
        if armed and thread.name == "funcavg start_average":
            how = armed.pop()
            if how == "after":
                start(thread)
            raise KeyboardInterrupt
        start(thread)

    averager, seen = streaming_diloco(4, fragments=1, delay=1, outer=outer.sgd(1.0), timeout=20), []
    params = np.full(1000, float(rank))
    state = averager.init(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_late)
        for step in range(12):
            before = params + 1 + rank, state
            if rank == 0 and step in (2, 6):
                armed.append("after" if step == 2 else "before")
                with pytest.raises(KeyboardInterrupt):
                    averager.update(*before)
            params, state = averager.update(*before)
            seen.append(params[0])
    return seen


def test_an_update_that_is_interrupted_while_it_sends_can_be_repeated():
    # The mean changes by 3 x 1.5 until it is sent, and once by 4 x 1.5: the last step of each period comes after that.
    (one, other), ends = run_processes(2, interrupted), [0.5 + 3 * 1.5]
    ends += [ends[0] + 3 * 1.5, ends[0] + 6 * 1.5]
    assert one[3::4] == other[3::4] == ends


def forked(rank):
    """Go on in a fork, where nothing is under way, and nothing would ever come."""
    averager, found = streaming_diloco(4, fragments=1, delay=2), []
    params = np.full(3, float(rank))
    state = averager.init(params)
    for _ in range(2):
        params, state = averager.update(params, state)

    def go_on():  # what had landed may be applied, and nothing can be sent
        now = params, state
        for _ in range(8):
            now = averager.update(*now)

    for call in (go_on, lambda: averager.init(params)):
        receive, send = os.pipe()
        if (pid := os.fork()) == 0:
            signal.alarm(20)
            try:
                call()
            except RuntimeError as error:
                os.write(send, str(error).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        os.close(send)
        found.append(b"this process was forked from the one that the group belongs to" in os.read(receive, 1000))
    for _ in range(2):
        params, state = averager.update(params, state)
    return found, params.tolist()


def test_in_a_fork_updates_are_refused():
    assert run_processes(2, forked) == [([True, True], [0.5] * 3)] * 2


# Who else wants the group, and who leaves.


def test_the_group_is_taken_while_a_fragment_is_under_way():
    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=2, group=group)
        params = np.full(2, float(group.rank))
        state = averager.init(params)
        for step in range(4):
            params, state = averager.update(params, state)
            if step in (1, 2):
                words = (
                    r"streaming_diloco \(fragment 0 of 1, period 4, delay 2, sent at step 1\) is still under way on "
                    r"this group. Only one call at a time can use a group: go on to the update that applies it"
                )
                for call, name in ((average, "average"), (start_average, "start_average")):
                    with pytest.raises(RuntimeError, match=f"{name}: {words}"):
                        call(1.0, group)
            else:
                assert average(float(group.rank), group) == 0.5
        handle = start_average(float(group.rank), group)
        params, state = averager.update(params, state)
        with pytest.raises(
            RuntimeError, match="streaming_diloco: start_average is still under way .* its handle first"
        ):
            averager.update(params, state)
        return handle.wait()

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_another_run_may_begin_on_the_group_of_one_that_was_given_up():
    def fn(group):
        ends = []
        for steps in (3, 4):  # the first ends with a fragment under way
            averager = streaming_diloco(4, fragments=1, delay=2, outer=outer.sgd(1.0), group=group)
            params = np.full(2, float(group.rank))
            state = averager.init(params)
            for _ in range(steps):
                params, state = averager.update(params, state)
            ends.append(params.tolist())
        return ends[1]

    assert run_ranks(2, fn) == [[0.5, 0.5]] * 2


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_rank_that_returns_is_lost_to_the_others_and_nothing_is_left(at):
    """Before a fragment is sent, right after, and before it is applied."""
    groups = []

    def fn(group):
        groups.append(weakref.ref(group))
        averager = streaming_diloco(4, fragments=1, delay=2, group=group, timeout=20)
        params = np.zeros(100_000)
        state = averager.init(params)
        for step in range(8):
            if group.rank == 1 and step == at:
                return None
            try:
                params, state = averager.update(params, state)
            except PeerLostError as error:
                return step, str(error)
        return None

    begin = time.monotonic()
    (step, words), _ = run_ranks(2, fn)
    assert time.monotonic() - begin < 5
    assert step in ((3,) if at == 1 else (3, 5, 7))
    assert "rank 1" in words or "spent" in words
    deadline = time.monotonic() + 5
    while any(group() is not None for group in groups) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert [group() for group in groups] == [None, None]


def test_a_group_whose_last_owner_is_its_own_flight():
    """The thread that averages is the last to know the group, and what ends with it gives up the flight."""

    class Late(Threads):
        def gather(self, payload, timeout):
            time.sleep(0.2)
            return super().gather(payload, timeout)

    def fn(group):
        group = Late(group.rank, group._meeting)
        averager = streaming_diloco(4, fragments=1, delay=2, group=group)
        params = np.zeros(4)
        state = averager.init(params)
        for _ in range(2):
            params, state = averager.update(params, state)
        return weakref.ref(group)

    groups = run_ranks(2, fn)
    deadline = time.monotonic() + 5
    while any(group() is not None for group in groups) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [group() for group in groups] == [None, None]


def leaves_gloo(rank, how):
    averager = streaming_diloco(4, fragments=1, delay=2, timeout=20)
    params = {"w": torch.full((300_000,), float(rank))}
    state = averager.init(params)
    begin = time.monotonic()
    for step in range(8):
        if rank == 1 and step == 2:  # one is under way
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "destroys":
                dist.destroy_process_group()
            return "left"
        try:
            params, state = averager.update(params, state)
        except PeerLostError as error:
            return step, str(error), time.monotonic() - begin
    return None


@pytest.mark.parametrize("how", ["dies", "destroys", "returns"])
def test_a_rank_that_leaves_gloo(how):
    (step, _, seconds), left = run_processes(2, leaves_gloo, how, dies=(1,) if how == "dies" else ())
    assert left == (None if how == "dies" else "left")
    assert step in (3, 5, 7)
    assert seconds < 10


ENDS = """
import sys
import torch, torch.distributed as dist, funcavg
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
averager = funcavg.streaming_diloco(4, fragments=1, delay=2)
params = torch.ones(1000)
state = averager.init(params)
for _ in range(2):
    params, state = averager.update(params, state)
dist.barrier()
if "destroy" in sys.argv:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["destroy", "exit"])
def test_the_interpreter_can_exit_with_a_fragment_under_way(how, tmp_path):
    skip_without("torch")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "error::RuntimeWarning", "-c", ENDS, str(tmp_path / "store"), str(rank), how],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert not any("funcavg" in text or "Exception ignored" in text for text in said), said


def test_a_wait_that_is_interrupted_can_be_repeated():
    """The state is as it was, and so is what is under way."""

    def fn(group):
        averager = streaming_diloco(4, fragments=1, delay=2, outer=outer.sgd(1.0), group=group)
        params = np.full(2, float(group.rank))
        state = averager.init(params)
        for _ in range(3):
            params, state = averager.update(params, state)
        if group.rank == 0:
            flight = _flights._UNDER_WAY[id(group)]
            land, once = flight.handle._flight.land, []

            def interrupted():
                if not once:
                    once.append(True)
                    raise KeyboardInterrupt
                return land()

            flight.handle._flight.land = interrupted
            with pytest.raises(KeyboardInterrupt):
                averager.update(params, state)
        return averager.update(params, state)[0].tolist()

    assert run_ranks(2, fn) == [[0.5, 0.5]] * 2


# One group, several averagers; updates that are repeated; loops that are left


def ones(group):
    return {"w": np.full(3, float(group.rank))}


def test_a_group_has_one_averager_at_a_time():
    def fn(group):
        averagers = [streaming_diloco(8, fragments=1, delay=6, group=group, timeout=20) for _ in range(2)]
        states = [averager.init(ones(group)) for averager in averagers]
        for k, averager in enumerate(averagers):
            for _ in range(3):
                _, states[k] = averager.update(ones(group), states[k])

    with pytest.raises(RuntimeError, match=r"\(fragment 0 of 1, .* sent at step 1\) is still under way"):
        run_ranks(2, fn)


def test_who_leaves_early_lets_go_by_forget():
    def fn(group):
        averager = streaming_diloco(8, fragments=1, delay=6, group=group)
        params, state = ones(group), averager.init(ones(group))
        for _ in range(3):
            params, state = averager.update(params, state)
        with pytest.raises(RuntimeError, match=r"or funcavg.forget\(group\) on all ranks"):
            average(params, group)
        forget(group)
        return average(params, group)["w"][0]

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_an_update_may_be_repeated_on_one_rank():
    def fn(group, again):
        averager = streaming_diloco(8, fragments=2, delay=2, outer=outer.sgd(1.0), group=group, timeout=20)
        params = {"w": np.arange(6.0) + group.rank}
        state, seen = averager.init(params), []
        for _ in range(20):
            params = {"w": params["w"] + group.rank}
            if again and group.rank == 0:
                averager.update(params, state)
            params, state = averager.update(params, state)
            seen.append(params["w"].copy())
        return np.stack(seen).tobytes()

    assert run_ranks(2, lambda group: fn(group, True)) == run_ranks(2, lambda group: fn(group, False))

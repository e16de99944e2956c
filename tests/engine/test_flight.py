"""start_average: the same engine, in the background."""

import contextlib
import gc
import inspect
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from helpers.frameworks import jax, jnp, torch
from helpers.processes import interruptible

from funcavg import PeerLostError, TreeMismatchError, average, start_average
from funcavg._average import start_with
from funcavg._engine import flight
from funcavg._trees import Options
from funcavg.collectives import Solo
from funcavg.testing import run_ranks


def test_the_result_is_that_of_average():
    def fn(group):
        tree = {"w": np.full(100_000, float(group.rank)), "t": torch.full((3,), float(group.rank)), "n": 7}
        handle = start_average(tree, group, weight=1 + group.rank)
        result = handle.wait()
        assert handle.done()
        assert handle.wait() is result
        expected = average(tree, group, weight=1 + group.rank)
        np.testing.assert_array_equal(result["w"], expected["w"])
        return torch.equal(result["t"], expected["t"]) and result["n"] == 7

    assert run_ranks(3, fn) == [True] * 3


def interrupted_at(line, function, call):
    """Call, and press Ctrl-C where a line of a function begins."""
    lines, first = inspect.getsourcelines(function)
    number = first + next(n for n, text in enumerate(lines) if line in text)

    def trace(frame, event, arg):
        if frame.f_code is not function.__code__:
            return trace if event == "call" else None
        if event == "line" and frame.f_lineno == number:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("in_callers_thread", [True, False])
@pytest.mark.parametrize("line", ["while not self._over", "use_here(self._results)", "return self._outcome"])
def test_a_wait_that_is_interrupted_at_any_line_averages_once_and_leaves_once(line, in_callers_thread):
    def fn(group):
        group.in_callers_thread = in_callers_thread
        handle = start_average(np.full(2, float(group.rank)), group, timeout=20)
        if group.rank == 0:
            interrupted_at(line, flight.Flight.land, handle.wait)
        return handle.wait().tolist(), average(100.0 + group.rank, group)

    assert run_ranks(2, fn) == [([0.5, 0.5], 100.5)] * 2


@pytest.mark.parametrize("started", [False, True])
def test_a_beginning_that_is_interrupted_leaves_nothing_or_what_is_under_way(started, monkeypatch):
    start, pressed = threading.Thread.start, []

    def interrupt(thread):
        if not pressed or threading.current_thread() is not pressed[0]:
            start(thread)
            return
        pressed.clear()
        if started:
            start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupt)

    def fn(group):
        leaf, kept = np.full(1000, float(group.rank)), []
        known = weakref.ref(leaf)
        if group.rank == 0:
            pressed.append(threading.current_thread())
            with pytest.raises(KeyboardInterrupt):
                start_with(Options().checked("start_average"), leaf, group, keep=kept.append)
            if kept[0].is_over:  # called off
                kept.clear()
                assert sys.getrefcount(leaf) == 2
        mean = kept[0].wait() if kept else start_average(leaf, group).wait()
        del leaf, kept
        assert known() is None  # without gc
        return mean[0]

    gc.collect()
    gc.disable()
    try:
        assert run_ranks(2, fn) == [0.5, 0.5]
    finally:
        gc.enable()


def test_a_handle_that_gc_finds_while_its_thread_ends(monkeypatch):
    carry_out, gate = flight.carry_out, threading.Event()
    monkeypatch.setattr(flight, "carry_out", lambda *call: gate.wait() and carry_out(*call))

    class Over(threading.Event):
        def set(self):
            super().set()
            gc.collect()  # as any allocation may

    def fn(group):
        handle = start_average(np.ones(3), group)
        handle._flight._over.__class__ = Over
        thread, cycle = handle._flight._thread, [handle]
        cycle.append(cycle)
        del handle, cycle
        gate.set()
        thread.join(20)
        assert not thread.is_alive()
        return average(1.0, group)

    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match="dropped without wait"):
            assert run_ranks(1, fn) == [1.0]  # of several, one would collect for another
    finally:
        gc.enable()


def test_starting_never_waits_for_a_late_rank():
    def fn(group):
        if group.rank == 1:
            time.sleep(1)
        start = time.monotonic()
        handle = start_average([np.ones(3)], group)
        started, done = time.monotonic() - start, handle.done()
        handle.wait()
        return started < 0.5, done

    (fast, done), (fast_too, _) = run_ranks(2, fn)
    assert fast
    assert fast_too
    assert not done  # the other rank had not come yet


def test_one_call_at_a_time_until_the_handle_is_waited_for():
    def fn(group):
        handle = start_average([np.full(3, float(group.rank))], group)
        time.sleep(0.2)  # landed or not, it has not been waited for
        text = "start_average is still under way on this group"
        with pytest.raises(RuntimeError, match=f"start_average: {text}"):
            start_average([np.ones(3)], group)
        with pytest.raises(RuntimeError, match=f"average: {text}"):
            average([np.ones(3)], group)
        first = handle.wait()[0].tolist()
        return first, average(float(group.rank), group)  # the group is as good as before

    assert run_ranks(2, fn) == [([0.5] * 3, 0.5)] * 2


def test_errors_of_other_ranks_arrive_in_wait():
    def fn(group):
        handle = start_average({"w": np.ones(3 + group.rank)}, group)
        with pytest.raises(TreeMismatchError, match=r"rank 0 float64\[3\],  rank 1 float64\[4\]"):
            handle.wait()
        with pytest.raises(TreeMismatchError):
            handle.wait()  # again
        return average(float(group.rank), group)

    assert run_ranks(2, fn) == [0.5, 0.5]


def test_a_mistake_of_ones_own_arrives_there_too():
    def fn(group):
        handle = start_average({"w": "text" if group.rank == 1 else 1.0}, group)
        with pytest.raises(TypeError, match=r"rank 1: 1 of 1 leaves .*params_tree\['w'\] is a str: 'text'"):
            handle.wait()

    run_ranks(2, fn)


def test_a_peer_that_never_comes():
    def fn(group):
        if group.rank == 0:
            handle = start_average([np.ones(3)], group, timeout=0.2)
            with pytest.raises(PeerLostError, match=r"waited 0.2 s for rank\(s\) 1"):
                handle.wait()
        else:
            time.sleep(0.6)

    run_ranks(2, fn)


def test_a_handle_does_not_keep_the_group_nor_does_its_error():
    def fn(group):
        handle = start_average([np.ones(3 + group.rank * fails)], group, timeout=5)
        while not handle.done():
            time.sleep(0.01)
        return handle, weakref.ref(group)

    for fails in (0, 1):
        handles, groups = zip(*run_ranks(2, fn), strict=True)
        gc.collect()
        assert [group() for group in groups] == [None, None]
        for handle in handles:
            with pytest.raises(TreeMismatchError) if fails else contextlib.nullcontext():
                handle.wait()


def test_a_dropped_handle_warns_and_frees_the_group():
    def fn(group):
        handle = start_average([np.ones(3)], group)
        while not handle.done():
            time.sleep(0.01)
        with pytest.warns(RuntimeWarning, match=r"dropped without wait\(\): its result is lost, and so is any error"):
            del handle
        return average(1.0, group)

    assert run_ranks(1, fn) == [1.0]


def test_refused_where_torch_wants_a_graph():
    def fn(group):
        leaf = torch.ones(3, requires_grad=True)
        for call in (
            lambda: start_average([leaf], group),
            lambda: torch.func.grad(lambda x: start_average([x], group).wait()[0].sum())(torch.ones(3)),
        ):
            with pytest.raises(RuntimeError, match="start_average: not under torch.func transforms"):
                call()
        with torch.no_grad():
            return start_average([leaf], group).wait()[0].requires_grad

    assert run_ranks(2, fn) == [True, True]


def test_in_inference_mode():
    """The background thread has the mode of the caller's, without which it could not write to donated leaves."""

    def fn(group):
        with torch.inference_mode():
            leaf = torch.full((3,), float(group.rank))
            result = start_average([leaf], group, donate=True).wait()[0]
            return result is leaf, leaf.tolist(), start_average(leaf, group).wait().is_inference()

    assert run_ranks(2, fn) == [(True, [0.5] * 3, True)] * 2


def test_where_jax_has_float64():
    """As it may in the caller's thread alone."""

    def fn(group):
        with jax.enable_x64(True):
            leaf = jnp.full(3, 1 / 3 + group.rank)
            result = start_average({"w": leaf}, group).wait()["w"] + leaf
            return result.dtype, float(result[0])

    assert run_ranks(2, fn) == [(np.float64, 1 / 3 + 0.5 + 1 / 3 + rank) for rank in range(2)]


def test_a_wait_that_is_interrupted_can_be_repeated():
    interrupted = threading.Event()

    class Slow(Solo):
        def gather(self, payload, timeout):
            interrupted.wait(timeout)
            return [payload]

    handle = start_average({"w": 1.5}, Slow())
    main = threading.main_thread().ident
    with interruptible():
        threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            handle.wait()
    interrupted.set()
    assert handle.wait() == {"w": 1.5}

"""Training that loses a rank, by SIGKILL at a named point of a call, and goes on with those that are left.

What engines hand out afterwards differs; the loop is the same. The last of its promises is looked at as well: bits are
those of a run of the survivors alone, from the state that they went on from.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

import funcavg
from funcavg import PeerLostError, _points
from funcavg.collectives import Solo
from helpers.processes import descriptors, shared_memory

ONCE = ["created", "published", "attached"]  # per group, and only where there is a node
PER_BUCKET = ["copied_in", "arrived", "reduced", "done", "copied_out"]
MODES = {"one": "aaaa", "off": ["off"] * 4, "two": "aabb"}  # FUNCAVG_NODE of each rank
METHODS = ["average", "periodic", "diloco"]
STEPS, PERIOD = 8, 2


class Case(NamedTuple):
    """A kill."""

    mode: str
    method: str
    point: str
    at: int  # how often the victim passes the point before
    victim: int


def cases_of(mode: str, method: str, size: int) -> list[Case]:
    """Return a kill at every named point, of every rank: of the first synchronisation, a middle one and a late one."""
    points = [(point, 0) for point in ONCE] + [(point, at) for point in PER_BUCKET for at in (0, 3, 5)]
    return [Case(mode, method, point, at, victim) for point, at in points for victim in range(size)]


def can_be(case: Case, size: int) -> bool:
    """Say whether the victim comes to the point: there may be no node, or no shard of it for this rank to reduce."""
    if case.mode == "off":
        return case.point not in ("published", "attached")
    return not (case.mode == "two" and size == 3 and case.point in ("arrived", "reduced") and case.victim == 1)


def averager_of(method: str, group: Any) -> funcavg.Averager:
    """Return a pair that synchronises with a group; "average" is one that is written here, of `funcavg.average`."""
    if method == "periodic":
        return funcavg.periodic(PERIOD, group=group, timeout=20)
    if method == "diloco":
        return funcavg.diloco(PERIOD, group=group, timeout=20)

    def update(params: Any, state: Any, **_: Any) -> Any:
        if (int(state["step"]) + 1) % PERIOD == 0:
            params = funcavg.average(params, group, timeout=20)
        return params, {"step": int(state["step"]) + 1}

    return funcavg.Averager(lambda _: {"step": 0}, update)


def step_of(state: Any) -> int:
    """Return how far a state has come."""
    return int(state["step"] if isinstance(state, dict) else state.step)


def local_step(params: Any, who: int, step: int) -> Any:
    """Return what a step of an optimizer might make of them: something else for each worker."""
    return {name: leaf * np.float32(0.9) + np.float32(0.01 * (who + 1) * (step + 1)) for name, leaf in params.items()}


def beginning(who: int) -> Any:
    """Return parameters: buckets of their own, and what shares one."""
    return {"w": np.arange(700_000, dtype=np.float32) * (who + 1), "b": np.full(5, np.float32(who))}


def arm(case: Case, who: int) -> None:
    """Let this process be killed when it comes to the point, if it is the victim."""
    passed = [0]

    def reached(where: str, number: int = 0) -> None:
        if who == case.victim and where == case.point:
            if passed[0] == case.at:
                os.kill(os.getpid(), signal.SIGKILL)
            passed[0] += 1

    _points.reached = reached  # type: ignore[assignment]


class Loss(NamedTuple):
    """What a survivor has seen of one."""

    seconds: float  # that the call took to raise
    words: str
    start: Any  # (params, state) that it goes on from
    group: Any  # that it goes on over


def go_on(
    params: Any, state: Any, who: int, method: str, group: Any, regroup: Callable[[], Any], *, pending: bool = False
) -> tuple[Any, Any, list[Loss]]:
    """Train to the end; return the parameters, the state, and what was lost.

    ``state`` is None before the averager has begun; ``pending``: the local step has been taken, and is to be averaged.
    """
    averager, losses = averager_of(method, group), list[Loss]()
    while state is None or step_of(state) < STEPS:
        if state is not None and not pending:
            params = local_step(params, who, step_of(state))
        pending = False
        while True:
            begin = time.monotonic()
            try:
                if state is None:
                    state = averager.init(params)
                else:
                    params, state = averager.update(params, state)
                break
            except PeerLostError as error:
                seconds, words = time.monotonic() - begin, str(error)
            group = regroup()
            averager = averager_of(method, group)
            come = 0 if state is None else 1 + step_of(state)
            root = funcavg.furthest(come, group, timeout=20)
            if root is not None:
                state = averager_of(method, Solo()).init(params) if state is None else state
                params, state = funcavg.broadcast((params, state), group, root=root, timeout=20)
            losses.append(Loss(seconds, words, (params, state), group))
    return params, state, losses


class Seen(NamedTuple):
    """What a survivor tells of a case."""

    seconds: list[float]
    words: list[str]
    differ: list[str]  # leaves whose bits are not those of a run of the survivors alone
    left: list[str]  # behind


def train_and_lose(who: int, case: Case, group: Any, regroup: Callable[[], Any], again: Callable[[Any], Any]) -> Seen:
    """Train, lose a rank, go on. ``again(group)`` makes one more group of the ranks of one, for those left alone."""
    os.environ["FUNCAVG_NODE"] = MODES[case.mode][who]
    params = beginning(who)
    given = {name: leaf.copy() for name, leaf in params.items()}
    arm(case, who)
    ended, state, losses = go_on(params, None, who, case.method, group, regroup)
    assert all((params[name] == leaf).all() for name, leaf in given.items()), "inputs have changed"
    _points.reached = lambda where, number=0: None
    differ: list[str] = []
    for loss in losses[-1:]:
        alone, end, more = go_on(*loss.start, who, case.method, again(loss.group), no_more, pending=True)
        assert (step_of(end), more) == (step_of(state), [])
        differ = [name for name, leaf in ended.items() if leaf.tobytes() != alone[name].tobytes()]
    return Seen([loss.seconds for loss in losses], [loss.words for loss in losses], differ, left_behind())


def no_more() -> Any:
    """Fail: nobody else is lost."""
    raise AssertionError("a loss among the survivors")


def left_behind(groups: int = 2) -> list[str]:
    """Return what is there of more than two groups of three ranks, or should not be: memory, and descriptors."""
    gc.collect()
    over_mpi: Any = sys.modules.get("funcavg.collectives.mpi")
    leaked = ["a request of MPI's"] if over_mpi is not None and over_mpi._LEAKED else []
    links = descriptors()
    pidfds = [link for link in links if "pidfd" in link]
    return [
        *leaked,
        *shared_memory()[3 * groups :],
        *pidfds[2 * groups :],
        *(link for link in links if "funcavg" in link),
    ]


def assert_all_went_on(case: Case, seen: Sequence[Seen | None]) -> float:
    """Check what all ranks of a case have seen; return the seconds until the call that was lost had ended, at most."""
    assert [rank for rank, found in enumerate(seen) if found is None] == [case.victim], "it was not killed"
    survivors = [found for found in seen if found is not None]
    for found in survivors:
        assert found.differ == [], case
        assert found.left == [], ("left behind", case)
        assert len(found.seconds) <= 1
        assert all(seconds < 5 for seconds in found.seconds), (case, found)  # whose deadline is 20 s
    return max(second for found in survivors for second in [0.0, *found.seconds])

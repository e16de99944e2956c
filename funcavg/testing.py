"""N ranks as threads of one process: test what averages in milliseconds, with the engine that runs on a cluster."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

from funcavg._errors import PeerLostError
from funcavg.collectives.base import Collective
from funcavg.collectives.threads import Meeting, Threads

__all__ = ["run_ranks"]

T = TypeVar("T")


def run_ranks(n: int, fn: Callable[[Collective], T], *, timeout: float = 60.0) -> list[T]:
    """Run ``fn(group)`` on ``n`` threads, one per rank, and return the results in rank order.

    ``group`` is a `Collective`: it has ``.rank`` and ``.size``, and can be passed to `average`. A rank that returns
    or raises is known to be gone at once: whoever waits for it gets `PeerLostError` rather than a hang.

    Args:
        n: Number of ranks, at least 1.
        fn: What each rank does. Torch's grad mode and NumPy's error state are those of a new thread.
        timeout: Seconds that all ranks together may take.

    Returns:
        What ``fn`` returned on ranks 0 to ``n - 1``.

    Raises:
        BaseException: The first exception that any rank raised, with a note that names the rank (and the rank as
            its attribute ``funcavg_rank``).
        TimeoutError: If some rank is still running after ``timeout`` seconds; the message shows where. Its thread is
            left behind as a daemon, since threads cannot be killed.

    Examples:
        >>> import numpy as np
        >>> from funcavg import average
        >>> from funcavg.testing import run_ranks
        >>> run_ranks(4, lambda group: float(average(np.float32(group.rank), group)))
        [1.5, 1.5, 1.5, 1.5]
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"run_ranks: n must be an integer, got {n!r} of type {type(n).__name__}")
    if n < 1:
        raise ValueError(f"run_ranks: n must be at least 1, got {n}")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"run_ranks: timeout must be a positive number of seconds, got {timeout!r}")
    meeting = Meeting(n)
    results: dict[int, T] = {}
    failures: list[tuple[int, BaseException]] = []  # in order of time

    def run(rank: int) -> None:
        try:
            results[rank] = fn(Threads(rank, meeting))
            meeting.leave(rank, "has returned")
        except BaseException as error:  # handed to the caller below
            failures.append((rank, error))
            meeting.leave(rank, f"has failed with {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(n)]
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        # One rank's failure makes others lose a peer. Show the cause, not the consequence.
        causes = [failure for failure in failures if not isinstance(failure[1], PeerLostError)]
        rank, error = (causes or failures)[0]
        note = f"raised on rank {rank} of {n} (funcavg.testing.run_ranks)"
        vars(error).update(funcavg_rank=rank, __notes__=[*getattr(error, "__notes__", []), note])
        raise error
    hanging = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
    if hanging:
        frame = sys._current_frames().get(threads[hanging[0]].ident or 0)
        where = "".join(traceback.format_stack(frame)[-3:]) if frame else ""
        raise TimeoutError(
            f"run_ranks: rank(s) {', '.join(map(str, hanging))} of {n} still run after {timeout:g} s. "
            f"Rank {hanging[0]} is at\n{where}"
        )
    return [results[rank] for rank in range(n)]

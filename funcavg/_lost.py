"""After a loss: from whose parameters the ranks that are left go on, and over which group."""

from __future__ import annotations

import struct
from contextlib import suppress
from typing import Any

from funcavg._compile import not_compiled
from funcavg._engine import gather, session_of
from funcavg._errors import FuncavgError, PeerLostError
from funcavg._schedule import integer
from funcavg._trees import Options, Timeout
from funcavg.collectives import as_collective

__all__ = ["forget", "furthest"]

_SAID = struct.Struct("<q??")  # step, intact, whether this rank has made a mistake


@not_compiled
def furthest(step: int, group: Any = None, *, intact: bool = True, timeout: Timeout = None) -> int | None:
    """Return the rank whose parameters all are to take, or None if all can go on with their own.

    A rank that is lost in the last moments of an average leaves some who have the mean, and some whose call has raised.
    Those that are left compare how far each has come, over the group that they have made of themselves:

    ```python
    lost = False
    while True:
        try:
            if lost and (root := furthest(rounds, group)) is not None:  # some had returned: all take what they have
                params, rounds = broadcast((params, rounds), group, root=root)
            params, rounds = average(params, group), rounds + 1
            break
        except PeerLostError:
            group, lost = survivors(group), True  # by whatever runs the job
    ```

    Args:
        step: How many rounds of averaging this rank has come through, or any count that grows with them: an averager's
            ``state.step``. An integer at least 0, below 2**63.
        group: Who is left, as for `funcavg.average`.
        intact: Whether this rank's parameters are whole. They are not where a call with ``donate=True`` has raised (the
            stand-ins of `funcavg.stateful` donate, unless told not to).
        timeout: Seconds, or a ``timedelta``, to wait for the other ranks, as for `funcavg.average`.

    Returns:
        None if all ranks are at the same step, and intact: each goes on with its own parameters, so no local step is
        lost. Else, of the ranks that are intact, the one with the highest step, the lowest of them if there are
        several: pass it to `funcavg.broadcast` as the root. A rank that is torn does not count, though it may be
        further: then the step goes back. The same on all ranks; None on a rank outside of the group.

    Raises:
        FuncavgError: If no rank is intact, so that a checkpoint has to be loaded (not a PeerLostError, lest a loop
            that goes on after one tries for ever); or if some ranks have called another function. On every rank alike.
        TypeError: If ``step`` is no integer, or ``intact`` no bool. On this rank; on the others a ValueError that names
            it. Nobody waits in vain, and the group stays usable.
        ValueError: If ``step`` is negative or too large. On every rank alike. If ``timeout`` is not positive: on this
            rank.
        PeerLostError: If a rank dies or does not come in time. On the ranks that wait for it.

    Communication:
        48 bytes to every other rank, and before the first call on a group whatever `funcavg.average` gathers.

    Examples:
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> run_ranks(3, lambda group: funcavg.furthest(8, group))
        [None, None, None]
        >>> run_ranks(3, lambda group: funcavg.furthest(8 + (group.rank == 1), group))
        [1, 1, 1]

    References:
        Bland et al., [Post-failure recovery of MPI communication capability: Design and
        rationale](https://doi.org/10.1177/1094342013488238), 2013: what is agreed about after a loss.
    """
    options = Options(timeout=timeout).checked("furthest")
    number, mistake = 0, None
    try:
        number = _checked(step, intact)
    except (TypeError, ValueError) as error:  # the others wait for this rank, and are to hear of it
        mistake = error
    collective = as_collective(group)
    if collective is None and mistake is None:
        return None
    payloads = list[bytes]()
    if collective is not None:
        with session_of(collective).entered("furthest"):
            words = _SAID.pack(number, intact is True, mistake is not None)
            payloads = gather(words, collective, options, "furthest")
    if mistake is not None:
        raise mistake
    unpacked = [_SAID.unpack(payload) for payload in payloads]
    wrong = [rank for rank, (*_, is_wrong) in enumerate(unpacked) if is_wrong]
    if wrong:
        raise ValueError(
            f"furthest: rank {wrong[0]} has passed a step that is no integer at least 0 and below 2**63, or an intact "
            f"that is not True or False; it says which. Nothing has changed on any rank."
        )
    said: list[tuple[int, bool]] = [(theirs, is_intact) for theirs, is_intact, _ in unpacked]
    if said == [(said[0][0], True)] * len(said):
        return None
    whole = [(theirs, -rank) for rank, (theirs, is_intact) in enumerate(said) if is_intact]
    if not whole:
        raise FuncavgError(
            f"furthest: the parameters of none of the {len(said)} ranks are whole (intact=False on each), so there is "
            f"nothing to go on from: load a checkpoint on all ranks."
        )
    return -max(whole)[1]


def _checked(step: Any, intact: Any) -> int:
    number = integer("furthest: the step", step)
    if not 0 <= number < 1 << 63:
        raise ValueError(f"furthest: the step must be at least 0 and below 2**63, got {number}")
    if not isinstance(intact, bool):
        raise TypeError(f"furthest: intact must be True or False, got {intact!r} of type {type(intact).__name__}")
    return number


def forget(group: Any = None) -> None:
    """Forget what is remembered of a group: connections, shared memory, plans, and that it is spent.

    For groups whose members change, or that work again after an error, without anything that funcavg could see.
    torchft's groups, and a `Collective` whose ``rank``, ``size`` or ``configuration`` changes, need no call. All ranks
    call it between the same two calls; the next one begins as the first did: over torch's groups with new connections,
    over MPI with a new duplicate (the old one is kept until the process ends). On a group that is connected to nobody
    it does nothing.

    Args:
        group: As for `funcavg.average`.

    Raises:
        RuntimeError: If a call is under way on the group, or in a process that was forked from the group's. On this
            rank.
        TypeError: If ``group`` is not a group. On this rank.

    Communication:
        None.

    Examples:
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     before = funcavg.average(float(group.rank), group)
        ...     funcavg.forget(group)
        ...     return before, funcavg.average(float(group.rank), group)
        >>> run_ranks(2, fn)
        [(0.5, 0.5), (0.5, 0.5)]
    """
    with suppress(PeerLostError):  # it is connected to nobody, and begins anew when it is
        collective = as_collective(group)
        if collective is not None:
            session_of(collective).forget(group)

"""Stay alike: which leaves are not the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from funcavg._compile import not_compiled
from funcavg._engine import compare, session_of
from funcavg._transforms import Call, described, is_axis
from funcavg._trees import Options, Timeout, Where

__all__ = ["differences"]


@not_compiled
def differences(
    params_tree: Any, group: Any = None, *, where: Where | None = None, timeout: Timeout = None
) -> list[str]:
    """Return the names of leaves that are not the same bits on all ranks, each with the ranks that differ from rank 0.

    ``[]`` if replicas are alike, so ``assert not funcavg.differences(params)``. All ranks get the same list. Leaves are
    compared by index, whatever their memory format; -0.0 is not 0.0, and a NaN equals one of the same bits only.

    Args:
        params_tree: As for `funcavg.broadcast`: every array takes part.
        group: Who takes part, as for `funcavg.broadcast`, but for axis names.
        where: Called with the path of each leaf; leaves that it refuses are not compared.
        timeout: Seconds, or a ``timedelta``, to wait for the other ranks, which read their leaves meanwhile.

    Returns:
        Names in the tree's order, such as ``"params_tree['w'] on ranks 1 and 4-7"``.

    Raises:
        TreeMismatchError: If ranks disagree about paths, shapes, dtypes or options. On every rank alike.
        TypeError: If a leaf has no bits to be compared, such as a string. On every rank alike.
        ValueError: If ``timeout`` is not positive, or ``group`` is an axis name. On this rank.
        PeerLostError: If a rank dies or does not come in time. On the ranks that wait for it.
        RuntimeError: As for `funcavg.broadcast`.

    Communication:
        Digests only: gathers of 48 and of 16 bytes per rank, and where replicas differ one of 8 bytes per leaf. Leaves
        are read once. Two that differ have the same digest with a chance of some ``2⁻⁶⁴``; it is not made against
        somebody who wants them to.

    Examples:
        >>> import numpy as np
        >>> from funcavg import differences
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     params = {"b": np.zeros(2), "w": np.full(2, float(group.rank == 1))}
        ...     return differences(params, group)
        >>> run_ranks(3, fn)[0]
        ["params_tree['w'] on rank 1"]
    """
    if is_axis(group):
        raise ValueError(
            f"differences: group={group!r} is an axis name, along which a compiled program knows no values. Compare "
            f"the shards of its results, or call differences over processes"
        )
    options = Options(where=where, timeout=timeout, purpose="differences").checked("differences")
    call = Call("differences", params_tree, group, options)
    request, inside = described(call)
    if call.collective is None:
        return []
    with inside, session_of(call.collective).entered(call.who):
        found = compare(request, call.collective)
    layout = request.layout
    assert layout is not None
    return [f"{layout.name(i)} on {_ranks(ranks)}" for i, ranks in found.items()]


def _ranks(numbers: Sequence[int]) -> str:
    """Write ranks in words.

    >>> _ranks([3]), _ranks([1, 2]), _ranks([1, 3, 4, 5, 7])
    ('rank 3', 'ranks 1 and 2', 'ranks 1, 3-5 and 7')
    """
    words: list[str] = []
    for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        ranks = [number for _, number in run]
        words += [f"{ranks[0]}-{ranks[-1]}"] if len(ranks) > 2 else map(str, ranks)
    if len(numbers) == 1:
        return f"rank {words[0]}"
    return f"ranks {', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else f"ranks {words[0]}"

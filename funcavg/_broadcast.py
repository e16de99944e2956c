"""Start alike: the tree of one rank, to all of them."""

from __future__ import annotations

import contextlib
import operator
from typing import Any, TypeVar

from funcavg._compile import not_compiled
from funcavg._engine import carry_out, session_of
from funcavg._transforms import Call, broadcast_over_axis, described, is_axis
from funcavg._trees import Options, Timeout, Where

__all__ = ["broadcast"]

T = TypeVar("T")


@not_compiled
def broadcast(  # noqa: PLR0913  # public: its options are keywords
    params_tree: T,
    group: Any = None,
    *,
    root: int = 0,
    where: Where | None = None,
    donate: bool = False,
    timeout: Timeout = None,
) -> T:
    r"""Return the tree with the values of rank ``root``, bit for bit.

    It is how replicas start alike: from the parameters that one of them has made or loaded. Unlike `funcavg.average`,
    it takes **every** array: integers, bools and PRNG keys, too, and NaNs keep their payloads. Use the return value:
    the inputs are never written to (unless donated), on the root neither, and no leaf that is broadcast shares memory
    with them.

    Args:
        params_tree: As for `funcavg.average`, and besides: integer and bool arrays, typed PRNG keys, NumPy arrays
            of every dtype without objects, Python integers of up to 64 bits and bools. On ranks other than the root
            only its structure, dtypes and shapes count. An optimizer's ``state_dict`` is such a tree once strings are
            left out with ``where``.
        group: Who takes part, as for `funcavg.average`, but for `funcavg.stacked`. Over an axis name of JAX's it works
            inside of ``jit``, too, and has no derivative; over ranks that are processes or threads it does not.
        root: The rank whose values all get, counted **in the group**: of a subgroup of torch's ranks 2 and 3, root 0 is
            rank 2. The same on all ranks.
        where: Called with the path of each leaf; leaves that it refuses stay as they are on each rank.
        donate: Let the result be written into the inputs' memory: the very same arrays come back. Ignored for JAX
            arrays and numbers.
        timeout: Seconds, or a ``timedelta``, as for `funcavg.average`.

    Returns:
        A tree of the same containers, as `funcavg.average` keeps them: each leaf has its input's framework, dtype,
        shape, device and memory format, tied leaves come back tied where they are on all ranks, and ``requires_grad``
        and ``nn.Parameter`` are kept. A rank outside of the group gets its very tree back.

    Raises:
        TreeMismatchError: If ranks disagree about paths, shapes, dtypes, the root or options. On every rank alike.
        TypeError: If a leaf has no bits to be sent, such as a string; if ``root`` is no integer. On every rank alike.
        ValueError: If ``root`` is not a rank of the group, or a leaf cannot be donated. On every rank alike. If
            ``timeout`` is not positive: on this rank.
        PeerLostError: If a rank dies or does not come in time. On the ranks that wait for it, the root among them.
        RuntimeError: Under transforms of ``torch.func`` and of JAX, over processes or threads: on every rank alike. If
            another call is under way on the group: on this rank.

        Whatever is raised, inputs are unchanged (unless donated).

    Communication:
        One gather of 48 bytes per rank, then, with ``B`` the bytes of all leaves and ``N`` ranks, every rank but the
        root receives ``B``; the root sends ``2 B (N-1) / N``, the others ``B (N-2) / N``; and a gather of 8 bytes,
        since a root would not notice that others are lost. Ranks of one host read the root's bytes in shared memory,
        and each other host receives ``B``. A transport of the three verbs alone sends as much as for an average.
        NCCL's own broadcast serves leaves on a GPU.

    Examples:
        >>> import numpy as np
        >>> from funcavg import broadcast
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     params = {"w": np.full(2, float(group.rank)), "step": group.rank}
        ...     return broadcast(params, group, root=1)
        >>> run_ranks(2, fn)[0]
        {'w': array([1., 1.]), 'step': 1}

    References:
        Scatter and all-gather: Thakur, Rabenseifner and Gropp, [Optimization of Collective Communication Operations in
        MPICH](https://doi.org/10.1177/1094342005051521), 2005, after van de Geijn.
    """
    number: Any = root
    if not isinstance(root, bool):
        with contextlib.suppress(Exception):  # what is wrong with it, all ranks are to hear
            number = operator.index(root)
    options = Options(None, where, donate, timeout, "broadcast", number).checked("broadcast")
    call: Any = Call("broadcast", params_tree, group, options)
    result: T
    if is_axis(group):
        result = broadcast_over_axis(call)
        return result
    request, inside = described(call)
    if call.collective is None:
        return params_tree
    with inside, session_of(call.collective).entered(call.who):
        leaves = carry_out(request, call.collective)
    result = request.rebuild(leaves)
    return result

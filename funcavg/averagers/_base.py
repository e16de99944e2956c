"""What averagers have in common: the pair of functions, steps that may be traced, and a log of synchronisations."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np

from funcavg import _tree
from funcavg._average import average, report_mistake
from funcavg._axis import is_axis
from funcavg._request import Layout, Request, Where, make_request
from funcavg._stacked import Stacked
from funcavg.collectives import as_collective

__all__ = [
    "Averager",
    "InitFn",
    "UpdateFn",
    "checksum_of",
    "choose",
    "described",
    "fail_everywhere",
    "layout_of",
    "same_tree",
    "synchronise",
    "without_grad",
]

T = TypeVar("T")
_LOG = logging.getLogger("funcavg")


class InitFn(Protocol):
    """``init(params) -> state``."""

    def __call__(self, params: Any) -> Any:
        """Return the state to begin with: a plain tree of NamedTuples, arrays and integers."""
        ...


class UpdateFn(Protocol):
    """``update(params, state) -> (params, state)``, called once after every step of the optimizer, on all ranks."""

    def __call__(
        self, params: T, state: Any, *, weight: float | Sequence[float] | None = None, donate: bool = False
    ) -> tuple[T, Any]:
        """Return the parameters, synchronised if it is time to, and the next state. Inputs are not written to.

        Args:
            params: The tree that ``init`` was given, with this rank's values.
            state: What ``init`` or the update before has returned.
            weight: This rank's weight in the mean, as for `funcavg.average`.
            donate: Let the new parameters be written into the memory of ``params``, which come back themselves. The
                state is not donated.
        """
        ...


class Averager(NamedTuple):
    """A pair of pure functions that average parameters over a training run.

    The state counts the steps and holds whatever else the method remembers. Whatever saves trees can save it.

    Example:
        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> def train(group):
        ...     averager = funcavg.periodic(period=3, group=group)
        ...     params, seen = {"w": np.array(float(group.rank))}, []
        ...     state = averager.init(params)
        ...     for _ in range(5):
        ...         params = {"w": params["w"] + group.rank}  # a step of the optimizer
        ...         params, state = averager.update(params, state)
        ...         seen.append(float(params["w"]))
        ...     return seen
        >>> run_ranks(2, train)
        [[1.0, 1.0, 1.0, 2.5, 2.5], [1.0, 2.0, 3.0, 2.5, 3.5]]
    """

    init: InitFn
    update: UpdateFn


def choose(index: Any, branches: Sequence[Callable[[Any], Any]], tree: Any) -> Any:
    """Return ``branches[index](tree)``, a tree of the same structure. JAX may be tracing the index."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(index, jax.core.Tracer):
        return branches[int(index)](tree)
    everything, spec = _tree.flatten(tree)
    kinds = (jax.Array, np.ndarray, np.generic, int, float, complex)
    moving = [i for i, leaf in enumerate(everything) if isinstance(leaf, kinds)]

    def of_leaves(branch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(leaves: Any) -> Any:
            results, _ = _tree.flatten(branch(rebuilt(leaves)))
            return [results[i] for i in moving]

        return run

    def rebuilt(leaves: Any) -> Any:
        whole = list(everything)
        for i, leaf in zip(moving, leaves, strict=True):
            whole[i] = leaf
        return _tree.unflatten(spec, whole)

    return rebuilt(
        jax.lax.switch(
            jax.numpy.asarray(index, jax.numpy.int32), list(map(of_leaves, branches)), [everything[i] for i in moving]
        )
    )


def without_grad() -> contextlib.AbstractContextManager[Any]:
    """Leave torch's autograd out of what follows, if torch has been imported."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()


def described(tree: Any, where: Where | None = None) -> Request:
    """Return a tree, taken apart, or raise what is wrong with it."""
    request = make_request(*_tree.flatten(tree), where=where)
    if request.claim.error is not None:
        raise request.claim.error
    return request


def layout_of(request: Request) -> Layout:
    """Return the layout of a request that has passed `described`."""
    assert request.layout is not None
    return request.layout


def checksum_of(params: Any, where: Where | None) -> int:
    """Return a number of 31 bits, which every framework can hold, of paths, shapes, dtypes and what is averaged."""
    return int.from_bytes(layout_of(described(params, where)).signature[:4], "little") >> 1


def same_tree(checksum: Any, params: Any, where: Where | None) -> bool:
    """Say whether a tree is the one of a checksum. Unknown, and taken to be so, while JAX traces the checksum."""
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(checksum, jax.core.Tracer):
        return True
    return bool(int(checksum) == checksum_of(params, where))


def fail_everywhere(mistake: Exception, group: Any, *, others_wait: Any) -> NoReturn:
    """Raise a mistake of this rank; if the others are about to average, on them as well."""
    jax = sys.modules.get("jax")
    traced = jax is not None and isinstance(others_wait, jax.core.Tracer)
    if not traced and others_wait and not is_axis(group) and not isinstance(group, Stacked):
        with contextlib.suppress(Exception):  # the same mistake, in other words
            report_mistake(mistake, group)
    raise mistake


def synchronise(
    tree: T,
    group: Any,
    *,
    method: str,
    step: Any,
    weight: Any = None,
    where: Where | None = None,
    donate: bool = False,
) -> T:
    """Average a tree, and log it to the logger ``funcavg``: method, step, leaves, bytes that this rank sent, seconds.

    Nothing is logged while JAX traces, when nothing is averaged yet.
    """
    jax = sys.modules.get("jax")
    everything, _ = _tree.flatten(tree)
    traced = jax is not None and any(isinstance(leaf, jax.core.Tracer) for leaf in (*everything, step, weight))
    if traced or is_axis(group) or not _LOG.isEnabledFor(logging.INFO):
        return average(tree, group, weight=weight, where=where, donate=donate)
    collective = group if isinstance(group, Stacked) else as_collective(group)
    sent, start = getattr(collective, "bytes_sent", 0), time.perf_counter()
    result = average(tree, group, weight=weight, where=where, donate=donate)
    seconds = time.perf_counter() - start
    leaves = len(layout_of(described(result, where)).averaged)
    _LOG.info(
        "%s: step %d, %d leaves averaged, %d bytes sent, %.6f seconds",
        method,
        int(step),
        leaves,
        getattr(collective, "bytes_sent", 0) - sent,
        seconds,
    )
    return result

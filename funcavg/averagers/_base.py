"""What averagers have in common: the pair of functions, steps that may be traced, and a log of synchronisations."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from funcavg._average import average_with, report_mistake
from funcavg._transforms import Stacked, is_axis
from funcavg._trees import Layout, Options, Request, Where, digest, flatten, make_request
from funcavg.collectives import as_collective

__all__ = [
    "Averager",
    "InitFn",
    "UpdateFn",
    "averaged_lines",
    "check_tree",
    "checksum_of",
    "choose",
    "described",
    "failing_everywhere",
    "is_local",
    "layout_of",
    "step_of",
    "synchronise",
    "takes_part",
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

    Examples:
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
    if not _is_tracer(index):
        return branches[int(index)](tree)
    jax = sys.modules["jax"]
    flat = flatten(tree)
    everything = flat.leaves
    kinds = (jax.Array, np.ndarray, np.generic, int, float, complex)
    moving = [i for i, leaf in enumerate(everything) if isinstance(leaf, kinds)]

    def of_leaves(branch: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def run(leaves: Any) -> Any:
            results = flatten(branch(rebuilt(leaves))).leaves
            return [results[i] for i in moving]

        return run

    def rebuilt(leaves: Any) -> Any:
        whole = list(everything)
        for i, leaf in zip(moving, leaves, strict=True):
            whole[i] = leaf
        return flat.rebuild(whole)

    return rebuilt(
        jax.lax.switch(
            jax.numpy.asarray(index, jax.numpy.int32), list(map(of_leaves, branches)), [everything[i] for i in moving]
        )
    )


def step_of(state: Any) -> Any:
    """Return the step that a state has counted to: JAX's as it is, others as Python integers, which do not overflow."""
    jax = sys.modules.get("jax")
    return state.step if jax is not None and isinstance(state.step, jax.Array) else int(state.step)


def without_grad() -> contextlib.AbstractContextManager[Any]:
    """Leave torch's autograd out of what follows, if torch has been imported."""
    torch = sys.modules.get("torch")
    return contextlib.nullcontext() if torch is None else torch.no_grad()


def described(tree: Any, where: Where | None = None, *, donate: bool = False, ties: bool = False) -> Request:
    """Return a tree, taken apart, or raise what is wrong with it. Only asked for, ties and donation are looked at."""
    options = Options(where=where, donate=donate)
    request = make_request(flatten(tree), options, wrapped=not (ties or donate))
    if request.claim.error is not None:
        raise request.claim.error
    return request


def layout_of(request: Request) -> Layout:
    """Return the layout of a request that has passed `described`."""
    assert request.layout is not None
    return request.layout


def checksum_of(params: Any, where: Where | None) -> int:
    """Return a number of 31 bits, which every framework can hold, of the averaged leaves' paths, shapes and dtypes."""
    return _checksum(layout_of(described(params, where)))


@functools.lru_cache(maxsize=32)
def _checksum(layout: Layout) -> int:
    return int.from_bytes(digest(averaged_lines(layout))[:4], "little") >> 1


def averaged_lines(layout: Layout) -> list[str]:
    """Return "path: dtype[shape]" of every averaged leaf; not which part of a parameter it is: copies do not tell."""
    return [layout.lines[i].partition(" (part ")[0] for i in layout.averaged]


def check_tree(checksum: Any, params: Any, where: Where | None, method: str) -> None:
    """Raise ValueError if a tree is not the one of a checksum. While JAX traces the checksum, nobody can tell."""
    found = checksum_of(params, where)
    if not _is_tracer(checksum) and int(checksum) != found:
        raise ValueError(
            f"{method}: update was given another tree than init: paths, shapes or dtypes of averaged leaves differ. "
            f"Keep the tree as it is, or begin anew with init."
        )


@contextlib.contextmanager
def failing_everywhere(group: Any, options: Options, *, others_wait: Any) -> Iterator[None]:
    """Let a mistake that this rank makes inside be raised here, and on the other ranks if they are about to average."""
    try:
        yield
    except Exception as mistake:
        if not _is_tracer(others_wait) and others_wait and not is_local(group):
            with contextlib.suppress(Exception):  # the same mistake, in other words; or a group that is not connected
                report_mistake(mistake, group, options)
        raise


def takes_part(group: Any) -> bool:
    """Say whether this rank is in the group."""
    return is_local(group) or as_collective(group) is not None


def is_local(group: Any) -> bool:
    """Say whether a group is an axis, or of stacked replicas: then no bytes pass our hands."""
    return is_axis(group) or isinstance(group, Stacked)


def _is_tracer(value: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.core.Tracer)


def synchronise(tree: T, group: Any, options: Options, *, method: str, step: Any) -> T:
    """Average a tree, and log it to the logger ``funcavg``.

    The line has the method, the step, how many leaves, the wire, the bytes that this rank sent, and seconds.

    Nothing is logged while JAX traces, when nothing is averaged yet.
    """
    traced = any(map(_is_tracer, (*flatten(tree).leaves, step, options.weight)))
    if traced or is_axis(group) or not takes_part(group) or not _LOG.isEnabledFor(logging.INFO):
        return average_with(options, tree, group)
    collective = group if isinstance(group, Stacked) else as_collective(group)
    sent, start = getattr(collective, "bytes_sent", 0), time.perf_counter()
    result = average_with(options, tree, group)
    seconds = time.perf_counter() - start
    leaves = len(layout_of(described(result, options.where)).averaged)
    _LOG.info(
        "%s: step %d, %d leaves averaged%s, %d bytes sent, %.6f seconds",
        method,
        int(step),
        leaves,
        "" if options.wire is None else f" over wire {getattr(options.wire, 'name', options.wire)}",
        getattr(collective, "bytes_sent", 0) - sent,
        seconds,
    )
    return result

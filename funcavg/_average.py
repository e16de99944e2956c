"""What: the mean of a tree over the ranks of a group, as a pure function."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

from funcavg import _tree
from funcavg._engine import carry_out
from funcavg._request import Request, failed_request, make_request
from funcavg._session import Session, session_of
from funcavg._transforms import average_differentiably, is_transformed
from funcavg.collectives import as_collective
from funcavg.collectives.base import Collective

__all__ = ["Handle", "average", "start_average"]

T = TypeVar("T")
Where = Callable[[tuple[Any, ...]], Any]
TIMEOUT = 300.0  # seconds


def average(
    params_tree: T,
    group: Any = None,
    *,
    weight: float | None = None,
    where: Where | None = None,
    donate: bool = False,
    timeout: float | None = None,
) -> T:
    r"""Return the mean of a parameter tree over the ranks of ``group``.

    Every floating or complex leaf becomes :math:`\sum_i w_i x_i / \sum_i w_i` over ranks :math:`i`. Use the return
    value: the inputs are never written to (unless donated), and no averaged leaf shares memory with them.

    Args:
        params_tree: Leaves in dicts, lists, tuples, NamedTuples and registered dataclasses, nested at will. torch
            tensors, NumPy arrays and numbers of floating and complex dtypes are averaged, ``ml_dtypes`` included.
            Bools, integers and ``None`` pass through: the same object comes back. All ranks pass the same paths,
            shapes and dtypes.
        group: Who takes part: ``None``, a torch ``ProcessGroup`` or 1-D ``DeviceMesh``, or a `Collective`; see
            `funcavg.collectives.as_collective`. A rank outside of the group gets its very tree back.
        weight: This rank's weight, a finite number at least 0; ``None`` on all ranks for the plain mean. Values of
            a rank with weight 0 are never read.
        where: Called with the path of each leaf, a tuple of keys and positions; leaves that it refuses pass through
            before their type is looked at. It must refuse the same leaves on all ranks.
        donate: Let the result be written into the inputs' memory: the very same arrays come back, and nothing of
            the tree's size is allocated. After an error their values are undefined.
        timeout: Seconds to wait for the other ranks to arrive, and then for any one bucket to make its way;
            ``None`` for 300.

    Returns:
        A tree of the same containers, key order kept. Each averaged leaf has its input's framework, dtype, shape,
        device and memory format; tied leaves come back tied. All ranks of a call get the same bits. Outside of a
        torch graph, ``requires_grad`` and ``nn.Parameter`` are kept; under ``torch.func`` transforms and where
        gradients are recorded, the result is differentiable, and its adjoint is again an average:
        :math:`\bar x_i = (w_i / \sum w) \sum_j \bar y_j`, which all ranks must take.

    Raises:
        TreeMismatchError: If ranks disagree about paths, shapes, dtypes, order or options. On every rank alike.
        TypeError: If a leaf can be neither averaged nor passed through, or a weight is no number. On every rank
            alike, whoever made the mistake. If ``group`` is not a group: on this rank.
        ValueError: If a weight is negative or not finite, all weights are 0, or a leaf cannot be donated. On every
            rank alike. If ``timeout`` is not positive: on this rank.
        PeerLostError: If a rank dies or does not come in time. On the ranks that wait for it.
        RuntimeError: If ``group=None`` under a launcher without an initialised group, or another call is under way
            on the group. On this rank.

        Whatever is raised, inputs are unchanged (unless donated).

    Communication:
        One gather of 48 bytes per rank, then, with :math:`B` the bytes of all averaged leaves, :math:`N` ranks send
        :math:`2 B (N-1) / N` each, in buckets of at most 16 MiB.

    Accuracy:
        :math:`|\text{result} - \text{mean}| \le \tfrac12 \mathrm{ulp} + N u\, \mathrm{mean}|x_i|` with
        :math:`u = 2^{-53}`; on NCCL, float32 is summed in float32, :math:`u = 2^{-24}`.

    Example:
        >>> import numpy as np
        >>> from funcavg import average
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     params = {"w": np.full(2, float(group.rank)), "step": 7}
        ...     return average(params, group, weight=1 + group.rank)
        >>> run_ranks(2, fn)[0]
        {'w': array([0.66666667, 0.66666667]), 'step': 7}

    References:
        Stich, `Local SGD Converges Fast and Communicates Little <https://arxiv.org/abs/1805.09767>`_, ICLR 2019.
    """
    seconds = _check_timeout(timeout, "average")
    collective = as_collective(group)
    if collective is None:
        return params_tree
    session = session_of(collective)
    try:
        everything, spec = _tree.flatten(params_tree)
    except Exception as mistake:  # a container that cannot be walked
        request = failed_request(mistake)
    else:
        if is_transformed(everything):
            return cast(
                "T", average_differentiably(everything, spec, collective, session, weight, where, donate, seconds)
            )
        request = make_request(everything, spec, weight=weight, where=where, donate=donate)
    with session.entered("average"):
        results = carry_out(request, collective, session, seconds)
    return cast("T", request.rebuild(results))


def start_average(
    params_tree: T,
    group: Any = None,
    *,
    weight: float | None = None,
    where: Where | None = None,
    donate: bool = False,
    timeout: float | None = None,
) -> Handle[T]:
    """Start to average, and return a handle; the result is that of `average`, which see.

    Agreement and transfers go on in the background, so this never waits for other ranks. The inputs must not be
    written to until ``handle.wait()`` has returned (as with ``MPI_Iallreduce``). One call at a time can be under way
    on a group. Leaves in a GPU's memory, and groups that cannot be duplicated, are averaged inside ``wait()``.

    Returns:
        A `Handle`. One that is dropped without ``wait`` warns.

    Raises:
        RuntimeError: If another call is under way on the group, or a transform of ``torch.func`` is active, or a leaf
            requires grad while gradients are recorded. On this rank, at once. All that `average` raises on the word
            of other ranks is raised by ``wait``.

    Example:
        >>> import numpy as np
        >>> from funcavg import start_average
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     handle = start_average({"w": np.array([float(group.rank)])}, group)
        ...     # ... compute something that does not write to the tree ...
        ...     return handle.wait()
        >>> run_ranks(2, fn)
        [{'w': array([0.5])}, {'w': array([0.5])}]
    """
    seconds = _check_timeout(timeout, "start_average")
    collective = as_collective(group)
    if collective is None:
        return Handle(params_tree)
    session = session_of(collective)
    try:
        everything, spec = _tree.flatten(params_tree)
    except Exception as mistake:
        request = failed_request(mistake)
    else:
        if is_transformed(everything):
            raise RuntimeError(
                "start_average: not under torch.func transforms, nor for leaves that require grad while gradients are "
                "recorded. Call it under torch.no_grad(), or use average."
            )
        request = make_request(everything, spec, weight=weight, where=where, donate=donate)
    session.enter("start_average")
    return Handle(None, _Flight(request, collective, session, seconds))


class Handle(Generic[T]):
    """An average under way. Made by `start_average`."""

    def __init__(self, result: Any, flight: _Flight | None = None) -> None:
        self._result, self._flight = result, flight

    def wait(self) -> T:
        """Wait for the other ranks and return the averaged tree; raise what `average` raises."""
        if self._flight is not None:
            self._result = self._flight.land()  # if interrupted (Ctrl-C), it can be waited for again
            self._flight = None
        if isinstance(self._result, BaseException):
            raise self._result
        return cast("T", self._result)

    def done(self) -> bool:
        """Say whether `wait` would return (or raise) without waiting for other ranks."""
        return self._flight is None or self._flight.landed()

    def __del__(self) -> None:
        flight = getattr(self, "_flight", None)
        if flight is not None:
            flight.abandon()
            warnings.warn(
                "a handle of start_average was dropped without wait(): its result is lost, and so is any error",
                RuntimeWarning,
                stacklevel=2,
                source=self,
            )


class _Flight:
    """The background of one `start_average`. It occupies the session until it is waited for, or abandoned and over."""

    def __init__(self, request: Request, collective: Collective, session: Session, timeout: float) -> None:
        self._request, self._collective, self._session, self._timeout = request, collective, session, timeout
        self._outcome: Any = None  # the tree, or the exception
        torch = sys.modules.get("torch")
        inference = torch is not None and torch.is_inference_mode_enabled()
        self._mode = torch.inference_mode if torch is not None and inference else contextlib.nullcontext
        self._guard = threading.Lock()
        self._over = self._abandoned = False
        on_device = request.layout is not None and bool(request.layout.devices)
        self._waits_for_caller = on_device or getattr(collective, "in_callers_thread", False)
        self._thread = threading.Thread(target=self._fly, name="funcavg start_average", daemon=True)
        if not self._waits_for_caller:
            self._thread.start()

    def _fly(self) -> None:
        try:
            with self._mode():  # of the caller's thread
                results = carry_out(self._request, self._collective, self._session, self._timeout)
                self._outcome = self._request.rebuild(results)
        except BaseException as error:  # raised by wait()
            self._outcome = error
        with self._guard:
            self._over = True
            if self._abandoned:
                self._session.leave()

    def landed(self) -> bool:
        return self._over

    def land(self) -> Any:
        if self._waits_for_caller:
            self._fly()
        else:
            self._thread.join()
        self._session.leave()
        return self._outcome

    def abandon(self) -> None:
        with self._guard:
            self._abandoned = True
            if self._over or self._waits_for_caller:
                self._session.leave()


def _check_timeout(timeout: float | None, who: str) -> float:
    if timeout is None:
        return TIMEOUT
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"{who}: timeout must be a number of seconds or None, got {timeout!r}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"{who}: timeout must be a positive, finite number of seconds, got {timeout!r}")
    return float(timeout)

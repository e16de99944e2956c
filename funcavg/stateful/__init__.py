"""Stand-ins for torch.distributed's model averagers, for classic loops: a counter, `should_average`, `average`.

They extend torch's own classes, so they stand wherever those are expected, and constructor arguments, attributes,
messages and the order of checks are torch's. Only what differs is written here; docs/moving-from-torch.md lists it.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from funcavg._errors import missing_extra
from funcavg._schedule import integer, should_average
from funcavg._trees import Options, Timeout
from funcavg.collectives import as_collective, default_group

try:
    import torch
    import torch.distributed.algorithms.model_averaging.averagers as torch_averagers
    import torch.distributed.algorithms.model_averaging.hierarchical_model_averager as torch_hierarchical
    from torch.distributed.optim import PostLocalSGDOptimizer as TorchPostLocalSGDOptimizer

    from funcavg.stateful._averaging import (
        OF_MAXIMUM_PERIOD_1,
        OF_PERIOD_1,
        Parameters,
        Which,
        average_parameters,
        check_hierarchical,
        check_options,
        check_periodic,
        portable,
        rebuild,
    )
except ImportError as error:
    raise missing_extra("funcavg.stateful", "torch with torch.distributed", "torch") from error

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["HierarchicalModelAverager", "ModelAverager", "PeriodicModelAverager", "PostLocalSGDOptimizer"]


class ModelAverager(torch_averagers.ModelAverager):
    """Base class of funcavg's model averagers: torch's, and a checkpoint of its step.

    Abstract: subclasses define ``average_parameters(params)``, which averages if it is time to, and counts the step.

    Args:
        process_group: Who takes part; ``None`` for torch.distributed's default group.

    Attributes:
        step: Calls of ``average_parameters`` so far, whether or not they averaged.
        process_group: The group.

    Raises:
        TypeError: If ``process_group`` is None and torch.distributed is not initialised. On this rank.
    """

    def __copy__(self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return an averager with all that is its own, over the same groups: these cannot be copied."""
        groups = [self.process_group, *getattr(self, "period_process_group_dict", {}).values()]
        memo.update({id(group): group for group in groups})
        copied = copy.copy(self)
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> Any:
        return rebuild, (type(self), portable(vars(self), type(self).__name__))

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"step": n}``: all that an averager remembers. Equal on all ranks; nothing is communicated."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at the step that `state_dict` returned, in the middle of a period too. Nothing is communicated.

        Args:
            state_dict: What `state_dict` returned; every rank loads the same. The step may have become an integer
                array or tensor on its way through a file.

        Raises:
            TypeError: If it is no mapping, or its step no integer. On this rank; the averager is unchanged.
            ValueError: If it has other keys than ``"step"``, or its step is negative. On this rank; the averager is
                unchanged.
        """
        who = f"{type(self).__name__}.load_state_dict"
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"{who}: state_dict must be a mapping, got {state_dict!r} of type {type(state_dict).__name__}"
            )
        if set(state_dict) != {"step"}:
            raise ValueError(f"{who}: state_dict must have the one key 'step', got {list(state_dict)!r}")
        step = integer(f"{who}: the step", state_dict["step"])
        if step < 0:
            raise ValueError(f"{who}: the step must be at least 0, got {step}")
        self.step = step


class PeriodicModelAverager(ModelAverager, torch_averagers.PeriodicModelAverager):
    """Averages parameters every ``period`` steps after ``warmup_steps``; the stand-in for torch's class of this name.

    Call ``average_parameters`` once after every step of the optimizer, on all ranks. It averages when
    ``should_average(step, warmup=warmup_steps, period=period)``.

    Stand-ins have no ``wire``, since they average parameters. Where links are slow, use `funcavg.diloco`, with
    ``outer=outer.sgd(1.0)`` and ``wire="int8"``: it averages what has changed.

    Args:
        period: Steps, at least 1, between two averagings. 1 warns, for then averaging gradients costs no more.
        warmup_steps: Steps, at least 0, before the first averaging. Let gradients be averaged until then.
        process_group: Who takes part: whatever `average` takes as ``group``. ``None`` is torch.distributed's default
            group. A rank outside of the group only counts steps.
        where: Called with each parameter that has a gradient; those that it refuses are left alone, such as experts:
            ``lambda param: getattr(param, "allreduce", True)``. It must refuse the same on all ranks.
        timeout: Seconds, or a ``timedelta``, to wait for the other ranks, as for `average`: ``None`` for the group's
            own timeout, where that is not torch's default, else 300 seconds.
        donate: ``False`` averages into new memory and copies the means into the parameters once all have arrived, so
            they are whole after a ``PeerLostError``, and the job can go on without whoever was lost
            (`funcavg.furthest`). It costs a copy of the parameters for as long as a call lasts.

    Raises:
        TypeError: If ``period`` or ``warmup_steps`` is no integer (bool is none), ``where`` no function, ``timeout`` no
            number of seconds, ``donate`` no bool, or ``process_group`` is None and torch.distributed is not
            initialised. On this rank.
        ValueError: If ``period < 1`` or ``warmup_steps < 0``. On this rank.

    Examples:
        >>> import torch
        >>> from funcavg import PeriodicModelAverager
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     model = torch.nn.Linear(1, 1, bias=False)
        ...     torch.nn.init.constant_(model.weight, group.rank)
        ...     averager = PeriodicModelAverager(period=4, warmup_steps=1, process_group=group)
        ...     trace = []
        ...     for _ in range(3):
        ...         model(torch.ones(1)).backward()
        ...         averager.average_parameters(model.parameters())
        ...         trace.append(model.weight.item())
        ...     return trace
        >>> run_ranks(2, fn)
        [[0.0, 0.5, 0.5], [1.0, 0.5, 0.5]]

    References:
        Lin et al., [Don't Use Large Mini-Batches, Use Local SGD](https://arxiv.org/abs/1808.07217), ICLR 2020
        (post-local SGD). torch's ``torch.distributed.algorithms.model_averaging.averagers``.
    """

    def __init__(  # noqa: PLR0913  # torch's, and options as keywords
        self,
        period: int,
        warmup_steps: int = 0,
        process_group: Any = None,
        *,
        where: Which | None = None,
        timeout: Timeout = None,
        donate: bool = True,
    ) -> None:
        check_periodic(period, warmup_steps)
        self.where, self.timeout = where, check_options("PeriodicModelAverager", where, timeout, donate)
        self.donate = donate
        # torch would warn of a period of 1 at this line, and not at the user's
        super().__init__(2 if period == 1 else period, warmup_steps, process_group)
        if period == 1:
            warnings.warn(OF_PERIOD_1, stacklevel=2)
        self.period = period
        if process_group is None:
            default_group()  # raises if that is one rank among several processes

    def average_parameters(self, params: Parameters) -> None:
        """Average, if it is time to, the parameters that have a gradient; then count the step.

        Averaging is in place: every parameter keeps its memory, and so do its views. Buffers are left alone.

        Args:
            params: Parameters of a model or parameter groups of an optimizer, the same on all ranks. Those whose
                ``grad`` is None are left alone.

        Raises:
            TreeMismatchError: If ranks disagree about which parameters have gradients, or about shapes, dtypes or
                order. On every rank alike.
            NotImplementedError: If an item is neither a ``Parameter`` nor a dict, such as a plain tensor. On every
                rank, whoever passed it.
            ValueError: If no parameter has a gradient, or parameters overlap in memory without being equal views. On
                every rank alike.
            PeerLostError: If a rank dies or does not come within ``timeout``. On the ranks that wait for it.

            After an error that all ranks raise alike, or with ``donate=False`` any, parameters are unchanged. After
            any error the step has not been counted.

        Communication:
            None on steps that do not average; otherwise that of `average`.
        """
        if should_average(self.step, warmup=self.warmup_steps, period=self.period):
            options = Options(donate=self.donate, timeout=self.timeout)
            average_parameters(params, self.process_group, self.where, options)
        self.step += 1


class HierarchicalModelAverager(ModelAverager, torch_hierarchical.HierarchicalModelAverager):
    """Averages in small groups often, in larger ones less often; the stand-in for torch's class of this name.

    Call ``average_parameters`` once after every step of the optimizer, on all ranks. From step ``warmup_steps`` on, it
    averages at steps which some period divides, over the group of the largest such period. (Periods divide the step
    itself, as in torch, and not the steps since the warm-up, as in `PeriodicModelAverager`.) It has no ``wire``,
    either.

    Args:
        period_group_size_dict: {period, in steps: ranks in each group that averages so often}, periods ascending. Each
            size divides the next, and the last is the size of ``process_group``.
        warmup_steps: Steps, at least 0, before the first averaging. Let gradients be averaged until then.
        process_group: A torch ``ProcessGroup``; ``None`` for the default group.
        where: Which parameters are averaged, as for `PeriodicModelAverager`.
        timeout: How long to wait for the other ranks, as for `PeriodicModelAverager`.
        donate: Whether parameters are averaged in their own memory, as for `PeriodicModelAverager`.

    Raises:
        TypeError: If a period, a group size or ``warmup_steps`` is no integer (bool is none), or ``process_group`` no
            ``ProcessGroup`` of torch's own class, or None while torch.distributed is not initialised. On this rank.
        ValueError: If periods do not ascend, which would leave some never reached; if a size does not divide the next,
            or the last is not that of the group; if ``period_group_size_dict`` is empty, a period is not positive, or
            ``warmup_steps < 0``. On this rank.

    Communication:
        Making one is collective: all ranks of the default group create the smaller groups together.

    Examples:
        ```python
        # Pairs of neighbours average every 4 steps, all 16 ranks every 16.
        averager = HierarchicalModelAverager({4: 2, 16: 16}, warmup_steps=100)
        for x, y in batches:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
            averager.average_parameters(model.parameters())
        ```

    References:
        Wang et al., [Demystifying Why Local Aggregation Helps: Convergence Analysis of Hierarchical
        SGD](https://arxiv.org/abs/2010.12998), AAAI 2022. torch's
        ``torch.distributed.algorithms.model_averaging.hierarchical_model_averager``.
    """

    def __init__(  # noqa: PLR0913  # torch's, and options as keywords
        self,
        period_group_size_dict: Mapping[int, int] | None = None,
        warmup_steps: int = 0,
        process_group: Any = None,
        *,
        where: Which | None = None,
        timeout: Timeout = None,
        donate: bool = True,
    ) -> None:
        check_hierarchical(period_group_size_dict, warmup_steps, process_group)
        self.where, self.timeout = where, check_options("HierarchicalModelAverager", where, timeout, donate)
        self.donate = donate
        sizes = dict(period_group_size_dict or {})
        only_1 = list(sizes) == [1]
        if only_1:  # as in PeriodicModelAverager; what torch raises before it warns comes before
            ModelAverager.__init__(self, process_group)
            warnings.warn(OF_MAXIMUM_PERIOD_1, stacklevel=2)
        made: Any = super().__init__
        made({2: sizes[1]} if only_1 else period_group_size_dict, warmup_steps, process_group)
        if only_1:
            self._periods = [1]
            self.period_process_group_dict = OrderedDict({1: self.process_group})
        if process_group is None:
            default_group()

    def average_parameters(self, params: Parameters) -> None:
        """Average, if it is time to, the parameters that have a gradient; then count the step.

        Arguments, errors and communication are those of `PeriodicModelAverager.average_parameters`, over the group of
        the largest period that divides the step. "Every rank" is every rank of that group.
        """
        if self.step >= self.warmup_steps:
            group = self._find_process_group()  # type: ignore[no-untyped-call]  # torch's
            if group is not None:
                timeout = self.timeout
                if timeout is None:  # torch gives smaller groups its default, and not their parent's
                    timeout = getattr(as_collective(self.process_group), "default_timeout", None)
                average_parameters(params, group, self.where, Options(donate=self.donate, timeout=timeout))
        self.step += 1


class PostLocalSGDOptimizer(TorchPostLocalSGDOptimizer):
    """Steps a local optimizer, then averages parameters with an averager; the stand-in for torch's class of this name.

    ``state_dict()`` is the local optimizer's with the averager's step as one more entry, ``"step"``;
    ``load_state_dict`` restores both, and warns if there is no step. Neither communicates; each rank saves and loads
    its own.

    Args:
        optim: The local optimizer.
        averager: A model averager, funcavg's or torch's.

    It stands wherever an optimizer is expected: ``step`` takes a closure, hooks and ``defaults`` are the local
    optimizer's (whose hooks run before parameters are averaged), and it can be copied and pickled.

    Attributes:
        param_groups: Those of the local optimizer, always: a scheduler that is bound to this object reaches it after
            ``load_state_dict`` too.

    Raises:
        Exception: ``step()`` raises what the averager's ``average_parameters`` raises, on the same ranks. The local
            step has been taken by then.

    Examples:
        >>> import torch
        >>> from funcavg import PeriodicModelAverager, PostLocalSGDOptimizer
        >>> from funcavg.testing import run_ranks
        >>> def fn(group):
        ...     weight = torch.nn.Parameter(torch.tensor(float(group.rank)))
        ...     averager = PeriodicModelAverager(period=4, process_group=group)
        ...     optimizer = PostLocalSGDOptimizer(torch.optim.SGD([weight], lr=0.5), averager)
        ...     weight.backward()
        ...     optimizer.step()
        ...     return weight.item(), optimizer.state_dict()["step"]
        >>> run_ranks(2, fn)
        [(0.0, 1), (0.0, 1)]

    References:
        Lin et al., [Don't Use Large Mini-Batches, Use Local SGD](https://arxiv.org/abs/1808.07217), ICLR 2020.
        torch's ``torch.distributed.optim.PostLocalSGDOptimizer``.
    """

    def __init__(self, optim: torch.optim.Optimizer, averager: torch_averagers.ModelAverager) -> None:
        super().__init__(optim, averager)

    def __getattr__(self, name: str) -> Any:
        """Take from the local optimizer what torch's class lacks: ``defaults``, and the hooks of its steps and states.

        Schedulers and trainers ask for these. Nothing else: a GradScaler would take this for a fused optimizer that
        unscales gradients in its step.
        """
        if name == "defaults" or (name.startswith("_optimizer_") and name.endswith("_hooks")):
            return getattr(self.optim, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "step"}  # which schedulers wrap

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the local optimizer, then average, if it is time to.

        Args:
            closure: As for the local optimizer: computes the loss again, and returns it.

        Returns:
            What the local optimizer returns: the loss, if there is a closure.
        """
        loss = self.optim.step() if closure is None else self.optim.step(closure)
        self.averager.average_parameters(self.param_groups)  # type: ignore[no-untyped-call]  # torch's
        return loss

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # an attribute there, which goes stale
        """Parameter groups of the local optimizer."""
        return self.optim.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optim.param_groups = param_groups

"""What the stand-ins of `funcavg.stateful` share: averaging parameters in place, and checks of arguments."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging import averagers, hierarchical_model_averager
from torch.distributed.algorithms.model_averaging.utils import get_params_to_average

from funcavg._average import average_with, report_mistake
from funcavg._errors import TreeMismatchError
from funcavg._schedule import integer
from funcavg._trees import Options, checked_timeout
from funcavg.collectives import as_collective

__all__ = [
    "OF_MAXIMUM_PERIOD_1",
    "OF_PERIOD_1",
    "Parameters",
    "Which",
    "average_parameters",
    "check_hierarchical",
    "check_options",
    "check_periodic",
    "portable",
    "rebuild",
]

Parameters = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]
Which = Callable[[torch.nn.Parameter], Any]


def average_parameters(params: Parameters, group: Any, where: Which | None, options: Options) -> None:
    """Average, in place, the parameters that have a gradient and that ``where`` accepts."""
    try:
        items: list[Any] = [{"params": list(item["params"])} if isinstance(item, dict) else item for item in params]
        given = get_params_to_average(items)
        chosen = {id(param) for param in given if where is None or where(param)}
    except Exception as mistake:
        _raise_on_every_rank(mistake, group, options)
    if as_collective(group) is None:
        return

    def leaf(param: torch.nn.Parameter) -> torch.Tensor | None:
        if id(param) not in chosen:
            return None
        data = param.data
        marks = {name: value for name, value in vars(param).items() if name != "_fsdp_flattened"}  # the memory tells
        vars(data).update(marks)  # of whoever has cut it (`funcavg._trees.arrays.parts`)
        return data

    tree = [{"params": list(map(leaf, item["params"]))} if isinstance(item, dict) else leaf(item) for item in items]
    try:
        means = average_with(options, tree, group)
    except TreeMismatchError as mismatch:
        refused = "" if where is None else ", or which where refuses,"
        raise TreeMismatchError(f"{mismatch} A parameter whose grad is None{refused} counts as no leaf.") from None
    except ValueError as refusal:
        reason = str(refusal).partition("donate=True, but ")[2].partition(" Pass donate=False")[0]
        if not reason:
            raise
        raise ValueError(
            f"average_parameters: parameters are averaged in their own memory, but {reason} Average one of them, or "
            f"copies. Nothing was sent and the parameters are unchanged, on every rank."
        ) from None
    if not options.donate:
        with torch.no_grad():
            for param, mean in zip(_each(items), _each(means), strict=True):
                if id(param) in chosen:
                    param.copy_(mean)
    if not chosen:  # on no rank, for they have just agreed
        total = len(_each(items))
        if given:
            raise ValueError(
                f"average_parameters: where refuses all {len(given)} parameters that have a gradient, of {total}, so "
                f"there is nothing to average."
            )
        raise ValueError(
            f"average_parameters: none of the {total} parameters has a gradient, on any rank, so there is nothing to "
            f"average. Call it after backward() and before zero_grad()."
        )


def _each(items: Iterable[Any]) -> list[Any]:
    """Return parameters, or what stands for them, of both kinds of items."""
    return [param for item in items for param in (item["params"] if isinstance(item, dict) else [item])]


def _raise_on_every_rank(mistake: Exception, group: Any, options: Options) -> NoReturn:
    """Raise this rank's mistake here, and let the ranks that wait in `average` hear of it."""
    with suppress(Exception):  # the same mistake, in other words
        report_mistake(mistake, group, options)
    raise mistake


def check_options(who: str, where: Any, timeout: Any, donate: Any) -> float | None:
    """Refuse what is no function of a parameter, no timeout, or no bool; return the timeout in seconds."""
    if not isinstance(donate, bool):
        raise TypeError(f"{who}: donate must be True or False, got {donate!r} of type {type(donate).__name__}")
    if where is not None and not callable(where):
        raise TypeError(f"{who}: where must be a function of a parameter, got {where!r} of type {type(where).__name__}")
    return checked_timeout(timeout, who)


def check_periodic(period: Any, warmup_steps: Any) -> None:
    """Refuse what is no integer. The rest is left to torch's own words."""
    integer("Arg ``period``", period)
    integer("Arg ``warmup_steps``", warmup_steps)


def check_hierarchical(period_group_size_dict: Any, warmup_steps: Any, process_group: Any) -> None:
    """Refuse what torch accepts and should not. The rest is left to torch's own words."""
    arg, given = "arg ``period_group_size_dict``", period_group_size_dict
    if given is not None:
        if not isinstance(given, Mapping):
            raise TypeError(f"A{arg[1:]} must be a mapping, got {given!r} of type {type(given).__name__}.")
        periods = [integer(f"A period in {arg}", period) for period in given]
        sizes = [integer(f"A group size in {arg}", size) for size in given.values()]
        if periods != sorted(periods):
            raise ValueError(
                f"Periods in {arg} must ascend, got {periods}. The last one that divides a step is used, so a larger "
                f"one before it may never be."
            )
        if any(smaller < 1 or larger % smaller for smaller, larger in pairwise(sizes)):
            raise ValueError(f"Group sizes in {arg} must be positive and each divide the next, got {sizes}.")
    integer("Arg ``warmup_steps``", warmup_steps)
    outside = dist.GroupMember.NON_GROUP_MEMBER
    if process_group not in (None, outside) and not isinstance(process_group, dist.ProcessGroup):
        kind = type(process_group).__name__
        raise TypeError(f"Arg ``process_group`` must be a ProcessGroup or None, got {process_group!r} of type {kind}.")
    if isinstance(process_group, dist.ProcessGroup) and type(process_group) is not dist.ProcessGroup:
        raise TypeError(
            f"Arg ``process_group`` must be one of torch's own groups, got a {type(process_group).__name__}, whose "
            f"ranks may be others at any time: numbers of them make no lasting groups. Use PeriodicModelAverager, or "
            f"funcavg.hierarchical with a group for each period."
        )


def portable(state: Mapping[str, Any], who: str) -> dict[str, Any]:
    """Return an averager's attributes as they can be pickled: the default group as a place to put another's.

    Raises:
        TypeError: If they hold another group, which no other process could join.
    """
    kept = dict(state)
    if kept.get("process_group") is dist.group.WORLD:
        kept["process_group"] = None
    if any(isinstance(value, dist.ProcessGroup) for value in kept.values()) or "period_process_group_dict" in kept:
        raise TypeError(
            f"{who}: a process group cannot be pickled. Save state_dict(), make the averager anew where it is loaded, "
            f"and let it load_state_dict()."
        )
    return kept


def rebuild(kind: type[Any], state: dict[str, Any]) -> Any:
    """Make an averager of what `portable` returned, with this process's default group in the place of the other's."""
    averager = object.__new__(kind)
    vars(averager).update(state)
    if averager.process_group is None:
        averager.process_group = dist.group.WORLD
    return averager


def _warning_of(make: Callable[[], Any]) -> str:
    """Return torch's words for a period of 1, which the stand-ins say at their user's line."""
    with warnings.catch_warnings(record=True) as caught, suppress(Exception):
        warnings.simplefilter("always")
        make()
    return str(caught[0].message) if caught else "a period of 1 averages at every step"


_nobody: Any = object()
OF_PERIOD_1 = _warning_of(lambda: averagers.PeriodicModelAverager(1, process_group=_nobody))
OF_MAXIMUM_PERIOD_1 = _warning_of(partial(hierarchical_model_averager.HierarchicalModelAverager, {1: 1}, 0, _nobody))

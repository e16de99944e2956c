"""What the stand-ins of `funcavg.stateful` share: averaging parameters in place, and checks of arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.utils import get_params_to_average

from funcavg._average import average, report_mistake
from funcavg._errors import TreeMismatchError
from funcavg._schedule import integer
from funcavg.collectives import as_collective

__all__ = ["Parameters", "average_parameters", "check_hierarchical", "check_periodic"]

Parameters = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


def average_parameters(params: Parameters, group: Any) -> None:
    """Average, in place, the parameters that have a gradient."""
    try:
        items: list[Any] = [{"params": list(item["params"])} if isinstance(item, dict) else item for item in params]
        chosen = {id(param) for param in get_params_to_average(items)}
    except Exception as mistake:
        _raise_on_every_rank(mistake, group)
    if as_collective(group) is None:
        return

    def leaf(param: torch.nn.Parameter) -> torch.Tensor | None:
        if id(param) not in chosen:
            return None
        data = param.data
        vars(data).update(vars(param))  # marks of whoever has cut it (`funcavg._trees.arrays.parts`)
        return data

    tree = [{"params": list(map(leaf, item["params"]))} if isinstance(item, dict) else leaf(item) for item in items]
    try:
        average(tree, group, donate=True)
    except TreeMismatchError as mismatch:
        raise TreeMismatchError(f"{mismatch} A parameter whose grad is None counts as no leaf.") from None
    except ValueError as refusal:
        reason = str(refusal).partition("donate=True, but ")[2].partition(" Pass donate=False")[0]
        if not reason:
            raise
        raise ValueError(
            f"average_parameters: parameters are averaged in their own memory, but {reason} Average one of them, or "
            f"copies. Nothing was sent and the parameters are unchanged, on every rank."
        ) from None
    if not chosen:  # on no rank, for they have just agreed
        total = sum(len(item["params"]) if isinstance(item, dict) else 1 for item in items)
        raise ValueError(
            f"average_parameters: none of the {total} parameters has a gradient, on any rank, so there is nothing to "
            f"average. Call it after backward() and before zero_grad()."
        )


def _raise_on_every_rank(mistake: Exception, group: Any) -> NoReturn:
    """Raise this rank's mistake here, and let the ranks that wait in `average` hear of it."""
    with suppress(Exception):  # the same mistake, in other words
        report_mistake(mistake, group)
    raise mistake


def check_periodic(period: Any = 1, warmup_steps: Any = 0, *_: Any, **__: Any) -> None:
    """Refuse what is no integer. The rest is left to torch's own words."""
    integer("Arg ``period``", period)
    integer("Arg ``warmup_steps``", warmup_steps)


def check_hierarchical(
    period_group_size_dict: Any = None, warmup_steps: Any = 0, process_group: Any = None, *_: Any, **__: Any
) -> None:
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

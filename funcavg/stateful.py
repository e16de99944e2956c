"""Stand-ins for torch.distributed's model averagers, for classic loops: a counter, `should_average`, `average`.

They extend torch's own classes, so they can stand wherever those are expected. docs/moving-from-torch.md lists what
differs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from funcavg._average import average
from funcavg._errors import missing_extra
from funcavg._schedule import should_average

try:
    import torch
    import torch.distributed.algorithms.model_averaging.averagers as torch_averagers
    import torch.distributed.algorithms.model_averaging.hierarchical_model_averager as torch_hierarchical
    from torch.distributed.algorithms.model_averaging.utils import get_params_to_average
    from torch.distributed.optim import PostLocalSGDOptimizer as TorchPostLocalSGDOptimizer
except ImportError as error:
    raise missing_extra("funcavg's model averagers", "torch with torch.distributed", "torch") from error

__all__ = ["HierarchicalModelAverager", "ModelAverager", "PeriodicModelAverager", "PostLocalSGDOptimizer"]

Parameters = Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]]


def _average_parameters(params: Parameters, group: Any) -> None:
    """Average, in place, the parameters that have a gradient."""
    everything: list[torch.nn.Parameter] = []
    for item in (items := list(params)):
        everything += item["params"] if isinstance(item, dict) else [item]
    chosen = {id(param) for param in get_params_to_average(items)}
    average([p.data for p in everything], group, where=lambda path: id(everything[path[0]]) in chosen, donate=True)


class PeriodicModelAverager(torch_averagers.PeriodicModelAverager):
    def average_parameters(self, params):
        if should_average(self.step, self.warmup_steps, self.period):
            _average_parameters(params, self.process_group)
        self.step += 1

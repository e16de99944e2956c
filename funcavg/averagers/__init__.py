"""How, over a training run: averagers, each a pair of pure functions ``init`` and ``update``. One method a file."""

from __future__ import annotations

from funcavg.averagers._base import Averager, InitFn, UpdateFn
from funcavg.averagers._diloco import DiLoCoState, diloco
from funcavg.averagers._hierarchical import HierarchicalState, hierarchical
from funcavg.averagers._periodic import PeriodicState, periodic
from funcavg.averagers._streaming import StreamingState, streaming_diloco

__all__ = [
    "Averager",
    "DiLoCoState",
    "HierarchicalState",
    "InitFn",
    "PeriodicState",
    "StreamingState",
    "UpdateFn",
    "diloco",
    "hierarchical",
    "periodic",
    "streaming_diloco",
]

for _name in __all__:
    if _name.endswith("State"):
        globals()[_name].__module__ = __name__  # as checkpoints that pickle a state name it

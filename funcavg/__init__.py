"""Average the parameters of a distributed training job, as a pure function.

When: `should_average`. What: `average`, `start_average`; `broadcast` and `differences` of replicas; `mean` of several
trees in one process; `furthest` and `forget` after a loss. With whom: `Collective`, `stacked` and
`funcavg.collectives`. How, over a training run: `periodic`, `hierarchical`, `diloco` and `streaming_diloco`
with their optimizers in `funcavg.outer`; each makes an `Averager`. For classic loops: `PeriodicModelAverager` and its
kin, which need torch. These two are imported when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from funcavg._average import average, start_average
from funcavg._broadcast import broadcast
from funcavg._differences import differences
from funcavg._engine import Handle
from funcavg._errors import FuncavgError, PeerLostError, TreeMismatchError
from funcavg._lost import forget, furthest
from funcavg._mean import mean
from funcavg._schedule import should_average
from funcavg._transforms import stacked
from funcavg.collectives.base import Collective

if TYPE_CHECKING:
    from funcavg import outer
    from funcavg.averagers import Averager, diloco, hierarchical, periodic, streaming_diloco
    from funcavg.stateful import (
        HierarchicalModelAverager,
        ModelAverager,
        PeriodicModelAverager,
        PostLocalSGDOptimizer,
    )

__all__ = [
    "Averager",
    "Collective",
    "FuncavgError",
    "Handle",
    "HierarchicalModelAverager",
    "ModelAverager",
    "PeerLostError",
    "PeriodicModelAverager",
    "PostLocalSGDOptimizer",
    "TreeMismatchError",
    "average",
    "broadcast",
    "differences",
    "diloco",
    "forget",
    "furthest",
    "hierarchical",
    "mean",
    "outer",
    "periodic",
    "should_average",
    "stacked",
    "start_average",
    "streaming_diloco",
]
__version__ = "0.1.0"

_LATER = {
    **dict.fromkeys(("Averager", "diloco", "hierarchical", "periodic", "streaming_diloco"), "funcavg.averagers"),
    # imports torch, whose classes these extend
    **dict.fromkeys(
        ("HierarchicalModelAverager", "ModelAverager", "PeriodicModelAverager", "PostLocalSGDOptimizer"),
        "funcavg.stateful",
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("averagers", "outer"):
        return importlib.import_module(f"funcavg.{name}")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "averagers", "collectives"])

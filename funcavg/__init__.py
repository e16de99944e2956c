"""Average the parameters of a distributed training job, as a pure function.

When: `should_average`. What: `average`, `start_average`. With whom: `Collective`, `stacked` and `funcavg.collectives`.
For classic loops: `PeriodicModelAverager` and its kin, which need torch and are imported when first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from funcavg._average import average, start_average
from funcavg._errors import FuncavgError, PeerLostError, TreeMismatchError
from funcavg._handle import Handle
from funcavg._schedule import should_average
from funcavg._stacked import stacked
from funcavg.collectives.base import Collective

if TYPE_CHECKING:
    from funcavg.stateful import (
        HierarchicalModelAverager,
        ModelAverager,
        PeriodicModelAverager,
        PostLocalSGDOptimizer,
    )

__all__ = [
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
    "should_average",
    "stacked",
    "start_average",
]
__version__ = "0.1.0"

_STATEFUL = frozenset({"HierarchicalModelAverager", "ModelAverager", "PeriodicModelAverager", "PostLocalSGDOptimizer"})


def __getattr__(name: str) -> Any:
    if name in _STATEFUL:
        from funcavg import stateful  # imports torch, whose classes these extend

        return getattr(stateful, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

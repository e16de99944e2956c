"""The ways in which an average is called: each says whether a call is its own, and carries it out.

Over an axis name of JAX's (`axis.py`); over replicas that this process holds (`replicas.py`); while JAX traces
(`jax.py`); under torch's transforms, and where gradients are recorded (`torch.py`); and plainly (`plain.py`). While
torch records a program (`recorders.py`) it is refused. What takes leaves as bits is done plainly (`exactly.py`).
"""

from __future__ import annotations

from typing import Any, Protocol

from funcavg._engine import Handle
from funcavg._transforms import axis, jax, plain, recorders, replicas, torch
from funcavg._transforms.axis import broadcast as broadcast_over_axis
from funcavg._transforms.axis import is_axis
from funcavg._transforms.call import Call
from funcavg._transforms.exactly import described, obstacle_to
from funcavg._transforms.jax import do_in_order, is_traced
from funcavg._transforms.replicas import Stacked, stacked

__all__ = [
    "Call",
    "Stacked",
    "Way",
    "broadcast_over_axis",
    "described",
    "do_in_order",
    "is_axis",
    "is_traced",
    "obstacle_to",
    "stacked",
    "way_of",
]


class Way(Protocol):
    """A module that carries out calls of its kind."""

    def takes(self, call: Call, /) -> bool:
        """Say whether a call is of this kind."""
        ...

    def average(self, call: Call) -> Any:
        """Return the mean of the tree."""
        ...

    def start(self, call: Call) -> Handle[Any]:
        """Begin to average, or raise why that cannot be."""
        ...


_WAYS: tuple[Way, ...] = (axis, recorders, replicas, jax, torch, plain)


def way_of(call: Call) -> Way:
    """Return whoever carries out a call."""
    return next(way for way in _WAYS if way.takes(call))

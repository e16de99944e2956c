"""Ranks agree, then bytes move, then one kernel averages them.

`engine.py` is the way of a call: agree (`agree.py`), cut leaves into buckets (`buckets.py`), carry these over a
transport (`lanes.py`) or through a host's memory (`node_lane.py`), sum (`mean.py`: in C by `kernel.py`, else by
`arithmetic.py`). `session.py` is what is remembered of a group, `flight.py` a call in the background. `several.py` is
the mean of several trees without a group.
"""

from __future__ import annotations

from funcavg._engine.agree import Agreement
from funcavg._engine.buckets import host_memory
from funcavg._engine.engine import carry_out, compare, gather, move, reach_agreement
from funcavg._engine.flight import Handle, depart
from funcavg._engine.kernel import kernel_in_use
from funcavg._engine.mean import mean_into, tensor_mean_into
from funcavg._engine.session import same_configuration, session_of
from funcavg._engine.several import InTurn, means_of

__all__ = [
    "Agreement",
    "Handle",
    "InTurn",
    "carry_out",
    "compare",
    "depart",
    "gather",
    "host_memory",
    "kernel_in_use",
    "mean_into",
    "means_of",
    "move",
    "reach_agreement",
    "same_configuration",
    "session_of",
    "tensor_mean_into",
    "wires_in_use",
]


def wires_in_use() -> str:
    """Say which kernel writes the codes of wires in this process."""
    from funcavg._engine.coders import coder_in_use  # which calls without a wire need not import

    return coder_in_use()

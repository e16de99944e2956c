"""Whether tensors are of the kinds that others were: torch's own test, in C++, which its compiler makes of its inputs.

It looks at type, dtype, shape, strides, device, layout and `requires_grad` of a tensor in a tenth of the time that
Python takes for it. Private to torch; release 2.13. Where it is not found, signatures are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from funcavg._trees.arrays.base import Alike
from funcavg._trees.arrays.parts import parts_of

__all__ = ["alike"]


def alike(leaves: Sequence[Any]) -> Alike | None:
    """Return a test whether tensors are whole, and of the kinds of these; None if these would not pass it."""
    if len(set(map(id, leaves))) < len(leaves):
        return None  # it takes no tensor twice
    try:
        guards: Any = torch._C._dynamo.guards
        check = guards.TensorGuards(*leaves, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

        def test(others: Sequence[Any]) -> bool:
            return bool(check(*others)) and not parts_of(others)

        return test if test(leaves) else None
    except Exception:  # another release of torch
        return None

"""Calls that read leaves as they are: they are made plainly, or refused.

There is no derivative of them, and while a framework traces or records there are no values yet. Where other ranks wait,
all hear of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from funcavg._compile import outside
from funcavg._transforms import jax, recorders, replicas, torch
from funcavg._transforms.call import Call
from funcavg._trees import Request, failed_request

__all__ = ["described", "obstacle_to"]


def obstacle_to(leaves: Sequence[Any]) -> str:
    """Say in which surroundings leaves cannot be read; "" if they can be."""
    if recorder := recorders.recorder():
        return f"under {recorder}"
    if jax.is_traced(leaves, None):
        return "while JAX traces, as under jit and vmap"
    if torch.is_inside_transform() and torch.is_transformed(leaves):
        return "under a transform of torch.func, or in forward mode"
    return ""


def described(call: Call) -> tuple[Request, AbstractContextManager[Any]]:
    """Return what this rank asks for, or its mistake; and inside of what it must tell the others."""
    if isinstance(call.group, replicas.Stacked):
        raise TypeError(f"{call.who}: over stacked replicas there are no ranks, for this process holds all of them")
    leaves = () if call.collective is None or isinstance(call.walked, Exception) else call.walked.leaves
    where = obstacle_to(leaves)
    if not where:
        return _checked(call), contextlib.nullcontext()
    mistake = RuntimeError(f"called {where}, where leaves have no bits to be read. Call it outside of it")
    inside = contextlib.nullcontext() if "JAX" in where else outside()
    return failed_request(mistake, call.options), inside


def _checked(call: Call) -> Request:
    root, size = call.options.root, getattr(call.collective, "size", 1)
    if call.who != "broadcast":
        return call.request()
    kind = type(root).__name__
    try:
        shown = repr(root)[:60]
    except Exception:  # it may not say what it is, or be too long a number
        shown = "a value that cannot be shown"
    if isinstance(root, bool) or not isinstance(root, int):
        words = f"root must be a rank of the group, got {shown} of type {kind}"
        return failed_request(TypeError(words), call.options)
    if not 0 <= root < size:
        words = (
            f"root must be a rank of the group, 0 to {size - 1}, got {shown} (ranks are counted in the group itself)"
        )
        return failed_request(ValueError(words), call.options)
    return call.request()

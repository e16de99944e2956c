"""Calls that take leaves as bits, over a group of processes or threads: they are made plainly, or refused everywhere.

There is no derivative of them, and while a framework traces or records there are no values yet. Other ranks wait, so
all hear of it.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from funcavg._transforms import jax, recorders, replicas, torch
from funcavg._transforms.call import Call
from funcavg._trees import Request, failed_request

__all__ = ["described"]


def described(call: Call) -> tuple[Request, AbstractContextManager[Any]]:
    """Return what this rank asks for, or its mistake; and inside of what it must tell the others."""
    if isinstance(call.group, replicas.Stacked):
        raise TypeError(f"{call.who}: over stacked replicas there are no ranks, for this process holds all of them")
    recorder = recorders.recorder()
    if recorder:
        words = f"it is run under {recorder}"
    elif call.concerns(jax.is_traced, None):
        words = "JAX traces it, as under jit and vmap"
    elif call.concerns(torch.is_under_transform):
        words = "it is run under a transform of torch.func, or in forward mode"
    else:
        return _checked(call), contextlib.nullcontext()
    mistake = RuntimeError(f"{words}, where leaves have no bits to be read. Call it outside of it")
    of_torch = recorder or call.concerns(torch.is_under_transform)
    return failed_request(mistake, call.options), recorders.outside() if of_torch else contextlib.nullcontext()


def _checked(call: Call) -> Request:
    root, size = call.options.root, getattr(call.collective, "size", 1)
    if call.who != "broadcast":
        return call.request()
    if isinstance(root, bool) or not isinstance(root, int):
        kind = type(root).__name__
        return failed_request(TypeError(f"root must be a rank of the group, got {root!r} of type {kind}"), call.options)
    if not 0 <= root < size:
        words = f"root must be a rank of the group, 0 to {size - 1}, got {root} (ranks are counted in the group itself)"
        return failed_request(ValueError(words), call.options)
    return call.request()

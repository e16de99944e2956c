"""The plain call: nothing is traced and nothing records. It alone can be begun and waited for later."""

from __future__ import annotations

from typing import Any

from funcavg._engine import Handle, carry_out, depart, session_of
from funcavg._transforms.call import Call

__all__ = ["average", "start", "takes"]


def takes(_: Call) -> bool:
    """Take whatever nobody else does."""
    return True


def average(call: Call) -> Any:
    """Return the mean of the tree; on a rank outside of the group, the tree."""
    if call.collective is None:
        return call.tree
    session, request = session_of(call.collective), call.request()
    with session.entered(call.who):
        results = carry_out(request, call.collective)
    return request.rebuild(results)


def start(call: Call) -> Handle[Any]:
    """Average in the background."""
    if call.collective is None:
        return Handle(call.tree)
    return depart(call.who, call.request(), call.collective, keep=call.keep)

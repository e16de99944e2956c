"""Calls while torch records a program, or only pretends to run it: refused, on every rank.

An average reads and writes memory itself. make_fx and ``torch.jit.trace`` would leave it out of what they record;
under fake tensors there is no memory; and transports are made of tensors, which such modes take for their own.
"""

from __future__ import annotations

import sys
from typing import Any

from funcavg._compile import outside
from funcavg._engine import Handle, carry_out, depart, session_of
from funcavg._transforms.call import Call
from funcavg._trees import failed_request

__all__ = ["average", "recorder", "start", "takes"]

MODES = {  # of torch's, by their classes' names
    "ProxyTorchDispatchMode": "make_fx, or torch.export",
    "FakeTensorMode": "fake tensors, or torch.export",
    "FunctionalTensorMode": "a mode that functionalizes, or torch.export",
}


def takes(call: Call) -> bool:
    """Take whatever is averaged while torch records."""
    return bool(recorder()) and call.collective is not None


def average(call: Call) -> Any:
    """Raise on every rank."""
    collective, request = call.collective, failed_request(RuntimeError(_words()), call.options)
    assert collective is not None
    with outside(), session_of(collective).entered(call.who):
        return carry_out(request, collective)


def start(call: Call) -> Handle[Any]:
    """Raise on every rank, when it is waited for."""
    collective, request = call.collective, failed_request(RuntimeError(_words()), call.options)
    assert collective is not None
    return depart(call.who, request, collective, inside=outside, keep=call.keep)


def _words() -> str:
    return (
        f"this is run under {recorder()}, which would leave an average out of what it records, or has no values to "
        f"average. Average outside of it"
    )


def recorder() -> str:
    """Return what records, "" if nothing does. Private to torch; tested with release 2.13."""
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return ""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._len_torch_dispatch_stack():
        stack = sys.modules["torch.utils._python_dispatch"]._get_current_dispatch_mode_stack()
        found = [MODES[type(mode).__name__] for mode in stack if type(mode).__name__ in MODES]
        if found:
            return found[-1]
    if torch._C._are_functorch_transforms_active():
        functorch = torch._C._functorch
        levels = functorch.get_interpreter_stack() or ()
        if any(level.key() == functorch.TransformType.Functionalize for level in levels):
            return "torch.func.functionalize"
    return ""

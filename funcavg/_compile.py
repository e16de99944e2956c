"""What torch's compiler, recorders and transforms must not look into."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

__all__ = ["not_compiled", "outside"]

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function, without importing torch before its user has.

    It breaks its graph there, and runs the function as it is.
    """
    as_it_is: list[Callable[P, R]] = []

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return fn(*args, **kwargs)
        if not as_it_is:
            compiler: Any = sys.modules["torch"].compiler
            as_it_is.append(compiler.disable(fn))
        return as_it_is[0](*args, **kwargs)

    return call


@contextmanager
def outside() -> Iterator[None]:
    """Let torch do what follows, and neither record nor transform it: ranks tell each other by tensors, too.

    Private to torch; tested with release 2.13.
    """
    torch: Any = sys.modules["torch"]
    state = torch._C._get_tracing_state()
    is_transformed = torch._C._are_functorch_transforms_active()
    if state is None and not is_transformed and not torch._C._len_torch_dispatch_stack():
        yield
        return
    torch._C._set_tracing_state(None)
    try:
        with ExitStack() as without:
            without.enter_context(sys.modules["torch.utils._python_dispatch"]._disable_current_modes())
            if is_transformed:
                functorch: Any = sys.modules["torch._functorch.pyfunctorch"]
                without.enter_context(functorch.temporarily_clear_interpreter_stack())
            yield
    finally:
        torch._C._set_tracing_state(state)

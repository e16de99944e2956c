"""torch.compile: calls that it must not look into. It breaks its graph there, and runs them as they are."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["not_compiled"]

P = ParamSpec("P")
R = TypeVar("R")


def not_compiled(fn: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out of a function, without importing torch before its user has."""
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

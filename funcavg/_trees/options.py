"""What a call asks for, beside its tree and its group: one value, checked once, and handed on whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Options", "Where"]

Where = Callable[[tuple[Any, ...]], Any]
TIMEOUT = 300.0  # seconds
LONGEST = 1e7  # seconds; clocks take no more than some 1e9


@dataclass(frozen=True)
class Options:
    """The options of `funcavg.average`.

    Mistakes in the weight or in ``where`` are found where the tree is described, for they are every rank's business.
    """

    weight: Any = None  # a number; of stacked replicas one for each; while JAX traces, maybe a tracer
    where: Where | None = None
    donate: bool = False
    timeout: float | None = None

    def checked(self, who: str) -> Options:
        """Raise what is wrong with the timeout, on this rank: there is no telling how long the others would wait."""
        timeout = self.timeout
        if timeout is None:
            return self
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise TypeError(f"{who}: timeout must be a number of seconds or None, got {timeout!r}")
        if not 0 < timeout <= LONGEST:
            raise ValueError(f"{who}: timeout must be positive and at most {LONGEST:g} seconds, got {timeout!r}")
        return replace(self, timeout=float(timeout))

    @property
    def seconds(self) -> float:
        """How long to wait for other ranks."""
        return TIMEOUT if self.timeout is None else self.timeout

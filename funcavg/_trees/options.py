"""What a call asks for, beside its tree and its group: one value, checked once, and handed on whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from numbers import Real
from typing import Any

__all__ = ["Options", "Timeout", "Where", "checked_timeout"]

Where = Callable[[tuple[Any, ...]], Any]
Timeout = float | timedelta | None  # seconds
TIMEOUT = 300.0  # seconds
LONGEST = 1e7  # seconds; clocks take no more than some 1e9


@dataclass(frozen=True)
class Options:
    """The options of `funcavg.average`, `funcavg.broadcast` and `funcavg.differences`.

    Mistakes in the weight, the wire, the root or ``where`` are found where the tree is described, for they are every
    rank's business.
    """

    weight: Any = None  # a number; of stacked replicas one for each; while JAX traces, maybe a tracer
    where: Where | None = None
    donate: bool = False
    timeout: Any = None  # a float or None, once checked
    purpose: str = "average"  # or the name of another function, whose options these are
    root: Any = None  # the rank whose values all get
    about: str = ""  # more of what all ranks must be about to do
    wire: Any = None  # how numbers are written between hosts: a name, or a user's codec
    aside: bool = False  # leaves of an accelerator go by way of the host, too, so that they can in the background

    @property
    def exactly(self) -> bool:
        """Whether leaves are carried or compared bit for bit, so that those of every dtype take part."""
        return self.purpose != "average"

    @property
    def line(self) -> str:
        """What all ranks must have asked for."""
        if self.root is not None:
            return f"{self.purpose} from rank {self.root}"
        if self.exactly:
            return self.purpose
        weight = "without weight" if self.weight is None else "with a weight"
        return f"{weight}, {self.about}" if self.about else weight

    @property
    def wire_name(self) -> str:
        """What the wire is called."""
        return str(getattr(self.wire, "name", self.wire))

    def checked(self, who: str) -> Options:
        """Raise what is wrong with the timeout, on this rank: there is no telling how long the others would wait."""
        return replace(self, timeout=checked_timeout(self.timeout, who))

    def seconds(self, collective: Any) -> float:
        """How long to wait for other ranks: as said, else as the group has been told, else 300 seconds."""
        if self.timeout is not None:
            return float(self.timeout)
        own = getattr(collective, "default_timeout", None)
        return TIMEOUT if own is None else float(own)


def checked_timeout(timeout: Any, who: str) -> float | None:
    """Return a timeout in seconds, None if there is none; or raise what is wrong with it."""
    if timeout is None:
        return None
    seconds: Any = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, Real):
        raise TypeError(
            f"{who}: timeout must be a number of seconds, a timedelta or None, got {timeout!r} of type "
            f"{type(timeout).__name__}"
        )
    try:
        number = float(seconds)
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not 0 < number <= LONGEST:
        raise ValueError(f"{who}: timeout must be positive and at most {LONGEST:g} seconds, got {timeout!r}")
    return number

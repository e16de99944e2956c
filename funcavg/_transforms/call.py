"""One call of `funcavg.average` or `funcavg.start_average`, before it is known who carries it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from funcavg._engine import Handle, session_of
from funcavg._trees import Flat, Options, Request, failed_request, flatten, make_request
from funcavg.collectives import Collective, as_collective

__all__ = ["Call"]


@dataclass(frozen=True, eq=False)
class Call:
    """What a user has passed. The tree is taken apart when first asked for, and once."""

    who: str  # "average" or "start_average", for errors
    tree: Any
    group: Any
    options: Options
    keep: Callable[[Handle[Any]], None] | None = None  # gets a handle before anything is under way

    @cached_property
    def collective(self) -> Collective | None:
        """Who takes part, if the group is one of processes or threads; None on a rank that is not in it."""
        collective = as_collective(self.group)
        if collective is not None:
            session_of(collective)  # raises if it cannot be remembered
        return collective

    @cached_property
    def walked(self) -> Flat | Exception:
        """The tree, taken apart, or what a container has raised that cannot be walked."""
        try:
            return flatten(self.tree)
        except Exception as mistake:
            return mistake

    @property
    def flat(self) -> Flat:
        """The tree, taken apart; raises if it cannot be."""
        if isinstance(self.walked, Exception):
            raise self.walked
        return self.walked

    def refuse_wire(self, why: str) -> None:
        """Raise if this call has a wire, where nothing can be encoded."""
        if self.options.wire is not None:
            raise ValueError(f"{self.who}: wire={self.options.wire!r} {why}")

    def concerns(self, is_of_its_kind: Callable[..., bool], *more: Any) -> bool:
        """Say whether an average over a group is of a kind, by its leaves.

        A tree that cannot be walked goes the plain way, where all ranks hear of it.
        """
        if self.collective is None or isinstance(self.walked, Exception):
            return False
        return is_of_its_kind(self.walked.leaves, *more)

    def request(self, *, wrapped: bool = False) -> Request:
        """Describe the tree, or what is wrong with it, for ranks to agree about; see `make_request`."""
        if isinstance(self.walked, Exception):
            return failed_request(self.walked, self.options)
        return make_request(self.walked, self.options, wrapped=wrapped)

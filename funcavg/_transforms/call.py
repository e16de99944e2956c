"""One call of `funcavg.average` or `funcavg.start_average`, before it is known who carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

    @cached_property
    def collective(self) -> Collective | None:
        """Who takes part, if the group is one of processes or threads; None on a rank that is not in it."""
        return as_collective(self.group)

    @cached_property
    def flat(self) -> Flat:
        """The tree, taken apart; raises if a container cannot be walked."""
        return flatten(self.tree)

    @cached_property
    def leaves(self) -> Sequence[Any]:
        """All leaves; none if a container cannot be walked."""
        try:
            return self.flat.leaves
        except Exception:
            return ()

    def request(self, *, wrapped: bool = False) -> Request:
        """Describe the tree, or what is wrong with it, for ranks to agree about; see `make_request`."""
        try:
            flat = self.flat
        except Exception as mistake:
            return failed_request(mistake, self.options)
        return make_request(flat, self.options, wrapped=wrapped)

"""Trees of one process, each compared to the first: structure, ties, and the leaves that are not averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from funcavg._errors import FuncavgError, TreeMismatchError
from funcavg._trees.arrays import private_copy, same_values
from funcavg._trees.claim import Claim, find_differences, listed
from funcavg._trees.containers import Flat
from funcavg._trees.options import Options
from funcavg._trees.request import Request, make_request

__all__ = ["Compared"]


class Compared:
    """What is known of trees that come one after another. Of the first its leaves that are not averaged are kept."""

    def __init__(self, who: str, options: Options) -> None:
        self.same_ties = True
        self._lost: dict[int, int] = {}  # leaves that are not averaged -> the first tree that has other values
        self._who, self._options = who, options
        self._count = 0
        self._claim = Claim(b"", (), b"", b"")  # of the first tree
        self._kept: dict[int, Any] = {}

    def admit(self, flat: Flat) -> Request:
        """Describe the next tree, or raise what is wrong with it."""
        request = make_request(flat, self._options)
        position, mistake = self._count, request.claim.error
        if mistake is not None:
            kind = type(mistake) if type(mistake) in (TypeError, ValueError, RuntimeError) else FuncavgError
            raise kind(f"{self._who}: tree {position}: {mistake}") from mistake
        if not position:
            self._claim, self._kept = request.claim, _not_averaged(request)
        else:
            self._compare(request)
        self._count += 1
        return request

    def _compare(self, request: Request) -> None:
        position, claim = self._count, request.claim
        if claim.signature != self._claim.signature:
            differences = find_differences(self._claim.lines, claim.lines, "tree 0", f"tree {position}")
            raise TreeMismatchError(
                f"{self._who}: tree {position} does not match the first.\n{listed(differences)}\nAll trees must have "
                f"the same paths, shapes, dtypes and order. The inputs are unchanged."
            )
        self.same_ties = self.same_ties and claim.ties == self._claim.ties
        for i, kept in self._kept.items():
            if not same_values(kept, request.flat.leaves[i]):
                self._lost.setdefault(i, position)

    @property
    def lost(self) -> list[str]:
        """What other trees hold in leaves that are not averaged, and is not part of the result."""
        lines = {i: self._claim.lines[1 + i].replace(": not averaged", ": where refuses it") for i in self._lost}
        return [f"{line}, in tree {self._lost[i]}" for i, line in lines.items()]

    def rebuild(self, base: Request, means: Sequence[Any]) -> Any:
        """Return the first tree around means."""
        assert base.layout is not None
        everything = self._kept | dict(zip(base.layout.averaged, means, strict=True))
        return base.flat.rebuild([everything[i] for i in range(len(everything))])


def _not_averaged(request: Request) -> dict[int, Any]:
    """Return the leaves that are not averaged, as nobody else can change them; one object at several places as one."""
    assert request.layout is not None
    averaged, leaves = set(request.layout.averaged), request.flat.leaves
    others = [i for i in range(len(leaves)) if i not in averaged]
    copies = {key: private_copy(leaf) for key, leaf in {id(leaves[i]): leaves[i] for i in others}.items()}
    return {i: copies[id(leaves[i])] for i in others}

"""Several requests of one process, and nobody to agree with: the means of their leaves, from all at once or in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from funcavg._device import device_memory
from funcavg._engine.agree import Agreement
from funcavg._engine.buckets import host_memory
from funcavg._engine.engine import move
from funcavg._engine.mean import Sums, mean_into, scaled, tensor_mean_into
from funcavg._trees import Layout, Leaf, Request
from funcavg.collectives.solo import Solo

__all__ = ["InTurn", "means_of"]


def means_of(requests: Sequence[Request], weights: Sequence[float] | None, *, same_ties: bool) -> list[Any]:
    """Return the means of the requests' leaves, of the kinds that the first has."""
    chosen = [k for k in range(len(requests)) if weights is None or weights[k]]
    numbers = None if weights is None else [weights[k] for k in chosen]
    columns = [requests[k].leaves for k in chosen]
    scales = [1.0] * len(chosen) if numbers is None else scaled(numbers)

    def write(i: int, leaf: Leaf, out: Any) -> None:
        pairs = list(zip(chosen, columns, strict=True))
        if len(pairs) > 2 and not all(_lies_in_order(requests[k], i, column[i]) for k, column in pairs):
            sums = Sums(str(leaf.element), on_device=bool(leaf.device))  # else all would be copied at once
            for (k, column), scale in zip(pairs, scales, strict=True):
                sums.add(_row(requests[k], i, column[i], leaf), scale)
            sums.mean_into(out, sum(scales))
            return
        rows = [_row(requests[k], i, column[i], leaf) for k, column in pairs]
        if leaf.device:
            tensor_mean_into(out, rows, numbers)
        else:
            mean_into(out, rows, numbers, str(leaf.element))

    return move(requests[0], Agreement(None, same_ties), _Written(write))


class InTurn:
    """The sums of requests that come one after another, and may be gone when the next one comes."""

    def __init__(self, weights: Sequence[float] | None) -> None:
        self._weights, self._scales = weights, scaled(weights) if weights else None
        self._count = 0
        self._base: Request | None = None
        self._ties: Mapping[int, int] = {}
        self._sums: dict[int, Sums] = {}

    def add(self, request: Request, *, same_ties: bool) -> None:
        """Add the leaves of a request. Once ``same_ties`` is False, it remains so."""
        if self._base is None:
            self._base, self._ties = _blank(request), request.ties
        if self._ties and not same_ties:  # from now on each goes its own way
            self._sums |= {i: copy.deepcopy(self._sums[j]) for i, j in self._ties.items() if j in self._sums}
            self._ties = {}
        weight = self._weights[self._count] if self._weights else 1.0
        scale = self._scales[self._count] if self._scales else 1.0
        self._count += 1
        if not weight:  # a scale may be 0, too small to be told from it
            return
        layout = self._base.layout
        assert layout is not None
        for i, (leaf, value) in enumerate(zip(layout.leaves, request.leaves, strict=True)):
            if i not in self._ties and 0 not in leaf.shape:
                if i not in self._sums:
                    self._sums[i] = Sums(str(leaf.element), on_device=bool(leaf.device))
                self._sums[i].add(_row(request, i, value, leaf), scale)

    def means(self, *, same_ties: bool) -> tuple[Request, list[Any]]:
        """Return the first request, as far as it is still known, and the means of its leaves."""
        assert self._base is not None
        options = replace(self._base.options, donate=same_ties)  # blank memory, which a GPU has given
        base = self._base._replace(options=options)
        norm = sum(self._scales) if self._scales else float(self._count)

        def write(i: int, _: Leaf, out: Any) -> None:
            self._sums.pop(i).mean_into(out, norm)

        return base, move(base, Agreement(None, same_ties), _Written(write))


def _blank(request: Request) -> Request:
    """Return a request whose averaged leaves are of the same kinds, in memory that nobody has touched yet."""
    blanks = move(request, Agreement(None, True), _Written(lambda *_: None))
    assert request.layout is not None
    leaves = [None] * len(request.flat.leaves)
    for i, blank in zip(request.layout.averaged, blanks, strict=True):
        leaves[i] = blank
    return request._replace(flat=request.flat._replace(leaves=leaves))


def _lies_in_order(request: Request, i: int, value: Any) -> bool:
    """Say whether a leaf can be read where it lies."""
    assert request.layout is not None
    family = request.layout.families[i]
    return family.as_bytes(family.carrier(value)) is not None


def _row(request: Request, i: int, value: Any, like: Leaf) -> Any:
    """Return the elements of a leaf in order, where ``like`` lies: bytes, or a tensor on an accelerator."""
    assert request.layout is not None
    family, leaf = request.layout.families[i], request.layout.leaves[i]
    carrier = family.carrier(value)
    row = family.as_bytes(carrier)
    if row is None:
        row, window = _memory(family, leaf)
        family.copy([window], [carrier])
    if leaf.device != like.device:
        import torch

        row = (row if leaf.device else torch.from_numpy(row)).to(like.device or "cpu")
        row = row if like.device else row.numpy()
    return row.view(like.native) if like.device else row


def _memory(family: Any, leaf: Leaf) -> tuple[Any, Any]:
    """Return fresh bytes for a leaf where it lies, and a window on them."""
    allocate = partial(device_memory, leaf.device) if leaf.device else host_memory
    memory = allocate(prod(leaf.shape) * leaf.native.itemsize)
    return memory, family.window(memory, leaf.native, leaf.shape)


class _Written(Solo):
    """A process alone, whose results are written leaf by leaf: ``write(number, leaf, memory)``."""

    def __init__(self, write: Callable[[int, Leaf, Any], None]) -> None:
        self._write = write

    def fill(self, layout: Layout, carriers: Sequence[Any], results: Sequence[Any], ties: Mapping[int, int]) -> None:
        """Let the result of every leaf be written that is not tied to another."""
        for i, (family, leaf) in enumerate(zip(layout.families, layout.leaves, strict=True)):
            if i in ties or 0 in leaf.shape:
                continue
            memory, window = family.as_bytes(results[i]), None
            if memory is None:  # on a device, or not in order
                memory, window = _memory(family, leaf)
            self._write(i, leaf, memory.view(leaf.native) if leaf.device else memory)
            if window is not None:
                family.copy([results[i]], [window])

"""Average as a function that torch can transform: grad, vjp, jvp, vmap and their compositions.

The mean is linear, so each rule is another average:

    jvp     the tangents' (weighted) mean
    vjp     the cotangents' plain mean, times N w_i / sum(w)
    vmap    the mean of the batched leaves

The convention is that the loss is the sum over ranks. Every rank must take the same derivatives.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from funcavg._engine import Handle, move, reach_agreement, same_configuration, session_of
from funcavg._transforms.call import Call
from funcavg._trees import Request, is_dtensor, make_request, wrap_local_tensor
from funcavg.collectives import Collective

__all__ = ["average", "is_inside_transform", "is_transformed", "start", "takes"]


def takes(call: Call) -> bool:
    """Take calls that torch is to transform or differentiate."""
    return call.concerns(is_transformed)


def start(call: Call) -> Handle[Any]:
    """Refuse: torch's transforms and its graph know of no result that comes later."""
    raise RuntimeError(
        f"{call.who}: not under torch.func transforms, nor for leaves that require grad while gradients are "
        f"recorded. Call it under torch.no_grad(), or use average."
    )


def is_transformed(everything: Sequence[Any]) -> bool:
    """Say whether torch would want to know what happens to these leaves."""
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    if is_inside_transform():
        return any(isinstance(leaf, torch.Tensor) for leaf in everything)
    if not torch.is_grad_enabled():
        return False
    kinds = set(map(type, everything))
    tensors = {kind for kind in kinds if issubclass(kind, torch.Tensor)}
    if tensors != kinds:
        everything = [leaf for leaf in everything if type(leaf) in tensors]
    return any(map(attrgetter("requires_grad"), everything))


def is_inside_transform() -> bool:
    """Say whether torch.func transforms what is run, or torch takes tangents along."""
    torch = sys.modules.get("torch")
    return torch is not None and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def average(call: Call) -> Any:
    """Average a tree, as an operation that torch can differentiate and vectorise."""
    import torch

    collective = call.collective
    assert collective is not None
    probe, everything = call.request(wrapped=True), call.flat.leaves
    refusal = _refusal(call)
    if refusal is not None and probe.claim.error is None:
        probe = probe._replace(claim=probe.claim._replace(error=refusal))
    if probe.layout is None or probe.claim.error is not None:
        with session_of(collective).entered(call.who):
            reach_agreement(probe, collective)  # raises it on every rank
        raise AssertionError("ranks agreed on a mistake")
    positions = [i for i in probe.layout.averaged if isinstance(everything[i], torch.Tensor)]
    # A DTensor goes through torch's rules as its local shard, and into the request as itself.
    dtensors = {i: everything[i] for i in positions if is_dtensor(everything[i])}
    tensors = [everything[i].to_local() if i in dtensors else everything[i] for i in positions]
    kept = probe._replace(options=dataclasses.replace(call.options, where=None))  # a graph may live for long
    step = _Step(kept, positions, dtensors, collective, _kinds(tensors))
    outputs = _average_function().apply(step, *tensors) if positions else step.run(())
    results = list(everything)
    for i, output in zip(positions, outputs, strict=True):
        results[i] = wrap_local_tensor(dtensors[i], output) if i in dtensors else output
    for i, other in step.others.items():
        results[i] = other
    return call.flat.rebuild(results)


def _refusal(call: Call) -> Exception | None:
    """Return what is wrong with a call here that would be fine elsewhere."""
    import torch

    if call.options.donate:
        return ValueError(
            "donate=True under torch.func transforms, or where gradients are recorded. Pass donate=False."
        )
    if call.options.wire is not None:
        return ValueError(
            f"wire={call.options.wire!r} under torch.func transforms, or where gradients are recorded: a code has no "
            f"derivative. Average under torch.no_grad(), or without a wire."
        )
    several_threads = getattr(call.collective, "is_of_threads", False) and getattr(call.collective, "size", 1) > 1
    if several_threads and torch.autograd.forward_ad._current_level >= 0:
        return RuntimeError(
            "forward mode (jvp, jacfwd, hessian) over ranks that are threads: torch has one level of tangents for all "
            "of a process, and would mix up those of the ranks. Run ranks as processes, or take vjp and jacrev."
        )
    return None


def _kinds(tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]


@dataclass(eq=False)
class _Step:
    """One average of the tensors at some positions of a tree; its derivatives are averages at the same positions."""

    request: Request  # the tree, and which leaves of it are averaged: `positions`, and those of other kinds
    positions: Sequence[int]  # of tensors that torch's rules see
    dtensors: Mapping[int, Any]
    collective: Collective
    described: list[tuple[Any, ...]] | None  # the kinds of tensors that the request's layout describes
    others: dict[int, Any] = field(default_factory=dict)  # results at the other positions, once run
    scale: float = 1.0  # N w / sum(w), once run
    over: Any = None  # the group's configuration, once run

    def derived(self, *, weighted: bool) -> _Step:
        """Return the average of tangents or cotangents: of the tensors only."""
        options = self.request.options if weighted else dataclasses.replace(self.request.options, weight=None)
        request = self.request._replace(only=frozenset(self.positions), options=options)
        return dataclasses.replace(self, request=request, described=None, others={}, scale=1.0)

    def run(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Average now."""
        leaves = list(self.request.flat.leaves)
        for i, tensor in zip(self.positions, tensors, strict=True):
            local = tensor.detach()
            leaves[i] = wrap_local_tensor(self.dtensors[i].detach(), local) if i in self.dtensors else local
        flat = self.request.flat._replace(leaves=leaves)
        if _kinds(tensors) == self.described:
            request = self.request._replace(flat=flat)
        else:  # batched by vmap, or of a derivative
            only = self.request.only
            request = make_request(flat, self.request.options, only=only, wrapped=True)
        session = session_of(self.collective)
        with session.entered("average"):
            same_configuration(self.over, session)
            agreement = reach_agreement(request, self.collective)
            self.over = same_configuration(self.over, session)  # which ranks may just have found to be new
            results = move(request, agreement, self.collective)
            rank, size = self.collective.rank, self.collective.size
        assert request.layout is not None
        by_position = dict(zip(request.layout.averaged, results, strict=True))
        if agreement.weights is not None:
            top = max(agreement.weights)
            total = sum(weight / top for weight in agreement.weights)
            self.scale = size * (agreement.weights[rank] / top) / total
        averaged = [by_position.pop(i) for i in self.positions]
        self.others = by_position
        return tuple(a.to_local() if i in self.dtensors else a for i, a in zip(self.positions, averaged, strict=True))


@functools.cache
def _average_function() -> Any:
    import torch

    def apply(step: _Step, tensors: Sequence[Any]) -> Any:
        return Average.apply(step, *tensors)  # type: ignore[no-untyped-call]  # torch's stub has no types

    class Average(torch.autograd.Function):
        @staticmethod
        def forward(step: _Step, *tensors: Any) -> Any:
            with torch.no_grad():
                return step.run(tensors)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.step = inputs[0]
            ctx.shapes = [(out.shape, out.dtype, out.device) for out in output]

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> Any:
            means = apply(ctx.step.derived(weighted=False), _materialised(ctx, cotangents))
            scale = ctx.step.scale
            if scale == 0.0:  # 0 * nan would be nan; masked, it stays in the graph, so that this rank takes part in
                # the averages of higher derivatives
                return None, *(mean.masked_fill(torch.ones_like(mean, dtype=torch.bool), 0.0) for mean in means)
            return None, *(mean if scale == 1.0 else mean * scale for mean in means)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            return apply(ctx.step.derived(weighted=True), _materialised(ctx, tangents))

        @staticmethod
        def vmap(info: Any, in_dims: Any, step: _Step, *tensors: Any) -> Any:
            # The batch goes first, so that ranks which batch along different dimensions send the same shapes.
            moved = [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, in_dims[1:], strict=True)]
            return apply(step, moved), tuple(None if dim is None else 0 for dim in in_dims[1:])

    def _materialised(ctx: Any, values: Any) -> list[Any]:
        rows = zip(values, ctx.shapes, strict=True)
        return [torch.zeros(s, dtype=d, device=v) if value is None else value for value, (s, d, v) in rows]

    return Average

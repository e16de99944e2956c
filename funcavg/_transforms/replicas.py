"""Replicas that one process holds, stacked along an axis: the ranks of a simulation."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from funcavg._device import device_memory
from funcavg._engine import Handle, host_memory, mean_into, move, reach_agreement, tensor_mean_into
from funcavg._transforms import axis as over_axis
from funcavg._transforms.call import Call
from funcavg._transforms.jax import is_traced
from funcavg._transforms.torch import is_transformed
from funcavg._trees import Layout, Options, check_weight, is_dtensor, make_request
from funcavg.collectives.solo import Solo

__all__ = ["Stacked", "average", "stacked", "start", "takes"]

AXIS_NAME = "funcavg.stacked"


@dataclass(frozen=True)
class Stacked(Solo):
    """A group of replicas, stacked along an axis. Made by `funcavg.stacked`."""

    axis: int


def stacked(axis: int = 0) -> Stacked:
    r"""Return a group whose ranks are replicas stacked along an axis of every leaf, all in this process.

    It is for simulations: local SGD of ``N`` replicas on one device, trained side by side by ``torch.func.vmap`` or
    ``jax.vmap``, without a launcher. ``torch.func.stack_module_state`` makes such trees. `funcavg.average` then returns
    a tree of the same shapes, in which every replica is the mean of all; there is nothing to communicate.

    ``weight`` is a sequence or vector with one number for each replica. Numbers in the tree belong to all replicas, and
    pass through. Outside of transforms the means have the bits that as many ranks would get; inside of them torch sums
    in float64, and JAX in float32, as over an axis name. Nothing travels, so there is no ``wire``: what one does to a
    mean is seen over threads, with `funcavg.testing.run_ranks`.

    Args:
        axis: Where the replicas are, counted from the end if negative.

    Returns:
        A group for `funcavg.average`.

    Raises:
        TypeError: If ``axis`` is no integer. From `funcavg.average`, if a leaf or a weight is of no use.
        ValueError: From `funcavg.average`, if leaves have no such axis, or different numbers of replicas along it.

    Examples:
        Two replicas take a step each, on data of their own, and meet:

        >>> import torch
        >>> from funcavg import average, stacked
        >>> params = {"w": torch.tensor([[1.0, 2.0], [1.0, 2.0]])}
        >>> data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> grads = torch.func.vmap(torch.func.grad(lambda params, x: (params["w"] * x).sum()))(params, data)
        >>> params = {name: params[name] - grads[name] for name in params}
        >>> params["w"]
        tensor([[0., 2.],
                [1., 0.]])
        >>> average(params, stacked())["w"]
        tensor([[0.5000, 1.0000],
                [0.5000, 1.0000]])
    """
    try:
        if isinstance(axis, bool):
            raise TypeError
        return Stacked(operator.index(axis))
    except TypeError:
        raise TypeError(f"stacked: axis must be an integer, got {axis!r} of type {type(axis).__name__}") from None


def takes(call: Call) -> bool:
    """Take calls over stacked replicas."""
    return isinstance(call.group, Stacked)


def start(call: Call) -> Handle[Any]:
    """Average at once: there is nobody to wait for."""
    return Handle(average(call))


def average(call: Call) -> Any:
    """Return the tree with every replica replaced by the mean over the replicas."""
    call.refuse_wire(
        "over stacked replicas: nothing of them travels. Leave wire out; to see what a wire does to a mean, average "
        "over threads, with funcavg.testing.run_ranks."
    )
    everything, weight = call.flat.leaves, call.options.weight
    traced, transformed = is_traced(everything, weight), is_transformed(everything)
    options = replace(call.options, weight=None, donate=call.options.donate and not transformed)
    request = make_request(call.flat, options, wrapped=traced or transformed)
    alone = Solo()
    agreement = reach_agreement(request, alone)  # raises mistakes in the tree
    if call.options.donate and transformed:
        raise ValueError("average: donate=True under torch.func transforms, or where gradients are recorded.")
    layout = request.layout
    assert layout is not None
    axes, size = _axes(layout, everything, call.group.axis)
    weights = weight if weight is None or is_traced((), weight) else _weights(weight, size)
    results = list(everything)
    for_kernel, by_rule = [], False
    for i, axis in axes.items():
        kind = type(everything[i]).__module__.partition(".")[0]
        if traced and kind in ("jax", "jaxlib"):
            results[i], by_rule = _jax_mean(everything[i], axis, weights), True
        elif is_traced((), weight):
            raise TypeError(f"average: a traced weight is for JAX leaves, and {layout.lines[i]} is none")
        elif transformed and kind == "torch":
            results[i], by_rule = _torch_mean(everything[i], axis, weights), True
        else:
            for_kernel.append(i)
    if for_kernel:
        if by_rule:
            request = make_request(call.flat, options, only=frozenset(for_kernel), wrapped=True)
            layout = request.layout
            assert layout is not None
        means = move(request, agreement, _Kernel([axes.get(i) for i in layout.averaged], weights))
        for i, mean in zip(layout.averaged, means, strict=True):
            results[i] = mean
    return call.flat.rebuild(results)


def _axes(layout: Layout, everything: Sequence[Any], axis: int) -> tuple[dict[int, int], int]:
    """Return the axis of each averaged leaf, counted from the front, and the number of replicas; check that it is one.

    Numbers have no axis, and are left out.
    """
    axes: dict[int, int] = {}
    sizes: dict[int, int] = {}  # and the first leaf of each
    for i in layout.averaged:
        leaf = everything[i]
        if isinstance(leaf, (float, complex)):
            continue
        if is_dtensor(leaf):
            raise TypeError(f"average: stacked replicas cannot be a DTensor, which {layout.lines[i]} is")
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"average: group is stacked(axis={axis}), but {layout.lines[i]} has no such axis. Stack the replicas' "
                f"leaves, or leave this one out with where=."
            )
        axes[i] = axis % leaf.ndim
        sizes.setdefault(leaf.shape[axis], i)
    if len(sizes) > 1:
        found = ", ".join(f"{size} in {layout.lines[i]}" for size, i in sizes.items())
        raise ValueError(
            f"average: group is stacked(axis={axis}), but leaves hold different numbers of replicas: {found}."
        )
    return axes, next(iter(sizes), 0)


def _weights(weight: Any, size: int) -> list[float]:
    try:
        numbers = [check_weight(number) for number in weight]
    except TypeError as error:
        raise TypeError(
            f"average: over stacked replicas, weight must be a sequence with one number for each, got {weight!r}"
        ) from error
    except ValueError as error:
        raise ValueError(f"average: {error}") from None
    if len(numbers) != size:
        raise ValueError(f"average: weight has {len(numbers)} numbers for {size} stacked replicas")
    if not any(numbers):
        raise ValueError(f"average: the weights of all {size} stacked replicas are 0.")
    return numbers


class _Kernel(Solo):
    """A process alone, whose leaves are rows for the kernel."""

    def __init__(self, axes: Sequence[int | None], weights: Sequence[float] | None) -> None:
        self._axes, self._weights = axes, weights  # no axis: a number, which belongs to all replicas

    def fill(self, layout: Layout, carriers: Sequence[Any], results: Sequence[Any], ties: Mapping[int, int]) -> None:
        """Write the means of ``carriers`` over their axes into ``results``."""
        for i, (axis, family, leaf) in enumerate(zip(self._axes, layout.families, layout.leaves, strict=True)):
            if i in ties or not math.prod(leaf.shape):
                continue
            if axis is None:
                family.copy([results[i]], [carriers[i]])
                continue
            places = [(*(slice(None),) * axis, replica, ...) for replica in range(leaf.shape[axis])]
            shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
            allocate = partial(device_memory, leaf.device) if leaf.device else host_memory
            rows = family.as_bytes(carriers[i]) if axis == 0 else None
            if rows is None:  # not row by row in the leaf's own memory
                rows = allocate(math.prod(leaf.shape) * leaf.native.itemsize)
                windows = family.window(rows, leaf.native, (len(places), *shape))
                family.copy(
                    [windows[replica, ...] for replica in range(len(places))], [carriers[i][place] for place in places]
                )
            rows = rows.reshape(len(places), -1)
            mean = allocate(rows.shape[1])
            if leaf.device:
                tensor_mean_into(mean.view(leaf.native), list(rows.view(leaf.native)), self._weights)
            else:
                mean_into(mean, list(rows), self._weights, str(leaf.element))
            whole = family.as_bytes(results[i]) if axis == 0 else None
            if whole is None:
                window = family.window(mean, leaf.native, shape)
                family.copy([results[i][place] for place in places], [window] * len(places))
            else:
                whole.reshape(rows.shape)[...] = mean
                family.written([results[i]])


def _torch_mean(leaf: Any, axis: int, weights: Sequence[float] | None) -> Any:
    """Return the mean as an expression that torch can transform."""
    import torch

    wide = torch.complex128 if leaf.is_complex() else torch.float64
    rows = leaf.unbind(axis)
    if not rows:
        return leaf.clone()
    weights = weights or [1.0] * len(rows)
    scaled = [weight / max(weights) for weight in weights]
    shares = [weight / sum(scaled) for weight in scaled]
    mean = sum(row.to(wide) * share for row, share in zip(rows, shares, strict=True) if share).to(leaf.dtype)
    return torch.stack([mean] * len(rows), axis)


def _jax_mean(leaf: Any, axis: int, weights: Any) -> Any:
    """Return the mean as JAX's own collectives compute it, over an axis that has a name."""
    import jax

    if isinstance(weights, list):  # lest they overflow in float32
        weights = jax.numpy.asarray([weight / max(weights) for weight in weights], float)
    return jax.vmap(
        lambda row, weight: over_axis.average(Call("average", row, AXIS_NAME, Options(weight=weight))),
        in_axes=(axis, None if weights is None else 0),
        out_axes=axis,
        axis_name=AXIS_NAME,
    )(leaf, weights)

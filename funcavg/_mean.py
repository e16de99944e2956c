"""The mean of several trees of one process: as `average` over as many ranks, without a group."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from funcavg._compile import not_compiled
from funcavg._engine import InTurn, means_of
from funcavg._transforms import obstacle_to
from funcavg._trees import Compared, Flat, Options, Where, check_weight, flatten, listed

__all__ = ["mean"]

T = TypeVar("T")


@not_compiled
def mean(trees: Iterable[T], weights: Iterable[float] | None = None, *, where: Where | None = None) -> T:
    r"""Return the mean of several parameter trees of this process, such as checkpoints: there is no group.

    Every floating or complex leaf becomes ``Σ_i w_i x_i / Σ_i w_i`` over trees ``i``, to the bit what `average`
    returns over as many ranks. The inputs are never written to, and the result shares no array's memory with them (JAX
    arrays, which nobody can write to, may be passed through).

    Args:
        trees: A list or tuple of trees, or an iterator that makes them one after another: each is read before the next
            is asked for, so they may lie in the same memory. All have the same paths, shapes and dtypes; the kinds of
            arrays and their devices may differ. What a tree is, `average` says.
        weights: A finite number at least 0 for each tree; ``None`` for the plain mean. Averaged leaves of a tree with
            weight 0 are never read.
        where: Called with the path of each leaf, a tuple of keys and positions; leaves that it refuses are not
            averaged, whatever their type.

    Returns:
        A tree of the containers of the first, key order kept. Each averaged leaf has the framework, dtype, shape,
        device and memory format of the first tree's; leaves that are tied in all trees come back tied.
        ``requires_grad`` and ``nn.Parameter`` are kept, but the result is no part of a graph: gradients do not flow
        through it.

        Leaves that are not averaged, bools, integers, PRNG keys and what ``where`` refuses, are the first tree's; NumPy
        arrays and tensors as copies. Where other trees have other values, a warning says so: integers such as a
        BatchNorm's ``num_batches_tracked`` have no mean.

    Raises:
        TreeMismatchError: If a tree has other paths, shapes, dtypes or order than the first; it names the leaves, and
            the tree by its position, counted from 0.
        TypeError: If ``trees`` is one tree, or a leaf can be neither averaged nor passed through, or a weight is no
            number.
        ValueError: If there is no tree, not one weight for each tree, a weight is negative or not finite, or all are 0.
        RuntimeError: Inside of transforms, ``jax.jit`` or ``torch.func``, and where torch records.

    Warns:
        UserWarning: If leaves that are not averaged differ between trees.

    Memory:
        From a list, that of the result; of more than two trees, also a copy and the sums of one leaf at a time, of
        those that do not lie in one piece. From an iterator, one tree at a time, and sums: 8 bytes for each averaged
        element, and 9 more for one of float64; then, after the last tree has been let go, the result.

    Accuracy:
        As `average`: float64 sums in the order of the trees, rounded once, from a list and from an iterator in the same
        bits. A NaN is a NaN: which, is not said.

    Examples:
        >>> import numpy as np
        >>> import funcavg
        >>> checkpoints = [{"w": np.array([1.0, 2.0]), "step": 7}, {"w": np.array([3.0, 6.0]), "step": 7}]
        >>> funcavg.mean(checkpoints)
        {'w': array([2., 4.]), 'step': 7}
        >>> funcavg.mean((checkpoint for checkpoint in checkpoints), weights=[1, 3])
        {'w': array([2.5, 5. ]), 'step': 7}

    References:
        Vaswani et al., [Attention Is All You Need](https://arxiv.org/abs/1706.03762), NeurIPS 2017, average the last
        checkpoints of a run. Wortsman et al., [Model soups](https://arxiv.org/abs/2203.05482), ICML 2022, average
        models that have been fine-tuned from one.
    """
    _check_trees(trees)
    numbers = None if weights is None else _checked(weights)
    compared = Compared("mean", Options(where=where))
    if isinstance(trees, Sequence):
        _check_count(len(trees), numbers)
        requests = [compared.admit(_flat(tree)) for tree in trees]
        base, means = requests[0], means_of(requests, numbers, same_ties=compared.same_ties)
    else:
        count, sums = 0, InTurn(numbers)
        for tree in trees:
            count += 1
            _check_count(count, numbers, more=True)
            sums.add(compared.admit(_flat(tree)), same_ties=compared.same_ties)
            del tree  # lest this one is held while the next is made
        _check_count(count, numbers)
        base, means = sums.means(same_ties=compared.same_ties)
    if compared.lost:
        _warn(compared.lost)
    return cast("T", compared.rebuild(base, means))


def _check_trees(trees: Any) -> None:
    """Raise TypeError for what is one tree rather than several, or none."""
    cure = ""
    if isinstance(trees, Mapping):
        cure = ", which is a tree itself. Pass a list of trees; trees.values(), if its values are trees"
    elif hasattr(trees, "_fields"):
        cure = ", a NamedTuple, which is a tree itself. Pass a list of trees"
    elif hasattr(trees, "ndim"):
        cure = ", an array. Pass a list of trees; for replicas along an axis of arrays, see funcavg.stacked"
    elif isinstance(trees, (str, bytes)) or not isinstance(trees, Iterable):
        cure = ". Pass a list of trees"
    if cure:
        kind = f"{type(trees).__module__}.{type(trees).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"mean: trees must be a list of trees, or an iterator that makes them, got a {kind}{cure}.")


def _checked(weights: Any) -> list[float]:
    try:
        if isinstance(weights, (Mapping, str, bytes)):
            raise TypeError
        numbers = [check_weight(number) for number in weights]
    except TypeError as error:
        raise TypeError(
            f"mean: weights must be a sequence of numbers, one for each tree, got {repr(weights)[:60]} of "
            f"type {type(weights).__name__}. Pass the trees in one list, mean([one, other])."
        ) from error
    except ValueError as error:
        raise ValueError(f"mean: {error}") from None
    if numbers and not any(numbers):
        raise ValueError(f"mean: the weights of all {len(numbers)} trees are 0.")
    return numbers


def _check_count(count: int, numbers: list[float] | None, *, more: bool = False) -> None:
    """Raise ValueError if there is no tree, or not one for each weight; there may be ``more`` to come."""
    if not count and not more:
        raise ValueError("mean: got no tree, and of none there is no mean.")
    if numbers is not None and (count > len(numbers) or (count < len(numbers) and not more)):
        shown = f"{count} trees{' or more' if more else ''}"
        raise ValueError(f"mean: weights has {len(numbers)} numbers for {shown}. Pass one for each tree.")


def _flat(tree: Any) -> Flat:
    """Take a tree apart, or raise RuntimeError where its values are out of reach."""
    flat = flatten(tree)
    if where := obstacle_to(flat.leaves):
        raise RuntimeError(
            f"mean: not {where}, where it would find no values to read. Call it outside, or write the mean as an "
            f"expression of the framework's own."
        )
    return flat


def _warn(lost: Sequence[str]) -> None:
    """Warn of values that are not part of the result, where the user's own code has called."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("funcavg", "torch"):
        depth, frame = depth + 1, frame.f_back
    many = f"{len(lost)} leaves are" if len(lost) > 1 else "a leaf is"
    warnings.warn(
        f"mean: {many} not averaged, and not the same in all trees; the first tree's are kept.\n{listed(lost)}\n"
        f"Bools, integers and keys have no mean: a count, such as BatchNorm's num_batches_tracked, is one tree's.",
        stacklevel=depth,
    )

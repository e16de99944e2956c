"""Outer optimizers: what `funcavg.diloco` does with the mean pseudo-gradient.

An outer optimizer is a pair of pure functions with the signatures of optax, so that any optax transform is one, too::

    state          = outer.init(anchor)
    updates, state = outer.update(pseudo_gradient, state, anchor)       anchor + updates is the next anchor

The pseudo-gradient is the old anchor minus the workers' mean: like a gradient it points uphill, and the optimizer steps
against it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from funcavg._trees import combine, flatten, is_jax, zeros_like

__all__ = ["MomentumState", "Outer", "as_outer", "nesterov", "sgd"]


class Outer(NamedTuple):
    """An outer optimizer: pure functions ``init(anchor)`` and ``update(pseudo_gradient, state, anchor)``."""

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


class MomentumState(NamedTuple):
    """The state of `sgd` and `nesterov`."""

    momentum: Any  # the anchor's tree, shapes and dtypes; None without momentum


def sgd(lr: float, momentum: float = 0.0) -> Outer:
    r"""Gradient descent with heavy-ball momentum, on any framework's trees.

        u ← μ u + Δ, Θ ← Θ - η u

    With ``lr=1`` and no momentum, an outer step is plain averaging.

    Args:
        lr: The rate ``η``, at least 0; with 0 the anchor stays as it is.
        momentum: ``μ``, at least 0 and less than 1.

    Returns:
        An `Outer`, whose state is a `MomentumState`: ``u``, zeros to begin with.

    Raises:
        TypeError, ValueError: If an argument is no number, or outside its range.

    Communication:
        None.

    Examples:
        >>> import numpy as np
        >>> from funcavg import outer
        >>> optimizer = outer.sgd(lr=0.5, momentum=0.5)
        >>> anchor = {"w": np.array([1.0])}
        >>> state = optimizer.init(anchor)
        >>> for _ in range(3):
        ...     updates, state = optimizer.update({"w": np.array([0.2])}, state, anchor)
        ...     print(updates["w"])
        [-0.1]
        [-0.15]
        [-0.175]

    References:
        torch's ``torch.optim.SGD(lr, momentum)`` and optax's ``optax.sgd(lr, momentum)`` do the same.
    """
    lr, momentum = _settings(lr, momentum)
    return _gradient_descent(lr, momentum, lambda u, _: -lr * u)


def nesterov(lr: float, momentum: float) -> Outer:
    r"""Gradient descent with Nesterov momentum, on any framework's trees.

        u ← μ u + Δ, Θ ← Θ - η (Δ + μ u)

    Args:
        lr: The rate ``η``, at least 0; with 0 the anchor stays as it is.
        momentum: ``μ``, at least 0 and less than 1.

    Returns:
        An `Outer`, whose state is a `MomentumState`: ``u``, zeros to begin with.

    Raises:
        TypeError, ValueError: If an argument is no number, or outside its range.

    Communication:
        None.

    Examples:
        >>> import numpy as np
        >>> from funcavg import outer
        >>> optimizer = outer.nesterov(lr=0.5, momentum=0.5)
        >>> state = optimizer.init({"w": np.array([1.0])})
        >>> optimizer.update({"w": np.array([0.2])}, state)[0]["w"]
        array([-0.15])

    References:
        Sutskever et al., [On the importance of initialization and momentum in deep
        learning](https://proceedings.mlr.press/v28/sutskever13.html), ICML 2013. torch's ``torch.optim.SGD(lr,
        momentum, nesterov=True)`` and optax's ``optax.sgd(lr, momentum, nesterov=True)`` do the same.
    """
    lr, momentum = _settings(lr, momentum)
    return _gradient_descent(lr, momentum, lambda u, delta: -lr * (delta + momentum * u))


def _settings(lr: Any, momentum: Any) -> tuple[float, float]:
    """Return both as Python numbers, or raise what is wrong with them."""
    lr, momentum = _number("lr", lr), _number("momentum", momentum)
    if not 0 <= lr < float("inf"):
        raise ValueError(f"outer: lr must be at least 0 and finite, got {lr!r}")
    if not 0 <= momentum < 1:
        raise ValueError(f"outer: momentum must be at least 0 and less than 1, got {momentum!r}")
    return lr, momentum


def _gradient_descent(lr: float, momentum: float, step: Callable[[Any, Any], Any]) -> Outer:
    """Return an optimizer whose updates are ``step(u, delta)``, with u the momentum and delta the pseudo-gradient."""

    def init(anchor: Any) -> MomentumState:
        return MomentumState(combine(zeros_like, anchor) if momentum else None)

    def update(pseudo_gradient: Any, state: MomentumState, anchor: Any = None) -> tuple[Any, MomentumState]:
        del anchor  # a rule that needs only the direction
        if not momentum:
            return combine(lambda delta: -lr * delta, pseudo_gradient), state
        velocity = combine(lambda u, delta: momentum * u + delta, state.momentum, pseudo_gradient)
        return combine(step, velocity, pseudo_gradient), MomentumState(velocity)

    return Outer(init, update)


def _number(name: str, value: Any) -> float:
    """Return a setting as a Python number; it may be of any kind of real number, or an array of shape ()."""
    dtype = str(getattr(value, "dtype", ""))
    is_array = getattr(value, "shape", None) == () and dtype.removeprefix("torch.").startswith(
        ("float", "bfloat", "int", "uint")
    )
    if isinstance(value, bool) or not (isinstance(value, Real) or is_array):
        raise TypeError(f"outer: {name} must be a number, got {value!r} of type {type(value).__name__}")
    return float(value)


class Stepper(NamedTuple):
    """An outer optimizer that returns the next anchor itself: ``step(pseudo_gradient, state, anchor)``."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def as_outer(outer: Any, who: str = "diloco") -> Stepper:
    """Return how to step with whatever `funcavg.diloco` takes as ``outer``; ``who``: for errors."""
    if hasattr(outer, "init") and hasattr(outer, "update"):

        def init(anchor: Any) -> Any:
            strangers = {type(leaf).__name__ for leaf in flatten(anchor).leaves if not is_jax(leaf)}
            if strangers and not isinstance(outer, Outer):
                raise TypeError(
                    f"{who}: an optax transform as outer is for trees of JAX arrays, got {sorted(strangers)}. (A pair "
                    f"of your own for other leaves is a funcavg.outer.Outer.)"
                )
            return outer.init(anchor)

        def step(pseudo_gradient: Any, state: Any, anchor: Any) -> tuple[Any, Any]:
            updates, state = outer.update(pseudo_gradient, state, anchor)
            return combine(lambda leaf, change: _of_its_dtype(leaf + change, leaf), anchor, updates), state

        return Stepper(init, step)
    if callable(outer):
        return _torch_optimizer(outer, who)
    raise TypeError(
        f"{who}: outer must be of funcavg.outer, an optax transform, or a function from parameters to a torch "
        f"optimizer, such as lambda params: torch.optim.SGD(params, lr=0.7), got {outer!r} of type "
        f"{type(outer).__name__}"
    )


def _of_its_dtype(value: Any, leaf: Any) -> Any:
    """Undo a promotion: an optax schedule, for one, is a float32 array."""
    dtype = getattr(leaf, "dtype", None)
    return value if getattr(value, "dtype", None) == dtype else value.astype(dtype)


def _torch_optimizer(factory: Callable[[Any], Any], who: str) -> Stepper:
    """Step with an optimizer that is made anew each time around copies, its state kept outside."""

    def made(anchor: Any, state: Any) -> tuple[list[Any], Any, Any]:
        torch: Any = sys.modules.get("torch")
        flat = flatten(anchor)
        leaves = flat.leaves
        if torch is None or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            kinds = sorted({type(leaf).__name__ for leaf in leaves})
            raise TypeError(f"{who}: a torch optimizer as outer is for trees of torch tensors, got {kinds}")
        params = [torch.nn.Parameter(leaf.detach().clone()) for leaf in leaves]
        optimizer = factory(params)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{who}: outer must return a torch.optim.Optimizer, got {optimizer!r}")
        kept = [id(param) for group in optimizer.param_groups for param in group["params"]]
        if sorted(kept) != sorted(map(id, params)):
            raise ValueError(
                f"{who}: outer must optimize the {len(params)} parameters that it is given, and no others; its "
                f"optimizer has {len(kept)}, {len(set(kept) & set(map(id, params)))} of these among them"
            )
        if state is not None:
            own = optimizer.state_dict()["param_groups"]
            groups = [
                group | {name: _as(group.get(name), value) for name, value in kept.items()}
                for group, kept in zip(own, copy.deepcopy(state["param_groups"]), strict=True)
            ]
            optimizer.load_state_dict({"state": copy.deepcopy(state["state"]), "param_groups": groups})
        return params, optimizer, flat

    def state_of(optimizer: Any) -> Any:
        """Return a plain tree: without the groups' lists of parameters, which are all of them in their order."""
        whole = optimizer.state_dict()
        groups = [{name: value for name, value in group.items() if name != "params"} for group in whole["param_groups"]]
        return {"state": whole["state"], "param_groups": groups}

    def init(anchor: Any) -> Any:
        return state_of(made(anchor, None)[1])

    def step(pseudo_gradient: Any, state: Any, anchor: Any) -> tuple[Any, Any]:
        params, optimizer, flat = made(anchor, state)
        for param, delta in zip(params, flatten(pseudo_gradient).leaves, strict=True):
            param.grad = delta.clone()  # torch may write to it, and to that of a tied leaf once more
        optimizer.step()
        return flat.rebuild([param.detach() for param in params]), state_of(optimizer)

    return Stepper(init, step)


def _as(own: Any, value: Any) -> Any:
    """Return a setting of an optimizer as the number that it was before it went through a file of arrays."""
    if isinstance(own, (tuple, list)):
        return type(own)(_as(a, b) for a, b in zip(own, value, strict=True))
    return type(own)(value) if isinstance(own, (bool, int, float)) else value

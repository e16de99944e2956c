"""Leaves: from an array or a number to the small class that knows how to read, make and name its kind.

A framework is looked for in ``sys.modules`` only: whoever holds a tensor has imported torch already, and nobody else
should. A new kind of array is a file with a `Family`, and a row in `_find_family`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import sys
from collections.abc import Hashable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from funcavg._trees.arrays.base import Alike, Family, Leaf, type_name
from funcavg._trees.arrays.numpy import Integers, NumpyArrays, Scalars, StandIn, StandIns, is_averaged

__all__ = [
    "Alike",
    "Family",
    "Leaf",
    "StandIn",
    "exact_family_of",
    "family_of",
    "is_dtensor",
    "is_jax",
    "private_copy",
    "same_values",
    "type_name",
    "wrap_local_tensor",
    "zeros_like",
]


class _Unsupported(Family):
    """Anything else: an error that says what it is, and what to do about it."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return object()  # never remembered

    def describe(self, leaf: Any) -> Leaf:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(leaf, torch.nn.Module):
            cure = "pass dict(module.named_parameters()) or module.state_dict()"
            raise TypeError(f"{type(leaf).__name__}, a torch.nn.Module ({cure})")
        if cure := _cure(leaf):
            raise TypeError(f"{type_name(leaf)}, {cure}")
        shown = repr(leaf)
        raise TypeError(f"{type_name(leaf)}: {shown if len(shown) <= 60 else shown[:57] + '...'}")


def _cure(leaf: Any) -> str:
    """Say what can be done about a container or an array of a kind that is not known; "" if there is nothing to say."""
    kind = type(leaf)
    if kind.__module__.startswith("torch.fx"):
        return "which stands for a value while torch.fx records (average outside of it)"
    if isinstance(leaf, io.IOBase):
        return "which holds bytes, as the extra state of a module does (leave it out with where=)"
    if isinstance(leaf, Mapping):
        return "a mapping whose type is not registered (pass dict(...) of it, or register the type with optree or JAX)"
    if dataclasses.is_dataclass(leaf):
        return (
            "a dataclass that is not registered (register it with jax.tree_util.register_dataclass or "
            "optree.register_pytree_node, or pass vars(...) of it)"
        )
    if isinstance(leaf, (KeysView, ValuesView, ItemsView)):
        return "a view of a dict (pass list(...) of it, or the dict)"
    if isinstance(leaf, AbstractSet):
        return "whose order ranks cannot agree about (pass a sorted list)"
    if isinstance(leaf, Iterator):
        return "which can be read only once (pass list(...) of it)"
    if hasattr(kind, "to_numpy"):
        return "which averages as the array that it holds (pass its to_numpy())"
    if hasattr(kind, "__array__") or hasattr(kind, "__dlpack__"):
        return "an array of another library (pass numpy.asarray(...) of it)"
    return ""


_FAMILIES: dict[type, Family] = {}  # by exact type, filled as types are met
_EXACT: dict[Family, Family] = {}


def family_of(leaf: Any) -> Family:
    """Return the family of a leaf."""
    kind = type(leaf)
    family = _FAMILIES.get(kind)
    if family is None:
        family = _FAMILIES[kind] = _find_family(leaf)
    return family


def exact_family_of(leaf: Any) -> Family:
    """Return the family that has a leaf as bits."""
    family = family_of(leaf)
    if family not in _EXACT:
        _EXACT[family] = family.exact()
    return _EXACT[family]


def is_jax(leaf: Any) -> bool:
    """Say whether ``leaf`` is an array of JAX's, or stands for one."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(leaf, jax.Array)


def zeros_like(leaf: Any) -> Any:
    """Return zeros of a leaf's kind, dtype and shape."""
    kind = type(leaf).__module__.partition(".")[0]
    if kind == "torch":
        return sys.modules["torch"].zeros_like(leaf, requires_grad=False)
    if is_jax(leaf):
        return sys.modules["jax"].numpy.zeros_like(leaf)
    return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)(0)


def private_copy(leaf: Any) -> Any:
    """Return a leaf that passes through, as an array that nobody else writes to; what is no such array, as it is."""
    family = family_of(leaf)
    if not (isinstance(leaf, np.ndarray) or _is_tensor(leaf)):
        return leaf
    try:
        carrier = family.fresh(leaf)
        family.copy([carrier], [family.carrier(leaf)])
        return family.finish(leaf, carrier)
    except Exception:  # a kind that is not averaged, and need not be known: a sparse tensor
        return leaf


def same_values(one: Any, other: Any) -> bool:
    """Say whether two leaves that pass through hold the same values (NaN is equal to NaN)."""
    try:
        if _dtype_name(one) != _dtype_name(other):
            return False
        one, other = _readable(one), _readable(other)
        if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
            equal = (one == other) | ((one != one) & (other != other))  # noqa: PLR0124  # NaN
            return one.shape == other.shape and bool(np.all(equal))
        return bool(one == other)
    except Exception:  # what cannot be compared is not known to be the same
        return one is other


def _dtype_name(leaf: Any) -> str:
    """Return what frameworks agree in, whatever the order of bytes."""
    dtype = getattr(leaf, "dtype", "")
    return dtype.name if isinstance(dtype, np.dtype) else str(dtype).removeprefix("torch.")


def _readable(leaf: Any) -> Any:
    """Return a leaf's values as a NumPy array, if it is an array or a number."""
    if _is_tensor(leaf):
        local = getattr(leaf, "_local_tensor", leaf).detach().cpu()
        dense = local if local.layout == sys.modules["torch"].strided else local.to_dense()
        return family_of(dense).as_numpy(dense)
    if is_jax(leaf):
        jax = sys.modules["jax"]
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return np.asarray(leaf) if isinstance(leaf, (np.generic, int, float, complex)) else leaf


def _is_tensor(leaf: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(leaf, torch.Tensor)


def is_dtensor(leaf: Any) -> bool:
    """Say whether ``leaf`` is torch's DTensor."""
    dtensor = sys.modules.get("torch.distributed.tensor")
    return dtensor is not None and isinstance(leaf, dtensor.DTensor)


def wrap_local_tensor(leaf: Any, local: Any) -> Any:
    """Wrap a local shard as the DTensor ``leaf`` is wrapped."""
    from funcavg._trees.arrays.torch import wrap_local_tensor as wrap

    return wrap(leaf, local)


def _find_family(leaf: Any) -> Family:
    kind = type(leaf)
    if issubclass(kind, (bool, int)):
        return _INTEGERS
    if issubclass(kind, (float, complex, np.number, np.bool_)):
        return _SCALARS
    if issubclass(kind, np.generic) and is_averaged(np.dtype(kind)) is not None:
        return _SCALARS  # the scalars of ml_dtypes are no np.number
    if issubclass(kind, np.ndarray):
        return _ARRAYS
    torch = sys.modules.get("torch")
    if torch is not None and issubclass(kind, torch.Tensor):
        return _torch_family(
            is_dtensor=issubclass(kind, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))
        )
    jax = sys.modules.get("jax")
    if jax is not None and isinstance(leaf, jax.Array):  # by JAX's rules, which a class alone does not tell
        if isinstance(leaf, jax.core.Tracer):  # of arrays and of keys: one class
            return _jax_family("JaxTracers")
        return _jax_family("JaxKeys" if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else "JaxArrays")
    return StandIns() if kind is StandIn else _UNSUPPORTED


@functools.cache
def _jax_family(name: str) -> Family:
    from funcavg._trees.arrays import jax as families

    family: Family = getattr(families, name)()
    return family


@functools.cache
def _torch_family(*, is_dtensor: bool) -> Family:
    from funcavg._trees.arrays.torch import DTensors, Tensors

    return DTensors() if is_dtensor else Tensors()


_INTEGERS, _SCALARS, _ARRAYS, _UNSUPPORTED = Integers(), Scalars(), NumpyArrays(), _Unsupported()

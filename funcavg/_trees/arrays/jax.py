"""JAX arrays. Imported when jax has been.

They are read through NumPy views of their own memory, and results are NumPy memory that JAX adopts: nothing is copied
on the host but by the average itself, and small leaves. Arrays on an accelerator, or cut over several devices, are
fetched and put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from funcavg._memory import bytes_at
from funcavg._trees.arrays.base import Family, Leaf
from funcavg._trees.arrays.numpy import ExactArrays, NumpyArrays, is_averaged

__all__ = ["JaxArrays", "JaxKeys", "JaxTracers"]

ALIGNMENT = 64  # bytes: JAX adopts host memory that begins at a multiple of it
SMALL = 64 << 10  # bytes, below which a copy costs less than memory that JAX adopts
ELSEWHERE = """that lies partly in other processes. Average it where it lives, by an axis name inside shard_map:
    mesh, P = jax.make_mesh((jax.device_count(),), ("data",)), jax.P("data")
    mean = jax.shard_map(lambda x: funcavg.average(x, "data"), mesh=mesh, in_specs=P, out_specs=P)
    result = jax.jit(mean)(array)"""


class JaxArrays(NumpyArrays):
    mutable = False

    def exact(self) -> Family:
        return ExactJaxArrays()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        if any([leaf.is_deleted() for leaf in leaves]):
            raise ValueError("a deleted array, which `describe` will name")
        return tuple([leaf.aval for leaf in leaves]), tuple([leaf.sharding for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        _refuse_deleted(leaf)
        averaged = is_averaged(leaf.dtype)
        if averaged is None:
            raise TypeError(f"JAX array of dtype {leaf.dtype}")
        if not averaged:
            return Leaf(_text(leaf))
        _refuse_elsewhere(leaf)
        dtype, shape = np.dtype(leaf.dtype), tuple(leaf.shape)
        if dtype.kind == "c":
            dtype, shape = np.dtype(f"f{dtype.itemsize // 2}"), (*shape, 2)
        return Leaf(_text(leaf), dtype.name, shape, dtype, plain=False, compact=leaf.size * dtype.itemsize < SMALL)

    def carrier(self, leaf: Any) -> Any:
        view = np.asarray(leaf)
        if view.nbytes >= SMALL and view.flags.c_contiguous:
            # The same memory without NumPy's mark that it is read-only: transports are picky, and only read it.
            view = bytes_at(view.ctypes.data, view.nbytes, view).view(view.dtype).reshape(view.shape)
        return super().carrier(view)

    def fresh(self, leaf: Any) -> Any:
        nbytes = leaf.size * np.dtype(leaf.dtype).itemsize  # JAX counts two integers of 4 bits as one byte
        memory = np.empty(nbytes + ALIGNMENT, np.uint8)
        begin = -memory.ctypes.data % ALIGNMENT
        result = memory[begin : begin + nbytes].view(np.dtype(leaf.dtype)).reshape(leaf.shape)
        return super().carrier(result)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        return self.finish_all([leaf], [carrier])[0]

    def finish_all(self, leaves: Sequence[Any], carriers: Sequence[Any]) -> list[Any]:
        finish = super().finish
        kinds = {dtype: np.empty(0, dtype) for dtype in {leaf.dtype for leaf in leaves}}
        wholes = [finish(kinds[leaf.dtype], carrier) for leaf, carrier in zip(leaves, carriers, strict=True)]
        results = list(leaves)
        with jax.transfer_guard("allow"):
            if all([type(leaf.sharding) is jax.sharding.SingleDeviceSharding for leaf in leaves]):
                with contextlib.suppress(ImportError, AttributeError, TypeError):  # another release of JAX
                    return _put_each(leaves, wholes)
            for committed in (False, True):  # by one call each: a call for every leaf takes four times as long
                chosen = [i for i, leaf in enumerate(leaves) if leaf.committed == committed]
                where = [leaves[i].sharding for i in chosen] if committed else None
                placed = jax.device_put([wholes[i] for i in chosen], where, may_alias=True)
                for i, array in zip(chosen, placed, strict=True):
                    leaf = leaves[i]
                    results[i] = leaf.at[...].set(array) if leaf.weak_type else array  # which keeps that it is weak
        return results

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [id(leaf) for leaf in leaves]

    def geometry(self, leaf: Any) -> Hashable:
        return id(leaf)

    def span(self, leaf: Any) -> tuple[int, int]:
        return 0, 0

    def overlaps_itself(self, leaf: Any) -> bool:
        return False

    def refuse_donation(self, leaf: Any) -> str | None:
        return None  # immutable: the result is a new array either way

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return True


class JaxTracers(JaxArrays):
    """What stands for an array while JAX traces a function."""

    def exact(self) -> Family:
        return ExactTracers()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple([leaf.aval for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        aval = leaf.aval
        if jax.numpy.issubdtype(aval.dtype, jax.dtypes.prng_key):
            return _KEYS.describe(leaf)
        text = f"{aval.dtype.name}{list(aval.shape)}"
        averaged = is_averaged(aval.dtype)
        if averaged is None:
            raise TypeError(f"JAX array of dtype {aval.dtype}")
        return Leaf(text, aval.dtype.name, tuple(aval.shape), np.dtype(aval.dtype)) if averaged else Leaf(text)


class JaxKeys(NumpyArrays):
    """Typed PRNG keys pass through."""

    def exact(self) -> Family:
        return ExactKeys()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple([(leaf.dtype, leaf.shape) for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        return Leaf(f"{leaf.dtype}{list(leaf.shape)}")


class ExactJaxArrays(JaxArrays, ExactArrays):
    """JAX arrays as bits."""

    def describe(self, leaf: Any) -> Leaf:
        _refuse_deleted(leaf)
        _refuse_elsewhere(leaf)
        return ExactArrays.describe(self, np.broadcast_to(np.empty((), leaf.dtype), leaf.shape))


class ExactTracers(JaxTracers):
    """Over an axis, where a program makes bits of them."""

    def describe(self, leaf: Any) -> Leaf:
        return super().describe(leaf)._replace(element="bits8")


class ExactKeys(ExactJaxArrays):
    """Typed PRNG keys, as the integers that they are made of."""

    def describe(self, leaf: Any) -> Leaf:
        _refuse_deleted(leaf)
        _refuse_elsewhere(leaf)
        return super().describe(jax.random.key_data(leaf))._replace(text=_text(leaf))

    def carrier(self, leaf: Any) -> Any:
        return super().carrier(jax.random.key_data(leaf))

    def fresh(self, leaf: Any) -> Any:
        return super().fresh(jax.random.key_data(leaf))

    def finish_all(self, leaves: Sequence[Any], carriers: Sequence[Any]) -> list[Any]:
        whole = super().finish_all([jax.random.key_data(leaf) for leaf in leaves], carriers)
        kinds = map(jax.random.key_impl, leaves)
        return [jax.random.wrap_key_data(data, impl=kind) for data, kind in zip(whole, kinds, strict=True)]


def _put_each(leaves: Sequence[Any], wholes: Sequence[Any]) -> list[Any]:
    """Return NumPy arrays as JAX's, where and as leaves are. Private to JAX: `device_put` takes eight times as long."""
    from jax._src.lib import xla_client  # type: ignore[attr-defined]

    client: Any = xla_client
    put, results = client.batched_device_put, []
    for leaf, whole in zip(leaves, wholes, strict=True):
        sharding = leaf.sharding
        results.append(put(leaf.aval, sharding, [whole], list(sharding.device_set), leaf.committed))
    return results


def _text(leaf: Any) -> str:
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def _refuse_deleted(leaf: Any) -> None:
    if leaf.is_deleted():
        raise TypeError(f"JAX array {_text(leaf)} whose memory has been deleted or donated")


def _refuse_elsewhere(leaf: Any) -> None:
    if not leaf.is_fully_addressable:
        raise TypeError(f"JAX array {_text(leaf)} {ELSEWHERE}")


_KEYS = JaxKeys()

"""Leaves: what torch, NumPy (and later JAX) arrays and Python floats have in common.

Each kind of leaf has one small class, a `Family`, found by the leaf's type. A framework is looked for in
``sys.modules`` only: whoever holds a tensor has imported torch already, and nobody else should.

A leaf is described once per signature (`Leaf`) and then handled through its *carrier*: the real-valued torch tensor
or NumPy array that shares the leaf's memory (complex numbers appear as pairs along a last dimension of 2).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Family", "Leaf", "family_of", "wraps_local_tensor"]

EXPANDED = "an expanded array, several elements of which share one memory cell"
HUGE = 4 << 20  # bytes: from here on NumPy asks the kernel for huge pages, which makes fresh memory 4 times cheaper


class Leaf(NamedTuple):
    """What is agreed about one leaf. ``element`` is None for leaves that pass through."""

    text: str  # as shown in errors and hashed into the digest, such as "float32[512, 64]"
    element: str | None = None  # name of the real dtype that the kernel averages
    shape: tuple[int, ...] = ()  # of the carrier
    native: Any = None  # the carrier's dtype, in the framework's own terms
    plain: bool = False  # the leaf is its own carrier, and its result needs no wrapping
    device: str = ""  # the accelerator in whose memory it lies, in torch's terms; "" on the host


class Family:
    """How to read, make and name one kind of leaf."""

    mutable = True  # False: even a donated leaf is replaced by a new object

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        """Return all that `describe` and `span` look at, of many leaves at once and column by column: trees of
        thousands of leaves are looked at before every average.
        """
        raise NotImplementedError

    def describe(self, leaf: Any) -> Leaf:
        """Describe the leaf, or raise TypeError if it can be neither averaged nor passed through."""
        raise NotImplementedError

    def carrier(self, leaf: Any) -> Any:
        """Return a real-valued array that shares the leaf's memory."""
        return leaf

    def fresh(self, leaf: Any) -> Any:
        """Return the carrier of a result: new memory of the leaf's dtype, shape, device and layout."""
        raise NotImplementedError

    def finish(self, leaf: Any, carrier: Any) -> Any:
        """Return the result that stands in for ``leaf``, made from its filled carrier."""
        return carrier

    def tie(self, leaf: Any, result: Any) -> Any:
        """Return the result for ``leaf``, whose memory is that of a leaf with the given result."""
        return result

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        """Return where each leaf's memory begins, 0 if it has none."""
        raise NotImplementedError

    def geometry(self, leaf: Any) -> Hashable:
        """Return what, besides the address, makes two leaves the same memory: dtype, shape, strides."""
        raise NotImplementedError

    def span(self, leaf: Any) -> tuple[int, int]:
        """Return the bytes between which the leaf's memory lies, seen from its address."""
        raise NotImplementedError

    def refuse_donation(self, leaf: Any) -> str | None:
        """Say why this leaf cannot be written to, if it cannot."""
        return None

    def overlaps_itself(self, leaf: Any) -> bool:
        """Say whether several elements share one memory cell."""
        return False

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        """Return True if `refuse_donation` need not be asked, leaf by leaf, about what may change between calls."""
        return False

    def as_bytes(self, carrier: Any) -> Any:
        """View the memory of a contiguous carrier on the host as flat NumPy bytes; None if that cannot be."""
        return None

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        """View flat bytes of a bucket as an array."""
        raise NotImplementedError

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        """Copy arrays, one by one."""
        raise NotImplementedError

    def as_numpy(self, leaf: Any) -> Any:
        """View the leaf's memory as a NumPy array of any dtype of the same width, or None on an accelerator."""
        return leaf


class _Numpy(Family):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.strides for leaf in leaves]),
        )

    def describe(self, leaf: Any) -> Leaf:
        if type(leaf) not in (np.ndarray, np.memmap):
            cure = "averaging its data alone would lose what the subclass means; pass np.asarray(leaf)"
            raise TypeError(f"NumPy subclass {_type_name(leaf)} ({cure})")
        return _describe_numpy(leaf.dtype, leaf.shape, plain=leaf.dtype.kind != "c")

    def carrier(self, leaf: Any) -> Any:
        if leaf.dtype.kind != "c":
            return leaf
        return leaf[..., None].view(_component(leaf.dtype))

    def fresh(self, leaf: Any) -> Any:
        # A broadcast leaf (stride 0) gets memory for every element; others keep their memory layout.
        return self.carrier(np.empty_like(leaf, subok=False))

    def finish(self, leaf: Any, carrier: Any) -> Any:
        return carrier if leaf.dtype.kind != "c" else carrier.view(leaf.dtype)[..., 0]

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [leaf.__array_interface__["data"][0] if leaf.size else 0 for leaf in leaves]

    def geometry(self, leaf: Any) -> Hashable:
        return leaf.dtype, leaf.shape, leaf.strides

    def span(self, leaf: Any) -> tuple[int, int]:
        return _span(leaf.shape, leaf.strides, leaf.itemsize)

    def refuse_donation(self, leaf: Any) -> str | None:
        if not leaf.flags.writeable:
            return "a read-only NumPy array"
        return EXPANDED if self.overlaps_itself(leaf) else None

    def overlaps_itself(self, leaf: Any) -> bool:
        return _expanded(leaf.shape, leaf.strides)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return all([leaf.flags.writeable for leaf in leaves])

    def as_bytes(self, carrier: Any) -> Any:
        if not (carrier.flags.c_contiguous and carrier.dtype.isnative):
            return None
        return carrier.reshape(-1).view(np.uint8)

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        if not isinstance(memory, np.ndarray):
            memory = memory.numpy()
        return memory.view(native).reshape(shape)

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target[...] = source


class _Scalar(_Numpy):
    """Python floats and complex numbers, and NumPy scalars: 0-d arrays on the way."""

    mutable = False

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        return _describe_numpy(np.asarray(leaf).dtype, (), plain=False)

    def carrier(self, leaf: Any) -> Any:
        return super().carrier(np.asarray(leaf))

    def fresh(self, leaf: Any) -> Any:
        return super().fresh(np.asarray(leaf))

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = super().finish(np.asarray(leaf), carrier)
        return result[()] if isinstance(leaf, np.generic) else result.item()

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [0] * len(leaves)

    def geometry(self, leaf: Any) -> Hashable:
        return object()  # numbers are not tied

    def span(self, leaf: Any) -> tuple[int, int]:
        return 0, 0

    def overlaps_itself(self, leaf: Any) -> bool:
        return False

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return True  # immutable: the result is a new number either way


class _Integer(Family):
    """Python bools and integers pass through."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return tuple(map(type, leaves))

    def describe(self, leaf: Any) -> Leaf:
        return Leaf("bool" if isinstance(leaf, bool) else "int")


class _Torch(Family):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.is_contiguous() or leaf.stride() for leaf in leaves]),
            tuple([leaf.device for leaf in leaves]),
            tuple([leaf.layout for leaf in leaves]),
            tuple([leaf.requires_grad for leaf in leaves]),
        )

    def describe(self, leaf: Any) -> Leaf:
        import torch

        dtype, name = leaf.dtype, str(leaf.dtype).removeprefix("torch.")
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"tensor subclass {_type_name(leaf)}")
        if leaf.layout != torch.strided:
            raise TypeError(f"{str(leaf.layout).removeprefix('torch.')} tensor of dtype {name}")
        if leaf.is_quantized or name == "float4_e2m1fn_x2":
            raise TypeError(f"quantised tensor of dtype {name}")
        if leaf.device.type == "meta":
            raise TypeError(f"meta tensor of dtype {name}, which has no values")
        text = f"{name}{list(leaf.shape)}"
        if not (dtype.is_floating_point or dtype.is_complex):
            return Leaf(text)
        shape, native = tuple(leaf.shape), dtype
        if dtype.is_complex:
            shape, native = (*shape, 2), dtype.to_real()
        plain = not dtype.is_complex and type(leaf) is torch.Tensor and not leaf.requires_grad
        element = str(native).removeprefix("torch.")
        return Leaf(text, element, shape, native, plain, "" if leaf.device.type == "cpu" else str(leaf.device))

    def carrier(self, leaf: Any) -> Any:
        import torch

        leaf = leaf.detach()
        return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf.resolve_neg()

    def fresh(self, leaf: Any) -> Any:
        import torch

        leaf = leaf.detach()
        if leaf.device.type == "cpu" and leaf.nbytes >= HUGE and leaf.is_contiguous() and not leaf.is_complex():
            memory = np.empty(leaf.nbytes, np.uint8)
            result = torch.from_numpy(memory).view(leaf.dtype).view(leaf.shape)
        else:
            result = torch.empty_like(leaf, requires_grad=False)
        return torch.view_as_real(result) if leaf.is_complex() else result

    def finish(self, leaf: Any, carrier: Any) -> Any:
        import torch

        result = torch.view_as_complex(carrier) if leaf.is_complex() else carrier
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return self.finish(leaf, self.carrier(result))

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [leaf.data_ptr() for leaf in leaves]

    def geometry(self, leaf: Any) -> Hashable:
        return leaf.dtype, leaf.shape, leaf.stride()

    def span(self, leaf: Any) -> tuple[int, int]:
        size = leaf.element_size()
        return _span(leaf.shape, [stride * size for stride in leaf.stride()], size)

    def refuse_donation(self, leaf: Any) -> str | None:
        import torch

        if leaf.requires_grad and torch.is_grad_enabled():
            return "a tensor that requires grad, while gradients are recorded; donate it under torch.no_grad()"
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            return "an inference tensor outside torch.inference_mode()"
        if leaf.is_conj():
            return "a lazily conjugated view; pass leaf.resolve_conj()"
        return EXPANDED if self.overlaps_itself(leaf) else None

    def overlaps_itself(self, leaf: Any) -> bool:
        return _expanded(leaf.shape, leaf.stride())

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        import torch

        if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):
            return False
        return not any(map(torch.Tensor.is_inference, leaves))

    def as_bytes(self, carrier: Any) -> Any:
        import torch

        if carrier.device.type != "cpu" or not carrier.is_contiguous() or carrier.is_neg():
            return None
        return carrier.detach().view(-1).view(torch.uint8).numpy()

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        import torch

        if isinstance(memory, np.ndarray):
            memory = torch.from_numpy(memory)
        return memory.view(native).view(shape)

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        import torch

        if len(targets) == 1:
            targets[0].copy_(sources[0])
        elif targets:
            torch._foreach_copy_(targets, sources)

    def as_numpy(self, leaf: Any) -> Any:
        import torch

        if leaf.device.type != "cpu":
            return None
        carrier = self.carrier(leaf)
        width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        return carrier.view(width[carrier.element_size()]).numpy()


class _DTensor(_Torch):
    """torch's DTensor: the local shard is averaged and wrapped again."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        wrapping = [
            (type(leaf), leaf.shape, leaf.placements, tuple(leaf.device_mesh.get_coordinate() or ())) for leaf in leaves
        ]
        return tuple(wrapping), super().signature([leaf._local_tensor for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        local = super().describe(leaf._local_tensor)
        where = []
        for dim, placement in enumerate(leaf.placements):
            if placement.is_partial():
                raise TypeError(f"DTensor with placement {placement}, whose values are not yet summed")
            if not placement.is_replicate():
                where.append(f"{placement} at {leaf.device_mesh.get_local_rank(dim)}")
        shards = "; ".join(where) or "replicated"
        text = f"{local.text} of DTensor{list(leaf.shape)} ({shards})"
        return local._replace(text=text, plain=False)

    def carrier(self, leaf: Any) -> Any:
        return super().carrier(leaf._local_tensor)

    def fresh(self, leaf: Any) -> Any:
        return super().fresh(leaf._local_tensor)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        import torch

        result = self.rewrap(leaf, super().finish(leaf._local_tensor.detach(), carrier))
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return result

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return super().addresses([leaf._local_tensor for leaf in leaves])

    def geometry(self, leaf: Any) -> Hashable:
        return super().geometry(leaf._local_tensor)

    def span(self, leaf: Any) -> tuple[int, int]:
        return super().span(leaf._local_tensor)

    def as_numpy(self, leaf: Any) -> Any:
        return super().as_numpy(leaf._local_tensor)

    def overlaps_itself(self, leaf: Any) -> bool:
        return super().overlaps_itself(leaf._local_tensor)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return False

    def refuse_donation(self, leaf: Any) -> str | None:
        import torch

        if leaf.requires_grad and torch.is_grad_enabled():
            return "a DTensor that requires grad, while gradients are recorded; donate it under torch.no_grad()"
        return super().refuse_donation(leaf._local_tensor.detach())

    @staticmethod
    def rewrap(leaf: Any, local: Any) -> Any:
        """Wrap a local shard as ``leaf`` is wrapped."""
        return type(leaf).from_local(
            local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
        )


class _Unsupported(Family):
    """Anything else: an error that says what it is, and what to do about it."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return object()  # never remembered

    def describe(self, leaf: Any) -> Leaf:
        jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
        if jax is not None and isinstance(leaf, jax.Array):
            raise TypeError(f"JAX array of dtype {leaf.dtype} (JAX leaves are not supported yet; pass np.asarray(leaf))")
        if torch is not None and isinstance(leaf, torch.nn.Module):
            cure = "pass dict(module.named_parameters()) or module.state_dict()"
            raise TypeError(f"{type(leaf).__name__}, a torch.nn.Module ({cure})")
        if hasattr(leaf, "__next__"):
            raise TypeError(f"{type(leaf).__name__}, which can be read only once (pass list(...) of it)")
        shown = repr(leaf)
        raise TypeError(f"{_type_name(leaf)}: {shown if len(shown) <= 60 else shown[:57] + '...'}")


_FAMILIES: dict[type, Family] = {}  # by exact type, filled as types are met
_INTEGER, _NUMPY, _SCALAR, _TORCH, _DTENSOR = _Integer(), _Numpy(), _Scalar(), _Torch(), _DTensor()


def family_of(leaf: Any) -> Family:
    """Return the family of a leaf."""
    kind = type(leaf)
    family = _FAMILIES.get(kind)
    if family is None:
        family = _FAMILIES[kind] = _find_family(kind)
    return family


def wraps_local_tensor(leaf: Any) -> _DTensor | None:
    """Return the family of DTensors if ``leaf`` is one."""
    return _DTENSOR if family_of(leaf) is _DTENSOR else None


def _find_family(kind: type) -> Family:
    rows: list[tuple[Any, Family]] = [
        ((bool, int), _INTEGER),
        ((float, complex, np.number, np.bool_), _SCALAR),
        (np.ndarray, _NUMPY),
    ]
    if (torch := sys.modules.get("torch")) is not None:
        if (dtensor := sys.modules.get("torch.distributed.tensor")) is not None:
            rows.append((dtensor.DTensor, _DTENSOR))
        rows.append((torch.Tensor, _TORCH))
    if issubclass(kind, np.generic) and _is_averaged(np.dtype(kind)) is not None:
        return _SCALAR  # the scalars of ml_dtypes are no np.number
    return next((family for types, family in rows if issubclass(kind, types)), _Unsupported())


def _describe_numpy(dtype: np.dtype[Any], shape: tuple[int, ...], *, plain: bool) -> Leaf:
    text = f"{dtype.name}{list(shape)}"
    averaged = _is_averaged(dtype)
    if averaged is None:
        raise TypeError(f"NumPy array of dtype {dtype}")
    if not averaged:
        return Leaf(text)
    if dtype.kind == "c":
        shape, dtype = (*shape, 2), _component(dtype)
    element = "longdouble" if dtype.type is np.longdouble and dtype.itemsize > 8 else dtype.name
    return Leaf(text, element, shape, dtype.newbyteorder("="), plain)


def _is_averaged(dtype: np.dtype[Any]) -> bool | None:
    """Say whether a NumPy dtype is averaged (True), passes through (False), or is refused (None)."""
    if dtype.type.__module__ == "ml_dtypes":  # float types; its integers are 4 bits wide and narrower
        try:
            sys.modules["ml_dtypes"].finfo(dtype)
        except ValueError:
            return False
        return True
    return {"f": True, "c": True, "b": False, "i": False, "u": False}.get(dtype.kind)


def _component(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return the real dtype of a complex dtype, byte order kept."""
    return np.dtype(f"{dtype.byteorder}f{dtype.itemsize // 2}")


def _expanded(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return any(extent > 1 and stride == 0 for extent, stride in zip(shape, strides, strict=True))


def _span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> tuple[int, int]:
    if math.prod(shape) == 0:
        return 0, 0
    reach = [(extent - 1) * stride for extent, stride in zip(shape, strides, strict=True)]
    return sum(step for step in reach if step < 0), sum(step for step in reach if step > 0) + itemsize


def _type_name(leaf: Any) -> str:
    module, name = type(leaf).__module__, type(leaf).__qualname__
    return name if module == "builtins" else f"{module}.{name}"


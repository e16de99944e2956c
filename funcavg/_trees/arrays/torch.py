"""torch tensors and parameters, on the host or an accelerator, and DTensors. Imported when torch has been."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from funcavg._memory import HUGE, ask_for_huge_pages, bytes_at
from funcavg._trees.arrays.alike import alike
from funcavg._trees.arrays.base import EXPANDED, Alike, Family, Leaf, is_compact, is_expanded, memory_span, type_name
from funcavg._trees.arrays.parts import part_of, parts_of

__all__ = ["DTensors", "Tensors", "wrap_local_tensor"]


class Tensors(Family):
    pointer = staticmethod(torch.Tensor.data_ptr)  # a storage may be resized, as FSDP does

    def exact(self) -> Family:
        return ExactTensors()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.is_contiguous() or leaf.stride() for leaf in leaves]),
            tuple([leaf.device for leaf in leaves]),
            tuple([leaf.layout for leaf in leaves]),
            any(map(torch.Tensor.is_neg, leaves)) and tuple(map(torch.Tensor.is_neg, leaves)),
            tuple([leaf.requires_grad for leaf in leaves]),
            parts_of(leaves),
        )

    def alike(self, leaves: Sequence[Any]) -> Alike:
        return alike(leaves) or super().alike(leaves)

    def describe(self, leaf: Any) -> Leaf:
        dtype, text = leaf.dtype, self._text(leaf)
        if _name(dtype) == "float4_e2m1fn_x2":
            raise TypeError(f"quantised tensor of dtype {_name(dtype)}")
        if not (dtype.is_floating_point or dtype.is_complex):
            return Leaf(text)
        shape, native = tuple(leaf.shape), dtype
        if dtype.is_complex:
            shape, native = (*shape, 2), dtype.to_real()
        plain = not dtype.is_complex and type(leaf) is torch.Tensor and not leaf.requires_grad
        in_order = leaf.device.type == "cpu" and leaf.is_contiguous() and not leaf.is_neg()
        compact = in_order and not dtype.is_complex and is_compact(shape, leaf.nbytes, HUGE)
        return Leaf(text, _name(native), shape, native, plain, _accelerator(leaf), in_order, compact)

    def _text(self, leaf: Any) -> str:
        """Return the words for a leaf; raise TypeError if it has no memory of elements, one after the other."""
        name = _name(leaf.dtype)
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"tensor subclass {type_name(leaf)}")
        if leaf.is_nested:
            raise TypeError(f"nested tensor of dtype {name} (pass list(leaf.unbind()), or leaf.to_padded_tensor(0))")
        if leaf.layout != torch.strided:
            raise TypeError(f"{str(leaf.layout).removeprefix('torch.')} tensor of dtype {name} (pass leaf.to_dense())")
        if leaf.is_quantized:
            raise TypeError(f"quantised tensor of dtype {name} (pass leaf.dequantize())")
        if leaf.device.type == "meta":
            raise TypeError(f"meta tensor of dtype {name}, which has no values")
        part = part_of(leaf)
        return f"{name}{list(leaf.shape)}" + (f" ({part})" if part else "")

    def carrier(self, leaf: Any) -> Any:
        leaf = leaf.detach()
        return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf

    def fresh(self, leaf: Any) -> Any:
        leaf = leaf.detach()
        result = torch.empty_like(leaf, requires_grad=False)
        if leaf.nbytes >= HUGE and leaf.device.type == "cpu":
            ask_for_huge_pages(result.data_ptr(), result.nbytes)
        return torch.view_as_real(result) if leaf.is_complex() else result

    def copies(self, windows: Sequence[Any]) -> Sequence[Any]:
        copies: Sequence[Any] = _clones(windows)  # storages are torch's own, and can be resized; views' could not
        return copies

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = torch.view_as_complex(carrier) if leaf.is_complex() else carrier
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return self.finish(leaf, self.carrier(result))

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return list(map(torch.Tensor.data_ptr, leaves))

    def geometry(self, leaf: Any) -> Hashable:
        return leaf.dtype, leaf.shape, leaf.stride(), leaf.is_conj(), leaf.is_neg()

    def span(self, leaf: Any) -> tuple[int, int]:
        size = leaf.element_size()
        return memory_span(leaf.shape, [stride * size for stride in leaf.stride()], size)

    def refuse_donation(self, leaf: Any) -> str | None:
        if leaf.requires_grad and torch.is_grad_enabled():
            return "a tensor that requires grad, while gradients are recorded; donate it under torch.no_grad()"
        if leaf.is_inference() and not torch.is_inference_mode_enabled():
            return "an inference tensor outside torch.inference_mode()"
        if leaf.is_conj():
            return "a lazily conjugated view; pass leaf.resolve_conj()"
        return EXPANDED if self.overlaps_itself(leaf) else None

    def overlaps_itself(self, leaf: Any) -> bool:
        return is_expanded(leaf.shape, leaf.stride())

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), leaves)):
            return False
        return not any(map(torch.Tensor.is_inference, leaves))

    def written(self, carriers: Sequence[Any]) -> None:
        # Else a backward pass that has saved a donated leaf would take its new values for the old ones.
        increment = torch.autograd.graph.increment_version
        try:
            increment(carriers)
        except (RuntimeError, TypeError):  # other releases take one alone, and none of inference mode
            for carrier in carriers:
                if not carrier.is_inference():
                    increment(carrier)

    def are_held(self, leaves: Sequence[Any]) -> bool:
        return 0 not in map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, leaves))

    def is_held(self, leaf: Any) -> bool:
        held: int = leaf.untyped_storage().nbytes()
        return held >= _end_of(leaf)

    def extent(self, carrier: Any) -> Hashable:
        return carrier.data_ptr(), carrier.untyped_storage().nbytes()

    def as_bytes(self, carrier: Any) -> Any:
        if carrier.device.type != "cpu" or not carrier.is_contiguous() or carrier.is_neg():
            return None
        if not self.is_held(carrier):
            raise RuntimeError(
                f"average: the memory of a tensor of shape {list(carrier.shape)} has been freed: its storage has "
                f"{carrier.untyped_storage().nbytes()} bytes now, of {_end_of(carrier)}. Wait for a handle before "
                f"parameters are resharded, or their storages resized."
            )
        return bytes_at(carrier.data_ptr(), carrier.nbytes, carrier)

    def window(self, memory: Any, native: Any, shape: tuple[int, ...]) -> Any:
        # Windows outlive the call. Made under inference_mode, they could not be written to outside of it.
        with torch.inference_mode(mode=False):
            flat = torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory
            return flat.view(native).view(shape)

    def concatenate(self, sources: list[Any], target: Any) -> None:
        torch.cat(sources, out=target)

    def copy(self, targets: list[Any], sources: list[Any]) -> None:
        if len(targets) == 1:
            targets[0].copy_(sources[0])
        elif targets:
            torch._foreach_copy_(targets, sources)

    def as_numpy(self, leaf: Any) -> Any:
        if leaf.device.type != "cpu":
            return None
        carrier = self.carrier(leaf)
        size = carrier.element_size()
        strides = [stride * size for stride in carrier.stride()]
        memory = bytes_at(carrier.data_ptr(), memory_span(carrier.shape, strides, size)[1], carrier)
        return np.ndarray(carrier.shape, f"i{size}", memory, strides=strides)


class ExactTensors(Tensors):
    """Tensors as bits."""

    def describe(self, leaf: Any) -> Leaf:
        native = INTEGERS[leaf.element_size() // (1 + leaf.is_complex())]
        shape = (*leaf.shape, 2) if leaf.is_complex() else tuple(leaf.shape)
        return Leaf(self._text(leaf), f"bits{8 * native.itemsize}", shape, native, device=_accelerator(leaf))

    def carrier(self, leaf: Any) -> Any:
        return _as_integers(super().carrier(leaf.detach().resolve_neg()))

    def fresh(self, leaf: Any) -> Any:
        return _as_integers(super().fresh(leaf))

    def finish(self, leaf: Any, carrier: Any) -> Any:
        return super().finish(leaf, carrier.view(leaf.dtype.to_real() if leaf.is_complex() else leaf.dtype))

    def refuse_donation(self, leaf: Any) -> str | None:
        lazily = "a lazily negated view; pass leaf.resolve_neg()" if leaf.is_neg() else None
        return lazily or super().refuse_donation(leaf)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return not any(map(torch.Tensor.is_neg, leaves)) and super().all_donatable(leaves)


class DTensors(Tensors):
    """torch's DTensor: the local shard is averaged, as any tensor, and wrapped again."""

    local: Tensors = Tensors()

    def alike(self, leaves: Sequence[Any]) -> Alike:
        return Family.alike(self, leaves)  # torch's test would not see local shards

    def exact(self) -> Family:
        return ExactDTensors()

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        wrapping = [
            (type(leaf), leaf.shape, leaf.placements, tuple(leaf.device_mesh.get_coordinate() or ())) for leaf in leaves
        ]
        return tuple(wrapping), self.local.signature([leaf._local_tensor for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        local = self.local.describe(leaf._local_tensor)
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
        return self.local.carrier(leaf._local_tensor)

    def fresh(self, leaf: Any) -> Any:
        return self.local.fresh(leaf._local_tensor)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = wrap_local_tensor(leaf, self.local.finish(leaf._local_tensor.detach(), carrier))
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return result

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return self.local.addresses([leaf._local_tensor for leaf in leaves])

    def are_held(self, leaves: Sequence[Any]) -> bool:
        return self.local.are_held([leaf._local_tensor for leaf in leaves])

    def is_held(self, leaf: Any) -> bool:
        return self.local.is_held(getattr(leaf, "_local_tensor", leaf))  # carriers are local shards

    def geometry(self, leaf: Any) -> Hashable:
        # Not a plain tensor's: a DTensor and its own local shard in one tree must each come back as what they are.
        return DTensors, leaf.shape, leaf.placements, self.local.geometry(leaf._local_tensor)

    def span(self, leaf: Any) -> tuple[int, int]:
        return self.local.span(leaf._local_tensor)

    def as_numpy(self, leaf: Any) -> Any:
        return self.local.as_numpy(leaf._local_tensor)

    def overlaps_itself(self, leaf: Any) -> bool:
        return self.local.overlaps_itself(leaf._local_tensor)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return False

    def refuse_donation(self, leaf: Any) -> str | None:
        if leaf.requires_grad and torch.is_grad_enabled():
            return "a DTensor that requires grad, while gradients are recorded; donate it under torch.no_grad()"
        return self.local.refuse_donation(leaf._local_tensor.detach())


class ExactDTensors(DTensors):
    """DTensors whose local shards are bits."""

    local = ExactTensors()


def _clone_each(tensors: Sequence[Any]) -> Sequence[Any]:
    return list(map(torch.clone, tensors))


_clones: Any = getattr(torch, "_foreach_clone", _clone_each)  # not in every release
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by width


def _as_integers(tensor: Any) -> Any:
    return tensor.view(INTEGERS[tensor.element_size()])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _end_of(leaf: Any) -> int:
    """Return how many bytes its storage must have."""
    size: int = leaf.element_size()
    last = sum((extent - 1) * stride for extent, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return size * (leaf.storage_offset() + last + 1) if leaf.numel() else 0


def _accelerator(leaf: Any) -> str:
    return "" if leaf.device.type == "cpu" else str(leaf.device)


def wrap_local_tensor(leaf: Any, local: Any) -> Any:
    """Wrap a local shard as the DTensor ``leaf`` is wrapped."""
    return type(leaf).from_local(
        local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )

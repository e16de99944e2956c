"""torch tensors and parameters, on the host or an accelerator, and DTensors. Imported when torch has been."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from funcavg._memory import HUGE, ask_for_huge_pages, bytes_at
from funcavg._trees.arrays.base import EXPANDED, Family, Leaf, is_expanded, memory_span, type_name
from funcavg._trees.arrays.parts import part_of, parts_of

__all__ = ["DTensors", "Tensors", "wrap_local_tensor"]


class Tensors(Family):
    def signature(self, leaves: Sequence[Any]) -> Hashable:
        return (
            tuple(map(type, leaves)),
            tuple([leaf.dtype for leaf in leaves]),
            tuple([leaf.shape for leaf in leaves]),
            tuple([leaf.is_contiguous() or leaf.stride() for leaf in leaves]),
            tuple([leaf.device for leaf in leaves]),
            tuple([leaf.layout for leaf in leaves]),
            tuple([leaf.requires_grad for leaf in leaves]),
            parts_of(leaves),
        )

    def describe(self, leaf: Any) -> Leaf:
        dtype, name = leaf.dtype, str(leaf.dtype).removeprefix("torch.")
        if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"tensor subclass {type_name(leaf)}")
        if leaf.is_nested:
            raise TypeError(f"nested tensor of dtype {name} (pass list(leaf.unbind()), or leaf.to_padded_tensor(0))")
        if leaf.layout != torch.strided:
            raise TypeError(f"{str(leaf.layout).removeprefix('torch.')} tensor of dtype {name} (pass leaf.to_dense())")
        if leaf.is_quantized or name == "float4_e2m1fn_x2":
            cure = " (pass leaf.dequantize())" if leaf.is_quantized else ""
            raise TypeError(f"quantised tensor of dtype {name}{cure}")
        if leaf.device.type == "meta":
            raise TypeError(f"meta tensor of dtype {name}, which has no values")
        text, part = f"{name}{list(leaf.shape)}", part_of(leaf)
        if part:
            text += f" ({part})"
        if not (dtype.is_floating_point or dtype.is_complex):
            return Leaf(text)
        shape, native = tuple(leaf.shape), dtype
        if dtype.is_complex:
            shape, native = (*shape, 2), dtype.to_real()
        plain = not dtype.is_complex and type(leaf) is torch.Tensor and not leaf.requires_grad
        element = str(native).removeprefix("torch.")
        return Leaf(text, element, shape, native, plain, "" if leaf.device.type == "cpu" else str(leaf.device))

    def carrier(self, leaf: Any) -> Any:
        leaf = leaf.detach()
        return torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf

    def fresh(self, leaf: Any) -> Any:
        leaf = leaf.detach()
        result = torch.empty_like(leaf, requires_grad=False)
        if leaf.nbytes >= HUGE and leaf.device.type == "cpu":
            ask_for_huge_pages(result.data_ptr(), result.nbytes)
        return torch.view_as_real(result) if leaf.is_complex() else result

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = torch.view_as_complex(carrier) if leaf.is_complex() else carrier
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return self.finish(leaf, self.carrier(result))

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return [leaf.data_ptr() for leaf in leaves]

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
        if torch.is_grad_enabled() and any([leaf.requires_grad for leaf in leaves]):
            return False
        return not any(map(torch.Tensor.is_inference, leaves))

    def written(self, carrier: Any) -> None:
        # Else a backward pass that has saved a donated leaf would take its new values for the old ones.
        if not carrier.is_inference():
            torch.autograd.graph.increment_version(carrier)

    def as_bytes(self, carrier: Any) -> Any:
        if carrier.device.type != "cpu" or not carrier.is_contiguous() or carrier.is_neg():
            return None
        held, begin = carrier.untyped_storage().nbytes(), carrier.storage_offset() * carrier.element_size()
        if held < begin + carrier.nbytes:  # it was there when the call began
            raise RuntimeError(
                f"average: the memory of a tensor of shape {list(carrier.shape)} has been freed while the call was "
                f"under way: its storage has {held} bytes now, of {begin + carrier.nbytes}. Wait for a handle before "
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


class DTensors(Tensors):
    """torch's DTensor: the local shard is averaged, as any tensor, and wrapped again."""

    def signature(self, leaves: Sequence[Any]) -> Hashable:
        wrapping = [
            (type(leaf), leaf.shape, leaf.placements, tuple(leaf.device_mesh.get_coordinate() or ())) for leaf in leaves
        ]
        return tuple(wrapping), _LOCAL.signature([leaf._local_tensor for leaf in leaves])

    def describe(self, leaf: Any) -> Leaf:
        local = _LOCAL.describe(leaf._local_tensor)
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
        return _LOCAL.carrier(leaf._local_tensor)

    def fresh(self, leaf: Any) -> Any:
        return _LOCAL.fresh(leaf._local_tensor)

    def finish(self, leaf: Any, carrier: Any) -> Any:
        result = wrap_local_tensor(leaf, _LOCAL.finish(leaf._local_tensor.detach(), carrier))
        if isinstance(leaf, torch.nn.Parameter):
            return torch.nn.Parameter(result, requires_grad=leaf.requires_grad)
        return result.requires_grad_(leaf.requires_grad)

    def tie(self, leaf: Any, result: Any) -> Any:
        return result

    def addresses(self, leaves: Sequence[Any]) -> list[int]:
        return _LOCAL.addresses([leaf._local_tensor for leaf in leaves])

    def geometry(self, leaf: Any) -> Hashable:
        # Not a plain tensor's: a DTensor and its own local shard in one tree must each come back as what they are.
        return DTensors, leaf.shape, leaf.placements, _LOCAL.geometry(leaf._local_tensor)

    def span(self, leaf: Any) -> tuple[int, int]:
        return _LOCAL.span(leaf._local_tensor)

    def as_numpy(self, leaf: Any) -> Any:
        return _LOCAL.as_numpy(leaf._local_tensor)

    def overlaps_itself(self, leaf: Any) -> bool:
        return _LOCAL.overlaps_itself(leaf._local_tensor)

    def all_donatable(self, leaves: Sequence[Any]) -> bool:
        return False

    def refuse_donation(self, leaf: Any) -> str | None:
        if leaf.requires_grad and torch.is_grad_enabled():
            return "a DTensor that requires grad, while gradients are recorded; donate it under torch.no_grad()"
        return _LOCAL.refuse_donation(leaf._local_tensor.detach())


_LOCAL = Tensors()


def wrap_local_tensor(leaf: Any, local: Any) -> Any:
    """Wrap a local shard as the DTensor ``leaf`` is wrapped."""
    return type(leaf).from_local(
        local, leaf.device_mesh, leaf.placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
    )

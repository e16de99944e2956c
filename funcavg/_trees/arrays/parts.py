"""Parameters that are a part of something, and must not be averaged with its other parts as if they were whole.

FSDP1 (``use_orig_params``), ZeRO-3 and tensor parallelism without DTensor leave ordinary tensors in the places of
parameters. Each such tensor gets a few words of which part it is. They go into the line that ranks agree about, as a
DTensor's placement does: ranks that hold the same part may average it, others hear what they have mixed up.
"""

from __future__ import annotations

import functools
import gc
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["part_of", "parts_of"]


def parts_of(leaves: Sequence[Any]) -> tuple[str, ...]:
    """Return `part_of` each tensor; nothing if all are whole, as nearly always."""
    shards = _fsdp_shards()
    if not shards and not any(map(vars, leaves)):
        return ()
    parts = tuple(_part(leaf, shards) for leaf in leaves)
    return parts if any(parts) else ()


def part_of(leaf: Any) -> str:
    """Say which part of what a tensor is, "" if it is whole; raise TypeError if nobody can average it as it is."""
    return _part(leaf, _fsdp_shards())


def _part(leaf: Any, shards: Mapping[int, Any]) -> str:
    marks = vars(leaf)
    if marks.get("_fsdp_flattened", False):
        if not leaf.numel():
            return "an empty part of an FSDP parameter"
        _warn_of_strangers(leaf)
    if shards and (handle := shards.get(leaf.untyped_storage().data_ptr())) is not None:
        return f"part {handle.rank} of {handle.world_size} of an FSDP parameter"
    if not marks:
        return ""
    if "ds_id" in marks and getattr(marks.get("ds_status"), "name", "") != "AVAILABLE":
        whole = list(marks.get("ds_shape", ()))
        raise TypeError(
            f"parameter of ZeRO-3, of whose {whole} elements this rank has none at hand; average inside "
            f"deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)"
        )
    if marks.get("tensor_model_parallel", False):
        return _of_tensor_parallelism(marks)
    return ""


def _of_tensor_parallelism(marks: Mapping[str, Any]) -> str:
    """Return the place along the dimension that Megatron-LM, or whoever marks as it does, has cut."""
    along = f"along dimension {marks.get('partition_dim', '?')}"
    parallel: Any = sys.modules.get("megatron.core.parallel_state")
    if parallel is None or not parallel.model_parallel_is_initialized():
        raise TypeError(
            f"tensor-parallel shard (tensor_model_parallel=True, cut {along}), and nothing says which; over a group "
            f"whose ranks all hold the same shard pass parameter.detach(), which carries no mark"
        )
    rank, size = parallel.get_tensor_model_parallel_rank(), parallel.get_tensor_model_parallel_world_size()
    return f"part {rank} of {size} {along} of a tensor-parallel parameter" if size > 1 else ""


def _fsdp_shards() -> dict[int, Any]:
    """Return {where a shard's memory begins: the handle of FSDP1 that it belongs to}.

    While parameters are summoned they lie elsewhere, and are whole. The memory tells, where the mark that FSDP leaves
    on parameters does not: it stays while they are summoned, and ``detach()`` and ``data`` do not have it.
    """
    flat_param = sys.modules.get("torch.distributed.fsdp._flat_param")
    if flat_param is None:
        return {}
    shards = {}
    for handle in list(_handles(flat_param.FlatParamHandle)):
        flat = handle.flat_param
        if handle.uses_sharded_strategy and handle.world_size > 1:
            shard = getattr(flat, "_local_shard", flat)  # which is there from the first forward pass on
            grads = [flat.grad, getattr(flat, "_saved_grad_shard", None), getattr(flat, "_cpu_grad", None)]
            for held in (shard, *grads):
                if held is not None and held.numel():
                    shards[held.untyped_storage().data_ptr()] = handle
    return shards


def _warn_of_strangers(leaf: Any) -> None:
    """Warn of a parameter of FSDP1 of which no handle is known, such as one from before ``gc.freeze()``."""
    flat_param: Any = sys.modules["torch.distributed.fsdp._flat_param"]
    for handle in list(_handles(flat_param.FlatParamHandle)):
        if any(leaf is param for param in getattr(handle.flat_param, "_params", None) or ()):
            return
    warnings.warn(
        f"average: a parameter of FSDP of shape {list(leaf.shape)}, of which cannot be told whether it is whole. If it "
        f"is a shard, average inside FullyShardedDataParallel.summon_full_params(module).",
        stacklevel=2,
    )


@functools.cache
def _handles(kind: type[Any]) -> weakref.WeakSet[Any]:
    """Return FSDP1's handles, those to come included: torch keeps no list of them. Private to torch; release 2.13."""
    made: weakref.WeakSet[Any] = weakref.WeakSet(known for known in gc.get_objects() if issubclass(type(known), kind))
    initialise = kind.__init__

    @functools.wraps(initialise)
    def noted(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        made.add(self)

    kind.__init__ = noted
    return made

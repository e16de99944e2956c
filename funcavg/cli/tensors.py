"""What torch has saved: the object in a file, mapped, and the memory of its tensors as NumPy sees it."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import optree

from funcavg._memory import PAGE, let_go_of_pages
from funcavg._trees import family_of

__all__ = ["Saved", "between", "load", "memory_of", "overlapping", "read", "rest_of", "write"]

Memory = npt.NDArray[Any]
AT_ONCE = 2 << 20  # bytes of a file that a look at any of them may bring into memory
WEIGHTS = ("state_dict", "model", "model_state_dict")  # where trainers' checkpoints hold the model's arrays


class Saved(NamedTuple):
    """A file: all of its object, and of its weights the tensors and what is none, by name."""

    held: Any
    tensors: dict[str, Any]
    others: dict[str, Any]
    tied: dict[str, str]  # tensors that are other tensors' memory, by the first one's name
    mapped: list[tuple[int, int]]  # where the file lies in memory; nowhere if it has been read as a whole

    def let_go(self, begin: int, end: int) -> None:
        """Let the file's pages around a place in memory go. Nothing may have been written to them."""
        for first, last in self.mapped:
            near, far = max(first, begin // AT_ONCE * AT_ONCE), min(last, -(-end // AT_ONCE) * AT_ONCE)
            if near < far:
                let_go_of_pages(near, far - near)


def load(path: Path) -> Saved:
    """Map a file, unless its format is the one before torch 1.6; raise ValueError for what is no tree of tensors."""
    import torch

    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        raise ValueError(
            f"torch.load(weights_only=True) takes tensors in containers, such as a state_dict, and fails here with "
            f"{type(error).__name__}: {_reason(error)}"
        ) from error
    tensors, others, tied, places = {}, {}, {}, dict[Any, str]()
    paths, leaves, _ = optree.tree_flatten_with_path(_weights(held))
    for keys, leaf in zip(paths, leaves, strict=True):
        name = ".".join(map(str, keys))
        if name in tensors or name in others:
            raise ValueError(f"two of its leaves are called {name!r}")
        if not isinstance(leaf, torch.Tensor):
            others[name] = leaf
            continue
        tensors[name] = leaf
        if leaf.layout == torch.strided and leaf.numel():
            place = (leaf.untyped_storage().data_ptr(), leaf.storage_offset(), leaf.dtype, leaf.shape, leaf.stride())
            first = places.setdefault(place, name)
            if first != name:
                tied[name] = first
    return Saved(held, tensors, others, tied, _mapped([place[0] for place in places]))


def rest_of(saved: Saved) -> list[tuple[int, int]]:
    """Return whole pages of the mapped file that hold no weights, such as an optimizer's state: nobody writes there."""
    import torch

    everything = [leaf for leaf in optree.tree_leaves(saved.held) if isinstance(leaf, torch.Tensor)]
    weights = {tensor.untyped_storage().data_ptr() for tensor in saved.tensors.values()}
    spans = {}
    for storage in (leaf.untyped_storage() for leaf in everything if leaf.layout == torch.strided):
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        if begin not in weights and any(first <= begin and end <= last for first, last in saved.mapped):
            spans[begin] = end
    pages = [(-(-begin // PAGE) * PAGE, end // PAGE * PAGE) for begin, end in spans.items()]
    return [(begin, end) for begin, end in pages if begin < end]


def _reason(error: Exception) -> str:
    """Return what torch says, without its page of advice, which tells users to load the file unsafely."""
    said = re.search(r"WeightsUnpickler error: (.*?)(?:\. Please|\n|$)", str(error))
    return said[1] if said else str(error).strip().partition("\n")[0].partition(". ")[0]


def _weights(held: Any) -> Any:
    """Return the part that is the model's: the dict under one of `WEIGHTS` that has tensors in it, or all."""
    import torch

    found = [
        key
        for key in WEIGHTS
        if isinstance(held, dict)
        and isinstance(held.get(key), dict)
        and any(isinstance(leaf, torch.Tensor) for leaf in optree.tree_leaves(held[key]))
    ]
    if len(found) > 1:
        raise ValueError(f"it has arrays under {' and '.join(map(repr, found))}: save the one that is meant")
    return held[found[0]] if found else held


def _mapped(addresses: list[int]) -> list[tuple[int, int]]:
    """Return the mapped files among this process's memory in which there is one of these addresses."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux: pages go when the system wants them
        return []
    places, found = np.sort(np.array(addresses, np.uint64)), []
    for line in lines:
        span, _, _, _, inode, *_ = line.split()
        begin, end = (int(number, 16) for number in span.split("-"))
        first, last = np.searchsorted(places, np.array([begin, end], np.uint64))
        if inode != "0" and first < last:
            found.append((begin, end))
    return found


def memory_of(tensor: Any) -> Memory:
    """View a tensor's memory as integers of its width, complex numbers as pairs; TypeError for what is not dense."""
    family = family_of(tensor)
    family.describe(tensor)
    if tensor.is_conj() or tensor.is_neg():  # writing to its memory would not be writing to it
        raise TypeError("lazily conjugated view (save leaf.resolve_conj().resolve_neg())")
    memory: Memory = family.as_numpy(tensor)
    return memory


def between(memory: Memory, begin: int, end: int) -> npt.NDArray[np.uint8]:
    """Return some bytes of a tensor, counted in the order of its elements; where they lie, if it is contiguous."""
    part = slice(begin // memory.itemsize, end // memory.itemsize)
    values: Memory = memory.reshape(-1)[part] if memory.flags.c_contiguous else memory.flat[part]
    return values.view(np.uint8)


def read(memory: Memory, saved: Saved, begin: int, end: int) -> npt.NDArray[np.uint8]:
    """Return the same bytes of a tensor of a mapped file, which are in memory but once."""
    found = between(memory, begin, end)
    if saved.mapped:
        apart = not memory.flags.c_contiguous  # and `found` is a copy already
        touched = _span(memory if apart else found)
        found = found if apart else found.copy()
        saved.let_go(*touched)
    return found


def write(memory: Memory, begin: int, part: npt.NDArray[np.uint8]) -> None:
    """Put some bytes where `between` finds them."""
    values = part.view(memory.dtype)
    begin //= memory.itemsize
    flat = memory.reshape(-1) if memory.flags.c_contiguous else memory.flat
    flat[begin : begin + len(values)] = values


def overlapping(memories: dict[str, Memory]) -> list[str]:
    """Return the names of those that share memory with another, or of whose elements several are one."""
    spans = [(*_span(memory), name) for name, memory in memories.items() if memory.size]
    found, cluster, furthest = list[str](), list[str](), 0
    for begin, end, name in sorted(spans):
        if begin >= furthest:
            found += cluster if len(cluster) > 1 else []
            cluster = []
        cluster.append(name)
        furthest = max(furthest, end)
    found += cluster if len(cluster) > 1 else []
    return found + [name for name, memory in memories.items() if 0 in memory.strides and name not in found]


def _span(memory: Memory) -> tuple[int, int]:
    begin = memory.__array_interface__["data"][0]
    reach = sum((extent - 1) * step for extent, step in zip(memory.shape, memory.strides, strict=True))
    return begin, begin + reach + memory.itemsize

"""What is timed: each row is one way to average the same tree, on ranks that all do it at once."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import funcavg
from funcavg.cli.environment import has
from funcavg.cli.jobs import Job, MPIJob
from funcavg.cli.trees import Spec, arrays

__all__ = ["ALONE", "BASES", "EACH", "FLOOR", "NOTHING", "OURS", "RAW", "THEIRS", "Row", "make_rows", "node_setting"]

NOTHING, FLOOR, ALONE = "nothing but the barriers", "memcpy", "memcpy, rank 0 alone"
BASES = (NOTHING, FLOOR, ALONE)  # rows that average nothing
RAW, EACH, THEIRS = "one all-reduce of a flat buffer", "one all-reduce per leaf", "torch's averager"
OURS, SHIM = "funcavg, donate", "funcavg's PeriodicModelAverager"


class Row(NamedTuple):
    """One way."""

    name: str
    run: Callable[[], Any]
    group: Any = None  # funcavg counts what it sends over a group
    sends: int = 0  # bytes that others send, by computation
    node: str | None = None  # what FUNCAVG_NODE is while the group meets, at the first call


def make_rows(job: Job, spec: Spec, args: Any, resources: ExitStack) -> tuple[list[Row], list[str]]:
    """Return the rows that this job can run, and why others are missing or different."""
    notes: list[str] = []
    tree = arrays(spec, args.leaves, args.device)
    rows = [*_baselines(job, spec, notes), *_torchs_averager(job, spec, args, resources, notes)]
    if args.leaves == "torch":
        rows.append(_shim(job, tree))
    nodes: dict[str | None, str] = {None: ""}
    if args.device == "cpu":  # NCCL sees to what ranks of one host share
        nodes["off"] = ", FUNCAVG_NODE=off"
    for node, where in nodes.items():
        for donate in (False, True) if args.leaves != "jax" else (False,):
            name = f"funcavg{', donate' if donate else ''}{where}"
            rows.append(_ours(job, name, tree, args.leaves, node=node, donate=donate))
    for wire in dict.fromkeys(args.wire):
        donate = args.leaves != "jax"
        name = f"funcavg{', donate' if donate else ''}{nodes.get('off', '')}, {wire}"
        rows.append(_ours(job, name, tree, args.leaves, node="off", donate=donate, wire=wire))
    if args.wire:
        notes.append(
            f"over a wire ({', '.join(dict.fromkeys(args.wire))}) as if each rank were on a host of its own "
            f"(FUNCAVG_NODE=off): within a host, a wire changes nothing"
        )
    if args.leaves == "jax":
        rows += _in_jit(job, spec, tree, notes)
    return rows, notes


def _ours(job: Job, name: str, tree: dict[str, Any], leaves: str, *, node: str | None, **options: Any) -> Row:
    """Return a row of `funcavg.average`, over a group of its own."""
    group = job.group()
    call = functools.partial(funcavg.average, tree, group, **options)
    return Row(name, _until_ready(call) if leaves == "jax" else call, group, node=node)


def _ring(job: Job, nbytes: int) -> int:
    """Return what each rank sends when a ring of them all-reduces a buffer."""
    return 2 * (job.size - 1) * nbytes // job.size


def _baselines(job: Job, spec: Spec, notes: list[str]) -> list[Row]:
    """Rows that bound what can be had: nothing, copies of the tree's bytes, the library's own all-reduce."""
    flats = {dtype: job.buffer(numel, dtype) for dtype, numel in spec.numel().items()}
    targets = {dtype: job.buffer(numel, dtype) for dtype, numel in spec.numel().items()}

    def copy() -> None:
        for dtype, flat in flats.items():
            targets[dtype][...] = flat

    rows = [Row(NOTHING, lambda: None), Row(FLOOR, copy), Row(ALONE, copy if job.rank == 0 else lambda: None)]
    if unknown := [dtype for dtype in flats if not job.sums(dtype)]:
        notes.append(
            f"{job.library} has no sum of {' and '.join(unknown)}, so there is no plain all-reduce of this tree"
        )
        return rows
    if len(flats) > 1:
        notes.append(f"a flat buffer for each dtype: {', '.join(flats)}")
    views, offsets = [], dict.fromkeys(flats, 0)
    for leaf in spec.leaves.values():
        start = offsets[leaf.dtype]
        offsets[leaf.dtype] = start + math.prod(leaf.shape)
        views.append(flats[leaf.dtype][start : offsets[leaf.dtype]])

    def reduce(buffers: Iterable[Any]) -> None:
        for buffer in buffers:
            job.all_reduce(buffer)

    ring = _ring(job, spec.nbytes)
    rows.append(Row(RAW, functools.partial(reduce, flats.values()), sends=ring))
    rows.append(Row(EACH, functools.partial(reduce, views), sends=ring))
    return rows


def _torchs_averager(job: Job, spec: Spec, args: Any, resources: ExitStack, notes: list[str]) -> list[Row]:
    """Torch's averager, on torch tensors of its own: it makes parameters views of its flat copy."""
    odd = [dtype for dtype in spec.numel() if dtype.startswith(("complex", "float8"))]
    if not has("torch"):
        notes.append(f"{THEIRS} needs torch, which is not installed")
    elif odd:
        notes.append(f"{THEIRS} does not average {' and '.join(odd)}")
    elif isinstance(job, MPIJob) and not job.init_torch(resources):
        notes.append(f"{THEIRS} needs a job over torch.distributed where ranks are on several hosts")
    else:
        import torch
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        if isinstance(job, MPIJob):
            notes.append(f"{THEIRS} reaches the same ranks over Gloo")
        tree = arrays(spec, "torch", args.device)
        widest = functools.reduce(torch.promote_types, [leaf.dtype for leaf in tree.values()])
        sends = _ring(job, sum(spec.numel().values()) * widest.itemsize)  # it concatenates, which promotes
        return [Row(THEIRS, _every_step(PeriodicModelAverager(period=2), tree), sends=sends)]
    return []


def _shim(job: Job, tree: dict[str, Any]) -> Row:
    group = job.group()
    averager = funcavg.PeriodicModelAverager(period=2, process_group=group)
    return Row(SHIM, _every_step(averager, tree), group)


def _every_step(averager: Any, tree: dict[str, Any]) -> Callable[[], None]:
    """Return what lets an averager average parameters that are a tree's leaves."""
    import torch

    params = [torch.nn.Parameter(leaf) for leaf in tree.values()]
    for param in params:
        param.grad = param.new_zeros(()).expand(param.shape)  # parameters without a gradient are skipped

    def run() -> None:
        averager.step = 0
        averager.average_parameters(params)

    return run


def _until_ready(fn: Callable[[], Any]) -> Callable[[], Any]:
    import jax

    return lambda: jax.block_until_ready(fn())  # type: ignore[no-untyped-call]


def _in_jit(job: Job, spec: Spec, tree: dict[str, Any], notes: list[str]) -> list[Row]:
    """Rows of compiled programs."""
    import jax

    group = job.group()
    ours = jax.jit(lambda tree: funcavg.average(tree, group))
    rows = [Row("funcavg in jit", _until_ready(lambda: ours(tree)), group)]
    if not isinstance(job, MPIJob):
        notes.append("mpi4jax's row needs an MPI job: --backend mpi")
    elif not has("mpi4jax"):
        notes.append("mpi4jax's row needs mpi4jax, which is not installed")
    else:
        import mpi4jax
        from mpi4py import MPI

        comm = job.group()
        each = functools.partial(mpi4jax.allreduce, op=MPI.SUM, comm=comm)
        theirs = jax.jit(lambda tree: jax.tree.map(each, tree))
        sends = _ring(job, spec.nbytes)
        rows.append(Row("mpi4jax.allreduce per leaf in jit", _until_ready(lambda: theirs(tree)), sends=sends))
    return rows


@contextmanager
def node_setting(node: str | None) -> Iterator[None]:
    """Set FUNCAVG_NODE for as long as a group meets; None leaves it as the user has it."""
    before = os.environ.get("FUNCAVG_NODE")
    if node is not None:
        os.environ["FUNCAVG_NODE"] = node
    try:
        yield
    finally:
        if node is not None:
            os.environ.pop("FUNCAVG_NODE")
            if before is not None:
                os.environ["FUNCAVG_NODE"] = before

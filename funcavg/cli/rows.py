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

__all__ = ["FLOOR", "OURS", "THEIRS", "Row", "make_rows"]

FLOOR, RAW, THEIRS = "memcpy", "one all-reduce of a flat buffer", "torch's averager"
OURS, SHIM = "funcavg, donate", "funcavg's PeriodicModelAverager"


class Row(NamedTuple):
    """One way."""

    name: str
    run: Callable[[], Any]
    group: Any = None  # funcavg counts what it sends over a group
    sends: int = 0  # bytes that others send, by computation
    node: str | None = None  # what FUNCAVG_NODE is while the group meets, at the first call


def make_rows(job: Job, spec: Spec, kind: str, device: str, resources: ExitStack) -> tuple[list[Row], list[str]]:
    """Return the rows that this job can run, and why others are missing."""
    notes: list[str] = []
    ring = 2 * (job.size - 1) * spec.nbytes // job.size  # what each rank of a ring sends
    rows = _baselines(job, spec, ring, notes)
    tree = arrays(spec, kind, device)
    if not has("torch"):
        notes.append(f"{THEIRS} needs torch, which is not installed")
    elif any(dtype.startswith("complex") for dtype in spec.numel()):
        notes.append(f"{THEIRS} drops imaginary parts, so it does not take part")
    elif isinstance(job, MPIJob) and not job.init_torch(resources):
        notes.append(f"{THEIRS} needs a job over torch.distributed where ranks are on several hosts")
    else:
        if isinstance(job, MPIJob):
            notes.append(f"{THEIRS} reaches the same ranks over Gloo")
        rows += _averagers(tree, ring) if kind == "torch" else _averagers(arrays(spec, "torch"), ring)[:1]
    node: str | None
    for node, where in ((None, ""), ("off", ", FUNCAVG_NODE=off")):
        for donate in (False, True) if kind != "jax" else (False,):
            group = job.group()
            run = functools.partial(funcavg.average, tree, group, donate=donate)
            rows.append(Row(f"funcavg{', donate' if donate else ''}{where}", run, group, node=node))
    if kind == "jax":
        rows += _in_jit(job, tree, ring, notes)
    return rows, notes


def _baselines(job: Job, spec: Spec, ring: int, notes: list[str]) -> list[Row]:
    """Rows that bound what can be had: a copy of the tree's bytes, and the library's own all-reduce."""
    flats = {dtype: job.buffer(numel, dtype) for dtype, numel in spec.numel().items()}
    targets = {dtype: job.buffer(numel, dtype) for dtype, numel in spec.numel().items()}
    if len(flats) > 1:
        notes.append(f"a flat buffer for each dtype: {', '.join(flats)}")

    def copy() -> None:
        for dtype, flat in flats.items():
            targets[dtype][...] = flat

    rows = [Row(FLOOR, copy)]
    if unknown := [dtype for dtype in flats if not job.sums(dtype)]:
        notes.append(
            f"{job.library} has no sum of {' and '.join(unknown)}, so there is no plain all-reduce of this tree"
        )
        return rows
    views, offsets = [], dict.fromkeys(flats, 0)
    for leaf in spec.leaves.values():
        start = offsets[leaf.dtype]
        offsets[leaf.dtype] = start + math.prod(leaf.shape)
        views.append(flats[leaf.dtype][start : offsets[leaf.dtype]])

    def reduce(buffers: Iterable[Any]) -> None:
        for buffer in buffers:
            job.all_reduce(buffer)

    rows.append(Row(RAW, functools.partial(reduce, flats.values()), sends=ring))
    rows.append(Row("one all-reduce per leaf", functools.partial(reduce, views), sends=ring))
    return rows


def _averagers(tree: dict[str, Any], ring: int) -> list[Row]:
    """Torch's averager and its stand-in, on parameters that are the tree's leaves."""
    import torch
    import torch.distributed.algorithms.model_averaging.averagers as torch_averagers

    params = [torch.nn.Parameter(leaf) for leaf in tree.values()]
    for param in params:
        param.grad = param.new_zeros(()).expand(param.shape)  # both skip parameters without a gradient

    def every_step(averager: Any) -> Callable[[], None]:
        def run() -> None:
            averager.step = 0
            averager.average_parameters(params)

        return run

    theirs, ours = torch_averagers.PeriodicModelAverager(period=2), funcavg.PeriodicModelAverager(period=2)
    group = torch.distributed.group.WORLD
    return [Row(THEIRS, every_step(theirs), sends=ring), Row(SHIM, every_step(ours), group)]


def _in_jit(job: Job, tree: dict[str, Any], ring: int, notes: list[str]) -> list[Row]:
    """Rows of compiled programs."""
    import jax

    group = job.group()

    def compiled(fn: Callable[[Any], Any]) -> Callable[[], Any]:
        jitted = jax.jit(fn)
        return lambda: jax.block_until_ready(jitted(tree))  # type: ignore[no-untyped-call]

    rows = [Row("funcavg in jit", compiled(lambda tree: funcavg.average(tree, group)), group)]
    if not isinstance(job, MPIJob):
        notes.append("mpi4jax's row needs an MPI job: --backend mpi")
    elif not has("mpi4jax"):
        notes.append("mpi4jax's row needs mpi4jax, which is not installed")
    else:
        import mpi4jax
        from mpi4py import MPI

        comm = job.group()
        each = functools.partial(mpi4jax.allreduce, op=MPI.SUM, comm=comm)
        rows.append(
            Row("mpi4jax.allreduce per leaf in jit", compiled(lambda tree: jax.tree.map(each, tree)), sends=ring)
        )
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

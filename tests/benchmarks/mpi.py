"""How long does averaging take over MPI, and against what? Rows go in turns, so that drift hits all alike.

OMP_NUM_THREADS=1 mpiexec -n 2 python -m mpi4py tests/benchmarks/mpi.py [--turns 15] [--tree T]
    [--nodes N] [--memory] [--rows ROW ...]

With mpi4jax installed, its all-reduce of every leaf in `jit` is a row, too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
import torch
from common import TREES, arguments, in_turns, show, show_memory
from mpi4py import MPI

import funcavg


def average_with(node: str, comm: MPI.Comm, tree: Any) -> Callable[[], Any]:
    """Return a call over a communicator of its own, whose ranks meet as ``FUNCAVG_NODE`` says."""
    os.environ["FUNCAVG_NODE"] = node
    group = comm.Dup()
    funcavg.average(tree, group, donate=True)
    return lambda: funcavg.average(tree, group, donate=True)


def with_mpi4jax(comm: MPI.Comm, tree: Any) -> dict[str, Callable[[], Any]]:
    """Return the row of mpi4jax, which sums and does not divide, where it is installed."""
    if importlib.util.find_spec("mpi4jax") is None:
        return {}
    import mpi4jax

    def total(leaf: Any) -> Any:
        return mpi4jax.allreduce(leaf, op=MPI.SUM, comm=comm)

    in_jit = jax.jit(lambda tree: jax.tree.map(total, tree))
    return {"mpi4jax.allreduce per leaf in jit": lambda: jax.block_until_ready(in_jit(tree))}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, default=1, help="share the ranks among so many virtual nodes")
    parser.add_argument("--rows", nargs="+", help="time only rows whose name holds one of these words")
    args = parser.parse_args()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    node = str(comm.rank * args.nodes // comm.size)
    shapes = TREES[args.tree]()
    if args.memory:
        os.environ["FUNCAVG_NODE"] = node
        show_memory(comm, comm.rank, shapes)
        return
    tree = {f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}
    halves = {name: leaf.bfloat16() for name, leaf in tree.items()}
    flat = torch.cat([leaf.reshape(-1) for leaf in tree.values()])
    other = torch.empty_like(flat)
    reduced = flat.numpy()
    donating = average_with(node, comm, tree)
    group = comm.Dup()
    jax_tree = {name: jax.numpy.asarray(leaf.numpy()) for name, leaf in tree.items()}
    jax_group, jit_group, mpi4jax_group = comm.Dup(), comm.Dup(), comm.Dup()
    in_jit = jax.jit(lambda tree: funcavg.average(tree, jit_group))
    timed = {
        "memcpy": lambda: other.copy_(flat),
        "MPI.Allreduce": lambda: comm.Allreduce(MPI.IN_PLACE, reduced),
        "funcavg, donate": donating,
        "funcavg": lambda: funcavg.average(tree, group),
        "funcavg, donate, bfloat16": average_with(node, comm, halves),
        "funcavg, JAX leaves": lambda: funcavg.average(jax_tree, jax_group),
        "funcavg, JAX leaves in jit": lambda: jax.block_until_ready(in_jit(jax_tree)),
        **with_mpi4jax(mpi4jax_group, jax_tree),
        "funcavg, donate, FUNCAVG_NODE=off": average_with("off", comm, tree),
    }
    if args.rows:
        timed = {name: run for name, run in timed.items() if name == "memcpy" or any(row in name for row in args.rows)}
    os.environ["FUNCAVG_NODE"] = node
    times = in_turns(timed, comm.Barrier, args.turns)
    if comm.rank == 0:
        library = MPI.Get_library_version().split()[:3]
        ranks = f"{comm.size} ranks in {args.nodes} node(s)"
        title = f"{args.tree}, {ranks}, {' '.join(library)}, medians of {args.turns} turns"
        baselines = {
            "/memcpy": "memcpy",
            "/Allreduce": "MPI.Allreduce",
            "/mpi4jax": "mpi4jax.allreduce per leaf in jit",
        }
        show(title, times, {heading: row for heading, row in baselines.items() if row in times})


if __name__ == "__main__":
    main()

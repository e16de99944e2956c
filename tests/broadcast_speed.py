"""How long a broadcast takes, beside torch's and the floor, in turns: ResNet-50's 102 MB on two ranks of this host.

As a script it prints a table: medians in units of a memcpy of the tree by all ranks at once. ``--mpi`` takes MPI ranks
(run it by ``mpiexec -n 2``). The last line is the speed of `funcavg.differences` on one core.
"""

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing import get_context

import torch
import torch.distributed as dist

from funcavg import broadcast
from funcavg._engine.digests import digests_of
from funcavg._trees import Options, flatten, make_request
from funcavg.cli.trees import read

RANKS, TURNS = 2, 15


def ways_of(group_of, mpi):
    """Return {name: what to time}, on trees of their own."""
    tree = {name: torch.rand(leaf.shape) for name, leaf in read("resnet50").leaves.items()}
    source, target = torch.rand(25_557_032), torch.rand(25_557_032)

    def each():
        for leaf in tree.values():
            mpi.Bcast(leaf.numpy()) if mpi else dist.broadcast(leaf, 0)

    def each_under_way():  # as Horovod's broadcast_parameters
        if mpi:
            from mpi4py import MPI

            MPI.Request.Waitall([mpi.Ibcast(leaf.numpy()) for leaf in tree.values()])
        else:
            for work in [dist.broadcast(leaf, 0, async_op=True) for leaf in tree.values()]:
                work.wait()

    def ours(node, **options):
        os.environ["FUNCAVG_NODE"] = node
        group = group_of()
        broadcast(tree, group, **options)
        return lambda: broadcast(tree, group, **options)

    return {
        "memcpy": lambda: target.copy_(source),
        "one broadcast per leaf": each,
        "the same, all under way at once": each_under_way,
        "funcavg.broadcast, donate": ours("one", donate=True),
        "funcavg.broadcast": ours("one"),
        "funcavg.broadcast, donate, FUNCAVG_NODE=off": ours("off", donate=True),
        "funcavg.broadcast, FUNCAVG_NODE=off": ours("off"),
    }


def work(rank, path=None):
    """Be a rank."""
    torch.set_num_threads(1)
    mpi = None
    if path is None:
        from mpi4py import MPI

        mpi = MPI.COMM_WORLD
        rank, barrier, ways = mpi.rank, mpi.Barrier, ways_of(mpi.Dup, mpi)
    else:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=RANKS)
        barrier, ways = dist.barrier, ways_of(dist.new_group, None)
    times = {name: [] for name in ways}
    for turn in range(TURNS + 2):
        for name, way in ways.items():
            barrier()
            start = time.perf_counter()
            way()
            barrier()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        floor = statistics.median(times["memcpy"])
        print("| way | ms | in memcpys |\n|---|--:|--:|")
        for name, found in times.items():
            print(f"| {name} | {statistics.median(found):.1f} | {statistics.median(found) / floor:.2f} |")
    barrier()


def speed_of_differences(nbytes=500_000_000):
    """Return in GB/s how fast a tree is read, of ResNet-50's leaves over and over."""
    leaves = read("resnet50").leaves.values()
    tree = [torch.rand(leaf.shape) for _ in range(nbytes // 102_000_000 + 1) for leaf in leaves]
    request, found = make_request(flatten(tree), Options(purpose="differences")), []
    for _ in range(5):
        start = time.perf_counter()
        digests_of(request)
        found.append(time.perf_counter() - start)
    return sum(leaf.nbytes for leaf in tree) / 1e9 / statistics.median(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mpi", action="store_true")
    if parser.parse_args().mpi:
        work(0)
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        with tempfile.TemporaryDirectory() as folder:
            context = get_context("spawn")
            ranks = [context.Process(target=work, args=(rank, f"{folder}/store")) for rank in range(RANKS)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
        torch.set_num_threads(1)
        print(f"differences: {speed_of_differences():.1f} GB/s")

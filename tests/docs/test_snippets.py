"""Code that the documentation shows without `>>>`, which doctest does not see, does what it says."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import skip_without, torch
from helpers.pages import LOST, PAGES, ROOT, blocks

import funcavg

README, HPC = blocks(ROOT / "README.md"), blocks(ROOT / "docs" / "hpc.md")


def test_there_is_no_other_such_code():
    pages = ("README.md", "hpc.md", "lost-workers.md")
    elsewhere = {page.name: blocks(page) for page in PAGES if page.name not in pages}
    assert not any(elsewhere.values()), elsewhere
    assert (len(README), len(HPC), len(LOST)) == (3, 4, 3)  # the first of the README is in test_examples.py


def test_an_axis_name():
    skip_without("jax")
    code = f"""
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from funcavg import average
mesh = Mesh(jax.devices(), ("data",))
params = {{"w": jnp.arange(4.0)}}
{README[1]}
print(params["w"].tolist())
"""
    environ = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environ)
    assert done.stdout == "[1.0, 2.0, 1.0, 2.0]\n", done.stderr


def test_workers_that_torchrun_starts_again(tmp_path):
    """The store is torchrun's, and still has the addresses of those that were there before."""
    skip_without("torch")
    job = tmp_path / "job.py"
    job.write_text(f"""
import os, signal, sys
import torch.distributed as dist
from funcavg import PeerLostError, average
{LOST[2]}
if restarts == "0" and os.environ["RANK"] == "1":
    average(0.0)
    os.kill(os.getpid(), signal.SIGKILL)
try:
    for _ in range(2):
        mean = average(float(os.environ["RANK"]), timeout=20)
except PeerLostError:
    sys.exit(1)
os.write(1, f"restart {{restarts}} mean {{mean}}\\n".encode())  # whole: three ranks write
""")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "--max-restarts=1", str(job)]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout.count("restart 1 mean 1.0")) == (0, 3), done.stderr


@pytest.mark.parametrize("step", [15, 16])
def test_replicas_of_one_process(step):
    draw = torch.Generator().manual_seed(0)
    params, batches = {"w": torch.randn(8, 3, generator=draw)}, torch.randn(8, 5, 3, generator=draw)
    after_a_step = params["w"] - 0.1 * batches.mean(1)  # the gradient of the loss below
    job = {
        "torch": torch,
        "funcavg": funcavg,
        "average": funcavg.average,
        "should_average": funcavg.should_average,
        "loss_fn": lambda params, batch: (batch @ params["w"]).mean(),
        "params": params,
        "batches": batches,
        "step": step,
    }
    exec(README[2], job)
    expected = after_a_step.mean(0).expand(8, 3) if step == 16 else after_a_step
    torch.testing.assert_close(job["params"]["w"], expected)


def run_hpc_blocks(comm, first, split, host, threads):
    job = {"params": {"w": np.full(2, float(comm.rank))}, "replicas": 2}
    exec(first, job)
    whole = job["params"]["w"].tolist()
    job["params"] = {"w": np.full(2, float(comm.rank))}
    exec(split, job)
    exec(host, job)
    return whole, job["params"]["w"].tolist(), job["local_rank"], eval(threads.partition("#")[0].strip(), job)


@pytest.mark.mpi
def test_communicators_of_the_hpc_page():
    assert mpi.run_mpi(4, run_hpc_blocks, *HPC) == [
        ([1.5, 1.5], [0.5, 0.5] if rank < 2 else [2.5, 2.5], rank, True) for rank in range(4)
    ]

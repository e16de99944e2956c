"""Code that the documentation shows without `>>>`, which doctest does not see, does what it says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import mpi
from helpers.frameworks import skip_without, torch

import funcavg

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path):
    """Return the blocks of Python that are no doctests."""
    found = re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text(encoding="utf-8"))
    return [block for block in found if ">>>" not in block]


README, HPC = blocks(ROOT / "README.md"), blocks(ROOT / "docs" / "hpc.md")


def test_there_is_no_other_such_code():
    elsewhere = {page.name: blocks(page) for page in PAGES if page.name not in ("README.md", "hpc.md")}
    assert not any(elsewhere.values()), elsewhere
    assert (len(README), len(HPC)) == (3, 4)  # the first of the README is in test_examples.py


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

"""How long averaging six checkpoints takes, and in how much memory, beside torch loading all of them.

As a script it prints a table. ``--size`` is that of a file, in MB; ``--files`` their number.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

# The peak is VmHWM, which is ru_maxrss, but begins anew with a program: that of a large parent is not counted.
MEASURED = """
import sys, time
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 / 1e6
{imports}
begin, before = time.perf_counter(), peak()
{work}
print("measured", time.perf_counter() - begin, peak(), before)
"""
OURS = ("from funcavg.cli import main", 'main(["mean", *sys.argv[2:], "--output", sys.argv[1]])')
TORCHS = (
    "import torch, safetensors.torch as st; torch.set_num_threads(1)",
    """
trees = [LOAD(name) for name in sys.argv[2:]]
mean = {name: torch.stack([tree[name] for tree in trees]).mean(0) for name in trees[0]}
SAVE""",
)
WAYS = {
    (".safetensors", "funcavg mean"): OURS,
    (".safetensors", "torch.stack(...).mean(0)"): (
        TORCHS[0],
        TORCHS[1].replace("LOAD(name)", "st.load_file(name)").replace("SAVE", "st.save_file(mean, sys.argv[1])"),
    ),
    (".pt", "funcavg mean"): ("import torch; torch.set_num_threads(1)\n" + OURS[0], OURS[1]),
    (".pt", "torch.stack(...).mean(0)"): (
        TORCHS[0],
        TORCHS[1].replace("LOAD", "torch.load").replace("SAVE", "torch.save(mean, sys.argv[1])"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=500)
    parser.add_argument("--files", type=int, default=6)
    args = parser.parse_args()
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    print("| format | way | seconds | peak MB | before MB |\n|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".safetensors", ".pt"):
            files = [f"{folder}/{i}{suffix}" for i in range(args.files)]
            for i, path in enumerate(files):
                generator = torch.Generator().manual_seed(i)
                state = {f"w{j}": torch.rand(args.size * 12_500, generator=generator) for j in range(20)}
                save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
            for (kind, way), (imports, work) in WAYS.items():
                if kind == suffix:
                    time.sleep(1)
                    code = MEASURED.format(imports=imports, work=work)
                    command = [sys.executable, "-c", code, f"{folder}/out{suffix}", *files]
                    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
                    seconds, peak, before = map(float, done.stdout.rpartition("measured")[2].split())
                    print(f"| {suffix} | `{way}` | {seconds:.1f} | {peak:.0f} | {before:.0f} |", flush=True)
            for path in files:
                Path(path).unlink()


if __name__ == "__main__":
    main()

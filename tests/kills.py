"""Kill ranks at every named point of a call, many times, and see that the others go on right.

::

    python tests/kills.py torch --kills 200 --seed 1      # torch's own groups, and ones that are configured anew
    python tests/kills.py ulfm --kills 200 --seed 1       # where mpi4py finds Open MPI
    python tests/kills.py torchft --kills 100 --seed 1    # where torchft is installed
    python tests/kills.py ulfm --seconds 5                # how long it takes to go on, with 40 MB; torchft's, too

Each kill is a job of its own. Cases are drawn by the seed from all there are: points, moments, victims, layouts of
nodes, methods. The last line has the counts; the exit code is 1 if anything was not right. The suite runs a sample.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOMS = [path for path in Path(__file__).parent.iterdir() if path.is_dir()]
sys.path[:0] = map(str, [Path(__file__).parents[1], Path(__file__).parent, *ROOMS])

from helpers import losing, mpi  # noqa: E402
from helpers.processes import RankFailed  # noqa: E402
from tqdm import tqdm  # noqa: E402


def torch_cases():
    """Yield what to call, for torch's groups and for configured ones: three ranks."""
    import test_losing

    def run(case, kind):
        with tempfile.TemporaryDirectory() as folder:
            return test_losing.assert_all_go_on(case, kind, folder)

    for kind in ("torch", "configured"):
        yield from ((run, case, kind) for case in all_cases(3))


def ulfm_cases():
    """Yield what to call, for four ranks of Open MPI."""
    import test_ulfm

    yield from ((test_ulfm.assert_all_go_on, case) for case in all_cases(4))


def torchft_cases():
    """Yield what to call, for three replicas under torchft."""
    import test_torchft

    for node in test_torchft.NODES:
        for point in losing.ONCE + losing.PER_BUCKET:
            for at in (0,) if point in losing.ONCE else range(5):
                if (node, point) not in (("off", "published"), ("off", "attached")):
                    yield from ((test_torchft.assert_goes_on, node, point, at, victim) for victim in range(3))


def all_cases(size):
    """Return the cases of losing.py that can be: a rank that passes the point."""
    cases = [c for mode in losing.MODES for method in losing.METHODS for c in losing.cases_of(mode, method, size)]
    return [case for case in cases if losing.can_be(case, size)]


ENGINES = {"torch": torch_cases, "ulfm": ulfm_cases, "torchft": torchft_cases}


def kill(engine, kills, seed):
    """Go through so many cases; return the exit code."""
    cases = list(ENGINES[engine]())
    random.Random(seed).shuffle(cases)  # nothing secret
    counts, seconds, begin = Counter(), [], time.monotonic()
    for number in tqdm(range(kills), desc=engine, unit="kill"):
        run, *case = cases[number % len(cases)]
        try:
            seconds.append(run(*case))
            counts["right"] += 1
        except (AssertionError, RankFailed, mpi.JobFailed) as error:
            what = next((what for what in ("hangs", "no end", "left behind") if what in str(error)), "wrong")
            counts[what] += 1
            print(f"\n{what}: {case}\n{error}", flush=True)
    left = [str(path) for path in Path("/dev/shm").glob("*funcavg*")]
    left += [str(pid) for pid in mpi.children(os.getpid()) if not is_multiprocessing(pid)]
    print(
        f"{engine}: {kills} kills of {len(cases)} cases with seed {seed} in {time.monotonic() - begin:.0f} s: "
        f"{dict(counts)}; left behind: {left or 'nothing'}; the call ends within {max(seconds):.2f} s, "
        f"in the median {statistics.median(seconds):.2f} s"
    )
    return int(counts["right"] != kills or bool(left))


def is_multiprocessing(pid):
    """Say whether a process is multiprocessing's own, which stays, and not one that a job has left."""
    command = Path(f"/proc/{pid}/cmdline")
    return not command.exists() or b"multiprocessing" in command.read_bytes()


def measure(engine, runs):
    """Print the seconds from a kill to the next right mean, of 40 MB."""
    if engine == "ulfm":
        import test_ulfm

        print("3 ranks under ULFM, seconds from the kill to the next right mean:", test_ulfm.seconds_to_go_on(runs))
    if engine == "torchft":
        import test_torchft

        for name, seconds in test_torchft.seconds_to_go_on(runs).items():
            print(f"torchft, {name}: {' '.join(f'{second:.2f}' for second in seconds)} s")
    return 0


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, metavar="RUNS", help="measure instead, in so many runs")
    args = parser.parse_args()
    return measure(args.engine, args.seconds) if args.seconds else kill(args.engine, args.kills, args.seed)


if __name__ == "__main__":
    sys.exit(main())

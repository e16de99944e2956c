"""Merge results of ``funcavg bench --json`` over several libraries into one table: is funcavg ahead of each row?

::

    python tests/compare.py mpich.json openmpi.json intel.json --plot compared.svg
    python tests/compare.py run mpich/bin/python openmpi/bin/python intel/bin/python --tree resnet50 --turns 15

One environment holds one MPI, so each library needs a run of its own; ``run`` makes them, one after the other, with the
Python of each environment, in so many ``--rounds``. Several results of one library are rounds: their turns are pooled.

A row's time is its median, in units of the memcpy of its own run. funcavg is ahead of a row if the upper quartile of
its times is below the row's lower one; behind, the other way round; even, if the middle halves of both overlap.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from funcavg.cli import machine, report
from funcavg.cli.environment import CliError, unlaunched
from funcavg.cli.rows import BASES, FLOOR, NOTHING, OURS

SAME = {  # what results must have in common: how to find it, and what decides it
    "tree": (lambda result: result["tree"]["name"], "--tree"),
    "dtypes": (lambda result: ", ".join(result["tree"]["dtypes"]), "--dtype"),
    "bytes": (lambda result: result["tree"]["bytes"], "--tree"),
    "kind of leaves": (lambda result: result["kind"], "--leaves"),
    "device": (lambda result: result["device"], "--device"),
    "number of ranks": (lambda result: result["ranks"], "--ranks"),
    "processor": (lambda result: result["machine"]["model"], "machine"),
    "kernel": (lambda result: result["machine"]["kernel"], "FUNCAVG_KERNEL"),
    "release of funcavg": (lambda result: result["funcavg"], "funcavg"),
}
MEASURES = (OURS, "funcavg", "funcavg in jit")  # what rows are compared with
PASSED = {"tree": "resnet50", "dtype": None, "leaves": None, "ranks": 2, "turns": 15}  # to the bench, by `run`
AHEAD, BEHIND, EVEN = "ahead", "behind", "even"


def read(path):
    """Return the result in a file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CliError(f"{path}: cannot be read as JSON ({error}): take what `funcavg bench --json` prints") from error
    try:
        names = [row["name"] for row in result["rows"] if row["turns_ms"]]
        described = [result["library"], result["machine"]["load"], *(find(result) for find, _ in SAME.values())]
    except (KeyError, TypeError, IndexError) as error:
        raise CliError(f"{path}: no result of this release's `funcavg bench --json`: it lacks {error}") from error
    if FLOOR not in names or described[0] is None:
        raise CliError(f"{path}: expected a row {FLOOR!r}, whose time is the unit, got {', '.join(names) or 'none'}")
    return result


def merge(results):
    """Return {library: {row: milliseconds of every turn}} of results by their file's name.

    Of several runs of a library, times are as if each run's memcpy had taken as long as that of the first.
    """
    (first, one), *others = results.items()
    for name, other in others:
        for what, (find, cure) in SAME.items():
            if find(one) != find(other):
                raise CliError(
                    f"{first} and {name} differ in their {what}: {find(one)} and {find(other)}; measure both with the "
                    f"same {cure}"
                )
    libraries, units = {}, {}
    for result in results.values():
        pooled = libraries.setdefault(result["library"], {})
        unit = next(statistics.median(row["turns_ms"]) for row in result["rows"] if row["name"] == FLOOR)
        scale = units.setdefault(result["library"], unit) / unit
        for row in result["rows"]:
            pooled.setdefault(row["name"], []).extend(scale * time for time in row["turns_ms"])
    return libraries


def quartiles(times):
    """Return the lower quartile, the median, and the upper quartile."""
    return statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [*times] * 3


def verdict(ours, theirs):
    """Say whether funcavg is ahead, of the times of two rows."""
    (our_low, _, our_high), (low, _, high) = quartiles(ours), quartiles(theirs)
    return AHEAD if our_high < low else BEHIND if our_low > high else EVEN


def verdicts(rows, ours):
    """Return {row of others: verdict} for one of funcavg's rows, if it was timed."""
    theirs = [name for name in rows if name not in BASES and not name.startswith("funcavg")]
    return {name: verdict(rows[ours], rows[name]) for name in theirs} if ours in rows else {}


def table(libraries):
    """Return the table: a line for each library and row."""
    measures = [name for name in MEASURES if any(name in rows for rows in libraries.values())]
    lines = []
    for library, rows in libraries.items():
        found = {ours: verdicts(rows, ours) for ours in measures}
        for name, times in rows.items():
            median = statistics.median(times)
            line = [library, name, report.milliseconds(median), f"{median / statistics.median(rows[FLOOR]):.2f}"]
            for ours in measures:
                ratio = f"{median / statistics.median(rows[ours]):.2f}" if ours in rows else "–"
                line += [ratio, found[ours].get(name, "–")]
            lines.append(line)
    heading = ["library", "row", "ms", "x memcpy"]
    for ours in measures:
        heading += [f"/ {ours}", "it is"]
    return report.table(heading, lines, "<<>>" + "><" * len(measures))


def sentences(libraries):
    """Say of each library which rows are not behind funcavg."""
    for library, rows in libraries.items():
        ours = next((name for name in MEASURES if name in rows), None)
        if ours is None:
            yield f"{library}: nothing of funcavg was timed."
            continue
        found = verdicts(rows, ours)
        said = [
            f"{word} {', '.join(names)}"
            for state, word in ((AHEAD, "ahead of"), (EVEN, "even with"), (BEHIND, "behind"))
            if (names := [name for name in found if found[name] == state])
        ]
        yield f"{library}: {ours} is {'; '.join(said) or 'alone'}."


def text(results, libraries, markdown):
    """Return the report."""
    (first, *_), few = results.values(), min(len(rows[FLOOR]) for rows in libraries.values())
    what = report.title(first).partition(";")[0]
    told = (
        f"{what}; {machine.count(first['ranks'], 'rank')}. ms: medians of {machine.count(few, 'turn')} or more. "
        f"x memcpy: in units of the same run's memcpy. / NAME: how many times as long as NAME takes, and whether it is "
        f"ahead (its upper quartile is below the row's lower one), behind (the other way round), or even."
    )
    if markdown:
        return "\n\n".join([table(libraries), f"*{told}*", *sentences(libraries)])
    machines = []
    for name, result in results.items():
        machines += ["", f"{name}: {result['library']}", *machine.lines(result["machine"], result["memcpy_GB_per_s"])]
    return "\n".join([told, "", table(libraries), "", *sentences(libraries), *machines])


def plot(path, title, libraries):
    """Draw what each row takes in units of memcpy: a group of bars for each row, a bar for each library."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for rows in libraries.values() for name in rows if name != NOTHING))
    figure = Figure(figsize=(9, 1.5 + 0.25 * len(names) * (len(libraries) + 1)), layout="constrained")
    axes, height = figure.subplots(), 0.85 / len(libraries)
    for number, (library, rows) in enumerate(libraries.items()):
        there = [name for name in names if name in rows]
        unit = statistics.median(rows[FLOOR])
        low, median, high = zip(*[[time / unit for time in quartiles(rows[name])] for name in there], strict=True)
        spread = [[b - a for a, b in zip(low, median, strict=True)], [b - a for a, b in zip(median, high, strict=True)]]
        places = [names.index(name) + height * (number - (len(libraries) - 1) / 2) for name in there]
        bars = axes.barh(places, median, height, xerr=spread, label=library, ecolor="#444444", capsize=2)
        axes.bar_label(bars, [f" {value:.3g}" for value in median], padding=6, fontsize="small")
    axes.set_yticks(range(len(names)), names)
    axes.axvline(1, color="#444444", linewidth=1, linestyle=":")
    axes.set_xscale("log")  # a collective for each of a thousand leaves takes hundreds of memcpys
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("memcpys: median, and the middle half of the turns")
    axes.legend()
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def measure(python, options):
    """Run a bench over MPI with this Python; return its result."""
    if not Path(python).exists():
        raise CliError(f"{python}: no such file; expected the Python of an environment that holds an MPI library")
    environ = {name: value for name, value in unlaunched(os.environ).items() if name != "MPIEXEC"}  # each has its own
    command = [python, "-m", "funcavg", "bench", "--backend", "mpi", "--json", *options]
    done = subprocess.run(  # a launcher that reads the terminal stops a command in the background
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CliError(f"{python}: the bench has failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    for begin in (at for at, letter in enumerate(done.stdout) if letter == "{"):  # some libraries greet
        with contextlib.suppress(ValueError):
            return json.loads(done.stdout[begin:])
    raise CliError(f"{python}: the bench has printed no result: {done.stdout.strip()[:200] or 'nothing at all'}")


def _at_least_one(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def main(argv=None):
    """Read the command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    running = argv[:1] == ["run"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="PYTHON" if running else "FILE.json")
    parser.add_argument("--markdown", action="store_true", help="only the table and its words, for docs")
    parser.add_argument("--plot", metavar="FILE", help="draw it into a .png, .svg or .pdf")
    if running:
        parser.add_argument("--rounds", type=_at_least_one, default=1, help="runs of each, by turns (default: 1)")
        parser.add_argument("--keep", type=Path, metavar="FOLDER", help="write each run's JSON into it")
        for name, default in PASSED.items():
            parser.add_argument(f"--{name}", default=default, help="as of `funcavg bench`")
    args = parser.parse_args(argv[running:])
    try:
        report.check_plot(args.plot)
        results = run(args) if running else {name: read(name) for name in args.names}
        libraries = merge(results)
    except CliError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    print(text(results, libraries, args.markdown))
    if args.plot:
        plot(args.plot, report.title(next(iter(results.values()))).partition(";")[0], libraries)
    return 0


def run(args):
    """Run a bench with each Python, round by round; return the results."""
    options = [f"--{name}={value}" for name in PASSED if (value := getattr(args, name)) is not None]
    results = {}
    for number, python in itertools.product(range(args.rounds), args.names):
        result = measure(python, options)
        results[f"round {number + 1} of {python}"] = result
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            name = f"{len(results):02d}-{'-'.join(result['library'].split())}.json"
            (args.keep / name).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return results


if __name__ == "__main__":
    sys.exit(main())

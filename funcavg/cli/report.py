"""How results are shown: a table that is Markdown too, a sentence, a plot; and before them, how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from funcavg.cli import machine
from funcavg.cli.environment import CliError, has
from funcavg.cli.rows import EACH, FLOOR, NOTHING, OURS, RAW, THEIRS

__all__ = ["check_plot", "milliseconds", "plot", "progress", "sentence", "table", "text", "title"]


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Return a Markdown table whose columns are aligned, ``<`` or ``>``.

    >>> print(table(["what", "ms"], [["memcpy", "9.5"], ["average", "31.0"]], "<>"))
    | what    |   ms |
    |---------|-----:|
    | memcpy  |  9.5 |
    | average | 31.0 |
    """
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    rule = "|" + "|".join("-" * (width + 1) + {"<": "-", ">": ":"}[a] for width, a in zip(widths, align, strict=True))
    lines = [
        "| " + " | ".join(f"{cell:{a}{width}}" for cell, a, width in zip(row, align, widths, strict=True)) + " |"
        for row in (heading, *rows)
    ]
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def plot(path: str, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Draw the medians as bars, with the spread of their turns."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["name"] != NOTHING]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names, medians = [row["name"] for row in rows], [row["median_ms"] for row in rows]
    around = [[row["median_ms"] - row["quartiles_ms"][0] for row in rows]]
    around.append([row["quartiles_ms"][1] - row["median_ms"] for row in rows])
    ours = ["#1f77b4" if name.startswith("funcavg") else "#aaaaaa" for name in names]
    bars = axes.barh(names, medians, xerr=around, color=ours, ecolor="#444444", capsize=3)
    axes.bar_label(bars, [f" {value:.3g}" for value in medians], padding=6)
    axes.axvline(medians[names.index(FLOOR)], color="#444444", linewidth=1, linestyle=":")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds: median, and the middle half of the turns")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def check_plot(path: str | None) -> None:
    """Raise CliError now, rather than after minutes, if no plot could be saved."""
    if path is None:
        return
    if not has("matplotlib"):
        raise CliError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise CliError(f"--plot {path}: the name must end with one of .{', .'.join(sorted(known))}")
    if not Path(path).absolute().parent.is_dir():
        raise CliError(f"--plot {path}: there is no such folder")


def title(result: dict[str, Any]) -> str:
    """Return what was measured, where, in a line."""
    tree = result["tree"]
    count, size = tree["leaves"], tree["bytes"]
    amount = f"{size / 1e6:.3g} MB" if size >= 1e5 else f"{size} bytes"
    of = " and ".join(tree["dtypes"])
    what = f"{tree['name']}: {count} {result['kind']} {'leaf' if count == 1 else 'leaves'} of {of}, {amount}"
    device = f" on {result['device']}" if result["device"] != "cpu" else ""
    ranks, turns = machine.count(result["ranks"], "rank"), machine.count(result["turns"], "turn")
    return f"{what}{device}; {ranks}, {result['library']}; medians of {turns}"


def text(result: dict[str, Any]) -> str:
    """Return the report for people."""
    medians = {row["name"]: row["median_ms"] for row in result["rows"]}

    def ratio(row: dict[str, Any], base: str) -> str:
        return f"{row['median_ms'] / medians[base]:.2f}" if base in medians else "–"

    lines = [
        [
            row["name"],
            milliseconds(row["median_ms"]),
            milliseconds(row["quartiles_ms"][1] - row["quartiles_ms"][0]),
            f"{row['GB_per_s']:.2f}" if row["name"] != NOTHING else "–",
            ratio(row, THEIRS),
            ratio(row, FLOOR),
            f"{row['bytes_sent'] / 1e6:.1f}",
            "–" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.0f}",
        ]
        for row in result["rows"]
    ]
    heading = ["", "ms", "spread", "GB/s", "/ torch's", "/ memcpy", "MB sent", "MB extra"]
    left_out = result["tree"]["left_out"]
    notes = [
        *[row["node_stage"] for row in result["rows"] if row["node_stage"]][:1],
        *result["notes"],
        *([f"leaves of the file that are no arrays of floats, and left out: {left_out}"] if left_out else []),
    ]
    return "\n".join(
        [
            title(result),
            "",
            table(heading, lines, "<" + ">" * 7),
            "",
            "ms: median, from barrier to barrier. spread: between the quartiles. GB/s: bytes of the tree per second.",
            "MB sent, by each rank: funcavg's counted, through shared memory too; others' computed, for a ring.",
            f"{NOTHING}: what is in the times of all rows.",
            "MB extra: growth of rank 0 at its peak, in the first call.",
            *notes,
            *machine.lines(result["machine"], result["memcpy_GB_per_s"]),
            "",
            result["sentence"],
        ]
    )


def milliseconds(value: float) -> str:
    """Return a time as tables show it."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def sentence(tree: str, ranks: int, rows: Sequence[dict[str, Any]]) -> str:
    """Say in a sentence what the table shows of averaging as a loop would do it: with donation, where there is any."""
    byname = {row["name"]: row for row in rows}
    ours = byname.get(OURS) or next((row for row in rows if row["name"].startswith("funcavg")), None)
    floor = byname[FLOOR]["median_ms"]
    if ours is None:
        return f"Nothing of funcavg was timed; a memcpy of {tree} takes {milliseconds(floor)} ms."
    against = [f"{ours['median_ms'] / floor:.1f} times as long as a memcpy"]
    plain = min(
        (byname[name] for name in (RAW, EACH) if name in byname), key=lambda row: row["median_ms"], default=None
    )
    if plain is not None:
        against.append(f"{ours['median_ms'] / plain['median_ms']:.2f} times as long as {plain['name']}")
    if (theirs := byname.get(THEIRS)) is not None:
        against.append(f"{ours['median_ms'] / theirs['median_ms']:.2f} times as long as {THEIRS}")
    took = f"{milliseconds(ours['median_ms'])} ms ({ours['name']})"
    return f"Averaging {tree} over {machine.count(ranks, 'rank')} takes {took}: {_enumerated(against)}."


def _enumerated(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


@contextmanager
def progress(total: int, *, unit: str, shown: bool = True) -> Iterator[Callable[..., object]]:
    """Show a bar on a terminal, where tqdm is installed; yield what advances it, by 1 or some."""
    if not shown or not has("tqdm"):
        yield lambda _=1: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, unit_scale=unit == "B", leave=False, disable=None) as bar:
        yield bar.update

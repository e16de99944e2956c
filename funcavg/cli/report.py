"""How results are shown: a table that is Markdown too, a sentence, a plot."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funcavg.cli.launch import CliError

__all__ = ["plot", "table"]


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

    figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names, medians = [row["name"] for row in rows], [row["median_ms"] for row in rows]
    around = [[row["median_ms"] - row["quartiles_ms"][0] for row in rows]]
    around.append([row["quartiles_ms"][1] - row["median_ms"] for row in rows])
    ours = ["#1f77b4" if name.startswith("funcavg") else "#aaaaaa" for name in names]
    bars = axes.barh(names, medians, xerr=around, color=ours, ecolor="#444444", capsize=3)
    axes.bar_label(bars, [f" {value:.3g}" for value in medians], padding=6)
    axes.axvline(rows[0]["median_ms"], color="#444444", linewidth=1, linestyle=":")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds: median, and the middle half of the turns")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def check_plot(path: str | None) -> None:
    """Raise CliError now, rather than after minutes, if no plot could be saved."""
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise CliError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix[1:] not in known:
        raise CliError(f"--plot {path}: the name must end with one of .{', .'.join(sorted(known))}")
    if not Path(path).absolute().parent.is_dir():
        raise CliError(f"--plot {path}: there is no such folder")

"""What is known of the machine: processor, caches, huge pages, and how busy it is. Read where Linux says it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from funcavg._engine import kernel_in_use
from funcavg.cli.environment import CliError, cores

__all__ = ["count", "describe", "lines"]

ROOT = Path("/")


def describe(root: Path = ROOT) -> dict[str, Any]:
    """Return what a table should be read with, as this process finds it: for JSON. None: not known here."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        **_processor(_read(root / "proc/cpuinfo")),
        "cpus": os.cpu_count() or cores(),
        "cpus_of_rank_0": cores(),  # launchers may bind ranks
        "caches": _caches(root / "sys/devices/system/cpu"),
        "huge_pages": _huge_pages(_read(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        "load": _load(),
        "threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "kernel": _kernel(),
    }


def lines(machine: Mapping[str, Any], speeds: Mapping[str, float]) -> list[str]:
    """Say it in lines. ``speeds`` are of a memcpy, in GB/s, by who copies."""
    number = "" if machine["family"] is None else f" (family {machine['family']}, model {machine['number']})"
    named = [machine["system"], f"{machine['model']}{number}" if machine["model"] else "", _cores(machine)]
    said = [f"machine: {', '.join(filter(None, named))}; OMP_NUM_THREADS {machine['threads']}"]
    said.append(f"kernel: {machine['kernel']}")
    if machine["caches"]:
        said.append(f"caches: {'; '.join(map(_cache, machine['caches']))}")
    state = [f"transparent huge pages: {machine['huge_pages']}"] if machine["huge_pages"] else []
    if machine["load"]:
        state.append(f"load before the run: {', '.join(f'{load:.2f}' for load in machine['load'])} (1, 5, 15 minutes)")
    if state:
        said.append("; ".join(state))
    if speeds:
        said.append(f"memcpy: {', '.join(f'{speed:.2f} GB/s by {who}' for who, speed in speeds.items())}")
    return said


def _kernel() -> str:
    try:
        return kernel_in_use()
    except (RuntimeError, ValueError) as mistake:
        raise CliError(str(mistake)) from mistake


def _load() -> list[float] | None:
    try:
        return list(os.getloadavg())
    except (AttributeError, OSError):  # Windows, or a system that does not count
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system, or a container that hides it
        return ""


def _processor(cpuinfo: str) -> dict[str, Any]:
    r"""Read /proc/cpuinfo, which names fields differently for each architecture.

    >>> _processor("model name\t: AMD EPYC\ncpu family\t: 23\nmodel\t\t: 1\nflags\t\t: fpu hypervisor\n")
    {'model': 'AMD EPYC', 'family': 23, 'number': 1, 'cores': None, 'virtual': True}
    """
    blocks = [dict(re.findall(r"(?m)^(\S[^:\n]*?)[ \t]*: *(.*)$", block)) for block in cpuinfo.split("\n\n")]
    first = blocks[0]
    places = {
        (block["physical id"], block["core id"]) for block in blocks if {"physical id", "core id"} <= block.keys()
    }
    family, number = first.get("cpu family", ""), first.get("model", "")
    return {
        "model": first.get("model name") or first.get("cpu") or platform.processor() or None,
        "family": int(family) if family.isdigit() else None,
        "number": int(number) if number.isdigit() else None,
        "cores": len(places) or None,
        "virtual": "hypervisor" in first["flags"].split() if "flags" in first else None,
    }


def _caches(folder: Path) -> list[dict[str, Any]]:
    """Return the second and higher levels, and for each cache of a level which processors share it."""
    found: dict[tuple[int, str], set[str]] = {}
    for cache in folder.glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (_read(cache / name).strip() for name in ("level", "size", "shared_cpu_list"))
        if level.isdigit() and int(level) > 1:
            found.setdefault((int(level), size), set()).add(shared)
    return [
        {"level": level, "size": size, "shared_by": sorted(found[level, size], key=_first)}
        for level, size in sorted(found)
    ]


def _first(processors: str) -> int:
    number = re.match(r"\d+", processors)
    return int(number[0]) if number else -1


def _huge_pages(enabled: str) -> str | None:
    """Return the setting that is in force.

    >>> _huge_pages("always [madvise] never")
    'madvise'
    """
    chosen = re.search(r"\[(\w+)\]", enabled)
    return chosen[1] if chosen else None


def _cores(machine: Mapping[str, Any]) -> str:
    several = [count(machine["cores"], "core")] if machine["cores"] else []
    cpus = count(machine["cpus"], "virtual processor" if machine["virtual"] else "processor")
    return ", ".join([*several, f"{cpus}, of which rank 0 may use {machine['cpus_of_rank_0']}"])


def count(number: int, noun: str) -> str:
    """Return a number of things, in words."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _cache(cache: Mapping[str, Any]) -> str:
    """Say who shares a level's caches.

    >>> _cache({"level": 2, "size": "512K", "shared_by": ["0", "1"]})
    'L2 of 512K, shared by 0 | 1'
    >>> _cache({"level": 3, "size": "8192K", "shared_by": ["0-7", "8-15", "16-23", "24-31", "32-39"]})
    'L3 of 8192K, shared by 0-7 | 8-15 | 16-23 and 2 more'
    """
    shared: Sequence[str] = cache["shared_by"]
    more = f" and {len(shared) - 3} more" if len(shared) > 4 else ""
    return f"L{cache['level']} of {cache['size']}, shared by {' | '.join(shared[:3] if more else shared)}{more}"

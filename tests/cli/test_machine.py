"""What a report says of the machine, on machines that are folders."""

import os

import pytest

from funcavg.cli import machine

CPU = """processor\t: {0}
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
physical id\t: 0
core id\t\t: {1}
flags\t\t: fpu avx2{2}
power management:

"""
NOWHERE = dict.fromkeys(("family", "number", "cores", "virtual", "huge_pages")) | {"caches": []}


@pytest.fixture
def root(tmp_path):
    """Return the root of a machine of two cores with two threads each, which are neighbours in its numbering."""

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/cpuinfo", "".join(CPU.format(cpu, cpu // 2, "") for cpu in range(4)))
    write("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    for cpu in range(4):
        of_core = f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"
        caches = [(1, "32K", of_core), (1, "32K", of_core), (2, "1024K", of_core), (3, "32768K", "0-3")]
        for index, (level, size, shared) in enumerate(caches):
            for name, text in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                write(f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{name}", f"{text}\n")
    write("sys/devices/system/cpu/cpufreq/cache/index0/level", "2")  # no processor
    return tmp_path


def test_what_linux_says(root, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 1.25, 2.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(machine, "kernel_in_use", lambda: "C (AVX2)")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = machine.describe(root)
    assert {name: found[name] for name in found if name != "system"} == {
        "model": "AMD EPYC 9R14",
        "family": 25,
        "number": 17,
        "cores": 2,
        "virtual": False,
        "cpus": 4,
        "cpus_of_rank_0": 1,
        "caches": [
            {"level": 2, "size": "1024K", "shared_by": ["0-1", "2-3"]},
            {"level": 3, "size": "32768K", "shared_by": ["0-3"]},
        ],
        "huge_pages": "never",
        "load": [0.5, 1.25, 2.0],
        "threads": "1",
        "kernel": "C (AVX2)",
    }
    assert machine.lines(found, {"rank 0 alone": 9.5, "each of 2 at once": 5.0}) == [
        (
            f"machine: {found['system']}, AMD EPYC 9R14 (family 25, model 17), 2 cores, 4 processors, of which rank 0 "
            f"may use 1; OMP_NUM_THREADS 1"
        ),
        "kernel: C (AVX2)",
        "caches: L2 of 1024K, shared by 0-1 | 2-3; L3 of 32768K, shared by 0-3",
        "transparent huge pages: never; load before the run: 0.50, 1.25, 2.00 (1, 5, 15 minutes)",
        "memcpy: 9.50 GB/s by rank 0 alone, 5.00 GB/s by each of 2 at once",
    ]


def test_a_virtual_machine(root):
    (root / "proc/cpuinfo").write_text(CPU.format(0, 0, " hypervisor"))
    assert "1 cores, " not in (line := machine.lines(machine.describe(root), {})[0])
    assert "virtual processor" in line


@pytest.mark.parametrize("load", ["none", "unobtainable"])
def test_a_system_that_says_nothing(tmp_path, monkeypatch, load):
    """As macOS, Windows, or a container that hides it."""

    def unobtainable():
        raise OSError("Load averages are unobtainable")

    if load == "none":
        monkeypatch.delattr(os, "getloadavg")
    else:
        monkeypatch.setattr(os, "getloadavg", unobtainable)
    monkeypatch.setattr("platform.processor", lambda: "")
    found = machine.describe(tmp_path)
    assert found["load"] is None
    assert found["model"] is None
    assert {name: found[name] for name in NOWHERE} == NOWHERE
    line, _ = machine.lines(found, {})
    assert "None" not in line
    assert line.startswith(f"machine: {found['system']}, {os.cpu_count()} processor")

"""The two kernels: what sums in C, and what sums in NumPy and torch. Tests of means run on both."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from funcavg._engine import kernel

PYTHON = "NumPy and torch"
_FOUND = kernel.choose({})[0]
LEVELS = range(0 if _FOUND is None else _FOUND.level + 1)  # that this processor has


def library_or_skip() -> kernel.Library:
    """Return the C kernel; leave the test if there is none, unless FUNCAVG_KERNEL says that there must be one."""
    found, which = kernel.choose(os.environ)
    if found is None:
        pytest.skip(which)
    return found


@contextmanager
def using(found: kernel.Library | None, level: int | None = None) -> Iterator[None]:
    """Let a kernel sum, in C at some level, or (None) in NumPy and torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_chosen", lambda: (found, "a test's"))
        if found is not None and level is not None:
            patch.setattr(found, "level", level)
            kernel._prepared_for.cache_clear()
        try:
            yield
        finally:
            kernel._prepared_for.cache_clear()


@pytest.fixture(params=["C", PYTHON])
def each_kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on both kernels."""
    with using(library_or_skip() if request.param == "C" else None):
        yield request.param


def assert_sanitizers_find_nothing(folder: Path, driver: str, *options: object) -> None:
    """Compile a program of C's that calls the kernel, and run it: no access outside of memory, all is defined."""
    compiler = shutil.which("gcc") or pytest.skip("no gcc")
    (folder / "driver.c").write_text(driver, encoding="utf-8")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = Path(kernel.__file__).parent
    command = [compiler, "-std=c99", "-O1", *sanitize, f"-I{sources}", folder / "driver.c", *options]
    built = subprocess.run([*command, "-o", folder / "driver"], capture_output=True, text=True, check=False)
    if built.returncode:
        assert "cannot find" in built.stderr, built.stderr
        pytest.skip("no sanitizers")
    done = subprocess.run([folder / "driver"], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr[:2000]

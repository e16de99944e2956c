"""Tests leave a GPU to those that ask for it, and skip what needs a framework that is not installed.

JAX simulates devices on the host, where arrays need no copies.
"""

import os
import re
import sys
import traceback
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))  # pytest's own setting comes later than this file

from helpers.frameworks import OPTIONAL, absent, needed_by, skip_without  # noqa: E402

IMPORT = re.compile(r"^\s*(?:import\s+(.+)|from\s+(\w+))", re.MULTILINE)
NOT_FOUND = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def pytest_report_header() -> str:
    """Say what will be skipped."""
    return f"not installed: {', '.join(filter(absent, OPTIONAL)) or 'none of the frameworks that tests may need'}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a module that imports what is not installed."""
    report = yield
    found = NOT_FOUND.search(str(report.longrepr)) if report.failed else None
    if found and found[1] in OPTIONAL and absent(found[1]):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, f"Skipped: needs {found[1]}, which is not installed")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test that is given what is not installed, and examples (of a whole page, for docs) that import it."""
    if (framework := needed_by(getattr(item, "callspec", None) and item.callspec.params)) is not None:
        skip_without(framework)
    if isinstance(item, pytest.DoctestItem):
        source = "".join(example.source for example in item.dtest.examples)
        for several, one in IMPORT.findall(source):
            for name in re.findall(r"(?:^|,)\s*(\w+)", several or one):
                if name in OPTIONAL:
                    skip_without(name)
        fails = any(example.exc_msg and "run_ranks" in example.source for example in item.dtest.examples)
        if fails and sys.version_info < (3, 11):
            pytest.skip("Python 3.10's doctest takes an exception's note, which says the rank, for its text")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """Skip a test that itself, or its example, imports what is not installed. That funcavg does is a failure."""
    try:
        yield
    except ModuleNotFoundError as error:
        framework = (error.name or "").partition(".")[0]
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        ours = getattr(sys.modules.get("funcavg"), "__file__", None)  # of the clone, or as installed
        is_ours = ours is not None and Path(ours).parent in where.parents
        if framework in OPTIONAL and absent(framework) and not is_ours:
            skip_without(framework)
        raise

"""What the extras ask for is what `.ci/versions` has run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = ROOT / ".ci" / "versions.md"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def table():
    """Return {column: its cells}."""
    if not TABLE.exists():
        pytest.skip("a source distribution has no .ci/versions.md")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.read_text().splitlines()]
    return {row[0]: row for row in rows if len(row) > 1}


def test_the_lowest_jax_that_is_asked_for_has_been_run(table):
    lowest = set(re.findall(r"\bjax>=([\d.]+)", PROJECT))
    assert len(lowest) == 1
    assert re.search(rf"\bjax {re.escape(lowest.pop())}(,|$)", table["jax-lowest"][2])


def test_the_torch_that_is_pinned_has_been_run(table):
    pinned = re.search(r'"torch==([\d.]+)"', PROJECT)[1]
    assert re.search(rf"\btorch {re.escape(pinned)}\b", table["python-3.11"][2])


def test_nothing_in_the_table_has_failed(table):
    assert {row[5] for name, row in table.items() if name not in ("column", "---")} == {"0"}


def test_the_readme_names_what_has_been_run(table):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tested = re.search(r"(?s)\nTested, .*?\n\n", readme)[0]
    for name in table:
        for version in re.findall(r"^python-([\d.]+)$", name):
            assert version in tested

"""What is not installed is skipped, with a reason, and hides nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.frameworks import Absent, collecting, needed_by

ROOT = Path(__file__).parents[1]

# Ours, for a suite in another folder.
CONFTEST = (
    (ROOT / "conftest.py")
    .read_text(encoding="utf-8")
    .replace("ROOT = Path(__file__).parent", f"ROOT = Path({str(ROOT)!r})")
)
TESTS = """
import sys
from helpers.frameworks import Absent
import pytest
nosuch = Absent("mpi4jax")

@pytest.mark.parametrize("leaf", [1.0, nosuch.zeros(3), [nosuch.ones(2)[0]]])
def test_given(leaf):
    assert leaf == 1.0

def test_uses():
    nosuch.zeros(3)

def test_imports():
    import mpi4jax

def test_of_ours():
    sys.modules["mpi4py"] = None
    import funcavg.collectives.mpi

def test_plain():
    assert not nosuch
"""


def test_a_stand_in():
    absent = Absent("nosuch")
    with pytest.raises(pytest.skip.Exception, match="needs nosuch, which is not installed"):
        absent.zeros(3)
    with collecting():
        made = absent.zeros(3).T[0]

        class Subclass(absent.Tensor):
            pass

    assert not made
    assert Subclass.__mro__ == (Subclass, object)
    assert needed_by({"leaf": [1.0, (made,)]}) == "nosuch"
    assert needed_by({"leaf": [1.0, (None,)]}) is None


def test_a_suite(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text("import mpi4jax\n")
    (tmp_path / "page.md").write_text(">>> import numpy as np, mpi4jax\n")
    (tmp_path / "other.md").write_text(">>> import numpy as np\n")
    hidden = "import sys, importlib.util as util; found = util.find_spec; "
    hidden += "util.find_spec = lambda name: None if name in ('mpi4jax', 'mpi4py') else found(name); "
    run = "import pytest; sys.exit(pytest.main(['-rs', '--doctest-glob=*.md', '-p', 'no:cacheprovider']))"
    done = subprocess.run(
        [sys.executable, "-c", hidden + run],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert re.search(r"1 failed, 3 passed, 6 skipped in", done.stdout), done.stdout
    assert "_ test_of_ours _" in done.stdout
    assert "needs mpi4jax, which is not installed" in done.stdout

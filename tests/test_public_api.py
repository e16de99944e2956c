"""The public names: a name that appears or goes is a decision, not an accident."""

import importlib
import re
from pathlib import Path

import pytest
from helpers.frameworks import skip_without

import funcavg

NAMES = [
    "Averager",
    "Collective",
    "FuncavgError",
    "Handle",
    "HierarchicalModelAverager",
    "ModelAverager",
    "PeerLostError",
    "PeriodicModelAverager",
    "PostLocalSGDOptimizer",
    "TreeMismatchError",
    "average",
    "broadcast",
    "differences",
    "diloco",
    "forget",
    "furthest",
    "hierarchical",
    "mean",
    "outer",
    "periodic",
    "should_average",
    "stacked",
    "start_average",
    "streaming_diloco",
]


MODULES = {
    "averagers": [
        *("Averager", "DiLoCoState", "HierarchicalState", "InitFn", "PeriodicState", "StreamingState", "UpdateFn"),
        *("diloco", "hierarchical", "periodic", "streaming_diloco"),
    ],
    "collectives": ["Collective", "Solo", "as_collective", "default_group", "is_outside", "launched_ranks"],
    "outer": ["MomentumState", "Outer", "as_outer", "nesterov", "sgd"],
    "stateful": ["HierarchicalModelAverager", "ModelAverager", "PeriodicModelAverager", "PostLocalSGDOptimizer"],
    "testing": ["run_ranks"],
    "cli": ["main"],
}


def test_all_is_sorted_and_complete():
    assert funcavg.__all__ == NAMES == sorted(NAMES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_these_names(module):
    if module == "stateful":
        skip_without("torch")
    found = importlib.import_module(f"funcavg.{module}")
    assert found.__all__ == MODULES[module]
    assert all(getattr(found, name).__doc__ for name in found.__all__ if callable(getattr(found, name)))


def test_nothing_else_is_listed():
    assert set(dir(funcavg)) == {*NAMES, "__version__", "averagers", "collectives"}


def test_the_reference_has_every_name():
    page = (Path(__file__).parent.parent / "docs" / "reference.md").read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", page))
    assert set(NAMES) <= words


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name):
    if name in MODULES["stateful"]:
        skip_without("torch")
    assert getattr(funcavg, name).__doc__
    assert name in dir(funcavg)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match=r"module 'funcavg' has no attribute 'averge'"):
        funcavg.averge  # noqa: B018


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", funcavg.__version__)


def test_errors_are_what_users_catch():
    assert issubclass(funcavg.TreeMismatchError, funcavg.FuncavgError)
    assert issubclass(funcavg.TreeMismatchError, ValueError)
    assert issubclass(funcavg.PeerLostError, funcavg.FuncavgError)
    assert issubclass(funcavg.PeerLostError, RuntimeError)

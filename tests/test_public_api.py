"""The public names: a name that appears or goes is a decision, not an accident."""

import re

import pytest

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
    "diloco",
    "hierarchical",
    "outer",
    "periodic",
    "should_average",
    "stacked",
    "start_average",
]


def test_all_is_sorted_and_complete():
    assert funcavg.__all__ == NAMES == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_documented(name):
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

"""Frameworks that may be absent: a test skips, with a reason, when it needs one that is not installed.

``from helpers.frameworks import torch`` gives torch where it is installed, and else a stand-in. What is made of a
stand-in while tests are collected (cases of a table, say) is a stand-in again, and a test that is given one, or uses
one when it runs, is skipped: so a module has tests of NumPy beside those of torch, and only the latter need it. The
stand-in is false: ``if torch``. Modules that need a framework throughout import it as ever, and are skipped as a whole
(``conftest.py``).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

OPTIONAL = (
    *("torch", "jax", "mpi4py", "flax", "equinox", "optax", "orbax", "safetensors"),
    *("sklearn", "matplotlib", "mpi4jax", "lightning", "torchft"),
)
NAMES = {"dist": "torch.distributed", "jnp": "jax.numpy"}  # what is imported by another name than its own


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """Import test modules as pytest does before any test runs; in a rank, that is, which a test has started."""
    test = os.environ.pop("PYTEST_CURRENT_TEST", None)
    try:
        yield
    finally:
        if test is not None:
            os.environ["PYTEST_CURRENT_TEST"] = test


# Found out once, before any test hides one.
INSTALLED = frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is not None)


def absent(framework: str) -> bool:
    return framework not in INSTALLED


class Absent:
    """Stands in for a framework that is not installed, and for whatever would be made of it."""

    def __init__(self, framework: str) -> None:
        self._framework = framework

    def _made_of_it(self) -> Absent:
        if "PYTEST_CURRENT_TEST" in os.environ:  # a test runs; its processes inherit that
            skip_without(self._framework)
        return Absent(self._framework)

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):  # what pytest, doctest and copy ask of every object
            raise AttributeError(name)
        return self._made_of_it()

    def __call__(self, *args: Any, **kwargs: Any) -> Absent:
        return self._made_of_it()

    def __getitem__(self, index: Any) -> Absent:
        return self._made_of_it()

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()

    def __bool__(self) -> bool:
        return False


class Skip(str):
    """Why a rank skips, as something that it can send: pytest's own exception cannot be pickled."""

    __slots__ = ()


def skip_without(framework: str) -> None:
    """Leave this test if a framework is not installed."""
    if absent(framework):
        pytest.skip(f"needs {framework}, which is not installed")


def is_tensor(leaf: Any) -> bool:
    return "torch" in sys.modules and isinstance(leaf, sys.modules["torch"].Tensor)


def no_grad() -> contextlib.AbstractContextManager[Any]:
    """Let torch want no graph; nothing without it."""
    return contextlib.nullcontext() if absent("torch") else importlib.import_module("torch").no_grad()


def needed_by(params: Any) -> str | None:
    """Return the framework that some of a test's parameters would be made of, if it is absent."""
    if isinstance(params, Absent):
        return params._framework
    parts = params.values() if isinstance(params, dict) else params if isinstance(params, (list, tuple)) else ()
    return next((found for found in map(needed_by, parts) if found), None)


def __getattr__(name: str) -> Any:
    """Import a framework when a test module does: not sooner, since many processes import these helpers."""
    module = NAMES.get(name, name)
    framework = module.partition(".")[0]
    if framework not in OPTIONAL:
        raise AttributeError(name)
    return Absent(framework) if absent(framework) else importlib.import_module(module)

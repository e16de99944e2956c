"""What can go wrong, and for whom.

::

    Exception
    └── FuncavgError            everything that funcavg itself gives up on
        ├── TreeMismatchError   (also ValueError)    ranks passed trees that do not fit together
        └── PeerLostError       (also RuntimeError)  another rank died, or did not come in time

Mistakes in arguments raise the built-in ``TypeError``, ``ValueError``, ``RuntimeError`` and ``ImportError``.
"""

from __future__ import annotations

__all__ = ["FuncavgError", "PeerLostError", "TreeMismatchError", "missing_extra"]


class FuncavgError(Exception):
    """Base class of funcavg's own errors."""


class TreeMismatchError(FuncavgError, ValueError):
    """Ranks disagree about the tree or the options of a call.

    Raised alike on every rank, before any leaf has moved. The group stays usable.
    """


class PeerLostError(FuncavgError, RuntimeError):
    """Another rank died or did not come within the timeout.

    Raised on the ranks that wait; their inputs are unchanged (unless donated). The group is spent: every
    later call on it raises at once, until it is configured anew, if it is one that can be. Make a new group of the
    ranks that are left, and see from whose parameters they go on: `funcavg.furthest`; or start from a checkpoint.
    """


def missing_extra(what: str, package: str, extra: str) -> ImportError:
    """Return the error for a feature whose optional dependency is not installed."""
    return ImportError(f"{what} needs {package}. Install it with `pip install 'funcavg[{extra}]'`.")

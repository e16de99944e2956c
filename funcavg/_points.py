"""Named points of a call, at which tests let a rank fail."""

from __future__ import annotations

__all__ = ["are_watched", "reached"]


def reached(point: str, number: int = 0) -> None:
    """Do nothing. Tests replace this function; it is called as ``_points.reached``.

    Points: created, published, attached (once per group); copied_in, arrived, reduced, done, copied_out (of each
    bucket).
    """


_NOTHING = reached


def are_watched() -> bool:
    """Say whether a test looks at points: then steps are taken one by one."""
    return reached is not _NOTHING

"""Pages of the documentation, and the code in them that is no doctest."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path) -> list[str]:
    """Return the blocks of Python that are no doctests."""
    found = re.findall(r"(?ms)^```python\n(.*?)^```", path.read_text(encoding="utf-8"))
    return [block for block in found if ">>>" not in block]


LOST = blocks(ROOT / "docs" / "guides" / "lost-workers.md")  # of torchft, of MPI, of torchrun

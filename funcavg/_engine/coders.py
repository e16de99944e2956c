"""Who writes rows for a wire: the kernel in C where it is loaded, else NumPy, to the same bytes and bits."""

from __future__ import annotations

from funcavg.wires import Codec, Coder
from funcavg.wires.codecs import Pieces

__all__ = ["coder_of"]


def coder_of(codec: Codec, pieces: Pieces) -> Coder:
    """Return the coder of rows that are cut like this."""
    return codec.coder(pieces)

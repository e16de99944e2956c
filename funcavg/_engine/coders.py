"""Who writes rows for a wire: the kernel in C where it is loaded, else NumPy, to the same bytes and bits."""

from __future__ import annotations

import numpy as np

from funcavg._engine.kernel import kernel_in_use
from funcavg.wires import NAMES, Codec, Coder, codec_of
from funcavg.wires.codecs import Pieces

__all__ = ["coder_in_use", "coder_of"]


def coder_of(codec: Codec, pieces: Pieces) -> Coder:
    """Return the coder of rows that are cut like this."""
    return codec.coder(pieces)


def coder_in_use() -> str:
    """Say who writes the codes of funcavg's own wires in this process."""
    codecs = [codec for name in NAMES if (codec := codec_of(name)) is not None]
    modules = {type(coder_of(codec, np.array([[0, 1]]))).__module__ for codec in codecs}
    in_c = not any(module.startswith("funcavg.wires") for module in modules)
    return kernel_in_use() if in_c else "NumPy"

"""How averaged numbers are written while they travel between hosts: what ``wire=`` of `funcavg.average` means.

========== ================== ===================== =====================================================
wire       bytes an element   error (NMSE)          what it is
========== ================== ===================== =====================================================
bfloat16   2                  3e-6                  each number rounded
int8       1.016              5e-5 to 3e-4          blocks of 256 numbers, each with a float32 scale
int4       0.504              1e-2                  rotated blocks of 1024, 16 levels
int2       0.254              0.13                  rotated blocks of 1024, 4 levels
========== ================== ===================== =====================================================

`blocks.py` says where blocks lie, `rounded.py` and `rotated.py` what is written. `codecs.py` has all by name.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Wire"]


@runtime_checkable
class Wire(Protocol):
    """A codec of your own: pass such an object as ``wire``, on all ranks.

    It is given numbers of one leaf at a time, never of two, and never what two ranks have sent. Both functions must
    depend on nothing but their arguments, and `decode` must return the same bits on every rank: calculate with
    integers, or with operations that round once. `start_average` calls them in another thread.

    At each call of `funcavg.average` both are tried with 1, 7 and 1024 numbers, before anything moves: what is wrong
    there is raised on every rank alike, and ranks whose codecs make other bytes or numbers of these are told that they
    differ. What they raise later, of other numbers, spends the group: RuntimeError here, and `funcavg.PeerLostError` on
    the ranks that wait. Leaves that are no wider than the code of 1024 numbers travel as they are.

    Make it once, and pass the same object at each call: what is known of how leaves are cut is kept for each object.

    Examples:
        Signs only, and the mean magnitude:

        >>> import numpy as np
        >>> import funcavg
        >>> from funcavg.testing import run_ranks
        >>> class Signs:
        ...     name = "signs"
        ...     def encode(self, numbers):
        ...         scale = np.abs(numbers).mean(dtype=np.float64, keepdims=True).astype(np.float32)
        ...         return np.concatenate([scale.view(np.uint8), np.packbits(numbers < 0)])
        ...     def decode(self, code, length):
        ...         signs = 1 - 2 * np.unpackbits(code[4:], count=length).astype(np.float32)
        ...         return signs * code[:4].view(np.float32)
        >>> def fn(group):
        ...     return funcavg.average(np.array([1, -3, 4, -4], np.float32), group, wire=Signs())
        >>> run_ranks(2, fn)[0]  # the first two numbers were averaged by rank 0, the others by rank 1
        array([ 2., -2.,  4., -4.], dtype=float32)
    """

    @property
    def name(self) -> str:
        """What errors and logs call it: at most 64 letters, digits, ``_``, ``.`` and ``-``."""
        ...

    def encode(self, numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """Return the code of a vector, of any length from 1 on. Its length follows from that of the vector alone."""
        ...

    def decode(self, code: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.float32]:
        """Return ``length`` numbers."""
        ...

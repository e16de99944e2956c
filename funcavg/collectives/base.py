"""The protocol of a transport: two facts and three verbs that move bytes.

A transport never sees a leaf, a dtype or a sum. The engine packs leaves into buckets, and for each one::

    exchange    row r of my bytes goes to rank r; its row for me comes back      (all-to-all)
    (mean)      this rank averages the shard that is its own
    share       my row goes to everyone, theirs come to me                       (all-gather)

so every element is summed on exactly one rank and all ranks get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

__all__ = ["Buffer", "Collective", "Pending"]

Buffer: TypeAlias = npt.NDArray[np.uint8]
Pending: TypeAlias = Callable[[], None]


@runtime_checkable
class Collective(Protocol):
    """A group of ranks that can move bytes among each other: what `average` needs of a transport.

    Any object with these members can be passed as ``group``. All ranks make the same calls in the same order.
    ``timeout`` is in seconds and bounds the wait for the other ranks; when it passes, or a peer is found dead, the
    verb raises `funcavg.PeerLostError`. A verb may start its transfer and return a function that waits for the end
    (and raises the same); it returns ``None`` if the transfer is already done. The engine then keeps several
    buckets on their way, and touches a buffer only after its wait.

    docs/transports.md builds one in thirty lines.
    """

    @property
    def rank(self) -> int:
        """This rank's number, 0 to ``size - 1``."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def gather(self, payload: bytes, timeout: float) -> list[bytes]:
        """Return every rank's payload, in rank order. Payloads are small and equally long on all ranks."""
        ...

    def exchange(self, send: Buffer, receive: Buffer, timeout: float) -> Pending | None:
        """Send row ``r`` of ``send`` to rank ``r``; put what rank ``r`` sends here into row ``r`` of ``receive``.

        Both are C-contiguous uint8 arrays of shape ``(size, n)``, ``n`` equal on all ranks. The row of this rank
        need not be moved: the engine never reads it from ``receive``.
        """
        ...

    def share(self, buffer: Buffer, timeout: float) -> Pending | None:
        """Send row ``rank`` of ``buffer`` to all ranks; put what rank ``r`` sends into row ``r``.

        A C-contiguous uint8 array of shape ``(size, n)``, ``n`` equal on all ranks.
        """
        ...

"""What a rank says of its call before anything moves: 48 bytes for all, and words for when something is wrong.

::

    magic, version   is this the same protocol?
    flags            has a rank found a mistake of its own?
    weight           of this rank
    digest           of all that must be equal: paths, order, dtypes, shapes, the mask of `where`, options
    ties, places     what need not be equal, but helps when it is: ties, and which leaves lie on an accelerator
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from funcavg._trees.survey import ROOT

__all__ = ["HEADER_BYTES", "WIRE", "Claim", "Header", "blake2b", "digest", "find_differences", "listed"]

MAGIC, VERSION = b"favg", 2
FORMAT = struct.Struct("<4sHHd16s8s8s")
HEADER_BYTES = FORMAT.size
HAS_ERROR, DONATES_TIES = 1, 2
SHOWN = 5  # differences listed in an error
WIRE = ", over "  # stands before the wire, in the line of options


def digest(lines: Sequence[str]) -> bytes:
    """Return 16 bytes that stand for ``lines``."""
    return blake2b("\n".join(lines).encode("utf-8", "surrogatepass"), 16)


def blake2b(data: bytes, nbytes: int) -> bytes:
    """Return ``nbytes`` that stand for ``data``."""
    import hashlib  # with OpenSSL's library, which would be a tenth of the time that funcavg's import takes

    return hashlib.blake2b(data, digest_size=nbytes).digest()


class Header(NamedTuple):
    """What every rank is told of a claim."""

    magic: bytes
    version: int
    flags: int
    weight: float
    signature: bytes
    ties: bytes
    places: bytes

    @classmethod
    def unpack(cls, payload: bytes) -> Header:
        """Read what `pack` has written, here or on another rank."""
        return cls(*FORMAT.unpack(payload))

    def pack(self) -> bytes:
        """Return 48 bytes."""
        return FORMAT.pack(*self)

    @property
    def has_error(self) -> bool:
        """Whether that rank has found a mistake of its own."""
        return bool(self.flags & HAS_ERROR)

    @property
    def donates_ties(self) -> bool:
        """Whether that rank donates a tree with ties."""
        return bool(self.flags & DONATES_TIES)


class Claim(NamedTuple):
    """What one rank brings to a call."""

    signature: bytes  # digest of `lines`
    lines: Sequence[str]  # "path: text" of every leaf, after one line of options
    ties: bytes  # digests, of which the first 8 bytes are sent
    places: bytes
    weight: float = 1.0
    weighted: bool = False
    donates_ties: bool = False
    error: Exception | None = None

    def header(self) -> Header:
        """Return what every rank is told."""
        flags = HAS_ERROR * (self.error is not None) + DONATES_TIES * self.donates_ties
        return Header(MAGIC, VERSION, flags, self.weight, self.signature, self.ties, self.places)


def find_differences(ours: Sequence[str], theirs: Sequence[str], us: str, them: str) -> list[str]:
    """Compare the lines of two claims; say in words where ``us`` and ``them`` differ."""
    found = []
    if ours[0] != theirs[0]:
        mine, yours = ours[0], theirs[0]
        if (WIRE in mine) != (WIRE in yours):
            mine, yours = (line if WIRE in line else f"{line}{WIRE}no wire" for line in (mine, yours))
        found.append(f"options:  {us} {mine},  {them} {yours}")
    left, right = (dict(line.rsplit(": ", 1) for line in lines[1:] if line) for lines in (ours, theirs))
    for path in [*left, *(path for path in right if path not in left)]:
        mine, yours = left.get(path, "has no such leaf"), right.get(path, "has no such leaf")
        if mine != yours:
            found.append(f"{path}:  {us} {mine},  {them} {yours}")
    if not found:
        for position, (mine, yours) in enumerate(zip(left, right, strict=False)):
            if mine != yours:
                found.append(
                    f"leaf {position}:  {us} {mine},  {them} {yours} (the same leaves in another order; a "
                    f"plain dict is matched by key, so dict({ROOT}) cures an OrderedDict)"
                )
                break
    return found


def listed(lines: Sequence[str]) -> str:
    """Return the first few lines, as an error shows them."""
    shown = "\n".join(f"    {line}" for line in lines[:SHOWN])
    return shown + (f"\n    ... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")

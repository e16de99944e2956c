"""What a rank brings to a call: its tree taken apart, its leaves described, its options, and its own mistakes.

Nothing here knows of other ranks. A tree becomes a `Flat` (`containers.py`), each kind of array has a `Family`
(`arrays/`), and both together with the options make a `Request` (`request.py`), whose `Claim` the other ranks hear of.
`compared.py` is for several trees of one process.
"""

from __future__ import annotations

from funcavg._trees.arrays import (
    Family,
    Leaf,
    StandIn,
    family_of,
    is_dtensor,
    is_jax,
    wrap_local_tensor,
    zeros_like,
)
from funcavg._trees.claim import HEADER_BYTES, Claim, Header, blake2b, digest, find_differences, listed
from funcavg._trees.compared import Compared
from funcavg._trees.containers import ROOT, Flat, combine, flatten, paths
from funcavg._trees.layouts import Layout
from funcavg._trees.options import Options, Timeout, Where, checked_timeout
from funcavg._trees.request import Request, check_weight, failed_request, make_request

__all__ = [
    "HEADER_BYTES",
    "ROOT",
    "Claim",
    "Compared",
    "Family",
    "Flat",
    "Header",
    "Layout",
    "Leaf",
    "Options",
    "Request",
    "StandIn",
    "Timeout",
    "Where",
    "blake2b",
    "check_weight",
    "checked_timeout",
    "combine",
    "digest",
    "failed_request",
    "family_of",
    "find_differences",
    "flatten",
    "is_dtensor",
    "is_jax",
    "listed",
    "make_request",
    "paths",
    "wrap_local_tensor",
    "zeros_like",
]

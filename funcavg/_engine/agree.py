"""Agreement: before anything moves, ranks make sure that they mean the same, and raise alike if they do not.

One exchange of fixed size tells every rank all it needs: the headers of claims (`funcavg._trees.claim`).

Only if something is wrong, a second one carries the words: rank 0 and the first rank that differs (or the first that
found a mistake) publish their texts, and every rank composes the same error out of them.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

from funcavg._errors import FuncavgError, TreeMismatchError
from funcavg._trees import HEADER_BYTES, Claim, Header, find_differences, listed
from funcavg.collectives.base import Collective

__all__ = ["Agreement", "agree", "exchange_words"]

WORDS = b"fvgW"  # begins what ranks exchange in place of claims
TEXT_BYTES = 64 << 10  # of a compressed text; more is cut off
NOTHING_MOVED = "Nothing was sent and the inputs are unchanged, on every rank."
ERRORS: dict[str, type[Exception]] = {  # the kinds that a rank's mistake keeps on its way to the others
    kind.__name__: kind for kind in (TypeError, ValueError, RuntimeError, NotImplementedError)
}


class Agreement(NamedTuple):
    """What all ranks know afterwards."""

    weights: list[float] | None  # None: the plain mean
    same_ties: bool
    same_places: bool = True


Gather = Callable[[bytes, float], list[bytes]]


def agree(
    collective: Collective, claim: Claim, timeout: float, gather: Gather | None = None, who: str = "average"
) -> Agreement | Exception:
    """Exchange claims; return what follows from them, or the error that every rank is to raise.

    ``gather`` is a faster way than the collective's, if there is one. ``who`` is the function that is carried out.
    """
    ours = claim.header()
    payload = ours.pack()
    payloads = (gather or collective.gather)(payload, timeout)
    if [len(theirs) for theirs in payloads] != [len(payload)] * collective.size:
        raise FuncavgError(
            f"gather of {collective!r} must return {collective.size} payloads of {len(payload)} bytes, one of every "
            f"rank, got lengths {[len(theirs) for theirs in payloads]}."
        )
    headers = [Header.unpack(theirs) for theirs in payloads]
    for rank, header in enumerate(headers):
        if header.magic == WORDS:
            return _other_function(who, rank)
        if (header.magic, header.version) != (ours.magic, ours.version):
            return FuncavgError(
                f"{who}: rank {rank} speaks another version of the protocol ({header.magic!r} {header.version}, here "
                f"{ours.magic!r} {ours.version}). Install the same funcavg on all ranks. {NOTHING_MOVED}"
            )
    failed = [rank for rank, header in enumerate(headers) if header.has_error]
    if failed:
        return _share_error(collective, claim, failed, timeout, who)
    different = [rank for rank, header in enumerate(headers) if header.signature != headers[0].signature]
    if different:
        return TreeMismatchError(f"{who}: {_describe_mismatch(collective, claim, different, timeout)}")
    same_ties = len({header.ties for header in headers}) == 1
    same_places = len({header.places for header in headers}) == 1
    donors = [rank for rank, header in enumerate(headers) if header.donates_ties]
    if donors and not same_ties:
        return ValueError(
            f"{who}: donate=True on rank {donors[0]}, whose tree holds the same memory twice (tied leaves), where "
            f"other ranks' trees do not: two results cannot be written to one place. Tie the same leaves on every "
            f"rank, or pass donate=False. {NOTHING_MOVED}"
        )
    weights = [header.weight for header in headers] if claim.weighted else None
    if weights is not None and not any(weights):
        return ValueError(f"{who}: the weights of all {len(weights)} ranks are 0. {NOTHING_MOVED}")
    return Agreement(weights, same_ties, same_places)


def exchange_words(
    collective: Collective, words: bytes, timeout: float, gather: Gather | None, who: str
) -> list[bytes] | Exception:
    """Exchange a few bytes in place of claims, which are as long: ranks may have called different functions."""
    payload = WORDS + words.ljust(HEADER_BYTES - len(WORDS), b"\0")
    payloads = (gather or collective.gather)(payload, timeout)
    for rank, theirs in enumerate(payloads):
        if len(theirs) != len(payload) or not theirs.startswith(WORDS):
            return _other_function(who, rank)
    return [theirs[len(WORDS) : len(WORDS) + len(words)] for theirs in payloads]


def _other_function(who: str, rank: int) -> FuncavgError:
    return FuncavgError(f"{who}: rank {rank} has called another function of funcavg's. All ranks call the same ones.")


def _publish(collective: Collective, text: str, timeout: float) -> list[str]:
    """Gather a text from every rank, its last lines cut off where it exceeds what a large group can carry."""
    packed = zlib.compress(text.encode("utf-8", "replace"))[:TEXT_BYTES]
    payload = struct.pack("<I", len(packed)) + packed.ljust(TEXT_BYTES, b"\0")
    texts = []
    for received in collective.gather(payload, timeout):
        (length,) = struct.unpack_from("<I", received)
        unpacked = zlib.decompressobj().decompress(received[4 : 4 + length]).decode("utf-8", "replace")
        texts.append(unpacked if length < TEXT_BYTES else unpacked.rpartition("\n")[0])
    return texts


def _share_error(collective: Collective, claim: Claim, failed: list[int], timeout: float, by: str) -> Exception:
    first = failed[0]
    text = ""
    if claim.error is not None and collective.rank == first:
        text = f"{type(claim.error).__name__}\n{_words(claim.error)}"
    kind, _, message = _publish(collective, text, timeout)[first].partition("\n")
    who = f"rank {first}: " if collective.size > 1 else ""
    also = f" ({len(failed)} of {collective.size} ranks found a mistake.)" if len(failed) > 1 else ""
    if kind not in ERRORS:
        message = f"{kind}: {message}"
    message = message if message.endswith(".") else f"{message}."
    error = ERRORS.get(kind, FuncavgError)(f"{by}: {who}{message}{also} {NOTHING_MOVED}")
    error.__cause__ = claim.error
    return error


def _words(error: Exception) -> str:
    try:
        return str(error)
    except Exception:  # a user's exception may fail to say what it is; the ranks that wait must hear something
        return "(it has no words for itself)"


def _describe_mismatch(collective: Collective, claim: Claim, different: list[int], timeout: float) -> str:
    other = different[0]
    text = "\n".join(claim.lines) if collective.rank in (0, other) else ""
    texts = _publish(collective, text, timeout)
    ours, theirs = texts[0].split("\n"), texts[other].split("\n")
    differences = find_differences(ours, theirs, "rank 0", f"rank {other}")
    shown = listed(differences)
    if not differences:
        shown = f"    the first {min(len(ours), len(theirs)) - 1} leaves are alike; a later one differs"
    ranks = f"{len(different)} of {collective.size} ranks differ{'s' if len(different) == 1 else ''} from rank 0"
    hint = ""
    if any("(S(" in line and " at " in line for line in differences):  # as leaves of DTensors are described
        hint = (
            " A group that spans the shards of a DTensor cannot average it: pass the mesh of its replicate dimension."
        )
    if any(" (part " in line for line in differences):  # as parts of what FSDP, or others, have cut
        hint = (
            " Parts of one parameter cannot be averaged with each other: average inside "
            "FullyShardedDataParallel.summon_full_params(module), or over a group of ranks that hold the same part."
        )
    return (
        f"ranks passed trees that do not match ({ranks}).\n{shown}\n{NOTHING_MOVED} Every rank must "
        f"pass the same paths, shapes, dtypes, order and options.{hint}"
    )

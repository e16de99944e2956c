"""How the ranks of a torch process group come together: they meet in its store, and connect over Gloo.

What is wrong on one rank before it can connect, such as a network interface that its host does not have, is written
into the store, and raised on every rank that waits there.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from funcavg._errors import PeerLostError

__all__ = ["connect", "translate_errors"]


def connect(users: Any, rank: int, size: int, timeout: float, given_up: threading.Event) -> Any:
    """Meet the other ranks in the store of the users' group; return a Gloo group of our own.

    It touches no memory of a call's, so that whoever has been interrupted can leave it to itself: it ends soon after
    ``given_up`` is set, or, where Gloo is already at it, with the timeout.
    """
    deadline = time.monotonic() + timeout
    me, trouble = f"rank {rank} of {size}", _trouble_here()
    with translate_errors(me, "for the store", timeout):
        own = _own_connection(users)
        # Counted per rank, so that a group made anew over an old store does not find the addresses of the last.
        made = own.add(f"funcavg/made/{rank}", 1)
        store: Any = dist.distributed_c10d.PrefixStore(f"funcavg/{made}", own)
        keys = [f"here/{other}" for other in range(size)]
        if trouble:
            store.set("trouble", f"average: rank {rank}: {trouble}")
        store.set(keys[rank], "1")
        nap = 1e-3
        while True:
            all_here = store.check(keys)  # first: whoever is in trouble has said so before it says that it is here
            said = _trouble_of_any(store)
            if said or all_here:
                break
            if given_up.is_set():
                store.set("trouble", f"{me} has given up.")
            elif time.monotonic() > deadline:
                missing = ", ".join(str(other) for other, key in enumerate(keys) if not store.check([key]))
                raise PeerLostError(
                    f"{me} waited {timeout:g} s for rank(s) {missing}, which never called average on this group."
                )
            given_up.wait(nap)
            nap = min(2 * nap, 0.05)
    if said:
        raise RuntimeError(said) if said.startswith("average: ") else PeerLostError(said)
    left = max(deadline - time.monotonic(), 1.0)
    with translate_errors(me, "to connect", left):
        return dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=left))


def _trouble_of_any(store: Any) -> str:
    """Return what a rank has said that keeps it from connecting, "" if none has."""
    return str(store.get("trouble").decode()) if store.check(["trouble"]) else ""


def _own_connection(users: Any) -> Any:
    """Return a connection of our own to a store: whoever waits in one keeps the rest of the process out of it."""
    try:
        return users.clone()
    except dist.DistError:  # its server is not there
        raise
    except (AttributeError, NotImplementedError, RuntimeError):  # a class that has no clone(), such as a user's own
        return users


def _trouble_here() -> str:
    """Say why Gloo cannot open a connection on this host, as far as that can be known before; "" if it can."""
    setting = os.environ.get("GLOO_SOCKET_IFNAME", "")
    try:
        for name in filter(None, setting.split(",")):
            dist.ProcessGroupGloo.create_device(interface=name)
    except RuntimeError as error:
        if "Unable to find address" in str(error):
            known = ", ".join(name for _, name in socket.if_nameindex())
            return (
                f"GLOO_SOCKET_IFNAME is {setting!r}, of which Gloo says: {_reason(error)}. The interfaces of this "
                f"rank's host are {known}: name one of them that reaches the other ranks' hosts, or unset it."
            )
    return ""


@contextmanager
def translate_errors(me: str, what: str, timeout: float) -> Iterator[None]:
    """Turn what torch raises into `PeerLostError`: ``me`` waited for, or to do, ``what``."""
    started = time.monotonic()
    try:
        yield
    except PeerLostError:
        raise
    except RuntimeError as error:  # torch's own, c10d's DistError among them
        if str(error).startswith("[enforce fail") and "Too many open files" in str(error):
            raise RuntimeError(
                f"average: {me} has no file descriptors left to connect to the others ({_reason(error)}). Raise the "
                f"limit (`ulimit -n`): a connection to each of them takes one."
            ) from error
        waited = f"{time.monotonic() - started:.1f} s of {timeout:g} s"
        raise PeerLostError(f"{me} waited {what} {waited}: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    """Return what it says. Gloo begins with a line of its source, and ends with advice; NCCL with a rank, a stack."""
    reason = re.sub(r"^\[[^]]+\] ", "", str(error)).partition(". This is typically")[0]
    return reason.partition("Exception raised from")[0].rstrip(" .\n")

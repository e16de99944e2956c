"""A transport that is as late as it may be."""

from __future__ import annotations

from typing import Any

from funcavg.collectives.base import Pending
from funcavg.collectives.threads import Threads


class Late(Threads):
    """Moves bytes only when the engine waits for them: whatever it has overwritten by then is wrong."""

    stops_on_error = False

    def exchange(self, send: Any, receive: Any, timeout: float) -> Pending:
        return lambda: super(Late, self).exchange(send, receive, timeout)

    def share(self, buffer: Any, timeout: float) -> Pending:
        return lambda: super(Late, self).share(buffer, timeout)

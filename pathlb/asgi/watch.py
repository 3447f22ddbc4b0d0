"""One request of the Gateway under way: noticing that its caller has left, or makes itself waited for, so that what is
asked for on its behalf is cancelled. ASGI says that a caller has left to who waits in `receive`.
"""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

import anyio

from ..runner import Work
from .lookout import Lookout
from .types import Receive

logger = logging.getLogger("pathlb")

SENDING = 60.0
"""Seconds a caller may take for a short body, or the next part of a long one (nginx's client_body_timeout)."""
TAKING = 300.0
"""Seconds a caller may take for a part of the reply. It holds a place at a gateway; but how much is taken at a time is
up to the system below, and a slow caller is no dead one.
"""
_FOREVER = 1e9


class Disconnected(Exception):
    """The caller left while its request body was being read."""


class Call:
    """A scope around what is done for one caller; it ends early when the caller leaves (`left`), or makes itself waited
    for too long (`overdue`).
    """

    __slots__ = (
        "_lookout",
        "_receive",
        "_scope",
        "_watcher",
        "answering",
        "began",
        "body_read",
        "due",
        "ended",
        "left",
        "overdue",
        "watched",
    )

    def __init__(self, lookout: Lookout, receive: Receive) -> None:
        self._lookout = lookout
        self._receive = receive
        self._scope = lookout.runner.scope(_FOREVER)
        self.began = time.monotonic()
        self.body_read = False
        """Nobody reads (on in) the request body; until then who reads it notices a caller that leaves."""
        self.due = math.inf
        """When a caller that is waited for is overdue."""
        self.overdue = False
        """It was, and what was done for it has been cancelled."""
        self.answering = False
        """It has been given the beginning of an answer."""
        self.left = False
        """The caller is gone."""
        self.watched = False
        """Somebody waits for the caller to leave."""
        self.ended = False
        """Nobody waits for the caller any more."""
        self._watcher: anyio.CancelScope | None = None
        lookout.add(self)

    def look(self) -> Work | None:
        """Give up a caller that is overdue, or begin to wait for it to leave."""
        if self.due <= time.monotonic():
            self.overdue = True
            self.due = math.inf
            self._scope.cancel()
        elif self.body_read and not self.watched:
            self.watched = True
            return self.wait_for_end
        return None

    def __enter__(self) -> Call:
        self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self.end()
        return self._scope.__exit__(exc_type, exc, tb)

    def wait_for_body(self) -> None:
        """From here on it is the caller who is waited for, with (a part of) its body."""
        self.due = time.monotonic() + SENDING

    def wait_for_taking(self) -> None:
        """The same, to take what it is given."""
        self.due = time.monotonic() + TAKING

    def go_on(self) -> None:
        """The caller has done what it was waited for."""
        self.due = math.inf

    def end(self) -> None:
        """The answer is about to be complete: then servers say of a caller that it has left. Ending twice is fine."""
        if self.ended:
            return
        self.ended = True
        self._lookout.discard(self)
        if self._watcher is not None:
            self._watcher.cancel()

    async def wait_for_end(self) -> None:
        """Wait for the caller to leave."""
        if self.ended:
            return
        try:
            with anyio.CancelScope() as self._watcher:
                while (await self._receive())["type"] != "http.disconnect":
                    pass  # the rest of a body that was answered before its end
                if not self.ended:
                    self.left = True
                    self._scope.cancel()
        except Exception:  # then nobody watches this one
            logger.debug("waiting for a caller to leave failed", exc_info=True)

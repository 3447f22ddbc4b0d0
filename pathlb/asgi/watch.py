"""Noticing that a caller has left, so that what was asked for on its behalf is cancelled.

ASGI says so to who waits in `receive`. A task of its own for every request would cost more than balancing it, so one
timer looks for requests that have been under way for a while, and only those are waited for.
"""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

import anyio

from ..runner import AttemptScope, Runner, current_home, make_runner
from .types import Receive

logger = logging.getLogger("pathlb")

SENDING = 60.0
"""Seconds a caller may take for a short body, or the next part of a long one (nginx's client_body_timeout)."""
TAKING = 300.0
"""Seconds a caller may take for a part of the reply. It holds a place at a gateway; but how much is taken at a time is
up to the system below, and a slow caller is no dead one.
"""
_LOOK_EVERY = 0.05  # seconds a request may take before anybody waits for its caller to leave
_FOREVER = 1e9


class Disconnected(Exception):
    """The caller left while its request body was being read."""


class Watch:
    """Watches the callers of one app."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._calls: dict[Call, None] = {}
        self._looking = False

    def call(self, receive: Receive) -> Call:
        """A scope around what is done for one caller; it ends early when the caller leaves (`left`), or makes itself
        waited for too long (`overdue`).
        """
        runner = self._runner
        if runner is None or runner.home is not current_home():
            runner = self._runner = make_runner()
            self._calls.clear()
            self._looking = False
        call = Call(self, receive, runner.scope(_FOREVER))
        self._calls[call] = None
        if not self._looking:
            self._looking = True
            runner.tick(_LOOK_EVERY, self._look)
        return call

    def done(self, call: Call) -> None:
        self._calls.pop(call, None)

    def _look(self) -> bool:
        assert self._runner is not None  # the tick is its
        now = time.monotonic()
        before = now - _LOOK_EVERY
        for call in self._calls:
            if call.began > before:
                break  # the younger ones follow
            if call.due <= now:
                call.lose_patience()
            elif call.body_read and not call.watched:
                call.watched = True
                self._runner.spawn(call.wait_for_end)
        self._looking = bool(self._calls)
        return self._looking


class Call:
    """One caller's request under way."""

    __slots__ = (
        "_receive",
        "_scope",
        "_watch",
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

    def __init__(self, watch: Watch, receive: Receive, scope: AttemptScope) -> None:
        self._watch = watch
        self._receive = receive
        self._scope = scope
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

    def lose_patience(self) -> None:
        """Give up what is done for a caller that is overdue."""
        self.overdue = True
        self.due = math.inf
        self._scope.cancel()

    def end(self) -> None:
        """The answer is about to be complete: then servers say of a caller that it has left. Ending twice is fine."""
        if self.ended:
            return
        self.ended = True
        self._watch.done(self)
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

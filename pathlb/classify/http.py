"""What any HTTP service means by its status codes, and what the ways to fail say about an endpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from ..core.config import Retry
from ..core.model import Cause, Outcome
from ..errors import Fault, UpstreamError
from ..exchange import Headers, Reply, Request
from .base import NeedBody

_INSTANCE_STATUSES = frozenset({500, 502, 503, 504})
_MAY_ASK_TO_WAIT = (Cause.OVERLOAD, Cause.INSTANCE)
_NEVER_LEFT = frozenset({Fault.LOCAL_PROTOCOL, Fault.UNSUPPORTED_PROTOCOL})
_BROKEN_CONNECTION = frozenset({Fault.READ, Fault.WRITE, Fault.CLOSE, Fault.REMOTE_PROTOCOL})


class HTTPClassifier:
    """The generic reading: 500, 502, 503, 504 are the instance's fault, 429 is overload, everything else is an answer.

    `statuses` are the ones worth another endpoint (default: those of `Retry`).
    """

    def __init__(self, statuses: Collection[int] = Retry().statuses) -> None:
        self._statuses = frozenset(statuses)
        self._known: dict[int, Outcome] = {}

    def key(self, request: Request) -> str | None:
        """None: an endpoint is one thing."""
        return None

    def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
        """The outcome a reply head means."""
        return self.by_head(reply)

    def by_head(self, reply: Reply) -> Outcome:
        """What the status says, and Retry-After."""
        outcome = self._known.get(reply.status)
        if outcome is None:
            outcome = self._known[reply.status] = self._by_status(reply.status)
        if reply.status >= 429 and outcome.cause in _MAY_ASK_TO_WAIT:
            retry_after = parse_retry_after(reply.headers)
            if retry_after is not None:
                return Outcome(outcome.cause, retry=outcome.retry, retry_after=retry_after, status=reply.status)
        return outcome

    def failure(self, request: Request, error: UpstreamError) -> Outcome:
        """The outcome a failure without a reply head, or in a reply's body, means."""
        fault = error.fault
        detail = f"{fault.value}: {error.detail}" if error.detail else fault.value
        if fault in _NEVER_LEFT:
            return Outcome(Cause.LOCAL, error.sent, retry=False, detail=detail)
        if error.local or fault is Fault.POOL_TIMEOUT:
            return Outcome(Cause.LOCAL, error.sent, retry=True, detail=detail)
        if error.reused and fault in _BROKEN_CONNECTION:
            # An idle connection the server closed just as it was used again: everyday life, nobody's failure.
            return Outcome(Cause.LOCAL, error.sent, retry=True, detail=f"{detail} (on a reused connection)")
        return Outcome(Cause.INSTANCE, error.sent, retry=True, detail=detail)

    def _by_status(self, status: int) -> Outcome:
        retry = status in self._statuses
        if status == 429:
            return Outcome(Cause.OVERLOAD, retry=retry, status=status)
        if status in _INSTANCE_STATUSES:
            return Outcome(Cause.INSTANCE, retry=retry, status=status)
        cause = Cause.REQUEST if status >= 400 else Cause.OK
        return Outcome(cause, retry=retry, status=status)


def parse_retry_after(headers: Headers, wall_clock: float | None = None) -> float | None:
    """Seconds a Retry-After header asks for, as seconds or as a date; None when absent, negative or unreadable."""
    values = [value for name, value in headers if len(name) == 11 and name.lower() == b"retry-after"]
    if not values:
        return None
    text = values[0].decode("latin-1").strip()
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
        now = time.time() if wall_clock is None else wall_clock
        return max(0.0, (when - datetime.fromtimestamp(now, UTC)).total_seconds())
    return seconds if math.isfinite(seconds) and seconds >= 0 else None

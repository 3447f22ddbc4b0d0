"""The explicit place where telemetry touches a request: around each attempt."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ..core.model import Endpoint, Outcome
from ..exchange import Headers, Reply, Request


class AttemptSpan(Protocol):
    """One attempt under observation."""

    headers: Headers
    """Trace headers to send with this attempt, in place of the request's own of the same names (`less_replaced`)."""

    def end(self, outcome: Outcome, reply: Reply | None, error: BaseException | None, relays: int = 0) -> None:
        """The reply head or the failure is there. Called exactly once, in the task that started the attempt.

        `relays` are those of the caller's request so far, this attempt's included.
        """


class AttemptHook(Protocol):
    """Called by the balancer right before each attempt."""

    def start(self, request: Request, endpoint: Endpoint, resend_count: int) -> AttemptSpan | None:
        """Begin to observe an attempt; None when nothing would be recorded. `resend_count` is 0 for the first.

        Until `end` the context variables of the calling task are the attempt's: start attempts that overlap (hedges)
        each in a task of its own, spawned outside any other attempt.
        """


def less_replaced(request: Request, extra: Headers) -> Request:
    """The request without those of its headers that `extra` replaces; the same object when it has none of them.

    An instrumented client, or the caller of a gateway, has put trace headers on the request already. Two
    `traceparent` make the receiver drop both, and a `tracestate` belongs to the `traceparent` it came with.
    """
    names = {name for name, _ in extra}
    if b"traceparent" in names:
        names.add(b"tracestate")
    kept = [pair for pair in request.headers if pair[0].lower() not in names]
    return request if len(kept) == len(request.headers) else replace(request, headers=kept)

"""What the answers of PATH, Pocket Network's gateway, mean (pokt-network/path, July 2026).

PATH relays to suppliers, who fail independently of the gateway; it retries and hedges among them by itself. Its
`X-Suppliers-Tried` is on everything its relay handler answers, so a 5xx without it comes from something in between, and
an empty one says that nothing was relayed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..core.model import Cause, Outcome
from ..errors import Fault, UpstreamError
from ..exchange import Reply, Request, WholeBody
from .base import NeedBody
from .http import HTTPClassifier
from .jsonrpc import LOOKED_INTO, error_of

_ANSWERS_KEPT = 1_000
_OWN_CODES = (-31001, -31002)
"""Of errors PATH itself made: no answer of a supplier to pass on (qos/jsonrpc/errors.go)."""
_BATCH_LIMIT = 5_500
"""Items PATH takes in a batch by default (max_batch_payloads); beyond it says no more than that nothing answered."""
_TOO_LARGE = "request body exceeds"
_NO_RESPONSE = "Failed to receive any response"
_NO_RESPONSES = "protocol-level error: no endpoint responses received"
"""What the one above is where the service is no EVM chain."""
_BATCH_INCOMPLETE = "Failed to marshal batch response"
_NOT_RELAYED = (
    "no valid endpoints available",
    "ZERO owned apps found",
    "no active sessions could be retrieved",
    "no endpoints could be selected",
    "failed to build protocol context",
)
"""Beginnings of the errors that come before anything is relayed (gateway/http_request_context.go)."""
_RELAYED = (
    "relay: error sending relay",
    "relay request failed",
    "hedge race response failed",
    "no endpoints available for retry",
)
"""Of those that come after: relays side by side (max_parallel_endpoints) are not listed when they fail."""
_WEBSOCKETS_FULL = b"too many concurrent websocket connections"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the headers of a reply say about its making."""

    relayed: bool | None
    """Whether a supplier was tried; None when it is not PATH's relay handler that answered."""
    relays: int | None
    """How many relays at least."""


class PATHClassifier(HTTPClassifier):
    """The key is the `Target-Service-Id`. Two levels: transport faults are the instance's, the rest that of one service
    on it, or of the suppliers behind it, which opens no breaker at all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._outcomes: dict[tuple[int, int | None], Outcome] = {}
        self._answers: dict[tuple[bytes | None, bytes], _Answer] = {}

    def key(self, request: Request) -> str | None:
        """The service."""
        for name, value in request.headers:
            if len(name) == 17 and name.lower() == b"target-service-id":
                return value.decode("latin-1")
        return None

    def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
        """The outcome by status, headers and, for a 400 and for a 500 that was not relayed, by the error object."""
        status = reply.status
        answer = self._answer(reply)
        if status < 400:
            if _is_empty(reply) and request.method != "HEAD":
                return self._empty(request, status, answer)
            return self._answered(status, answer)
        if answer.relayed is None:  # not PATH's relay handler: something in between, or another route
            return self._unknown(request, reply, body)
        if status == 429:  # it neither says that this gateway is overloaded nor when it will not be
            return self._suppliers(status, answer, "429, a supplier's rate limit")
        if status >= 500 and answer.relayed:
            return self._suppliers(status, answer, f"{status}, its suppliers failed")
        if answer.relayed or (status != 400 and status < 500):  # what a supplier says of a request is its verdict
            return self._answered(status, answer)
        if body is None:
            return NeedBody(LOOKED_INTO)
        return (self._refused if status == 400 else self._not_relayed)(request, reply, body, answer)

    def failure(self, request: Request, error: UpstreamError) -> Outcome:
        """Refused or timed out connections are proof; a reply that does not come is usually the suppliers'."""
        outcome = super().failure(request, error)
        if outcome.cause is not Cause.INSTANCE:
            return outcome
        if error.fault is Fault.READ_TIMEOUT:
            return replace(outcome, cause=Cause.BEYOND)
        return replace(outcome, trip=error.fault in (Fault.CONNECT, Fault.CONNECT_TIMEOUT))

    def _by_status(self, status: int) -> Outcome:
        """Without PATH's headers: any 5xx is of something in between."""
        return Outcome(Cause.INSTANCE, retry=True, status=status) if status >= 500 else super()._by_status(status)

    def _answer(self, reply: Reply) -> _Answer:
        tried: bytes | None = None
        retries = b""
        for name, value in reply.headers:
            size = len(name)
            if size == 17 and name.lower() == b"x-suppliers-tried":
                tried = value
            elif size == 13 and name.lower() == b"x-retry-count":
                retries = value
        # Few suppliers serve a session: the same answers come again and again.
        answer = self._answers.get((tried, retries))
        if answer is None:
            if len(self._answers) >= _ANSWERS_KEPT:
                self._answers.clear()
            answer = self._answers[tried, retries] = _explain(tried, retries)
        return answer

    def _key(self, request: Request) -> str:
        return (request.key if request.key is not None else self.key(request)) or ""

    def _answered(self, status: int, answer: _Answer) -> Outcome:
        outcome = self._outcomes.get((status, answer.relays))
        if outcome is None:
            cause = Cause.REQUEST if status >= 400 else Cause.OK
            outcome = self._outcomes[status, answer.relays] = Outcome(cause, status=status, relays=answer.relays)
        return outcome

    def _suppliers(self, status: int, answer: _Answer, detail: str) -> Outcome:
        return Outcome(Cause.BEYOND, retry=True, once=True, status=status, detail=detail, relays=answer.relays)

    def _empty(self, request: Request, status: int, answer: _Answer) -> Outcome:
        if answer.relayed is not None and status == 200:
            return self._suppliers(status, answer, "200 without a body, its suppliers failed")
        if status == 200 and _asks_upgrade(request):
            key, detail = self._key(request), "200 without a body: the upgrade was refused"
            if not key:  # for the want of it
                return Outcome(Cause.REQUEST, status=status, detail=detail)
            return Outcome(Cause.SERVICE, retry=True, unprocessed=True, status=status, key=key, detail=detail)
        return self._answered(status, answer)

    def _unknown(self, request: Request, reply: Reply, body: bytes | None) -> Outcome | NeedBody:
        if reply.status == 503 and _asks_upgrade(request):
            if body is None:
                return NeedBody(len(_WEBSOCKETS_FULL))
            if body == _WEBSOCKETS_FULL:  # which says nothing of its other requests
                key, detail = self._key(request), "503, no more WebSockets"
                return Outcome(Cause.OVERLOAD, retry=True, unprocessed=True, status=503, key=key, detail=detail)
        return self.by_head(reply)

    def _refused(self, request: Request, reply: Reply, body: bytes, answer: _Answer) -> Outcome:
        error = error_of(reply, body)
        message = str(error.get("message", "")) if error else ""
        if not (message.startswith("Service '") and message.endswith("is not configured")):
            return self._answered(400, answer)
        key = self._key(request)
        return Outcome(
            Cause.SERVICE,
            retry=True,
            unprocessed=True,
            trip=True,
            status=400,
            key=key,
            detail=message,
            relays=answer.relays,
        )

    def _not_relayed(self, request: Request, reply: Reply, body: bytes, answer: _Answer) -> Outcome:
        status = reply.status
        error = error_of(reply, body)
        if error is None or error["code"] not in _OWN_CODES:
            return self._suppliers(status, answer, f"{status}, no supplier answered")
        message, data = str(error.get("message", "")), error.get("data")
        why = str(data.get("error", "")) if isinstance(data, dict) else ""
        # A stream may be one too.
        batch = not isinstance(request.body, bytes) or request.body.lstrip()[:1] == b"["
        oversized = not isinstance(request.body, bytes) or (batch and request.body.count(b"{") > _BATCH_LIMIT)
        unanswered = message.startswith(_NO_RESPONSE) or why.startswith(_NO_RESPONSES)
        if why.startswith(_TOO_LARGE) or (oversized and unanswered):
            return Outcome(Cause.REQUEST, status=status, detail=f"{status}, larger than PATH takes", relays=0)
        if message.startswith(_BATCH_INCOMPLETE) or (batch and unanswered):
            return self._suppliers(status, answer, f"{status}, some items of the batch had no answer")
        if why.startswith(_RELAYED):
            return self._suppliers(status, answer, f"{status}, {why}")
        return Outcome(
            Cause.SERVICE,
            retry=True,
            # Suppliers of a batch's items are not always listed.
            unprocessed=why.startswith(_NOT_RELAYED) and not batch,
            status=status,
            key=self._key(request),
            detail=f"{status}, {why or message}",
            relays=answer.relays,
        )


def _explain(tried: bytes | None, retries: bytes) -> _Answer:
    if tried is None:
        return _Answer(None, None)
    suppliers = [name for name in tried.split(b",") if name.strip()]
    count = int(retries) if retries.isdigit() and len(retries) < 5 else 0
    return _Answer(bool(suppliers), max(len(suppliers), count + 1) if suppliers else 0)


def _is_empty(reply: Reply) -> bool:
    if isinstance(reply.body, WholeBody):
        return not reply.body.content
    return any(len(name) == 14 and name.lower() == b"content-length" and value == b"0" for name, value in reply.headers)


def _asks_upgrade(request: Request) -> bool:
    return any(len(name) == 7 and name.lower() == b"upgrade" for name, _ in request.headers)

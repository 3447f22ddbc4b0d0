"""JSON-RPC over HTTP: failures that come inside a 200, and verdicts of the service that come with a 500."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..core.config import Retry
from ..core.model import Cause, Outcome
from ..exchange import Reply, Request, WholeBody
from .base import NeedBody
from .http import HTTPClassifier
from .prefix import decoded

LOOKED_INTO = 8_192
"""Bytes of a body that may be looked into. Errors are short: a longer 200 is a result."""

_VERDICT = Outcome(Cause.REQUEST)
_SAID_BY_HTTP = frozenset({429, 502, 503, 504})
"""Statuses that speak for themselves, whatever error object a proxy puts with them (proxyd: -32011, -32012, -32015)."""

DEFAULT_CODES: Mapping[int, Outcome] = {
    -32603: Outcome(Cause.BEYOND, retry=True, detail="JSON-RPC internal error"),
    -32002: Outcome(Cause.BEYOND, retry=True, detail="JSON-RPC resource unavailable"),
    -32005: Outcome(Cause.OVERLOAD, retry=True, detail="JSON-RPC limit exceeded"),
}
"""The error codes of JSON-RPC 2.0 and EIP-1474 that another endpoint may do better on; all others are verdicts."""


class JSONRPCClassifier(HTTPClassifier):
    """For JSON-RPC services of any kind. An error object is the service's verdict, even with a 500: the endpoint works,
    and another would say the same. `codes` says which ones mean something else (on top of
    `DEFAULT_CODES`); `statuses` are the HTTP statuses worth another endpoint when there is no error object.

    Only bodies of up to 8 KiB whose length is known are looked into, and of batches none.
    """

    def __init__(
        self, codes: Mapping[int, Outcome] | None = None, statuses: Collection[int] = Retry().statuses
    ) -> None:
        super().__init__(statuses)
        self._codes = {**DEFAULT_CODES, **(codes or {})}

    def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
        """The outcome of the error object, if there is one, else that of the status."""
        if body is None:
            return NeedBody(LOOKED_INTO) if request.method == "POST" and _is_short(reply) else self.by_head(reply)
        if reply.status == 200 and b'"error"' not in body and body[:1] == b"{":
            return self.by_head(reply)  # most of them end here
        error = error_of(reply, body)
        if error is None:
            return self.by_head(reply)
        by_head = self.by_head(reply)
        outcome = self._codes.get(error["code"], by_head if reply.status in _SAID_BY_HTTP else _VERDICT)
        detail = outcome.detail or f"JSON-RPC error {error['code']}"
        retry_after = by_head.retry_after if outcome.cause is Cause.OVERLOAD else outcome.retry_after
        return replace(outcome, status=reply.status, retry_after=retry_after, detail=f"{reply.status}, {detail}")


def error_of(reply: Reply, body: bytes) -> dict[str, Any] | None:
    """The error object of a JSON-RPC answer, with an integer `code`; None if the body is something else."""
    text = decoded(reply.headers, body)
    if text is None or b'"error"' not in text:
        return None
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return None
    error = answer.get("error") if isinstance(answer, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return error if isinstance(code, int) and not isinstance(code, bool) else None


def _is_short(reply: Reply) -> bool:
    if isinstance(reply.body, WholeBody):
        return len(reply.body.content) <= LOOKED_INTO
    length = next((value for name, value in reply.headers if name.lower() == b"content-length"), b"")
    return length.isdigit() and int(length) <= LOOKED_INTO

"""What a caller of the gateway gets when there is no reply to hand over: problem+json (RFC 9457), or for a JSON-RPC
request a JSON-RPC error with its id. Neither names an endpoint: inner addresses are nobody's business outside.
"""

from __future__ import annotations

import json
import math
from http import HTTPStatus
from typing import Any, NamedTuple

from ..errors import (
    DeadlineExceeded,
    Fault,
    NoEligibleEndpoint,
    QueueFull,
    QueueTimeout,
    RequestTooLarge,
    UpstreamError,
)
from ..exchange import Headers
from ..jsonrpc.text import parse_answer
from .headers import BadRequest


class Problem(NamedTuple):
    """An answer of the gateway's own."""

    status: int
    title: str
    detail: str
    code: int = -32603
    """The JSON-RPC error it stands for; those of proxyd (Optimism's JSON-RPC proxy) where it has one."""
    retry_after: int | None = None
    """Seconds."""


TOO_LARGE = Problem(413, "Content Too Large", "the request body is larger than this gateway takes", -32600)
NOT_FOUND = Problem(404, "Not Found", "no route leads from here to a gateway", -32601)
NOT_ALLOWED = Problem(405, "Method Not Allowed", "this gateway does not forward it", -32601)
NO_FURTHER = Problem(200, "OK", "the request is answered here and goes no further")
LOOP = Problem(508, "Loop Detected", "the request has been here before", -32603)
UNAVAILABLE = Problem(503, "Service Unavailable", "no gateway is available", -32011, retry_after=1)
OVER_CAPACITY = Problem(503, "Service Unavailable", "every gateway is at its limit", -32012, retry_after=1)
BAD_GATEWAY = Problem(502, "Bad Gateway", "the gateway did not answer", -32014)
BAD_REPLY = Problem(502, "Bad Gateway", "the gateway answered with what cannot be handed over", -32014)
TIMEOUT = Problem(504, "Gateway Timeout", "the gateway did not answer in time", -32015)
SLOW = Problem(408, "Request Timeout", "the request body did not come in time", -32600)
INTERNAL = Problem(500, "Internal Server Error", "this gateway failed", -32603)

_ALLOWED = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, QUERY"


def malformed(detail: str, status: int = 400) -> Problem:
    return Problem(status, HTTPStatus(status).phrase, detail, -32600)


def problem_of(error: Exception) -> Problem:
    """What an error of the balancer, or a refusal, is to the caller."""
    if isinstance(error, BadRequest):
        return malformed(str(error), error.status)
    if isinstance(error, RequestTooLarge):
        return TOO_LARGE
    if isinstance(error, QueueFull | QueueTimeout):
        return OVER_CAPACITY
    if isinstance(error, NoEligibleEndpoint):
        return UNAVAILABLE
    if isinstance(error, DeadlineExceeded):
        return TIMEOUT
    if isinstance(error, UpstreamError):
        return _problem_with(error)
    return INTERNAL


def _problem_with(error: UpstreamError) -> Problem:
    if error.local:
        return OVER_CAPACITY  # of this process: descriptors, ports, connections
    if error.fault in (Fault.CONNECT_TIMEOUT, Fault.READ_TIMEOUT, Fault.WRITE_TIMEOUT):
        return TIMEOUT
    if error.fault is Fault.LOCAL_PROTOCOL:
        return malformed("the request cannot be sent on as it is")
    return BAD_GATEWAY


def render(problem: Problem, body: bytes | None) -> tuple[Headers, bytes]:
    """The fields and the body of the answer; `body` is that of the request, as far as it is known."""
    if problem.status < 400:
        return [(b"content-length", b"0")], b""
    calls = _read_calls(body) if body else None
    if calls is None or not calls.ids:
        kind = b"application/problem+json"
        content: Any = {"title": problem.title, "status": problem.status, "detail": problem.detail}
    else:
        kind = b"application/json"
        error = {"code": problem.code, "message": f"{problem.title}: {problem.detail}"}
        answers = [{"jsonrpc": "2.0", "id": one, "error": error} for one in calls.ids]
        content = answers if calls.batch else answers[0]
    data = json.dumps(content).encode()
    headers: Headers = [(b"content-type", kind), (b"content-length", b"%d" % len(data))]
    if problem.retry_after is not None:
        headers.append((b"retry-after", b"%d" % problem.retry_after))
    if problem.status == 405:
        headers.append((b"allow", _ALLOWED))
    return headers, data


class _Calls(NamedTuple):
    """The calls of a JSON-RPC request that wait for an answer: notifications do not, what is no call does."""

    ids: list[Any]
    batch: bool


def _read_calls(body: bytes) -> _Calls | None:
    """None when it is not JSON-RPC."""
    if b'"jsonrpc"' not in body:
        return None
    try:
        request = parse_answer(body)
    except (ValueError, RecursionError):
        # Broken, or only its beginning is known. What answers has to have an id, and null says that it is unknown.
        return _Calls([None], batch=False) if body.lstrip()[:1] in (b"{", b"[") else None
    batch = isinstance(request, list)
    calls = request if batch else [request]
    if not any(isinstance(call, dict) and "method" in call for call in calls):
        return None
    return _Calls([_id(call) for call in calls if not isinstance(call, dict) or "id" in call], batch)


def _id(call: Any) -> Any:
    given = call["id"] if isinstance(call, dict) else None
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return None
    return given if not isinstance(given, float) or math.isfinite(given) else None

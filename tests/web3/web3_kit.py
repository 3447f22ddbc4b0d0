"""What these tests share: gateways played in memory, and the answers they give."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pathlb import Retry
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Body, ScriptedUpstream
from pathlb.web3 import AsyncBalancedProvider

URL = "http://gateway"


def result(value: Any, of: int | None = 0) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": of, "result": value}


def failure(code: int, message: str, of: int | None = 0) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": of, "error": {"code": code, "message": message}}


def reply(content: Any, status: int = 200, headers: Headers | None = None) -> Reply:
    """A reply with these bytes, or this as JSON."""
    return Reply(status, headers or [], Body(content if isinstance(content, bytes) else json.dumps(content).encode()))


def sent(upstream: ScriptedUpstream) -> list[Any]:
    """The JSON of the requests that arrived."""
    return [json.loads(_bytes(request)) for request, _ in upstream.calls]


def _bytes(request: Request) -> bytes:
    assert isinstance(request.body, bytes)
    return request.body


def answering(answer: Callable[[dict[str, Any]], Any]) -> ScriptedUpstream:
    """Answers each call by itself, and a batch with the list of its answers."""

    def handle(request: Request, extra_headers: Headers) -> Reply:
        body = json.loads(_bytes(request))
        return reply([answer(call) for call in body] if isinstance(body, list) else answer(body))

    return ScriptedUpstream(handle)


def provider_of(*upstreams: ScriptedUpstream, **options: Any) -> AsyncBalancedProvider:
    """A provider over scripted gateways, http://gateway, http://gateway-1 ..., with one attempt each."""
    options.setdefault("retry", Retry(attempts=1))
    table = {f"{URL}-{index}" if index else URL: upstream for index, upstream in enumerate(upstreams)}
    return AsyncBalancedProvider(list(table), upstream=ScriptedUpstream.factory(table), **options)

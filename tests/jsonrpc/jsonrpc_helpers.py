"""What the tests of the JSON-RPC layer are written in: calls, answers, and a road that answers from a function."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import anyio
import anyio.lowlevel
from hypothesis import settings

from pathlb.core.model import Cause, Outcome, Sent
from pathlb.exchange import Attempt, Headers, Reply, Request
from pathlb.jsonrpc import JSONRPC, JSONRPCLayer
from pathlb.testing import FakeClock

FUZZ = settings(max_examples=200, deadline=None, derandomize=True, database=None)

A, B, C = "http://10.0.0.1:3069", "http://10.0.0.2:3069", "http://10.0.0.3:3069"
JSON: Headers = [(b"Content-Type", b"application/json")]
OK = Outcome(Cause.OK, status=200)
LOST = Outcome(Cause.INSTANCE, Sent.MAYBE_SENT, retry=True, detail="ReadError: scripted")
NOT_SENT = Outcome(Cause.INSTANCE, Sent.NOT_SENT, retry=True, detail="ConnectError: scripted")


def attempt(endpoint: str = A, outcome: Outcome = OK) -> Attempt:
    return Attempt(endpoint, "least connections", 0, 3, outcome, 0.01)


class Parts:
    """A body in parts that counts how often it is closed; `error` breaks it off, `held` keeps it from ending."""

    def __init__(self, *parts: bytes, error: Exception | None = None, held: anyio.Event | None = None) -> None:
        self._rest = list(parts)
        self._error = error
        self._held = held
        self.closed = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self._rest:
            return self._rest.pop(0)
        if self._held is not None:
            await self._held.wait()
        if self._error is not None:
            raise self._error
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.closed += 1


def call(method: str, *params: Any, id: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": list(params)}


def answer(id: Any, result: Any = "0x1") -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "result": result}


def error(id: Any, message: str, code: int = -32000) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": message}}


def post(payload: Any, headers: Headers | None = None, **options: Any) -> Request:
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return Request("POST", b"/v1", JSON.copy() if headers is None else headers, body, **options)


def reply(
    payload: Any,
    *,
    status: int = 200,
    headers: Headers | None = None,
    attempts: Iterable[Attempt] = (),
    body: Parts | None = None,
) -> Reply:
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return Reply(
        status,
        [*JSON, (b"Content-Length", b"%d" % len(content)), *(headers or [])],
        body or Parts(content[:5], content[5:]),
        attempts=tuple(attempts) or (attempt(),),
    )


Handler = Callable[[Request], Reply | Exception | Awaitable[Reply | Exception]]


class Road:
    """The balancer's road, played by a function; it remembers every request and every body it gave out."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.requests: list[Request] = []
        self.bodies: list[Any] = []

    async def send(self, request: Request) -> Reply:
        self.requests.append(request)
        await anyio.lowlevel.checkpoint()
        result = self._handler(request)
        if isinstance(result, Awaitable):
            result = await result
        if isinstance(result, Exception):
            try:
                raise result
            finally:
                del result  # its traceback holds this frame
        self.bodies.append(result.body)
        return result

    @property
    def payloads(self) -> list[Any]:
        """The JSON of the requests."""
        return [json.loads(request.body) for request in self.requests if isinstance(request.body, bytes)]

    @property
    def closed_once(self) -> bool:
        return all(body.closed == 1 for body in self.bodies)


def layer(road: Road, clock: FakeClock | None = None, **settings: Any) -> JSONRPCLayer:
    return JSONRPCLayer(JSONRPC(**settings), road.send, clock or FakeClock(), 30.0)


async def read(reply: Reply) -> Any:
    """The JSON of a reply, and its body closed."""
    content = b"".join([part async for part in reply.body])
    await reply.body.aclose()
    return json.loads(content)


def header(reply_or_request: Reply | Request, name: bytes) -> bytes | None:
    """The value of a header that is there once; None if it is not."""
    values = [value for key, value in reply_or_request.headers if key.lower() == name]
    assert len(values) <= 1
    return values[0] if values else None

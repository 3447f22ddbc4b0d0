"""WebSockets through the gateway: a handshake that is balanced like any request, then messages both ways (`relay`).

The handshake may be retried elsewhere. From the 101 on its lease is held and nothing is sent a second time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import anyio

from ..balancer import Balancer
from ..core.errors import ConfigError
from ..errors import Fault, PathlbError, UpstreamError
from ..exchange import Attempt, Headers, Reply, Request
from .headers import BadReply, BadRequest, is_token
from .problems import Problem, problem_of
from .types import Receive, Scope, Send

try:
    from websockets.client import ClientProtocol
    from websockets.datastructures import Headers as WireHeaders
    from websockets.exceptions import InvalidHandshake
    from websockets.http11 import Response
    from websockets.protocol import State
    from websockets.typing import Subprotocol
    from websockets.uri import parse_uri
except ImportError as exc:
    raise ConfigError("websockets", "is needed for WebSockets through a Gateway: pip install 'pathlb[serve]'") from exc

from .relay import Relay

logger = logging.getLogger("pathlb")

_PART = 65_536  # bytes of a refusal that are handed over at once, or about

_NOT_OPENED = Problem(502, "Bad Gateway", "the gateway did not open a WebSocket", -32014)
_HANDSHAKE = b"sec-websocket-"
_UNABLE = (Fault.LOCAL_PROTOCOL, Fault.UNSUPPORTED_PROTOCOL)  # an upstream that cannot ask for one: HTTP/2
_SERVERS_OWN = frozenset({b"content-length", b"content-type", b"date", b"server"})
"""Of a 101, what is not for the caller: its server says that for itself."""


class Handshake:
    """What asks a gateway for a WebSocket, and the judge of its answer. Raises `BadRequest`."""

    def __init__(self, subprotocols: Sequence[str], max_message: int) -> None:
        if not all(is_token(name) for name in subprotocols):
            raise BadRequest("a subprotocol is malformed")
        offered = [Subprotocol(name) for name in subprotocols] or None
        # No extensions are offered: compressing is worth it towards the caller, whose server does.
        self.protocol = ClientProtocol(
            parse_uri("ws://gateway/"), subprotocols=offered, state=State.OPEN, max_size=max_message
        )
        self.max_message = max_message
        self._offered = ", ".join(subprotocols)

    def into(self, request: Request) -> Request:
        """The request, asking for it. It may be sent again for as long as nobody has said yes."""
        fields = [
            (b"connection", b"Upgrade"),  # alone and spelt like this: PATH looks for nothing else
            (b"upgrade", b"websocket"),
            (b"sec-websocket-version", b"13"),
            (b"sec-websocket-key", self.protocol.key.encode("ascii")),
        ]
        if self._offered:
            fields.append((b"sec-websocket-protocol", self._offered.encode("ascii")))
        request.headers = [pair for pair in request.headers if not pair[0].startswith(_HANDSHAKE)] + fields
        request.idempotent = True
        return request

    def stream(self, reply: Reply) -> Any:
        """The bytes of the socket after a 101. Raises `BadReply`."""
        headers = WireHeaders((name.decode("latin-1"), value.decode("latin-1")) for name, value in reply.headers)
        try:
            self.protocol.process_response(Response(reply.status, "", headers))
        except InvalidHandshake as exc:
            raise BadReply(str(exc)) from exc
        stream = reply.extensions.get("network_stream")
        if not hasattr(stream, "write"):
            raise BadReply("its upstream gives no access to the connection: no WebSockets with it")
        return stream


class NotOpened(Exception):
    """There is no WebSocket, and this is what the caller is to be told."""

    def __init__(self, problem: Problem, attempts: Sequence[Attempt]) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.attempts = attempts


async def forward(
    handshake: Handshake,
    balancer: Balancer,
    request: Request,
    fields: Callable[[Reply], Headers],
    scope: Scope,
    receive: Receive,
    send: Send,
) -> None:
    """Ask a gateway, and relay what follows: messages, or its refusal. Raises `NotOpened`.

    `fields` are those of a reply for the caller; it raises `BadReply` for what is none.
    """
    reply = await _ask(balancer, request, receive)
    if reply is None:
        return
    if not isinstance(reply, Reply):
        unable = isinstance(reply, UpstreamError) and reply.fault in _UNABLE
        logger.log(logging.WARNING if unable else logging.DEBUG, "no WebSocket: %s", reply)
        raise NotOpened(_NOT_OPENED if unable else problem_of(reply), reply.attempts)
    try:
        headers = fields(reply)
        if reply.status == 101:
            stream = handshake.stream(reply)
            headers = [(n, v) for n, v in headers if n not in _SERVERS_OWN and not n.startswith(_HANDSHAKE)]
            chosen = handshake.protocol.subprotocol
            relay = Relay(handshake.protocol, handshake.max_message, stream, reply.body, receive, send)
            await relay.run({"type": "websocket.accept", "subprotocol": chosen, "headers": headers})
        elif 300 <= reply.status <= 599:
            await _refuse_like(reply, headers, scope, send)
        else:  # a success, as which PATH refuses what it cannot serve, would confuse everybody
            raise NotOpened(_NOT_OPENED, reply.attempts)
    except BadReply as exc:
        logger.warning("%s answered the handshake of a WebSocket, but not as it must: %s", _source(reply), exc)
        raise NotOpened(_NOT_OPENED, reply.attempts) from None
    finally:
        with anyio.CancelScope(shield=True):
            await reply.body.aclose()


async def refuse(scope: Scope, send: Send, status: int, headers: Headers, body: bytes) -> None:
    """No WebSocket, and why, where the server can say it."""
    if await _begin_refusal(scope, send, status, headers):
        await send({"type": "websocket.http.response.body", "body": body})


async def _refuse_like(reply: Reply, headers: Headers, scope: Scope, send: Send) -> None:
    if await _begin_refusal(scope, send, reply.status, headers):
        held = b""
        async for part in reply.body:
            if len(held) > _PART:
                await send({"type": "websocket.http.response.body", "body": held, "more_body": True})
                held = b""
            held += part
        # Short ones, which they all are, at once: granian knows no others.
        await send({"type": "websocket.http.response.body", "body": held})


async def _begin_refusal(scope: Scope, send: Send, status: int, headers: Headers) -> bool:
    """Whether there may be a body. Without the extension the server has one answer, a 403."""
    if "websocket.http.response" not in (scope.get("extensions") or ()):
        await send({"type": "websocket.close"})
        return False
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    return True


async def _ask(balancer: Balancer, request: Request, receive: Receive) -> Reply | PathlbError | None:
    """The answer to the handshake, or why there is none; None when the caller left meanwhile."""
    answer: Reply | PathlbError | None = None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "websocket.disconnect":
            pass  # nothing else can come before the accept
        left = True
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                answer = await balancer.send(request)
            except PathlbError as exc:
                answer = exc
            tasks.cancel_scope.cancel()
    except BaseException:
        await _drop(answer)
        raise
    if left:  # at the moment of the answer: nobody will say so again
        await _drop(answer)
        return None
    return answer


async def _drop(answer: Reply | PathlbError | None) -> None:
    if isinstance(answer, Reply):
        with anyio.CancelScope(shield=True):
            await answer.body.aclose()


def _source(reply: Reply) -> str:
    return reply.attempts[-1].endpoint if reply.attempts else "a gateway"

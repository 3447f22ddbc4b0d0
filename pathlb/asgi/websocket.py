"""WebSockets through the gateway: a handshake that is balanced like any request, then messages both ways.

The handshake may be retried elsewhere. From the 101 on its lease is held and nothing is sent a second time: when one
side ends, the other one is told how.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import anyio

from ..balancer import Balancer
from ..core.errors import ConfigError
from ..errors import Fault, PathlbError, UpstreamError
from ..exchange import Attempt, Headers, Reply, ReplyBody, Request
from .headers import BadReply, BadRequest, is_token
from .problems import Problem, problem_of
from .types import Message, Receive, Scope, Send

try:
    from websockets.client import ClientProtocol
    from websockets.datastructures import Headers as WireHeaders
    from websockets.exceptions import InvalidHandshake, PayloadTooBig
    from websockets.frames import CloseCode, Frame, Opcode
    from websockets.http11 import Response
    from websockets.protocol import State
    from websockets.typing import Subprotocol
    from websockets.uri import parse_uri
except ImportError as exc:
    raise ConfigError("websockets", "is needed for WebSockets through a Gateway: pip install 'pathlb[serve]'") from exc

logger = logging.getLogger("pathlb")

_READ = 65_536  # bytes of a gateway at once, at most
_QUIET = 20.0  # seconds of silence after which a gateway is pinged
_PONG = 20.0  # seconds it has then to say anything
_CLOSING = 5.0  # seconds a side may take to end what the other one has ended
_GOODBYE = 1.0  # seconds to tell a gateway that this side is cancelled
_ANSWERS = 100  # pongs waiting to be written; a gateway that pings more and does not read is not read either
_REASON = 123  # bytes of a close reason, at most

_NOT_OPENED = Problem(502, "Bad Gateway", "the gateway did not open a WebSocket", -32014)
_HANDSHAKE = b"sec-websocket-"
_UNABLE = (Fault.LOCAL_PROTOCOL, Fault.UNSUPPORTED_PROTOCOL)  # an upstream that cannot ask for one: HTTP/2
_SERVERS_OWN = frozenset({b"content-length", b"content-type", b"date", b"server"})
"""Of a 101, what is not for the caller: its server says that for itself."""


class Close(NamedTuple):
    """How a side is told that the other one has ended."""

    code: int | None
    """None is a close without a code."""
    reason: str = ""


_AWAY = Close(CloseCode.GOING_AWAY)
_LOST = Close(CloseCode.INTERNAL_ERROR, "the connection to the gateway was lost")
_BROKEN = Close(CloseCode.INTERNAL_ERROR, "the gateway broke the WebSocket protocol")


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
            relay = _Relay(handshake, stream, reply.body, receive, send)
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
            if len(held) > _READ:
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

    async def watch() -> None:
        while (await receive())["type"] != "websocket.disconnect":
            pass  # nothing else can come before the accept
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
        if isinstance(answer, Reply):
            with anyio.CancelScope(shield=True):
                await answer.body.aclose()
        raise
    return answer


def _source(reply: Reply) -> str:
    return reply.attempts[-1].endpoint if reply.attempts else "a gateway"


class _GatewayLost(Exception):
    """The connection to the gateway cannot be read from, or written to, any more."""


class _Relay:
    """One open WebSocket: a task each way. Neither reads on before the other side has taken what was read."""

    def __init__(self, handshake: Handshake, stream: Any, body: ReplyBody, receive: Receive, send: Send) -> None:
        self._protocol = handshake.protocol
        self._max_message = handshake.max_message
        self._stream = stream
        self._body = body
        self._receive = receive
        self._send = send
        self._outgoing: list[bytes] = []  # frames for the gateway, in the order they were made
        self._writing = anyio.Lock(fast_acquire=True)
        self._answering = False
        self._opcode = Opcode.TEXT
        self._fragments: list[bytes] = []  # of the message that is coming in
        self._over = False
        self._to_caller: Close | None = None
        self._to_gateway: Close | None = None

    async def run(self, accept: Message) -> None:
        """Accept, and relay until one side has ended and the other has been told."""
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    await self._send(accept)
                except OSError:  # the caller has left
                    self._end(None, _AWAY)
                self._tasks.start_soon(self._from_caller)
                await self._from_gateway()
        except BaseException:
            with anyio.move_on_after(_GOODBYE, shield=True), contextlib.suppress(_GatewayLost):
                await self._close_gateway(_AWAY)
            raise
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._leave_caller)
            await self._leave_gateway()

    # --- while it is open

    async def _from_caller(self) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "websocket.disconnect":
                self._end(None, _as_told(message))
                return
            text = message.get("text")
            data: bytes = message["bytes"] if text is None else text.encode()
            if len(data) > self._max_message:
                self._end(self._too_big("a message"), _AWAY)
                return
            if self._protocol.state is not State.OPEN:
                return  # it has been read to its end by the other task
            (self._protocol.send_binary if text is None else self._protocol.send_text)(data)
            try:
                await self._flush()
            except _GatewayLost:
                await self._end_unless_known(_LOST, None)  # it may have said why, before
                return

    async def _from_gateway(self) -> None:
        protocol = self._protocol
        while True:
            try:
                self._take(await self._read())
            except _GatewayLost as exc:
                logger.debug("a WebSocket lost its gateway: %s", exc)
                self._end(_LOST, None)
                return
            await self._answer()
            for message in self._messages():
                try:
                    await self._send(message)
                except (OSError, RuntimeError):  # servers differ in what they raise when the caller has left, if at all
                    await self._end_unless_known(None, _AWAY)
                    return
            if protocol.state is not State.OPEN:
                self._end(self._farewell(), None)
                return

    async def _read(self) -> bytes:
        """What the gateway says next; a silent one is pinged, so that one that is no more does not stay for ever."""
        with anyio.move_on_after(_QUIET):
            return await self._read_once()
        self._protocol.send_ping(b"")
        await self._answer()
        with anyio.move_on_after(_PONG):
            return await self._read_once()
        raise _GatewayLost("it does not answer pings")

    async def _read_once(self) -> bytes:
        try:
            data: bytes = await self._stream.read(_READ)
        except Exception as exc:  # each upstream has its own
            raise _GatewayLost(str(exc)) from exc
        return data

    def _take(self, data: bytes) -> None:
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()

    def _messages(self) -> list[Message]:
        """Those that are complete, for the caller."""
        return [
            message
            for frame in self._protocol.events_received()
            if isinstance(frame, Frame) and (message := self._assemble(frame)) is not None
        ]

    def _assemble(self, frame: Frame) -> Message | None:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY):
            self._opcode = frame.opcode
        elif frame.opcode is not Opcode.CONT:
            return None
        self._fragments.append(bytes(frame.data))
        if not frame.fin:
            return None
        data = b"".join(self._fragments)
        self._fragments = []
        if self._opcode is Opcode.BINARY:
            return {"type": "websocket.send", "bytes": data}
        try:
            return {"type": "websocket.send", "text": data.decode()}
        except UnicodeDecodeError:
            self._protocol.fail(CloseCode.INVALID_DATA)
            return None

    async def _answer(self) -> None:
        """Have pings and pongs written, by somebody else: a gateway that waits to be read must not be waited for."""
        self._outgoing += self._protocol.data_to_send()
        if len(self._outgoing) > _ANSWERS:
            with contextlib.suppress(_GatewayLost):
                await self._flush()
        elif self._outgoing and not self._answering:
            self._answering = True
            self._tasks.start_soon(self._write_answers)

    async def _write_answers(self) -> None:
        with contextlib.suppress(_GatewayLost):
            while self._outgoing:  # more may come meanwhile
                await self._flush()
        self._answering = False

    async def _flush(self) -> None:
        """Write what there is for the gateway. Raises `_GatewayLost`."""
        self._outgoing += self._protocol.data_to_send()
        async with self._writing:
            frames, self._outgoing = self._outgoing, []
            data = b"".join(frames)
            if not data:  # written by another task
                return
            try:
                await self._stream.write(data)
            except Exception as exc:
                raise _GatewayLost(str(exc)) from exc

    # --- the end

    def _end(self, caller: Close | None, gateway: Close | None) -> None:
        """It is over, and this is what the sides are still to be told; the first word counts."""
        if not self._over:
            self._over = True
            self._to_caller, self._to_gateway = caller, gateway
        self._tasks.cancel_scope.cancel()

    async def _end_unless_known(self, caller: Close | None, gateway: Close | None) -> None:
        """Something cannot be written. The task that reads is about to learn why; else this is how it ends."""
        with anyio.move_on_after(_CLOSING):
            await anyio.sleep_forever()
        self._end(caller, gateway)

    def _farewell(self) -> Close:
        """How the gateway ended it, for the caller."""
        received, failure = self._protocol.close_rcvd, self._protocol.parser_exc
        if received is not None:
            # ASGI cannot close without a code.
            code = CloseCode.NORMAL_CLOSURE if received.code == CloseCode.NO_STATUS_RCVD else received.code
            return Close(int(code), received.reason)
        if isinstance(failure, EOFError):
            return _LOST
        return self._too_big("the gateway's message") if isinstance(failure, PayloadTooBig) else _BROKEN

    def _too_big(self, what: str) -> Close:
        return Close(CloseCode.MESSAGE_TOO_BIG, f"{what} is larger than {self._max_message} bytes")

    async def _leave_caller(self) -> None:
        if self._to_caller is not None:
            with contextlib.suppress(OSError, RuntimeError):
                await self._send(
                    {"type": "websocket.close", "code": self._to_caller.code, "reason": self._to_caller.reason}
                )

    async def _leave_gateway(self) -> None:
        """Close towards the gateway, and wait for it to close too. Then nothing is in flight there any more."""
        with anyio.move_on_after(_CLOSING), contextlib.suppress(_GatewayLost):
            await self._close_gateway(self._to_gateway)
            while self._protocol.state is not State.CLOSED:
                self._take(await self._read_once())
                self._protocol.events_received()
        await self._body.aclose()

    async def _close_gateway(self, close: Close | None) -> None:
        if close is not None and self._protocol.state is State.OPEN:
            self._protocol.send_close(close.code, close.reason)
        await self._flush()


def _as_told(disconnect: Message) -> Close:
    """What a caller's end is to the gateway. Servers say 1005 or 1006 of a caller that vanished."""
    code, reason = disconnect.get("code"), disconnect.get("reason")
    if code == CloseCode.NO_STATUS_RCVD and reason is not None:
        return Close(None)
    if code is not None and (1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        return Close(int(code), (reason or "").encode()[:_REASON].decode(errors="ignore"))
    return _AWAY

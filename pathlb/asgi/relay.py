"""One open WebSocket, relayed: messages both ways, and when one side ends, the other one is told how."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, NamedTuple

import anyio
from websockets.client import ClientProtocol
from websockets.exceptions import PayloadTooBig
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State

from ..exchange import ReplyBody
from .types import Message, Receive, Send
from .watch import TAKING

logger = logging.getLogger("pathlb")

_READ = 65_536  # bytes of a gateway at once, at most
_QUIET = 20.0  # seconds of silence after which a gateway is pinged
_PONG = 20.0  # seconds it has then to say anything
_CLOSING = 5.0  # seconds a side may take to end what the other one has ended
_GOODBYE = 1.0  # seconds to tell a gateway that this side is cancelled
_ANSWERS = 100  # pongs waiting to be written; a gateway that pings more and does not read is not read either
_REASON = 123  # bytes of a close reason, at most


class Close(NamedTuple):
    """How a side is told that the other one has ended."""

    code: int | None
    """None is a close without a code."""
    reason: str = ""


_AWAY = Close(CloseCode.GOING_AWAY)
_LOST = Close(CloseCode.INTERNAL_ERROR, "the connection to the gateway was lost")
_BROKEN = Close(CloseCode.INTERNAL_ERROR, "the gateway broke the WebSocket protocol")


class _GatewayLost(Exception):
    """The connection to the gateway cannot be read from, or written to, any more."""


class Relay:
    """One open WebSocket: a task each way. Neither reads on before the other side has taken what was read."""

    def __init__(
        self, protocol: ClientProtocol, max_message: int, stream: Any, body: ReplyBody, receive: Receive, send: Send
    ) -> None:
        self._protocol = protocol
        self._max_message = max_message
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
            del message, text, data  # which may be large, and the next one may not come for long
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
                    with anyio.fail_after(TAKING):  # a caller that takes nothing holds a place at a gateway
                        await self._send(message)
                except (OSError, RuntimeError):  # servers differ in what they raise when the caller has left, if at all
                    await self._end_unless_known(None, _AWAY)
                    return
                del message
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

"""The body of a request, on its way in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from ..exchange import OneShotBody
from .headers import BadRequest, Framing
from .types import Message, Receive
from .watch import Call, Disconnected

REPLAYED = 65_536
"""Bytes of a request body that are held, so that it can be sent again; a longer one streams, and is sent once."""

_PATIENCE = 60.0  # seconds to wait for the next part of a body that streams: it keeps an upstream waiting


class TooLarge(Exception):
    """The request body is larger than allowed."""


class Intake:
    """The request body: in memory if it is short, else as it comes."""

    __slots__ = ("_framing", "_held", "_max_body", "_receive", "_size", "call", "ended", "seen")

    def __init__(self, receive: Receive, framing: Framing, max_body: int) -> None:
        self._receive = receive
        self._framing = framing
        self._max_body = max_body
        self._held: list[bytes] = []
        self._size = 0
        self.ended = not framing.length and not framing.open_ended
        """Nothing of it is still to come."""
        self.seen = b""
        """All of a body that is held, else its beginning."""
        self.call: Call | None = None
        """What is told when the body has ended."""

    async def begin(self) -> bytes | OneShotBody:
        """The body, in as far as it is held. Raises `BadRequest`, `Disconnected` and `TooLarge`."""
        if self.ended:
            return b""
        length = self._framing.length
        if length is not None:
            if length > self._max_body:
                raise TooLarge
            if length > REPLAYED:
                return OneShotBody(self._rest())
        held = self._held
        try:
            while not self.ended and self._size <= REPLAYED:
                held.append(await self._next())
        finally:
            self.seen = held[0] if len(held) == 1 else b"".join(held)
        short = self._size <= REPLAYED
        return self.seen if short and self.ended else OneShotBody(self._rest())

    async def _next(self) -> bytes:
        message: Message = await self._receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part: bytes = message.get("body", b"")
        self._size += len(part)
        if self._size > self._max_body:
            raise TooLarge
        if not message.get("more_body", False):
            self.ended = True
            if self.call is not None:
                self.call.body_read = True
            self._check_end()
        return part

    def _check_end(self) -> None:
        """Servers lose bodies: uvicorn with httptools does that of a request with an Upgrade."""
        length, upgrade = self._framing.length, self._framing.upgrade
        if self._size != length if length is not None else upgrade and not self._size:
            raise BadRequest("the request body is incomplete")

    async def _rest(self) -> AsyncIterator[bytes]:
        for part in self._held:
            yield part
        self._held.clear()
        while not self.ended:
            with anyio.move_on_after(_PATIENCE) as waiting:
                part = await self._next()
            if waiting.cancelled_caught:
                raise BadRequest("the request body did not come in time", 408)
            self.seen = self.seen or part
            yield part

"""The body of a request, on its way in."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio

from ..exchange import Headers, OneShotBody
from .headers import BadRequest, Framing
from .types import Message, Receive
from .watch import Call, Disconnected

REPLAYED = 65_536
"""Bytes of a request body that are held, so that it can be sent again; a longer one streams, and is sent once."""

_GLIMPSE = 1.0  # seconds to wait for the beginning of a body, for an answer that is to be of its kind


class TooLarge(Exception):
    """The request body is larger than allowed."""


class Intake:
    """The request body: in memory if it is short, else as it comes."""

    __slots__ = ("_call", "_framing", "_held", "_max_body", "_receive", "_size", "ended", "seen")

    def __init__(self, receive: Receive, framing: Framing, max_body: int, call: Call) -> None:
        self._call = call
        self._receive = receive
        self._framing = framing
        self._max_body = max_body
        self._held: list[bytes] = []
        self._size = 0
        self.ended = call.body_read = not framing.length and not framing.open_ended
        """Nothing of it is still to come."""
        self.seen = b""
        """All of a body that is held, else its beginning."""

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
        self._call.wait_for_body()
        try:
            while not self.ended and self._size <= REPLAYED:
                held.append(await self._next())
        finally:
            self._call.go_on()
            self.seen = held[0] if len(held) == 1 else b"".join(held)
        short = self._size <= REPLAYED
        return self.seen if short and self.ended else OneShotBody(self._rest())

    async def glimpse(self) -> bytes:
        """What is known of the body, for an answer that is to be of its kind: of JSON at least the beginning, if that
        comes by itself.
        """
        if not self.seen and not self.ended and not self._framing.expects and _is_json(self._framing.headers):
            with anyio.move_on_after(_GLIMPSE):
                self.seen = (await self._receive()).get("body", b"")
        return self.seen

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
            self._call.body_read = True
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
            self._call.wait_for_body()
            try:
                part = await self._next()
            finally:  # nobody may want the rest, and the caller is waited for no longer
                self._call.go_on()
            self.seen = self.seen or part
            yield part


def _is_json(headers: Headers) -> bool:
    return any(name == b"content-type" and b"json" in value for name, value in headers)

"""The floors: what is left of a request when the pool, the balancing or the whole network is taken away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import NamedTuple, cast

import httptools
import httpx


class BareReply(NamedTuple):
    status: int
    headers: list[tuple[bytes, bytes]]
    parts: list[bytes]
    """The body as it arrived."""


class BareClient:
    """HTTP/1.1 to one port with nothing around it: the connection used last, one future and one write a request.

    No limits, timeouts, retries or expiry; a reply is handed over when it is complete.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._idle: list[_Connection] = []

    async def send(self, request: bytes) -> BareReply:
        """Send a request, head and body in one; raises `ConnectionError` when its connection breaks."""
        if self._idle:
            return await self._idle.pop().ask(request)
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: _Connection(self._idle), self._host, self._port)
        return await connection.ask(request)

    async def aclose(self) -> None:
        """Close the connections no request is on."""
        while self._idle:
            self._idle.pop().close()


class _Connection(asyncio.Protocol):
    """The protocol asyncio calls, and the callbacks of its parser."""

    def __init__(self, idle: list[_Connection]) -> None:
        self._idle = idle
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._reply: asyncio.Future[BareReply]
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []

    def ask(self, request: bytes) -> asyncio.Future[BareReply]:
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._reply

    def close(self) -> None:
        self._transport.close()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        with suppress(ValueError):  # it was busy, or closed by us
            self._idle.remove(self)
        if not self._reply.done():
            self._reply.set_exception(exc or ConnectionError("the server closed the connection"))

    # httptools' side

    def on_message_begin(self) -> None:
        self._headers = []
        self._parts = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name, value))

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._idle.append(self)
        if not self._reply.done():
            self._reply.set_result(BareReply(self._parser.get_status_code(), self._headers, self._parts))


class BareTransport(httpx.AsyncBaseTransport):
    """An httpx transport over `BareClient`: what httpx costs over the fastest transport there could be."""

    def __init__(self, host: str, port: int) -> None:
        self._client = BareClient(host, port)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        lines = [b"%b %b HTTP/1.1\r\n" % (request.method.encode("ascii"), request.url.raw_path)]
        lines += [b"%b: %b\r\n" % header for header in request.headers.raw]
        lines += [b"\r\n", request.content]
        reply = await self._client.send(b"".join(lines))
        return httpx.Response(reply.status, headers=reply.headers, stream=_Parts(reply.parts))

    async def aclose(self) -> None:
        await self._client.aclose()


class NullTransport(httpx.AsyncBaseTransport):
    """An httpx transport that does nothing: what httpx costs by itself."""

    def __init__(self, bodies: dict[str, bytes]) -> None:
        """`bodies`: the reply to each path."""
        self._bodies = bodies

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)  # gives way once, as the fastest network makes one do
        body = self._bodies[request.url.path]
        length = b"%d" % len(body)
        return httpx.Response(200, headers=[(b"Content-Length", length)], stream=_Parts([body]))


class _Parts(httpx.AsyncByteStream):
    def __init__(self, parts: list[bytes]) -> None:
        self._parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part

"""A server that replays replies byte for byte, and what an upstream makes of them.

Server and client share one event loop. Loopback sockets are synchronous, so that a few turns of the loop after a write
the client has read it: no sleeps, and the outcome of every case is the same each time.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pathlb.errors import UpstreamError
from pathlb.exchange import Headers, Reply, Request, Timeouts
from pathlb.upstream.base import Upstream

PATIENCE = 20.0
"""Seconds any wait may take before the test fails; none should."""

_TURNS_TO_READ = 4
_TURNS_TO_FINISH = 60
_RST_ON_CLOSE = struct.pack("ii", 1, 0)


async def turns(count: int = _TURNS_TO_READ) -> None:
    """Let the loop go round: everybody reads what has been written."""
    for _ in range(count):
        await asyncio.sleep(0)


class End(enum.Enum):
    """What the server does when all bytes of the reply are sent."""

    OPEN = "keeps the connection open"
    FIN = "FIN"
    RST = "RST"


@dataclass(frozen=True)
class Script:
    """A reply in the pieces in which the client is to read it."""

    pieces: Sequence[bytes]
    end: End = End.OPEN


def cut(data: bytes, *at: int) -> list[bytes]:
    """The bytes in pieces, cut at these offsets."""
    edges = [0, *at, len(data)]
    return [data[one:other] for one, other in itertools.pairwise(edges)]


class _Connection(asyncio.Protocol):
    """One client connection: every complete request on it is answered by the server's turn."""

    transport: asyncio.Transport

    def __init__(self, server: ReplayServer) -> None:
        self._server = server
        self._inbox = b""
        self.index = server.connections

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        sock: socket.socket = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server._joined(self)

    def data_received(self, data: bytes) -> None:
        self._inbox += data
        head, found, rest = self._inbox.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.splitlines() if line.lower().startswith(b"content-length:")), 0)
        if found and len(rest) >= length:
            self._inbox = rest[length:]
            self._server._answer(self)

    def eof_received(self) -> bool:
        return False  # the client does not half-close: it has gone

    def connection_lost(self, exc: Exception | None) -> None:
        self._server._left(self)

    def write(self, data: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(data)

    def end(self, how: End) -> None:
        if self.transport.is_closing():
            return  # the client was faster
        if how is End.FIN:
            with suppress(OSError):  # the client was faster, and the loop has not noticed
                self.transport.write_eof()
        elif how is End.RST:
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
            self.transport.abort()


class ReplayServer:
    """Answers the next request with the loaded script, and every other one with a marker made for it alone."""

    def __init__(self) -> None:
        self.connections = 0
        """Connections accepted."""
        self.served: list[int] = []
        """For each request, the index of the connection it came on."""
        self.marker = b""
        """The body of the last marker."""
        self.played = asyncio.Event()
        """The loaded script is over."""
        self.url = ""
        self._open: set[_Connection] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._script: Script | None = None
        self._player: asyncio.Task[None] | None = None
        self._on: _Connection | None = None

    def load(self, script: Script) -> None:
        self._script = script
        self.played.clear()

    def finish(self) -> None:
        """End the stream of the connection that got the script."""
        assert self._on is not None
        self._on.end(End.FIN)

    @property
    def reused(self) -> bool:
        """Whether the last request came on the connection of the one before."""
        return self.served[-1] == self.served[-2]

    async def deserted(self) -> None:
        """Wait until every client connection is closed: the client has leaked none."""
        async with asyncio.timeout(PATIENCE):
            await self._empty.wait()

    async def __aenter__(self) -> ReplayServer:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Connection(self), "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        if self._player is not None:
            self._player.cancel()
        for connection in list(self._open):
            connection.transport.abort()
        await self.deserted()
        await self._server.wait_closed()

    def _give_up_after_a_crash(self, client: asyncio.Task[Any]) -> None:
        if not client.cancelled() and client.exception() is not None:
            self.played.set()

    def _joined(self, connection: _Connection) -> None:
        self.connections += 1
        self._open.add(connection)
        self._empty.clear()

    def _left(self, connection: _Connection) -> None:
        self._open.discard(connection)
        if not self._open:
            self._empty.set()

    def _answer(self, connection: _Connection) -> None:
        self.served.append(connection.index)
        script, self._script = self._script, None
        if script is not None:
            self._on = connection
            self._player = asyncio.get_running_loop().create_task(self._play(connection, script))
        else:
            self.marker = b"marker %d" % len(self.served)
            connection.write(b"HTTP/1.1 299 Marker\r\nContent-Length: %d\r\n\r\n%b" % (len(self.marker), self.marker))

    async def _play(self, connection: _Connection, script: Script) -> None:
        try:
            for piece in script.pieces:
                connection.write(piece)
                await turns()
            connection.end(script.end)
            await turns()
        finally:
            self.played.set()


@dataclass(frozen=True)
class Result:
    """What one request came to."""

    failed: str = ""
    """The fault and where it struck, such as `ReadError at the head`; empty for a complete reply."""
    status: int = 0
    reason: bytes = b""
    version: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    """Of a complete reply."""
    partial: bytes = field(default=b"", compare=False)
    """The body up to its failure."""


@dataclass(frozen=True)
class Observed:
    """What a scripted reply came to, and what followed."""

    result: Result
    waiting: bool
    """The client wanted more when all bytes were sent; the server then ended the stream."""
    then: str
    """How the next request went: `reused` the connection, on a `fresh` one, or what was wrong with it."""

    def __str__(self) -> str:
        """In short: what tells it from other outcomes of the same bytes."""
        result = self.result
        fields = "; ".join(f"{name.decode('latin-1')}: {value.decode('latin-1')}" for name, value in result.headers)
        told = f"{result.status} {result.reason.decode('latin-1')} [{fields}] {result.body!r}" if result.status else ""
        return ", ".join(filter(None, [result.failed, told, "waiting" if self.waiting else "", self.then]))


def request(method: str = "GET") -> Request:
    body = b"hello" if method in ("POST", "PUT", "PATCH") else b""
    headers: Headers = [(b"Content-Length", b"%d" % len(body))] if body else []
    return Request(method, b"/", headers, body, timeouts=Timeouts(PATIENCE, PATIENCE, PATIENCE, None))


async def exchange(upstream: Upstream, method: str) -> Result:
    """Send one request and read the whole reply."""
    try:
        reply: Reply = await upstream.send(request(method), [])
    except UpstreamError as exc:
        return Result(f"{exc.fault.value} at the head")
    failed, parts = "", []
    try:
        async for part in reply.body:
            assert isinstance(part, bytes)
            parts.append(part)
    except UpstreamError as exc:
        failed = f"{exc.fault.value} in the body"
    finally:
        await reply.body.aclose()
    body = b"".join(parts)
    return Result(
        failed,
        reply.status,
        reply.reason,
        reply.http_version,
        tuple((bytes(name), bytes(value)) for name, value in reply.headers),
        b"" if failed else body,
        body,
    )


async def observe(upstream: Upstream, server: ReplayServer, method: str, script: Script) -> Observed:
    """Play the script to a request on this upstream, then send another request."""
    async with asyncio.timeout(PATIENCE):
        server.load(script)
        task = asyncio.create_task(exchange(upstream, method))
        task.add_done_callback(server._give_up_after_a_crash)
        await server.played.wait()
        for _ in range(_TURNS_TO_FINISH):
            if task.done():
                break
            await asyncio.sleep(0)
        waiting = not task.done()
        if waiting:
            server.finish()
        result = await task
        await turns()  # a client that noticed something on the connection has acted on it
        following = await exchange(upstream, "GET")
    if following.failed or (following.status, following.body) != (299, server.marker):
        return Observed(result, waiting, f"wrong: {following}")
    return Observed(result, waiting, "reused" if server.reused else "fresh")


@asynccontextmanager
async def quiet() -> AsyncIterator[None]:
    """Around a client and its server: the loop has nothing to complain about, and no task outlives it."""
    loop = asyncio.get_running_loop()
    complaints: list[dict[str, Any]] = []
    before = asyncio.all_tasks()
    previous = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        yield
        await turns()
    finally:
        loop.set_exception_handler(previous)
    assert complaints == [], complaints
    assert asyncio.all_tasks() <= before

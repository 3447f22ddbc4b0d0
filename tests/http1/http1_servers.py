"""A server the test plays by hand, on raw sockets in the test's own event loop, and a pool in front of it.

Nothing is read that the test does not read, and nothing is sent that it does not send: what the client does in between
is the client's own doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from http1_kit import PATIENCE, quiet, turns

from pathlb.core.model import Endpoint
from pathlb.errors import UpstreamError
from pathlb.exchange import Headers, OneShotBody, Reply, Request, Timeouts
from pathlb.testing import http_reply
from pathlb.upstream.http1 import Http1Upstream, Pool
from pathlb.upstream.http1.connection import Connection, State

_RST_ON_CLOSE = struct.pack("ii", 1, 0)


class Peer:
    """The server's side of one connection."""

    def __init__(self, sock: socket.socket, index: int) -> None:
        self.sock = sock
        self.index = index
        self._inbox = bytearray()

    async def _more(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.sock, 262_144)
        if not data:
            raise EOFError
        self._inbox += data

    async def until(self, mark: bytes) -> bytes:
        """Everything up to and including `mark`. Raises `EOFError` when the client closes before."""
        while mark not in self._inbox:
            await self._more()
        return self._take(self._inbox.index(mark) + len(mark))

    async def exactly(self, count: int) -> bytes:
        while len(self._inbox) < count:
            await self._more()
        return self._take(count)

    def _take(self, count: int) -> bytes:
        data = bytes(self._inbox[:count])
        del self._inbox[:count]
        return data

    async def head(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.until(b"\r\n\r\n")

    async def request(self) -> bytes:
        """One whole request, raw."""
        head = await self.until(b"\r\n\r\n")
        lower = head.lower()
        if b"transfer-encoding: chunked" in lower:
            return head + await self._chunks()
        length = lower.partition(b"content-length: ")[2].partition(b"\r\n")[0]
        return head + await self.exactly(int(length or b"0"))

    async def _chunks(self) -> bytes:
        raw = b""
        while True:
            line = await self.until(b"\r\n")
            data = await self.exactly(int(line, 16) + 2)
            raw += line + data
            if data == b"\r\n":
                return raw

    def arrived(self) -> bytes:
        """What one read gives: nothing when the client has sent nothing."""
        with contextlib.suppress(BlockingIOError):
            self._inbox += self.sock.recv(1_000_000)
        return self._take(len(self._inbox))

    async def send(self, data: bytes) -> None:
        """Hand all of it to the system."""
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def answer(self, reply: bytes = http_reply()) -> bytes:
        """Read one request and reply to it."""
        async with asyncio.timeout(PATIENCE):
            request = await self.request()
            await self.send(reply)
        return request

    def fin(self) -> None:
        """End the stream; the client may still send."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    async def gone(self) -> bytes:
        """Wait until the client has closed the connection; answers what came before."""
        if self.sock.fileno() == -1:
            return b""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    await self._more()
        self.sock.close()
        return bytes(self._inbox)


Handler = Callable[[Peer], Awaitable[object]]


async def answering(peer: Peer, reply: bytes = http_reply()) -> None:
    """Answers every request, until the client closes."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            await peer.request()
            await peer.send(reply)
    peer.close()


class Server:
    """Hands its connections to `handler`, or to the test, which `accept`s them."""

    def __init__(self, handler: Handler | None = None, *, listener: socket.socket | None = None) -> None:
        self._handler = handler
        self._listener = listener or socket.create_server(("127.0.0.1", 0), backlog=100)
        self._listener.setblocking(False)
        self._waiting: asyncio.Queue[Peer] = asyncio.Queue()
        self._tasks: dict[asyncio.Task[Any], Peer] = {}
        self.peers: list[Peer] = []
        """Every connection ever accepted."""
        self.url = ""
        if self._listener.family == socket.AF_INET:
            self.port = self._listener.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self.peers)

    @property
    def served(self) -> int:
        """Connections whose handler has not ended: those the client keeps open."""
        return sum(not task.done() for task in self._tasks)

    async def accept(self) -> Peer:
        async with asyncio.timeout(PATIENCE):
            return await self._waiting.get()

    async def __aenter__(self) -> Server:
        self._acceptor = asyncio.create_task(self._accept())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stop()
        self._listener.close()
        for peer in self.peers:
            peer.close()

    async def _stop(self) -> None:
        """Accept no more, and end the handlers."""
        tasks = [self._acceptor, *self._tasks]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def deserted(self) -> None:
        """Wait until the client has closed every connection. It is the end of this server."""
        await turns()  # what is connected is accepted
        await self._stop()
        for peer in self.peers:
            await peer.gone()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer = Peer(sock, len(self.peers))
            self.peers.append(peer)
            if self._handler is None:
                self._waiting.put_nowait(peer)
            else:
                self._tasks[loop.create_task(self._handler(peer))] = peer  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def bench(
    handler: Handler | None = None,
    *,
    path: str = "",
    rng: Any = None,
    listener: socket.socket | None = None,
    endpoint: Endpoint | None = None,
    **pool: Any,
) -> AsyncIterator[tuple[Server, Http1Upstream]]:
    """A server and a pool for it. In the end nothing of the pool may be left: no socket, no task, no timer."""
    async with quiet(), Server(handler, listener=listener) as server:
        options = {} if rng is None else {"rng": rng}
        pool.setdefault("keepalive_expiry", 1e6)  # what should be closed at once is not closed by that in the end
        upstream = Http1Upstream(endpoint or Endpoint(server.url + path), Pool(**pool), **options)
        try:
            yield server, upstream
        finally:
            async with asyncio.timeout(PATIENCE):
                await upstream.aclose()
                await turns()
        await server.deserted()
        assert upstream._open == set()
        assert upstream._dialling == 0
        assert timers() == []


def timers() -> list[str]:
    """What the running loop will still call of the pool's."""
    scheduled = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return [
        repr(handle)
        for handle in scheduled
        if not handle.cancelled()
        and isinstance(getattr(handle._callback, "__self__", None), Connection | Http1Upstream)
    ]


def assert_at_rest(upstream: Http1Upstream, connections: int | None = None) -> None:
    """Every connection of the pool is idle and may be taken."""
    assert upstream._dialling == 0
    assert {one.state for one in upstream._open} <= {State.IDLE}
    assert {one for one in upstream._idle if one.state is not State.CLOSED} == upstream._open
    if connections is not None:
        assert len(upstream._open) == connections


def ask(
    method: str = "GET",
    headers: Headers | None = None,
    body: bytes | OneShotBody = b"",
    *,
    target: bytes = b"/",
    connect: float | None = PATIENCE,
    read: float | None = PATIENCE,
    write: float | None = PATIENCE,
    **fields: Any,
) -> Request:
    return Request(method, target, headers or [], body, timeouts=Timeouts(connect, read, write, None), **fields)


async def content(reply: Reply) -> bytes:
    """The whole body."""
    async with asyncio.timeout(PATIENCE):
        return b"".join([part async for part in reply.body])


async def exchange(upstream: Http1Upstream, request: Request | None = None) -> Reply:
    """A request whose reply is read to its end."""
    async with asyncio.timeout(PATIENCE):
        reply = await upstream.send(request or ask(), [])
    await content(reply)
    return reply


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, which must come to be."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.001)


async def opened(server: Server, upstream: Http1Upstream, count: int) -> list[Peer]:
    """So many connections, idle, the last one used last."""
    requests = [asyncio.create_task(exchange(upstream)) for _ in range(count)]
    peers = [await server.accept() for _ in requests]
    for number, peer in enumerate(peers, 1):
        await peer.answer()
        await until(lambda number=number: sum(task.done() for task in requests) == number)
    return peers


def arrived(upstream: Http1Upstream) -> None:
    """Block the loop until something has arrived on the pool's connections: it has not looked at them then."""
    poll = select.poll()
    for connection in upstream._open:
        poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    assert poll.poll(PATIENCE * 1000)


@contextlib.contextmanager
def moved_clock() -> Iterator[Callable[[float], None]]:
    """The running loop's clock, and a way to move it on: what is due by then happens at the next turn."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, 0.0

    def skip(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    loop.time = lambda: real() + ahead  # type: ignore[method-assign]
    try:
        yield skip
    finally:
        del loop.time  # type: ignore[method-assign]


class Stream:
    """A request body in parts, which knows what became of it. Suspends before each part."""

    def __init__(self, *parts: bytes, times: int = 1, error: Exception | None = None) -> None:
        self._parts = parts * times
        self._error = error
        self.yielded = 0
        self.closed = False
        """The iteration has ended, one way or another."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            for part in self._parts:
                await asyncio.sleep(0)
                self.yielded += len(part)
                yield part
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True

    @property
    def body(self) -> OneShotBody:
        return OneShotBody(self)


async def failure(work: Awaitable[object]) -> UpstreamError:
    """What `work` failed with."""
    with pytest.raises(UpstreamError) as caught:
        async with asyncio.timeout(PATIENCE):
            await work
    return caught.value


def sent(upstream: Http1Upstream, body: Any, *headers: tuple[bytes, bytes], **options: Any) -> asyncio.Task[Any]:
    """A POST on its way."""
    body = body.body if isinstance(body, Stream) else body
    return asyncio.create_task(upstream.send(ask("POST", list(headers), body, **options), []))


async def paused(upstream: Http1Upstream) -> None:
    """Wait until the system takes no more of a request."""
    await until(lambda: any(one._writing_paused for one in upstream._open))

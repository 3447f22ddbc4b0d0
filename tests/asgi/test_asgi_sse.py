"""Server-sent events through the Gateway: each one when it happens, for as long as somebody listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from socket_kit import HTTP_SERVERS, PATIENCE, at_rest, serving

from pathlb import Balancer
from pathlb.asgi import Gateway

pytestmark = pytest.mark.anyio

ASKED = (
    b"GET /events HTTP/1.1\r\nHost: gateway.test\r\nAccept: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Last-Event-ID: 41\r\n\r\n"
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=HTTP_SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Streams:
    """Both ends of a stream: that of a caller, and that of the gateway which has been asked for it."""

    balancer: Balancer
    caller: asyncio.StreamReader
    caller_side: asyncio.StreamWriter
    head: bytes
    asked: asyncio.StreamReader
    gateway: asyncio.StreamWriter

    def says(self, data: bytes) -> None:
        self.gateway.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def hears(self) -> bytes:
        """The next chunk."""
        size = int(await self.caller.readline(), 16)
        data = await self.caller.readexactly(size)
        assert await self.caller.readexactly(2) == b"\r\n"
        return data


@contextlib.asynccontextmanager
async def stream(kind: str, *, chunked: bool = True) -> AsyncIterator[Streams]:
    """A stream whose head has arrived, and nothing more."""
    arrived: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await arrived.put((reader, writer))

    async with asyncio.timeout(PATIENCE), contextlib.AsyncExitStack() as stack:
        listening = await asyncio.start_server(connected, "127.0.0.1", 0)
        stack.push_async_callback(listening.wait_closed)
        stack.callback(listening.close)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        balancer = await stack.enter_async_context(Balancer([url]))
        port = await stack.enter_async_context(serving(Gateway(balancer), kind))
        caller, caller_side = await asyncio.open_connection("127.0.0.1", port)
        stack.callback(caller_side.transport.abort)
        caller_side.write(ASKED)
        asked, gateway = await arrived.get()
        stack.callback(gateway.transport.abort)
        head = await asked.readuntil(b"\r\n\r\n")
        assert b"\r\nlast-event-id: 41\r\n" in head
        gateway.write(HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Connection: close\r\n\r\n"))
        head = (await caller.readuntil(b"\r\n\r\n")).lower()
        yield Streams(balancer, caller, caller_side, head, asked, gateway)


async def test_the_head(server: str) -> None:
    """Is there before the first event, says what it is and promises no length."""
    async with stream(server) as ends:
        assert ends.head.startswith(b"http/1.1 200 ")
        assert b"\r\ncontent-type: text/event-stream\r\n" in ends.head
        assert b"\r\ncache-control: no-store\r\n" in ends.head
        assert b"\r\nx-accel-buffering: no\r\n" in ends.head
        assert b"\r\ntransfer-encoding: chunked\r\n" in ends.head
        assert b"content-length" not in ends.head


@pytest.mark.parametrize("chunked", [True, False])
async def test_events_arrive_one_by_one(chunked: bool, server: str) -> None:
    """Each before the next one happens, however short."""
    async with stream(server, chunked=chunked) as ends:
        for number in range(5):
            event = b"id: %d\ndata: %d\n\n" % (number, number)
            ends.says(event) if chunked else ends.gateway.write(event)
            assert await ends.hears() == event
            assert ends.balancer.snapshot().in_flight == 1
        ends.says(b":\n")
        ends.gateway.write(b"0\r\n\r\n") if chunked else ends.gateway.close()
        if not chunked:
            assert await ends.hears() == b"2\r\n:\n\r\n"
        else:
            assert await ends.hears() == b":\n"
        assert await ends.hears() == b""
        await at_rest(ends.balancer)


async def test_half_an_event(server: str) -> None:
    """Bytes are not held back until they make sense."""
    async with stream(server) as ends:
        for part in (b"da", b"ta: gr\xc3", b"\xbc\xc3\x9fe\n", b"\n"):
            ends.says(part)
            assert await ends.hears() == part


async def test_the_caller_leaves(server: str) -> None:
    """Then nobody needs the gateway's connection any more, though it says nothing."""
    async with stream(server) as ends:
        ends.says(b"data: 1\n\n")
        await ends.hears()
        ends.caller_side.close()
        assert await ends.asked.read() == b""
        await at_rest(ends.balancer)
        assert not next(iter(ends.balancer._upstreams.values()))._open  # type: ignore[attr-defined]


async def test_the_stream_breaks_off(server: str) -> None:
    """It does not look as if it had come to its end."""
    async with stream(server) as ends:
        ends.says(b"data: 1\n\n")
        await ends.hears()
        ends.gateway.transport.abort()
        assert not (await ends.caller.read()).endswith(b"0\r\n\r\n")
        await at_rest(ends.balancer)

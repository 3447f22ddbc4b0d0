"""Timeouts, and the pace of whoever is slower."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from http1_kit import turns
from http1_servers import Stream, ask, bench, content, exchange, failure, moved_clock, paused, sent, until

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault
from pathlb.exchange import OneShotBody
from pathlb.testing import black_hole, http_reply

pytestmark = pytest.mark.anyio

MEGABYTE = b"x" * 1_000_000


class TestTimeouts:
    @pytest.mark.parametrize("body", [MEGABYTE * 50, Stream(MEGABYTE, times=50)], ids=["bytes", "stream"])
    async def test_write(self, body: Any) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, body, write=0.02)
            peer = await server.accept()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.WRITE_TIMEOUT, Sent.MAYBE_SENT)
            await peer.gone()

    async def test_write_begins_anew_with_every_part(self) -> None:
        """A slow server is not a dead one."""
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                stream, before = Stream(MEGABYTE, times=30), 0
                request = sent(upstream, stream, (b"Content-Length", b"30000000"), write=5.0)
                peer = await server.accept()
                await peer.head()
                await paused(upstream)
                left = 30_000_000
                while left:
                    if stream.yielded > before:
                        await turns()
                        before = stream.yielded
                        skip(4)
                    left -= len(await peer.exactly(min(left, 100_000)))
                await peer.send(http_reply())
                assert (await request).status == 200

    async def test_a_slow_caller_is_not_timed_out(self) -> None:
        """The time its stream takes for the next part is its own."""
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                more = asyncio.Event()

                async def body() -> AsyncIterator[bytes]:
                    yield MEGABYTE * 20
                    await more.wait()
                    yield b"end"

                request = sent(upstream, OneShotBody(body()), (b"Content-Length", b"20000003"), write=5.0)
                peer = await server.accept()
                await peer.head()
                await paused(upstream)
                await peer.exactly(20_000_000)
                await turns()
                skip(6)
                await turns()
                more.set()
                assert await peer.exactly(3) == b"end"
                await peer.send(http_reply())
                assert (await request).status == 200

    async def test_read_before_the_head(self) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, b"x", read=0.02)
            peer = await server.accept()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.READ_TIMEOUT, Sent.MAYBE_SENT)
            await peer.gone()

    async def test_read_within_the_body(self) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, b"x", read=0.02)
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = aiter((await request).body)
            assert await anext(body) == b"ab"
            assert (await failure(anext(body))).fault is Fault.READ_TIMEOUT
            await peer.gone()

    async def test_connect(self) -> None:
        with black_hole() as url:
            async with bench(endpoint=Endpoint(url)) as (_, upstream):
                error = await failure(upstream.send(ask(connect=0.02), []))
                assert (error.fault, error.sent) == (Fault.CONNECT_TIMEOUT, Sent.NOT_SENT)
                assert error.endpoint == url

    async def test_none(self) -> None:
        """No limit is no limit, however long it takes."""
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                body = Stream(MEGABYTE, times=20)
                request = sent(upstream, body, (b"Content-Length", b"20000000"), connect=None, read=None, write=None)
                peer = await server.accept()
                await peer.head()
                await paused(upstream)
                skip(1e6)
                await turns()
                await peer.exactly(20_000_000)
                await turns()
                skip(1e6)
                await turns()
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
                reading = asyncio.create_task(content(await request))
                await turns()
                await peer.send(b"ab")
                assert await reading == b"ab"


class TestSlowReader:
    @pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
    async def test_the_server_is_held_up(self, chunked: bool) -> None:
        """What nobody reads is not heaped up: a little here, a few megabytes in the sockets."""
        data = bytes(range(256)) * 200_000  # 51 MB
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.head()
            if chunked:
                await peer.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                raw = b"%x\r\n%b\r\n" % (len(data), data) + b"0\r\n\r\n"
            else:
                await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
                raw = data
            body: Any = (await request).body
            sending = asyncio.create_task(peer.send(raw))
            [connection] = upstream._open
            await until(lambda: connection._reading_paused)
            held = body.held
            await turns(20)
            assert 0 < body.held == held <= 65_536 + 262_144
            assert not sending.done()
            assert await content(await request) == data
            await sending
            again = asyncio.create_task(exchange(upstream))
            await peer.answer()
            assert (await again).reused

    async def test_how_much_is_held_can_be_set(self) -> None:
        async with bench(buffer=1_000_000) as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n")
            body: Any = (await request).body
            sending = asyncio.create_task(peer.send(MEGABYTE * 20))
            [connection] = upstream._open
            await until(lambda: connection._reading_paused)
            assert 1_000_000 < body.held <= 1_000_000 + 262_144
            await body.aclose()
            await asyncio.wait([sending])
            sending.exception()

    async def test_a_reader_that_stops_in_the_middle(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n")
            sending = asyncio.create_task(peer.send(MEGABYTE * 20))
            body: Any = (await request).body
            parts = aiter(body)
            read = 0
            while read < 5_000_000:
                read += len(await anext(parts))
            [connection] = upstream._open
            await until(lambda: connection._reading_paused)
            assert body.held <= 65_536 + 262_144
            assert read + len(await content(await request)) == 20_000_000
            await sending

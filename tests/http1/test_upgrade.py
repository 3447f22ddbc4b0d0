"""A 101: the connection speaks another protocol, and is no business of the pool's any more."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme
from http1_kit import PATIENCE, turns
from http1_servers import Peer, Server, ask, assert_at_rest, bench, content, exchange, failure, moved_clock, until
from http1_tls import TLSPeer, client_context, server_context

from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Reply
from pathlb.testing import http_reply
from pathlb.upstream.http1 import Http1Upstream

pytestmark = pytest.mark.anyio

UPGRADE = [(b"Connection", b"Upgrade"), (b"Upgrade", b"echo")]
SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"


async def upgraded(server: Server, upstream: Http1Upstream, early: bytes = b"") -> tuple[Reply, Any, Peer]:
    """A connection after a 101: the reply, its stream, and the server's side."""
    request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE)), []))
    peer = await server.accept()
    assert b"\r\nUpgrade: echo\r\n" in await peer.answer(SWITCHED + early)
    reply = await request
    return reply, reply.extensions["network_stream"], peer


@contextlib.asynccontextmanager
async def tunnel(early: bytes = b"") -> AsyncIterator[tuple[Any, Peer]]:
    """Both ends."""
    async with bench() as (server, upstream):
        _, stream, peer = await upgraded(server, upstream, early)
        async with asyncio.timeout(PATIENCE):
            yield stream, peer


class TestStream:
    async def test_the_reply(self) -> None:
        async with bench() as (server, upstream):
            reply, _, _ = await upgraded(server, upstream)
            assert (reply.status, reply.reason) == (101, b"Switching Protocols")
            assert reply.headers == [(b"Connection", b"Upgrade"), (b"Upgrade", b"echo")]
            assert await content(reply) == b""

    async def test_both_ways(self) -> None:
        async with tunnel() as (stream, peer):
            await stream.write(b"ping")
            assert await peer.exactly(4) == b"ping"
            await peer.send(b"pong")
            assert await stream.read(100) == b"pong"

    async def test_what_came_with_the_head(self) -> None:
        async with tunnel(b"early") as (stream, peer):
            assert stream.get_extra_info("is_readable")
            assert await stream.read(3) == b"ear"
            await peer.send(b"!")
            await turns()
            assert await stream.read(100) == b"ly!"

    async def test_both_ways_at_once(self) -> None:
        async with tunnel() as (stream, peer):
            reading = asyncio.create_task(stream.read(10))
            await turns()
            writing = asyncio.create_task(stream.write(b"x" * 50_000_000))
            await turns()
            await peer.send(b"pong")
            assert await reading == b"pong"
            await peer.exactly(50_000_000)
            await writing

    async def test_the_server_ends_it(self) -> None:
        """Its side: what is sent to it is still read."""
        async with tunnel() as (stream, peer):
            await peer.send(b"last")
            peer.fin()
            assert await stream.read(100) == b"last"
            assert [await stream.read(100) for _ in range(2)] == [b"", b""]
            await stream.write(b"still")
            assert await peer.exactly(5) == b"still"

    async def test_the_end_came_with_the_head(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE)), []))
            peer = await server.accept()
            await peer.answer(SWITCHED + b"all")
            peer.fin()
            stream = (await request).extensions["network_stream"]
            assert await stream.read(100) == b"all"
            assert await stream.read(100) == b""

    async def test_a_reset_is_an_error(self) -> None:
        """And no end: what was said may have been half of it."""
        async with tunnel() as (stream, peer):
            reading = asyncio.create_task(stream.read(100))
            await turns()
            peer.reset()
            assert (await failure(reading)).fault is Fault.READ
            assert (await failure(stream.read(100))).fault is Fault.READ
            # WebSocket clients say goodbye to the other side whatever happened, and mind no WriteError then.
            assert (await failure(stream.write(b"x"))).fault is Fault.WRITE

    async def test_reading_has_a_timeout(self) -> None:
        """After which it can be read on."""
        async with tunnel() as (stream, peer):
            assert (await failure(stream.read(100, 0.01))).fault is Fault.READ_TIMEOUT
            await peer.send(b"late")
            assert await stream.read(100, PATIENCE) == b"late"

    async def test_writing_has_a_timeout(self) -> None:
        async with tunnel() as (stream, _):
            assert (await failure(stream.write(b"x" * 50_000_000, 0.02))).fault is Fault.WRITE_TIMEOUT

    async def test_the_timeouts_of_the_request_are_over(self) -> None:
        """A socket may be silent for hours."""
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE), read=5.0), []))
                peer = await server.accept()
                await peer.answer(SWITCHED)
                stream = (await request).extensions["network_stream"]
                reading = asyncio.create_task(stream.read(100))
                await turns()
                skip(1e5)
                await turns()
                await peer.send(b"still there")
                assert await reading == b"still there"

    async def test_a_cancelled_read_loses_nothing(self) -> None:
        async with tunnel() as (stream, peer):
            reading = asyncio.create_task(stream.read(100))
            await turns()
            reading.cancel()
            await asyncio.wait([reading])
            await peer.send(b"kept")
            assert await stream.read(100) == b"kept"

    async def test_a_slow_reader_holds_the_server_up(self) -> None:
        async with tunnel() as (stream, peer):
            data = bytes(range(256)) * 200_000
            sending = asyncio.create_task(peer.send(data))
            await until(lambda: stream._paused)
            await turns(20)
            assert len(stream._buffer) <= 65_536 + 262_144
            assert not sending.done()
            read = bytearray()
            while len(read) < len(data):
                read += await stream.read(1_000_000)
            assert read == data
            await sending

    async def test_closing_it(self) -> None:
        async with bench() as (server, upstream):
            _, stream, peer = await upgraded(server, upstream)
            await stream.write(b"goodbye")
            await stream.aclose()
            await stream.aclose()
            assert await peer.gone() == b"goodbye"
            assert (await failure(stream.write(b"x"))).fault is Fault.WRITE
            await until(lambda: not upstream._open)

    async def test_closing_it_ends_a_read(self) -> None:
        async with tunnel() as (stream, _):
            reading = asyncio.create_task(stream.read(100))
            await turns()
            await stream.aclose()
            with contextlib.suppress(UpstreamError):  # either will do; it must not wait for ever
                assert await reading == b""

    async def test_closing_the_body_closes_it(self) -> None:
        """How the caller of a request that became a socket says that it is done with it."""
        async with bench() as (server, upstream):
            reply, _, peer = await upgraded(server, upstream)
            await reply.body.aclose()
            await peer.gone()

    async def test_closing_the_pool_closes_it(self) -> None:
        async with bench() as (server, upstream):
            _, stream, peer = await upgraded(server, upstream)
            reading = asyncio.create_task(stream.read(100))
            await turns()
            async with asyncio.timeout(PATIENCE):
                await upstream.aclose()
            with contextlib.suppress(UpstreamError):
                assert await reading == b""
            await peer.gone()

    async def test_what_can_be_asked(self) -> None:
        async with tunnel() as (stream, peer):
            assert stream.get_extra_info("client_addr") == peer.sock.getpeername()
            assert stream.get_extra_info("server_addr") == peer.sock.getsockname()
            assert stream.get_extra_info("socket").fileno() > 0
            assert stream.get_extra_info("ssl_object") is None
            assert not stream.get_extra_info("is_readable")


class TestStartTLS:
    @pytest.fixture(scope="class")
    @classmethod
    def authority(cls) -> trustme.CA:
        return trustme.CA()

    async def test_it(self, authority: trustme.CA) -> None:
        async with tunnel() as (stream, peer):
            starting = asyncio.create_task(stream.start_tls(client_context(authority), "gateway.example", PATIENCE))
            tls = TLSPeer(peer, server_context(authority, "gateway.example"))
            await tls.handshake()
            secure = await starting
            assert secure.get_extra_info("ssl_object").version() == "TLSv1.3"
            await secure.write(b"ping")
            assert await tls.read(100) == b"ping"
            await tls.send(b"pong")
            assert await secure.read(100) == b"pong"
            tls.say_goodbye()
            await tls.flush()
            assert await secure.read(100) == b""

    async def test_a_bad_certificate(self, authority: trustme.CA) -> None:
        async with bench() as (server, upstream):
            _, stream, peer = await upgraded(server, upstream)
            starting = asyncio.create_task(stream.start_tls(client_context(authority), "gateway.example"))
            tls = TLSPeer(peer, server_context(authority, "elsewhere.example"))
            with contextlib.suppress(ssl.SSLError, EOFError, ConnectionError):
                await tls.handshake()
            error = await failure(starting)
            assert error.fault is Fault.CONNECT
            assert "CERTIFICATE_VERIFY_FAILED" in error.detail
            await until(lambda: not upstream._open)
            await peer.gone()

    @pytest.mark.parametrize("how", ["timeout", "cancelled", "closed"])
    async def test_a_handshake_that_comes_to_nothing(self, how: str, authority: trustme.CA) -> None:
        """The connection is gone, and the pool knows: closing it does not wait for that."""
        async with bench() as (server, upstream):
            _, stream, peer = await upgraded(server, upstream)
            timeout = 0.02 if how == "timeout" else None
            starting = asyncio.create_task(stream.start_tls(client_context(authority), "gateway.example", timeout))
            if how != "timeout":
                await peer.exactly(10)
            if how == "cancelled":
                starting.cancel()
                await asyncio.wait([starting])
                assert starting.cancelled()
            else:
                if how == "closed":
                    peer.fin()
                expected = Fault.CONNECT_TIMEOUT if how == "timeout" else Fault.CONNECT
                assert (await failure(starting)).fault is expected
            await until(lambda: not upstream._open)
            await peer.gone()


class TestPool:
    async def test_it_is_not_used_again(self) -> None:
        async with bench() as (server, upstream):
            _, _, peer = await upgraded(server, upstream)
            request = asyncio.create_task(exchange(upstream))
            other = await server.accept()
            await other.answer()
            assert not (await request).reused
            assert peer.arrived() == b""

    async def test_on_a_connection_that_was_used_before(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(exchange(upstream))
            peer = await server.accept()
            await peer.answer()
            await request
            request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE)), []))
            await peer.answer(SWITCHED)
            reply = await request
            assert reply.reused
            assert reply.status == 101
            await peer.send(b"data")
            assert await reply.extensions["network_stream"].read(10) == b"data"

    @pytest.mark.parametrize("status", [200, 403, 426])
    async def test_a_refusal_is_a_reply_like_others(self, status: int) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE)), []))
            peer = await server.accept()
            await peer.answer(http_reply(status, b"no, thank you", [(b"Upgrade", b"other")]))
            reply = await request
            assert (reply.status, await content(reply)) == (status, b"no, thank you")
            assert_at_rest(upstream, 1)
            again = asyncio.create_task(exchange(upstream))
            await peer.answer()
            assert (await again).reused

    @pytest.mark.parametrize(
        ("headers", "raw"),
        [
            ([], SWITCHED),
            (UPGRADE, b"HTTP/1.1 101 Switching Protocols\r\n\r\n"),
            (UPGRADE, b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\r\n"),
        ],
        ids=["nobody asked", "no headers", "to nothing"],
    )
    async def test_a_101_that_is_none(self, headers: Any, raw: bytes) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(headers=list(headers)), []))
            peer = await server.accept()
            await peer.answer(raw)
            error = await failure(request)
            assert error.fault is Fault.REMOTE_PROTOCOL
            assert "101" in error.detail
            await peer.gone()

    async def test_cancelled_while_it_is_asked_for(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(headers=list(UPGRADE)), []))
            peer = await server.accept()
            await peer.head()
            request.cancel()
            await asyncio.wait([request])
            await peer.gone()
            await until(lambda: not upstream._open)

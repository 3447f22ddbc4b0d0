"""Request bodies that do not simply go out with the head."""

from __future__ import annotations

import asyncio
import select
from collections.abc import AsyncIterator
from typing import Any

import pytest
from http1_kit import PATIENCE, turns
from http1_servers import Peer, Server, Stream, ask, bench, content, exchange, failure, moved_clock, paused, sent, until

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault
from pathlb.exchange import OneShotBody
from pathlb.testing import FaultServer, Read, Reset, WaitFor, black_hole, http_reply
from pathlb.upstream.http1 import Http1Upstream, sending

pytestmark = pytest.mark.anyio

EXPECTS = [(b"Expect", b"100-continue")]
GO_AHEAD = b"HTTP/1.1 100 Continue\r\n\r\n"
MEGABYTE = b"x" * 1_000_000


class TestStream:
    @pytest.mark.parametrize(("length", "says"), [(4, "more"), (6, "less")])
    async def test_not_as_long_as_it_said(self, length: int, says: str) -> None:
        """Not a byte beyond it is sent: that would be the next request. Nor is the connection used again."""
        async with bench() as (server, upstream):
            stream = Stream(b"ab", b"cde", b"more")
            if length == 6:
                stream = Stream(b"ab", b"cde")
            request = sent(upstream, stream, (b"Content-Length", b"%d" % length))
            peer = await server.accept()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.LOCAL_PROTOCOL, Sent.MAYBE_SENT)
            assert says in error.detail
            assert stream.closed
            raw = await peer.gone()
            assert raw.partition(b"\r\n\r\n")[2] == b"abcde"[: {4: 2, 6: 5}[length]]
            assert upstream._take() is None

    async def test_the_callers_own_error_goes_through(self) -> None:
        """It is no failure of the endpoint."""
        error = LookupError("the caller's")
        async with bench() as (server, upstream):
            request = sent(upstream, Stream(b"ab", error=error))
            peer = await server.accept()
            with pytest.raises(LookupError) as caught:
                await request
            assert caught.value is error
            assert not (await peer.gone()).endswith(b"0\r\n\r\n"), "what was sent must not look whole"

    async def test_a_failed_connect_does_not_touch_it(self) -> None:
        """So it can be sent elsewhere."""
        with black_hole() as url:
            async with bench(endpoint=Endpoint(url)) as (_, upstream):
                stream = Stream(b"ab")
                request = ask("POST", body=stream.body, connect=0.01)
                await failure(upstream.send(request, []))
                assert request.replayable
                assert stream.yielded == 0

    async def test_at_the_pace_of_the_server(self) -> None:
        async with bench() as (server, upstream):
            stream = Stream(MEGABYTE, times=50)
            request = sent(upstream, stream, (b"Content-Length", b"50000000"))
            peer = await server.accept()
            await paused(upstream)
            stuck = stream.yielded
            await turns(20)
            assert stream.yielded == stuck < 20_000_000, "the buffers of the two sockets hold a few"
            [connection] = upstream._open
            assert connection.transport.get_write_buffer_size() <= len(MEGABYTE), "and pathlb one part"
            await peer.head()
            async with asyncio.timeout(PATIENCE):
                assert await peer.exactly(50_000_000) == MEGABYTE * 50
            await peer.send(http_reply())
            assert (await request).status == 200
            assert upstream._idle

    async def test_a_stream_that_never_waits_ends_with_the_connection(self) -> None:
        """The loop has not run since the reset, but the system refuses every further write."""
        with FaultServer([[Read(), WaitFor("sent"), Reset()]]) as server:
            async with bench(endpoint=Endpoint(server.url)) as (_, upstream):
                parts = 0

                async def body() -> AsyncIterator[bytes]:
                    nonlocal parts
                    yield b"x"
                    [connection] = upstream._open
                    poll = select.poll()
                    poll.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
                    server.set("sent")
                    assert poll.poll(PATIENCE * 1000)
                    for _ in range(1000):
                        parts += 1
                        yield b"x"

                error = await failure(upstream.send(ask("POST", body=OneShotBody(body())), []))
                assert (error.fault, error.sent) == (Fault.READ, Sent.MAYBE_SENT)
                assert parts < 10


class TestExpect:
    async def test_the_body_follows_the_go_ahead(self) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, b"hello", *EXPECTS)
            peer = await server.accept()
            assert b"Content-Length: 5\r\n" in await peer.head()
            await turns(10)
            assert peer.arrived() == b""
            await peer.send(GO_AHEAD)
            async with asyncio.timeout(PATIENCE):
                assert await peer.exactly(5) == b"hello"
            await peer.send(http_reply())
            assert (await request).status == 200
            assert upstream._idle

    async def test_another_informational_reply_is_no_go_ahead(self) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, b"hello", *EXPECTS)
            peer = await server.accept()
            await peer.head()
            await peer.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            await turns(10)
            assert peer.arrived() == b""
            await peer.send(GO_AHEAD)
            async with asyncio.timeout(PATIENCE):
                await peer.exactly(5)
            await peer.send(http_reply())
            await request

    @pytest.mark.parametrize("status", [417, 401, 200])
    async def test_the_final_reply_instead(self, status: int) -> None:
        """The body is not sent, and its stream can be sent elsewhere. The connection ends: a server may take what
        comes next for the body it was promised.
        """
        async with bench() as (server, upstream):
            stream = Stream(b"hello")
            request = ask("POST", list(EXPECTS), stream.body)
            sending = asyncio.create_task(exchange(upstream, request))
            peer = await server.accept()
            await peer.head()
            await peer.send(http_reply(status))
            assert (await sending).status == status
            assert request.replayable
            assert await peer.gone() == b""

    async def test_a_server_that_does_not_know_the_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sending, "_GO_AHEAD", 0.01)
        async with bench() as (server, upstream):
            request = sent(upstream, b"hello", *EXPECTS)
            peer = await server.accept()
            async with asyncio.timeout(PATIENCE):
                assert (await peer.request()).endswith(b"\r\n\r\nhello")
            await peer.send(http_reply())
            assert (await request).status == 200
            assert upstream._idle

    async def test_that_second_is_curls(self) -> None:
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = sent(upstream, b"hello", *EXPECTS)
                peer = await server.accept()
                await peer.head()
                skip(0.9)
                await turns(10)
                assert peer.arrived() == b""
                skip(0.2)
                await turns(10)
                assert peer.arrived() == b"hello"
                await peer.send(http_reply())
                await request

    async def test_a_go_ahead_for_the_last_request_is_none_for_this_one(self) -> None:
        async with bench() as (server, upstream):
            for _ in range(2):
                request = sent(upstream, b"hello", *EXPECTS)
                peer = server.peers[0] if server.peers else await server.accept()
                await peer.head()
                await turns(10)
                assert peer.arrived() == b""
                await peer.send(GO_AHEAD)
                async with asyncio.timeout(PATIENCE):
                    await peer.exactly(5)
                await peer.send(http_reply())
                await request

    async def test_nothing_is_waited_for_without_a_body(self) -> None:
        async with bench() as (server, upstream):
            with moved_clock():
                request = sent(upstream, b"", *EXPECTS)
                await (await server.accept()).answer()
                await request

    async def test_the_server_closes_instead(self) -> None:
        async with bench() as (server, upstream):
            stream = Stream(b"hello")
            request = sent(upstream, stream, *EXPECTS)
            peer = await server.accept()
            await peer.head()
            peer.fin()
            assert (await failure(request)).fault is Fault.REMOTE_PROTOCOL
            assert await peer.gone() == b""
            assert stream.yielded == 0


class TestEarlyReply:
    async def started(self, server: Server, upstream: Http1Upstream) -> tuple[asyncio.Task[Any], Peer, Stream]:
        """A large POST, stuck, as the server has read its head only."""
        stream = Stream(MEGABYTE, times=50)
        request = sent(upstream, stream, (b"Content-Length", b"50000000"))
        peer = await server.accept()
        await peer.head()
        await paused(upstream)
        return request, peer, stream

    async def test_an_error_ends_the_request(self) -> None:
        """The rest of the body would be read by nobody."""
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            await peer.send(http_reply(413, b"too large"))
            reply = await asyncio.wait_for(request, PATIENCE)
            assert (reply.status, await content(reply)) == (413, b"too large")
            assert stream.closed
            assert stream.yielded < 50_000_000
            await until(lambda: not upstream._open)
            await peer.gone()

    async def test_an_error_whose_body_comes_later(self) -> None:
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            await peer.send(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\n\r\nab")
            reply = await asyncio.wait_for(request, PATIENCE)
            assert stream.closed
            await peer.send(b"cd")
            assert await content(reply) == b"abcd"
            await until(lambda: not upstream._open)

    async def test_an_error_and_the_end_of_the_connection(self) -> None:
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            await peer.send(b"HTTP/1.1 413 Content Too Large\r\n\r\nuntil the end")
            peer.fin()
            reply = await asyncio.wait_for(request, PATIENCE)
            assert (reply.status, await content(reply)) == (413, b"until the end")
            assert stream.closed

    async def test_an_error_to_a_body_in_memory(self) -> None:
        async with bench() as (server, upstream):
            request = sent(upstream, MEGABYTE * 50)
            peer = await server.accept()
            await peer.head()
            await paused(upstream)
            await peer.send(http_reply(413))
            assert (await asyncio.wait_for(request, PATIENCE)).status == 413
            await until(lambda: not upstream._open)

    async def test_a_success_does_not(self) -> None:
        """The server may still want the rest: it counts what it has got, say."""
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            await peer.send(http_reply())
            await turns(10)
            assert not request.done()
            async with asyncio.timeout(PATIENCE):
                await peer.exactly(50_000_000)
            assert (await request).status == 200
            assert stream.yielded == 50_000_000
            again = asyncio.create_task(exchange(upstream))
            await peer.answer()
            assert (await again).reused

    async def test_a_success_and_the_end_of_the_connection(self) -> None:
        """It is delivered: the server has said what it had to say."""
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            await peer.send(http_reply())
            peer.fin()
            assert (await asyncio.wait_for(request, PATIENCE)).status == 200
            assert stream.closed
            await until(lambda: not upstream._open)

    async def test_the_connection_breaks(self) -> None:
        async with bench() as (server, upstream):
            request, peer, stream = await self.started(server, upstream)
            peer.reset()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.READ, Sent.MAYBE_SENT)
            assert "reset" in error.detail
            assert stream.closed

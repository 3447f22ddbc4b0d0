"""Which connection a request goes over: reuse and expiry."""

from __future__ import annotations

import asyncio
import gc
import math
import weakref
from collections.abc import Callable
from contextvars import ContextVar

import pytest
from http1_kit import turns
from http1_servers import Peer, answering, arrived, ask, bench, content, exchange, moved_clock, opened, until

from pathlb.testing import http_reply

pytestmark = pytest.mark.anyio


class TestReuse:
    async def test_the_connection_used_last_is_taken_first(self) -> None:
        """The others grow old, and a pool that was large once becomes small."""
        async with bench() as (server, upstream):
            peers = await opened(server, upstream, 3)
            for _ in range(3):
                request = asyncio.create_task(exchange(upstream))
                await peers[2].answer()
                assert (await request).reused
            both = [asyncio.create_task(exchange(upstream)) for _ in range(2)]
            await peers[1].answer()
            await peers[2].answer()
            await asyncio.gather(*both)
            assert server.connections == 3

    async def test_reused_says_whether_the_connection_carried_a_request_before(self) -> None:
        async with bench(answering) as (_, upstream):
            assert [(await exchange(upstream)).reused for _ in range(3)] == [False, True, True]

    async def test_it_is_free_when_the_body_is_whole_not_when_it_is_read(self) -> None:
        """What is held of a reply is the reply's: a caller that does not read it keeps no connection."""
        async with bench(lambda peer: answering(peer, http_reply(body=b"held"))) as (server, upstream):
            first, second = [await upstream.send(ask(), []) for _ in range(2)]
            assert server.connections == 1
            assert (await content(second), await content(first)) == (b"held", b"held")

    @pytest.mark.parametrize(
        "reply",
        [
            http_reply(headers=[(b"Connection", b"close")]),
            http_reply(headers=[(b"connection", b"Keep-Alive, CLOSE")]),
            http_reply().replace(b"HTTP/1.1", b"HTTP/1.0"),
        ],
        ids=["close", "close in a list", "HTTP/1.0"],
    )
    async def test_the_server_says_it_is_the_last_reply(self, reply: bytes) -> None:
        async with bench(lambda peer: answering(peer, reply)) as (server, upstream):
            for _ in range(2):
                assert not (await exchange(upstream)).reused
            await until(lambda: server.served == 0)
            assert server.connections == 2

    async def test_http_1_0_with_keep_alive_is_kept(self) -> None:
        reply = http_reply(headers=[(b"Connection", b"keep-alive")]).replace(b"HTTP/1.1", b"HTTP/1.0")
        async with bench(lambda peer: answering(peer, reply)) as (server, upstream):
            assert [(await exchange(upstream)).reused for _ in range(2)] == [False, True]
            assert server.connections == 1

    async def test_the_request_says_it_is_the_last(self) -> None:
        async with bench(answering) as (server, upstream):
            await exchange(upstream, ask(headers=[(b"Connection", b"close")]))
            assert not (await exchange(upstream)).reused
            await until(lambda: server.served == 1)

    @pytest.mark.parametrize("apart", [False, True], ids=["in one read", "later"])
    async def test_bytes_after_a_reply_end_the_connection(self, apart: bool) -> None:
        """They might be taken for the answer to the next request."""
        async with bench() as (server, upstream):
            request = asyncio.create_task(exchange(upstream))
            peer = await server.accept()
            await peer.answer(http_reply() if apart else http_reply() + http_reply(body=b"not yours"))
            assert (await request).status == 200
            if apart:
                await peer.send(http_reply(body=b"not yours"))
            await peer.gone()
            assert upstream._take() is None

    @pytest.mark.parametrize("how", [Peer.fin, Peer.reset])
    async def test_the_server_closes_an_idle_one(self, how: Callable[[Peer], None]) -> None:
        async with bench() as (server, upstream):
            [peer] = await opened(server, upstream, 1)
            how(peer)
            await until(lambda: not upstream._open)
            again = asyncio.create_task(exchange(upstream))
            await (await server.accept()).answer()
            assert not (await again).reused

    @pytest.mark.parametrize(
        "how",
        [Peer.fin, Peer.reset, lambda peer: peer.sock.send(http_reply(body=b"not yours"))],
        ids=["fin", "reset", "bytes"],
    )
    async def test_noticed_before_the_loop_has_looked(self, how: Callable[[Peer], object]) -> None:
        """A process that was busy for a moment finds the ends of connections and its next request at the same time."""
        async with bench() as (server, upstream):
            [peer] = await opened(server, upstream, 1)
            again = asyncio.create_task(exchange(upstream))
            how(peer)
            arrived(upstream)
            await (await server.accept()).answer()
            reply = await again
            assert (reply.reused, reply.status) == (False, 200)


class TestContext:
    async def test_a_connection_keeps_nothing_of_the_request_that_made_it(self) -> None:
        """What was set for that one (a span, a session) would live for as long as the connection."""

        class Secret: ...

        variable: ContextVar[Secret] = ContextVar("variable")
        async with bench(answering) as (_, upstream):

            async def work() -> weakref.ref[Secret]:
                secret = Secret()
                variable.set(secret)
                await upstream.send(ask(), [])  # under no timeout of the test's own: its timer would keep it as well
                return weakref.ref(secret)

            kept = await asyncio.create_task(work())
            await turns()
            gc.collect()
            assert kept() is None
            assert len(upstream._idle) == 1


class TestExpiry:
    async def test_one_idle_for_too_long_is_not_used(self) -> None:
        """Also where nothing has closed it in time: the loop was blocked, say."""
        async with bench(answering, keepalive_expiry=4.0) as (server, upstream):
            with moved_clock() as skip:
                await exchange(upstream)
                skip(3.9)
                assert (await exchange(upstream)).reused
                skip(4.1)
                assert not (await exchange(upstream)).reused
            await until(lambda: server.served == 1)

    async def test_idle_ones_are_closed_without_a_request(self) -> None:
        async with bench(keepalive_expiry=4.0) as (server, upstream):
            with moved_clock() as skip:
                peers = await opened(server, upstream, 2)
                skip(3.0)
                request = asyncio.create_task(exchange(upstream))
                await peers[1].answer()
                await request
                skip(1.1)
                await peers[0].gone()
                await until(lambda: len(upstream._open) == 1)
                skip(3.0)
                await peers[1].gone()
                await until(lambda: not upstream._open)

    async def test_really_closed(self) -> None:
        """With the real clock."""
        async with bench(keepalive_expiry=0.01) as (server, upstream):
            [peer] = await opened(server, upstream, 1)
            await peer.gone()

    @pytest.mark.parametrize(("chance", "after"), [(0.0, 1000.0), (1.0, 900.0), (0.5, 950.0)])
    async def test_lifetime(self, chance: float, after: float) -> None:
        """Up to a tenth less by chance: connections made together do not end together."""

        class Rng:
            def random(self) -> float:
                return chance

        async with bench(answering, rng=Rng(), max_lifetime=1000.0, keepalive_expiry=1e9) as (server, upstream):
            with moved_clock() as skip:
                await exchange(upstream)
                skip(after - 1)
                assert (await exchange(upstream)).reused
                skip(2)
                assert not (await exchange(upstream)).reused
            await until(lambda: server.served == 1)

    async def test_no_lifetime(self) -> None:
        async with bench(answering, max_lifetime=math.inf, keepalive_expiry=math.inf) as (_, upstream):
            with moved_clock() as skip:
                await exchange(upstream)
                skip(1e6)
                assert (await exchange(upstream)).reused

    async def test_a_lifetime_ends_no_request(self) -> None:
        async with bench(max_lifetime=10.0) as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(read=None), []))
                peer = await server.accept()
                skip(11)
                await peer.answer()
                assert (await request).status == 200

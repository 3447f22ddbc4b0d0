"""Which connection a request goes over: reuse, expiry, limits, connections made ahead."""

from __future__ import annotations

import asyncio
import math
import select
from collections.abc import Callable
from typing import Any

import pytest
from http1_kit import PATIENCE, quiet, turns
from http1_servers import (
    Peer,
    Server,
    answering,
    ask,
    assert_at_rest,
    bench,
    content,
    every_await,
    exchange,
    moved_clock,
    until,
)

import pathlb
from pathlb import ConfigError, Pool
from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.testing import black_hole, http_reply, refused_url
from pathlb.upstream.http1 import Http1Upstream

pytestmark = pytest.mark.anyio


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


class TestMaxConnections:
    async def refused(self, upstream: Http1Upstream) -> None:
        with pytest.raises(UpstreamError, match=r"Pool\.max_connections") as caught:
            await upstream.send(ask(), [])
        error = caught.value
        assert (error.fault, error.sent, error.local) == (Fault.POOL_TIMEOUT, Sent.NOT_SENT, True)

    async def test_beyond_it_a_request_fails_at_once(self) -> None:
        async with bench(max_connections=2) as (server, upstream):
            held = [asyncio.create_task(exchange(upstream)) for _ in range(2)]
            peers = [await server.accept() for _ in held]
            await self.refused(upstream)
            for peer in peers:
                await peer.answer()
            await asyncio.gather(*held)
            assert_at_rest(upstream, 2)

    async def test_connections_being_made_count(self) -> None:
        with black_hole() as url:
            async with bench(endpoint=Endpoint(url), max_connections=1) as (_, upstream):
                dialling = asyncio.create_task(upstream.send(ask(), []))
                await turns()
                await self.refused(upstream)
                dialling.cancel()
                await asyncio.wait([dialling])
                assert upstream._dialling == 0

    async def test_a_failed_dial_gives_its_place_back(self) -> None:
        with refused_url() as url:
            async with bench(endpoint=Endpoint(url), max_connections=1) as (_, upstream):
                for _ in range(3):
                    with pytest.raises(UpstreamError) as caught:
                        await upstream.send(ask(), [])
                    assert caught.value.fault is Fault.CONNECT

    async def test_a_cancelled_dial_gives_its_place_back(self) -> None:
        async with bench(answering, max_connections=1) as (_, upstream):

            async def check() -> None:
                await turns()  # the system closes what was cancelled
                assert (await exchange(upstream)).status == 200
                for connection in list(upstream._open):
                    connection.close()
                await turns()

            assert await every_await(lambda: exchange(upstream), check) >= 2

    @pytest.mark.parametrize("how", ["dropped body", "expired", "closed by the server", "cancelled"])
    async def test_a_closed_connection_gives_its_place_back_at_once(self, how: str) -> None:
        """Not some turns of the loop later: the next request may come in the same one."""
        async with bench(max_connections=1) as (server, upstream):
            with moved_clock() as skip:
                if how in ("expired", "closed by the server"):
                    [peer] = await opened(server, upstream, 1)
                    if how == "expired":
                        skip(5)
                    else:
                        peer.fin()
                        arrived(upstream)
                else:
                    request = asyncio.create_task(upstream.send(ask(), []))
                    peer = await server.accept()
                    if how == "cancelled":
                        request.cancel()
                        with pytest.raises(asyncio.CancelledError):
                            await request
                    else:
                        await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
                        await (await request).body.aclose()

                async def serve() -> None:
                    await (await server.accept()).answer()

                serving = asyncio.create_task(serve())
                assert not (await exchange(upstream)).reused
                await serving


class TestMinConnections:
    async def test_opened_before_any_request_and_used_by_them(self) -> None:
        async with bench(answering, min_connections=2) as (server, upstream):
            assert upstream.warm
            keeper = asyncio.create_task(upstream.keep_warm())
            await until(lambda: server.served == 2 and len(upstream._idle) == 2)
            assert not (await exchange(upstream)).reused, "it has carried nothing before"
            assert server.connections == 2
            keeper.cancel()
            await asyncio.wait([keeper])

    async def test_through_the_balancer(self) -> None:
        pool = Pool(min_connections=2)
        async with quiet(), Server(answering) as server:
            async with pathlb.Balancer([server.url], upstream=pathlb.Upstreams(pool=pool)) as balancer:
                await until(lambda: server.served == 2)
                assert (await balancer.send(ask())).status == 200
                assert server.connections == 2
            await until(lambda: server.served == 0)
            await server.deserted()

    async def test_those_that_close_are_replaced(self) -> None:
        """The server's doing, or the pool's own: idle for too long."""
        async with bench(min_connections=2, keepalive_expiry=0.01) as (server, upstream):
            keeper = asyncio.create_task(upstream.keep_warm())
            await until(lambda: server.connections >= 2)
            for peer in server.peers[:2]:
                peer.close()
            await until(lambda: server.connections >= 6 and len(upstream._open) == 2)
            keeper.cancel()
            await asyncio.wait([keeper])

    async def test_it_goes_on_while_the_endpoint_is_down(self) -> None:
        with refused_url() as url:
            async with bench(endpoint=Endpoint(url), min_connections=1, keepalive_expiry=0.01) as (_, upstream):
                keeper = asyncio.create_task(upstream.keep_warm())
                dials = 0

                async def dial(*args: Any) -> Any:
                    nonlocal dials
                    dials += 1
                    return await dialler(*args)

                dialler, upstream._dialer.dial = upstream._dialer.dial, dial  # type: ignore[method-assign]
                await until(lambda: dials >= 3)
                assert not keeper.done()
                keeper.cancel()
                await asyncio.wait([keeper])

    async def test_it_ends_with_the_pool(self) -> None:
        async with bench(answering, min_connections=1, keepalive_expiry=0.01) as (server, upstream):
            keeper = asyncio.create_task(upstream.keep_warm())
            await until(lambda: server.served == 1)
            await upstream.aclose()
            async with asyncio.timeout(PATIENCE):
                await keeper

    async def test_never_above_max_connections(self) -> None:
        async with bench(answering, min_connections=2, max_connections=2, keepalive_expiry=0.01) as (server, upstream):
            keeper = asyncio.create_task(upstream.keep_warm())
            most = 0

            def seen() -> bool:
                nonlocal most
                most = max(most, len(upstream._open) + upstream._dialling)
                return server.connections >= 6

            await until(seen)
            assert most == 2
            keeper.cancel()
            await asyncio.wait([keeper])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keepalive_expiry", -1),
        ("keepalive_expiry", math.nan),
        ("keepalive_expiry", "4"),
        ("keepalive_expiry", None),
        ("max_lifetime", 0),
        ("max_lifetime", True),
        ("min_connections", -1),
        ("min_connections", 1.5),
        ("min_connections", math.inf),
        ("max_connections", 0),
        ("max_connections", 2.5),
        ("max_head", 0),
        ("max_head", 1e6),
        ("max_fields", 0),
        ("max_informational", -1),
        ("buffer", 0),
        ("buffer", "64k"),
        ("local_address", "localhost"),
        ("local_address", ""),
        ("local_address", "127.0.0.1:0"),
    ],
)
def test_a_setting_that_cannot_work(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Pool(**{field: value})
    assert caught.value.field == f"Pool.{field}"


def test_more_ahead_than_allowed() -> None:
    with pytest.raises(ConfigError) as caught:
        Pool(min_connections=3, max_connections=2)
    assert caught.value.field == "Pool.min_connections"
    assert Pool(min_connections=2, max_connections=2).min_connections == 2

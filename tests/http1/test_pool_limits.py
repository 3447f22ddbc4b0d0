"""How many connections there may be, and how many there are ahead of any request; settings that cannot work."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from http1_cancel import every_await
from http1_kit import PATIENCE, quiet, turns
from http1_servers import (
    Peer,
    Server,
    answering,
    arrived,
    ask,
    assert_at_rest,
    bench,
    exchange,
    moved_clock,
    opened,
    until,
)

import pathlb
from pathlb import ConfigError, Pool
from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.testing import black_hole, refused_url
from pathlb.upstream.http1 import Http1Upstream
from pathlb.upstream.http1 import upstream as upstream_module

pytestmark = pytest.mark.anyio


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
        async with bench(max_connections=1, keepalive_expiry=4.0) as (server, upstream):
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
    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(upstream_module, "_WARM_AGAIN", 0.01)

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
            async with bench(endpoint=Endpoint(url), min_connections=1) as (_, upstream):
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

    async def test_a_server_that_closes_them_soon_is_not_hammered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is overloaded, or on its way down: connecting again and again at full speed is no help."""
        monkeypatch.setattr(upstream_module, "_WARM_AGAIN", 1e6)

        async def closing(peer: Peer) -> None:
            await turns(10)
            peer.close()

        async with bench(closing, min_connections=1) as (server, upstream):
            keeper = asyncio.create_task(upstream.keep_warm())
            await until(lambda: server.connections)
            await turns(1000)  # some milliseconds
            assert server.connections <= 5
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

"""`BalancedTransport` under a plain client, whole or on one prefix, and the balancer several of them share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import httpx
import httpx2
import pytest
from io_helpers import Answer, Held, Seen, Site, Stack, by_url, reply, scripted, until

import pathlb
import pathlb.httpx2
from pathlb.testing import Fleet, ScriptedUpstream

pytestmark = pytest.mark.anyio


async def test_under_a_plain_client(stack: Stack, fleet: Fleet) -> None:
    async with pathlb.Balancer(fleet.urls, policy=pathlb.RoundRobin()) as balancer:
        transport = stack.pathlb.BalancedTransport(balancer)
        assert isinstance(transport, stack.http.AsyncBaseTransport)
        async with stack.http.AsyncClient(transport=transport, base_url="http://path-gateway/v1") as client:
            for _ in range(6):
                response = await client.post("/x", json={})
                assert response.status_code == 200
                assert response.request.url == "http://path-gateway/v1/x"
    assert [gateway.stats().requests for gateway in fleet] == [2, 2, 2]


async def test_on_one_prefix_of_an_existing_client(stack: Stack, fleet: Fleet) -> None:
    with Site() as elsewhere:
        async with pathlb.Balancer(fleet.urls) as balancer:
            mounts = {"http://path-gateway": stack.pathlb.BalancedTransport(balancer)}
            async with stack.http.AsyncClient(mounts=mounts) as client:
                balanced = await client.get("http://path-gateway/v1")
                plain = await client.get(f"{elsewhere.url}/v2")
    assert balanced.headers["x-gateway"].startswith("gateway-")
    assert "pathlb" in balanced.extensions
    assert "pathlb" not in plain.extensions
    assert [seen.target for seen in elsewhere.seen] == ["/v2"]


async def test_a_redirect_to_an_instance_comes_back_to_the_mount(stack: Stack) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(307, [("Location", f"{site.url}/new")]) if seen.target == "/old" else Answer()

    with Site(answer) as site:
        async with pathlb.Balancer([site.url]) as balancer:
            mounts = {"http://path-gateway": stack.pathlb.BalancedTransport(balancer)}
            async with stack.http.AsyncClient(mounts=mounts, follow_redirects=True) as client:
                response = await client.get("http://path-gateway/old", headers={"Authorization": "Bearer s3cret"})
    assert response.url == "http://path-gateway/new"
    assert [seen.all("authorization") for seen in site.seen] == [["Bearer s3cret"]] * 2


async def test_a_redirect_away_under_a_whole_plain_client_takes_no_credentials(stack: Stack) -> None:
    """To a transport without an origin of its own every host is a logical name; use mounts where that is too much."""
    with Site(lambda seen: Answer(302, [("Location", "http://evil.example/x")])) as site:
        async with pathlb.Balancer([site.url]) as balancer:
            transport = stack.pathlb.BalancedTransport(balancer)
            async with stack.http.AsyncClient(transport=transport, follow_redirects=True, max_redirects=1) as client:
                with pytest.raises(stack.http.TooManyRedirects):
                    await client.get("http://gw/", headers={"Authorization": "Bearer s3cret"})
    assert [(seen.all("host"), seen.all("authorization")) for seen in site.seen] == [
        (["gw"], ["Bearer s3cret"]),
        (["evil.example"], []),
    ]


async def test_the_client_closes_neither_the_balancer_nor_what_else_uses_it(stack: Stack, fleet: Fleet) -> None:
    async with pathlb.Balancer(fleet.urls) as balancer:
        async with stack.http.AsyncClient(transport=stack.pathlb.BalancedTransport(balancer)) as client:
            await client.get("http://gw/")
        async with stack.pathlb.AsyncClient(balancer) as own:
            await own.get("/")
        await own.aclose()
        transport = stack.pathlb.BalancedTransport(balancer)
        await transport.aclose()
        async with stack.http.AsyncClient(transport=transport) as client:
            assert (await client.get("http://gw/")).status_code == 200
    async with stack.http.AsyncClient(transport=transport) as client:
        with pytest.raises(pathlb.UsageError, match="closed"):
            await client.get("http://gw/")


async def test_two_transports_share_the_load_they_see() -> None:
    """Also one of each library: what waits on one is seen by the other."""
    first, second = Held(), Held()
    balancer = scripted(first.upstream, second.upstream)
    async with balancer, anyio.create_task_group() as group:
        one = httpx.AsyncClient(transport=pathlb.BalancedTransport(balancer))
        other = httpx2.AsyncClient(transport=pathlb.httpx2.BalancedTransport(balancer))
        for number in range(4):
            client = one if number % 2 else other
            group.start_soon(client.get, f"http://gw/{number}")
            await until(lambda number=number: balancer.snapshot().in_flight == number + 1)
        assert [snapshot.in_flight for snapshot in balancer.snapshot().endpoints] == [2, 2]
        first.let_go(2)
        second.let_go(2)
    assert balancer.snapshot().in_flight == 0


async def test_only_a_balancer_will_do(stack: Stack) -> None:
    with pytest.raises(pathlb.ConfigError) as caught:
        stack.pathlb.BalancedTransport(["http://a"])
    assert caught.value.field == "balancer"


async def test_bodies_of_both_kinds_directly(stack: Stack) -> None:
    """Called without a client, as other libraries do."""
    upstream = ScriptedUpstream([reply(200, body=b"one"), reply(200, body=b"two")])

    async def parts() -> AsyncIterator[bytes]:
        yield b"x"

    async with scripted(upstream) as balancer:
        transport = stack.pathlb.BalancedTransport(balancer)
        for content, expected in ((b"in memory", b"one"), (parts(), b"two")):
            response = await transport.handle_async_request(stack.http.Request("PUT", "http://gw/x", content=content))
            assert await response.aread() == expected
            assert response.request.url == "http://gw/x"
            await response.aclose()
        assert by_url(balancer)["http://a"].in_flight == 0
    assert upstream.calls[0][0].body == b"in memory"
    assert not isinstance(upstream.calls[1][0].body, bytes)

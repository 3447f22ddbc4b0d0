"""The ends of things: closing with requests in flight, replies nobody gets, scopes that end twice."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from faultkit import PATIENCE, Stack, at_rest, descriptors, nothing_left, open_connections, until

import pathlb
from pathlb import Retry
from pathlb.core.model import Endpoint
from pathlb.exchange import Headers, Reply, Request
from pathlb.runner import make_runner
from pathlb.testing import FaultServer, Fleet, Mode, ReadRequest, ScriptedUpstream, Send, WaitFor
from pathlb.testing.scripted import Body

pytestmark = pytest.mark.anyio

A, B, C = "http://a.test", "http://b.test", "http://c.test"


class FailsToClose(Body):
    """A reply body whose close fails."""

    async def aclose(self) -> None:
        await super().aclose()
        raise OSError("close failed")


async def test_discarded_reply_that_fails_to_close(anyio_backend: str) -> None:
    """The request goes on to the next endpoint all the same."""
    bad = FailsToClose()
    upstreams = {A: ScriptedUpstream([Reply(503, [], bad)]), B: ScriptedUpstream()}
    async with nothing_left():
        async with pathlb.AsyncClient([A, B], upstream=ScriptedUpstream.factory(upstreams)) as client:
            for _ in range(20):
                assert (await client.get("/")).status_code == 200
            assert bad.closed
            await at_rest(client.balancer)


async def test_strategy_that_raises(anyio_backend: str) -> None:
    """The caller gets its own exception, and the reply nobody gets is closed."""
    body = Body(b"x")

    def strategy(state: Any) -> bool:
        raise ZeroDivisionError("a bug of the caller's")

    upstreams = {A: ScriptedUpstream([Reply(503, [], body)])}
    async with nothing_left():
        async with pathlb.AsyncClient(
            [A], upstream=ScriptedUpstream.factory(upstreams), retry=Retry(retry=strategy)
        ) as client:
            with pytest.raises(ZeroDivisionError):
                await client.get("/")
            assert body.closed
            await at_rest(client.balancer)


async def test_upstream_with_a_bug(anyio_backend: str) -> None:
    """What is no failure of the network reaches the caller as it is, blames nobody and leaves nothing in flight."""

    def buggy(request: Request, extra_headers: Headers) -> Reply:
        raise ZeroDivisionError("a bug of the transport's")

    upstreams = {A: ScriptedUpstream(buggy)}
    async with nothing_left():
        async with pathlb.AsyncClient([A], upstream=ScriptedUpstream.factory(upstreams)) as client:
            for _ in range(10):
                with pytest.raises(ZeroDivisionError):
                    await client.get("/")
            snapshot = await at_rest(client.balancer)
            assert snapshot.endpoints[0].counts["failed"] == 0
            assert snapshot.endpoints[0].state == "ready"


async def test_close_with_requests_in_flight(stack: Stack, anyio_backend: str) -> None:
    """Every request ends with a typed error and every upstream is closed, whatever the first close sets free."""
    async with nothing_left():
        with Fleet(3) as fleet:
            for gateway in fleet:
                gateway.set_mode(Mode.HANG)
            before = descriptors()
            client = stack.client(fleet.urls, read=5, outlier=None)
            errors: list[Exception] = []

            async def get() -> None:
                try:
                    await client.get("/")
                except stack.lib.HTTPError as exc:
                    errors.append(exc)

            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as group:
                    for _ in range(9):
                        group.start_soon(get)
                    await until(lambda: sum(gateway.stats().in_flight for gateway in fleet) == 9)
                    await client.aclose()
            assert len(errors) == 9
            assert all(isinstance(error, pathlb.PathlbError) for error in errors), errors
            assert client.balancer.snapshot().in_flight == 0
            assert client.balancer.snapshot().endpoints == ()
            await until(lambda: sum(gateway.stats().open_connections for gateway in fleet) == 0)
            await until(lambda: descriptors() <= before)


async def test_close_right_after_an_endpoint_left(stack: Stack, anyio_backend: str) -> None:
    """The connections of the one that left are closed too, though nothing had run since."""
    async with nothing_left():
        with Fleet(2) as fleet:
            client = stack.client(fleet.urls)
            for url in fleet.urls:
                for _ in range(3):
                    await client.get("/", extensions={"pathlb": {"pin": url}})
            client.balancer.update(fleet.urls[:1])
            await client.aclose()
            await until(lambda: sum(gateway.stats().open_connections for gateway in fleet) == 0)


async def test_removed_endpoint_is_closed_after_its_last_request(stack: Stack, anyio_backend: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n"
    async with nothing_left():
        with Fleet(1) as fleet, FaultServer([[ReadRequest(), Send(head), WaitFor("go"), Send(b"done")]]) as server:
            async with stack.client([server.url, *fleet.urls], prefer=server.url, read=5) as client:
                async with client.stream("GET", "/") as response:
                    client.balancer.update(fleet.urls)
                    assert server.url in client.balancer._upstreams
                    assert (await client.get("/")).headers["X-Gateway"] == "gateway-0"
                    server.set("go")
                    assert await response.aread() == b"done"
                await until(lambda: server.url not in client.balancer._upstreams)
                snapshot = await at_rest(client.balancer)
                assert [one.url for one in snapshot.endpoints] == fleet.urls
                assert open_connections(client) == []


async def test_dropped_body_is_released(anyio_backend: str) -> None:
    """A streamed reply that nobody closes ends when it is collected."""
    bodies: list[Body] = []

    def script(request: Request, extra_headers: Headers) -> Reply:
        bodies.append(Body(b"x"))
        return Reply(200, [], bodies[-1])

    upstreams = {A: ScriptedUpstream(script)}
    async with nothing_left():
        async with pathlb.AsyncClient([A], upstream=ScriptedUpstream.factory(upstreams)) as client:
            for _ in range(5):
                response = await client.send(client.build_request("GET", "/"), stream=True)
            assert client.balancer.snapshot().in_flight >= 1
            del response
            gc.collect()  # httpx's responses and streams refer to each other
            await at_rest(client.balancer)
            await until(lambda: all(body.closed for body in bodies))


async def test_attempt_that_ends_twice(anyio_backend: str) -> None:
    """The engine gives an attempt up in the moment its deadline ends it."""
    runner = make_runner()
    done: list[str] = []
    scope = runner.scope(0)
    with anyio.fail_after(PATIENCE):
        with scope:
            if anyio_backend == "asyncio":

                def cancel() -> None:
                    scope.cancel()
                    done.append("cancelled")

                # The timeout is due too, and set to go first.
                asyncio.get_running_loop().call_soon(cancel)
            else:
                scope.cancel()
                done.append("cancelled")
            await anyio.sleep(PATIENCE)
    assert scope.cut
    assert done == ["cancelled"]
    await runner.aclose()


async def test_given_up_at_the_deadline(anyio_backend: str) -> None:
    """The heartbeat outlives it, and with it everything that depends on it."""

    class Hangs(ScriptedUpstream):
        async def send(self, request: Request, extra_headers: Headers) -> Reply:
            await anyio.sleep(PATIENCE)
            raise AssertionError("it was cut short")

    def make(endpoint: Endpoint) -> ScriptedUpstream:
        return Hangs() if endpoint.url == A else ScriptedUpstream()

    # The stall verdict falls at about 0.05 s, and so do these deadlines: some fall together.
    outlier = pathlb.Outlier(overdue_floor=0.05, overdue_factor=1)
    async with nothing_left():
        async with pathlb.AsyncClient([A, B, C], upstream=make, outlier=outlier, deadline=30) as client:
            results: list[str] = []

            async def get(deadline: float) -> None:
                try:
                    await client.get("/", extensions={"pathlb": {"deadline": deadline, "pin": A}})
                except pathlb.DeadlineExceeded:
                    results.append("deadline")

            for _ in range(20):
                await client.get("/", extensions={"pathlb": {"avoid": A}})
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as group:
                    for index in range(60):
                        group.start_soon(get, 0.04 + 0.002 * index)
            assert results == ["deadline"] * 60
            response = await client.send(client.build_request("GET", "/"), stream=True)
            del response
            gc.collect()
            await at_rest(client.balancer)  # the heartbeat collects what is dropped


async def test_attempt_that_was_cut_cleans_up(anyio_backend: str) -> None:
    """It is struck once: what it awaits on its way out is left alone, and the task may go on afterwards."""
    runner = make_runner()
    cleaned = False
    scope = runner.scope(0)
    with anyio.fail_after(PATIENCE):
        with scope:
            try:
                await anyio.sleep(PATIENCE)
            finally:
                with anyio.CancelScope(shield=True):
                    for _ in range(5):
                        await anyio.sleep(0.005)
                cleaned = True
        assert scope.cut
        assert cleaned
        await anyio.sleep(0.005)
    await runner.aclose()

"""The real thing: httpx2's own WebSocket client through pathlb, and a `websockets` server."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

import httpx2
import pytest
from http1_kit import PATIENCE
from http1_servers import until
from httpx2 import websockets as client_side
from websockets.asyncio.server import Server, ServerConnection, serve

import pathlb
import pathlb.errors
import pathlb.httpx2
import pathlb.testing

pytestmark = pytest.mark.anyio

TIMEOUT = httpx2.Timeout(PATIENCE, pool=None)


async def handler(socket: ServerConnection) -> None:
    """Echoes, and obeys a few words."""
    async for message in socket:
        if message in ("die", "die hard"):
            if message == "die hard":
                linger = struct.pack("ii", 1, 0)
                socket.transport.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
            socket.transport.abort()
            return
        if message == "close":
            await socket.close(4001, "bye")
            return
        if message == "large":
            message = b"x" * 400_000
        await socket.send(message)


@contextlib.asynccontextmanager
async def gateway() -> AsyncIterator[tuple[Server, str]]:
    """A WebSocket server, and its URL as an endpoint."""
    async with asyncio.timeout(PATIENCE), serve(handler, "127.0.0.1", 0) as server:
        yield server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def client(*urls: str, **options: Any) -> pathlb.httpx2.AsyncClient:
    return pathlb.httpx2.AsyncClient(list(urls), timeout=TIMEOUT, trust_env=False, **options)


def in_flight(pathlb_client: pathlb.httpx2.AsyncClient) -> int:
    return pathlb_client.balancer.snapshot().in_flight


async def at_rest(server: Server, pathlb_client: pathlb.httpx2.AsyncClient) -> None:
    """Nothing is left of any socket: not a lease, not a connection, not on the server either."""
    assert in_flight(pathlb_client) == 0
    await until(lambda: not server.connections)
    for upstream in pathlb_client.balancer._upstreams.values():
        await until(lambda: not upstream._open)  # type: ignore[attr-defined]  # noqa: B023


async def test_messages_both_ways() -> None:
    async with gateway() as (server, url), client(url) as pool:
        async with pool.websocket("/ws", max_message_size_bytes=1_000_000) as ws:
            await ws.send_text("grüße")
            assert await ws.receive_text(PATIENCE) == "grüße"
            await ws.send_bytes(b"\0\xff")
            assert await ws.receive_bytes(PATIENCE) == b"\0\xff"
            await ws.send_text("large")
            assert await ws.receive_bytes(PATIENCE) == b"x" * 400_000
            await ws.send_bytes(b"y" * 400_000)
            assert await ws.receive_bytes(PATIENCE) == b"y" * 400_000
        await at_rest(server, pool)


async def test_in_flight_for_as_long_as_it_is_open() -> None:
    """A long-lived socket is load: the next ones go elsewhere."""
    async with gateway() as (server, url), client(url) as pool:
        async with pool.websocket("/ws") as one:
            async with pool.websocket("/ws") as other:
                assert in_flight(pool) == 2
                await other.send_text("a")
                await other.receive_text(PATIENCE)
            assert in_flight(pool) == 1
            await one.send_text("b")
            assert await one.receive_text(PATIENCE) == "b"
        await at_rest(server, pool)


@pytest.mark.parametrize("base", ["", "http://path-gateway"])
async def test_urls(base: str) -> None:
    """Relative ones, and what an HTTP request could have, too."""
    async with gateway() as (server, url), client(url, base_url=base) as pool:
        socket_url = url.replace("http://", "ws://")
        for one in ("/ws", "ws", f"{base or url}/ws", f"{url}/ws?a=b", f"{socket_url}/ws"):
            async with pool.websocket(one) as ws:
                await ws.send_text("hello")
                assert await ws.receive_text(PATIENCE) == "hello"
        await at_rest(server, pool)


async def test_somebody_elses_url_is_not_connected_to() -> None:
    async with gateway() as (server, url), client(url) as pool:
        with pytest.raises(pathlb.errors.UsageError, match="nothing was sent"):
            async with pool.websocket("ws://elsewhere.test/ws"):
                pass
        await at_rest(server, pool)


async def test_the_server_closes() -> None:
    async with gateway() as (server, url), client(url) as pool:
        async with pool.websocket("/ws") as ws:
            await ws.send_text("close")
            with pytest.raises(client_side.WebSocketDisconnect) as caught:
                await ws.receive(PATIENCE)
            assert (caught.value.code, caught.value.reason) == (4001, "bye")
        await at_rest(server, pool)


async def test_the_client_closes() -> None:
    async with gateway() as (server, url), client(url) as pool:
        async with pool.websocket("/ws") as ws:
            [theirs] = server.connections
            await ws.close(4002, "enough")
            assert in_flight(pool) == 1, "the block has not been left"
        await theirs.wait_closed()
        assert (theirs.close_code, theirs.close_reason) == (4002, "enough")
        await at_rest(server, pool)


@pytest.mark.parametrize("how", ["die", "die hard"])
async def test_the_server_dies(how: str) -> None:
    """An error, not a wait without end."""
    async with gateway() as (server, url), client(url) as pool:
        async with pool.websocket("/ws") as ws:
            await ws.send_text(how)
            with pytest.raises(client_side.WebSocketNetworkError):
                await ws.receive(PATIENCE)
        await at_rest(server, pool)


async def test_the_block_is_cancelled() -> None:
    async with gateway() as (server, url), client(url) as pool:
        inside = asyncio.Event()

        async def talk() -> None:
            async with pool.websocket("/ws") as ws:
                inside.set()
                await ws.receive()

        talking = asyncio.create_task(talk())
        await inside.wait()
        talking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await talking
        await at_rest(server, pool)


async def test_the_client_is_closed_meanwhile() -> None:
    async with gateway() as (server, url):
        pool = client(url)
        with contextlib.suppress(client_side.HTTPXWSException):
            async with pool.websocket("/ws") as ws:
                await pool.aclose()
                with pytest.raises(client_side.HTTPXWSException):
                    await ws.receive(PATIENCE)
        await until(lambda: not server.connections)


async def test_a_refused_upgrade() -> None:
    """Its reply can be read."""

    async with asyncio.timeout(PATIENCE):

        def refuse(connection: ServerConnection, request: Any) -> Any:
            return connection.respond(403, "not for you")

        async with serve(handler, "127.0.0.1", 0, process_request=refuse) as server:
            async with client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as pool:
                with pytest.raises(client_side.WebSocketUpgradeError) as caught:
                    async with pool.websocket("/ws"):
                        pass
                assert caught.value.response.status_code == 403
                assert in_flight(pool) == 0


async def test_an_endpoint_that_is_down_is_passed_over() -> None:
    """A socket is opened by a GET like any other: refused here, it goes elsewhere."""
    with pathlb.testing.refused_url() as down:
        async with gateway() as (server, url), client(down, url, policy=pathlb.RoundRobin()) as pool:
            for _ in range(2):
                async with pool.websocket("/ws") as ws:
                    await ws.send_text("hello")
                    assert await ws.receive_text(PATIENCE) == "hello"
            assert in_flight(pool) == 0
            await until(lambda: not server.connections)

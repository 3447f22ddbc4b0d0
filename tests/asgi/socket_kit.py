"""Real ASGI servers around a Gateway, on the event loop of the test, and a caller without a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from pathlb import Balancer
from pathlb.asgi.types import ASGIApp, Message, Scope

PATIENCE = 20.0
"""Seconds any wait may take before the test fails; none should."""

HTTP_SERVERS = ["uvicorn-h11", "uvicorn-httptools", "hypercorn", "granian"]

SERVERS = [
    pytest.param("uvicorn-sansio"),
    pytest.param("uvicorn-wsproto"),
    pytest.param(
        "uvicorn-websockets",
        # uvicorn says that it is deprecated, and so does what it is made with.
        marks=pytest.mark.filterwarnings("ignore:The `websockets` implementation", "ignore::DeprecationWarning"),
    ),
    pytest.param("hypercorn"),
    pytest.param("granian"),
]


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, kind: str) -> AsyncIterator[int]:
    """The app under a server of this kind; the port it listens on."""
    name, _, variant = kind.partition("-")
    async with asyncio.timeout(PATIENCE), _RUNNERS[name](app, variant) as port:
        yield port


@contextlib.asynccontextmanager
async def _uvicorn(app: ASGIApp, variant: str) -> AsyncIterator[int]:
    import uvicorn

    http = variant if variant in ("h11", "httptools") else "auto"
    ws = {"sansio": "websockets-sansio"}.get(variant, variant) if http == "auto" else "none"
    config = uvicorn.Config(app, http=http, ws=ws, log_level="critical", proxy_headers=False)  # type: ignore[arg-type]
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        running = asyncio.create_task(server.serve([sock]))
        await until(lambda: server.started or running.done())
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await running


@contextlib.asynccontextmanager
async def _hypercorn(app: ASGIApp, _: str) -> AsyncIterator[int]:
    import hypercorn.asyncio
    import hypercorn.config

    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        config = hypercorn.config.Config()
        config.bind = [f"fd://{sock.detach()}"]  # which it closes
        config.loglevel = "CRITICAL"
        config.graceful_timeout = 0.5
        stop = asyncio.Event()
        running = asyncio.create_task(
            hypercorn.asyncio.serve(app, config, shutdown_trigger=stop.wait, mode="asgi")  # type: ignore[arg-type]
        )
        await _accepting(port)
        try:
            yield port
        finally:
            stop.set()
            await running


@contextlib.asynccontextmanager
async def _granian(app: ASGIApp, _: str) -> AsyncIterator[int]:
    from granian.server.embed import Interfaces, Server

    with socket.socket() as held:  # so that nobody else is given the port: granian shares it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        server = Server(app, port=port, interface=Interfaces.ASGI, log_enabled=False)
        running = asyncio.create_task(server.serve())
        await _accepting(port)
        try:
            yield port
        finally:
            server.stop()
            await running


_RUNNERS: dict[str, Callable[[ASGIApp, str], contextlib.AbstractAsyncContextManager[int]]] = {
    "uvicorn": _uvicorn,
    "hypercorn": _hypercorn,
    "granian": _granian,
}


async def _accepting(port: int) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.005)
        else:
            writer.close()
            await writer.wait_closed()
            return


async def until(condition: Callable[[], object]) -> None:
    """Wait until it holds, which must come to be."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await asyncio.sleep(0.001)


async def at_rest(balancer: Balancer) -> None:
    """Nothing is left of any socket or stream: not a lease, not a connection but idle ones."""
    await until(lambda: balancer.snapshot().in_flight == 0)
    for upstream in balancer._upstreams.values():
        await until(lambda: upstream._open <= set(upstream._idle))  # noqa: B023
    for endpoint in balancer.snapshot().endpoints:
        assert endpoint.counts["picks"] == endpoint.counts["released"]


class Caller:
    """A caller and its server in one: what the app is told, and what it says."""

    def __init__(self, **scope: Any) -> None:
        self.scope: Scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "ws",
            "path": "/ws",
            "raw_path": b"/ws",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"host", b"gateway.test"), (b"connection", b"Upgrade"), (b"upgrade", b"websocket")],
            "client": ("192.0.2.7", 4711),
            "server": ("127.0.0.1", 80),
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
            **scope,
        }
        self.sent: list[Message] = []
        """What the app has said, as far as it was taken."""
        self.open = asyncio.Event()
        """What the app says is taken; else it has to wait."""
        self.open.set()
        self.failure: Exception | None = None
        """What sending raises."""
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.tell({"type": "websocket.connect"})

    def tell(self, message: Message) -> None:
        self._inbox.put_nowait(message)

    def says(self, text: str) -> None:
        self.tell({"type": "websocket.receive", "text": text})

    def leaves(self, code: int = 1000, **more: Any) -> None:
        self.tell({"type": "websocket.disconnect", "code": code, **more})

    async def receive(self) -> Message:
        return await self._inbox.get()

    async def send(self, message: Message) -> None:
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.sent.append(message)

    async def hears(self, kind: str) -> Message:
        """The first message of this kind."""
        await until(lambda: any(message["type"] == kind for message in self.sent))
        return next(message for message in self.sent if message["type"] == kind)

    @contextlib.asynccontextmanager
    async def calling(self, app: ASGIApp) -> AsyncIterator[asyncio.Task[None]]:
        """The app at work for this caller; it has to come to an end by itself."""
        async with asyncio.timeout(PATIENCE):
            task = asyncio.ensure_future(app(self.scope, self.receive, self.send))
            try:
                yield task  # type: ignore[misc]
                await asyncio.wait([task])
            finally:
                task.cancel()
                await asyncio.wait([task])
            if not task.cancelled():
                task.result()

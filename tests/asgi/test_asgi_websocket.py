"""WebSockets through the Gateway: real servers, a real client, a real WebSocket server behind, and broken ones."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio
import pytest
from socket_kit import PATIENCE, SERVERS, Caller, at_rest, serving, until
from web3 import AsyncWeb3, WebSocketProvider
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close
from websockets.sync import server as sync_server
from websockets.utils import accept_key

from pathlb import Balancer, LeastConnections, PATHProfile, RoundRobin
from pathlb.asgi import Gateway, Route, relay
from pathlb.asgi.types import Message
from pathlb.core.errors import ConfigError
from pathlb.core.events import Observed
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Reply, WholeBody
from pathlb.testing import Body, FaultServer, Fleet, Hang, ReadRequest, ScriptedUpstream, Send, refused_url

pytestmark = pytest.mark.anyio

Handler = Callable[[ServerConnection], Awaitable[None]]
LARGE = 3_000_000


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def echo(socket: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        async for message in socket:
            await socket.send(message)


@contextlib.asynccontextmanager
async def upstream(handler: Handler = echo, **options: Any) -> AsyncIterator[tuple[Server, str]]:
    """A WebSocket server, and its URL as an endpoint."""
    async with serve(handler, "127.0.0.1", 0, max_size=None, **options) as it:
        yield it, f"http://127.0.0.1:{it.sockets[0].getsockname()[1]}"


@contextlib.asynccontextmanager
async def through(
    kind: str, handler: Handler = echo, *, options: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[tuple[str, Balancer, Server]]:
    """A Gateway under a server in front of a WebSocket server: the URL for callers. Nothing may be left at the end."""
    async with asyncio.timeout(PATIENCE), upstream(handler, **options or {}) as (behind, url):
        async with Balancer([url]) as balancer, serving(Gateway(balancer, **settings), kind) as port:
            yield f"ws://127.0.0.1:{port}", balancer, behind
            await at_rest(balancer)
            await until(lambda: not behind.connections)


def dial(url: str, **options: Any) -> connect:
    return connect(url, proxy=None, max_size=None, **options)


async def end_of(connection: ClientConnection) -> tuple[int | None, str | None]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await connection.recv()
    return connection.close_code, connection.close_reason


async def ending_of(behind: Server) -> ServerConnection:
    """The only connection of the server behind, once it has one."""
    await until(lambda: behind.connections)
    [connection] = behind.connections
    return connection


def reset(connection: ClientConnection | ServerConnection) -> None:
    sock = connection.transport.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.transport.abort()


class TestUnderEveryServer:
    async def test_messages(self, server: str) -> None:
        async with through(server) as (url, _, _), dial(f"{url}/ws") as caller:
            for message in ("grüße", b"\0\xff", "", b"", "x" * LARGE, b"y" * LARGE):
                await caller.send(message)
                assert await caller.recv() == message

    async def test_fragments_are_put_together(self, server: str) -> None:
        async def handler(socket: ServerConnection) -> None:
            await socket.send(["one ", "", "messäge"])
            await socket.send([b"\x00", b"\x01" * 70_000])

        async with through(server, handler) as (url, _, _), dial(url) as caller:
            assert await caller.recv() == "one messäge"
            assert await caller.recv() == b"\x00" + b"\x01" * 70_000

    async def test_the_handshake(self, server: str) -> None:
        """As PATH needs it, with what the caller has to say, and nothing that is only the caller's server's."""

        def reply(connection: ServerConnection, request: Any, response: Any) -> None:
            response.headers["Set-Cookie"] = "a=b"

        async with through(server, options={"process_response": reply}) as (url, _, behind):
            offered = {"Authorization": "Bearer x", "Target-Service-Id": "eth", "X-Forwarded-For": "198.51.100.1"}
            async with dial(f"{url}/v1/ws%2F?a=%20b", additional_headers=offered, origin="https://app.test") as caller:
                request = (await ending_of(behind)).request
                assert request is not None
                assert request.path == "/v1/ws%2F?a=%20b"
                sent = list(request.headers.raw_items())
                for name, value in {
                    "connection": "Upgrade",
                    "upgrade": "websocket",
                    "authorization": "Bearer x",
                    "target-service-id": "eth",
                    "origin": "https://app.test",
                    "x-forwarded-for": "127.0.0.1",
                    "x-forwarded-proto": "http",
                    "sec-websocket-version": "13",
                }.items():
                    assert [theirs for known, theirs in sent if known.lower() == name] == [value]
                assert request.headers["Via"].startswith("1.1 pathlb-")
                assert not request.headers.get_all("Sec-WebSocket-Extensions")
                assert not request.headers.get_all("Sec-WebSocket-Protocol")
                assert caller.response is not None
                if server != "granian":  # it ignores the fields of an accept
                    assert caller.response.headers["Set-Cookie"] == "a=b"
                assert len(caller.response.headers.get_all("Date")) <= 1
                assert len(caller.response.headers.get_all("Server")) <= 1
                assert not caller.response.headers.get_all("Content-Type")

    @pytest.mark.parametrize(
        ("offered", "theirs", "chosen"),
        [(["a", "b"], ["b"], "b"), (["a", "b"], ["b", "a"], "b"), (["a"], None, None), (None, ["a"], None)],
    )
    async def test_subprotocols(self, offered: Any, theirs: Any, chosen: str | None, server: str) -> None:
        def choose(connection: ServerConnection, named: Any) -> Any:
            return next((name for name in theirs or () if name in named), None)

        options = {"subprotocols": theirs, "select_subprotocol": choose}
        async with through(server, options=options) as (url, _, behind), dial(url, subprotocols=offered) as caller:
            assert caller.subprotocol == chosen
            assert (await ending_of(behind)).subprotocol == chosen

    @pytest.mark.parametrize(
        ("code", "reason"), [(1000, "bye"), (1001, ""), (1011, "x" * 123), (1013, "please reconnect"), (4999, "ü")]
    )
    async def test_the_gateway_closes(self, code: int, reason: str, server: str) -> None:
        async def handler(socket: ServerConnection) -> None:
            await socket.recv()
            await socket.close(code, reason)

        async with through(server, handler) as (url, _, behind), dial(url) as caller:
            theirs = await ending_of(behind)
            await caller.send("close")
            assert await end_of(caller) == (code, reason)
            await theirs.wait_closed()
            assert theirs.close_code == code

    async def test_the_gateway_closes_without_a_code(self, server: str) -> None:
        async def handler(socket: ServerConnection) -> None:
            socket.protocol.send_close()
            socket.transport.write(b"".join(socket.protocol.data_to_send()))

        async with through(server, handler) as (url, _, _), dial(url) as caller:
            assert await end_of(caller) == (1000, "")

    @pytest.mark.parametrize(("code", "reason"), [(1000, ""), (1008, "no"), (3000, ""), (4001, "bÿe")])
    async def test_the_caller_closes(self, code: int, reason: str, server: str) -> None:
        async with through(server) as (url, _, behind), dial(url) as caller:
            theirs = await ending_of(behind)
            await caller.close(code, reason)
            await theirs.wait_closed()
            # hypercorn tells apps nothing of a caller's close, granian not the reason.
            expected = {"hypercorn": (1001, ""), "granian": (code, "")}.get(server, (code, reason))
            assert (theirs.close_code, theirs.close_reason) == expected

    async def test_the_caller_closes_without_a_code(self, server: str) -> None:
        async with through(server) as (url, _, behind), dial(url) as caller:
            theirs = await ending_of(behind)
            caller.protocol.send_close()
            caller.transport.write(b"".join(caller.protocol.data_to_send()))
            await theirs.wait_closed()
            expected = 1005 if server.startswith("uvicorn") else 1001
            assert theirs.close_code == expected

    @pytest.mark.parametrize("hard", [False, True])
    async def test_the_caller_vanishes(self, hard: bool, server: str) -> None:
        async with through(server) as (url, _, behind), dial(url) as caller:
            theirs = await ending_of(behind)
            reset(caller) if hard else caller.transport.abort()
            await theirs.wait_closed()
            assert (theirs.close_code, theirs.close_reason) == (1001, "")

    @pytest.mark.parametrize("hard", [False, True])
    async def test_the_gateway_vanishes(self, hard: bool, server: str) -> None:
        async with through(server) as (url, balancer, behind), dial(url) as caller:
            theirs = await ending_of(behind)
            await caller.send("hello")
            assert await caller.recv() == "hello"
            reset(theirs) if hard else theirs.transport.abort()
            assert await end_of(caller) == (1011, "the connection to the gateway was lost")
            [endpoint] = balancer.snapshot().endpoints
            assert endpoint.counts["picks"] == 1

    async def test_it_is_in_flight_for_as_long_as_it_is_open(self, server: str) -> None:
        async with through(server) as (url, balancer, _):
            seen: list[Any] = []
            balancer.subscribe(seen.append)
            async with dial(url) as one, dial(url) as other:
                assert balancer.snapshot().in_flight == 2
                await other.close()
                await until(lambda: balancer.snapshot().in_flight == 1)
                await one.send("still there")
                assert await one.recv() == "still there"
            await at_rest(balancer)
            assert [event.outcome.status for event in seen if isinstance(event, Observed)] == [101, 101]
            assert balancer.snapshot().endpoints[0].counts["ok"] == 2

    async def test_a_refusal(self, server: str) -> None:
        def refuse(connection: ServerConnection, request: Any) -> Any:
            response = connection.respond(401, "who are you?\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response

        async with through(server, options={"process_request": refuse}, tell=True) as (url, balancer, _):
            with pytest.raises(InvalidStatus) as caught:
                async with dial(url):
                    pass
            response = caught.value.response
            assert response.status_code == 401
            assert bytes(response.body) == b"who are you?\n"
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.headers["X-Pathlb-Endpoint"] == balancer.snapshot().endpoints[0].url

    async def test_nobody_is_there(self, server: str) -> None:
        with refused_url() as down:
            async with Balancer([down]) as balancer, serving(Gateway(balancer, tell=True), server) as port:
                with pytest.raises(InvalidStatus) as caught:
                    async with dial(f"ws://127.0.0.1:{port}"):
                        pass
                response = caught.value.response
                assert response.status_code == 502
                assert response.headers["Content-Type"] == "application/problem+json"
                assert b'"status": 502' in response.body
                assert response.headers["X-Pathlb-Endpoint"] == down
                await at_rest(balancer)

    async def test_the_server_is_stopped(self, server: str) -> None:
        """The gateway hears of it, and the server need not wait for it."""
        if server == "granian" or (server == "hypercorn" and sys.version_info >= (3, 12)):
            pytest.skip("it waits for open sockets, and says nothing to the app")
        async with asyncio.timeout(PATIENCE), upstream() as (behind, url), Balancer([url]) as balancer:
            async with contextlib.AsyncExitStack() as running:
                port = await running.enter_async_context(serving(Gateway(balancer), server))
                async with dial(f"ws://127.0.0.1:{port}") as caller:
                    theirs = await ending_of(behind)
                    await running.aclose()
                    await theirs.wait_closed()
                    assert theirs.close_code == (1001 if server == "hypercorn" else 1012)
                    await end_of(caller)
            await at_rest(balancer)

    async def test_many_messages_both_ways_at_once(self, server: str) -> None:
        """In order, none lost, while both sides write without waiting for the other."""
        count = 2_000

        async def handler(socket: ServerConnection) -> None:
            async def talk() -> None:
                for number in range(count):
                    await socket.send(f"down {number} " + "d" * (number % 500))

            talking = asyncio.create_task(talk())
            for number in range(count):
                assert await socket.recv() == f"up {number} ".encode() + b"u" * (number % 500)
            await talking
            await socket.close(4000, "all of it")

        async with through(server, handler) as (url, _, _), dial(url) as caller:

            async def talk() -> None:
                for number in range(count):
                    await caller.send(f"up {number} ".encode() + b"u" * (number % 500))

            talking = asyncio.create_task(talk())
            for number in range(count):
                assert await caller.recv() == f"down {number} " + "d" * (number % 500)
            assert await end_of(caller) == (4000, "all of it")
            await talking


async def stalled(balancer: Balancer, progress: Callable[[], int]) -> None:
    """Wait until the connection of the only socket is not read any more, and nothing moves."""
    [connection] = next(iter(balancer._upstreams.values()))._open  # type: ignore[attr-defined]
    while True:
        await until(lambda: connection.tunnel._paused)
        before = progress()
        for _ in range(50):
            await asyncio.sleep(0.001)  # a server in another thread may still move something
        if connection.tunnel._paused and progress() == before:
            return


class TestBackpressure:
    async def test_a_caller_that_does_not_read(self, server: str) -> None:
        """Stops the gateway: what is on the way is what the system's buffers hold, not the stream."""
        part, count = b"x" * 100_000, 1_000
        written = 0

        async def handler(socket: ServerConnection) -> None:
            nonlocal written
            for _ in range(count):
                await socket.send(part)
                written += len(part)

        async with through(server, handler) as (url, balancer, _):
            async with dial(url, max_queue=1, compression=None) as caller:
                await stalled(balancer, lambda: written)
                assert written < len(part) * count / 2
                for _ in range(count):
                    assert await caller.recv() == part
                assert await end_of(caller) == (1000, "")

    async def test_a_gateway_that_does_not_read(self, server: str) -> None:
        """Stops the caller."""
        part, count = b"x" * 100_000, 1_000
        read_on = asyncio.Event()
        arrived = 0
        written = 0

        async def handler(socket: ServerConnection) -> None:
            nonlocal arrived
            socket.transport.pause_reading()
            await read_on.wait()
            socket.transport.resume_reading()
            for _ in range(count):
                arrived += len(await socket.recv())

        async with through(server, handler) as (url, _, _), dial(url, compression=None) as caller:

            async def talk() -> None:
                nonlocal written
                for _ in range(count):
                    await caller.send(part)
                    written += len(part)

            talking = asyncio.create_task(talk())
            before = -1
            while written != before:
                before = written
                for _ in range(100):
                    await asyncio.sleep(0.001)
            assert not talking.done()
            assert written < len(part) * count / 2
            read_on.set()
            await talking
            await until(lambda: arrived == len(part) * count)

    async def test_what_is_held(self) -> None:
        """Of what a gateway sends, in this process: one read and one message, however much it wants to send."""
        size = 100_000

        async def handler(socket: ServerConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await socket.send(b"x" * size)

        async with upstream(handler) as (_, url), Balancer([url]) as balancer:
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                await caller.hears("websocket.accept")
                [connection] = next(iter(balancer._upstreams.values()))._open  # type: ignore[attr-defined]
                read = 0
                feed = connection.tunnel.feed

                def fed(data: memoryview) -> None:
                    nonlocal read
                    read += len(data)
                    feed(data)

                connection.tunnel.feed = fed
                await until(lambda: len(caller.sent) > 20)
                caller.open.clear()
                await stalled(balancer, lambda: read)
                taken = sum(len(message.get("bytes", b"")) for message in caller.sent)
                assert read - taken < size + 4 * 65_536
                caller.leaves()
                caller.open.set()
            await at_rest(balancer)

    async def test_a_gateway_that_pings_and_does_not_read(self) -> None:
        """Is not read either, when enough answers to it are waiting."""
        ping = b"\x89\x7d" + b"p" * 125

        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                sent = 0
                while sent < 200_000_000:
                    writer.write(ping * 1_000)
                    sent += len(ping) * 1_000
                    if writer.transport.get_write_buffer_size() > 1_000_000:
                        break
                    await asyncio.sleep(0)
                [connection] = next(iter(balancer._upstreams.values()))._open  # type: ignore[attr-defined]
                await stalled(balancer, lambda: len(connection.tunnel._buffer))
                writer.transport.abort()
                await caller.hears("websocket.close")
            await at_rest(balancer)


@contextlib.asynccontextmanager
async def agreeing(stream: Any) -> AsyncIterator[Balancer]:
    """Over a scripted upstream that answers with a 101 and this network stream."""
    url = "http://scripted.test"

    def answer(request: Any, extra: Any) -> Reply:
        accept = accept_key(dict(request.headers)[b"sec-websocket-key"].decode()).encode()
        head = [(b"connection", b"upgrade"), (b"upgrade", b"websocket"), (b"sec-websocket-accept", accept)]
        return Reply(101, head, Body(), extensions={} if stream is None else {"network_stream": stream})

    scripted = ScriptedUpstream(answer)
    async with Balancer([url], upstream=ScriptedUpstream.factory({url: scripted})) as balancer:
        yield balancer


class RawGateway:
    """What answers a handshake, byte for byte."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.heads: list[bytes] = []

    async def accept(self, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next connection, its handshake answered with a 101, with the first frames."""
        reader, writer = await self.streams.get()
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        writer.write(switched(head) + first)
        return reader, writer


def switched(head: bytes, *fields: bytes, accept: bytes | None = None) -> bytes:
    lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
    key = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key")).split(b": ")[1]
    assert lines[b"connection"] == b"upgrade"
    accept = accept_key(key.decode()).encode() if accept is None else accept
    answer = [b"HTTP/1.1 101 Switching Protocols", b"Connection: Upgrade", b"Upgrade: websocket"]
    return b"\r\n".join([*answer, b"Sec-WebSocket-Accept: " + accept, *fields, b"", b""])


@contextlib.asynccontextmanager
async def raw_upstream(**options: Any) -> AsyncIterator[tuple[Balancer, RawGateway]]:
    gateway = RawGateway()
    opened: list[asyncio.StreamWriter] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        await gateway.streams.put((reader, writer))

    listening = await asyncio.start_server(connected, "127.0.0.1", 0, limit=2**24)
    port = listening.sockets[0].getsockname()[1]
    async with asyncio.timeout(PATIENCE), Balancer([f"http://127.0.0.1:{port}"], **options) as balancer:
        try:
            yield balancer, gateway
        finally:
            for writer in opened:
                writer.transport.abort()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            listening.close()
            await listening.wait_closed()


def unmasked(data: bytes) -> tuple[int, bytes]:
    """Opcode and payload of a client's short frame."""
    assert data[0] & 0x80
    assert data[1] & 0x80
    size = data[1] & 0x7F
    assert size <= 125
    assert len(data) == 6 + size
    return data[0] & 0x0F, bytes(byte ^ data[2 + index % 4] for index, byte in enumerate(data[6:]))


async def frame_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readexactly(6)
    return unmasked(head + await reader.readexactly(head[1] & 0x7F))


def close_frame(code: int, reason: str = "") -> bytes:
    payload = struct.pack("!H", code) + reason.encode()
    return bytes([0x88, len(payload)]) + payload


class TestHandshake:
    async def test_it_is_sent_elsewhere_when_nobody_is_there(self) -> None:
        with refused_url() as down:
            async with upstream() as (_, url), Balancer([down, url], policy=RoundRobin()) as balancer:
                async with serving(Gateway(balancer, tell=True), "uvicorn-sansio") as port:
                    for _ in range(2):
                        async with dial(f"ws://127.0.0.1:{port}") as caller:
                            await caller.send("hello")
                            assert await caller.recv() == "hello"
                            assert caller.response is not None
                            assert caller.response.headers["X-Pathlb-Endpoint"] == url
                    await at_rest(balancer)

    async def test_it_is_sent_elsewhere_when_the_connection_breaks(self) -> None:
        """It asks for nothing but a socket: whether it arrived does not matter."""
        with FaultServer([[ReadRequest()]]) as broken:
            async with upstream() as (_, url), Balancer([broken.url, url], policy=RoundRobin()) as balancer:
                caller = Caller()
                async with caller.calling(Gateway(balancer)):
                    await caller.hears("websocket.accept")
                    caller.leaves()
                await at_rest(balancer)
                assert len(broken.requests) == 1

    async def test_the_policy_picks(self) -> None:
        """An open socket is load like any other."""
        async with upstream() as (one, url), upstream() as (other, second):
            async with Balancer([url, second], policy=LeastConnections()) as balancer:
                async with serving(Gateway(balancer), "uvicorn-wsproto") as port, contextlib.AsyncExitStack() as stack:
                    for _ in range(6):
                        await stack.enter_async_context(dial(f"ws://127.0.0.1:{port}"))
                    assert (len(one.connections), len(other.connections)) == (3, 3)

    async def test_path_refuses_with_nothing(self) -> None:
        """A 200 without a body: another gateway is asked, and the caller is not told that it is fine."""
        with Fleet(2, path=["eth"], record=True) as fleet:
            async with Balancer(fleet.urls, profile=PATHProfile(probes=False), policy=RoundRobin()) as balancer:
                caller = Caller(path="/v1", raw_path=b"/v1")
                caller.scope["headers"].append((b"target-service-id", b"eth"))
                async with caller.calling(Gateway(balancer)):
                    start = await caller.hears("websocket.http.response.start")
                    body = await caller.hears("websocket.http.response.body")
                assert start["status"] == 502
                assert b"did not open a WebSocket" in body["body"]
                assert all(instance.received() for instance in fleet)
                await at_rest(balancer)

    @pytest.mark.parametrize(
        "fields",
        [
            pytest.param({"accept": b"AAAA"}, id="accept"),
            pytest.param({"more": [b"Sec-WebSocket-Protocol: never-offered"]}, id="subprotocol"),
            pytest.param({"more": [b"Sec-WebSocket-Extensions: permessage-deflate"]}, id="extension"),
        ],
    )
    async def test_a_101_that_is_none(self, fields: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.streams.get()
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(switched(head, *fields.get("more", ()), accept=fields.get("accept")))
                assert (await caller.hears("websocket.http.response.start"))["status"] == 502
            assert await reader.read() == b""
            assert "not as it must" in caplog.text
            await at_rest(balancer)

    async def test_an_upstream_that_cannot(self, caplog: pytest.LogCaptureFixture) -> None:
        """One that gives no access to the connection says so, where somebody will look."""
        async with agreeing(None) as balancer:
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                assert (await caller.hears("websocket.http.response.start"))["status"] == 502
            assert "no WebSockets with it" in caplog.text
            assert balancer.snapshot().in_flight == 0

    async def test_an_upstream_that_cannot_ask(self, caplog: pytest.LogCaptureFixture) -> None:
        """HTTP/2 has no upgrades; what its library says is logged, and nobody else is asked."""
        url = "http://scripted.test"
        error = UpstreamError(Fault.LOCAL_PROTOCOL, Sent.NOT_SENT, url, "connection-specific header field")
        scripted = ScriptedUpstream([error])
        async with Balancer([url], upstream=ScriptedUpstream.factory({url: scripted})) as balancer:
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                assert (await caller.hears("websocket.http.response.start"))["status"] == 502
            assert "no WebSocket: http://scripted.test: connection-specific header field" in caplog.text
            assert scripted.count == 1

    async def test_without_the_extension(self) -> None:
        """There is one answer only."""
        with refused_url() as down:
            async with Balancer([down]) as balancer:
                caller = Caller(extensions={})
                async with caller.calling(Gateway(balancer)):
                    pass
                assert [message["type"] for message in caller.sent] == ["websocket.close"]

    async def test_a_refusal_without_the_extension(self) -> None:
        with FaultServer([[ReadRequest(), Send(b"HTTP/1.1 403 No\r\nContent-Length: 3\r\n\r\nno!"), Hang()]]) as other:
            async with Balancer([other.url]) as balancer:
                caller = Caller(extensions=None)
                async with caller.calling(Gateway(balancer)):
                    pass
                assert [message["type"] for message in caller.sent] == ["websocket.close"]
                assert balancer.snapshot().in_flight == 0

    async def test_a_long_refusal(self) -> None:
        """Is relayed as it comes."""
        text = bytes(range(256)) * 1_000
        head = b"HTTP/1.1 403 No\r\nContent-Length: %d\r\n\r\n" % len(text)
        with FaultServer([[ReadRequest(), Send(head + text), Hang()]]) as other:
            async with Balancer([other.url]) as balancer:
                caller = Caller()
                async with caller.calling(Gateway(balancer)):
                    pass
                start, *parts = caller.sent
                assert (start["status"], dict(start["headers"])[b"content-length"]) == (403, b"%d" % len(text))
                assert b"".join(part["body"] for part in parts) == text
                assert len(parts) > 1
                assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]
                await at_rest(balancer)

    async def test_a_reply_that_cannot_be_handed_over(self) -> None:
        with FaultServer([[ReadRequest(), Send(b"HTTP/1.1 777 What\r\nContent-Length: 0\r\n\r\n"), Hang()]]) as odd:
            async with Balancer([odd.url]) as balancer:
                caller = Caller()
                async with caller.calling(Gateway(balancer)):
                    pass
                assert caller.sent[0]["status"] == 502
                await at_rest(balancer)

    @pytest.mark.parametrize(
        ("scope", "status"),
        [
            pytest.param({"headers": []}, 400, id="no host"),
            pytest.param({"headers": [(b"host", b"a"), (b"host", b"b")]}, 400, id="two hosts"),
            pytest.param({"subprotocols": ["a b"]}, 400, id="subprotocol"),
            pytest.param({"headers": [(b"host", b"a"), (b"via", b"1.1 me")]}, 508, id="loop"),
            pytest.param({"path": "/other", "raw_path": b"/other"}, 404, id="no route"),
        ],
    )
    async def test_what_is_answered_here(self, scope: dict[str, Any], status: int) -> None:
        async with Balancer(["http://127.0.0.1:9"]) as balancer:
            caller = Caller(**scope)
            async with caller.calling(Gateway(routes=[Route(balancer, path="/ws")], name="me")):
                pass
            assert caller.sent[0]["status"] == status
            assert caller.sent[-1]["type"] == "websocket.http.response.body"
            assert balancer.snapshot().endpoints[0].counts["picks"] == 0

    async def test_where_it_goes(self) -> None:
        """By the rules of any request: routes, mounts, rewrites, fields set, X-Forwarded-Proto."""
        async with raw_upstream() as (balancer, gateway):
            caller = Caller(scheme="wss", root_path="/mount", path="/mount/rpc/x", raw_path=b"/mount/rpc/x")
            app = Gateway(
                routes=[Route(balancer, path="/v1")],
                rewrite=("/rpc", "/v1"),
                set_request_headers={"X-Set": "1"},
            )
            async with caller.calling(app):
                _, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.leaves()
                writer.close()
            [head] = gateway.heads
            assert head.startswith(b"GET /v1/x HTTP/1.1\r\n")
            assert b"\r\nx-set: 1\r\n" in head
            assert b"\r\nx-forwarded-proto: https\r\n" in head
            assert b"\r\nx-forwarded-for: 192.0.2.7\r\n" in head
            assert b"\r\nHost: gateway.test\r\n" in head

    @pytest.mark.parametrize("how", ["leaves", "cancelled"])
    async def test_the_caller_leaves_meanwhile(self, how: str) -> None:
        """Nobody waits for the answer any more, and nothing is left of the question."""
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)) as task:
                reader, _ = await gateway.streams.get()
                await reader.readuntil(b"\r\n\r\n")
                assert balancer.snapshot().in_flight == 1
                caller.leaves(1006) if how == "leaves" else task.cancel()
                assert await reader.read() == b""
            assert caller.sent == []
            await at_rest(balancer)

    async def test_the_caller_has_left_by_the_accept(self) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            caller.failure = OSError("gone")
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                assert await frame_of(reader) == (0x8, struct.pack("!H", 1001))
                writer.close()
            await at_rest(balancer)

    async def test_the_caller_leaves_as_the_answer_comes(self) -> None:
        """Both in one turn of the loop: nobody will say again that it left."""
        at_once, closed = asyncio.Event(), asyncio.Event()

        class Leaving(Caller):
            async def receive(self) -> Message:
                if not self._inbox.empty():
                    return await self._inbox.get()
                await at_once.wait()
                return {"type": "websocket.disconnect", "code": 1006}

        class ItsBody(WholeBody):
            async def aclose(self) -> None:
                closed.set()

        async def answer(*_: Any) -> Reply:
            await at_once.wait()
            return Reply(101, [], ItsBody(b""))

        scripted = ScriptedUpstream(answer)
        async with Balancer(["http://scripted.test"], upstream=lambda _: scripted) as balancer:
            caller = Leaving()
            async with caller.calling(Gateway(balancer)):
                await until(lambda: scripted.count)
                at_once.set()
                await asyncio.wait_for(closed.wait(), PATIENCE)
            assert caller.sent == []

    async def test_a_caller_that_takes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relay, "TAKING", 0.01)
        monkeypatch.setattr(relay, "_CLOSING", 0.01)
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.open.clear()
                writer.write(b"\x81\x02hi")
                assert await frame_of(reader) == (0x8, struct.pack("!H", 1001))
                writer.close()
            await at_rest(balancer)

    async def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "pathlb.asgi.websocket")
        monkeypatch.delattr("pathlb.asgi.websocket")
        monkeypatch.setitem(sys.modules, "websockets.client", None)
        async with Balancer(["http://127.0.0.1:9"]) as balancer:
            caller = Caller()
            with pytest.raises(ConfigError, match=r"pip install 'pathlb\[serve\]'"):
                async with caller.calling(Gateway(balancer)):
                    pass

    @pytest.mark.parametrize("value", [0, -1, 1.5, "16"])
    def test_settings(self, value: Any) -> None:
        with pytest.raises(ConfigError, match="max_message"):
            Gateway(Balancer(["http://127.0.0.1:9"]), max_message=value)


class TestOpen:
    async def test_an_open_socket_is_not_sent_again(self) -> None:
        """Whatever becomes of its gateway."""
        async with upstream() as (one, url), upstream() as (other, second):
            async with Balancer([url, second], policy=RoundRobin()) as balancer:
                async with serving(Gateway(balancer), "uvicorn-sansio") as port:
                    async with dial(f"ws://127.0.0.1:{port}") as caller:
                        await until(lambda: one.connections or other.connections)
                        first, rest = (one, other) if one.connections else (other, one)
                        await caller.send("hello")
                        assert await caller.recv() == "hello"
                        reset(await ending_of(first))
                        first.close()
                        assert (await end_of(caller))[0] == 1011
                        assert not rest.connections
                    await at_rest(balancer)
                    assert sum(endpoint.counts["picks"] for endpoint in balancer.snapshot().endpoints) == 1

    async def test_what_comes_with_the_101(self) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                _, writer = await gateway.accept(b"\x81\x02hi" + close_frame(4000, "there"))
                assert (await caller.hears("websocket.send"))["text"] == "hi"
                closed = await caller.hears("websocket.close")
                assert (closed["code"], closed["reason"]) == (4000, "there")
                writer.close()
            await at_rest(balancer)

    async def test_pings_of_the_gateway_are_answered(self) -> None:
        async def handler(socket: ServerConnection) -> None:
            await (await socket.ping(b"are you there?"))
            await socket.close(4000, "yes")

        async with through("uvicorn-sansio", handler) as (url, _, _), dial(url) as caller:
            assert await end_of(caller) == (4000, "yes")

    async def test_a_silent_gateway_is_pinged(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And one that answers stays."""
        monkeypatch.setattr(relay, "_QUIET", 0.01)
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                for _ in range(3):
                    assert await frame_of(reader) == (0x9, b"")
                    writer.write(b"\x8a\x00")
                writer.write(b"\x81\x02hi")
                await caller.hears("websocket.send")
                caller.leaves()
                while (frame := await frame_of(reader)) == (0x9, b""):
                    pass
                assert frame == (0x8, struct.pack("!H", 1000))
                writer.close()
            await at_rest(balancer)

    async def test_a_gateway_that_does_not_answer_pings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is no more, whatever the network says."""
        monkeypatch.setattr(relay, "_QUIET", 0.01)
        monkeypatch.setattr(relay, "_PONG", 0.01)
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                assert await frame_of(reader) == (0x9, b"")
                assert (await caller.hears("websocket.close"))["code"] == 1011
                writer.close()
            await at_rest(balancer)

    @pytest.mark.parametrize(
        ("sent", "told", "answered"),
        [
            pytest.param(b"\x83\x00", 1011, 1002, id="opcode"),
            pytest.param(b"\x80\x00", 1011, 1002, id="continuation of nothing"),
            pytest.param(b"\xc1\x00", 1011, 1002, id="reserved bit"),
            pytest.param(b"\x81\x80\x00\x00\x00\x00", 1011, 1002, id="masked"),
            pytest.param(close_frame(1005), 1011, 1002, id="close code"),
            pytest.param(b"\x81\x02\xff\xff", 1011, 1007, id="text"),
            pytest.param(b"\x82\x7e\x04\x01" + b"x" * 1025, 1009, 1009, id="large"),
            pytest.param(
                (b"\x02\x7e\x02\x00" + b"x" * 512) * 1 + b"\x80\x7e\x02\x01" + b"x" * 513, 1009, 1009, id="sum"
            ),
        ],
    )
    async def test_a_gateway_that_breaks_the_protocol(self, sent: bytes, told: int, answered: int) -> None:
        """What came before is handed over, and both sides are told."""
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer, max_message=1024)):
                reader, writer = await gateway.accept(b"\x81\x02hi" + sent)
                assert (await caller.hears("websocket.send"))["text"] == "hi"
                assert (await caller.hears("websocket.close"))["code"] == told
                opcode, payload = await frame_of(reader)
                assert (opcode, payload[:2]) == (0x8, struct.pack("!H", answered))
                writer.close()
            await at_rest(balancer)

    async def test_messages_as_large_as_allowed(self) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer, max_message=1024)):
                reader, writer = await gateway.accept(b"\x82\x7e\x04\x00" + b"x" * 1024)
                assert (await caller.hears("websocket.send"))["bytes"] == b"x" * 1024
                caller.tell({"type": "websocket.receive", "bytes": b"y" * 1024, "text": None})
                assert (await reader.readexactly(1024 + 8))[:2] == b"\x82\xfe"
                caller.says("ä" * 513)
                closed = await caller.hears("websocket.close")
                assert (closed["code"], closed["reason"]) == (1009, "a message is larger than 1024 bytes")
                assert await frame_of(reader) == (0x8, struct.pack("!H", 1001))
                writer.close()
            await at_rest(balancer)

    @pytest.mark.parametrize(
        ("disconnect", "expected"),
        [
            ({"code": 1000}, Close(1000, "")),
            ({"code": 1005, "reason": ""}, None),
            ({"code": 1005}, Close(1001, "")),
            ({"code": 1005, "reason": None}, Close(1001, "")),
            ({"code": 1006, "reason": ""}, Close(1001, "")),
            ({"code": 1004}, Close(1001, "")),
            ({"code": 1015}, Close(1001, "")),
            ({"code": 2999}, Close(1001, "")),
            ({"code": 5000}, Close(1001, "")),
            ({"code": None}, Close(1001, "")),
            ({}, Close(1001, "")),
            ({"code": 1014, "reason": "ü" * 100}, Close(1014, "ü" * 61)),
        ],
    )
    async def test_how_a_caller_ends(self, disconnect: Message, expected: Close | None) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.tell({"type": "websocket.disconnect", **disconnect})
                assert await frame_of(reader) == (0x8, b"" if expected is None else expected.serialize())
                writer.close()
            assert caller.sent[1:] == []
            await at_rest(balancer)

    @pytest.mark.parametrize("failure", [OSError("gone"), RuntimeError("after websocket.close"), None])
    async def test_a_caller_that_left_before_it_is_known(self, failure: Exception | None) -> None:
        """Servers raise different things, or nothing; the code still reaches the gateway."""
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.failure = failure
                writer.write(b"\x81\x02hi" * 3)
                for _ in range(20):
                    await asyncio.sleep(0)
                caller.leaves(4003, reason="enough")
                assert await frame_of(reader) == (0x8, struct.pack("!H", 4003) + b"enough")
                writer.close()
            await at_rest(balancer)

    async def test_a_caller_that_left_and_is_never_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relay, "_CLOSING", 0.01)
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.failure = OSError("gone")
                writer.write(b"\x81\x02hi")
                assert await frame_of(reader) == (0x8, struct.pack("!H", 1001))
                writer.close()
            await at_rest(balancer)

    @pytest.mark.parametrize("says_why", [True, False])
    async def test_a_gateway_that_cannot_be_written_to(self, says_why: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """It may have closed in good order: then this counts."""
        if not says_why:
            monkeypatch.setattr(relay, "_CLOSING", 0.01)

        class Stream:
            def __init__(self) -> None:
                self.inbox: asyncio.Queue[bytes] = asyncio.Queue()

            async def read(self, size: int) -> bytes:
                return await self.inbox.get()

            async def write(self, data: bytes) -> None:
                if says_why:
                    self.inbox.put_nowait(close_frame(4000, "enough"))
                    self.inbox.put_nowait(b"")
                raise OSError("broken pipe")

        async with agreeing(Stream()) as balancer:
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                await caller.hears("websocket.accept")
                caller.says("hello")
                closed = await caller.hears("websocket.close")
            assert closed["code"] == (4000 if says_why else 1011)
            assert balancer.snapshot().in_flight == 0

    async def test_a_gateway_that_does_not_close(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is not waited for without end."""
        monkeypatch.setattr(relay, "_CLOSING", 0.01)
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, _ = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.leaves(1000)
                assert await frame_of(reader) == (0x8, struct.pack("!H", 1000))
                assert await reader.read() == b""
            await at_rest(balancer)

    async def test_what_a_closing_gateway_still_sends(self) -> None:
        """Is dropped until its own close."""
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                caller.leaves(1000)
                await frame_of(reader)
                writer.write(b"\x82\x7f\x00\x00\x00\x00\x00\x20\x00\x00" + b"x" * 2**21 + close_frame(1000))
                writer.write_eof()
            assert [message["type"] for message in caller.sent] == ["websocket.accept"]
            await at_rest(balancer)

    @pytest.mark.parametrize("how", ["asyncio", "anyio"])
    async def test_cancelled(self, how: str) -> None:
        """The gateway is told, and nothing is left in flight."""
        async with upstream() as (behind, url), Balancer([url]) as balancer:
            caller = Caller()
            scope = anyio.CancelScope()
            app = Gateway(balancer)

            async def scoped(*args: Any) -> None:
                with scope:
                    await app(*args)

            async with caller.calling(scoped) as task:
                theirs = await ending_of(behind)
                await caller.hears("websocket.accept")
                caller.says("hello")
                await caller.hears("websocket.send")
                assert balancer.snapshot().in_flight == 1
                task.cancel() if how == "asyncio" else scope.cancel()
                await theirs.wait_closed()
                assert theirs.close_code == 1001
            assert task.cancelled() == (how == "asyncio")
            await at_rest(balancer)

    async def test_cancelled_while_both_sides_are_stuck(self) -> None:
        async with raw_upstream() as (balancer, gateway):
            caller = Caller()
            async with caller.calling(Gateway(balancer)) as task:
                reader, writer = await gateway.accept()
                await caller.hears("websocket.accept")
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                caller.open.clear()
                writer.write(b"\x81\x02hi" * 1_000_000)
                for _ in range(2):
                    caller.tell({"type": "websocket.receive", "bytes": b"x" * 2**24})
                await stalled(balancer, lambda: 0)
                task.cancel()
                await asyncio.wait([task])
            await at_rest(balancer)

    async def test_the_balancer_is_closed_meanwhile(self) -> None:
        async with upstream() as (behind, url):
            balancer = Balancer([url])
            caller = Caller()
            async with caller.calling(Gateway(balancer)):
                await caller.hears("websocket.accept")
                await balancer.aclose()
                assert (await caller.hears("websocket.close"))["code"] == 1011
            assert balancer.snapshot().in_flight == 0
            await until(lambda: not behind.connections)


class TestJSONRPC:
    async def test_subscriptions_of_web3(self) -> None:
        """The WebSocket provider of web3.py, which every subscription needs, over PATH's settings."""

        async def node(socket: ServerConnection) -> None:
            with contextlib.suppress(ConnectionClosed):
                async for message in socket:
                    call = json.loads(message)
                    answer = {"eth_blockNumber": "0x10", "eth_subscribe": "0xcd0c", "eth_unsubscribe": True}
                    result = answer[call["method"]]
                    await socket.send(json.dumps({"jsonrpc": "2.0", "id": call["id"], "result": result}))
                    if call["method"] == "eth_subscribe":
                        assert call["params"] == ["newHeads"]
                        for number in range(3):
                            head = {"number": hex(number), "hash": "0x" + "ab" * 32}
                            params = {"subscription": "0xcd0c", "result": head}
                            note = {"jsonrpc": "2.0", "method": "eth_subscription", "params": params}
                            await socket.send(json.dumps(note))

        async with upstream(node) as (behind, url):
            profile = PATHProfile(services=["eth"], probes=False)
            async with Balancer([url], profile=profile) as balancer:
                async with serving(Gateway(balancer), "uvicorn-sansio") as port:
                    provider = WebSocketProvider(f"ws://127.0.0.1:{port}/v1", websocket_kwargs={"proxy": None})
                    async with AsyncWeb3(provider) as w3:
                        assert await w3.eth.block_number == 16
                        subscription = await w3.eth.subscribe("newHeads")
                        numbers = []
                        async for payload in w3.socket.process_subscriptions():
                            assert payload["subscription"] == subscription
                            numbers.append(payload["result"]["number"])
                            if len(numbers) == 3:
                                break
                        assert numbers == [0, 1, 2]
                        assert await w3.eth.unsubscribe(subscription)
                        request = (await ending_of(behind)).request
                        assert request is not None
                        assert request.headers["Target-Service-Id"] == "eth"
                        assert balancer.snapshot().in_flight == 1
                    await at_rest(balancer)


class TestOnTrio:
    """There the connections are httpx's."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"

    async def test_a_socket(self) -> None:
        def gateway(sock: Any) -> None:
            with contextlib.suppress(ConnectionClosed):
                for message in sock:
                    sock.send(message)
                    if message == "close":
                        sock.close(4001, "bye")

        with serve_in_a_thread(gateway) as url:
            async with Balancer([url]) as balancer:
                inbox: deque[Message] = deque([{"type": "websocket.connect"}])
                sent: list[Message] = []
                spoken = anyio.Event()

                async def receive() -> Message:
                    if not inbox:
                        await spoken.wait()
                    if not inbox:
                        await anyio.sleep_forever()
                    return inbox.popleft()

                async def send(message: Message) -> None:
                    sent.append(message)
                    if message["type"] == "websocket.accept":
                        inbox.extend({"type": "websocket.receive", "text": text} for text in ("x" * LARGE, "close"))
                        spoken.set()

                with anyio.fail_after(PATIENCE):
                    await Gateway(balancer)(Caller().scope, receive, send)
                assert [message.get("text") for message in sent] == [None, "x" * LARGE, "close", None]
                assert sent[-1] == {"type": "websocket.close", "code": 4001, "reason": "bye"}
                assert balancer.snapshot().in_flight == 0


@contextlib.contextmanager
def serve_in_a_thread(handler: Callable[[Any], None]) -> Iterator[str]:
    with sync_server.serve(handler, "127.0.0.1", 0, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()

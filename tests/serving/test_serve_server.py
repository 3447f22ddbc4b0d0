"""The HTTP server of a worker: what it accepts, what it turns away, and how it ends without losing a request."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from pathlb.asgi.types import ASGIApp, Receive, Scope, Send
from pathlb.serving import server as serving
from pathlb.serving.board import BoardFile
from pathlb.serving.server import HEAD_LIMIT, UvicornServer, new_event_loop

pytestmark = pytest.mark.anyio

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture(params=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return "asyncio", {"loop_factory": new_event_loop} if request.param == "uvloop" else {}


async def say_hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


async def take_all(scope: Scope, receive: Receive, send: Send) -> None:
    more = True
    while more:
        message = await receive()
        more = message.get("more_body", False)
    await say_hello(scope, receive, send)


async def hang(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.Event().wait()


def listening(kind: type[socket.socket] = socket.socket) -> socket.socket:
    listener = kind()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@asynccontextmanager
async def running(app: ASGIApp, listener: socket.socket | None = None, **options: Any) -> AsyncIterator[Any]:
    """A started server, and what connects to it."""
    listener = listener or listening()
    address = listener.getsockname()
    server = UvicornServer(app, listener, **options)
    await server.start()
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*address)
        writers.append(writer)
        return reader, writer

    try:
        async with asyncio.timeout(20):
            yield server, connect
    finally:
        for writer in writers:
            writer.close()
        if not server._ending:
            await server.drain(0)


async def answer(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return head + await reader.readexactly(int(length[1]) if length else 0)


async def end_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the connection is closed, in whatever way."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_it_adds_nothing_to_an_answer() -> None:
    async with running(say_hello) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert await answer(reader) == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"


async def test_who_waits_to_be_accepted_when_it_ends_is_served() -> None:
    listener = listening()
    async with running(say_hello, listener) as (server, _):
        # The kernel has connected it, and nobody has had the time to accept it.
        with socket.create_connection(listener.getsockname()) as early:
            early.sendall(GET)
            await server.drain(5)
            early.settimeout(5)
            assert early.recv(1000) == b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello"
            assert early.recv(1) == b""


async def test_a_request_on_its_way_on_an_idle_connection_when_it_ends_is_served() -> None:
    async with running(say_hello) as (server, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert b"connection: close" not in await answer(reader)
        idle, _ = await connect()
        ending = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0)  # it has begun
        writer.write(GET)
        assert b"connection: close" in await answer(reader)
        assert await reader.read() == b""
        assert await idle.read() == b""
        assert await ending == 0


async def test_a_request_under_way_when_it_ends_is_told_that_it_is_the_last() -> None:
    begun, finish = asyncio.Event(), asyncio.Event()

    async def wait_and_say_hello(scope: Scope, receive: Receive, send: Send) -> None:
        begun.set()
        await finish.wait()
        await say_hello(scope, receive, send)

    async with running(wait_and_say_hello) as (server, connect):
        reader, writer = await connect()
        writer.write(GET)
        await begun.wait()
        ending = asyncio.create_task(server.drain(5))
        await asyncio.sleep(0)  # it has begun
        finish.set()
        assert b"connection: close" in await answer(reader)
        assert await reader.read() == b""
        assert await ending == 0


async def test_what_takes_too_long_when_it_ends_is_cut_off_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with running(hang) as (server, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert await server.drain(0) in (0, 1)  # whether it has been read by then is luck
        await reader.read()


async def test_a_head_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.02)
    async with running(say_hello) as (_, connect):
        silent, _ = await connect()
        assert await silent.read() == b""
        slow, writer = await connect()
        writer.write(GET)
        await answer(slow)
        writer.write(GET[:-2])
        assert await slow.read() == b""


@pytest.mark.parametrize(
    ("request_", "later"),
    [(GET, b"\r\n"), (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n", b"rest")],
    ids=["empty lines", "a body after its answer"],
)
async def test_what_is_no_request_keeps_no_connection_open(
    request_: bytes, later: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.02)
    async with running(say_hello) as (_, connect):
        reader, writer = await connect()
        writer.write(request_)
        assert (await answer(reader)).endswith(b"hello")
        writer.write(later)
        assert await end_of(reader) == b""


@pytest.mark.parametrize("early", [b"", GET[:-2]], ids=["nothing", "half a head"])
async def test_an_idle_connection_and_a_slow_answer_are_no_slow_head(
    early: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.01)

    async def say_hello_late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2)
        await say_hello(scope, receive, send)

    async with running(say_hello_late) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert (await answer(reader)).endswith(b"hello")
        await asyncio.sleep(0.2)
        writer.write(GET + early)
        assert (await answer(reader)).endswith(b"hello")


async def test_a_head_without_an_end_is_refused() -> None:
    async with running(say_hello) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        await answer(reader)
        writer.write(GET[:-2])
        for _ in range(HEAD_LIMIT // 1000 + 500):
            writer.write(b"x: " + b"y" * 1000 + b"\r\n")
        assert (await answer(reader)).startswith(b"HTTP/1.1 431 ")


async def test_large_bodies_and_heads_within_the_limit_are_no_large_head() -> None:
    seen = 0

    async def take_all(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal seen
        more = True
        while more:
            message = await receive()
            seen += len(message["body"])
            more = message["more_body"]
        await say_hello(scope, receive, send)

    async with running(take_all) as (_, connect):
        reader, writer = await connect()
        for _ in range(2):
            head = (
                b"POST / HTTP/1.1\r\nHost: a\r\nx: "
                + b"y" * (HEAD_LIMIT - 1000)
                + b"\r\nContent-Length: 500000\r\n\r\n"
            )
            writer.write(head + b"z" * 500_000)
            assert (await answer(reader)).endswith(b"hello")
    assert seen == 1_000_000


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    "endless",
    [b"0\r\n" + (b"x: " + b"y" * 1000 + b"\r\n") * 500, b"0\r\nx: " + b"y" * 500_000, b"1;" + b"y" * 500_000],
    ids=["trailers", "a trailer", "a chunk's head"],
)
async def test_what_has_no_end_after_the_body_closes_the_connection(endless: bytes) -> None:
    async with running(take_all) as (_, connect):
        reader, writer = await connect()
        writer.write(CHUNKED + endless)
        assert await end_of(reader) == b""


async def test_trailers_are_no_fields_of_the_head() -> None:
    seen: list[Any] = []

    async def take_all_and_look(scope: Scope, receive: Receive, send: Send) -> None:
        await take_all(scope, receive, send)
        seen.append(scope["headers"])

    async with running(take_all_and_look) as (_, connect):
        reader, writer = await connect()
        for _ in range(3):
            writer.write(CHUNKED + b"0\r\nx-real-ip: 1.2.3.4\r\ny: " + b"z" * (HEAD_LIMIT // 2) + b"\r\n\r\n")
            assert (await answer(reader)).endswith(b"hello")
    assert seen == [[(b"host", b"a"), (b"transfer-encoding", b"chunked")]] * 3


# --- callers that do not take what is sent to them


SOCKET = (
    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize("request_", [GET, SOCKET], ids=["HTTP", "WebSocket"])
@pytest.mark.parametrize("patience", [0.05, None], ids=["the app gives up", "the app waits"])
async def test_a_caller_that_does_not_read_is_cut_off(
    request_: bytes, patience: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "STALL_TIMEOUT", 0.1)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.02)
    ended = asyncio.Event()

    async def pour(scope: Scope, receive: Receive, send: Send) -> None:
        part = bytes(1_000_000)
        try:
            async with asyncio.timeout(patience):
                if scope["type"] == "http":
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                else:
                    await send({"type": "websocket.accept"})
                for _ in range(100):
                    if scope["type"] == "http":
                        await send({"type": "http.response.body", "body": part, "more_body": True})
                    else:
                        await send({"type": "websocket.send", "bytes": part})
        finally:
            ended.set()

    async with running(pour, max_message=2**20) as (server, _):
        with socket.create_connection(server._listener.getsockname()) as silent:
            silent.sendall(request_)
            await ended.wait()
            while server._server.server_state.connections:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


class Slow:
    """A connection whose caller has so much left to take, time after time."""

    def __init__(self, *sizes: int, closing: bool = False) -> None:
        self.transport = self
        self._sizes = list(sizes)
        self._closing = closing
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self._sizes[0]

    def get_extra_info(self, name: str) -> Any:
        return SimpleNamespace(fileno=lambda: -1)  # the kernel tells nothing

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.aborted = True

    def next(self) -> None:
        del self._sizes[0]

    def shutdown(self) -> None:
        """The server ends."""


@pytest.mark.parametrize(
    ("sizes", "closing", "aborted"),
    [
        ([7, 6, 5, 4], False, False),
        ([7, 7, 7, 5], False, False),
        ([7, 7, 7, 7], False, True),
        ([7, 8, 9, 10], False, True),
        ([7, 0, 7, 7], False, False),
        ([7, 7, 7, 7], True, True),
        ([7, 6, 6, 6], True, False),
        ([7, 0, 0, 0], True, True),
        ([7, 6, 3, 0], True, False),
        ([2**25], False, True),
    ],
)
async def test_who_is_cut_off(sizes: list[int], closing: bool, aborted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    time = 0.0
    monkeypatch.setattr(serving, "time", SimpleNamespace(monotonic=lambda: time))
    async with running(hang, max_message=2**20) as (server, _):
        connections = server._server.server_state.connections
        connections.add(slow := Slow(*sizes, closing=closing))
        for _ in sizes:
            server._look_for_slow()
            server._sweep.cancel()
            assert aborted or not slow.aborted
            time += 21
            slow.next()
        assert slow.aborted == aborted
        connections.clear()


# --- TLS


@pytest.fixture
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's side and the callers'."""
    authority = trustme.CA()
    ours, theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(ours)
    authority.configure_trust(theirs)
    return ours, theirs


async def test_a_slow_caller_gets_the_last_of_an_encrypted_answer(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_TLS_GOODBYE", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.02)
    size = 20_000_000  # more than the kernel holds

    async def say_much(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"%d" % size), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": bytes(size)})

    listener = listening()
    async with running(say_much, listener, tls=tls[0]):
        reader, writer = await asyncio.open_connection(*listener.getsockname(), ssl=tls[1])
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(0.3)  # much longer than the time for a goodbye
        assert len(await reader.read()) == size
        writer.close()


async def test_who_says_no_goodbye_is_not_waited_for(
    tls: tuple[ssl.SSLContext, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "_TLS_GOODBYE", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.02)
    listener = listening()

    def call() -> ssl.SSLSocket:
        silent = tls[1].wrap_socket(socket.create_connection(listener.getsockname()), server_hostname="127.0.0.1")
        silent.sendall(GET)
        assert silent.recv(1000).startswith(b"HTTP/1.1 200 OK")
        return silent

    async with running(say_hello, listener, tls=tls[0]) as (server, _):
        with await asyncio.to_thread(call):
            await server.drain(15)
            assert not server._server.server_state.connections


class Exhausted(socket.socket):
    """A listening socket for whose connections there are no descriptors at first."""

    refusals = 2

    def accept(self) -> tuple[socket.socket, Any]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_without_descriptors_it_tries_again_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serving, "_ACCEPT_PAUSE", 0.02)
    async with running(say_hello, listening(Exhausted)) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        assert (await answer(reader)).endswith(b"hello")
    assert [record.getMessage() for record in caplog.records if record.name == "pathlb.serving"] == [
        "cannot accept a connection: Too many open files; the next try is in 0.02 s"
    ] * 2


async def test_a_worker_that_is_ahead_leaves_the_others_a_moment_and_no_more() -> None:
    file = BoardFile(2)
    board = file.board
    board.put(1, 0)  # it never gets one
    async with running(say_hello, place=(board, 0)) as (server, connect):
        for _ in range(5):
            reader, writer = await connect()
            writer.write(GET)
            assert (await answer(reader)).endswith(b"hello")
        assert board.is_ahead(0)
        writer.close()
        await server.drain(0)
    file.close()


def test_the_board_compares_with_the_least_busy_worker_there_is() -> None:
    file = BoardFile(3)
    board = file.board
    assert not board.is_ahead(0)
    for slot, count in enumerate((20, 20, 16)):
        board.put(slot, count)
    assert board.is_ahead(0)
    assert not board.is_ahead(2)
    board.clear(2)
    assert not board.is_ahead(0)
    file.close()

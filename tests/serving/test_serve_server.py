"""The HTTP server of a worker: what it accepts, what it turns away, and how it ends without losing a request."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

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


async def test_an_idle_connection_and_a_slow_answer_are_no_slow_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "HEAD_TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.01)

    async def say_hello_late(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.2)
        await say_hello(scope, receive, send)

    async with running(say_hello_late) as (_, connect):
        reader, writer = await connect()
        writer.write(GET)
        await answer(reader)
        await asyncio.sleep(0.2)
        writer.write(GET)
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

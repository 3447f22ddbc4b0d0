"""The access log of `pathlb serve`: what a line says and what it leaves out, and a reader that does not keep up."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from servekit import ignore, nothing, until

from pathlb.asgi.gateway import BrokenOff
from pathlb.asgi.types import Message, Receive, Scope, Send
from pathlb.serving import access_log
from pathlb.serving.access_log import AccessLogged, LineWriter, target_without_values

pytestmark = pytest.mark.anyio


async def logged(app: Any, scope: Scope, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    read, write = os.pipe()
    lines = LineWriter(write)
    try:
        await AccessLogged(app, lines)(scope, nothing, ignore)
    except BrokenOff:
        pass
    finally:
        lines.close()
        os.close(write)
    with os.fdopen(read) as stream:
        (line,) = stream.read().splitlines()
    return dict(field.split("=", 1) for field in line.split(" "))


REQUEST = {
    "type": "http",
    "method": "GET",
    "path": "/v1",
    "raw_path": b"/v1",
    "query_string": b"",
    "client": ("::1", 9),
}


def playing(*messages: Message) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


START = {"type": "http.response.start", "status": 200, "headers": []}


@pytest.mark.parametrize(
    ("scope", "messages", "status", "size", "broken"),
    [
        ({}, [START, {"type": "http.response.body", "body": b"abc"}], "200", "3", False),
        ({}, [START, {"type": "http.response.body", "body": b"ab", "more_body": True}], "200", "2", True),
        ({}, [], "499", "0", False),
        ({"type": "websocket"}, [{"type": "websocket.accept"}, {"type": "websocket.close"}], "101", "0", False),
        (
            {"type": "websocket"},
            [{"type": "websocket.accept"}, {"type": "websocket.send", "text": "hello"}, {"type": "websocket.close"}],
            "101",
            "5",
            False,
        ),
        ({"type": "websocket"}, [{"type": "websocket.close"}], "403", "0", False),
    ],
)
async def test_what_a_line_says(
    scope: Scope, messages: list[Message], status: str, size: str, broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = await logged(playing(*messages), {**REQUEST, **scope}, monkeypatch)
    assert line["caller"] == "::1"
    assert line["path"] == "/v1"
    assert (line["status"], line["bytes"], "broken" in line) == (status, size, broken)
    assert (line["endpoint"], line["attempts"]) == ("-", "0")


async def test_a_reply_that_broke_off_is_told_from_a_failure_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def break_off(scope: Scope, receive: Receive, send: Send) -> None:
        await send(START)
        raise BrokenOff

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise BrokenOff

    assert (await logged(break_off, REQUEST, monkeypatch))["broken"] == "true"
    assert (await logged(fail, REQUEST, monkeypatch))["status"] == "500"


@pytest.mark.parametrize(
    ("raw", "query", "shown"),
    [
        (b"/a%20b/c", b"", "/a%20b/c"),
        (b'/a b"\xff\n', b"", "/a%20b%22%FF%0A"),
        (b"/a?b=c", b"b=c&key=%41=1&bare&=x", "/a?b=*&key=*&*&=*"),
        (b"/" + b"a" * 5000, b"b=1", "/" + "a" * 1999),
    ],
)
def test_a_path_is_shown_without_values_and_on_one_line(raw: bytes, query: bytes, shown: str) -> None:
    assert target_without_values({"path": "/", "raw_path": raw, "query_string": query}) == shown


def test_a_reader_that_does_not_keep_up_costs_lines_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "_LINES_KEPT", 100)
    read, write = os.pipe()
    lines = LineWriter(write)
    written = 0
    while not lines._lost:  # the pipe is full, and so is the queue: nothing waits for it
        lines.write("x" * 99)
        written += 1
    with os.fdopen(read) as stream, ThreadPoolExecutor() as threads:
        reading = threads.submit(stream.read)
        until(lambda: not lines._lines)
        lost = lines._lost
        lines.write("the last")
        lines.close()
        os.close(write)
        *seen, told, last = reading.result().splitlines()
    assert (told, last) == (f"lost={lost}", "the last")
    assert seen == ["x" * 99] * (written - lost)


def test_a_reader_that_is_gone_is_no_failure() -> None:
    read, write = os.pipe()
    os.close(read)
    lines = LineWriter(write)
    lines.write("for nobody")
    lines.close()
    os.close(write)
    assert not lines._thread.is_alive()

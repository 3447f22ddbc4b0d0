"""The access log: a line a request on stdout, `key=value`, without query values, header fields or bodies."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import deque
from datetime import UTC, datetime
from urllib.parse import quote

from ..asgi.types import ASGIApp, Message, Receive, Scope, Send
from .build import Road, road

_SAFE = "/%!$&'()*+,;=:@-._~[]"
_PLAIN = re.compile(rb"[\w/%!$&'()*+,;=:@.~\[\]-]*").fullmatch
_PATH_SHOWN = 2_000
_AT_ONCE = 4_096  # bytes a write to a pipe is not torn apart by the writes of other workers
_LINES_KEPT = 10_000
_WRITE_EVERY = 0.1  # seconds
CALLER_LEFT = 499
"""nginx's status for a caller that left before there was one."""


class LineWriter:
    """Writes lines from a thread of its own: a reader that does not keep up must not stop the event loop.

    They are written every tenth of a second: to wake up a thread costs more than a line. Lines it has no room for are
    lost, and counted.
    """

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pathlb-access-log", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        if len(self._lines) >= _LINES_KEPT:
            self._lost += 1
            return
        if self._lost:
            self._lines.append(b"lost=%d\n" % self._lost)
            self._lost = 0
        self._lines.append(line.encode("ascii", "replace")[: _AT_ONCE - 1] + b"\n")

    def close(self) -> None:
        """Write what is left, if the reader takes it within a second."""
        self._over.set()
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        over = False
        while not over:
            over = self._over.wait(_WRITE_EVERY)
            block = b""
            while self._lines:
                line = self._lines.popleft()
                if len(block) + len(line) > _AT_ONCE:
                    self._write(block)
                    block = b""
                block += line
            self._write(block)

    def _write(self, block: bytes) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            while block:
                block = block[os.write(self._descriptor, block) :]


class AccessLogged:
    """`app`, with a line for each of its requests."""

    def __init__(self, app: ASGIApp, lines: LineWriter) -> None:
        self._app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        entry = _Entry(scope, send)
        road.set(entry.road)  # in a task that is this request's own
        try:
            await self._app(scope, receive, entry.send)
        except Exception:
            entry.status = entry.status or 500  # what the server makes of it
            raise
        finally:
            self._lines.write(entry.line())


class _Entry:
    """What is seen of one request."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self._began = time.perf_counter()
        client = scope.get("client")
        self.road = Road(client[0] if client else "-")
        self.status = 0
        self._size = 0
        self._complete = scope["type"] == "websocket"  # either side may end it

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in ("http.response.body", "websocket.http.response.body"):
            self._size += len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        elif kind in ("http.response.start", "websocket.http.response.start"):
            self.status = message["status"]
        elif kind == "websocket.accept":
            self.status = 101
        elif kind == "websocket.send":
            self._size += len(message.get("bytes") or message.get("text") or b"")
        elif kind == "websocket.close":
            self.status = self.status or 403
        await self._send(message)

    def line(self) -> str:
        attempts = self.road.attempts
        now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        caller = _on_one_line(self.road.caller.encode("utf-8"))
        return (
            f"time={now}Z caller={caller} method={self._scope.get('method', 'GET')} "
            f"path={target_without_values(self._scope)} status={self.status or CALLER_LEFT} bytes={self._size} "
            f"seconds={time.perf_counter() - self._began:.6f} "
            f"endpoint={attempts[-1].endpoint if attempts else '-'} attempts={len(attempts)}"
            f"{' broken=true' if self.status and not self._complete else ''}"
        )


def target_without_values(scope: Scope) -> str:
    """The path and the names of the query's parameters: `/v1?key=*&*`. What has no name is a value."""
    raw: bytes = scope.get("raw_path") or scope["path"].encode("utf-8")
    path = _on_one_line(raw.partition(b"?")[0][:_PATH_SHOWN])
    query: bytes = scope.get("query_string", b"")
    if not query:
        return path
    names = [_on_one_line(part.partition(b"=")[0]) + "=" if b"=" in part else "" for part in query.split(b"&")]
    return f"{path}?{'&'.join(f'{name}*' for name in names)}"[:_PATH_SHOWN]


def _on_one_line(raw: bytes) -> str:
    """As it is, but for what could be taken for something else in the line."""
    return raw.decode("ascii") if _PLAIN(raw) else quote(raw, safe=_SAFE)

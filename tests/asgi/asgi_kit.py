"""A caller and its server in one, in memory: what an ASGI app is told, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

import anyio
import anyio.lowlevel

from pathlb import Balancer
from pathlb.asgi.types import ASGIApp, Message, Scope
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Body, ScriptedUpstream

PATIENCE = 20.0
"""Seconds any wait may take before the test fails; none should."""

URL = "http://gateway-1.test"
OTHER = "http://gateway-2.test"


class Exchange:
    """One request, and what becomes of it. Header names are as servers give them: in lower case.

    The body comes in `parts`; an event among them is waited for. After it nothing comes until the caller leaves.
    """

    def __init__(
        self,
        target: str = "/",
        *parts: bytes | anyio.Event,
        method: str | None = None,
        headers: Headers | None = None,
        host: bytes = b"www.test",
        chunked: bool = False,
        **scope: Any,
    ) -> None:
        path, _, query = target.partition("?")
        framing: Headers = []
        if chunked:
            framing = [(b"transfer-encoding", b"chunked")]
        elif parts:
            framing = [(b"content-length", b"%d" % sum(len(part) for part in parts if isinstance(part, bytes)))]
        self.scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": method or ("POST" if parts or chunked else "GET"),
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [(b"host", host), *framing, *(headers or [])],
            "client": ("192.0.2.7", 4711),
            "server": ("127.0.0.1", 80),
            "extensions": {},
            **scope,
        }
        self.received = 0
        """Bytes of the body that have been received."""
        self.receiving = 0
        """How many wait in `receive` for the caller to leave."""
        self.calls = 0
        """Of `receive`."""
        self.said: list[Message] = []
        """What the app has said."""
        self.size = 0
        """Bytes of a reply body that have been taken."""
        self.taken = math.inf
        """Bytes of a reply body that are taken before its sender has to wait."""
        self.failure: Exception | None = None
        """What the app raised, run aside."""
        self._parts = list(parts) or [b""]
        self._left = anyio.Event()
        self._news = anyio.Event()

    # --- what the app sees

    async def receive(self) -> Message:
        self.calls += 1
        while self._parts and not self._left.is_set():
            await anyio.lowlevel.checkpoint()
            part = self._parts.pop(0)
            if isinstance(part, bytes):
                self.received += len(part)
                self._tell()
                return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
            await part.wait()
        self.receiving += 1
        self._tell()
        try:
            await self._left.wait()
        finally:
            self.receiving -= 1
            self._tell()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await anyio.lowlevel.checkpoint()
        size = len(message.get("body", b""))
        while self.size + size > self.taken and not self._left.is_set():
            await self._news.wait()
        if not self._left.is_set():
            self.size += size
            self.said.append(message)
        self._tell()

    # --- what the test does

    async def run(self, app: ASGIApp) -> Exchange:
        """Until the app has returned."""
        with anyio.fail_after(PATIENCE):
            await app(self.scope, self.receive, self.send)
        return self

    async def run_aside(self, app: ASGIApp) -> None:
        """The same, to be started in a task group; what it raises is kept."""
        try:
            await self.run(app)
        except Exception as exc:
            self.failure = exc

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until it holds, which must come to be, by something that happens here."""
        with anyio.fail_after(PATIENCE):
            while not condition():
                await self._news.wait()

    def take(self, count: float = math.inf) -> None:
        """Take up to so many bytes of the body."""
        self.taken = count
        self._tell()

    def leave(self) -> None:
        self._left.set()
        self._tell()

    def _tell(self) -> None:
        before, self._news = self._news, anyio.Event()
        before.set()

    # --- what there was

    @property
    def status(self) -> int:
        (start,) = [message for message in self.said if message["type"] == "http.response.start"]
        status: int = start["status"]
        return status

    @property
    def headers(self) -> Headers:
        (start,) = [message for message in self.said if message["type"] == "http.response.start"]
        headers: Headers = start["headers"]
        return headers

    def one(self, name: bytes) -> bytes:
        (value,) = [value for known, value in self.headers if known == name]
        return value

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.said if message["type"] == "http.response.body")

    @property
    def whole(self) -> bool:
        return bool(self.said) and not self.said[-1].get("more_body", False) and "body" in self.said[-1]


class Parts:
    """A reply body in parts, given when they are asked for; an event among them is waited for, an exception raised."""

    def __init__(self, parts: Iterable[bytes | anyio.Event | Exception]) -> None:
        self._parts = iter(parts)
        self.given = 0
        """Bytes."""
        self.closed = False
        self.cancelled = False
        """Somebody who waited for a part was cancelled."""

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        for part in self._parts:
            if isinstance(part, Exception):
                raise part
            if isinstance(part, bytes):
                self.given += len(part)
                return part
            try:
                await part.wait()
            except anyio.get_cancelled_exc_class():
                self.cancelled = True
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.closed = True


def ok(body: bytes = b"ok", headers: Headers | None = None, status: int = 200) -> Reply:
    return Reply(status, [(b"content-length", b"%d" % len(body)), *(headers or [])], Body(body))


def balancing(*upstreams: ScriptedUpstream, **options: Any) -> Balancer:
    """Over one endpoint for each: `URL`, and `OTHER`."""
    urls = [URL, OTHER][: len(upstreams)]
    return Balancer(urls, upstream=ScriptedUpstream.factory(dict(zip(urls, upstreams, strict=True))), **options)


class Taking:
    """An answer of a `ScriptedUpstream` that reads the request body first, as real ones do."""

    def __init__(self, reply: Callable[[], Reply] = ok) -> None:
        self._reply = reply
        self.bodies: list[bytes] = []
        self.parts: list[bytes] = []

    async def __call__(self, request: Request, extra_headers: Headers) -> Reply:
        if isinstance(request.body, bytes):
            self.parts = [request.body]
        else:
            self.parts = []
            async for part in request.body:
                self.parts.append(part)
        self.bodies.append(b"".join(self.parts))
        return self._reply()

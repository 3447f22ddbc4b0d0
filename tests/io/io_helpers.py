"""What these tests share: a server that answers with a function, and ways to wait for something to be true."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from types import ModuleType
from typing import Any, NamedTuple

import anyio

from pathlb import Balancer
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Body, ScriptedUpstream

LARGE_BODY = b"x" * 1_000_000
"""More than comes with a reply head or is read ahead: the request stays in flight until it is read or closed."""


class Stack(NamedTuple):
    """One of the two libraries, pathlb for it, and the module of its error classes."""

    http: ModuleType
    pathlb: ModuleType
    errors: ModuleType


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    peer: Any = None
    """The client's certificate."""

    def all(self, name: str) -> list[str]:
        return [value for known, value in self.headers if known.lower() == name.lower()]


@dataclass
class Answer:
    status: int = 200
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b"ok"


class Site:
    """An HTTP/1.1 server that answers with a function of the request, on a loopback socket, in threads."""

    def __init__(
        self,
        answer: Callable[[Seen], Answer] = lambda seen: Answer(),
        *,
        tls: ssl.SSLContext | None = None,
        family: int = socket.AF_INET,
    ) -> None:
        self.seen: list[Seen] = []
        self.connections = 0
        self.names: list[str | None] = []
        """What each TLS client asked for."""
        site = self

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                site.connections += 1
                self.request.settimeout(30)
                if tls is not None:
                    self.request = tls.wrap_socket(self.request, server_side=True)
                super().setup()

            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    while (seen := _read(self.rfile)) is not None:
                        seen.peer = self.request.getpeercert() if tls is not None else None
                        site.seen.append(seen)
                        self.wfile.write(_render(answer(seen), seen.method))

            def finish(self) -> None:
                with contextlib.suppress(OSError):
                    super().finish()
                self.request.close()

        class Server(socketserver.ThreadingTCPServer):
            address_family = family
            daemon_threads = True
            request_queue_size = 100

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that refuses the certificate is part of the tests."""

        if tls is not None:
            tls.sni_callback = lambda _, name, __: self.names.append(name)
        self._tls = tls
        self._server = Server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self.port: int = self._server.server_address[1]
        host = "[::1]" if family == socket.AF_INET6 else "127.0.0.1"
        self.authority = f"{host}:{self.port}"
        self.url = f"{'https' if tls else 'http'}://{self.authority}"

    def __enter__(self) -> Site:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _read(stream: Any) -> Seen | None:
    line = stream.readline()
    if not line:
        return None
    method, target, _ = line.decode("latin-1").split(" ")
    headers: list[tuple[str, str]] = []
    while (line := stream.readline().decode("latin-1").rstrip("\r\n")) != "":
        name, _, value = line.partition(":")
        headers.append((name, value.strip()))
    seen = Seen(method, target, headers, b"")
    if seen.all("transfer-encoding"):
        while size := int(stream.readline(), 16):
            seen.body += stream.read(size)
            stream.readline()
        stream.readline()
    else:
        seen.body = stream.read(int((seen.all("content-length") or ["0"])[0]))
    return seen


def _render(answer: Answer, method: str) -> bytes:
    lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in answer.headers]
    lines.append(f"Content-Length: {len(answer.body)}")
    head = "\r\n".join(lines) + "\r\n\r\n"
    return head.encode("latin-1") + (b"" if method == "HEAD" else answer.body)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until it holds."""
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 (what changes is in another thread)
            await anyio.sleep(0.001)


def reply(status: int = 200, headers: Headers | None = None, body: bytes = b"ok") -> Reply:
    return Reply(status, headers if headers is not None else [(b"content-length", b"%d" % len(body))], Body(body))


class Held:
    """A scripted upstream whose requests wait until they are let go, in the order they came."""

    def __init__(self) -> None:
        self.targets: list[bytes] = []
        self.gate = anyio.Semaphore(0)
        self.upstream = ScriptedUpstream(self._answer)

    async def _answer(self, request: Request, extra: Headers) -> Reply:
        self.targets.append(request.target)
        await self.gate.acquire()
        return reply()

    def let_go(self, count: int = 1) -> None:
        for _ in range(count):
            self.gate.release()


def scripted(*upstreams: ScriptedUpstream, **options: Any) -> Balancer:
    """A balancer over scripted upstreams, called http://a, http://b ..."""
    table = {f"http://{'abcdefg'[index]}": upstream for index, upstream in enumerate(upstreams)}
    return Balancer(list(table), upstream=ScriptedUpstream.factory(table), **options)


def by_url(balancer: Balancer) -> dict[str, Any]:
    """The snapshot, by endpoint."""
    return {one.url: one for one in balancer.snapshot().endpoints}

"""Beside the real instrumentation of httpx and httpx2, over a real connection: one request, one CLIENT span."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType
from typing import Any

import httpx
import httpx2
import pytest
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from pathlb.core.model import Cause, Endpoint, Outcome
from pathlb.exchange import Reply, Request
from pathlb.telemetry.hook import less_replaced
from pathlb.telemetry.tracing import Tracing

pytestmark = pytest.mark.anyio


class Server(ThreadingHTTPServer):
    seen: list[list[str]]
    """The `traceparent` headers of each request."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.seen.append(self.headers.get_all("traceparent", []))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(params=[(httpx, HTTPXClientInstrumentor), (httpx2, HTTPX2ClientInstrumentor)], ids=["httpx", "httpx2"])
def stack(request: pytest.FixtureRequest) -> tuple[ModuleType, Any]:
    return request.param  # type: ignore[no-any-return]


class NoBody:
    async def __aiter__(self) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for chunk in nothing:
            yield chunk

    async def aclose(self) -> None:
        pass


async def attempt(tracing: Tracing, library: Any, inner: Any, server: Server, headers: Any) -> int:
    """What the balancer does around an upstream."""
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}")
    request = Request("GET", b"/", list(headers))
    span = tracing.start(request, endpoint, 0)
    extra = [] if span is None else span.headers
    sent = less_replaced(request, extra)
    response = await inner.handle_async_request(
        library.Request("GET", f"{endpoint.url}/", headers=[*sent.headers, *extra])
    )
    if span is not None:
        span.end(Outcome(Cause.OK, status=response.status_code), Reply(response.status_code, [], NoBody()), None)
    await response.aclose()
    return int(response.status_code)


async def test_an_instrumented_transport_adds_no_span_of_its_own(
    stack: tuple[ModuleType, Any], server: Server, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    library, instrumentor = stack
    tracing = Tracing(provider)
    instrumentor().instrument(tracer_provider=provider)
    try:
        async with library.AsyncHTTPTransport() as transport:
            assert await attempt(tracing, library, transport, server, []) == 200
            (ours,) = exporter.get_finished_spans()
            # Next to it, the instrumentation works as before.
            request = library.Request("GET", f"http://127.0.0.1:{server.server_port}/")
            await (await transport.handle_async_request(request)).aclose()
    finally:
        instrumentor().uninstrument()
    assert ours.kind is SpanKind.CLIENT
    assert ours.instrumentation_scope is not None
    assert ours.instrumentation_scope.name == "pathlb"
    assert ours.context is not None
    assert server.seen[0] == [
        f"00-{ours.context.trace_id:032x}-{ours.context.span_id:016x}-{ours.context.trace_flags:02x}"
    ]
    assert len(exporter.get_finished_spans()) == 2


async def test_an_instrumented_client_keeps_the_client_span_and_attempts_are_inside(
    stack: tuple[ModuleType, Any], server: Server, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    library, instrumentor = stack
    tracing = Tracing(provider)

    class Balanced(library.AsyncBaseTransport):  # type: ignore[name-defined, misc]
        async def handle_async_request(self, request: Any) -> Any:
            async with library.AsyncHTTPTransport() as inner:
                return library.Response(await attempt(tracing, library, inner, server, request.headers.raw))

    async with library.AsyncClient(transport=Balanced()) as client:
        instrumentor.instrument_client(client, tracer_provider=provider)
        await client.get("http://gateway.internal/")
    ours, theirs = exporter.get_finished_spans()
    assert (ours.kind, theirs.kind) == (SpanKind.INTERNAL, SpanKind.CLIENT)
    assert ours.parent == theirs.context
    assert ours.context is not None
    # One header: the attempt's, not the one the client put there before.
    ((traceparent,),) = server.seen
    assert f"{ours.context.span_id:016x}" in traceparent

"""Telemetry through the client, over real sockets, with the SDK and the instrumentation people use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from io_helpers import LARGE_BODY, Site, Stack
from opentelemetry import metrics, trace
from opentelemetry.instrumentation.httpx import HTTPX2ClientInstrumentor, HTTPXClientInstrumentor
from opentelemetry.instrumentation.utils import suppress_http_instrumentation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

import pathlb
from pathlb.testing import Fleet, Mode, refused_url

pytestmark = pytest.mark.anyio


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The SDK as the global one, for this test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    import opentelemetry.metrics._internal as internal

    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    monkeypatch.setattr(internal, "_METER_PROVIDER", provider)
    assert metrics.get_meter_provider() is provider
    yield reader
    provider.shutdown()


@pytest.fixture
def instrumentor(stack: Stack) -> Any:
    return {"httpx": HTTPXClientInstrumentor, "httpx2": HTTPX2ClientInstrumentor}[stack.http.__name__]()


def arrived(fleet: Fleet) -> list[str]:
    """The traceparent of each request, in order of the gateways; one each."""
    found = []
    for gateway in fleet:
        for received in gateway.received():
            (value,) = [value for name, value in received.headers if name.lower() == b"traceparent"]
            found.append(value.decode())
    return found


def parent_of(span: ReadableSpan) -> str:
    assert span.context is not None
    return f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-{span.context.trace_flags:02x}"


async def test_one_client_span_an_attempt(stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter) -> None:
    fleet[0].set_mode(Mode.FAIL, status=503)
    async with stack.pathlb.AsyncClient(
        fleet.urls[:2], policy=pathlb.RoundRobin(), base_url="http://path-gateway:8080"
    ) as client:
        response = await client.get("/v1?token=s3cret", headers={"Authorization": "Bearer s3cret"})
        assert response.status_code == 200
    first, second = exporter.get_finished_spans()
    assert [span.kind for span in (first, second)] == [SpanKind.CLIENT] * 2
    assert [span.name for span in (first, second)] == ["GET", "GET"]
    for span, gateway, status in ((first, fleet[0], 503), (second, fleet[1], 200)):
        attributes = dict(span.attributes or {})
        assert attributes["http.request.method"] == "GET"
        assert attributes["server.address"] == "path-gateway"
        assert attributes["server.port"] == 8080
        assert attributes["network.peer.address"] == "127.0.0.1"
        assert attributes["network.peer.port"] == gateway.port
        assert attributes["http.response.status_code"] == status
        assert "s3cret" not in str(attributes)
    assert "http.request.resend_count" not in (first.attributes or {})
    assert (second.attributes or {})["http.request.resend_count"] == 1
    assert first.status.status_code is StatusCode.ERROR
    assert (first.attributes or {})["error.type"] == "503"
    assert second.status.status_code is StatusCode.UNSET
    assert arrived(fleet) == [parent_of(first), parent_of(second)], "each attempt sends its own"


async def test_attempts_are_siblings_under_the_callers_span(
    stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter
) -> None:
    with refused_url() as dead:
        async with stack.pathlb.AsyncClient([dead, fleet.urls[0]], policy=pathlb.RoundRobin()) as client:
            with trace.get_tracer("app").start_as_current_span("handler") as handler:
                await client.post("/")
                assert trace.get_current_span() is handler, "left as it was"
    first, second, around = exporter.get_finished_spans()
    assert around.name == "handler"
    assert first.parent == second.parent == around.context
    assert (first.attributes or {})["error.type"] == "ConnectError"
    assert [event.name for event in first.events] == [], "no text of exceptions"
    assert (second.attributes or {})["http.request.resend_count"] == 1


@pytest.mark.parametrize("how", ["all transports", "this client"])
async def test_no_double_spans_under_the_instrumentation(
    stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter, instrumentor: Any, how: str
) -> None:
    try:
        if how == "all transports":
            instrumentor.instrument()
        async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
            if how == "this client":
                instrumentor.instrument_client(client)
            assert (await client.get("/")).status_code == 200
    finally:
        if how == "all transports":
            instrumentor.uninstrument()
    spans = exporter.get_finished_spans()
    kinds = [span.kind for span in spans]
    assert kinds.count(SpanKind.CLIENT) == 1
    assert kinds == ([SpanKind.CLIENT] if how == "all transports" else [SpanKind.INTERNAL, SpanKind.CLIENT])
    assert arrived(fleet) == [parent_of(spans[0])]


async def test_suppressed_is_suppressed(stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        with suppress_http_instrumentation():
            await client.get("/")
        assert exporter.get_finished_spans() == ()
        await client.get("/")
    assert len(exporter.get_finished_spans()) == 1
    first, second = fleet[0].received()
    assert b"traceparent" not in dict(first.headers)
    assert b"traceparent" in dict(second.headers)


async def test_telemetry_can_be_turned_off(stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls[:1], telemetry=False) as client:
        await client.get("/")
    assert exporter.get_finished_spans() == ()
    assert b"traceparent" not in dict(fleet[0].received()[0].headers)


async def test_without_an_sdk_nothing_is_added(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        await client.get("/")
    assert [name for name, _ in fleet[0].received()[0].headers] == [
        b"Host",
        b"Accept",
        b"Accept-Encoding",
        b"Connection",
        b"User-Agent",
    ]


async def test_a_remote_parent_is_replaced_by_the_attempts(
    stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter
) -> None:
    """The caller of a gateway that nobody instrumented: its trace goes on, with one header."""
    remote = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        await client.get("/", headers={"traceparent": remote, "tracestate": "vendor=1"})
    (span,) = exporter.get_finished_spans()
    assert arrived(fleet) == [parent_of(span)]
    assert parent_of(span).split("-")[1] == remote.split("-")[1]
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == remote.split("-")[2]


async def test_cancelled_attempts_end_their_span(stack: Stack, fleet: Fleet, exporter: InMemorySpanExporter) -> None:
    fleet[0].set_mode(Mode.HANG)
    async with stack.pathlb.AsyncClient(fleet.urls[:1], outlier=None) as client:
        with pytest.raises(pathlb.DeadlineExceeded):
            await client.get("/", extensions={"pathlb": {"deadline": 0.05}})
    (span,) = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert "http.response.status_code" not in (span.attributes or {})


async def test_probes_make_no_spans(stack: Stack, exporter: InMemorySpanExporter) -> None:
    """They would drown the requests; and what started them is not their parent."""
    with Site() as site:
        async with stack.pathlb.AsyncClient([site.url], health=pathlb.Health("/health")):
            pass
    assert site.seen[0].target == "/health"
    assert site.seen[0].all("traceparent") == []
    assert exporter.get_finished_spans() == ()


async def test_metrics_of_a_request_and_its_retry(stack: Stack, fleet: Fleet, reader: InMemoryMetricReader) -> None:
    fleet[0].set_mode(Mode.FAIL, status=503)
    fleet[1].set_body(LARGE_BODY)
    async with stack.pathlb.AsyncClient(fleet.urls[:2], policy=pathlb.RoundRobin()) as client:
        async with client.stream("GET", "/"):
            data = reader.get_metrics_data()
    assert data is not None
    found = {
        metric.name: list(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    durations = {
        dict(point.attributes or {})["pathlb.endpoint"]: point for point in found["http.client.request.duration"]
    }
    assert set(durations) == set(fleet.urls[:2])
    assert (durations[fleet.urls[0]].attributes or {})["http.response.status_code"] == 503
    (retries,) = found["pathlb.retries"]
    assert retries.value == 1  # type: ignore[union-attr]
    in_flight = {dict(point.attributes or {})["pathlb.endpoint"]: point for point in found["pathlb.requests.in_flight"]}
    assert in_flight[fleet.urls[1]].value == 1  # type: ignore[union-attr]

"""What one attempt leaves in a trace, and what it sends along."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import baggage, trace
from opentelemetry import context as otel_context
from opentelemetry.instrumentation.utils import (
    is_http_instrumentation_enabled,
    suppress_http_instrumentation,
    suppress_instrumentation,
)
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from pathlb.core.model import Cause, Endpoint, Outcome, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Reply, Request
from pathlb.telemetry.hook import AttemptSpan, less_replaced
from pathlb.telemetry.tracing import Tracing

ENDPOINT = Endpoint("http://10.0.0.7:8081/base")
OK = Outcome(Cause.OK, status=200)
TRACE_ID = 0x0AF7651916CD43DD8448EB211C80319C
PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class NoBody:
    async def __aiter__(self) -> AsyncIterator[bytes]:
        nothing: tuple[bytes, ...] = ()
        for chunk in nothing:
            yield chunk

    async def aclose(self) -> None:
        pass


def request(method: str = "GET", target: bytes = b"/v1/things", **more: Any) -> Request:
    return Request(method, target, more.pop("headers", []), **more)


def reply(status: int) -> Reply:
    return Reply(status, [(b"set-cookie", b"secret")], NoBody())


def started(tracing: Tracing, request: Request, endpoint: Endpoint = ENDPOINT, resend_count: int = 0) -> AttemptSpan:
    attempt = tracing.start(request, endpoint, resend_count)
    assert attempt is not None
    return attempt


def one(exporter: InMemorySpanExporter) -> ReadableSpan:
    (span,) = exporter.get_finished_spans()
    return span


def attributes(exporter: InMemorySpanExporter) -> dict[str, Any]:
    return dict(one(exporter).attributes or {})


@contextmanager
def remote_parent() -> Iterator[None]:
    parent = NonRecordingSpan(SpanContext(TRACE_ID, 0xB7AD6B7169203331, True, TraceFlags(1)))
    token = otel_context.attach(trace.set_span_in_context(parent))
    yield
    otel_context.detach(token)


# What is recorded


def test_an_attempt_is_a_client_span_by_the_conventions(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    attempt = started(Tracing(provider), request(host=b"gateway.internal"))
    assert exporter.get_finished_spans() == ()
    attempt.end(OK, reply(200), None)

    span = one(exporter)
    assert span.name == "GET"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    assert span.instrumentation_scope is not None
    assert span.instrumentation_scope.name == "pathlb"
    assert attributes(exporter) == {
        "http.request.method": "GET",
        "server.address": "gateway.internal",
        "server.port": 80,
        "url.full": "http://gateway.internal/v1/things",
        "network.peer.address": "10.0.0.7",
        "network.peer.port": 8081,
        "http.response.status_code": 200,
        "pathlb.outcome": "ok",
    }


def test_without_a_logical_host_the_server_is_the_endpoint(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    started(Tracing(provider), request()).end(OK, reply(200), None)
    found = attributes(exporter)
    assert (found["server.address"], found["server.port"]) == ("10.0.0.7", 8081)
    assert found["url.full"] == "http://10.0.0.7:8081/base/v1/things"


def test_a_unix_socket_is_a_peer_without_a_port(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    started(Tracing(provider), request(), Endpoint("unix:///run/gw.sock")).end(OK, reply(200), None)
    found = attributes(exporter)
    assert found["network.peer.address"] == "/run/gw.sock"
    assert "network.peer.port" not in found


@pytest.mark.parametrize(
    ("host", "scheme", "address", "port", "origin"),
    [
        (b"gw:9000", "http", "gw", 9000, "http://gw:9000"),
        (b"gw", "https", "gw", 443, "https://gw"),
        (b"[::1]", "http", "::1", 80, "http://[::1]"),
        (b"[::1]:9000", "http", "::1", 9000, "http://[::1]:9000"),
        (b"user:secret@gw", "http", "gw", 80, "http://gw"),
        (b"gw:99999999999999999999", "http", "gw", 80, "http://gw:99999999999999999999"),
    ],
)
def test_the_logical_host(
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    host: bytes,
    scheme: str,
    address: str,
    port: int,
    origin: str,
) -> None:
    started(Tracing(provider), request(target=b"/", host=host), Endpoint(f"{scheme}://10.0.0.7")).end(OK, None, None)
    found = attributes(exporter)
    assert (found["server.address"], found["server.port"], found["url.full"]) == (address, port, f"{origin}/")


@pytest.mark.parametrize(
    ("target", "shown"),
    [
        (b"/a?key=secret&b=&c=x=y", "/a?key=REDACTED&b=REDACTED&c=REDACTED"),
        (b"/a?secret", "/a?REDACTED"),
        (b"/a?", "/a?"),
        (b"/a?b=c#secret", "/a?b=REDACTED"),
        (b"/a#secret", "/a"),
        (b"/caf\xe9", "/caf\\xe9"),
        (b"//user:pw/a", "//user:pw/a"),
        (b"http://user:secret@evil/a", ""),
        (b"*", ""),
    ],
)
def test_a_url_is_recorded_without_its_secrets(
    provider: TracerProvider, exporter: InMemorySpanExporter, target: bytes, shown: str
) -> None:
    started(Tracing(provider), request(target=target, host=b"gw")).end(OK, None, None)
    assert attributes(exporter)["url.full"] == f"http://gw{shown}"


def test_resends_are_counted_from_the_first_resend(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    tracing = Tracing(provider)
    started(tracing, request(), resend_count=0).end(OK, reply(200), None)
    started(tracing, request(), resend_count=2).end(OK, reply(200), None)
    first, second = exporter.get_finished_spans()
    assert "http.request.resend_count" not in (first.attributes or {})
    assert (second.attributes or {})["http.request.resend_count"] == 2


def test_an_unheard_of_method_does_not_become_a_name(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    started(Tracing(provider), request("BREW")).end(OK, reply(200), None)
    assert one(exporter).name == "HTTP"
    found = attributes(exporter)
    assert (found["http.request.method"], found["http.request.method_original"]) == ("_OTHER", "BREW")


# How it ended

READ_ERROR = UpstreamError(Fault.READ, Sent.MAYBE_SENT, ENDPOINT.url, "secret bytes")


@pytest.mark.parametrize(
    ("outcome", "status", "error", "expected"),
    [
        (Outcome(Cause.OK, status=304), 304, None, None),
        (Outcome(Cause.REQUEST, status=404), 404, None, "404"),
        (Outcome(Cause.BEYOND, status=502), 502, None, "502"),
        (Outcome(Cause.INSTANCE), None, READ_ERROR, "ReadError"),
        (Outcome(Cause.LOCAL), None, OSError("secret"), "OSError"),
        (Outcome(Cause.CANCELLED), None, asyncio.CancelledError(), "cancelled"),
        (Outcome(Cause.GIVEN_UP), None, asyncio.CancelledError(), "given_up"),
        (Outcome(Cause.HEDGE_LOST), None, asyncio.CancelledError(), None),
        # The error is in the body (JSON-RPC): what the classifier made of it.
        (Outcome(Cause.SERVICE, status=200, detail="secret"), 200, None, "service fault"),
        (Outcome(Cause.REQUEST, status=200), 200, None, None),
    ],
)
def test_what_counts_as_an_error(
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    outcome: Outcome,
    status: int | None,
    error: BaseException | None,
    expected: str | None,
) -> None:
    started(Tracing(provider), request()).end(outcome, None if status is None else reply(status), error)
    found = attributes(exporter)
    assert found.get("error.type") == expected
    assert found.get("http.response.status_code") == status
    assert found["pathlb.outcome"] == outcome.cause.value
    span = one(exporter)
    assert (span.status.status_code is StatusCode.ERROR) == (expected is not None)
    assert "secret" not in span.to_json()


# What is sent along


def test_each_attempt_sends_its_own_trace_context(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    tracing = Tracing(provider)
    sent = []
    with provider.get_tracer("caller").start_as_current_span("caller") as caller:
        for resend in range(2):
            attempt = started(tracing, request(), resend_count=resend)
            sent.append(attempt.headers)
            attempt.end(OK, reply(200), None)
    first, second, _ = exporter.get_finished_spans()
    for span, headers in zip((first, second), sent, strict=True):
        assert span.context is not None
        trace_id, span_id = trace.format_trace_id(span.context.trace_id), trace.format_span_id(span.context.span_id)
        assert headers == [(b"traceparent", f"00-{trace_id}-{span_id}-{span.context.trace_flags:02x}".encode())]
        assert span.parent == caller.get_span_context()


def test_an_unsampled_attempt_sends_the_decision_along() -> None:
    attempt = started(Tracing(TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)), request())
    ((name, value),) = attempt.headers
    assert name == b"traceparent"
    assert not int(value[-2:], 16) & TraceFlags.SAMPLED
    attempt.end(OK, reply(200), None)


def test_the_context_around_is_passed_on_without_an_sdk() -> None:
    with remote_parent():
        token = otel_context.attach(baggage.set_baggage("tenant", "7"))
        around = otel_context.get_current()
        attempt = started(Tracing(), request())
        assert otel_context.get_current() == around
        attempt.end(OK, reply(200), None)
        assert otel_context.get_current() == around
        otel_context.detach(token)
    assert attempt.headers == [(b"traceparent", PARENT), (b"baggage", b"tenant=7")]


def test_without_an_sdk_and_a_context_there_is_nothing() -> None:
    assert Tracing().start(request(headers=[(b"traceparent", PARENT)]), ENDPOINT, 0) is None
    assert Tracing(trace.NoOpTracerProvider()).start(request(), ENDPOINT, 0) is None


def test_trace_headers_of_the_request_are_the_parent_where_nobody_made_a_span(
    provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    relayed = request(headers=[(b"Traceparent", PARENT), (b"tracestate", b"a=b")])
    attempt = started(Tracing(provider), relayed)
    attempt.end(OK, reply(200), None)
    span = one(exporter)
    assert span.parent is not None
    assert span.parent.is_remote
    assert span.parent.trace_id == TRACE_ID
    assert dict(attempt.headers)[b"tracestate"] == b"a=b"


def test_trace_headers_of_an_attempt_replace_those_of_the_request() -> None:
    plain = request(headers=[(b"accept", b"*/*"), (b"baggage", b"a=b")])
    assert less_replaced(plain, [(b"traceparent", PARENT)]) is plain

    instrumented = request(headers=[(b"Traceparent", b"old"), (b"accept", b"*/*"), (b"tracestate", b"old")])
    assert less_replaced(instrumented, [(b"traceparent", PARENT)]).headers == [(b"accept", b"*/*")]
    assert len(instrumented.headers) == 3


# How it lives with other instrumentation


def test_while_it_runs_the_span_is_current_and_other_http_instrumentation_is_off(provider: TracerProvider) -> None:
    before = otel_context.get_current()
    attempt = started(Tracing(provider), request())
    assert trace.get_current_span().is_recording()
    assert not is_http_instrumentation_enabled()
    attempt.end(OK, reply(200), None)
    assert otel_context.get_current() == before
    assert is_http_instrumentation_enabled()


@pytest.mark.parametrize("suppress", [suppress_instrumentation, suppress_http_instrumentation])
def test_nothing_where_the_caller_suppressed_instrumentation(
    provider: TracerProvider, exporter: InMemorySpanExporter, suppress: Any
) -> None:
    with remote_parent(), suppress():
        assert Tracing(provider).start(request(), ENDPOINT, 0) is None
        assert Tracing().start(request(), ENDPOINT, 0) is None
    assert exporter.get_finished_spans() == ()


def test_the_plain_suppression_key_counts_too(provider: TracerProvider) -> None:
    token = otel_context.attach(otel_context.set_value("suppress_instrumentation", True))
    assert Tracing(provider).start(request(), ENDPOINT, 0) is None
    otel_context.detach(token)


@pytest.mark.parametrize(
    ("kind", "attribute", "expected"),
    [
        (SpanKind.CLIENT, "http.request.method", SpanKind.INTERNAL),
        (SpanKind.CLIENT, "http.method", SpanKind.INTERNAL),
        (SpanKind.CLIENT, "gen_ai.operation.name", SpanKind.CLIENT),
        (SpanKind.SERVER, "http.request.method", SpanKind.CLIENT),
    ],
)
def test_within_an_http_client_span_attempts_are_internal(
    provider: TracerProvider, exporter: InMemorySpanExporter, kind: SpanKind, attribute: str, expected: SpanKind
) -> None:
    with provider.get_tracer("caller").start_as_current_span("call", kind=kind, attributes={attribute: "x"}):
        started(Tracing(provider), request()).end(OK, reply(200), None)
    assert exporter.get_finished_spans()[0].kind is expected


LATE = """
import warnings; warnings.simplefilter("error")
from opentelemetry import metrics, trace
from pathlb.core.model import Cause, Endpoint, Outcome
from pathlb.exchange import Request
from pathlb.telemetry.metrics import metrics_configured
from pathlb.telemetry.tracing import Tracing

tracing, request, endpoint = Tracing(), Request("GET", b"/", []), Endpoint("http://10.0.0.7")
assert tracing.start(request, endpoint, 0) is None
assert not metrics_configured()

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider())
assert metrics_configured()
for _ in range(2):
    tracing.start(request, endpoint, 0).end(Outcome(Cause.OK, status=200), None, None)
assert [span.name for span in exporter.get_finished_spans()] == ["GET", "GET"]
"""


def test_an_sdk_set_up_after_the_first_attempt_is_taken_up() -> None:
    # The global providers can be set once in a process.
    subprocess.run([sys.executable, "-c", LATE], check=True, timeout=50)

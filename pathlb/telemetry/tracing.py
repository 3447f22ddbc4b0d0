"""OpenTelemetry spans: one per attempt, by the stable HTTP client conventions. Needs the API package only.

What is never recorded: bodies, header values, values in the query string, and the text of exceptions (parsers quote
what they choke on).
"""

from __future__ import annotations

from contextvars import Token
from functools import lru_cache

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter, Setter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, TracerProvider
from opentelemetry.util.types import AttributeValue

from ..core.model import Endpoint, Outcome
from ..exchange import Headers, Reply, Request
from .hook import AttemptSpan
from .semconv import (
    ERROR_TYPE,
    OUTCOME,
    RELAYS,
    REQUEST_RELAYS,
    SCHEMA_URL,
    SCOPE,
    SERVICE,
    STATUS_CODE,
    error_type,
    records,
    version,
)

# There is no public name for these keys: opentelemetry.instrumentation.utils imports them from here under the same
# private ones. Should they move, other people's spans come back; nothing breaks.
_SUPPRESS_HTTP = getattr(otel_context, "_SUPPRESS_HTTP_INSTRUMENTATION_KEY", "suppress_http_instrumentation")
_SUPPRESS_ALL = getattr(otel_context, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
_SUPPRESS_PLAIN = "suppress_instrumentation"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Tracing:
    """An `AttemptHook` that makes each attempt a CLIENT span and sends the trace context along.

    - The span ends at the reply head. Its parent is the caller's current span; if there is none, the trace headers the
      request came with, so that a gateway nobody instrumented continues its caller's trace.
    - While the attempt runs its span is the current one and other HTTP instrumentation is suppressed: the
      instrumentation of httpx patches `AsyncHTTPTransport` too, and would put a second CLIENT span into this one.
    - Within another HTTP CLIENT span, as `HTTPXClientInstrumentor.instrument_client` makes around the whole transport,
      attempts are INTERNAL spans: still visible, without counting the call twice. A CLIENT span that is not an HTTP
      one (a call of a model, of a database) changes nothing.
    - Where the caller suppressed instrumentation there is no span and no header.
    - Without an SDK nothing is recorded; a valid context around the call, such as a remote parent, is still passed on.

    `tracer_provider` is the global one by default, taken up whenever it is set.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._provider = tracer_provider
        self._tracer: Tracer | None = None
        self._idle = True

    def start(self, request: Request, endpoint: Endpoint, resend_count: int) -> AttemptSpan | None:
        tracer = self._tracer or self._find_tracer()
        if self._idle:
            if getattr(trace, "_TRACER_PROVIDER", self) is self._provider and not otel_context.get_current():
                return None  # nobody has set one, and there is nothing around the call to pass on
            # Asking for the global provider is dear while there is none (it looks into the environment each time).
            # A span is cheap then, and tells: without an SDK it has the context of the one around it.
            probe = tracer.start_span("probe").get_span_context()
            if not probe.is_valid:
                return None
            if probe == trace.get_current_span().get_span_context():
                return _relay()
            # An SDK has come since the last attempt. The probe is not ended, so nobody sees it.
            tracer = self._find_tracer()
        around = otel_context.get_current()
        if _suppressed(around):
            return None
        parent = trace.get_current_span(around)
        if not parent.get_span_context().is_valid:
            around = propagate.extract(request.headers, around, _GETTER)
        span = tracer.start_span(
            request.method if request.method in _METHODS else "HTTP",
            around,
            SpanKind.INTERNAL if _is_http_client(parent) else SpanKind.CLIENT,
            _attributes(request, endpoint, resend_count),
        )
        if not span.get_span_context().is_valid:
            return None
        inside = trace.set_span_in_context(span, around)
        headers: Headers = []
        propagate.inject(headers, inside, _SETTER)
        token = otel_context.attach(otel_context.set_value(_SUPPRESS_HTTP, True, inside))
        return _Attempt(span, headers, token)

    def _find_tracer(self) -> Tracer:
        self._tracer = tracer = trace.get_tracer(SCOPE, version(), self._provider, SCHEMA_URL)
        self._idle = not records(tracer)
        return tracer


class _Attempt:
    """A running span, current until its end."""

    __slots__ = ("_span", "_token", "headers")

    def __init__(self, span: Span, headers: Headers, token: Token[Context]) -> None:
        self._span = span
        self._token = token
        self.headers = headers

    def end(self, outcome: Outcome, reply: Reply | None, error: BaseException | None, relays: int = 0) -> None:
        otel_context.detach(self._token)
        span = self._span
        if span.is_recording():
            status = outcome.status if reply is None else reply.status
            found: dict[str, AttributeValue] = {OUTCOME: outcome.cause.value}
            if status is not None:
                found[STATUS_CODE] = status
            if outcome.key is not None:
                found[SERVICE] = outcome.key
            if outcome.relays is not None:
                found[RELAYS] = outcome.relays
                found[REQUEST_RELAYS] = relays
            wrong = error_type(outcome, status, error)
            if wrong is not None:
                found[ERROR_TYPE] = wrong
                span.set_status(StatusCode.ERROR)
            span.set_attributes(found)
        span.end()


class _Relay:
    """Passes a context on without recording anything."""

    __slots__ = ("headers",)

    def __init__(self, headers: Headers) -> None:
        self.headers = headers

    def end(self, outcome: Outcome, reply: Reply | None, error: BaseException | None, relays: int = 0) -> None:
        pass


def _relay() -> _Relay | None:
    around = otel_context.get_current()
    if _suppressed(around):
        return None
    headers: Headers = []
    propagate.inject(headers, around, _SETTER)
    return _Relay(headers)


def _suppressed(context: Context) -> bool:
    return bool(context.get(_SUPPRESS_HTTP) or context.get(_SUPPRESS_ALL) or context.get(_SUPPRESS_PLAIN))


def _is_http_client(span: Span) -> bool:
    """Kind and attributes are the SDK's to show, not the API's; spans that hide them count as something else."""
    if getattr(span, "kind", None) is not SpanKind.CLIENT:
        return False
    attributes = getattr(span, "attributes", None) or ()
    return "http.request.method" in attributes or "http.method" in attributes


def _attributes(request: Request, endpoint: Endpoint, resend_count: int) -> dict[str, AttributeValue]:
    method = request.method
    found: dict[str, AttributeValue] = {"http.request.method": method}
    if method not in _METHODS:
        found["http.request.method"] = "_OTHER"
        found["http.request.method_original"] = method
    if request.host is not None:
        # The gateway by its own name: where the bytes really go is the peer.
        found["server.address"], found["server.port"], origin = _logical(request.host, endpoint.scheme)
    else:
        found["server.address"] = endpoint.host
        found["server.port"] = endpoint.port
        origin = f"{endpoint.scheme}://{endpoint.authority.decode()}{endpoint.base_path.decode()}"
    found["url.full"] = origin + _shown(request.target)
    if endpoint.uds is None:
        found["network.peer.address"] = endpoint.host
        found["network.peer.port"] = endpoint.port
    else:
        found["network.peer.address"] = endpoint.uds
    if resend_count:
        found["http.request.resend_count"] = resend_count
    return found


@lru_cache(maxsize=256)
def _logical(host: bytes, scheme: str) -> tuple[str, int, str]:
    """Address, port and origin that a Host header stands for."""
    shown = host.decode("ascii", "backslashreplace").rpartition("@")[2]
    name, colon, port = shown.rpartition(":")
    if not colon or shown.endswith("]"):
        name, port = shown, ""
    number = int(port) if port.isdigit() and len(port) <= 5 else _DEFAULT_PORTS[scheme]
    return name.strip("[]"), number, f"{scheme}://{shown}"


def _shown(target: bytes) -> str:
    """Path and query fit to be recorded: names of the query stay, values go."""
    if not target.startswith(b"/"):
        # An absolute form may carry credentials; `*` and the like say nothing about a path.
        return ""
    text = target.decode("ascii", "backslashreplace").partition("#")[0]
    path, mark, query = text.partition("?")
    if not query:
        return path + mark
    # An item without `=` may be a value as well as a name (`?<token>`).
    redacted = [f"{item.partition('=')[0]}=REDACTED" if "=" in item else "REDACTED" for item in query.split("&")]
    return f"{path}?{'&'.join(redacted)}"


class _HeaderSetter(Setter[Headers]):
    def set(self, carrier: Headers, key: str, value: str) -> None:
        carrier.append((key.lower().encode("ascii"), value.encode("utf-8")))


class _HeaderGetter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        wanted = key.lower().encode("ascii")
        return [value.decode("latin-1") for name, value in carrier if name.lower() == wanted] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]


_SETTER = _HeaderSetter()
_GETTER = _HeaderGetter()

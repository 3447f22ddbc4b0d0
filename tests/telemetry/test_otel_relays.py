"""What a request cost behind the gateways: relays on the spans, attempts and relays of each request as metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import pathlb
from pathlb import JSONRPC, Limits, Panic, PATHProfile, Retry, RoundRobin
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request
from pathlb.telemetry.metrics import COUNT_BUCKETS, Metrics
from pathlb.testing import Body, Fleet, Mode, ScriptedUpstream, ServiceMode, ServiceTime

pytestmark = pytest.mark.anyio

PROFILE = PATHProfile(services=["eth"], probes=False)
READ = {"jsonrpc": "2.0", "id": 1, "method": "eth_blockNumber", "params": []}
WRITE = {"jsonrpc": "2.0", "id": 2, "method": "eth_sendRawTransaction", "params": ["0x02f8"]}


@pytest.fixture
def spans(
    monkeypatch: pytest.MonkeyPatch, provider: TracerProvider, exporter: InMemorySpanExporter
) -> InMemorySpanExporter:
    """What the SDK as the global one exports, during this test."""
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


class Recorded:
    """The metrics of the clients made with it."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self.provider = MeterProvider([self._reader], shutdown_on_exit=False)

    def client(self, endpoints: Any, **settings: Any) -> pathlb.AsyncClient:
        defaults: dict[str, Any] = {
            "profile": PROFILE,
            "policy": RoundRobin(),
            "retry": Retry(budget_reserve=1_000),
        }
        client = pathlb.AsyncClient(endpoints, timeout=20.0, **defaults | settings)
        client.balancer.subscribe(Metrics(self.provider))
        return client

    def scripted(self, *upstreams: ScriptedUpstream, **settings: Any) -> pathlb.AsyncClient:
        table = {f"http://{name}": upstream for name, upstream in zip("abc", upstreams, strict=False)}
        return self.client(list(table), upstream=ScriptedUpstream.factory(table), **settings)

    def point(self, name: str) -> Any:
        """The only data point of an instrument; None when nothing was recorded."""
        data = self._reader.get_metrics_data()
        if data is None:
            return None
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics]
        points = [point for metric in metrics if metric.name == name for point in metric.data.data_points]
        assert len(points) <= 1
        return points[0] if points else None

    def count_and_sum(self, name: str) -> tuple[int, int]:
        point = self.point(name)
        return (point.count, int(point.sum)) if point is not None else (0, 0)

    @property
    def attempts(self) -> tuple[int, int]:
        """How many requests, and their attempts in all."""
        return self.count_and_sum("pathlb.request.attempts")

    @property
    def relays(self) -> tuple[int, int]:
        """How many requests that told of relays, and these in all."""
        return self.count_and_sum("pathlb.request.relays")


@pytest.fixture
def recorded() -> Iterator[Recorded]:
    recorded = Recorded()
    yield recorded
    recorded.provider.shutdown()


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(3, path=["eth"], service_time=ServiceTime.constant(0)) as fleet:
        yield fleet


def attributes(spans: InMemorySpanExporter) -> list[dict[str, Any]]:
    """Of each attempt, without what other tests are about."""
    about = ("pathlb.relays", "pathlb.request.relays", "pathlb.service", "http.response.status_code")
    return [
        {name: value for name, value in (span.attributes or {}).items() if name in about}
        for span in spans.get_finished_spans()
    ]


def attempt(status: int, relays: int | None = None, so_far: int | None = None, **more: str) -> dict[str, Any]:
    found: dict[str, Any] = {"http.response.status_code": status}
    if relays is not None:
        found |= {"pathlb.relays": relays, "pathlb.request.relays": so_far}
    return found | {f"pathlb.{name}": value for name, value in more.items()}


# Over emulated gateways, on sockets


@pytest.mark.parametrize(
    ("modes", "expected", "relays"),
    [
        ([], [attempt(200, 1, 1)], (1, 1)),
        ([ServiceMode.SUPPLIERS_FAIL], [attempt(500, 2, 2), attempt(200, 1, 3)], (1, 3)),
        ([ServiceMode.SUPPLIERS_FAIL] * 3, [attempt(500, 2, 2), attempt(500, 2, 4)], (1, 4)),
        (
            [ServiceMode.RATE_LIMITED, ServiceMode.SUPPLIERS_FAIL],
            [attempt(429, 2, 2), attempt(500, 2, 4)],
            (1, 4),
        ),
        ([ServiceMode.EMPTY], [attempt(200, 2, 2), attempt(200, 1, 3)], (1, 3)),
        (
            [ServiceMode.NO_SESSION, ServiceMode.NOT_CONFIGURED],
            [attempt(500, 0, 0, service="eth"), attempt(400, 0, 0, service="eth"), attempt(200, 1, 1)],
            (1, 1),
        ),
        (
            [ServiceMode.SUPPLIERS_FAIL, ServiceMode.NO_SESSION],
            [attempt(500, 2, 2), attempt(500, 0, 2, service="eth"), attempt(200, 1, 3)],
            (1, 3),
        ),
        ([ServiceMode.CHAIN_ERROR], [attempt(200, 1, 1)], (1, 1)),
    ],
)
async def test_relays_add_up_over_the_attempts(
    fleet: Fleet,
    spans: InMemorySpanExporter,
    recorded: Recorded,
    modes: list[ServiceMode],
    expected: list[dict[str, Any]],
    relays: tuple[int, int],
) -> None:
    for gateway, mode in zip(fleet, modes, strict=False):
        gateway.set_service("eth", mode)
    async with recorded.client(fleet.urls) as client:
        response = await client.post("/v1", json=READ)
    assert attributes(spans) == expected
    assert recorded.attempts == (1, len(expected))
    assert recorded.relays == relays
    assert relays[1] == sum(gateway.stats().relays for gateway in fleet), "as the gateways counted them"
    attempts = response.extensions["pathlb"]["attempts"]
    assert [one.outcome.relays for one in attempts] == [span.get("pathlb.relays") for span in expected]


async def test_no_session_anywhere_is_no_relay(fleet: Fleet, spans: InMemorySpanExporter, recorded: Recorded) -> None:
    fleet.set_service("eth", ServiceMode.NO_SESSION)
    async with recorded.client(fleet.urls) as client:
        assert (await client.post("/v1", json=WRITE)).status_code == 500
    assert [span["pathlb.request.relays"] for span in attributes(spans)] == [0, 0, 0]
    assert recorded.attempts == (1, 3)
    assert recorded.relays == (0, 0)


async def test_what_comes_from_something_in_between_tells_of_none(
    fleet: Fleet, spans: InMemorySpanExporter, recorded: Recorded
) -> None:
    fleet[0].set_mode(Mode.FAIL, status=502)
    fleet[1].set_mode(Mode.RESET)  # which is after the relay; nobody is told
    async with recorded.client(fleet.urls) as client:
        assert (await client.post("/v1", json=READ)).status_code == 200
    assert attributes(spans) == [attempt(502), {}, attempt(200, 1, 1)]
    assert recorded.attempts == (1, 3)
    assert recorded.relays == (1, 1)


async def test_of_a_batch_as_many_as_it_tells_of(fleet: Fleet, spans: InMemorySpanExporter, recorded: Recorded) -> None:
    """PATH names each supplier once, and none of those it went to again."""
    async with recorded.client(fleet.urls) as client:
        response = await client.post("/v1", json=[READ | {"id": number} for number in range(8)])
    told = len(response.headers["x-suppliers-tried"].split(","))
    assert attributes(spans) == [attempt(200, told, told)]
    assert recorded.relays == (1, told)


async def test_many_requests_are_as_many_values(fleet: Fleet, recorded: Recorded) -> None:
    fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.4)
    async with recorded.client(fleet.urls) as client, anyio.create_task_group() as group:
        for _ in range(60):
            group.start_soon(lambda: client.post("/v1", json=READ))
    requests, attempts = recorded.attempts
    assert requests == 60
    assert 60 <= attempts <= 120
    assert recorded.relays == (60, sum(gateway.stats().relays for gateway in fleet))
    point = recorded.point("pathlb.request.relays")
    assert 1 <= point.min < point.max <= 4
    assert dict(point.attributes) == {}, "services have no bound"


# What the headers say, without a network


def answer(tried: bytes | None, retries: bytes | None = b"0", status: int = 200, body: bytes = b"{}") -> Reply:
    headers: Headers = [(b"Content-Length", b"%d" % len(body))]
    if tried is not None:
        headers.append((b"X-Suppliers-Tried", tried))
    if retries is not None:
        headers.append((b"X-Retry-Count", retries))
    return Reply(status, headers, Body(body))


@pytest.mark.parametrize(
    ("tried", "retries", "relays"),
    [
        (b"pokt1a", b"0", 1),
        (b"pokt1a,pokt1b", b"0", 2),  # a hedge is no retry
        (b"pokt1a,pokt1b", b"1", 2),
        (b"pokt1a", b"1", 2),  # the same one again
        (b"pokt1a,pokt1b", b"3", 4),
        (b",".join(b"pokt1%d" % number for number in range(10)), b"3", 10),  # no more are listed
        (b"pokt1a, pokt1b", b"0", 2),
        (b"", b"0", 0),
        (b"", b"1", 0),  # counted when it begins, and no supplier was found
        (b"pokt1a", None, 1),
        (b"pokt1a", b"many", 1),
        (b"pokt1a", b"-1", 1),
        (b"pokt1a", b"99999999", 1),
        (None, b"1", None),  # not PATH's relay handler
        (None, None, None),
    ],
)
async def test_the_headers(
    spans: InMemorySpanExporter, recorded: Recorded, tried: bytes | None, retries: bytes | None, relays: int | None
) -> None:
    async with recorded.scripted(ScriptedUpstream([answer(tried, retries)])) as client:
        await client.post("/v1", json=READ)
    assert attributes(spans) == [attempt(200, relays, relays)]
    assert recorded.attempts == (1, 1)
    assert recorded.relays == ((1, relays) if relays else (0, 0))


async def test_without_the_profile_the_headers_mean_nothing(spans: InMemorySpanExporter, recorded: Recorded) -> None:
    async with recorded.scripted(ScriptedUpstream([answer(b"pokt1a")]), profile=None) as client:
        await client.post("/v1", json=READ)
    assert attributes(spans) == [attempt(200)]
    assert recorded.attempts == (1, 1)
    assert recorded.relays == (0, 0)


async def test_the_parts_of_a_split_batch_are_requests_of_their_own(recorded: Recorded) -> None:
    def part(request: Request, extra: Headers) -> Reply:
        assert isinstance(request.body, bytes)
        ids = [item["id"] for item in json.loads(request.body)]
        answers = [{"jsonrpc": "2.0", "id": id, "result": "0x1"} for id in ids]
        return answer(b"pokt1a,pokt1b", body=json.dumps(answers).encode())

    upstream = ScriptedUpstream(part)
    async with recorded.scripted(upstream, jsonrpc=JSONRPC(split=2)) as client:
        response = await client.post("/v1", json=[READ | {"id": number} for number in range(4)])
    assert [item["id"] for item in response.json()] == [0, 1, 2, 3]
    assert recorded.attempts == (2, 2)
    assert recorded.relays == (2, 4)


# One value, however it ends


def broken(sent: Sent, fault: Fault) -> ScriptedUpstream:
    return ScriptedUpstream(lambda request, extra: UpstreamError(fault, sent, "http://x", "scripted"))


async def test_a_request_that_fails(recorded: Recorded) -> None:
    dead = broken(Sent.NOT_SENT, Fault.CONNECT)
    lost = broken(Sent.MAYBE_SENT, Fault.READ)
    async with recorded.scripted(dead, lost) as client:
        with pytest.raises(pathlb.PathlbError) as caught:
            await client.post("/v1", json=WRITE)
    assert len(caught.value.attempts) == 2
    assert recorded.attempts == (1, 2)
    assert recorded.relays == (0, 0)


async def test_a_request_that_fails_after_relays(recorded: Recorded) -> None:
    relayed = ScriptedUpstream([answer(b"pokt1a,pokt1b", b"1", 500)])
    async with recorded.scripted(relayed, broken(Sent.MAYBE_SENT, Fault.READ), retry=Retry(attempts=2)) as client:
        with pytest.raises(pathlb.PathlbError):
            await client.post("/v1", json=READ)
    assert recorded.attempts == (1, 2)
    assert recorded.relays == (1, 2)


async def test_a_request_that_comes_to_its_deadline(recorded: Recorded) -> None:
    async def hang(request: Request, extra: Headers) -> Reply:
        await anyio.sleep_forever()
        raise AssertionError

    async with recorded.scripted(ScriptedUpstream(hang), deadline=0.01) as client:
        with pytest.raises(pathlb.DeadlineExceeded):
            await client.post("/v1", json=READ)
    assert recorded.attempts == (1, 1)


async def test_a_request_that_is_refused(recorded: Recorded) -> None:
    upstream = ScriptedUpstream()
    async with recorded.scripted(upstream, panic=Panic(fail_closed=True)) as client:
        client.balancer.drain("http://a")
        with pytest.raises(pathlb.NoEligibleEndpoint):
            await client.post("/v1", json=READ)
    assert upstream.count == 0
    assert recorded.attempts == (1, 0)
    point = recorded.point("pathlb.request.attempts")
    assert point.explicit_bounds == (0.0, *COUNT_BUCKETS)
    assert point.bucket_counts[0] == 1, "told apart from those that had one attempt"


class Held:
    """An upstream that answers when it is let go, and tells when it has been asked."""

    def __init__(self) -> None:
        self.asked, self.let_go = anyio.Event(), anyio.Event()
        self.upstream = ScriptedUpstream(self._answer)

    async def _answer(self, request: Request, extra: Headers) -> Reply:
        self.asked.set()
        await self.let_go.wait()
        return answer(b"pokt1a")


async def test_requests_the_queue_refuses_or_lets_go(recorded: Recorded) -> None:
    held = Held()
    async with recorded.scripted(held.upstream, limits=Limits(concurrency=1, queue=1)) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/v1", json=READ))
            await held.asked.wait()
            with pytest.raises(pathlb.QueueTimeout):
                await client.post("/v1", json=READ, timeout=httpx.Timeout(20.0, pool=0.001))
            assert recorded.attempts == (1, 0)
            with anyio.CancelScope() as cancelled:
                async with anyio.create_task_group() as waiting:
                    waiting.start_soon(lambda: client.post("/v1", json=READ))
                    while not client.balancer.snapshot().queued:
                        await anyio.lowlevel.checkpoint()
                    with pytest.raises(pathlb.QueueFull):
                        await client.post("/v1", json=READ)
                    assert recorded.attempts == (2, 0)
                    cancelled.cancel()
            assert recorded.attempts == (3, 0)
            held.let_go.set()
    assert recorded.attempts == (4, 1)
    assert recorded.relays == (1, 1)


async def test_a_request_that_is_cancelled_after_relays(recorded: Recorded) -> None:
    relayed, held = ScriptedUpstream([answer(b"pokt1a,pokt1b", b"1", 500)]), Held()
    async with recorded.scripted(relayed, held.upstream) as client:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: client.post("/v1", json=READ))
            await held.asked.wait()
            assert recorded.attempts == (0, 0), "not before it has ended"
            group.cancel_scope.cancel()
    assert recorded.attempts[0] == 1
    assert recorded.relays == (1, 2)


async def test_a_request_too_large_is_none(recorded: Recorded) -> None:
    async with recorded.scripted(ScriptedUpstream(), jsonrpc=JSONRPC(max_batch=1)) as client:
        with pytest.raises(pathlb.RequestTooLarge):
            await client.post("/v1", json=[READ, READ])
    assert recorded.attempts == (0, 0)

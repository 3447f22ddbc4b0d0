"""What a service says of its own load, and what the balancer makes of it."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from socket_kit import serving

import pathlb
from pathlb.asgi import LoadReport, load_report
from pathlb.asgi.types import ASGIApp, Message, Receive, Scope, Send
from pathlb.core.load import ReportedLoad
from pathlb.core.snapshot import LoadSnapshot
from pathlb.exchange import Headers, Reply, Request, WholeBody
from pathlb.orca import FIELD, parse, read_load
from pathlb.testing import FakeClock, ScriptedUpstream

SCOPE: Scope = {"type": "http", "headers": []}
OK: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class FakeTime(SimpleNamespace):
    """Stands for the `time` module in `load_report`."""

    now = cpu = 100.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.cpu


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(load_report, "time", clock)
    return clock


async def nothing() -> Message:
    raise AssertionError("nobody asks")


async def told(app: ASGIApp) -> list[bytes]:
    """What the field says, each time it is there."""
    heard: list[Message] = []

    async def send(message: Message) -> None:
        heard.append(message)

    await app(dict(SCOPE), nothing, send)
    return [value for message in heard for name, value in message.get("headers", ()) if name == FIELD]


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await send(OK)
    await send({"type": "http.response.body"})


@pytest.mark.anyio
class TestTheService:
    async def test_it_says_what_is_in_flight(self) -> None:
        go_on, reports = anyio.Event(), []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await go_on.wait()
            await plain(scope, receive, send)

        service = LoadReport(app)

        async def call() -> None:
            reports.extend(await told(service))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            go_on.set()
        assert sorted(reports) == [b"TEXT named_metrics.in_flight=%d" % n for n in (1, 2, 3)]
        assert await told(LoadReport(plain)) == [b"TEXT named_metrics.in_flight=1"]

    async def test_it_says_what_was_measured_over_the_last_second(self, clock: FakeTime) -> None:
        service = LoadReport(plain)
        for _ in range(4):
            assert await told(service) == [b"TEXT named_metrics.in_flight=1"]
        clock.now += 2.0
        clock.cpu += 0.5
        second = [b"TEXT named_metrics.in_flight=1,cpu_utilization=0.250,rps_fractional=2.0"]
        assert await told(service) == second
        clock.now += 0.9
        clock.cpu += 0.9
        assert await told(service) == second
        clock.now += 0.1
        assert await told(service) == [b"TEXT named_metrics.in_flight=1,cpu_utilization=0.900,rps_fractional=2.0"]

    async def test_a_pause_is_not_what_it_measures(self, clock: FakeTime) -> None:
        service = LoadReport(plain)
        await told(service)
        clock.now += 1.0
        assert await told(service) == [b"TEXT named_metrics.in_flight=1,cpu_utilization=0.000,rps_fractional=1.0"]
        clock.now += 3_600.0
        for _ in range(90):
            assert await told(service) == [b"TEXT named_metrics.in_flight=1"]
            clock.now += 0.01
        clock.now += 0.1
        clock.cpu += 0.5
        assert await told(service) == [b"TEXT named_metrics.in_flight=1,cpu_utilization=0.500,rps_fractional=90.0"]

    async def test_it_says_how_much_of_what_it_can_do(self) -> None:
        value = b"TEXT named_metrics.in_flight=1,application_utilization=0.250"
        assert await told(LoadReport(plain, concurrency=4)) == [value]

    async def test_what_failed_is_no_longer_in_flight(self) -> None:
        async def fails(scope: Scope, receive: Receive, send: Send) -> None:
            raise KeyError

        service = LoadReport(fails)
        for _ in range(2):
            with pytest.raises(KeyError):
                await told(service)
        service.app = plain
        assert await told(service) == [b"TEXT named_metrics.in_flight=1"]

    async def test_the_apps_messages_are_its_own(self) -> None:
        await told(LoadReport(plain))
        assert OK["headers"] == [(b"content-length", b"0")]

    async def test_what_the_app_says_itself_goes_before(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({**OK, "headers": [(FIELD, b"TEXT cpu_utilization=0.5")]})

        assert await told(LoadReport(app)) == [b"TEXT cpu_utilization=0.5"]

    async def test_a_response_without_fields(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200})

        assert await told(LoadReport(app)) == [b"TEXT named_metrics.in_flight=1"]

    @pytest.mark.parametrize("kind", ["websocket", "lifespan", "pigeon"])
    async def test_everything_else_passes(self, kind: str) -> None:
        seen: list[Any] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            seen.extend((scope, receive, send))

        scope: Scope = {"type": kind}
        await LoadReport(app)(scope, nothing, _nowhere)
        assert seen == [scope, nothing, _nowhere]

    @pytest.mark.parametrize("concurrency", [0, 1.5, math.nan, "4"])
    async def test_what_cannot_work_is_refused(self, concurrency: Any) -> None:
        with pytest.raises(pathlb.ConfigError, match=r"^LoadReport\.concurrency:"):
            LoadReport(plain, concurrency=concurrency)


class TestTheField:
    @pytest.mark.parametrize(
        ("value", "utilization", "in_flight", "rps"),
        [
            ("TEXT named_metrics.in_flight=12,cpu_utilization=0.310,rps_fractional=120.5", 0.31, 12, 120.5),
            ("TEXT cpu_utilization:0.3,rps_fractional:2", 0.3, None, 2.0),
            ("TEXT cpu_utilization=0.3, application_utilization=0.7", 0.7, None, None),
            ("TEXT cpu_utilization=0.3,application_utilization=0", 0.3, None, None),
            ("TEXT application_utilization=0", 0.0, None, None),
            ("TEXT cpu_utilization=1.5,mem_utilization=0.9,eps=2,named_metrics.kv=0.4,new_metric=x", 1.5, None, None),
            ("TEXT cpu_utilization=nan,rps_fractional=inf,named_metrics.in_flight=3", None, 3, None),
            ("TEXT cpu_utilization=-1,rps_fractional=-0.1,named_metrics.in_flight=3.9", None, 3, None),
            ("TEXT cpu_utilization=101,rps_fractional=1e10,named_metrics.in_flight=1_0,eps=1", None, None, None),
            ('JSON {"cpu_utilization": 0.3, "rps_fractional": 5, "named_metrics": {"in_flight": 12}}', 0.3, 12, 5.0),
            ('JSON {"cpuUtilization": "0.3", "namedMetrics": {"in_flight": 12.0}}', 0.3, 12, None),
            ('JSON {"cpu_utilization": NaN, "rps_fractional": Infinity, "eps": 1}', None, None, None),
            ('JSON {"cpu_utilization": true, "rps_fractional": null, "named_metrics": [1]}', None, None, None),
            ('JSON {"rps_fractional": %s, "cpu_utilization": 0.5}' % ("9" * 500), 0.5, None, None),
            ('JSON {"cpu_utilization": 0.3', None, None, None),
            ('JSON ["cpu_utilization"]', None, None, None),
            ("JSON " + "[" * 4_000, None, None, None),
            ("JSON \xff", None, None, None),
            ("TEXT " + "cpu_utilization=0.3," * 500, None, None, None),
            ("TEXT cpu_utilization", None, None, None),
            ("TEXT", None, None, None),
            ("TEXT ,=,=1", None, None, None),
            ("BIN CQAAAAAAANA/", None, None, None),
            ("cpu_utilization=0.3", None, None, None),
            ("", None, None, None),
        ],
    )
    def test_what_is_believed(
        self, value: str, utilization: float | None, in_flight: int | None, rps: float | None
    ) -> None:
        expected = ReportedLoad(7.0, utilization, in_flight, rps)
        found = parse(value.encode("latin-1"), 7.0)
        assert (found or ReportedLoad(7.0)) == expected
        assert (found is None) == (utilization is in_flight is rps is None)

    @given(st.binary(max_size=200), st.sampled_from([b"TEXT ", b"JSON ", b"TEXT cpu_utilization=", b""]))
    def test_no_bytes_break_it(self, rest: bytes, beginning: bytes) -> None:
        load = parse(beginning + rest, 0.0)
        if load is not None:
            for number in (load.utilization, load.in_flight, load.rps):
                assert number is None or (math.isfinite(number) and number >= 0)

    def test_it_is_found_in_any_spelling(self) -> None:
        headers: Headers = [(b"x-endpoint-load-metric", b"1"), (b"Endpoint-Load-Metrics", b"TEXT cpu_utilization=0.3")]
        assert read_load(headers, 1.0) == ReportedLoad(1.0, 0.3)
        assert read_load([(b"x" * len(FIELD), b"TEXT cpu_utilization=0.3")], 1.0) is None


def saying(*values: bytes | None, status: int = 200) -> ScriptedUpstream:
    """An upstream whose replies report these, and end with the last."""
    left = list(values)

    def answer(request: Request, extra: Headers) -> Reply:
        value = left.pop(0) if len(left) > 1 else left[0]
        return Reply(status, [] if value is None else [(b"Endpoint-Load-Metrics", value)], WholeBody(b"ok"))

    return ScriptedUpstream(answer)


@pytest.mark.anyio
class TestTheBalancer:
    async def test_the_snapshot_says_what_an_endpoint_said_and_when(self) -> None:
        clock = FakeClock()
        upstream = saying(None, b"TEXT cpu_utilization=0.5", b"TEXT cpu_utilization=9", None, b"TEXT nonsense")
        table = {"http://a": upstream}
        async with pathlb.Balancer(list(table), upstream=ScriptedUpstream.factory(table), clock=clock) as balancer:

            async def after(seconds: float) -> LoadSnapshot | None:
                clock.advance(seconds)
                await balancer.send(Request("GET", b"/", []))
                return balancer.snapshot().endpoints[0].reported_load

            assert balancer.snapshot().endpoints[0].reported_load is None
            assert await after(0) is None
            assert await after(1) == LoadSnapshot(0.5, None, None, 0)
            # The next one comes too soon to be looked at; the ones after say nothing new.
            assert await after(0.005) == LoadSnapshot(0.5, None, None, pytest.approx(0.005))
            assert await after(1) == LoadSnapshot(0.5, None, None, pytest.approx(1.005))
            assert await after(1) == LoadSnapshot(0.5, None, None, pytest.approx(2.005))
            shown = balancer.snapshot().to_dict()["endpoints"][0]["reported_load"]
            assert shown == {"utilization": 0.5, "in_flight": None, "rps": None, "age": pytest.approx(2.005)}

    async def test_a_reply_nobody_gets_tells_it_too(self) -> None:
        table = {"http://a": saying(b"TEXT named_metrics.in_flight=900", status=503), "http://b": ScriptedUpstream()}
        factory = ScriptedUpstream.factory(table)
        async with pathlb.Balancer(list(table), upstream=factory, policy=pathlb.RoundRobin()) as balancer:
            for _ in range(2):
                reply = await balancer.send(Request("GET", b"/", []))
                assert reply.status == 200
                await reply.body.aclose()
            loads = {one.url: one.reported_load for one in balancer.snapshot().endpoints}
        told = loads["http://a"]
        assert told is not None
        assert told.in_flight == 900
        assert loads["http://b"] is None


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("kind", ["uvicorn-httptools", "hypercorn"])
@pytest.mark.parametrize("http2", [False, True], ids=["http1", "transport"])
@pytest.mark.anyio
async def test_from_a_real_server_to_the_snapshot(kind: str, http2: bool) -> None:
    async with serving(LoadReport(plain, concurrency=8), kind) as port:
        async with pathlb.AsyncClient([f"http://127.0.0.1:{port}"], http2=http2) as client:
            response = await client.get("/")
            field = response.headers["endpoint-load-metrics"]
            assert re.fullmatch(r"TEXT named_metrics\.in_flight=1,application_utilization=0\.125", field)
            told = client.balancer.snapshot().endpoints[0].reported_load
    assert told is not None
    assert (told.utilization, told.in_flight) == (0.125, 1)


async def _nowhere(message: Message) -> None:
    pass

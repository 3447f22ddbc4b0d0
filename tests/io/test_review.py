"""What a review with fresh eyes found, each one as it was shown to go wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

import pathlb
from pathlb import Balancer, Breaker, Endpoint, Limits, Outlier, Panic, Retry, UpstreamError
from pathlb.core.events import BreakerChanged, Event
from pathlb.core.model import Cause, Sent
from pathlb.errors import Fault
from pathlb.exchange import Headers, Reply, Request
from pathlb.telemetry.tracing import Tracing
from pathlb.testing import Body, FakeClock, ScriptedUpstream

pytestmark = pytest.mark.anyio

A, B = "http://a", "http://b"


def get(**options: Any) -> Request:
    return Request("GET", b"/", [], **options)


async def read(reply: Reply) -> int:
    async for _ in reply.body:
        pass
    await reply.body.aclose()
    return reply.status


class Flaky:
    """Refuses, and after `hang_after` requests hangs."""

    kind = "flaky"

    def __init__(self, hang_after: int) -> None:
        self.requests = 0
        self._hang_after = hang_after

    async def send(self, request: Request, extra_headers: Headers) -> Reply:
        self.requests += 1
        if self.requests > self._hang_after:
            await anyio.sleep_forever()
        raise UpstreamError(Fault.CONNECT, Sent.NOT_SENT, A, "refused")

    async def aclose(self) -> None: ...


async def test_a_probe_that_hangs_past_short_deadlines_costs_no_request() -> None:
    """It is given up while there is time to send it elsewhere, and opens the breaker for longer each time."""
    upstreams = {A: Flaky(hang_after=3), B: ScriptedUpstream()}
    breaker = Breaker(failures=3, open_for=0.01, open_max=0.02, jitter=0)
    opened = 0

    def count(event: Event) -> None:
        nonlocal opened
        opened += isinstance(event, BreakerChanged) and event.after == "open"

    async with Balancer([A, B], breaker=breaker, upstream=lambda one: upstreams[one.url], outlier=None) as balancer:
        balancer.subscribe(count)
        with anyio.fail_after(30):
            while opened < 4:
                assert await read(await balancer.send(get(deadline=0.5))) == 200
        assert balancer.snapshot().in_flight == 0


async def test_an_attempt_that_would_be_the_last_is_not_given_up() -> None:
    going = anyio.Event()

    class Slow:
        kind = "slow"
        failing = False

        async def send(self, request: Request, extra_headers: Headers) -> Reply:
            if self.failing:
                raise UpstreamError(Fault.READ, Sent.MAYBE_SENT, A, "reset")
            self.failing = True
            await going.wait()
            return Reply(200, [], Body(b""))

        async def aclose(self) -> None: ...

    slow = Slow()
    options: dict[str, Any] = {"breaker": Breaker(failures=2), "retry": Retry(attempts=1), "outlier": None}
    async with Balancer(
        [A, B], upstream=lambda one: slow if one.url == A else ScriptedUpstream(), **options
    ) as balancer:
        statuses: list[int] = []

        async def first() -> None:
            statuses.append(await read(await balancer.send(get(pin=A))))

        async with anyio.create_task_group() as group:
            group.start_soon(first)
            await anyio.wait_all_tasks_blocked()
            for _ in range(2):
                with pytest.raises(UpstreamError):
                    await balancer.send(get(pin=A))
            assert balancer.snapshot().endpoints[0].breaker.state == "open"
            going.set()
        assert statuses == [200]


async def test_breaking_reused_connections_is_excused_once() -> None:
    def broken(request: Request, extra: Headers) -> Exception:
        return UpstreamError(Fault.READ, Sent.MAYBE_SENT, A, "reset", reused=True)

    clock = FakeClock()
    async with Balancer([A], upstream=lambda one: ScriptedUpstream(broken), clock=clock) as balancer:
        causes = []
        for pause in (0.0, 0.5, 4.5, 1.0):
            clock.advance(pause)
            with pytest.raises(UpstreamError) as caught:
                await balancer.send(Request("POST", b"/", []))
            causes.append(caught.value.attempts[0].outcome.cause)
    assert causes == [Cause.LOCAL, Cause.LOCAL, Cause.INSTANCE, Cause.INSTANCE]


@pytest.mark.parametrize("when", ["start", "end"])
async def test_telemetry_that_raises_decides_nothing(
    when: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Span:
        def __init__(self) -> None:
            self.headers: Headers = []

        def end(self, *args: object) -> None:
            raise RuntimeError("exporter")

    def start(*args: object) -> Span:
        if when == "start":
            raise RuntimeError("sampler")
        return Span()

    monkeypatch.setattr(Tracing, "start", start)
    async with Balancer([A], upstream=lambda one: ScriptedUpstream()) as balancer:
        with caplog.at_level(logging.ERROR, "pathlb"):
            assert await read(await balancer.send(get())) == 200
        assert balancer.snapshot().in_flight == 0
    assert "span failed" in caplog.text


async def test_a_policy_that_raises_fails_the_request_it_was_asked_for() -> None:
    class Broken:
        name = "broken"
        broken = False

        def pick(self, candidates: Sequence[Any], rng: Any) -> Any:
            if self.broken:
                raise LookupError("bug")
            return candidates[0]

    policy = Broken()
    limits = Limits(concurrency=1)
    async with Balancer([A, B], policy=policy, limits=limits, upstream=lambda one: ScriptedUpstream()) as balancer:
        held = [await balancer.send(get(pin=url)) for url in (A, B)]
        caught: list[Exception] = []

        async def queued() -> None:
            try:
                await balancer.send(get())
            except LookupError as exc:
                caught.append(exc)

        async with anyio.create_task_group() as group:
            group.start_soon(queued)
            await anyio.wait_all_tasks_blocked()
            policy.broken = True
            balancer.undrain(A)  # changes the view: whoever waits is served
            for reply in held:
                await read(reply)
        assert [str(exc) for exc in caught] == ["bug"]
        policy.broken = False
        assert await read(await balancer.send(get())) == 200
        assert balancer.snapshot().in_flight == 0


async def test_closing_after_a_grant_is_an_error_of_ours() -> None:
    balancer = Balancer([A], limits=Limits(concurrency=1), upstream=lambda one: ScriptedUpstream())
    held = await balancer.send(get())
    caught: list[BaseException] = []

    async def queued() -> None:
        try:
            await balancer.send(get())
        except Exception as exc:
            caught.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(queued)
        await anyio.wait_all_tasks_blocked()
        await held.body.aclose()
        await balancer.aclose()
    assert [type(exc) for exc in caught] in ([pathlb.UsageError], [])


async def test_closing_ends_the_wait_for_the_first_round() -> None:
    hanging = Flaky(hang_after=0)
    balancer = Balancer([A], health=pathlb.Health("/health", timeout=60), upstream=lambda one: hanging)
    caught: list[BaseException] = []

    async def early() -> None:
        try:
            await balancer.send(get())
        except pathlb.PathlbError as exc:
            caught.append(exc)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as group:
            group.start_soon(early)
            await anyio.wait_all_tasks_blocked()
            await balancer.aclose()
    assert isinstance(caught[0], pathlb.UsageError)


async def test_a_last_reply_is_returned_rather_than_an_error() -> None:
    def busy(request: Request, extra: Headers) -> Reply:
        return Reply(503, [], Body(b"come back later"))

    options: dict[str, Any] = {"breaker": Breaker(failures=1), "panic": Panic(fail_closed=True), "outlier": Outlier()}
    async with Balancer([A], upstream=lambda one: ScriptedUpstream(busy), **options) as balancer:
        assert await read(await balancer.send(get())) == 503
        with pytest.raises(pathlb.NoEligibleEndpoint):
            await balancer.send(get())


async def test_a_short_discarded_reply_is_read_to_its_end() -> None:
    bodies: list[Body] = []
    ended: list[bool] = []

    class Watched(Body):
        def __aiter__(self) -> Any:
            ended.append(True)
            return super().__aiter__()

    def busy(request: Request, extra: Headers) -> Reply:
        bodies.append(Watched(b"busy"))
        return Reply(503, [(b"content-length", b"4")], bodies[-1])

    upstreams = {A: ScriptedUpstream(busy), B: ScriptedUpstream()}
    async with Balancer([A, B], upstream=lambda one: upstreams[one.url]) as balancer:
        assert await read(await balancer.send(get(avoid=frozenset({B})))) == 200
    assert ended == [True]
    assert bodies[0].closed


def test_a_unix_socket_claims_no_localhost() -> None:
    assert Balancer(["unix:///run/gw.sock"]).bases == {}


def test_what_an_upstream_factory_may_make() -> None:
    import httpx
    import httpx2

    made = {A: httpx.AsyncHTTPTransport(), B: httpx2.AsyncHTTPTransport()}
    balancer = Balancer([A, B], upstream=lambda one: made[one.url])
    assert [one.upstream for one in balancer.snapshot().endpoints] == ["httpx", "httpx2"]
    with pytest.raises(pathlb.ConfigError, match="upstream: must make an Upstream or an async transport, not int"):
        Balancer([Endpoint(A)], upstream=lambda one: 1)

"""A cancel at any await keeps every invariant, leaks nothing, costs no health and loses no wake-up."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from faultkit import PATIENCE, Events, Stack, at_rest, left_in_pools, nothing_left, open_connections, until

import pathlb
from pathlb import Balancer, Breaker, Limits, Retry, SlowStart
from pathlb.core.events import BreakerChanged, Dequeued, Queued
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Reply, Request
from pathlb.testing import Fleet, ScriptedUpstream, ServiceTime

pytestmark = pytest.mark.anyio

A, B = "http://a.test", "http://b.test"


@pytest.fixture(params=["asyncio scope", "asyncio task", "trio scope"])
def cut_by(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def anyio_backend(cut_by: str) -> str:
    return cut_by.split()[0]


class Counted:
    """Awaits a coroutine and calls `then` when it suspends for the `at`-th time."""

    def __init__(self, work: Awaitable[Any], at: int, then: Callable[[], object]) -> None:
        self._work = work
        self._at = at
        self._then = then

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self._work.__await__()
        resume: Callable[[], Any] = partial(inner.send, None)
        for count in itertools.count(1):
            try:
                asked = resume()
            except StopIteration as done:
                return done.value
            if count == self._at:
                self._then()
            try:
                answer = yield asked
            except BaseException as exc:
                resume = partial(inner.throw, exc)
            else:
                resume = partial(inner.send, answer)
        raise AssertionError("unreachable")


async def cut(work: Callable[[], Awaitable[Any]], at: int, by: str) -> bool:
    """Run `work` and cancel it at its `at`-th suspension; answers whether it got that far."""
    reached = False

    def note(cancel: Callable[[], object]) -> Callable[[], None]:
        def then() -> None:
            nonlocal reached
            reached = True
            cancel()

        return then

    with anyio.fail_after(PATIENCE):
        if by == "asyncio task":

            async def run() -> None:
                current = asyncio.current_task()
                assert current is not None
                await Counted(work(), at, note(current.cancel))

            task = asyncio.create_task(run())
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()
        else:
            with anyio.CancelScope() as scope:
                await Counted(work(), at, note(scope.cancel))
    return reached


class Slow:
    """A reply body that suspends before every part and while it closes."""

    def __init__(self, parts: int = 3) -> None:
        self._parts = parts
        self.closing = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self._parts):
            await anyio.lowlevel.checkpoint()
            yield b"part"

    async def aclose(self) -> None:
        self.closing = True
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()


class Upstreams:
    """Scripted endpoints that suspend wherever an upstream may: connecting, waiting, reading, closing."""

    def __init__(self, statuses: dict[str, Callable[[], int]]) -> None:
        self.bodies: list[Slow] = []
        self.made = {url: ScriptedUpstream(self._script(status)) for url, status in statuses.items()}

    def _script(self, status: Callable[[], int]) -> Any:
        async def answer(request: Request, extra_headers: Any) -> Reply | UpstreamError:
            for _ in range(3):
                await anyio.lowlevel.checkpoint()
            if not status():
                return UpstreamError(Fault.CONNECT, Sent.NOT_SENT, A, "refused")
            body = Slow()
            self.bodies.append(body)
            return Reply(status(), [], body)

        return answer

    def client(self, **options: Any) -> pathlb.AsyncClient:
        options.setdefault("outlier", None)
        return pathlb.AsyncClient(list(self.made), upstream=ScriptedUpstream.factory(self.made), **options)


async def whole(balancer: Balancer, *, failed: int = 0) -> None:
    """Nothing of the cancelled request is left in the engine, and nobody was charged."""
    snapshot = await at_rest(balancer)
    for state in balancer._engine.members:
        assert state.waiting == {}
    assert sum(one.counts["failed"] for one in snapshot.endpoints) == failed
    if not failed:
        assert {(one.breaker.state, one.breaker.consecutive_failures) for one in snapshot.endpoints} == {("closed", 0)}


async def every_await(work: Callable[[], Awaitable[Any]], by: str, check: Callable[[], Awaitable[None]]) -> int:
    """Cancel at the first await, the second, ... until it is over before; answers how many there were."""
    for at in itertools.count(1):
        reached = await cut(work, at, by)
        await check()
        if not reached:
            return at - 1
    raise AssertionError("unreachable")


async def test_every_await_of_a_request(cut_by: str) -> None:
    """Connecting, waiting for the head, reading and closing the body."""
    upstreams = Upstreams({A: lambda: 200, B: lambda: 200})
    async with nothing_left():
        async with upstreams.client() as client:

            async def check() -> None:
                await whole(client.balancer)
                assert all(body.closing for body in upstreams.bodies)
                assert (await client.get("/")).content == b"part" * 3

            count = await every_await(lambda: client.get("/"), cut_by, check)
            assert count >= 8


async def test_every_await_of_a_streamed_request(cut_by: str) -> None:
    upstreams = Upstreams({A: lambda: 200, B: lambda: 200})
    async with nothing_left():
        async with upstreams.client() as client:

            async def work() -> None:
                async with client.stream("POST", "/", content=b"x") as response:
                    async for _ in response.aiter_raw():
                        pass

            async def check() -> None:
                await whole(client.balancer)
                assert all(body.closing for body in upstreams.bodies)

            assert await every_await(work, cut_by, check) >= 8


async def test_every_await_of_a_request_that_is_retried(cut_by: str) -> None:
    """The discarded reply is being closed, the wait before the next attempt, that attempt."""
    upstreams = Upstreams({A: lambda: 503})
    retry = Retry(attempts=3, wait_base=0.001, wait_max=0.001, budget_reserve=1e6)
    async with nothing_left():
        async with upstreams.client(retry=retry, breaker=Breaker(failures=10**6, min_requests=10**6)) as client:

            async def check() -> None:
                snapshot = await at_rest(client.balancer)
                assert all(body.closing for body in upstreams.bodies)
                assert snapshot.endpoints[0].counts["failed"] == len(upstreams.bodies)

            # Three attempts of three awaits, two discarded replies of two, two waits, the last body.
            assert await every_await(lambda: client.get("/"), cut_by, check) >= 3 * 3 + 2 * 2 + 1 + 5


async def test_every_await_of_a_request_that_fails_over(cut_by: str) -> None:
    """Cancelled in the first attempt or the second, nobody but the failing endpoint is charged."""
    upstreams = Upstreams({A: lambda: 0, B: lambda: 200})
    async with nothing_left():
        async with upstreams.client(breaker=Breaker(failures=10**6, min_requests=10**6)) as client:

            async def check() -> None:
                snapshot = await at_rest(client.balancer)
                one, other = snapshot.endpoints
                assert other.counts["failed"] == 0
                assert one.counts["ok"] == 0
                assert all(body.closing for body in upstreams.bodies)
                assert (await client.get("/")).status_code == 200

            assert await every_await(lambda: client.get("/"), cut_by, check) >= 8


async def test_in_the_queue(cut_by: str) -> None:
    """Cancelled while it waits: gone from the queue, and those behind it keep their order."""
    upstreams = Upstreams({A: lambda: 200})
    async with nothing_left():
        async with upstreams.client(limits=Limits(concurrency=1)) as client:
            events = Events(client.balancer)
            for at in itertools.count(1):
                holder = await client.send(client.build_request("GET", "/"), stream=True)
                order: list[str] = []

                async def behind(name: str) -> None:
                    await client.get("/")
                    order.append(name)  # noqa: B023

                async def release() -> None:
                    await until(lambda: client.balancer.snapshot().queued >= 2)
                    await holder.aclose()  # noqa: B023

                async with anyio.create_task_group() as group:
                    queued = len(events.of(Queued))
                    group.start_soon(behind, "first")
                    await until(lambda: len(events.of(Queued)) == queued + 1)  # noqa: B023
                    group.start_soon(behind, "second")
                    await until(lambda: len(events.of(Queued)) == queued + 2)  # noqa: B023
                    group.start_soon(release)
                    reached = await cut(lambda: client.get("/"), at, cut_by)
                assert order == ["first", "second"]
                await whole(client.balancer)
                assert all(body.closing for body in upstreams.bodies)
                if not reached:
                    break
            assert at > 8
            assert [one for one in events.of(Dequeued) if one.why == "cancelled"]


@pytest.mark.parametrize("leaving", [False, True], ids=["", "endpoint removed meanwhile"])
async def test_granted_and_cancelled_at_once(cut_by: str, leaving: bool) -> None:
    """The grant comes, and before the task runs it is cancelled: the grant goes to the next in the queue."""
    upstreams = Upstreams({A: lambda: 200, B: lambda: 200})
    async with nothing_left():
        async with upstreams.client(limits=Limits(concurrency=1)) as client:
            events = Events(client.balancer)
            client.balancer.drain(B)
            holder = await client.send(client.build_request("GET", "/"), stream=True)
            results: list[int] = []

            async def get() -> None:
                results.append((await client.get("/")).status_code)

            async with anyio.create_task_group() as group:
                scope = anyio.CancelScope()
                native: list[asyncio.Task[Any]] = []

                async def unlucky() -> None:
                    with scope:
                        await get()

                if cut_by == "asyncio task":
                    native.append(asyncio.create_task(get()))
                else:
                    group.start_soon(unlucky)
                await until(lambda: len(events.of(Queued)) == 1)
                group.start_soon(get)
                await until(lambda: len(events.of(Queued)) == 2)
                granted = len(events.of(Dequeued))

                def race(event: Any) -> None:
                    # From within the release: the grant is made and its task has not run.
                    if isinstance(event, Dequeued) and event.why == "granted" and not results:
                        unsubscribe()
                        scope.cancel()
                        for task in native:
                            task.cancel()
                        if leaving:
                            client.balancer.undrain(B)
                            client.balancer.update([B])

                unsubscribe = client.balancer.subscribe(race)
                await holder.aclose()
            assert len(events.of(Dequeued)) > granted
            assert results == [200]
            for task in native:
                with pytest.raises(asyncio.CancelledError):
                    await task
            await whole(client.balancer)
            if leaving:
                assert list(client.balancer._upstreams) == [B]
                await until(lambda: upstreams.made[A].closed)


async def test_probe_is_not_lost(cut_by: str) -> None:
    """The one half-open probe is cancelled at any await: the next request probes, and closes the breaker."""
    status = 500
    upstreams = Upstreams({A: lambda: status})
    breaker = Breaker(failures=1, open_for=0.001, open_max=0.001, probe_patience=0)
    # Fail closed: in panic the endpoint would be picked without a probe.
    options = {"breaker": breaker, "retry": Retry(attempts=1), "panic": pathlb.Panic(fail_closed=True)}
    async with nothing_left():
        async with upstreams.client(slow_start=SlowStart(window=0), **options) as client:
            events = Events(client.balancer)

            def state() -> str:
                return client.balancer.snapshot().endpoints[0].breaker.state

            for at in itertools.count(1):
                status = 500
                assert (await client.get("/")).status_code == 500
                status = 200
                await until(lambda: state() == "half-open")
                reached = await cut(lambda: client.get("/"), at, cut_by)
                await at_rest(client.balancer)
                # Cancelled before the head it said nothing; after it, it had proved the endpoint.
                assert state() in ("half-open", "closed")
                assert (await client.get("/")).status_code == 200
                assert state() == "closed"
                if not reached:
                    break
            assert at > 8
            whys = {one.why for one in events.of(BreakerChanged)}
            assert "probe said nothing" in whys
            await at_rest(client.balancer)


@pytest.fixture(scope="module")
def fleet() -> Any:
    with Fleet(2, service_time=ServiceTime.constant(0.002)) as running:
        running[0].set_body(b"x" * 300_000)
        running[1].set_body(b"x" * 300_000)
        yield running


@pytest.mark.parametrize("connection", ["new", "reused"])
@pytest.mark.parametrize("body", ["read", "streamed"])
async def test_every_await_of_a_request_on_sockets(
    cut_by: str, stack: Stack, fleet: Fleet, connection: str, body: str
) -> None:
    async with nothing_left():
        for at in itertools.count(1):
            async with stack.client(fleet.urls, connect=5, read=5) as client:
                if connection == "reused":
                    async with anyio.create_task_group() as group:
                        for _ in range(4):
                            group.start_soon(client.get, "/")

                async def work() -> None:
                    if body == "read":
                        await client.get("/")
                        return
                    async with client.stream("GET", "/") as response:
                        async for _ in response.aiter_raw(chunk_size=100_000):
                            pass

                reached = await cut(work, at, cut_by)
                await whole(client.balancer)
                assert open_connections(client) == []
                assert left_in_pools(client) == 0
                response = await client.get("/")
                assert len(response.content) == 300_000
                assert len(response.extensions["pathlb"]["attempts"]) == 1
            if not reached:
                break
        assert at > 2

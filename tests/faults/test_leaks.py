"""Nothing grows: tasks, descriptors, memory, and what the engine knows, over many requests that end in every way."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import sniffio
from faultkit import (
    Stack,
    at_rest,
    descriptors,
    left_in_pools,
    living_tasks,
    nothing_left,
    open_connections,
    pooled,
    until,
)

import pathlb
from pathlb import Limits, Outlier, Retry
from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Fleet, Mode, ScriptedUpstream, ServiceTime
from pathlb.testing.scripted import Body

pytestmark = pytest.mark.anyio

WORKERS = 20


class Footprint(NamedTuple):
    """What must not grow."""

    tasks: int
    descriptors: int
    objects: int
    resident: int
    """Bytes."""

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
        return cls(living_tasks(), descriptors(), len(gc.get_objects()), pages * 4096)


async def one_of_every_kind(client: Any, rng: random.Random, ends: Counter[str]) -> None:
    """One request: read, dropped unread, or cancelled after some suspensions, by a scope or natively."""
    method = rng.choice(["GET", "GET", "GET", "POST"])
    kind = rng.random()

    async def send() -> str:
        try:
            if kind < 0.1:
                await client.send(client.build_request(method, "/"), stream=True)
                return "dropped"
            return str((await client.request(method, "/")).status_code)
        except pathlb.PathlbError as exc:
            return type(exc).__name__

    end = "cancelled"
    if 0.1 <= kind < 0.2:
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:
                group.start_soon(_cancel_soon, scope, rng)
                end = await send()
                group.cancel_scope.cancel()
    elif 0.2 <= kind < 0.3 and sniffio.current_async_library() == "asyncio":
        task = asyncio.create_task(send())
        await _a_while(rng)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            end = task.result()
    else:
        end = await send()
    ends[end] += 1


async def _cancel_soon(scope: anyio.CancelScope, rng: random.Random) -> None:
    await _a_while(rng)
    scope.cancel()


async def _a_while(rng: random.Random) -> None:
    for _ in range(rng.randrange(8)):
        await anyio.lowlevel.checkpoint()


async def load(
    requests: int, one: Callable[[], Awaitable[None]], churn: Callable[[int], None], workers: int = WORKERS
) -> None:
    """`requests` times `one`, by some workers; `churn(n)` before the n-th."""
    left = iter(range(requests))

    async def worker() -> None:
        for number in left:
            churn(number)
            await one()

    async with anyio.create_task_group() as group:
        for _ in range(workers):
            group.start_soon(worker)


@pytest.mark.parametrize(
    "requests",
    [3_000, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])],
)
async def test_in_memory(anyio_backend: str, requests: int) -> None:
    rng = random.Random(1)
    urls = [f"http://gateway-{index}.test" for index in range(12)]
    bodies: Counter[str] = Counter()

    class Counted(Body):
        async def aclose(self) -> None:
            if not self.closed:
                bodies["closed"] += 1
            await super().aclose()

    async def answer(request: Request, extra_headers: Headers) -> Reply | UpstreamError:
        for _ in range(rng.randrange(3)):
            await anyio.lowlevel.checkpoint()
        luck = rng.random()
        if luck < 0.05:
            fault, sent = rng.choice(
                [(Fault.CONNECT, Sent.NOT_SENT), (Fault.READ, Sent.MAYBE_SENT), (Fault.READ_TIMEOUT, Sent.MAYBE_SENT)]
            )
            return UpstreamError(fault, sent, "http://gateway.test", "scripted")
        bodies["opened"] += 1
        status = 200 if luck > 0.15 else rng.choice([404, 429, 500, 503])
        return Reply(status, [(b"retry-after", b"0")] if status == 429 else [], Counted(b"x" * 100))

    made: weakref.WeakSet[ScriptedUpstream] = weakref.WeakSet()

    def make(endpoint: Endpoint) -> ScriptedUpstream:
        upstream = ScriptedUpstream(answer)
        made.add(upstream)
        return upstream

    ends: Counter[str] = Counter()
    settings = {"limits": Limits(concurrency=3, queue=10, queue_timeout=0.5), "retry": Retry(wait_max=0.025)}
    async with nothing_left():
        async with pathlb.AsyncClient(urls[:6], upstream=make, **settings) as client:
            balancer = client.balancer

            def churn(number: int) -> None:
                if number % 50 == 0:
                    balancer.update(rng.sample(urls, rng.randrange(1, 8)))
                elif number % 50 == 25:
                    url = rng.choice(balancer.snapshot().endpoints).url
                    if url in {state.url for state in balancer._engine.members}:
                        balancer.drain(url)
                        balancer.undrain(url)

            def forgotten() -> bool:
                gc.collect()
                return {id(one) for one in made} == {id(one) for one in balancer._upstreams.values()}

            async def rest() -> Footprint:
                gc.collect()
                await until(lambda: not balancer.snapshot().in_flight and not balancer._ticking)
                await until(lambda: bodies["opened"] == bodies["closed"])
                balancer.update(urls[:6])
                snapshot = balancer.snapshot()
                assert [one.url for one in snapshot.endpoints] == urls[:6]
                assert snapshot.queued == 0
                assert set(balancer._upstreams) == set(urls[:6])
                assert not balancer._ends._dropped
                assert all(not state.waiting for state in balancer._engine.members)
                for upstream in made:
                    upstream.calls.clear()
                del upstream  # one that left may be the last
                # Those of endpoints that left were closed and forgotten.
                await until(forgotten)
                return Footprint.now()

            await load(requests // 5, lambda: one_of_every_kind(client, rng, ends), churn)
            before = await rest()
            await load(requests - requests // 5, lambda: one_of_every_kind(client, rng, ends), churn)
            after = await rest()

            assert sum(ends.values()) == requests, ends
            assert min(ends[one] for one in ("200", "404", "dropped", "cancelled")) > requests // 500, ends
            assert after.tasks <= before.tasks
            assert after.descriptors <= before.descriptors
            # Windows of recent outcomes fill up; what leaks per request would be thousands.
            assert after.objects - before.objects < 2_000 + requests // 100, (before, after)
            assert after.resident - before.resident < 16_000_000, (before, after)


@pytest.mark.soak
async def test_on_sockets(stack: Stack) -> None:
    """The same over a fleet whose gateways fail, reset, throttle and hang in turn; the connections are counted too."""
    requests = 1_500
    rng = random.Random(2)
    modes = [Mode.OK, Mode.OK, Mode.FAIL, Mode.RESET, Mode.THROTTLE, Mode.HANG]
    ends: Counter[str] = Counter()
    with Fleet(4, service_time=ServiceTime.exponential(0.002)) as fleet:
        urls = fleet.urls
        start = descriptors()
        async with nothing_left():
            settings = {"outlier": Outlier(overdue_floor=0.1), "retry": Retry(wait_max=0.025, budget_reserve=100)}
            async with stack.client(urls, read=0.3, deadline=2.0, **settings) as client:
                balancer = client.balancer

                def churn(number: int) -> None:
                    if number % 25 == 0:
                        fleet[rng.randrange(1, 4)].set_mode(rng.choice(modes))
                    if number % 40 == 0:
                        balancer.update([urls[0], *rng.sample(urls[1:], rng.randrange(0, 4))])

                async def rest() -> Footprint:
                    for gateway in fleet:
                        gateway.restore()
                    gc.collect()
                    balancer.update(urls)
                    await until(lambda: not balancer.snapshot().in_flight and not balancer._ticking)
                    # Dropped replies are closed in the background.
                    await until(lambda: open_connections(client) == [])
                    await until(lambda: left_in_pools(client) == 0)
                    assert set(balancer._upstreams) == set(urls)
                    assert not balancer._ends._dropped
                    # No connection is open at a gateway that no pool knows of.
                    await until(lambda: sum(gateway.stats().open_connections for gateway in fleet) <= pooled(client))
                    assert descriptors() <= start + 2 * pooled(client)
                    return Footprint.now()

                await load(requests // 3, lambda: one_of_every_kind(client, rng, ends), churn, workers=10)
                before = await rest()
                await load(requests - requests // 3, lambda: one_of_every_kind(client, rng, ends), churn, workers=10)
                after = await rest()
                assert sum(ends.values()) == requests, ends
                assert min(ends[one] for one in ("200", "dropped", "cancelled")) > requests // 100, ends
                assert after.tasks <= before.tasks
                assert after.resident - before.resident < 16_000_000, (before, after)
                await at_rest(balancer)
            await until(lambda: sum(gateway.stats().open_connections for gateway in fleet) == 0)
            await until(lambda: descriptors() <= start)

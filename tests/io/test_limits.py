"""Requests in flight per endpoint, and the one queue in front of them."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from io_helpers import LARGE_BODY, Held, Stack, scripted, until

import pathlb
from pathlb import Limits
from pathlb.core.events import Dequeued, Queued, QueueOverflow
from pathlb.testing import Fleet

pytestmark = pytest.mark.anyio


async def test_beyond_the_limit_requests_wait_in_order(stack: Stack) -> None:
    held = Held()
    async with scripted(held.upstream, limits=Limits(concurrency=2, queue=10)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            for number in range(6):
                group.start_soon(client.get, f"/{number}")
                await anyio.wait_all_tasks_blocked()
            assert held.targets == [b"/0", b"/1"]
            snapshot = balancer.snapshot()
            assert (snapshot.in_flight, snapshot.queued) == (2, 4)
            for done in range(1, 5):
                held.let_go()
                await until(lambda done=done: len(held.targets) == done + 2)
            assert held.targets == [b"/0", b"/1", b"/2", b"/3", b"/4", b"/5"]
            held.let_go(2)
        assert balancer.snapshot().in_flight == 0


async def test_the_limit_holds_until_the_body_is_closed(stack: Stack, fleet: Fleet) -> None:
    fleet[0].set_body(LARGE_BODY)
    async with stack.pathlb.AsyncClient(fleet.urls[:1], limits=Limits(concurrency=1, queue=0)) as client:
        async with client.stream("GET", "/") as response:
            assert response.status_code == 200
            with pytest.raises(pathlb.QueueFull):
                await client.get("/")
        assert (await client.get("/")).status_code == 200


async def test_a_full_queue_fails_at_once(stack: Stack) -> None:
    held = Held()
    told: list[Any] = []
    async with scripted(held.upstream, limits=Limits(concurrency=1, queue=1)) as balancer:
        balancer.subscribe(told.append)
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            group.start_soon(client.get, "/0")
            group.start_soon(client.get, "/1")
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(pathlb.QueueFull, match="1 requests are waiting already") as caught:
                await client.get("/2")
            assert isinstance(caught.value, stack.http.PoolTimeout)
            assert caught.value.attempts == ()
            assert caught.value.request.url.path == "/2"
            held.let_go(2)
    assert sorted(held.targets) == [b"/0", b"/1"]
    kinds = [type(event) for event in told if isinstance(event, Queued | Dequeued | QueueOverflow)]
    assert kinds == [Queued, QueueOverflow, Dequeued]


@pytest.mark.parametrize("how", ["setting", "pool timeout"])
async def test_waiting_longer_than_allowed(stack: Stack, how: str) -> None:
    held = Held()
    limits = Limits(concurrency=1, queue_timeout=0.01 if how == "setting" else 60)
    timeout = stack.http.Timeout(60, pool=None if how == "setting" else 0.01)
    async with scripted(held.upstream, limits=limits) as balancer:
        async with stack.pathlb.AsyncClient(balancer, timeout=timeout) as client, anyio.create_task_group() as group:
            group.start_soon(client.get, "/0")
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(pathlb.QueueTimeout, match=r"waited 0\.01 s in the queue") as caught:
                await client.get("/1")
            assert isinstance(caught.value, stack.http.PoolTimeout)
            assert balancer.snapshot().queued == 0
            held.let_go()
    assert held.targets == [b"/0"]


async def test_the_deadline_counts_in_the_queue(stack: Stack) -> None:
    held = Held()
    async with scripted(held.upstream, limits=Limits(concurrency=1, queue_timeout=60), deadline=0.02) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            group.start_soon(lambda: client.get("/0", extensions={"pathlb": {"deadline": 60}}))
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(pathlb.DeadlineExceeded, match="in the queue") as caught:
                await client.get("/1")
            assert isinstance(caught.value, stack.http.TimeoutException)
            assert caught.value.attempts == ()
            held.let_go()


async def test_who_leaves_the_queue_gives_up_its_place(stack: Stack) -> None:
    held = Held()
    told: list[str] = []
    async with scripted(held.upstream, limits=Limits(concurrency=1, queue=2)) as balancer:
        balancer.subscribe(lambda event: told.append(event.why) if isinstance(event, Dequeued) else None)
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            group.start_soon(client.get, "/0")
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(0.01) as scope:
                await client.get("/cancelled")
            assert scope.cancelled_caught
            assert balancer.snapshot().queued == 0
            for number in (1, 2):
                group.start_soon(client.get, f"/{number}")
            await anyio.wait_all_tasks_blocked()
            held.let_go(3)
        assert balancer.snapshot().in_flight == 0
    assert sorted(held.targets) == [b"/0", b"/1", b"/2"]
    assert told == ["cancelled", "granted", "granted"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_granted_and_cancelled_at_once_goes_to_the_next(anyio_backend: str) -> None:
    """The grant and the cancellation meet in the same turn of the loop: the place must not be lost."""
    held = Held()
    async with scripted(held.upstream, limits=Limits(concurrency=1, queue=2)) as balancer:
        async with pathlb.AsyncClient(balancer) as client:
            tasks = []
            for number in range(3):
                tasks.append(asyncio.create_task(client.get(f"/{number}")))
                await anyio.wait_all_tasks_blocked()

            def cancel_when_granted(event: Any) -> None:
                if isinstance(event, Dequeued) and event.why == "granted":
                    tasks[1].cancel()

            unsubscribe = balancer.subscribe(cancel_when_granted)
            held.let_go()
            await until(lambda: b"/2" in held.targets)
            unsubscribe()
            held.let_go()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        snapshot = balancer.snapshot()
    assert isinstance(results[1], asyncio.CancelledError)
    assert (snapshot.in_flight, snapshot.queued) == (0, 0)
    assert held.targets == [b"/0", b"/2"]
    assert snapshot.endpoints[0].counts["ignored"] == 1


async def test_one_queue_for_all_endpoints(stack: Stack) -> None:
    first, second = Held(), Held()
    async with scripted(first.upstream, second.upstream, limits=Limits(concurrency=1, queue=1)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(client.get, "/")
            await anyio.wait_all_tasks_blocked()
            assert (len(first.targets), len(second.targets)) == (1, 1)
            with pytest.raises(pathlb.QueueFull):
                await client.get("/")
            second.let_go()
            await until(lambda: len(second.targets) == 2)
            first.let_go()
            second.let_go()


async def test_a_request_pinned_to_a_full_endpoint_holds_nobody_up(stack: Stack) -> None:
    first, second = Held(), Held()
    async with scripted(first.upstream, second.upstream, limits=Limits(concurrency=1)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
            pinned = {"pathlb": {"pin": "http://a"}}
            for number in range(2):
                group.start_soon(lambda number=number: client.get(f"/pinned{number}", extensions=pinned))
                await anyio.wait_all_tasks_blocked()
            group.start_soon(client.get, "/any")
            await until(lambda: second.targets == [b"/any"])
            assert first.targets == [b"/pinned0"]
            second.let_go()
            first.let_go(2)


async def test_a_queued_request_goes_to_an_endpoint_that_joins(stack: Stack, fleet: Fleet) -> None:
    fleet[0].set_body(LARGE_BODY)
    async with stack.pathlb.AsyncClient(fleet.urls[:1], limits=Limits(concurrency=1, queue_timeout=30)) as client:
        async with client.stream("GET", "/"), anyio.create_task_group() as group:
            group.start_soon(client.get, "/waits")
            await anyio.wait_all_tasks_blocked()
            assert client.balancer.snapshot().queued == 1
            client.balancer.update(fleet.urls[:2])
    assert [one.target for one in fleet[1].received()] == [b"/waits"]


async def test_closing_tells_those_who_wait(stack: Stack) -> None:
    held = Held()
    balancer = scripted(held.upstream, limits=Limits(concurrency=1))
    failures: list[Exception] = []
    client = stack.http.AsyncClient(transport=stack.pathlb.BalancedTransport(balancer), base_url="http://gw")

    async def get() -> None:
        try:
            await client.get("/")
        except stack.http.HTTPError as exc:
            failures.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(get)
        await anyio.wait_all_tasks_blocked()
        group.start_soon(get)
        await anyio.wait_all_tasks_blocked()
        await balancer.aclose()
        await until(lambda: failures)
        assert isinstance(failures[0], pathlb.UsageError)
        assert "closed while the request waited" in str(failures[0])
        held.let_go()
    await client.aclose()


def test_presets_are_the_original_plans() -> None:
    assert (Limits.modest().concurrency, Limits.modest().queue) == (100, 1_000)
    assert (Limits.generous().concurrency, Limits.generous().queue) == (500, 5_000)
    assert (Limits().concurrency, Limits().queue) == (1_000, 5_000)


async def test_the_upstreams_own_pools_never_queue(stack: Stack) -> None:
    """httpx's default of 100 connections would be a hidden queue."""
    with Fleet(1) as fleet:
        fleet[0].set_mode(pathlb.testing.Mode.HANG)
        async with stack.pathlb.AsyncClient(fleet.urls, outlier=None) as client, anyio.create_task_group() as group:
            for _ in range(150):
                group.start_soon(client.get, "/")
            await until(lambda: fleet[0].stats().in_flight == 150)
            group.cancel_scope.cancel()
        assert client.balancer.snapshot().in_flight == 0

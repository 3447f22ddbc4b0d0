"""An endpoint that hangs: what waits there is given up and sent elsewhere, and nothing is lost."""

from __future__ import annotations

from collections import Counter

import anyio
import pytest
from faultkit import PATIENCE, Events, Stack, at_rest, nothing_left, open_connections, request_id, until

import pathlb
from pathlb import Outlier, SlowStart
from pathlb.core.events import Ejected, GivenUp, Observed, Returned
from pathlb.core.model import Cause
from pathlb.testing import Fleet, Mode, ServiceTime

pytestmark = pytest.mark.anyio


async def test_hanging_endpoint_under_steady_load(stack: Stack) -> None:
    with Fleet(3, service_time=ServiceTime.constant(0.005)) as fleet:
        hanging = fleet.urls[1]
        outlier = Outlier(overdue_floor=0.2)
        async with nothing_left():
            async with stack.client(fleet.urls, read=PATIENCE, deadline=PATIENCE, outlier=outlier) as client:
                events = Events(client.balancer)
                results: Counter[int] = Counter()
                ids: list[bytes] = []
                stop = False

                async def worker() -> None:
                    while not stop:
                        ids.append(request_id().encode())
                        response = await client.get("/", headers={"X-Request-Id": ids[-1].decode()})
                        results[response.status_code] += 1
                        await anyio.sleep(0.005)

                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for _ in range(8):
                            group.start_soon(worker)
                        await until(lambda: results[200] >= 100)
                        fleet[1].set_mode(Mode.HANG)
                        await until(lambda: bool(events.of(Ejected)))
                        after = results[200]
                        await until(lambda: results[200] >= after + 100)
                        stop = True
                assert set(results) == {200}
                assert {(one.endpoint, one.signal) for one in events.of(Ejected)} == {(hanging, "stall")}
                given_up = events.of(GivenUp)
                assert {one.endpoint for one in given_up} == {hanging}
                causes = Counter(one.outcome.cause for one in events.of(Observed, endpoint=hanging))
                assert causes[Cause.GIVEN_UP] == sum(one.attempts for one in given_up) > 0
                assert causes[Cause.INSTANCE] == 0
                # Each one given up was sent once more, and nothing else was.
                seen = fleet.seen()
                assert len(ids) == sum(results.values())
                assert sum(seen[one] - 1 for one in ids) == causes[Cause.GIVEN_UP]
                await at_rest(client.balancer)
                assert open_connections(client) == []


async def test_posts_that_hang_are_not_sent_again(stack: Stack) -> None:
    """They end with their own read timeout; the GETs beside them have long been answered elsewhere."""
    with Fleet(3, service_time=ServiceTime.constant(0)) as fleet:
        outlier = Outlier(overdue_floor=0.1, overdue_factor=1)
        async with nothing_left():
            async with stack.client(fleet.urls, read=1.0, outlier=outlier, prefer=fleet.urls[0]) as client:
                events = Events(client.balancer)
                ends: Counter[str] = Counter()

                async def send(method: str, key: str) -> None:
                    try:
                        response = await client.request(method, "/", headers={"X-Request-Id": key})
                        ends[f"{method} {response.status_code}"] += 1
                    except stack.lib.ReadTimeout as exc:
                        ends[f"{method} ReadTimeout after {len(exc.attempts)}"] += 1

                for _ in range(20):
                    await client.get("/", extensions={"pathlb": {"avoid": fleet.urls[:1]}})
                fleet[0].set_mode(Mode.HANG)
                keys = [request_id() for _ in range(10)]
                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for index, key in enumerate(keys):
                            group.start_soon(send, "POST" if index % 2 else "GET", key)
                        await until(lambda: fleet[0].stats().in_flight == 10)
                        while not ends:
                            await client.get("/", extensions={"pathlb": {"avoid": fleet.urls[:1]}})
                            await anyio.sleep(0.01)
                        assert set(ends) == {"GET 200"}
                assert ends == {"GET 200": 5, "POST ReadTimeout after 1": 5}
                seen = fleet.seen()
                assert [seen[key.encode()] for key in keys] == [2, 1] * 5
                assert events.of(Ejected)
                await at_rest(client.balancer)


async def test_all_hang(stack: Stack) -> None:
    """Nobody is an outlier among the dead: every request ends with the deadline."""
    with Fleet(3) as fleet:
        for gateway in fleet:
            gateway.set_mode(Mode.HANG)
        async with nothing_left():
            async with stack.client(fleet.urls, read=PATIENCE, deadline=0.5) as client:
                events = Events(client.balancer)
                errors: list[Exception] = []

                async def get() -> None:
                    try:
                        await client.get("/")
                    except stack.lib.TimeoutException as exc:
                        errors.append(exc)

                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for _ in range(10):
                            group.start_soon(get)
                assert len(errors) == 10
                assert {type(error).__name__ for error in errors} == {"DeadlineExceeded"}
                assert all(isinstance(error, pathlb.DeadlineExceeded) and error.attempts for error in errors)
                assert events.of(Ejected) == []
                await at_rest(client.balancer)
                assert open_connections(client) == []


async def test_hanging_endpoint_comes_back(stack: Stack) -> None:
    with Fleet(2, service_time=ServiceTime.constant(0)) as fleet:
        settings = {"outlier": Outlier(overdue_floor=0.1, overdue_factor=1, eject_for=0.3), "slow_start": SlowStart(0)}
        async with nothing_left():
            async with stack.client(fleet.urls, read=5.0, **settings) as client:
                events = Events(client.balancer)
                failures: list[Exception] = []
                stop = False

                async def worker() -> None:
                    while not stop:
                        try:
                            await client.get("/")
                        except Exception as exc:
                            failures.append(exc)
                        await anyio.sleep(0.005)

                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for _ in range(4):
                            group.start_soon(worker)
                        await until(lambda: fleet[0].stats().requests >= 20)
                        fleet[0].set_mode(Mode.HANG)
                        await until(lambda: bool(events.of(Ejected)))
                        fleet[0].restore()
                        await until(lambda: bool(events.of(Returned)))
                        before = fleet[0].stats().requests
                        await until(lambda: fleet[0].stats().requests > before + 5)
                        stop = True
                assert failures == []
                assert {one.endpoint for one in events.of(Ejected)} == {fleet.urls[0]}
                await at_rest(client.balancer)

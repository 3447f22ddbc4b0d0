"""`deadline_scope`: what calls made within must keep to, whoever makes them."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from io_helpers import Held, Stack, by_url, reply, scripted, until

import pathlb
from pathlb import deadline
from pathlb.deadline import BOUND, Bound, deadline_scope
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import ScriptedUpstream

pytestmark = pytest.mark.anyio

FREE = {"pathlb": {"deadline": 5}}


class Frozen:
    """Stands for the `time` module in `pathlb.deadline`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> Frozen:
    clock = Frozen()
    monkeypatch.setattr(deadline, "time", clock)
    return clock


def given(upstream: ScriptedUpstream) -> list[float | None]:
    """The deadlines the requests came with, in seconds."""
    return [request.deadline for request, _ in upstream.calls]


class TestTheScope:
    async def test_a_call_within_has_the_time_that_is_left(self, stack: Stack, frozen: Frozen) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            await client.get("/")
            with deadline_scope(10):
                await client.get("/")
                frozen.now += 3
                await client.get("/")
            await client.get("/")
        assert given(upstream) == [None, 10, 7, None]

    async def test_it_ends_the_call(self, stack: Stack, frozen: Frozen) -> None:
        held = Held()
        async with scripted(held.upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            with deadline_scope(0.02):
                with pytest.raises(pathlb.DeadlineExceeded) as caught:
                    await client.get("/")
                assert isinstance(caught.value, stack.http.TimeoutException)
                assert len(caught.value.attempts) == 1
                frozen.now += 1
                with pytest.raises(pathlb.DeadlineExceeded, match="has passed; nothing was sent"):
                    await client.get("/")
            assert held.upstream.count == 1
            assert balancer.snapshot().in_flight == 0

    async def test_the_shortest_counts(self, stack: Stack, frozen: Frozen) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream, deadline=7) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            with deadline_scope(6):
                with deadline_scope(20):
                    await client.get("/")
                with deadline_scope(4):
                    await client.get("/", extensions=FREE)
                await client.get("/", extensions=FREE)
            with deadline_scope(8):
                await client.get("/", extensions=FREE)
                await client.get("/")
        assert given(upstream) == [6, 4, 5, 5, None], "the balancer's own is shorter than the last"

    async def test_none_sets_free(self, stack: Stack) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            with deadline_scope(0):
                with deadline_scope(None):
                    await client.get("/")
                with pytest.raises(pathlb.DeadlineExceeded):
                    await client.get("/")
        assert given(upstream) == [None]

    async def test_tasks_started_within_keep_to_it(self) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream) as balancer, anyio.create_task_group() as group:
            with deadline_scope(10):
                group.start_soon(balancer.send, Request("GET", b"/", []))
            await until(lambda: upstream.count)
        (seconds,) = given(upstream)
        assert seconds is not None

    async def test_it_ends_with_the_block_however_that_ends(self) -> None:
        seen: list[Bound | None] = []

        def fails() -> None:
            with deadline_scope(1):
                seen.append(BOUND.get())
                raise KeyError

        with pytest.raises(KeyError):
            fails()
        assert seen != [None]
        assert BOUND.get() is None

    async def test_the_callers_request_is_left_alone(self) -> None:
        request = Request("GET", b"/", [])
        async with scripted(ScriptedUpstream()) as balancer:
            with deadline_scope(10):
                await balancer.send(request)
        assert request.deadline is None

    async def test_a_batch_in_parts_keeps_to_it(self) -> None:
        def answer(request: Request, _: Headers) -> Reply:
            assert isinstance(request.body, bytes)
            answers = [{"jsonrpc": "2.0", "id": call["id"], "result": "0x1"} for call in json.loads(request.body)]
            return reply(body=json.dumps(answers).encode())

        upstream = ScriptedUpstream(answer)
        calls = [{"jsonrpc": "2.0", "id": n, "method": "eth_blockNumber", "params": []} for n in range(4)]
        async with scripted(upstream, jsonrpc=pathlb.JSONRPC(split=2)) as balancer:
            with deadline_scope(10):
                await balancer.send(Request("POST", b"/", [], json.dumps(calls).encode()))
        assert upstream.count == 2
        assert all(seconds is not None and seconds < 10 for seconds in given(upstream))

    @pytest.mark.parametrize("seconds", [-1, math.nan, "2", True])
    async def test_bad_seconds(self, seconds: Any) -> None:
        with pytest.raises(pathlb.ConfigError, match=r"deadline_scope\.seconds"):
            deadline_scope(seconds)

    async def test_a_body_may_take_longer(self, frozen: Frozen) -> None:
        async with scripted(ScriptedUpstream()) as balancer:
            with deadline_scope(5):
                found = await balancer.send(Request("GET", b"/", []))
                frozen.now += 6
                assert [part async for part in found.body] == [b"ok"]
                await found.body.aclose()


class TestTheCallerLeaves:
    """`Bound.cancel`, which the middleware calls."""

    async def test_calls_under_way_end_and_later_ones_do_not_begin(self, stack: Stack) -> None:
        held, bound = Held(), Bound()
        ended: list[pathlb.DeadlineExceeded] = []
        async with scripted(held.upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:

            async def call() -> None:
                with pytest.raises(pathlb.DeadlineExceeded) as caught:
                    await client.get("/")
                ended.append(caught.value)

            BOUND.set(bound)
            async with anyio.create_task_group() as group:
                for _ in range(3):
                    group.start_soon(call)
                await until(lambda: len(held.targets) == 3)
                bound.cancel()
            assert [error.message for error in ended] == ["the caller it was for has left; the call was cancelled"] * 3
            with pytest.raises(pathlb.DeadlineExceeded, match="has left; nothing was sent"):
                await client.get("/")
            with deadline_scope(5), pytest.raises(pathlb.DeadlineExceeded, match="has left"):
                await client.get("/")
            counts = by_url(balancer)["http://a"].counts
            assert (counts["picks"], counts["ignored"], counts["released"]) == (3, 3, 3), "nobody is to blame"
            bound.lift()
            held.let_go()
            assert (await client.get("/")).status_code == 200

    async def test_one_that_waits_in_the_queue_leaves_it(self) -> None:
        held, bound = Held(), Bound()
        async with scripted(held.upstream, limits=pathlb.Limits(concurrency=1)) as balancer:
            async with anyio.create_task_group() as group:
                group.start_soon(balancer.send, Request("GET", b"/first", []))
                await until(lambda: held.targets)

                async def call() -> None:
                    BOUND.set(bound)
                    with deadline_scope(10), pytest.raises(pathlb.DeadlineExceeded, match="has left"):
                        await balancer.send(Request("GET", b"/second", []))

                group.start_soon(call)
                await until(lambda: balancer.snapshot().queued)
                bound.cancel()
                await until(lambda: not balancer.snapshot().queued)
                held.let_go()
        assert held.targets == [b"/first"]

    async def test_a_reply_that_still_comes_is_cut_off(self, stack: Stack) -> None:
        parts, bound = Parts(), Bound()
        async with scripted(parts.upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            BOUND.set(bound)
            async with client.stream("GET", "/") as response, anyio.create_task_group() as group:
                body = response.aiter_raw()
                assert await anext(body) == b"first"

                async def leave() -> None:
                    await until(lambda: parts.waiting)
                    bound.cancel()

                group.start_soon(leave)
                with pytest.raises(stack.http.ReadError, match="has left"):
                    await anext(body)
            assert parts.closed
            snapshot = by_url(balancer)["http://a"]
            assert (snapshot.in_flight, snapshot.counts["broken"]) == (0, 0), "the endpoint is not to blame"

    async def test_the_rest_of_a_reply_is_not_read(self) -> None:
        parts, bound = Parts(), Bound()
        async with scripted(parts.upstream) as balancer:
            BOUND.set(bound)
            found = await balancer.send(Request("GET", b"/", []))
            bound.cancel()
            with pytest.raises(pathlb.UpstreamError, match="has left"):
                await anext(aiter(found.body))
            await found.body.aclose()
            assert parts.closed

    async def test_cancelling_the_task_is_still_that(self) -> None:
        held = Held()
        async with scripted(held.upstream) as balancer, anyio.create_task_group() as group:
            BOUND.set(Bound())
            with anyio.CancelScope() as scope:

                async def leave() -> None:
                    await until(lambda: held.targets)
                    scope.cancel()

                group.start_soon(leave)
                await balancer.send(Request("GET", b"/", []))
            assert scope.cancelled_caught
            assert balancer.snapshot().in_flight == 0


class Parts:
    """An upstream whose reply comes in parts, the second one never; it is the body too."""

    def __init__(self) -> None:
        self.waiting = self.closed = False
        self.upstream = ScriptedUpstream(lambda request, extra: Reply(200, [], self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"first"
        self.waiting = True
        await anyio.sleep_forever()

    async def aclose(self) -> None:
        self.closed = True

"""What is sent again, where, when, how often, and what never is."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import anyio
import pytest
import tenacity
from io_helpers import Stack, by_url, reply, scripted

import pathlb
from pathlb import Retry
from pathlb.classify.http import parse_retry_after
from pathlb.core.events import Retried, RetryRefused
from pathlb.core.model import Cause, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import FakeClock, Fleet, Mode, ScriptedUpstream

pytestmark = pytest.mark.anyio

NO_WAIT = Retry(wait_base=0, wait_max=0)


def always(status: int, headers: Headers | None = None) -> ScriptedUpstream:
    return ScriptedUpstream(lambda request, extra: reply(status, headers))


def broken(sent: Sent = Sent.MAYBE_SENT, fault: Fault = Fault.READ) -> ScriptedUpstream:
    return ScriptedUpstream(lambda request, extra: UpstreamError(fault, sent, "http://x", "scripted"))


def waits(balancer: pathlb.Balancer) -> list[float]:
    """The waits decided on, as they come."""
    seen: list[float] = []
    balancer.subscribe(lambda event: seen.append(event.wait) if isinstance(event, Retried) else None)
    return seen


def refusals(balancer: pathlb.Balancer) -> list[str]:
    seen: list[str] = []
    balancer.subscribe(lambda event: seen.append(event.why) if isinstance(event, RetryRefused) else None)
    return seen


class TestWhat:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    async def test_these_replies_are_worth_another_endpoint(self, stack: Stack, status: int) -> None:
        bad, good = always(status), ScriptedUpstream()
        async with scripted(bad, good, policy=pathlb.RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                response = await client.get("/")
        assert response.status_code == 200
        attempts = response.extensions["pathlb"]["attempts"]
        assert [attempt.outcome.status for attempt in attempts] == [status, 200]
        assert (bad.count, good.count) == (1, 1)

    @pytest.mark.parametrize("status", [201, 204, 301, 304, 400, 401, 404, 408, 409, 418, 501, 505])
    async def test_other_replies_are_answers(self, stack: Stack, status: int) -> None:
        upstream = always(status)
        async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            assert (await client.get("/")).status_code == status
        assert upstream.count == 1

    async def test_the_statuses_are_a_setting(self, stack: Stack) -> None:
        upstream = ScriptedUpstream([reply(418), reply(503)])
        async with scripted(upstream, upstream, retry=Retry(statuses=[418])) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.get("/")).status_code == 503
        assert upstream.count == 2

    @pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY"])
    async def test_idempotent_methods(self, stack: Stack, method: str) -> None:
        bad, good = broken(), ScriptedUpstream()
        async with scripted(bad, good, policy=pathlb.RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.request(method, "/")).status_code == 200
        assert (bad.count, good.count) == (1, 1)

    @pytest.mark.parametrize("method", ["POST", "PATCH", "CONNECT", "PURGE"])
    async def test_others_are_not_sent_twice(self, stack: Stack, method: str) -> None:
        bad, good = broken(), ScriptedUpstream()
        async with scripted(bad, good, policy=pathlb.RoundRobin()) as balancer:
            why = refusals(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                with pytest.raises(stack.http.ReadError):
                    await client.request(method, "/")
        assert (bad.count, good.count) == (1, 0)
        assert why == ["not safe to send twice"]

    @pytest.mark.parametrize("status", [429, 503])
    async def test_a_post_that_got_a_reply_is_not_sent_again(self, stack: Stack, status: int) -> None:
        upstream = always(status)
        async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            assert (await client.post("/")).status_code == status
        assert upstream.count == 1

    @pytest.mark.parametrize("name", ["Idempotency-Key", "idempotency-key", "IDEMPOTENCY-KEY"])
    async def test_an_idempotency_key_makes_a_post_safe(self, stack: Stack, name: str) -> None:
        bad, good = broken(), ScriptedUpstream()
        async with scripted(bad, good, policy=pathlb.RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.post("/", headers={name: "7"})).status_code == 200
        ((request, _),) = good.calls
        assert (name.encode(), b"7") in request.headers

    @pytest.mark.parametrize(
        ("rule", "method", "calls"),
        [
            (True, "POST", 3),
            (False, "GET", 1),
            (None, "GET", 3),
            (None, "POST", 1),
            (lambda request: True, "POST", 3),
            (lambda request: False, "GET", 1),
            (lambda request: None, "GET", 3),
            (lambda request: None, "POST", 1),
            (lambda request: request.url.path.startswith("/read"), "POST", 3),
            (lambda request: request.headers["x-kind"] == "write", "POST", 1),
        ],
    )
    async def test_the_clients_rule(self, stack: Stack, rule: Any, method: str, calls: int) -> None:
        upstream = always(503)
        table = dict.fromkeys(["http://a", "http://b", "http://c"], upstream)
        async with stack.pathlb.AsyncClient(
            list(table), upstream=ScriptedUpstream.factory(table), idempotent=rule, retry=NO_WAIT
        ) as client:
            await client.request(method, "/read/x", headers={"X-Kind": "read"})
        assert upstream.count == calls

    async def test_the_rule_sees_the_librarys_request(self, stack: Stack) -> None:
        seen: list[Any] = []
        async with scripted(ScriptedUpstream(), idempotent=seen.append) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                await client.post("/")
            reply = await balancer.send(Request("POST", b"/", []))
            await reply.body.aclose()
        assert isinstance(seen[0], stack.http.Request)
        assert isinstance(seen[1], Request), "pathlb's own where there is no other"

    async def test_a_rule_that_raises_raises_and_nothing_is_sent(self, stack: Stack) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream, idempotent=lambda request: 1 / 0) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                with pytest.raises(ZeroDivisionError):
                    await client.post("/")
            assert balancer.snapshot().in_flight == 0
        assert upstream.count == 0


class TestHowOften:
    async def test_out_of_attempts_on_a_reply_returns_it(self, stack: Stack) -> None:
        upstreams = [always(503), always(502), always(500)]
        async with scripted(*upstreams, retry=NO_WAIT, policy=pathlb.RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                response = await client.get("/")
        assert response.status_code == 500
        assert len(response.extensions["pathlb"]["attempts"]) == 3
        assert [upstream.count for upstream in upstreams] == [1, 1, 1], "another endpoint each time"

    @pytest.mark.parametrize(("endpoints", "expected"), [(1, 3), (2, 3), (3, 3), (5, 5)])
    async def test_one_attempt_per_endpoint_and_at_least_three(self, endpoints: int, expected: int) -> None:
        upstreams = [always(503) for _ in range(endpoints)]
        async with scripted(*upstreams, retry=NO_WAIT) as balancer, pathlb.AsyncClient(balancer) as client:
            response = await client.get("/")
        assert len(response.extensions["pathlb"]["attempts"]) == expected
        assert max(upstream.count for upstream in upstreams) == -(-expected // endpoints)

    @pytest.mark.parametrize("attempts", [1, 2, 7])
    async def test_attempts_are_a_setting(self, attempts: int) -> None:
        upstream = always(503)
        async with scripted(upstream, upstream, retry=Retry(attempts=attempts, wait_base=0, wait_max=0)) as balancer:
            async with pathlb.AsyncClient(balancer) as client:
                await client.get("/")
        assert upstream.count == attempts

    async def test_attempts_that_reached_nobody_are_free_but_end(self, stack: Stack) -> None:
        dead = broken(Sent.NOT_SENT, Fault.CONNECT)
        async with scripted(dead, dead, retry=Retry(attempts=1, wait_base=0, wait_max=0)) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                with pytest.raises(stack.http.ConnectError) as caught:
                    await client.post("/")
        assert len(caught.value.attempts) == dead.count == 3, "attempts plus one per endpoint"

    async def test_replies_given_up_are_closed_before_the_next_attempt(self) -> None:
        replies: list[Reply] = []

        def answer(request: Request, extra: Headers) -> Reply:
            assert all(one.body.closed for one in replies)  # type: ignore[attr-defined]
            replies.append(reply(503 if len(replies) < 2 else 200))
            return replies[-1]

        upstream = ScriptedUpstream(answer)
        async with scripted(upstream, retry=NO_WAIT) as balancer, pathlb.AsyncClient(balancer) as client:
            async with client.stream("GET", "/") as response:
                assert response.status_code == 200
                assert balancer.snapshot().in_flight == 1
        assert len(replies) == 3

    async def test_on_real_sockets_nothing_idempotent_is_lost(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            fleet[0].kill()
            fleet[1].set_mode(Mode.RESET)
            for _ in range(10):
                assert (await client.get("/")).status_code == 200
            assert client.balancer.snapshot().in_flight == 0


class TestBudget:
    EMPTY = Retry(budget_ratio=0, budget_reserve=0)

    async def test_an_empty_budget_allows_no_retry(self, stack: Stack) -> None:
        upstream = always(503)
        async with scripted(upstream, upstream, retry=self.EMPTY) as balancer:
            why = refusals(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.get("/")).status_code == 503
            assert balancer.snapshot().retry_budget == 0
        assert upstream.count == 1
        assert why == ["the retry budget is used up"]

    async def test_unsent_attempts_do_not_use_it(self, stack: Stack) -> None:
        dead, good = broken(Sent.NOT_SENT, Fault.CONNECT), ScriptedUpstream()
        async with scripted(dead, good, retry=self.EMPTY, policy=pathlb.RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.post("/")).status_code == 200
        assert dead.count == 1

    async def test_the_reserve_runs_out_and_requests_earn_more(self) -> None:
        clock = FakeClock()
        upstream = always(503)
        retry = Retry(attempts=2, wait_base=0, wait_max=0, budget_ratio=0.5, budget_reserve=0.2, budget_ttl=10)
        async with scripted(upstream, retry=retry, clock=clock) as balancer, pathlb.AsyncClient(balancer) as client:
            counts = []
            for _ in range(8):
                before = upstream.count
                await client.get("/")
                counts.append(upstream.count - before)
        assert counts == [2, 2, 2, 2, 1, 2, 1, 2], "2 in reserve, then one for two requests"


class TestRetryAfter:
    @staticmethod
    def asking(value: bytes, status: int = 503) -> ScriptedUpstream:
        return ScriptedUpstream([reply(status, [(b"Retry-After", value)])])

    @pytest.mark.parametrize("status", [429, 503])
    async def test_it_is_waited_for_when_there_is_nobody_else(self, stack: Stack, status: int) -> None:
        upstream = self.asking(b"0.01", status)
        async with scripted(upstream, retry=NO_WAIT) as balancer:
            waited = waits(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.get("/")).status_code == 200
        assert waited == [0.01]
        assert upstream.count == 2

    async def test_another_endpoint_beats_waiting(self, stack: Stack) -> None:
        async with scripted(self.asking(b"20"), ScriptedUpstream(), policy=pathlb.RoundRobin()) as balancer:
            waited = waits(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.get("/")).status_code == 200
        assert waited == [0]

    @pytest.mark.parametrize("value", [b"3600", b"30", b"Fri, 31 Dec 2199 23:59:59 GMT"])
    async def test_longer_than_the_deadline_is_not_waited_for(self, stack: Stack, value: bytes) -> None:
        upstream = self.asking(value)
        async with scripted(upstream, retry=NO_WAIT) as balancer:
            why = refusals(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.get("/")).status_code == 503, "the reply there is"
        assert upstream.count == 1
        assert why == ["another attempt would not finish before the deadline"]

    @pytest.mark.parametrize("value", [b"-5", b"soon", b"", b"nan", b"inf", b"1e999", b"\xff", b"0"])
    async def test_nonsense_is_no_reason_to_wait(self, value: bytes) -> None:
        upstream = self.asking(value)
        async with scripted(upstream, retry=NO_WAIT) as balancer, pathlb.AsyncClient(balancer) as client:
            waited = waits(balancer)
            assert (await client.get("/")).status_code == 200
        assert waited == [0]

    async def test_a_throttled_endpoint_is_passed_over_meanwhile(self, stack: Stack, fleet: Fleet) -> None:
        fleet[0].set_mode(Mode.THROTTLE, retry_after="20")
        async with stack.pathlb.AsyncClient(fleet.urls[:2], policy=pathlb.RoundRobin()) as client:
            for _ in range(5):
                assert (await client.get("/")).status_code == 200
            snapshot = by_url(client.balancer)[fleet.urls[0]]
        assert fleet[0].stats().requests == 1
        assert snapshot.state == "throttled"
        assert snapshot.breaker.state == "closed"

    def test_dates_and_seconds(self) -> None:
        now = datetime(2026, 1, 1, tzinfo=UTC).timestamp()

        def parsed(value: bytes) -> float | None:
            return parse_retry_after([(b"x", b"1"), (b"retry-AFTER", value)], now)

        assert parsed(b"120") == 120
        assert parsed(b" 1.5 ") == 1.5
        assert parsed(b"Thu, 01 Jan 2026 00:01:00 GMT") == 60
        assert parsed(b"Thu, 01 Jan 2026 00:01:00") == 60
        assert parsed(b"Wed, 31 Dec 2025 23:59:00 GMT") == 0
        assert parsed(b"Thu, 99 Jan 2026 00:01:00 GMT") is None
        assert parse_retry_after([]) is None
        later = parse_retry_after([(b"Retry-After", b"Fri, 31 Dec 2199 23:59:59 GMT")])
        assert later is not None
        assert later > 1e9


class TestTenacity:
    """tenacity's strategy objects decide what they are given for, on the library's own responses and exceptions."""

    @staticmethod
    async def run(
        stack: Stack, upstream: ScriptedUpstream, retry: Retry, method: str = "PUT", **options: Any
    ) -> tuple[Any, list[float]]:
        async with scripted(upstream, upstream, retry=retry, **options) as balancer:
            waited = waits(balancer)
            async with stack.pathlb.AsyncClient(balancer) as client:
                try:
                    return await client.request(method, "/"), waited
                except stack.http.HTTPError as exc:
                    return exc, waited
                finally:
                    assert balancer.snapshot().in_flight == 0

    @pytest.mark.parametrize(
        ("fault", "kind", "calls"),
        [(Fault.CONNECT, "ConnectError", 3), (Fault.READ, "ConnectError", 1), (Fault.READ_TIMEOUT, "HTTPError", 3)],
    )
    async def test_retry_if_exception_type(self, stack: Stack, fault: Fault, kind: str, calls: int) -> None:
        upstream = broken(fault=fault)
        retry = Retry(
            retry=tenacity.retry_if_exception_type(getattr(stack.http, kind)), wait=tenacity.wait_none(), attempts=3
        )
        result, _ = await self.run(stack, upstream, retry)
        assert type(result).__name__ == fault.value
        assert upstream.count == calls

    async def test_retry_if_result(self, stack: Stack) -> None:
        seen: list[Any] = []

        def pending(response: Any) -> bool:
            seen.append(response)
            return bool(response.status_code == 202)

        upstream = ScriptedUpstream([reply(202), reply(202), reply(503)])
        retry = Retry(retry=tenacity.retry_if_result(pending), wait=tenacity.wait_none(), attempts=9)
        result, _ = await self.run(stack, upstream, retry)
        assert result.status_code == 503, "what the strategy does not ask for is not retried"
        assert all(isinstance(response, stack.http.Response) for response in seen)
        assert seen[0].request.method == "PUT"
        assert len(result.extensions["pathlb"]["attempts"]) == 3

    async def test_retry_never(self, stack: Stack) -> None:
        upstream = always(503)
        await self.run(stack, upstream, Retry(retry=tenacity.retry_never))
        assert upstream.count == 1

    @pytest.mark.parametrize("count", [1, 2, 5])
    async def test_stop_after_attempt(self, stack: Stack, count: int) -> None:
        upstream = always(503)
        retry = Retry(stop=tenacity.stop_after_attempt(count), wait=tenacity.wait_none())
        result, _ = await self.run(stack, upstream, retry)
        assert upstream.count == count
        assert result.status_code == 503

    @pytest.mark.parametrize(
        ("stop", "calls"),
        [
            (tenacity.stop_after_delay(12), 3),
            (tenacity.stop_after_delay(0), 1),
            (tenacity.stop_before_delay(12), 2),
            (tenacity.stop_after_attempt(2) | tenacity.stop_after_delay(100), 2),
            (tenacity.stop_after_attempt(2) & tenacity.stop_after_delay(12), 3),
        ],
    )
    async def test_stop_by_time(self, stack: Stack, stop: Any, calls: int) -> None:
        clock = FakeClock()

        def slow(request: Request, extra: Headers) -> Reply:
            clock.advance(5)
            return reply(503)

        upstream = ScriptedUpstream(slow)
        # No wait to come: stop_before_delay is then stop_after_delay, but for what follows.
        wait = tenacity.wait_fixed(0.003) if calls == 2 else tenacity.wait_none()
        if stop.__class__ is tenacity.stop_before_delay:
            stop = tenacity.stop_before_delay(10.003)
        await self.run(stack, upstream, Retry(stop=stop, wait=wait), clock=clock, deadline=100)
        assert upstream.count == calls

    async def test_waits(self, stack: Stack) -> None:
        chain = tenacity.wait_chain(tenacity.wait_fixed(0), tenacity.wait_fixed(0.001), tenacity.wait_fixed(0.002))
        retry = Retry(wait=chain, stop=tenacity.stop_after_attempt(5))
        _, waited = await self.run(stack, always(503), retry)
        assert waited == [0, 0.001, 0.002, 0.002]
        _, waited = await self.run(stack, always(503), Retry(wait=tenacity.wait_fixed(0), attempts=2))
        assert waited == [0]

    async def test_a_wait_is_drawn_once(self, stack: Stack) -> None:
        """`stop` must see the sleep that will be made, not another draw of it."""
        draws = iter([0.001, 5.0])

        def wait(state: tenacity.RetryCallState) -> float:
            return next(draws)

        told: list[float] = []

        def stop(state: tenacity.RetryCallState) -> bool:
            told.append(state.upcoming_sleep)
            return state.attempt_number >= 2

        # The second draw belongs to the second attempt, which stops.
        _, waited = await self.run(stack, always(503), Retry(wait=wait, stop=stop))
        assert told == [0.001, 5.0]
        assert waited == [0.001]

    async def test_a_wait_beyond_the_deadline_is_not_made(self, stack: Stack) -> None:
        upstream = always(503)
        result, waited = await self.run(stack, upstream, Retry(wait=tenacity.wait_fixed(60)))
        assert (result.status_code, waited, upstream.count) == (503, [], 1)

    async def test_what_the_state_tells(self, stack: Stack) -> None:
        states: list[tuple[int, float, bool]] = []

        def record(state: tenacity.RetryCallState) -> bool:
            assert state.outcome is not None
            states.append((state.attempt_number, state.idle_for, state.outcome.failed))
            return True

        upstream = ScriptedUpstream([reply(503), UpstreamError(Fault.READ, Sent.MAYBE_SENT, "http://a", "x")])
        retry = Retry(retry=record, wait=tenacity.wait_fixed(0.001), stop=tenacity.stop_after_attempt(3))
        await self.run(stack, upstream, retry)
        assert states == [(1, 0.0, False), (2, 0.001, True), (3, 0.002, False)]

    @pytest.mark.parametrize("make", [lambda: always(503), broken, lambda: always(200)], ids=["503", "read", "200"])
    async def test_no_strategy_sends_an_unsafe_post_twice(
        self, stack: Stack, make: Callable[[], ScriptedUpstream]
    ) -> None:
        upstream = make()
        eager = Retry(retry=tenacity.retry_always, stop=tenacity.stop_never, wait=tenacity.wait_none())
        await self.run(stack, upstream, eager, method="POST")
        assert upstream.count == 1

    async def test_nor_a_body_that_cannot_be_replayed(self, stack: Stack) -> None:
        async def body() -> Any:
            yield b"x"

        def taking(request: Request, extra: Headers) -> Any:
            async def answer() -> Reply:
                assert not isinstance(request.body, bytes)
                async for _ in request.body:
                    pass
                return reply(503)

            return answer()

        upstream = ScriptedUpstream(taking)
        eager = Retry(retry=tenacity.retry_always, stop=tenacity.stop_never, wait=tenacity.wait_none())
        async with scripted(upstream, retry=eager, idempotent=True) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.put("/", content=body())).status_code == 503
        assert upstream.count == 1

    async def test_nor_where_an_upstream_took_some_of_it_and_says_it_did_not(self, stack: Stack) -> None:
        async def body() -> Any:
            yield b"x"

        async def taking(request: Request, extra: Headers) -> Any:
            assert not isinstance(request.body, bytes)
            async for _ in request.body:
                pass
            raise UpstreamError(Fault.CONNECT, Sent.NOT_SENT, "http://a", "scripted")

        upstream = ScriptedUpstream(taking)
        async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            with pytest.raises(stack.http.ConnectError):
                await client.put("/", content=body())
        assert upstream.count == 1

    async def test_a_strategy_that_raises_raises_and_leaks_nothing(self, stack: Stack) -> None:
        upstream = always(503)
        async with scripted(upstream, retry=Retry(stop=lambda state: 1 / 0)) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                with pytest.raises(ZeroDivisionError):
                    await client.get("/")
            assert balancer.snapshot().in_flight == 0
        assert upstream.count == 1

    async def test_neutral_results_where_there_is_no_library(self) -> None:
        seen: list[Any] = []
        upstream = always(200)
        async with scripted(upstream, retry=Retry(retry=tenacity.retry_if_result(seen.append))) as balancer:
            answer = await balancer.send(Request("GET", b"/", []))
            await answer.body.aclose()
        assert seen == [answer]


class TestDeadline:
    async def test_it_covers_all_attempts(self, stack: Stack) -> None:
        clock = FakeClock()

        async def slow(request: Request, extra: Headers) -> Reply:
            if upstream.count == 1:
                clock.advance(29.99)
                return reply(503)
            await anyio.sleep_forever()
            raise AssertionError

        upstream = ScriptedUpstream(slow)
        async with scripted(upstream, upstream, clock=clock) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            with pytest.raises(pathlb.DeadlineExceeded) as caught:
                await client.get("/")
        first, second = caught.value.attempts
        assert (first.outcome.status, second.outcome.cause) == (503, Cause.BEYOND)

    async def test_an_attempt_that_cannot_finish_is_not_started(self, stack: Stack) -> None:
        async def answer(request: Request, extra: Headers) -> Reply:
            if request.target != b"/usual":
                return reply(503)
            await anyio.sleep(0.3)  # the service time
            return reply()

        upstream = ScriptedUpstream(answer)
        async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            why = refusals(balancer)
            await client.get("/usual")
            (usual,) = (one.latency for one in balancer.snapshot().endpoints if one.latency is not None)
            response = await client.get("/", extensions={"pathlb": {"deadline": usual * 0.9}})
        assert response.status_code == 503
        assert upstream.count == 2
        assert why == ["another attempt would not finish before the deadline"]

    async def test_it_does_not_cover_the_body(self, stack: Stack) -> None:
        """A long stream is a success."""
        more = anyio.Event()

        class Slow:
            async def __aiter__(self) -> Any:
                await more.wait()
                yield b"late"

            async def aclose(self) -> None:
                pass

        clock = FakeClock()
        upstream = ScriptedUpstream([Reply(200, [], Slow())])
        async with scripted(upstream, clock=clock) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            async with client.stream("GET", "/", extensions={"pathlb": {"deadline": 0.5}}) as response:
                clock.advance(100)
                more.set()
                assert await response.aread() == b"late"

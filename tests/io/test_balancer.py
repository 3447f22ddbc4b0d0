"""The long-lived object the faces share: changing its endpoints, reading its state, listening to it."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import anyio
import pytest
from io_helpers import LARGE_BODY, Held, Stack, by_url, reply, scripted, until

import pathlb
from pathlb.core.events import BreakerChanged, EndpointsChanged, Finished, GivenUp, Observed, Picked, Released, Retried
from pathlb.core.model import Cause
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import FakeClock, Fleet, Mode, ScriptedUpstream

pytestmark = pytest.mark.anyio


def two_of(*names: str) -> tuple[dict[str, Held], Any]:
    held = {f"http://{name}": Held() for name in names}
    return held, ScriptedUpstream.factory({url: one.upstream for url, one in held.items()})


class TestUpdate:
    async def test_survivors_keep_their_load_and_the_removed_are_drained(self, stack: Stack) -> None:
        held, factory = two_of("a", "b", "c")
        ramp = pathlb.SlowStart(window=0)
        async with pathlb.Balancer(["http://a", "http://b"], upstream=factory, slow_start=ramp) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
                for _ in range(4):
                    group.start_soon(client.get, "/")
                await until(lambda: balancer.snapshot().in_flight == 4)
                balancer.update(["http://b", pathlb.Endpoint("http://c", weight=2)])
                states = by_url(balancer)
                assert {url: (one.state, one.in_flight) for url, one in states.items()} == {
                    "http://b": ("ready", 2),
                    "http://c": ("ready", 0),
                    "http://a": ("removed", 2),
                }
                group.start_soon(client.get, "/new")
                await until(lambda: held["http://c"].targets == [b"/new"])
                # The removed one serves what it has, and is closed with the last of it.
                held["http://a"].let_go(1)
                await until(lambda: by_url(balancer)["http://a"].in_flight == 1)
                assert not held["http://a"].upstream.closed
                held["http://a"].let_go(1)
                await until(lambda: held["http://a"].upstream.closed)
                assert "http://a" not in by_url(balancer)
                held["http://b"].let_go(2)
                held["http://c"].let_go(1)
        assert held["http://b"].upstream.closed, "with the balancer"

    async def test_an_idle_one_is_closed_at_once(self) -> None:
        held, factory = two_of("a", "b")
        async with pathlb.Balancer(["http://a", "http://b"], upstream=factory) as balancer:
            balancer.update(["http://b"])
            await until(lambda: held["http://a"].upstream.closed)

    async def test_one_that_comes_back_while_it_drains_has_its_load_still(self) -> None:
        held, factory = two_of("a", "b")
        async with pathlb.Balancer(["http://a", "http://b"], upstream=factory) as balancer:
            async with pathlb.AsyncClient(balancer) as client, anyio.create_task_group() as group:
                group.start_soon(lambda: client.get("/", extensions={"pathlb": {"pin": "http://a"}}))
                await until(lambda: balancer.snapshot().in_flight == 1)
                balancer.update(["http://b"])
                balancer.update(["http://a", "http://b"])
                assert by_url(balancer)["http://a"].in_flight == 1
                held["http://a"].let_go()
            assert by_url(balancer)["http://a"].in_flight == 0
            assert not held["http://a"].upstream.closed

    @pytest.mark.parametrize("bad", [[], ["http://a", "http://a"], ["ftp://a"], "http://a", [5]])
    async def test_a_bad_list_changes_nothing(self, bad: Any) -> None:
        async with scripted(ScriptedUpstream(), ScriptedUpstream()) as balancer:
            with pytest.raises(pathlb.ConfigError):
                balancer.update(bad)
            assert set(by_url(balancer)) == {"http://a", "http://b"}

    async def test_a_factory_that_fails_changes_nothing(self) -> None:
        _, factory = two_of("a")
        async with pathlb.Balancer(["http://a"], upstream=factory) as balancer:
            with pytest.raises(LookupError):
                balancer.update(["http://a", "http://b"])
            assert set(by_url(balancer)) == {"http://a"}

    async def test_the_tls_name_cannot_change_under_its_connections(self, stack: Stack) -> None:
        async with pathlb.Balancer([pathlb.Endpoint("https://a", server_hostname="one")]) as balancer:
            with pytest.raises(pathlb.ConfigError) as caught:
                balancer.update([pathlb.Endpoint("https://a", server_hostname="two")])
        assert caught.value.field == "Endpoint.server_hostname"

    async def test_weights_and_metadata_may(self) -> None:
        async with scripted(ScriptedUpstream()) as balancer:
            balancer.update([pathlb.Endpoint("http://a", weight=3, metadata={"zone": "eu"})])
            (one,) = balancer.snapshot().endpoints
            assert (one.weight, one.metadata) == (3, {"zone": "eu"})

    async def test_a_failing_close_concerns_nobody(self, caplog: pytest.LogCaptureFixture) -> None:
        class Stubborn(ScriptedUpstream):
            async def aclose(self) -> None:
                await super().aclose()
                raise OSError("stuck")

        stubborn, other = Stubborn(), ScriptedUpstream()
        caplog.set_level(logging.DEBUG, logger="pathlb")
        async with scripted(stubborn, other) as balancer:
            balancer.update(["http://b"])
            await until(lambda: stubborn.closed)
            balancer.update(["http://a", "http://b"])
        assert stubborn.closed
        assert other.closed, "whatever the first one does"
        assert "stuck" in caplog.text


class TestDrain:
    async def test_nothing_new_and_the_old_ends_normally(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls[:2], policy=pathlb.RoundRobin()) as client:
            balancer = client.balancer
            async with client.stream("GET", "/", extensions={"pathlb": {"pin": fleet.urls[0]}}) as response:
                balancer.drain(fleet.urls[0])
                balancer.drain(pathlb.Endpoint(fleet.urls[0]))
                assert by_url(balancer)[fleet.urls[0]].state == "draining"
                for _ in range(4):
                    assert (await client.get("/")).headers["x-gateway"] == "gateway-1"
                assert await response.aread()
            balancer.undrain(fleet.urls[0])
            balancer.undrain(fleet.urls[0])
            assert by_url(balancer)[fleet.urls[0]].state == "slow start"
        assert fleet[0].stats().requests == 1

    async def test_all_drained_is_no_panic(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            for url in fleet.urls:
                client.balancer.drain(url)
            with pytest.raises(pathlb.NoEligibleEndpoint, match="is draining") as caught:
                await client.get("/")
        assert isinstance(caught.value, stack.http.ConnectError)
        assert all(url in str(caught.value) for url in fleet.urls)

    async def test_an_unknown_endpoint_is_an_error_that_names_the_known(self) -> None:
        async with scripted(ScriptedUpstream()) as balancer:
            for act in (balancer.drain, balancer.undrain):
                with pytest.raises(pathlb.ConfigError, match="not one of the endpoints: http://a"):
                    act("http://b")
                with pytest.raises(pathlb.ConfigError):
                    act("nonsense")


class TestSnapshot:
    async def test_it_is_json_and_frozen_and_tells_it_all(self, stack: Stack, fleet: Fleet, anyio_backend: str) -> None:
        endpoints = [pathlb.Endpoint(fleet.urls[0], weight=2, metadata={"zone": "eu"}), fleet.urls[1]]
        async with stack.pathlb.AsyncClient(endpoints, policy=pathlb.P2C()) as client:
            before = client.balancer.snapshot()
            assert before.endpoints[0].latency is None
            fleet[0].set_body(LARGE_BODY)
            async with client.stream("GET", "/", extensions={"pathlb": {"pin": fleet.urls[0]}}):
                snapshot = client.balancer.snapshot()
        plain = json.loads(json.dumps(snapshot.to_dict()))
        first = plain["endpoints"][0]
        assert plain["in_flight"] == first["in_flight"] == 1
        assert plain["policy"] == pathlb.P2C().name
        assert (plain["queued"], plain["panic"]) == (0, False)
        assert plain["retry_budget"] > 0
        assert (first["url"], first["weight"], first["metadata"]) == (fleet.urls[0], 2, {"zone": "eu"})
        assert first["latency"] > 0
        assert first["breaker"] == {"state": "closed", "consecutive_failures": 0, "reopens_in": None}
        assert first["counts"]["picks"] == first["counts"]["ok"] == 1
        assert first["upstream"] == ("http1" if anyio_backend == "asyncio" else stack.http.__name__)
        assert first["ejected_for"] is None
        with pytest.raises(dataclasses.FrozenInstanceError):
            snapshot.in_flight = 0  # type: ignore[misc]
        assert before.endpoints[0].latency is None, "a moment, not a view"

    async def test_an_open_breaker_shows(self) -> None:
        bad = ScriptedUpstream(lambda request, extra: reply(500))
        options: dict[str, Any] = {
            "breaker": pathlb.Breaker(failures=2, open_for=5, jitter=0),
            "retry": pathlb.Retry(attempts=1),
            "clock": FakeClock(),
        }
        async with scripted(bad, ScriptedUpstream(), **options) as balancer, pathlb.AsyncClient(balancer) as client:
            for _ in range(2):
                await client.get("/", extensions={"pathlb": {"pin": "http://a"}})
            state = by_url(balancer)["http://a"]
        assert state.state == "breaker open"
        assert (state.breaker.state, state.breaker.reopens_in) == ("open", 5)
        assert state.counts["breaker_opens"] == 1
        assert state.counts["failed"] == 2
        json.dumps(dataclasses.asdict(state))

    def test_it_works_before_the_first_request(self) -> None:
        balancer = pathlb.Balancer(["http://a"])
        assert balancer.snapshot().in_flight == 0
        assert balancer.snapshot().endpoints[0].upstream == "", "which one is decided by the async library"


class TestEvents:
    async def test_one_request_from_pick_to_release(self, stack: Stack) -> None:
        told: list[Any] = []
        upstream = ScriptedUpstream([reply(503), reply(200)])
        async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            unsubscribe = balancer.subscribe(told.append)
            await client.get("/")
            unsubscribe()
            unsubscribe()
            await client.get("/")
        kinds = [type(event) for event in told]
        assert kinds == [Picked, Observed, Retried, Released, Picked, Observed, Finished, Released]
        assert told[0].endpoint != told[4].endpoint
        assert [event.outcome.cause for event in told if isinstance(event, Observed)] == [Cause.INSTANCE, Cause.OK]
        assert [event.at for event in told] == sorted(event.at for event in told)
        with pytest.raises(dataclasses.FrozenInstanceError):
            told[0].endpoint = "x"

    async def test_a_subscriber_that_raises_is_logged_and_the_others_are_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        told: list[Any] = []
        async with scripted(ScriptedUpstream()) as balancer, pathlb.AsyncClient(balancer) as client:
            balancer.subscribe(lambda event: 1 / 0)
            balancer.subscribe(told.append)
            assert (await client.get("/")).status_code == 200
        assert len(told) == 5, "and the endpoints leaving at the end"
        record = caplog.records[0]
        assert (record.name, record.levelname) == ("pathlb", "ERROR")
        assert "'Picked'" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[0] is ZeroDivisionError

    async def test_a_subscriber_may_act(self) -> None:
        """Draining from inside an event: what follows from it comes after it."""
        bad = ScriptedUpstream(lambda request, extra: reply(500))
        told: list[str] = []
        async with scripted(bad, ScriptedUpstream(), policy=pathlb.RoundRobin()) as balancer:

            def drain_what_fails(event: Any) -> None:
                told.append(type(event).__name__)
                if isinstance(event, Observed) and event.outcome.cause is Cause.INSTANCE:
                    balancer.drain(event.endpoint)

            balancer.subscribe(drain_what_fails)
            async with pathlb.AsyncClient(balancer) as client:
                for _ in range(4):
                    assert (await client.get("/")).status_code == 200
            assert by_url(balancer)["http://a"].state == "draining"
        assert bad.count == 1
        assert told.index(EndpointsChanged.__name__) == told.index(Observed.__name__) + 1


class TestHangingAttempts:
    @staticmethod
    def breaker(failures: int) -> pathlb.Breaker:
        return pathlb.Breaker(failures=failures, open_for=60)

    @staticmethod
    async def open_the_breaker(client: Any, stack: Stack, fleet: Fleet) -> None:
        """With requests of little patience; those that time out while this process stalls do not count."""
        while by_url(client.balancer)[fleet.urls[0]].state != "breaker open":
            with pytest.raises(stack.http.ReadTimeout):
                await client.post(
                    "/",
                    extensions={"pathlb": {"avoid": [fleet.urls[1]]}},
                    timeout=stack.http.Timeout(5, read=0.02),
                )

    async def test_they_are_given_up_when_their_endpoint_is_taken_out(self, stack: Stack, fleet: Fleet) -> None:
        """Decision 10: a safe attempt does not wait for its timeout on an endpoint whose breaker has opened."""
        fleet[0].set_mode(Mode.HANG)
        told: list[Any] = []
        pinned = {"pathlb": {"avoid": [fleet.urls[1]]}}
        async with stack.pathlb.AsyncClient(
            fleet.urls[:2],
            breaker=pathlb.Breaker(failures=2, open_for=60),
            retry=pathlb.Retry(attempts=3),
            outlier=None,
        ) as client:
            client.balancer.subscribe(told.append)
            responses: list[Any] = []

            async def get() -> None:
                responses.append(await client.get("/hangs", extensions=pinned))

            async with anyio.create_task_group() as group:
                for _ in range(2):
                    group.start_soon(get)
                await until(lambda: fleet[0].stats().in_flight == 2)
                await self.open_the_breaker(client, stack, fleet)
        for response in responses:
            first, second = response.extensions["pathlb"]["attempts"]
            assert (first.endpoint, first.outcome.cause) == (fleet.urls[0], Cause.GIVEN_UP)
            assert (second.endpoint, second.outcome.status) == (fleet.urls[1], 200)
        assert [event.attempts for event in told if isinstance(event, GivenUp)] == [2]
        assert [event.after for event in told if isinstance(event, BreakerChanged)] == ["open"]

    async def test_a_post_stays_where_it_is(self, stack: Stack, fleet: Fleet) -> None:
        fleet[0].set_mode(Mode.HANG)
        there = {"pathlb": {"avoid": [fleet.urls[1]]}}
        told: list[Any] = []
        async with (
            stack.pathlb.AsyncClient(fleet.urls[:2], breaker=self.breaker(1), outlier=None) as client,
            anyio.create_task_group() as group,
        ):
            client.balancer.subscribe(told.append)
            group.start_soon(lambda: client.post("/waits", extensions=there))
            await until(lambda: fleet[0].stats().in_flight == 1)
            await self.open_the_breaker(client, stack, fleet)
            assert by_url(client.balancer)[fleet.urls[0]].in_flight == 1
            assert not [event for event in told if isinstance(event, GivenUp)]
            group.cancel_scope.cancel()
        assert sum(one.stats().by_path["/waits"] for one in fleet) == 1


async def test_a_users_policy(stack: Stack) -> None:
    class Last:
        name = "last"

        def pick(self, candidates: Any, rng: Any) -> Any:
            return candidates[-1]

    upstreams = [ScriptedUpstream(), ScriptedUpstream(), ScriptedUpstream()]
    async with scripted(*upstreams, policy=Last()) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        response = await client.get("/")
    assert response.extensions["pathlb"]["attempts"][0].reason == "last"
    assert [upstream.count for upstream in upstreams] == [0, 0, 1]


async def test_the_balancer_sends_neutral_requests_itself() -> None:
    def answer(request: Request, extra: Headers) -> Reply:
        return reply(200, body=request.target)

    async with scripted(ScriptedUpstream(answer)) as balancer:
        answered = await balancer.send(Request("GET", b"/x", []))
        assert [part async for part in answered.body] == [b"/x"]
        assert balancer.snapshot().in_flight == 1
        await answered.body.aclose()
        await answered.body.aclose()
        assert balancer.snapshot().in_flight == 0
        assert [attempt.endpoint for attempt in answered.attempts] == ["http://a"]


async def test_cancelled_requests_cost_nobody_anything(stack: Stack) -> None:
    held = Held()
    async with scripted(held.upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        for _ in range(10):
            with anyio.move_on_after(0.002):
                await client.get("/")
        (state,) = balancer.snapshot().endpoints
    assert (state.in_flight, state.counts["failed"], state.counts["ignored"]) == (0, 0, 10)
    assert state.breaker.consecutive_failures == 0

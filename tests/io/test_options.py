"""What one request may ask for, and what its answer tells: `extensions={"pathlb": ...}`."""

from __future__ import annotations

import json
from typing import Any

import anyio
import pytest
from io_helpers import Held, Stack, reply, scripted

import pathlb
from pathlb.core.model import Cause, Sent
from pathlb.exchange import Attempt
from pathlb.testing import Fleet, ScriptedUpstream, refused_url

pytestmark = pytest.mark.anyio


def options(**given: Any) -> dict[str, Any]:
    return {"pathlb": given}


def attempts_of(response: Any) -> tuple[Attempt, ...]:
    attempts = response.extensions["pathlb"]["attempts"]
    assert isinstance(attempts, tuple)
    print(*attempts, sep="\n")  # noqa: T201 (pytest shows it where a test fails)
    return attempts


async def test_pin_goes_to_that_endpoint_alone(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        for pin in (fleet.urls[2], f"{fleet.urls[2]}/", pathlb.Endpoint(fleet.urls[2])):
            (attempt,) = attempts_of(await client.get("/", extensions=options(pin=pin)))
            assert (attempt.endpoint, attempt.reason) == (fleet.urls[2], "pinned")
        fleet[2].kill()
        with pytest.raises(stack.http.ConnectError) as caught:
            await client.get("/", extensions=options(pin=fleet.urls[2]))
        assert {attempt.endpoint for attempt in caught.value.attempts} == {fleet.urls[2]}
    assert [gateway.stats().requests for gateway in fleet] == [0, 0, 3]


async def test_pin_to_an_endpoint_that_is_none_says_which(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        with pytest.raises(pathlb.NoEligibleEndpoint, match="pinned to http://nowhere, which is not one"):
            await client.get("/", extensions=options(pin="http://nowhere"))
        client.balancer.drain(fleet.urls[0])
        with pytest.raises(stack.http.ConnectError, match="is draining"):
            await client.get("/", extensions=options(pin=fleet.urls[0]))


@pytest.mark.parametrize("form", ["list", "set", "string", "endpoint"])
async def test_avoid_passes_endpoints_over_while_another_is_eligible(stack: Stack, fleet: Fleet, form: str) -> None:
    shapes: dict[str, Any] = {
        "list": fleet.urls[:2],
        "set": set(fleet.urls[:2]),
        "string": fleet.urls[0],
        "endpoint": pathlb.Endpoint(fleet.urls[0]),
    }
    avoided = set(fleet.urls[:2] if form in ("list", "set") else fleet.urls[:1])
    async with stack.pathlb.AsyncClient(fleet.urls, policy=pathlb.RoundRobin()) as client:
        for _ in range(4):
            (attempt,) = attempts_of(await client.get("/", extensions=options(avoid=shapes[form])))
            assert attempt.endpoint not in avoided
        for url in set(fleet.urls) - avoided:
            client.balancer.drain(url)
        (attempt,) = attempts_of(await client.get("/", extensions=options(avoid=shapes[form])))
        assert attempt.endpoint in avoided, "rather an avoided one than none"


async def test_deadline_ends_a_request_that_hangs(stack: Stack) -> None:
    held = Held()
    async with scripted(held.upstream, outlier=None) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            with pytest.raises(pathlb.DeadlineExceeded) as caught:
                await client.get("/", extensions=options(deadline=0.02))
            assert balancer.snapshot().in_flight == 0
    assert isinstance(caught.value, stack.http.TimeoutException)
    assert not isinstance(caught.value, stack.http.ReadTimeout)
    (attempt,) = caught.value.attempts
    assert attempt.outcome.cause is Cause.BEYOND
    assert attempt.sent is Sent.MAYBE_SENT
    assert "http://a" in str(caught.value)


@pytest.mark.parametrize(("idempotent", "calls"), [(True, 3), (False, 1), (None, 1)])
async def test_idempotent_overrides_for_a_post(stack: Stack, idempotent: bool | None, calls: int) -> None:
    upstream = ScriptedUpstream(lambda request, extra: reply(503))
    async with scripted(upstream, upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        given = {} if idempotent is None else {"idempotent": idempotent}
        assert (await client.post("/", extensions=options(**given))).status_code == 503
    assert upstream.count == calls


async def test_idempotent_overrides_for_a_get(stack: Stack) -> None:
    upstream = ScriptedUpstream(lambda request, extra: reply(503))
    async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        await client.get("/", extensions=options(idempotent=False))
    assert upstream.count == 1


@pytest.mark.parametrize(
    ("given", "field", "problem"),
    [
        (5, 'extensions["pathlb"]', "must be a dict, not int"),
        ([], 'extensions["pathlb"]', "must be a dict, not list"),
        ({"deadlin": 1}, 'extensions["pathlb"]["deadlin"]', "the keys are deadline, idempotent, pin, avoid"),
        ({1: 1}, 'extensions["pathlb"]["1"]', "the keys are deadline"),
        ({"deadline": 0}, 'extensions["pathlb"]["deadline"]', "seconds above 0, not 0"),
        ({"deadline": -1}, 'extensions["pathlb"]["deadline"]', "seconds above 0"),
        ({"deadline": float("nan")}, 'extensions["pathlb"]["deadline"]', "seconds above 0"),
        ({"deadline": float("inf")}, 'extensions["pathlb"]["deadline"]', "seconds above 0"),
        ({"deadline": "5"}, 'extensions["pathlb"]["deadline"]', "seconds above 0, not '5'"),
        ({"deadline": True}, 'extensions["pathlb"]["deadline"]', "seconds above 0"),
        ({"deadline": None}, 'extensions["pathlb"]["deadline"]', "seconds above 0"),
        ({"idempotent": 1}, 'extensions["pathlb"]["idempotent"]', "must be a bool, not 1"),
        ({"idempotent": "yes"}, 'extensions["pathlb"]["idempotent"]', "must be a bool"),
        ({"pin": 5}, 'extensions["pathlb"]["pin"]', "must be a string"),
        ({"pin": "gateway:80"}, 'extensions["pathlb"]["pin"]', "must start with http://"),
        ({"avoid": 5}, 'extensions["pathlb"]["avoid"]', "must be endpoint URLs, not 5"),
        ({"avoid": ["http://a", 5]}, 'extensions["pathlb"]["avoid"]', "must be a string"),
        ({"avoid": ["a"]}, 'extensions["pathlb"]["avoid"]', "must start with"),
    ],
)
async def test_what_cannot_be_meant_is_an_error_and_nothing_is_sent(
    stack: Stack, given: Any, field: str, problem: str
) -> None:
    upstream = ScriptedUpstream()
    async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        with pytest.raises(pathlb.ConfigError) as caught:
            await client.get("/", extensions={"pathlb": given})
    assert caught.value.field == field
    assert problem in caught.value.problem
    assert upstream.count == 0


async def test_the_options_do_not_reach_the_upstream(stack: Stack) -> None:
    upstream = ScriptedUpstream()
    async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        await client.get("/", extensions={"pathlb": {"deadline": 3}, "other": 1})
    ((request, _),) = upstream.calls
    assert request.extensions == {"other": 1}
    assert request.deadline == 3.0


async def test_every_attempt_is_explained(stack: Stack, fleet: Fleet) -> None:
    with refused_url() as dead:
        async with stack.pathlb.AsyncClient([dead, *fleet.urls[:2]], policy=pathlb.RoundRobin()) as client:
            fleet[0].set_mode(pathlb.testing.Mode.FAIL, status=502)
            response = await client.get("/")
    first, second, third = attempts_of(response)
    assert [first.endpoint, second.endpoint, third.endpoint] == [dead, *fleet.urls[:2]]
    assert (first.outcome.cause, first.sent, first.outcome.status) == (Cause.INSTANCE, Sent.NOT_SENT, None)
    assert "ConnectError" in first.outcome.detail
    assert "refused" in first.outcome.detail
    assert (second.outcome.cause, second.sent, second.outcome.status) == (Cause.INSTANCE, Sent.MAYBE_SENT, 502)
    assert (third.outcome.cause, third.outcome.status) == (Cause.OK, 200)
    assert [one.reason for one in (first, second, third)] == ["round robin", "round robin", "only candidate"]
    assert [one.candidates for one in (first, second, third)] == [3, 2, 1]
    assert [one.in_flight for one in (first, second, third)] == [0, 0, 0]
    assert all(one.duration > 0 for one in (first, second, third))
    assert "502 after" in str(second)
    assert str(second).startswith(f"{fleet.urls[0]} (round robin)")


async def test_in_flight_is_what_the_pick_saw(stack: Stack) -> None:
    held = Held()
    async with scripted(held.upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        responses: list[Any] = []

        async def get() -> None:
            responses.append(await client.get("/"))

        async with anyio.create_task_group() as group:
            for _ in range(3):
                group.start_soon(get)
            await anyio.wait_all_tasks_blocked()
            held.let_go(3)
    assert sorted(attempts_of(response)[0].in_flight for response in responses) == [0, 1, 2]
    assert {attempts_of(response)[0].reason for response in responses} == {"only candidate"}


async def test_the_extension_is_there_on_every_answer(stack: Stack, fleet: Fleet) -> None:
    """Redirects, failures and replies of a stream alike."""
    fleet[0].set_mode(pathlb.testing.Mode.FAIL, status=404)
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        (attempt,) = attempts_of(await client.get("/"))
        assert (attempt.outcome.cause, attempt.outcome.status) == (Cause.REQUEST, 404)
        async with client.stream("GET", "/") as response:
            assert len(attempts_of(response)) == 1
        json.dumps(str(attempt))

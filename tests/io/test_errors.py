"""Every error is pathlb's and the library's at once, says what was tried, crosses processes, and keeps secrets."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from typing import Any

import anyio
import pytest
from io_helpers import Held, Stack, reply, scripted

import pathlb
from pathlb import errors
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.testing import Fleet, ScriptedUpstream, refused_url

pytestmark = pytest.mark.anyio


def failing(fault: Fault, sent: Sent = Sent.MAYBE_SENT) -> ScriptedUpstream:
    def answer(request: Any, extra: Any) -> UpstreamError:
        return UpstreamError(fault, sent, "http://a", "scripted")

    return ScriptedUpstream(answer)


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.value)
async def test_the_last_attempts_fault_is_raised_as_the_librarys_class(stack: Stack, fault: Fault) -> None:
    upstream = failing(fault)
    async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        with pytest.raises(UpstreamError) as caught:
            await client.post("/v1")
    error = caught.value
    assert type(error) is getattr(stack.errors, fault.value)
    assert isinstance(error, getattr(stack.http, fault.value))
    assert isinstance(error, stack.http.HTTPError)
    assert isinstance(error, pathlb.PathlbError)
    assert error.fault is fault
    assert error.endpoint == "http://a"
    assert error.request.url.path == "/v1"
    assert [attempt.endpoint for attempt in error.attempts] == ["http://a"]
    assert str(error).startswith("http://a: scripted [tried http://a (only candidate): ")
    assert isinstance(error.__cause__, UpstreamError)
    assert upstream.count == 1, "a POST that may have been sent"


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.value)
async def test_what_was_provably_not_sent_goes_elsewhere_whatever_it_is(stack: Stack, fault: Fault) -> None:
    upstream, good = failing(fault, Sent.NOT_SENT), ScriptedUpstream()
    async with scripted(upstream, good, policy=pathlb.RoundRobin()) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            if fault in (Fault.LOCAL_PROTOCOL, Fault.UNSUPPORTED_PROTOCOL):
                with pytest.raises(getattr(stack.http, fault.value)):
                    await client.post("/")
                assert good.count == 0, "the request itself is wrong: no endpoint will do better"
            else:
                assert (await client.post("/")).status_code == 200
                assert good.count == 1


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("NoEligibleEndpoint", "ConnectError"),
        ("QueueFull", "PoolTimeout"),
        ("QueueTimeout", "PoolTimeout"),
        ("DeadlineExceeded", "TimeoutException"),
        ("UsageError", "UnsupportedProtocol"),
    ],
)
def test_pathlbs_own_errors_are_the_librarys_too(stack: Stack, name: str, base: str) -> None:
    own = getattr(stack.errors, name)
    assert issubclass(own, getattr(errors, name))
    assert issubclass(own, getattr(stack.http, base))
    assert issubclass(own, stack.http.HTTPError)


async def all_errors(stack: Stack) -> list[Exception]:
    """One of each, as a caller gets it."""
    caught: list[Exception] = []

    async def catch(client: Any, url: str = "/", **kwargs: Any) -> None:
        try:
            await client.post(url, headers={"Authorization": "Bearer s3cret"}, **kwargs)
        except (errors.PathlbError, pathlb.ConfigError) as exc:
            caught.append(exc)

    held = Held()
    async with scripted(failing(Fault.READ), held.upstream, panic=pathlb.Panic(fail_closed=True)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            await catch(client, extensions={"pathlb": {"pin": "http://a"}})
            await catch(client, extensions={"pathlb": {"pin": "http://b", "deadline": 0.01}})
            await catch(client, extensions={"pathlb": {"pin": "http://c"}})
            await catch(client, "http://evil.example")
            await catch(client, extensions={"pathlb": {"deadline": 0}})
    async with scripted(held.upstream, limits=pathlb.Limits(concurrency=1, queue=1, queue_timeout=0)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.get, "/")
                await anyio.wait_all_tasks_blocked()
                await catch(client)
                held.let_go(1)
    async with scripted(held.upstream, limits=pathlb.Limits(concurrency=1, queue=0)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.get, "/")
                await anyio.wait_all_tasks_blocked()
                await catch(client)
                held.let_go(1)
    return caught


async def test_they_survive_pickling_and_copying(stack: Stack) -> None:
    """Process pools, task queues and test runners send exceptions around."""
    caught = await all_errors(stack)
    assert [type(one).__name__ for one in caught] == [
        "ReadError",
        "DeadlineExceeded",
        "NoEligibleEndpoint",
        "UsageError",
        "ConfigError",
        "QueueTimeout",
        "QueueFull",
    ]
    for error in caught:
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(twin) is type(error)
            assert str(twin) == str(error)
            if isinstance(error, errors.PathlbError):
                assert twin.attempts == error.attempts
                assert twin.request.method == "POST"
            else:
                assert twin.field == error.field
    neutral = pickle.loads(pickle.dumps(UpstreamError(Fault.READ, Sent.NOT_SENT, "http://a", "x", local=True)))
    assert (neutral.fault, neutral.sent, neutral.local) == (Fault.READ, Sent.NOT_SENT, True)


async def test_every_message_says_what_to_look_at(stack: Stack) -> None:
    read, deadline, none, usage, config, waited, full = [str(one) for one in await all_errors(stack)]
    assert "http://a (pinned): ReadError: scripted after" in read
    assert "no reply from http://b before the deadline" in deadline
    assert "pinned to http://c" in none
    assert "http://evil.example" in usage
    assert 'extensions["pathlb"]["deadline"]' in config
    assert "raise Limits(concurrency=...)" in waited
    assert "raise Limits(queue=...)" in full


async def test_credentials_reach_no_error_snapshot_or_log(
    stack: Stack, fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="pathlb")
    secrets = ("s3cret", "hunter2", "t0ps3cret")
    told: list[str] = []
    with refused_url() as dead:
        async with stack.pathlb.AsyncClient(
            [dead, fleet.urls[0]],
            auth=("user", "hunter2"),
            headers={"X-Api-Key": "t0ps3cret"},
            cookies={"session": "s3cret"},
        ) as client:
            client.balancer.subscribe(lambda event: told.append(repr(event)))
            client.balancer.subscribe(lambda event: 1 / 0)
            await client.get("/?key=s3cret")
            # What a parser chokes on it quotes.
            with pytest.raises(stack.http.LocalProtocolError) as illegal:
                await client.get("/", headers={"Authorization": "Bearer s3cret\n"}, auth=None)
            told += [str(illegal.value), repr(illegal.value.attempts)]
            fleet[0].kill()
            with pytest.raises(stack.http.ConnectError) as refused:
                await client.post("/?key=s3cret")
            told += [str(refused.value), repr(refused.value), repr(refused.value.attempts)]
            told.append(str(client.balancer.snapshot().to_dict()))
    assert re.search("(?i)header value", str(illegal.value))
    told += [record.getMessage() for record in caplog.records if record.name.startswith("pathlb")]
    assert any("subscriber" in one for one in told)
    for one in told:
        assert not any(secret in one for secret in secrets), one


async def test_all_fail_in_different_ways_and_the_last_one_is_raised(stack: Stack) -> None:
    async with scripted(failing(Fault.READ), failing(Fault.CONNECT, Sent.NOT_SENT), policy=pathlb.RoundRobin()) as one:
        async with stack.pathlb.AsyncClient(one) as client:
            with pytest.raises(stack.http.HTTPError) as caught:
                await client.get("/")
    attempts = caught.value.attempts
    assert {attempt.outcome.detail for attempt in attempts} == {"ReadError: scripted", "ConnectError: scripted"}
    assert type(caught.value).__name__ in attempts[-1].outcome.detail


async def test_a_transports_own_exception_is_neither_wrapped_nor_retried(stack: Stack) -> None:
    """A bug is no fault of the network."""
    upstream = ScriptedUpstream([ZeroDivisionError("bug"), reply()])
    async with scripted(upstream, upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        with pytest.raises(ZeroDivisionError):
            await client.get("/")
        snapshot = balancer.snapshot()
    assert upstream.count == 1
    assert snapshot.in_flight == 0
    assert sum(one.counts["ignored"] for one in snapshot.endpoints) == 1

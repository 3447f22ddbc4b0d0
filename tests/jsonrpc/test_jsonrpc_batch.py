"""A batch in parts: order kept, each item answered once by its own answer, only what failed asked again."""

from __future__ import annotations

import gc
import gzip
import json
import random
import weakref
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonrpc_helpers import (
    FUZZ,
    JSON,
    A,
    B,
    C,
    Parts,
    Road,
    answer,
    attempt,
    call,
    error,
    header,
    layer,
    post,
    read,
    reply,
)

import pathlb
from pathlb.core.model import Sent
from pathlb.errors import DeadlineExceeded, Fault, NoEligibleEndpoint, UpstreamError
from pathlb.exchange import Headers, Reply, Request, WholeBody
from pathlb.jsonrpc import JSONRPC, JSONRPCLayer
from pathlb.testing import FakeClock, ScriptedUpstream

pytestmark = pytest.mark.anyio


def reads(*ids: Any, method: str = "eth_getBalance") -> list[dict[str, Any]]:
    return [call(method, f"0x{number}", id=number) for number in ids]


def payload(request: Request) -> list[dict[str, Any]]:
    assert isinstance(request.body, bytes)
    found: list[dict[str, Any]] = json.loads(request.body)
    return found


def asked(request: Request) -> list[Any]:
    return [item["id"] for item in payload(request)]


def answers(request: Request) -> Reply:
    """Every item answered by its own first parameter."""
    return reply([answer(item["id"], item["params"][0]) for item in payload(request)])


def lost(detail: str = "scripted") -> UpstreamError:
    return UpstreamError(Fault.READ, Sent.MAYBE_SENT, A, detail, attempts=[attempt(A)])


async def split(road: Road, batch: Any, size: int = 2, **options: Any) -> Reply:
    return await layer(road, split=size).send(post(batch, **options))


class TestParts:
    async def test_they_are_as_few_and_as_equal_as_possible(self) -> None:
        road = Road(answers)
        found = await read(await split(road, reads(*range(10)), size=4))
        assert sorted(map(asked, road.requests)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
        assert found == [answer(number, f"0x{number}") for number in range(10)]
        assert road.closed_once

    async def test_they_are_under_way_side_by_side(self) -> None:
        both = anyio.Event()

        async def handler(request: Request) -> Reply:
            if len(road.requests) == 2:
                both.set()
            await both.wait()
            return answers(request)

        road = Road(handler)
        assert len(await read(await split(road, reads(1, 2, 3)))) == 3

    async def test_each_is_the_request_with_less_in_it(self) -> None:
        road = Road(answers)
        headers: Headers = [(b"X-A", b"1"), (b"Content-Length", b"1000"), (b"Accept-Encoding", b"gzip, br")]
        whole = post(reads(1, 2, 3), headers, deadline=5.0, avoid=frozenset({C}), key="eth", idempotent=True, pin=A)
        await layer(road, split=2).send(whole)
        for part in road.requests:
            assert isinstance(part.body, bytes)
            assert part.headers == [
                (b"X-A", b"1"),
                (b"Content-Length", b"%d" % len(part.body)),
                (b"Accept-Encoding", b"gzip"),
            ]
            assert (part.deadline, part.avoid, part.key, part.idempotent, part.pin) == (5.0, {C}, "eth", True, A)
            assert (part.method, part.target) == ("POST", b"/v1")
        assert whole.headers == headers
        assert asked(whole) == [1, 2, 3]

    async def test_the_text_of_an_item_and_of_its_answer_is_not_rewritten(self) -> None:
        one = b'{"id" : 1, "method":"eth_call","params":[1.0, 123456789012345678901234567890, 1e5, "\\u00e9\xc3\xa9"]}'
        two = b'{"method":"eth_call","id":"b"}'
        told = {1: b'{ "id":1,"result":1.50000000000000000001e3}', "b": b'{"result":{"a":-0},"id":"b" }'}

        def handler(request: Request) -> Reply:
            assert request.body in (b"[" + one + b"]", b"[" + two + b"]")
            return reply(b" [ " + told[asked(request)[0]] + b" ] \n")

        road = Road(handler)
        found = await split(road, b" [" + one + b" ,\n" + two + b"]", size=1)
        assert isinstance(found.body, WholeBody)
        assert found.body.content == b"[" + told[1] + b"," + told["b"] + b"]"
        assert header(found, b"content-length") == b"%d" % len(found.body.content)

    @pytest.mark.parametrize(
        "batch",
        [
            reads(1, 2),
            [*reads(1, 2), call("eth_sendTransaction", id=3)],
            [*reads(1, 2), call("eth_newFilter", id=3)],
            [*reads(1, 2), call("eth_getFilterChanges", "0x1", id=3)],
            [*reads(1, 2), call("nobody_knows", id=3)],
            [*reads(1, 2), {"jsonrpc": "2.0", "method": "eth_call"}],
            reads(1, 2, None),
            reads(1, 2, 1.5),
            reads(1, 2, True),
            reads(1, 2, [3]),
            reads(1, 2, 2),
            [*reads(1, 2), 3],
            b'[{"id":1,"method":"eth_call"},{"id":2,"method":"eth_call"},{"id":3,"ID":4,"method":"eth_call"}]',
            b'[{"id":1,"method":"eth_call"},{"id":2,"method":"eth_call"},{"id":3,"id":4,"method":"eth_call"}]',
        ],
    )
    async def test_other_batches_go_out_whole(self, batch: Any) -> None:
        road = Road(lambda request: reply([]))
        request = post(batch)
        await layer(road, split=2).send(request)
        assert road.requests == [request]
        assert road.requests[0] is request

    @pytest.mark.parametrize(
        "name", [b"Idempotency-Key", b"Content-Digest", b"content-encoding", b"X-Flashbots-Signature"]
    )
    async def test_and_those_with_a_header_about_the_whole(self, name: bytes) -> None:
        road = Road(answers)
        await layer(road, split=2).send(post(reads(1, 2, 3), [*JSON, (name, b"x")]))
        assert len(road.requests) == 1

    async def test_ids_are_told_apart_by_their_type(self) -> None:
        road = Road(lambda request: reply([answer(item["id"], item["id"]) for item in reversed(payload(request))]))
        ids = [1, "1", 2, "2", "", 0, -5, 2**70]
        found = await read(await split(road, reads(*ids), size=3))
        assert found == [answer(key, key) for key in ids]
        assert len(road.requests) == 3


class TestReply:
    async def test_head_and_attempts(self) -> None:
        def handler(request: Request) -> Reply:
            first = asked(request)[0] == 1
            content = gzip.compress(json.dumps([answer(key) for key in asked(request)]).encode())
            coded: Headers = [(b"Content-Encoding", b"gzip"), (b"X-Part", b"1" if first else b"2")]
            return reply(content, headers=coded, attempts=[attempt(A), attempt(B)] if first else [attempt(C)])

        road = Road(handler)
        found = await split(road, reads(1, 2, 3, 4))
        assert [one.endpoint for one in found.attempts] == [A, B, C]
        assert (found.status, found.reason) == (200, b"OK")
        assert header(found, b"x-part") == b"1"
        assert header(found, b"content-encoding") is None
        assert isinstance(found.body, WholeBody)
        assert header(found, b"content-length") == b"%d" % len(found.body.content)
        assert await read(found) == [answer(key) for key in (1, 2, 3, 4)]

    @FUZZ
    @given(
        ids=st.lists(st.integers(-9, 9) | st.text("ab1", max_size=2), unique_by=repr, min_size=6),
        size=st.integers(1, 5),
        seed=st.integers(0),
    )
    async def test_every_item_is_answered_once_and_in_order(self, ids: list[Any], size: int, seed: int) -> None:
        """Whatever the endpoints answer: shuffled, twice, left out, somebody else's, garbage."""
        rngs: dict[Any, random.Random] = {}

        def handler(request: Request) -> Reply | Exception:
            # Parts run in any order: what one is answered must not depend on it.
            rng = rngs.setdefault(asked(request)[0], random.Random(f"{seed} {asked(request)[0]!r}"))
            kind = rng.choice(["answers"] * 6 + ["garbage", "object", "error", "raises", "breaks"])
            if kind == "garbage":
                return reply(rng.choice([b"", b"<html>", b"[", b'[{"id":1}', b"7", b"\xff"]))
            if kind == "object":
                return reply(error(None, "no batches"))
            if kind == "error":
                return reply([answer(key) for key in asked(request)], status=503)
            if kind == "raises":
                return lost()
            if kind == "breaks":
                return reply(b"", body=Parts(b'[{"id":', error=lost()))
            strangers = [None, 7.0, True, "stranger", [1], {}, 99]
            given = rng.choices(asked(request) * 2 + strangers, k=rng.randrange(2 * len(asked(request)) + 1))
            return reply([answer(key, ["for", key]) if key != {} else 5 for key in given])

        road = Road(handler)
        try:
            found = await split(road, reads(*ids), size=size)
        except UpstreamError:
            assert road.closed_once
            return
        assert road.closed_once
        content = await read(found)
        if found.status != 200 or isinstance(content, dict):  # no item had an answer
            return
        assert [(type(one["id"]), one["id"]) for one in content] == [(type(key), key) for key in ids]
        for one in content:
            assert one.get("result") == ["for", one["id"]] or one["error"]["code"] == -32603

    async def test_a_number_is_not_true(self) -> None:
        road = Road(lambda request: reply([answer(True), answer(1.0), answer("1")]))
        found = await read(await split(road, reads(1, 2), size=1))
        assert [one["error"]["code"] for one in found] == [-32603, -32603]


class TestAgain:
    async def test_only_what_was_left_out_is_asked_again_and_elsewhere(self) -> None:
        clock = FakeClock()

        def handler(request: Request) -> Reply:
            if asked(request) == [1, 2]:
                clock.advance(1.0)
                return reply([answer(2, "first")], attempts=[attempt(A), attempt(B)])
            return reply([answer(key, "second") for key in asked(request)], attempts=[attempt(C)])

        road = Road(handler)
        batch = layer(road, clock, split=3)
        found = await batch.send(post(reads(1, 2, 3, 4), deadline=9.0, avoid=frozenset({A})))
        content = await read(found)
        assert [one["result"] for one in content] == ["first" if one["id"] == 2 else "second" for one in content]
        assert sorted(map(asked, road.requests)) == [[1], [1, 2], [3, 4]]
        again = next(request for request in road.requests if asked(request) == [1])
        assert again.avoid == {A, B}
        assert again.deadline == 8.0  # what is left of it
        assert {one.endpoint for one in found.attempts} == {A, B, C}

    @pytest.mark.parametrize(
        "first",
        [
            lambda: reply(b""),
            lambda: reply(b"<html>"),
            lambda: reply(b'"x"'),
            lambda: reply(b"[", headers=[(b"Content-Encoding", b"br")]),
            lambda: reply(b"", body=Parts(b'[{"id":', error=lost())),
            lambda: reply([answer(1, "one"), answer(1, "other")]),
        ],
    )
    async def test_a_reply_that_cannot_be_used_is_asked_for_again(self, first: Any) -> None:
        replies = [first(), None]
        road = Road(lambda request: (asked(request) == [1] and replies.pop(0)) or answers(request))
        found = await read(await split(road, reads(1, 2), size=1))
        assert found == [answer(1, "0x1"), answer(2, "0x2")]
        assert len(road.requests) == 3
        assert road.closed_once

    async def test_once_and_no_more(self) -> None:
        road = Road(lambda request: answers(request) if asked(request) == [1] else reply([]))
        found = await read(await split(road, reads(1, 2), size=1))
        assert found[0] == answer(1, "0x1")
        assert found[1]["id"] == 2
        assert found[1]["error"] == {
            "code": -32603,
            "message": f"no answer: the reply left it out [tried {attempt(A)}; {attempt(A)}]",
            "data": {"status": 200},
        }
        assert len(road.requests) == 3

    async def test_not_if_the_caller_forbids_it(self) -> None:
        road = Road(lambda request: reply([]))
        found = await read(await split(road, reads(1, 2), size=1, idempotent=False))
        assert [one["id"] for one in found] == [1, 2]
        assert len(road.requests) == 2

    async def test_not_after_the_deadline(self) -> None:
        clock = FakeClock()

        def handler(request: Request) -> Reply:
            clock.advance(30.0)
            return Reply(200, JSON, WholeBody(b"[]"), attempts=(attempt(),))

        road = Road(handler)
        await layer(road, clock, split=1).send(post(reads(1, 2)))
        assert len(road.requests) == 2


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "message", "data"),
        [
            (lambda: reply(b"busy", status=503), f"no answer: status 503 [tried {attempt(A)}]", {"status": 503}),
            (lost, f"no answer: {A}: scripted [tried {attempt(A)}]", None),
            (lambda: NoEligibleEndpoint("all out"), "no answer: all out [tried ]", None),
            (
                lambda: reply(error(None, "batch too large")),
                f"no answer: the part was refused as a whole: batch too large [tried {attempt(A)}]",
                {"status": 200},
            ),
            (lambda: reply({}), f"no answer: the part was refused as a whole [tried {attempt(A)}]", {"status": 200}),
        ],
    )
    async def test_items_of_a_failed_part_get_an_error_the_others_their_answers(
        self, failure: Any, message: str, data: Any
    ) -> None:
        road = Road(lambda request: failure() if 1 in asked(request) else answers(request))
        found = await read(await split(road, reads("x", 1, 3, 4)))
        expected = {"code": -32603, "message": message} | ({"data": data} if data else {})
        assert found[:2] == [{"jsonrpc": "2.0", "id": key, "error": expected} for key in ("x", 1)]
        assert found[2:] == [answer(3, "0x3"), answer(4, "0x4")]
        assert len(road.requests) == 2
        assert road.closed_once

    async def test_when_all_fail_the_first_reply_is_returned_as_it_came(self) -> None:
        def handler(request: Request) -> Reply:
            name = str(asked(request)[0]).encode()
            return reply(gzip.compress(name), status=502, headers=[(b"Content-Encoding", b"gzip")])

        road = Road(handler)
        found = await split(road, reads(1, 2, 3, 4))
        assert found.status == 502
        assert header(found, b"content-encoding") == b"gzip"
        assert gzip.decompress(b"".join([part async for part in found.body])) == b"1"
        assert len(found.attempts) == 2
        assert road.closed_once

    async def test_or_what_was_raised_is_raised(self) -> None:
        errors = {1: lost("one"), 3: lost("three")}
        road = Road(lambda request: errors[asked(request)[0]])
        with pytest.raises(UpstreamError, match="one") as caught:
            await split(road, reads(1, 2, 3, 4))
        assert caught.value is errors[1]
        assert len(caught.value.attempts) == 2

    async def test_replies_that_nobody_can_read_are_errors_all(self) -> None:
        road = Road(lambda request: reply(b"[", headers=[(b"Content-Encoding", b"br"), (b"X", b"1")]))
        found = await split(road, reads(1, 2, 3))
        assert found.status == 200
        assert found.headers[0] == (b"Content-Type", b"application/json")
        assert header(found, b"x") is None
        content = await read(found)
        assert [one["id"] for one in content] == [1, 2, 3]
        assert all("'br' is not one that was asked for" in one["error"]["message"] for one in content)
        assert len(road.requests) == 4

    async def test_a_body_that_does_not_end_in_time_is_a_failure(self) -> None:
        def handler(request: Request) -> Reply:
            return reply(b"", body=Parts(b"[", held=anyio.Event())) if asked(request) == [1] else answers(request)

        clock = FakeClock()
        road = Road(handler)
        found = await layer(road, clock, split=1).send(post(reads(1, 2), deadline=0.001))
        content = await read(found)
        assert "did not end before the deadline" in content[0]["error"]["message"]
        assert content[1] == answer(2, "0x2")
        assert road.closed_once

    async def test_all_of_them_late(self) -> None:
        road = Road(lambda request: reply(b"", body=Parts(b"[", held=anyio.Event())))
        with pytest.raises(DeadlineExceeded) as caught:
            await split(road, reads(1, 2), size=1, deadline=0.001)
        assert len(caught.value.attempts) == 2
        assert road.closed_once

    async def test_a_bug_is_raised_as_it_is_and_ends_the_others(self) -> None:
        never = anyio.Event()
        bug = RuntimeError("a bug")

        async def handler(request: Request) -> Reply | Exception:
            if asked(request) == [3]:
                return bug
            if asked(request) == [1]:
                await never.wait()
            return reply(b"", body=Parts(b"[", held=never))

        road = Road(handler)
        with pytest.raises(RuntimeError) as caught:
            await split(road, reads(1, 2, 3), size=1)
        assert caught.value is bug
        assert road.closed_once

    async def test_failures_do_not_keep_themselves_alive(self) -> None:
        class Lost(UpstreamError):
            pass

        seen: list[weakref.ref[Lost]] = []

        def handler(request: Request) -> Exception:
            one = Lost(Fault.READ, Sent.MAYBE_SENT, A, "scripted")
            seen.append(weakref.ref(one))
            return one

        road = Road(handler)
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(Lost):
                await split(road, reads(1, 2), size=1)
            await anyio.lowlevel.checkpoint()
            assert [one() for one in seen] == [None, None]
        finally:
            gc.enable()


class TestCancellation:
    async def test_every_body_is_closed_and_no_task_is_left(self) -> None:
        never = anyio.Event()
        under_way = anyio.Event()
        ended = 0

        async def handler(request: Request) -> Reply:
            nonlocal ended
            if asked(request) == [1]:
                return answers(request)
            if asked(request) == [2]:
                return reply(b"", body=Parts(b"[", held=never))
            under_way.set()
            try:
                await never.wait()
            finally:
                ended += 1
            raise AssertionError("it never ends")

        road = Road(handler)
        async with anyio.create_task_group() as group:
            group.start_soon(split, road, reads(1, 2, 3), 1)
            await under_way.wait()
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert ended == 1
        assert len(road.bodies) == 2
        assert road.closed_once


class TestOverABalancer:
    async def test_a_part_that_fails_is_sent_elsewhere(self) -> None:
        def good(request: Request, extra: Headers) -> Reply:
            return answers(request)

        def bad(request: Request, extra: Headers) -> Reply:
            return Reply(503, [(b"content-length", b"0")], WholeBody(b""))

        upstreams = {A: ScriptedUpstream(bad), B: ScriptedUpstream(good), C: ScriptedUpstream(good)}
        factory = ScriptedUpstream.factory(upstreams)
        async with pathlb.Balancer(
            [A, B, C], policy=pathlb.RoundRobin(), upstream=factory, idempotent=True
        ) as balancer:
            wrapped = JSONRPCLayer(JSONRPC(split=3), balancer.send)
            found = await wrapped.send(post(reads(*range(9))))
            assert await read(found) == [answer(number, f"0x{number}") for number in range(9)]
            assert all(endpoint["in_flight"] == 0 for endpoint in balancer.snapshot().to_dict()["endpoints"])
        assert upstreams[A].count > 0
        assert upstreams[B].count + upstreams[C].count == 3
        assert len(found.attempts) == 3 + upstreams[A].count

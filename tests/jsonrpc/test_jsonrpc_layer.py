"""What is looked at and what goes straight on; sizes are checked before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
from jsonrpc_helpers import Road, answer, call, error, layer, post, read, reply

from pathlb.errors import RequestTooLarge
from pathlb.exchange import OneShotBody, Request

pytestmark = pytest.mark.anyio

EVERYTHING: dict[str, Any] = {
    "sticky_filters": True,
    "split": 2,
    "max_batch": 3,
    "max_body": 400,
    "resend_transactions": True,
}


async def _stream() -> Any:
    yield b"x" * 1000


class TestStraightOn:
    @pytest.mark.parametrize(
        "request_",
        [
            Request("GET", b"/v1/health", []),
            Request("PUT", b"/v1", [], b"x" * 1000),
            Request("POST", b"/v1", [], OneShotBody(_stream())),
            post(b""),
            post(call("eth_call", {"to": "0x1"})),
            post([call("eth_call", id=1), call("eth_call", id=2)]),
            post(b'[{"method":"eth_call",'),
            post(b"[{{{{{{"),
            post(b'[{"id":1},{"id":2},{"id":3}]'),
            post(b'{"method":"eth_newFilter"'),
            post(b'[{"method":"eth_newFilter",'),
            post(b'[{"method":"eth_newFilter","Method":"x"},{"method":"x","id":1}]'),
            post(b'{"id":1,"method":"eth_sendRawTransaction"'),
            post(b'{"id":1,"method":"x","params":["eth_sendRawTransaction"]}'),
        ],
        ids=lambda request: (
            f"{request.method} {request.body[:60]!r}" if isinstance(request.body, bytes) else "a stream"
        ),
    )
    async def test_requests_and_replies_are_not_touched(self, request_: Request) -> None:
        road = Road(lambda request: reply(answer(1)))
        found = await layer(road, **EVERYTHING).send(request_)
        assert road.requests[0] is request_
        assert found.body is road.bodies[0]
        assert found.body.closed == 0
        assert await read(found) == answer(1)
        assert road.closed_once

    async def test_with_nothing_set_everything_goes_straight_on(self) -> None:
        road = Road(lambda request: reply(answer(1)))
        large = post([call("eth_newFilter", id=number) for number in range(1000)])
        await layer(road).send(large)
        raw = post(call("eth_sendRawTransaction", "0x02"))
        await layer(road).send(raw)
        assert road.requests[0] is large
        assert road.requests[1] is raw

    async def test_what_the_road_raises_is_raised(self) -> None:
        road = Road(lambda request: RuntimeError("scripted"))
        for request in (post(call("eth_newFilter")), post(call("eth_sendRawTransaction", "0x02"))):
            with pytest.raises(RuntimeError, match="scripted"):
                await layer(road, **EVERYTHING).send(request)


class TestSizes:
    @pytest.mark.parametrize("payload", [call("eth_call", "x" * 400), [call("eth_call", "x" * 400)], [call("x" * 400)]])
    async def test_a_body_beyond_the_limit_is_not_sent(self, payload: Any) -> None:
        road = Road(lambda request: reply(answer(1)))
        with pytest.raises(RequestTooLarge, match=r"the body has \d+ bytes and the endpoints take 400 .*split"):
            await layer(road, max_body=400).send(post(payload))
        assert road.requests == []

    async def test_the_limit_itself_is_fine(self) -> None:
        road = Road(lambda request: reply([answer(1)]))
        request = post([call("eth_call", id=1), call("eth_sendTransaction", id=2)])
        assert isinstance(request.body, bytes)
        await layer(road, max_body=len(request.body), max_batch=2).send(request)
        assert road.requests == [request]

    @pytest.mark.parametrize("filters", [False, True])
    async def test_a_batch_beyond_the_limit_is_not_sent(self, filters: bool) -> None:
        road = Road(lambda request: reply(answer(1)))
        batch = [call("eth_newFilter" if filters else "eth_call", id=number) for number in range(4)]
        with pytest.raises(RequestTooLarge, match=r"the batch has 4 items and the endpoints take 3 .*split"):
            await layer(road, max_batch=3, sticky_filters=filters).send(post(batch))
        assert road.requests == []

    async def test_braces_are_not_items(self) -> None:
        road = Road(lambda request: reply([answer(1)]))
        request = post([call("eth_call", {"a": {"b": {}}}, "{{{")])
        await layer(road, max_batch=2).send(request)
        assert road.requests == [request]

    async def test_a_batch_in_parts_counts_by_its_parts(self) -> None:
        road = Road(lambda request: reply(error(None, "no")))
        reads = [call("eth_call", "x" * 50, id=number) for number in range(4)]
        await layer(road, split=2, max_batch=2, max_body=300).send(post(reads))
        assert len(road.requests) == 2

    async def test_a_part_beyond_the_limit_keeps_all_from_being_sent(self) -> None:
        road = Road(lambda request: reply([]))
        reads = [call("eth_call", "x" * (500 if number == 3 else 5), id=number) for number in range(4)]
        with pytest.raises(RequestTooLarge, match="the endpoints take 300"):
            await layer(road, split=2, max_body=300).send(post(reads))
        assert road.requests == []

    async def test_what_cannot_go_in_parts_counts_whole(self) -> None:
        road = Road(lambda request: reply([]))
        writes = [call("eth_sendTransaction", id=number) for number in range(4)]
        with pytest.raises(RequestTooLarge):
            await layer(road, split=2, max_batch=3).send(post(writes))
        assert road.requests == []

"""Calls for a filter go where it was made, for as long as it is known."""

from __future__ import annotations

import gzip
import json
from typing import Any

import anyio
import pytest
from jsonrpc_helpers import JSON, A, B, C, Parts, Road, answer, attempt, call, error, header, layer, post, read, reply

import pathlb
from pathlb.core.model import Sent
from pathlb.errors import DeadlineExceeded, Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request, WholeBody
from pathlb.jsonrpc import JSONRPC, JSONRPCLayer, Safety
from pathlb.jsonrpc.filters import CAPACITY, EXPIRY, FilterHomes
from pathlb.testing import FakeClock, ScriptedUpstream

pytestmark = pytest.mark.anyio

NEW = ["eth_newFilter", "eth_newBlockFilter", "eth_newPendingTransactionFilter"]
USES = ["eth_getFilterChanges", "eth_getFilterLogs", "eth_uninstallFilter"]


class Gateway:
    """Makes filters on the endpoint that is `next`, and answers everything from there, or from the pin."""

    def __init__(self) -> None:
        self.next = A
        self.made = 0
        self.road = Road(self.handle)

    def handle(self, request: Request) -> Reply:
        payload = self.road.payloads[-1]
        items = payload if isinstance(payload, list) else [payload]
        answers = [answer(item.get("id"), self._result(item)) for item in items]
        where = [attempt(C), attempt(request.pin or self.next)]
        return reply(answers if isinstance(payload, list) else answers[0], attempts=where)

    def _result(self, item: dict[str, Any]) -> Any:
        if not item["method"].startswith("eth_new"):
            return []
        self.made += 1
        return f"0x{self.made}"

    @property
    def pins(self) -> list[str | None]:
        return [request.pin for request in self.road.requests]


class TestStickiness:
    @pytest.mark.parametrize("new", NEW)
    @pytest.mark.parametrize("use", USES)
    async def test_a_filter_is_used_where_it_was_made(self, new: str, use: str) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        gateway.next = B
        made = await sticky.send(post(call(new, {})))
        assert await read(made) == answer(1, "0x1")
        assert header(made, b"content-length") == b"%d" % len(json.dumps(answer(1, "0x1")))
        gateway.next = C
        used = post(call(use, "0x1"))
        await read(await sticky.send(used))
        assert gateway.pins == [None, B]
        assert used.pin is None
        assert gateway.road.closed_once

    async def test_replies_to_uses_go_on_streaming(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        await sticky.send(post(call("eth_newFilter")))
        found = await sticky.send(post(call("eth_getFilterLogs", "0x1")))
        assert found.body is gateway.road.bodies[1]
        assert found.body.closed == 0

    async def test_the_callers_pin_wins(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        await sticky.send(post(call("eth_newFilter")))
        await sticky.send(post(call("eth_getFilterChanges", "0x1"), pin=C))
        await sticky.send(post(call("eth_uninstallFilter", "0x1"), pin=C))  # does nothing to the one on A
        await sticky.send(post(call("eth_getFilterChanges", "0x1")))
        assert gateway.pins == [None, C, C, A]

    @pytest.mark.parametrize(
        "params", [["0x2"], [], [1], [None], {"id": "0x1"}, ["0X1"], None], ids=lambda params: json.dumps(params)
    )
    async def test_unknown_filters_go_as_usual(self, params: Any) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        await sticky.send(post(call("eth_newFilter")))
        await sticky.send(post(call("eth_getFilterChanges") | {"params": params}))
        await sticky.send(post({"jsonrpc": "2.0", "id": 1, "method": "eth_getFilterChanges"}))
        assert gateway.pins == [None, None, None]

    async def test_methods_of_other_chains_can_be_added(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True, methods={"eth_pollFilter": Safety.FILTER})
        await sticky.send(post(call("eth_newFilter")))
        await sticky.send(post(call("eth_pollFilter", "0x1")))
        assert gateway.pins == [None, A]

    async def test_the_same_id_of_another_service_or_target_is_another_filter(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        eth: Headers = [*JSON, (b"target-service-id", b"eth")]
        poly: Headers = [*JSON, (b"Target-Service-Id", b"poly")]
        use = call("eth_getFilterChanges", "0x1")
        await sticky.send(post(call("eth_newFilter"), eth))
        for request in (post(use, eth), post(use, poly), post(use), post(use, eth, key="eth")):
            await sticky.send(request)
        elsewhere = post(use, eth)
        elsewhere.target = b"/v2"
        await sticky.send(elsewhere)
        await sticky.send(post(call("eth_newFilter"), key="bsc"))
        await sticky.send(post(call("eth_getFilterChanges", "0x2"), poly, key="bsc"))
        assert gateway.pins == [None, A, None, None, None, None, None, A]

    async def test_an_uninstalled_filter_is_forgotten(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        await sticky.send(post(call("eth_newFilter")))
        await sticky.send(post(call("eth_uninstallFilter", "0x1")))
        await sticky.send(post(call("eth_getFilterChanges", "0x1")))
        assert gateway.pins == [None, A, None]

    async def test_and_one_that_nobody_used_for_five_minutes(self) -> None:
        gateway, clock = Gateway(), FakeClock()
        sticky = layer(gateway.road, clock, sticky_filters=True)
        use = call("eth_getFilterChanges", "0x1")
        await sticky.send(post(call("eth_newFilter")))
        for seconds in (EXPIRY - 1, EXPIRY - 1, EXPIRY):
            clock.advance(seconds)
            await sticky.send(post(use))
        assert gateway.pins == [None, A, A, None]

    async def test_a_use_that_fails_does_not_keep_it(self) -> None:
        clock = FakeClock()
        replies = [
            reply(answer(1, "0x1")),
            reply(b"", status=503),
            UpstreamError(Fault.CONNECT, Sent.NOT_SENT, A, "scripted"),
            reply(answer(1, [])),
        ]
        road = Road(lambda request: replies.pop(0))
        sticky = layer(road, clock, sticky_filters=True)
        use = call("eth_getFilterChanges", "0x1")
        await sticky.send(post(call("eth_newFilter")))
        clock.advance(EXPIRY / 2)
        await sticky.send(post(use))
        with pytest.raises(UpstreamError):
            await sticky.send(post(use))
        clock.advance(EXPIRY / 2)
        await sticky.send(post(use))
        assert [request.pin for request in road.requests] == [None, A, A, None]


class TestMaking:
    @pytest.mark.parametrize(
        "made",
        [
            lambda: reply(error(1, "no filters here")),
            lambda: reply(answer(1, None)),
            lambda: reply(answer(2, "0x1")),
            lambda: reply(answer([1], "0x1")),
            lambda: reply(answer(None, "0x1")),
            lambda: reply(answer(1, "0x1"), status=500),
            lambda: reply(answer(1, "0x1"), headers=[(b"Content-Encoding", b"br")]),
            lambda: reply(b"0x1"),
            lambda: reply(b"7"),
            lambda: reply(b""),
        ],
    )
    async def test_replies_that_tell_no_id_are_as_they_came(self, made: Any) -> None:
        replies, expected = [made(), reply(answer(1, []))], made()
        road = Road(lambda request: replies.pop(0))
        sticky = layer(road, sticky_filters=True)
        found = await sticky.send(post(call("eth_newFilter")))
        assert (found.status, found.headers) == (expected.status, expected.headers)
        assert [part async for part in found.body] or expected.headers[1] == (b"Content-Length", b"0")
        await sticky.send(post(call("eth_getFilterChanges", "0x1")))
        assert [request.pin for request in road.requests] == [None, None]

    async def test_a_compressed_reply_is_read_and_handed_on_compressed(self) -> None:
        content = gzip.compress(json.dumps(answer(1, "0x1")).encode())
        replies = [reply(content, headers=[(b"Content-Encoding", b"gzip")]), reply(answer(1, []))]
        road = Road(lambda request: replies.pop(0))
        sticky = layer(road, sticky_filters=True)
        asked = post(call("eth_newFilter"), [*JSON, (b"Accept-Encoding", b"br, gzip")])
        found = await sticky.send(asked)
        assert header(road.requests[0], b"accept-encoding") == b"gzip"
        assert header(asked, b"accept-encoding") == b"br, gzip"
        assert header(found, b"content-encoding") == b"gzip"
        assert isinstance(found.body, WholeBody)
        assert found.body.content == content
        await sticky.send(post(call("eth_getFilterChanges", "0x1")))
        assert road.requests[1].pin == A

    async def test_a_notification_makes_no_filter_anybody_can_ask(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        found = await sticky.send(post({"jsonrpc": "2.0", "method": "eth_newFilter"}))
        assert found.body is gateway.road.bodies[0]

    async def test_a_reply_that_breaks_off_is_an_error(self) -> None:
        broken = UpstreamError(Fault.READ, Sent.MAYBE_SENT, A, "scripted")
        road = Road(lambda request: reply(b"", body=Parts(b"{", error=broken)))
        with pytest.raises(UpstreamError) as caught:
            await layer(road, sticky_filters=True).send(post(call("eth_newFilter")))
        assert caught.value.attempts == (attempt(),)
        assert road.closed_once

    async def test_a_reply_that_does_not_end_in_time_is_an_error(self) -> None:
        road = Road(lambda request: reply(b"", body=Parts(b"{", held=anyio.Event())))
        with pytest.raises(DeadlineExceeded, match="did not end before the deadline"):
            await layer(road, sticky_filters=True).send(post(call("eth_newFilter"), deadline=0.001))
        assert road.closed_once

    async def test_cancelling_closes_the_body(self) -> None:
        road = Road(lambda request: reply(b"", body=Parts(b"{", held=anyio.Event())))
        async with anyio.create_task_group() as group:
            group.start_soon(layer(road, sticky_filters=True).send, post(call("eth_newFilter")))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert len(road.bodies) == 1
        assert road.closed_once


class TestBatches:
    async def test_filters_made_in_a_batch_are_remembered(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        batch = [call("eth_newFilter", id=1), call("eth_call", id=2), call("eth_newBlockFilter", id="x")]
        found = await sticky.send(post(batch))
        assert await read(found) == [answer(1, "0x1"), answer(2, []), answer("x", "0x2")]
        gateway.next = B
        for used in ("0x1", "0x2"):
            await sticky.send(post([call("eth_getFilterChanges", used), call("eth_call", id=2)]))
        assert gateway.pins == [None, A, A]

    async def test_filters_of_two_endpoints_in_one_batch_cannot_be_right_anywhere(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True)
        for gateway.next in (A, B):
            await sticky.send(post(call("eth_newFilter")))
        gateway.next = C
        uses = [call("eth_getFilterChanges", "0x1", id=1), call("eth_uninstallFilter", "0x2", id=2)]
        await sticky.send(post(uses))
        assert gateway.pins == [None, None, None]
        for use in uses:
            await sticky.send(post([use]))
        assert gateway.pins[3:] == [A, B]

    async def test_a_batch_with_filters_is_not_split(self) -> None:
        gateway = Gateway()
        sticky = layer(gateway.road, sticky_filters=True, split=1)
        await sticky.send(post([call("eth_newFilter", id=1), call("eth_call", id=2)]))
        assert len(gateway.road.requests) == 1


class TestHomes:
    def test_no_more_than_ten_thousand_are_remembered(self) -> None:
        homes = FilterHomes(FakeClock())
        for number in range(CAPACITY):
            homes.put((None, b"/", str(number)), A)
        homes.put((None, b"/", "0"), B)  # used again: now the one used last
        homes.put((None, b"/", "more"), A)
        assert len(homes) == CAPACITY == 10_000
        assert homes.get((None, b"/", "0")) == B
        assert homes.get((None, b"/", "1")) is None
        assert homes.get((None, b"/", "2")) == A

    def test_what_has_expired_makes_room(self) -> None:
        clock = FakeClock()
        homes = FilterHomes(clock)
        for number in range(10):
            homes.put((None, b"/", str(number)), A)
        clock.advance(EXPIRY)
        homes.put((None, b"/", "new"), A)
        assert len(homes) == 1


class TestOverABalancer:
    async def test_filters_stay_on_their_endpoints(self) -> None:
        def answering(url: str) -> ScriptedUpstream:
            def handler(request: Request, extra: Headers) -> Reply:
                assert isinstance(request.body, bytes)
                method = json.loads(request.body)["method"]
                return reply(answer(1, f"id-{url}" if method == "eth_newFilter" else [url]))

            return ScriptedUpstream(handler)

        upstreams = {url: answering(url) for url in (A, B, C)}
        factory = ScriptedUpstream.factory(upstreams)
        async with pathlb.Balancer([A, B, C], policy=pathlb.RoundRobin(), upstream=factory) as balancer:
            wrapped = JSONRPCLayer(JSONRPC(sticky_filters=True), balancer.send)
            made = [(await read(await wrapped.send(post(call("eth_newFilter")))))["result"] for _ in range(3)]
            assert sorted(made) == [f"id-{url}" for url in (A, B, C)]
            for filter_id in made * 2:
                found = await read(await wrapped.send(post(call("eth_getFilterChanges", filter_id))))
                assert found["result"] == [filter_id.removeprefix("id-")]
            assert all(endpoint["in_flight"] == 0 for endpoint in balancer.snapshot().to_dict()["endpoints"])

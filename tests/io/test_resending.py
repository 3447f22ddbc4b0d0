"""What makes a request one that may be sent twice, when its body is looked into, and what follows from the answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
import tenacity
from io_helpers import Stack, reply, scripted, until

from pathlb import JSONRPC, Breaker, PATHProfile, Retry, RoundRobin, Safety
from pathlb.core.events import RetryRefused
from pathlb.core.model import Cause, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, OneShotBody, Reply, Request
from pathlb.jsonrpc import MethodRules
from pathlb.resending import ResendRule
from pathlb.testing import Fleet, Mode, ScriptedUpstream, ServiceMode, ServiceTime, refused_url

TRANSACTION = "0x02f8"
NO_WAIT = Retry(wait_base=0, wait_max=0, budget_reserve=1_000)


def call(method: str, *params: Any, id: int = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": list(params)}


READ = call("eth_getBalance", "0x1", "latest")
WRITE = call("eth_sendRawTransaction", TRANSACTION, id=2)


def body(payload: Any) -> bytes:
    return json.dumps(payload).encode()


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bodies that were looked into, in order."""
    seen: list[bytes] = []
    real = MethodRules.may_send_twice

    def noted(self: MethodRules, body: bytes) -> bool:
        seen.append(body)
        return real(self, body)

    monkeypatch.setattr(MethodRules, "may_send_twice", noted)
    return seen


def failing(status: int = 502) -> ScriptedUpstream:
    return ScriptedUpstream(lambda request, extra: reply(status))


def broken(sent: Sent = Sent.MAYBE_SENT, fault: Fault = Fault.READ) -> ScriptedUpstream:
    return ScriptedUpstream(lambda request, extra: UpstreamError(fault, sent, "http://x", "scripted"))


class TestTheRule:
    """Whoever is asked first and has an opinion decides; the others are not asked."""

    @staticmethod
    def resendable(idempotent: Any, request: Request, *, jsonrpc: bool = True) -> bool | str:
        rule = ResendRule(idempotent, MethodRules({}) if jsonrpc else None)
        answer = rule.resendable(request)
        return answer if isinstance(answer, bool) else f"by its body: {answer()}"

    @pytest.mark.parametrize(
        ("own", "balancer", "method", "headers", "payload", "expected"),
        [
            # the request itself
            (True, False, "POST", [], WRITE, True),
            (False, True, "GET", [(b"Idempotency-Key", b"1")], b"", False),
            (False, lambda request: True, "POST", [], READ, False),
            # the balancer
            (None, True, "POST", [], WRITE, True),
            (None, False, "GET", [], b"", False),
            (None, False, "POST", [(b"Idempotency-Key", b"1")], READ, False),
            (None, lambda request: True, "POST", [], WRITE, True),
            (None, lambda request: False, "POST", [], READ, False),
            (None, lambda request: 1, "POST", [], WRITE, True),
            (None, lambda request: 0, "GET", [], b"", False),
            # HTTP
            (None, None, "GET", [], b"", True),
            (None, lambda request: None, "GET", [], b"", True),
            (None, None, "PUT", [], WRITE, True),
            (None, None, "POST", [(b"idempotency-KEY", b"1")], WRITE, True),
            (None, None, "PATCH", [(b"Idempotency-Key", b"1")], b"{}", True),
            # JSON-RPC
            (None, None, "POST", [], READ, "by its body: True"),
            (None, None, "POST", [], WRITE, "by its body: False"),
            (None, lambda request: None, "POST", [], READ, "by its body: True"),
            (None, None, "POST", [(b"X-Idempotency-Key", b"1")], WRITE, "by its body: False"),
            (None, None, "PATCH", [], READ, False),
        ],
    )
    def test_the_order(
        self, own: bool | None, balancer: Any, method: str, headers: Headers, payload: Any, expected: bool | str
    ) -> None:
        content = payload if isinstance(payload, bytes) else body(payload)
        assert self.resendable(balancer, Request(method, b"/", headers, content, idempotent=own)) == expected

    def test_bodies_are_just_bytes_without_a_jsonrpc_setting(self) -> None:
        assert self.resendable(None, Request("POST", b"/", [], body(READ)), jsonrpc=False) is False

    def test_a_body_that_is_a_stream_never_whoever_says_so(self) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield body(READ)

        request = Request("GET", b"/", [(b"Idempotency-Key", b"1")], OneShotBody(parts()), idempotent=True)
        assert self.resendable(True, request) is False

    def test_the_function_is_asked_only_where_the_request_says_nothing(self) -> None:
        asked: list[Any] = []
        for own in (True, False, None):
            ResendRule(asked.append, None).resendable(Request("POST", b"/", [], expose="theirs", idempotent=own))
        assert asked == ["theirs"]
        ResendRule(asked.append, None).resendable(request := Request("POST", b"/", []))
        assert asked == ["theirs", request]

    def test_the_body_waits_for_the_question(self, parsed: list[bytes]) -> None:
        answer = ResendRule(None, MethodRules({})).resendable(Request("POST", b"/", [], body(READ)))
        assert parsed == []
        assert callable(answer)
        assert answer()
        assert parsed == [body(READ)]


@pytest.mark.anyio
class TestWhenTheBodyIsLookedInto:
    async def test_not_for_a_request_that_succeeds(self, stack: Stack, parsed: list[bytes]) -> None:
        upstream = ScriptedUpstream([reply(), reply(201), reply(404), reply(200)])
        async with scripted(upstream, jsonrpc=JSONRPC()) as balancer, stack.pathlb.AsyncClient(balancer) as client:
            statuses = [(await client.post("/", json=payload)).status_code for payload in (READ, WRITE, READ, [WRITE])]
        assert statuses == [200, 201, 404, 200]
        assert parsed == []

    @pytest.mark.parametrize(
        "strategy",
        [
            {"stop": tenacity.stop_after_attempt(3)},
            {"wait": tenacity.wait_none()},
            {"retry": tenacity.retry_if_exception_type(OSError)},
        ],
        ids=["stop", "wait", "retry"],
    )
    async def test_nor_where_the_caller_has_strategies(
        self, stack: Stack, parsed: list[bytes], strategy: dict[str, Any]
    ) -> None:
        upstream = ScriptedUpstream()
        async with scripted(upstream, jsonrpc=JSONRPC(), retry=Retry(**strategy)) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                await client.post("/", json=READ)
        assert parsed == []

    @pytest.mark.parametrize(("payload", "calls"), [(READ, 3), (WRITE, 1), ([READ, WRITE], 1), ([READ, READ], 3)])
    async def test_once_however_often_it_fails(
        self, stack: Stack, parsed: list[bytes], payload: Any, calls: int
    ) -> None:
        upstream = failing()
        async with scripted(upstream, upstream, upstream, jsonrpc=JSONRPC(), retry=NO_WAIT) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                response = await client.post("/", content=body(payload))
        assert response.status_code == 502
        assert upstream.count == calls
        assert parsed == [body(payload)]

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("GET", {}),
            ("PUT", {"json": WRITE}),
            ("POST", {"json": WRITE, "headers": {"Idempotency-Key": "1"}}),
            ("POST", {"json": WRITE, "extensions": {"pathlb": {"idempotent": True}}}),
            ("POST", {"json": READ, "extensions": {"pathlb": {"idempotent": False}}}),
            ("PATCH", {"json": READ}),
        ],
    )
    async def test_not_where_something_else_has_decided(
        self, stack: Stack, parsed: list[bytes], method: str, options: dict[str, Any]
    ) -> None:
        upstream = failing()
        async with scripted(upstream, upstream, jsonrpc=JSONRPC(), retry=NO_WAIT) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                await client.request(method, "/", **options)
        assert parsed == []

    @pytest.mark.parametrize(("payload", "given_up"), [(READ, True), (WRITE, False)])
    async def test_once_for_one_that_hangs_when_its_endpoint_is_taken_out(
        self, stack: Stack, parsed: list[bytes], payload: Any, given_up: bool
    ) -> None:
        hangs, recovers = anyio.Event(), anyio.Event()

        async def answer(request: Request, extra: Headers) -> Reply | UpstreamError:
            if request.target == b"/break":
                return UpstreamError(Fault.READ, Sent.MAYBE_SENT, "http://a", "scripted")
            hangs.set()
            await recovers.wait()
            return reply(body=b"late")

        bad, good = ScriptedUpstream(answer), ScriptedUpstream()
        responses: list[Any] = []
        breaker = Breaker(failures=1, open_for=60)
        async with scripted(
            bad, good, jsonrpc=JSONRPC(), policy=RoundRobin(), breaker=breaker, retry=NO_WAIT
        ) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:

                async def ask() -> None:
                    responses.append(await client.post("/", content=body(payload)))

                async with anyio.create_task_group() as group:
                    group.start_soon(ask)
                    await hangs.wait()
                    with pytest.raises(stack.http.ReadError):
                        await client.get("/break", extensions={"pathlb": {"pin": "http://a", "idempotent": False}})
                    if given_up:
                        await until(lambda: responses)
                    recovers.set()
        (response,) = responses
        causes = [attempt.outcome.cause for attempt in response.extensions["pathlb"]["attempts"]]
        assert causes == ([Cause.GIVEN_UP, Cause.OK] if given_up else [Cause.OK])
        assert response.content == (b"ok" if given_up else b"late")
        assert good.count == given_up
        assert parsed == [body(payload)]

    async def test_never_for_a_body_that_is_a_stream(self, stack: Stack, parsed: list[bytes]) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield body(READ)

        async def reading(request: Request, extra: Headers) -> Reply:
            assert isinstance(request.body, OneShotBody)
            async for _ in request.body:
                pass
            return reply(502)

        bad, good = ScriptedUpstream(reading), ScriptedUpstream()
        async with scripted(bad, good, jsonrpc=JSONRPC(), policy=RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                assert (await client.post("/", content=parts())).status_code == 502
        assert (bad.count, good.count) == (1, 0)
        assert parsed == []

    async def test_a_stream_goes_elsewhere_as_long_as_nobody_has_begun_to_send_it(
        self, stack: Stack, fleet: Fleet, parsed: list[bytes]
    ) -> None:
        async def parts() -> AsyncIterator[bytes]:
            yield body(WRITE)

        with refused_url() as dead:
            urls = [dead, fleet.urls[0]]
            async with stack.pathlb.AsyncClient(urls, jsonrpc=JSONRPC(), policy=RoundRobin()) as client:
                response = await client.post("/v1", content=parts())
        assert response.status_code == 200
        assert len(response.extensions["pathlb"]["attempts"]) == 2
        assert fleet[0].received()[0].body == body(WRITE)
        assert parsed == []


@pytest.mark.anyio
class TestWhatItMeans:
    """Over any JSON-RPC gateway."""

    @pytest.mark.parametrize(
        ("payload", "resent"),
        [
            (READ, True),
            (WRITE, False),
            ([READ, call("eth_call", {}, id=3)], True),
            ([READ, WRITE], False),
            ([WRITE], False),
            ([], False),
            ([READ, "eth_call"], False),
            (call("eth_newFilter", {}), False),
            (call("eth_getFilterChanges", "0x1"), False),
            (call("mychain_get"), False),
            ({"method": "eth_call", "Method": "eth_sendRawTransaction"}, False),
            (b"eth_call", False),
            (b"", False),
        ],
    )
    async def test_a_post_is_sent_again_if_all_it_does_is_read(self, stack: Stack, payload: Any, resent: bool) -> None:
        content = payload if isinstance(payload, bytes) else body(payload)
        for bad in (failing(), broken(), broken(fault=Fault.READ_TIMEOUT)):
            good = ScriptedUpstream()
            async with scripted(bad, good, jsonrpc=JSONRPC(), policy=RoundRobin()) as balancer:
                async with stack.pathlb.AsyncClient(balancer) as client:
                    try:
                        status = (await client.post("/", content=content)).status_code
                    except stack.http.HTTPError:
                        status = 0
            assert (status == 200) is resent
            assert (bad.count, good.count) == (1, resent)

    @pytest.mark.parametrize(
        ("methods", "payload", "resent"),
        [
            ({"my_read": Safety.READ}, call("my_read"), True),
            ({"my_read": Safety.READ}, call("my_reader"), False),
            ({"my_read": Safety.READ}, [call("my_read"), READ], True),
            ({"my_read": Safety.READ}, [call("my_read"), call("my_write")], False),
            ({"my_*": Safety.READ, "my_send*": Safety.WRITE}, call("my_read"), True),
            ({"my_*": Safety.READ, "my_send*": Safety.WRITE}, call("my_sendIt"), False),
            ({"eth_getBalance": Safety.WRITE}, READ, False),
            ({"eth_sendRawTransaction": Safety.READ}, WRITE, True),
            ({"my_read": Safety.READ}, WRITE, False),
        ],
    )
    async def test_a_table_of_ones_own_adds_to_it_and_replaces(
        self, stack: Stack, methods: dict[str, Safety], payload: Any, resent: bool
    ) -> None:
        bad, good = failing(), ScriptedUpstream()
        async with scripted(bad, good, jsonrpc=JSONRPC(methods=methods), policy=RoundRobin()) as balancer:
            async with stack.pathlb.AsyncClient(balancer) as client:
                response = await client.post("/", json=payload)
        assert response.status_code == (200 if resent else 502)
        assert (bad.count, good.count) == (1, resent)

    @pytest.mark.parametrize("payload", [READ, WRITE, [READ, WRITE], b"not JSON"])
    async def test_what_reached_nobody_goes_elsewhere_whatever_it_is(
        self, stack: Stack, fleet: Fleet, parsed: list[bytes], payload: Any
    ) -> None:
        content = payload if isinstance(payload, bytes) else body(payload)
        with refused_url() as dead:
            urls = [dead, fleet.urls[0]]
            async with stack.pathlb.AsyncClient(urls, jsonrpc=JSONRPC(), policy=RoundRobin()) as client:
                response = await client.post("/v1", content=content)
        assert response.status_code == 200
        first, second = response.extensions["pathlb"]["attempts"]
        assert (first.endpoint, first.outcome.sent) == (dead, Sent.NOT_SENT)
        assert second.endpoint == fleet.urls[0]
        assert [request.body for request in fleet[0].received()] == [content]
        assert parsed == []

    @pytest.mark.parametrize("fault", [{"mode": Mode.FAIL, "status": 502}, {"mode": Mode.RESET}], ids=["502", "reset"])
    @pytest.mark.parametrize(("payload", "resent"), [(READ, True), (WRITE, False)], ids=["read", "write"])
    async def test_on_sockets(
        self, stack: Stack, fleet: Fleet, fault: dict[str, Any], payload: Any, resent: bool
    ) -> None:
        fleet[0].set_mode(**fault)
        async with stack.pathlb.AsyncClient(fleet.urls[:2], jsonrpc=JSONRPC(), policy=RoundRobin()) as client:
            try:
                answered = (await client.post("/v1", json=payload)).status_code == 200
            except stack.http.TransportError:
                answered = False
        assert answered is resent
        assert [gateway.stats().requests for gateway in fleet] == [1, resent, 0]


@pytest.fixture
def gateways() -> Iterator[Fleet]:
    with Fleet(5, path=["eth"], service_time=ServiceTime.constant(0)) as fleet:
        yield fleet


@pytest.mark.anyio
class TestOverPATH:
    """Gateways that say whether they relayed a request, and retry by themselves."""

    @staticmethod
    async def ask(stack: Stack, urls: list[str], payload: Any) -> tuple[Any, list[str]]:
        """The response, meeting the gateways in their order, and why it was not sent again."""
        why: list[str] = []
        profile = PATHProfile(services=["eth"], probes=False)
        async with stack.pathlb.AsyncClient(urls, profile=profile, policy=RoundRobin(), retry=NO_WAIT) as client:
            client.balancer.subscribe(lambda event: why.append(event.why) if isinstance(event, RetryRefused) else None)
            return await client.post("/v1", json=payload), why

    async def test_a_write_that_was_not_relayed_goes_elsewhere(
        self, stack: Stack, gateways: Fleet, parsed: list[bytes]
    ) -> None:
        gateways[0].set_service("eth", ServiceMode.NO_SESSION)
        gateways[1].set_service("eth", ServiceMode.NOT_CONFIGURED)
        response, _ = await self.ask(stack, gateways.urls, WRITE)
        assert response.status_code == 200
        assert response.json()["result"].startswith("0x")
        outcomes = [attempt.outcome for attempt in response.extensions["pathlb"]["attempts"]]
        assert [(outcome.status, outcome.unprocessed) for outcome in outcomes] == [
            (500, True),
            (400, True),
            (200, False),
        ]
        assert gateways.transactions() == {TRANSACTION: 1}
        assert parsed == [], "nobody had to know"

    async def test_a_batch_with_a_write_does_not(self, stack: Stack, gateways: Fleet) -> None:
        """Whether all of its items were kept from the suppliers, the reply does not tell."""
        gateways[0].set_service("eth", ServiceMode.NO_SESSION)
        response, why = await self.ask(stack, gateways.urls, [READ, WRITE])
        assert response.status_code == 500
        assert len(response.extensions["pathlb"]["attempts"]) == 1
        assert why == ["not safe to send twice"]
        assert gateways.transactions() == {}

    async def test_a_batch_of_reads_does(self, stack: Stack, gateways: Fleet) -> None:
        gateways[0].set_service("eth", ServiceMode.NO_SESSION)
        response, _ = await self.ask(stack, gateways.urls, [READ, call("eth_blockNumber", id=3)])
        assert response.status_code == 200
        assert {item["id"] for item in response.json()} == {1, 3}
        assert len(response.extensions["pathlb"]["attempts"]) == 2

    @pytest.mark.parametrize("mode", [ServiceMode.SUPPLIERS_FAIL, ServiceMode.RATE_LIMITED, ServiceMode.EMPTY])
    async def test_a_write_that_was_relayed_does_not(self, stack: Stack, gateways: Fleet, mode: ServiceMode) -> None:
        gateways[0].set_service("eth", mode)
        response, why = await self.ask(stack, gateways.urls, WRITE)
        assert len(response.extensions["pathlb"]["attempts"]) == 1
        assert why == ["not safe to send twice"]
        assert gateways.transactions().total() == (mode is not ServiceMode.RATE_LIMITED)

    @pytest.mark.parametrize(
        ("mode", "single", "batch"),
        [
            (ServiceMode.SUPPLIERS_FAIL, 500, 200),
            (ServiceMode.RATE_LIMITED, 429, 429),
            (ServiceMode.EMPTY, 200, 200),
        ],
    )
    @pytest.mark.parametrize("payload", [READ, [READ, call("eth_blockNumber", id=3)]], ids=["single", "batch"])
    async def test_where_suppliers_fail_one_other_gateway_is_asked(
        self, stack: Stack, gateways: Fleet, mode: ServiceMode, single: int, batch: int, payload: Any
    ) -> None:
        """They are the same suppliers behind all gateways, and each asks two of them for every call already."""
        gateways.set_service("eth", mode)
        response, why = await self.ask(stack, gateways.urls, payload)
        assert response.status_code == (single if isinstance(payload, dict) else batch)
        attempts = response.extensions["pathlb"]["attempts"]
        assert [attempt.endpoint for attempt in attempts] == gateways.urls[:2]
        assert why == ["it fails beyond the endpoints, and a second one has tried"]
        relays = [gateway.stats().relays for gateway in gateways]
        assert relays == ([2, 2, 0, 0, 0] if isinstance(payload, dict) else [4, 4, 0, 0, 0])

    async def test_one_in_all_not_one_of_each_kind(self, stack: Stack, gateways: Fleet) -> None:
        gateways[0].set_service("eth", ServiceMode.RATE_LIMITED)
        gateways[1].set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        response, _ = await self.ask(stack, gateways.urls, READ)
        outcomes = [attempt.outcome for attempt in response.extensions["pathlb"]["attempts"]]
        assert [(outcome.cause, outcome.status) for outcome in outcomes] == [(Cause.BEYOND, 429), (Cause.BEYOND, 500)]

    async def test_faults_of_the_gateways_do_not_count_towards_it(self, stack: Stack, gateways: Fleet) -> None:
        gateways[0].set_mode(Mode.FAIL, status=502)
        gateways[1].set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        gateways[2].set_service("eth", ServiceMode.NO_SESSION)
        response, _ = await self.ask(stack, gateways.urls, READ)
        assert response.status_code == 200
        causes = [attempt.outcome.cause for attempt in response.extensions["pathlb"]["attempts"]]
        assert causes == [Cause.INSTANCE, Cause.BEYOND, Cause.SERVICE, Cause.OK]

    async def test_the_second_may_succeed(self, stack: Stack, gateways: Fleet) -> None:
        gateways[0].set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        response, why = await self.ask(stack, gateways.urls, READ)
        assert response.status_code == 200
        assert response.headers["x-gateway"] == "gateway-1"
        assert why == []

    async def test_the_callers_word_counts_there_too(self, stack: Stack, gateways: Fleet) -> None:
        """Whoever says that a transaction may be sent twice has it sent twice."""
        gateways[0].set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        profile = PATHProfile(services=["eth"], probes=False)
        async with stack.pathlb.AsyncClient(gateways.urls, profile=profile, policy=RoundRobin()) as client:
            response = await client.post("/v1", json=WRITE, extensions={"pathlb": {"idempotent": True}})
        assert response.status_code == 200
        assert gateways.transactions() == {TRANSACTION: 2}

    @pytest.mark.parametrize(("method", "attempts"), [("my_read", 2), ("my_write", 1), ("eth_call", 2)])
    @pytest.mark.parametrize("where", ["profile", "client"])
    async def test_a_table_of_ones_own_extends_the_profile(
        self, stack: Stack, gateways: Fleet, where: str, method: str, attempts: int
    ) -> None:
        gateways[0].set_service("eth", ServiceMode.SUPPLIERS_FAIL)
        jsonrpc = JSONRPC(methods={"my_read": Safety.READ})
        settings: dict[str, Any] = {"profile": PATHProfile(services=["eth"], probes=False), "jsonrpc": jsonrpc}
        if where == "profile":
            settings = {"profile": PATHProfile(services=["eth"], probes=False, jsonrpc=jsonrpc)}
        async with stack.pathlb.AsyncClient(gateways.urls, policy=RoundRobin(), **settings) as client:
            response = await client.post("/v1", json=call(method))
        assert len(response.extensions["pathlb"]["attempts"]) == attempts

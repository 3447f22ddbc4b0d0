"""Every row of the table of what is seen of PATH (reference/path-gateway.md), and the rows that PATH's source adds.

In: what a gateway answers, or how it fails to, over real sockets. Out: whose fault that is, what the breakers of the
instance and of the service on it make of it, and whether a read and a write are sent elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from pathkit import (
    NO_RESPONSE,
    PATIENCE,
    at_rest,
    attempts_of,
    breakers,
    call,
    endpoint,
    of_service,
    of_this_process,
    path_client,
    path_error,
    path_headers,
    try_to,
)

import pathlb
from pathlb import JSONRPC, Breaker, PATHProfile, Retry
from pathlb.classify import Outcome, PATHClassifier
from pathlb.core.model import Cause, Sent
from pathlb.exchange import Attempt, Reply, Request, WholeBody
from pathlb.testing import (
    FaultServer,
    Fin,
    Fleet,
    Mode,
    Read,
    ReadRequest,
    Reset,
    Send,
    ServiceMode,
    ServiceTime,
    black_hole,
    http_reply,
    refused_url,
)

pytestmark = pytest.mark.anyio

SERVICES = ("eth", "solana")
INSTANT = ServiceTime.constant(0)
_transactions = (f"0xf86c{number:08x}" for number in itertools.count())

# What a breaker makes of it.
AT_ONCE, COUNTED, NO = "opens at once", "counts a failure", "counts no failure"


# --- gateways that do one thing


@dataclass(frozen=True)
class Bad:
    """A gateway that does it."""

    url: str
    fleet: Fleet | None = None


Making = Callable[[], AbstractContextManager[Bad]]


def of_service_mode(mode: ServiceMode) -> Making:
    @contextlib.contextmanager
    def make() -> Iterator[Bad]:
        with Fleet(1, path=SERVICES, service_time=INSTANT) as fleet:
            fleet.set_service("eth", mode)
            yield Bad(fleet.urls[0], fleet)

    return make


def of_mode(mode: Mode, **options: Any) -> Making:
    @contextlib.contextmanager
    def make() -> Iterator[Bad]:
        with Fleet(1, path=SERVICES, service_time=INSTANT) as fleet:
            fleet[0].set_mode(mode, **options)
            yield Bad(fleet.urls[0], fleet)

    return make


def at_address(address: Callable[[], AbstractContextManager[str]]) -> Making:
    @contextlib.contextmanager
    def make() -> Iterator[Bad]:
        with address() as url:
            yield Bad(url)

    return make


@contextlib.contextmanager
def ends_without_reply() -> Iterator[Bad]:
    with FaultServer(lambda index: [ReadRequest(), Fin()]) as server:
        yield Bad(server.url)


def answering(status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> Making:
    """A reply that no mode of the fleet gives, to every request."""

    @contextlib.contextmanager
    def make() -> Iterator[Bad]:
        with FaultServer(lambda index: [ReadRequest(), Send(http_reply(status, body, headers))] * 20) as server:
            yield Bad(server.url)

    return make


def not_relayed(status: int, body: bytes) -> Making:
    return answering(status, body, path_headers())


def relayed(status: int, body: bytes, content_type: bytes = b"application/json") -> Making:
    return answering(status, body, [(b"Content-Type", content_type), *path_headers("pokt1a,pokt1b", 1)[1:]])


NORMAL = of_service_mode(ServiceMode.OK)


# --- requests, each as a read and as a write

Asking = Callable[[bool], dict[str, Any]]


def relay(write: bool) -> dict[str, Any]:
    body = call("eth_sendRawTransaction", next(_transactions)) if write else call()
    return {"method": "POST", "url": "/v1", "json": body, "headers": of_service("eth")}


def batch(write: bool) -> dict[str, Any]:
    asked = relay(write)
    return asked | {"json": [asked["json"], call("eth_chainId", id=2)]}


def oversized_batch(write: bool) -> dict[str, Any]:
    asked = relay(write)
    return asked | {"json": [asked["json"]] * 5501}


def streamed_batch(write: bool) -> dict[str, Any]:
    """One that nobody here has read."""
    content = json.dumps(oversized_batch(write)["json"]).encode()

    async def parts() -> AsyncIterator[bytes]:
        yield content

    return {"method": "POST", "url": "/v1", "content": parts(), "headers": of_service("eth")}


def other(method: str, url: str, headers: dict[str, str] | None = None, **options: Any) -> Asking:
    """A request that says itself whether it may be sent twice."""
    sent = of_service("eth") if headers is None else headers

    def ask(write: bool) -> dict[str, Any]:
        extensions = {"pathlb": {"idempotent": not write}}
        return {"method": method, "url": url, "headers": sent, "extensions": extensions, **options}

    return ask


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "a" * 24,
}


# --- the table


@dataclass(frozen=True)
class Case:
    """One way in which a row comes about. `read` and `write`: whether it is sent elsewhere."""

    name: str
    bad: Making
    cause: Cause
    status: int | None = None
    key: str | None = None
    instance: str = NO
    service: str = NO
    read: bool = False
    write: bool = False
    once: bool = False
    ask: Asking = relay
    healthy: Making = NORMAL
    connect: float = PATIENCE
    read_timeout: float = PATIENCE

    @property
    def sent(self) -> Sent:
        return Sent.NOT_SENT if self.instance == AT_ONCE else Sent.MAYBE_SENT


def of_the_service(name: str, bad: Making, *, write: bool, ask: Asking = relay, **options: Any) -> Case:
    """The session state of this pod for this service."""
    options = {"status": 500, "service": COUNTED} | options
    return Case(name, bad, Cause.SERVICE, key="eth", read=True, write=write, ask=ask, **options)


def of_suppliers(name: str, bad: Making, status: int | None = 500, **options: Any) -> Case:
    """No breaker's business; a read goes to one other gateway."""
    return Case(name, bad, Cause.BEYOND, status, read=True, once=True, **options)


def of_the_request(name: str, bad: Making, status: int, **options: Any) -> Case:
    return Case(name, bad, Cause.REQUEST, status, **options)


NOT_CONFIGURED = (
    b'{"error":{"code":-32600,"data":{"available_services":["solana"],"service_id":"eth"},'
    b'"message":"Service \'eth\' is not configured"},"id":null,"jsonrpc":"2.0"}'
)
INCOMPLETE = "batch response length mismatch: expected 2 responses, got 1"
NO_OP = b'{"error":"no responses","msg":"no-op qos service error: no responses received from any service endpoints"}'
FULL = b"too many concurrent websocket connections\n"
TEXT = [(b"Content-Type", b"text/plain; charset=utf-8")]

TABLE: dict[str, list[Case]] = {
    "connect refused / timed out | instance down | yes, at once | yes, writes too": [
        Case("refused", at_address(refused_url), Cause.INSTANCE, instance=AT_ONCE, read=True, write=True),
        Case("timed out", at_address(black_hole), Cause.INSTANCE, instance=AT_ONCE, read=True, write=True, connect=0.3),
    ],
    "EOF or reset after sending | crash, shutdown | yes | reads": [
        Case("EOF", ends_without_reply, Cause.INSTANCE, instance=COUNTED, read=True),
        Case("reset", of_mode(Mode.RESET), Cause.INSTANCE, instance=COUNTED, read=True),
    ],
    "read timeout | usually slow suppliers | only as an outlier against peers | reads, on budget": [
        Case("one service", of_service_mode(ServiceMode.HANG), Cause.BEYOND, read=True, read_timeout=0.4),
        Case("all of it", of_mode(Mode.HANG), Cause.BEYOND, read=True, read_timeout=0.4),
    ],
    "5xx without X-Suppliers-Tried | something in between | yes | yes": [
        # Yes, but nobody knows what became of a write.
        Case(str(status), of_mode(Mode.FAIL, status=status), Cause.INSTANCE, status, instance=COUNTED, read=True)
        for status in (500, 501, 502, 503, 504, 520)
    ],
    "500, code -31001/-31002, suppliers empty | this pod's session state for this service | per (instance, service) "
    "| yes": [
        of_the_service("no session", of_service_mode(ServiceMode.NO_SESSION), write=True),
        *(
            of_the_service(why, not_relayed(500, path_error(why)), write=True)
            for why in (
                "no valid endpoints available for service: service eth",
                "ZERO owned apps found for service: eth",
                "no endpoints could be selected from 5 available endpoints",
                "failed to build protocol context for any of the 5 selected endpoints",
            )
        ),
        # Only what is known to come before the relay proves that there was none.
        of_the_service("unknown cause", not_relayed(500, path_error("rpc error: code = Unavailable")), write=False),
        of_the_service("no cause", not_relayed(500, NO_RESPONSE), write=False),
        of_the_service("-31002", not_relayed(500, path_error("empty response", code=-31002)), write=False),
        of_the_service("of a batch", of_service_mode(ServiceMode.NO_SESSION), write=False, ask=batch),
    ],
    "500, -31001/-31002, suppliers listed | supplier fault, PATH retried already | no, outlier only | reads, once": [
        of_suppliers("-31001", of_service_mode(ServiceMode.SUPPLIERS_FAIL)),
        of_suppliers("-31002", relayed(500, path_error("empty response", code=-31002))),
        of_suppliers("its text says otherwise", relayed(500, path_error("no valid endpoints available for service"))),
        of_suppliers("a supplier's own 502", relayed(502, b"<html>Bad Gateway</html>", b"text/html"), 502),
    ],
    "500 for a body over 75 MiB or an oversized batch | request | no | no": [
        of_the_request(
            "body", not_relayed(500, path_error("request body exceeds 104857600 bytes limit", id=None)), 500
        ),
        of_the_request("batch", NORMAL, 500, ask=oversized_batch),
        of_the_request("batch, streamed", NORMAL, 500, ask=streamed_batch),
        of_the_request(
            "batch for Solana",
            not_relayed(500, path_error("protocol-level error: no endpoint responses received", id=None)),
            500,
            ask=oversized_batch,
        ),
    ],
    '400 / -32600, 400 {"code":400,...}, 404, 405 | request | no | no': [
        of_the_request("-32600, no JSON", NORMAL, 400, ask=other("POST", "/v1", content=b"{")),
        of_the_request("-32600, empty batch", NORMAL, 400, ask=other("POST", "/v1", content=b"[]")),
        of_the_request("-32600, RPC type", NORMAL, 400, ask=other("GET", "/v1")),
        of_the_request("code 400, no service", NORMAL, 400, ask=other("POST", "/v1", {}, json=call())),
        of_the_request("404", NORMAL, 404, ask=other("POST", "/v2", json=call())),
        of_the_request("405", NORMAL, 405, ask=other("POST", "/health", json=call())),
        of_the_request("405 for HEAD", NORMAL, 405, ask=other("HEAD", "/health")),
        of_the_request("a supplier's 400", relayed(400, b'{"error":"bad request"}'), 400),
        of_the_request("a supplier's 403", relayed(403, b"forbidden", b"text/plain"), 403),
    ],
    "400 \"Service 'x' is not configured\" | this instance lacks the service | mark incapable of it | yes": [
        Case(
            "not configured",
            of_service_mode(ServiceMode.NOT_CONFIGURED),
            Cause.SERVICE,
            400,
            "eth",
            service=AT_ONCE,
            read=True,
            write=True,
        ),
    ],
    "429 | supplier rate limit passed through | no | reads, once": [
        Case("429", of_service_mode(ServiceMode.RATE_LIMITED), Cause.BEYOND, 429, read=True, once=True),
    ],
    "200 with a JSON-RPC error | the chain's verdict | no | no": [
        Case("reverted", of_service_mode(ServiceMode.CHAIN_ERROR), Cause.OK, 200),
    ],
    "200 with an empty body (Solana, Cosmos) | supplier | no | reads": [
        of_suppliers("one call", of_service_mode(ServiceMode.EMPTY), 200),
        of_suppliers("a batch that lost all items", of_service_mode(ServiceMode.SUPPLIERS_FAIL), 200, ask=batch),
    ],
}

ADDED: dict[str, list[Case]] = {
    "500, an EVM batch lost some items | suppliers": [
        of_suppliers(
            "incomplete",
            not_relayed(500, path_error(INCOMPLETE).replace(b"internal error:", b"Failed to marshal batch response:")),
            ask=batch,
        ),
    ],
    "500 -31001 after a relay whose supplier is not listed (max_parallel_endpoints) | suppliers": [
        of_suppliers(why, not_relayed(500, path_error(why)))
        for why in (
            "relay: error sending relay for service eth endpoint pokt1a-https://a.example: timeout",
            "relay request failed with status code 503 after 2 attempts",
            "hedge race response failed heuristic check",
            "no endpoints available for retry",
        )
    ],
    "500 that no supplier is listed for and PATH has not made | suppliers": [
        of_suppliers("passed on", not_relayed(500, b'{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"message":"x"}}')),
        of_suppliers("no JSON", not_relayed(503, b"<html>"), 503),
    ],
    "500 of a NoOp service | suppliers": [
        of_suppliers("listed", relayed(500, NO_OP, b"text/plain")),
        of_suppliers("not listed", answering(500, NO_OP, [*TEXT, *path_headers()[1:]])),
    ],
    "400 of a supplier in PATH's words | its verdict on the request": [
        of_the_request("not configured", relayed(400, NOT_CONFIGURED), 400),
    ],
    "200 with -31002 for an item of a Solana batch | answered": [
        Case("200", relayed(200, b"[%b]" % path_error("x", code=-31002)), Cause.OK, 200, ask=batch),
    ],
    "200 empty without PATH's headers, to an upgrade | refused, by this instance for this service": [
        of_the_service(
            "refused",
            NORMAL,
            status=200,
            write=True,
            ask=other("GET", "/v1", {**UPGRADE, **of_service("eth")}),
            healthy=answering(200, b"ok", TEXT),
        ),
        of_the_request("of no service", NORMAL, 200, ask=other("GET", "/v1", UPGRADE)),
    ],
    "503 to an upgrade, WebSockets at their cap | no more of these": [
        Case(
            "full",
            answering(503, FULL, TEXT),
            Cause.OVERLOAD,
            503,
            "eth",
            read=True,
            write=True,
            ask=other("GET", "/v1", {**UPGRADE, **of_service("eth")}),
            healthy=answering(200, b"ok", TEXT),
        ),
        # In between they are not, but something is.
        Case(
            "other 503",
            answering(503, b"no healthy upstream", TEXT),
            Cause.INSTANCE,
            503,
            instance=COUNTED,
            read=True,
            ask=other("GET", "/v1", {**UPGRADE, **of_service("eth")}),
            healthy=answering(200, b"ok", TEXT),
        ),
    ],
    "429 without PATH's headers | something in between asks for less": [
        Case("429", of_mode(Mode.THROTTLE, retry_after="0"), Cause.OVERLOAD, 429, read=True),
    ],
    "200 empty without PATH's headers, to anything else | answered": [
        Case("OPTIONS", answering(200, b"", []), Cause.OK, 200, ask=other("OPTIONS", "/v1")),
    ],
}

CASES = [
    pytest.param(case, id=f"{row} [{case.name}]")
    for table in (TABLE, ADDED)
    for row, cases in table.items()
    for case in cases
]


# --- the tests


def client_of(case: Case, urls: Sequence[str], prefer: str, **options: Any) -> pathlb.AsyncClient:
    """Two failures open a breaker; nobody is compared, and nothing refused before it is sent."""
    return path_client(
        urls,
        prefer=prefer,
        connect=case.connect,
        read=case.read_timeout,
        breaker=Breaker(failures=2),
        outlier=None,
        profile=PATHProfile(services=SERVICES, probes=False, jsonrpc=JSONRPC()),
        **options,
    )


async def send(client: pathlb.AsyncClient, asked: dict[str, Any]) -> httpx.Response | httpx.HTTPError:
    return await try_to(lambda: client.request(**asked))


async def connect(client: pathlb.AsyncClient, urls: Sequence[str]) -> None:
    """So that no short timeout strikes at the healthy ones."""
    for url in urls:
        response = await client.get("/health", extensions={"pathlb": {"pin": url}})
        assert response.status_code == 200


def check_first(case: Case, attempt: Attempt, bad: Bad) -> None:
    outcome = attempt.outcome
    assert attempt.endpoint == bad.url
    assert outcome.status == case.status
    if of_this_process(outcome):
        return
    assert (outcome.cause, outcome.key, outcome.sent) == (case.cause, case.key, case.sent), outcome


def check_elsewhere(result: httpx.Response | httpx.HTTPError, *, elsewhere: bool, bad: Bad) -> None:
    attempts = attempts_of(result)
    assert [attempt.endpoint == bad.url for attempt in attempts] == [True, False][: len(attempts)]
    assert len(attempts) == (2 if elsewhere else 1)
    if elsewhere:
        assert isinstance(result, httpx.Response)
        assert result.status_code == 200


@pytest.mark.parametrize("case", CASES)
async def test_a_read(case: Case) -> None:
    with case.bad() as bad, case.healthy() as healthy:
        async with client_of(case, [bad.url, healthy.url], bad.url) as client:
            await connect(client, [healthy.url])
            seen: list[tuple[str, str]] = []
            local = False
            for _ in range(1 if AT_ONCE in (case.instance, case.service) else 3):
                result = await send(client, case.ask(False))
                first = attempts_of(result)[0]
                if COUNTED in (case.instance, case.service) and len(seen) == 2:
                    assert first.endpoint == healthy.url
                else:
                    check_first(case, first, bad)
                    check_elsewhere(result, elsewhere=case.read, bad=bad)
                local |= of_this_process(first.outcome)
                seen.append(breakers(client.balancer, bad.url))
            opens = {AT_ONCE: ["open"], COUNTED: ["closed", "open", "open"], NO: ["closed"] * 3}
            if not local:  # then it counted for nothing
                assert [instance for instance, _ in seen] == opens[case.instance][: len(seen)]
                assert [service for _, service in seen] == opens[case.service][: len(seen)]
            # Whatever it was: the other services know nothing of it.
            assert breakers(client.balancer, bad.url, "solana")[1] == "closed"
            assert breakers(client.balancer, healthy.url) == ("closed", "closed")
            await at_rest(client.balancer)


@pytest.mark.parametrize("case", CASES)
async def test_a_write(case: Case) -> None:
    asked = case.ask(True)
    with case.bad() as bad, case.healthy() as healthy:
        async with client_of(case, [bad.url, healthy.url], bad.url) as client:
            await connect(client, [healthy.url])
            result = await send(client, asked)
            check_first(case, attempts_of(result)[0], bad)
            check_elsewhere(result, elsewhere=case.write, bad=bad)
            await at_rest(client.balancer)
        reached: Counter[str] = sum((one.fleet.transactions() for one in (bad, healthy) if one.fleet), Counter())
        assert set(reached.values()) <= {1}
        if case.write and "json" in asked:
            assert reached[asked["json"]["params"][0]] == 1


@pytest.mark.parametrize("case", CASES)
async def test_all_gateways_alike(case: Case) -> None:
    """What fails beyond the gateways is tried on one more; what fails on them, on each."""
    with contextlib.ExitStack() as stack:
        bad = [stack.enter_context(case.bad()) for _ in range(3)]
        async with client_of(case, [one.url for one in bad], bad[0].url) as client:
            attempts = attempts_of(await send(client, case.ask(False)))
            tried = {attempt.endpoint for attempt in attempts}
            assert len(tried) == (2 if case.once else 3 if case.read else 1)
            assert len(attempts) == len(tried) or case.sent is Sent.NOT_SENT
            write = attempts_of(await send(client, case.ask(True)))
            if not case.write:
                assert len(write) == 1
            if case.status is not None:
                assert {attempt.outcome.status for attempt in attempts} == {case.status}
            await at_rest(client.balancer)


async def test_a_read_timeout_is_retried_on_budget_only() -> None:
    (case, _) = TABLE["read timeout | usually slow suppliers | only as an outlier against peers | reads, on budget"]
    with case.bad() as bad, NORMAL() as healthy:
        retry = Retry(budget_ratio=0, budget_reserve=0)
        async with client_of(case, [bad.url, healthy.url], bad.url, retry=retry) as client:
            result = await send(client, relay(False))
            assert isinstance(result, httpx.ReadTimeout)
            assert len(attempts_of(result)) == 1


async def test_an_answer_for_a_service_is_the_instances_success() -> None:
    """It ends a row of failures of the instance's own: it is at work."""
    with Fleet(1, path=SERVICES, service_time=INSTANT) as fleet:
        case = Case("no retries", NORMAL, Cause.OK)
        async with client_of(case, fleet.urls, fleet.urls[0], retry=Retry(attempts=1)) as client:
            for mode, service in [
                (Mode.FAIL, ServiceMode.OK),
                (Mode.OK, ServiceMode.NO_SESSION),
                (Mode.FAIL, ServiceMode.OK),
            ]:
                fleet[0].set_mode(mode)
                fleet[0].set_service("eth", service)
                await send(client, relay(True))
            assert breakers(client.balancer, fleet.urls[0]) == ("closed", "closed")
            assert endpoint(client.balancer, fleet.urls[0]).breaker.consecutive_failures == 1


async def test_a_connection_that_ends_between_two_requests_is_nobodys_fault() -> None:
    with (
        FaultServer(lambda index: [ReadRequest(), Send(http_reply()), Read(1), Reset()]) as server,
        NORMAL() as healthy,
    ):
        bad = Bad(server.url)
        async with client_of(Case("", NORMAL, Cause.OK), [bad.url, healthy.url], bad.url) as client:
            assert len(attempts_of(await send(client, relay(False)))) == 1
            result = await send(client, relay(False))
            check_elsewhere(result, elsewhere=True, bad=bad)
            assert attempts_of(result)[0].outcome.cause is Cause.LOCAL
            assert breakers(client.balancer, bad.url) == ("closed", "closed")


def test_what_is_kept_of_answers_is_bounded() -> None:
    classifier = PATHClassifier()
    request = Request("POST", b"/v1", [(b"Target-Service-Id", b"eth")], b"{}")
    for number in range(5_000):
        reply = Reply(200, path_headers(f"pokt1{number}", number), WholeBody(b"{}"))
        outcome = classifier.reply(request, reply)
        assert isinstance(outcome, Outcome)
        assert (outcome.cause, outcome.relays) == (Cause.OK, number + 1)
    assert len(classifier._answers) <= 1_000


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"x" * (75 * 2**20 + 1), "bytes"),
        (json.dumps([call()] * 5501).encode(), "5501"),
    ],
    ids=["body", "batch"],
)
async def test_what_path_does_not_take_is_not_even_sent(body: bytes, why: str) -> None:
    with Fleet(1, path=SERVICES, service_time=INSTANT) as fleet:
        async with path_client(fleet.urls, SERVICES) as client:
            with pytest.raises(pathlb.RequestTooLarge, match=why):
                await client.post("/v1", content=body, headers=of_service("eth"))
        assert fleet[0].stats().requests == 0

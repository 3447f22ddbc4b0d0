"""Looking into the beginning of a body takes nothing from its reader, and a body that is not asked for is not read."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator, Sequence
from typing import Any

import anyio
import httpx
import pytest
from pathkit import (
    PATIENCE,
    Events,
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
    until,
)

import pathlb
from pathlb import Balancer
from pathlb.classify import Cause, HTTPClassifier, NeedBody, Outcome, PATHClassifier
from pathlb.core.events import BodyFailed, BreakerChanged, Observed
from pathlb.exchange import Reply, Request, Timeouts
from pathlb.testing import FaultServer, Fin, Hang, ReadRequest, Reset, Send, WaitFor, http_reply
from pathlb.testing.faults import Step

pytestmark = pytest.mark.anyio

left_to_collect = pytest.mark.filterwarnings("ignore:Async generator '(httpcore|httpx|pathlb):ResourceWarning")
"""On trio httpcore reads bodies with async generators within each other. Whoever leaves a body half-read leaves them to
the garbage collector, which trio warns of; plain httpx does the same.
"""

READ = call()
WRITE = call("eth_sendRawTransaction", "0xf86c")
NO_SESSION = path_error("no valid endpoints available for service: service eth")
LONG = bytes(range(256)) * 1_000
PREFIX = 8_192
"""What PATHClassifier asks for."""


def head(status: int, *headers: tuple[bytes, bytes]) -> bytes:
    """The head of an answer of PATH's whose meaning is in the body."""
    fields = b"".join(b"%b: %b\r\n" % field for field in [*path_headers(), *headers])
    return b"HTTP/1.1 %d X\r\n%b\r\n" % (status, fields)


CHUNKED = (b"Transfer-Encoding", b"chunked")


def length(body: bytes) -> tuple[bytes, bytes]:
    return b"Content-Length", b"%d" % len(body)


def chunks(body: bytes, size: int = 1_000, *, end: bool = True) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + (b"0\r\n\r\n" if end else b"")


@contextlib.contextmanager
def serving(*steps: Step) -> Iterator[FaultServer]:
    """The same on every connection."""
    with FaultServer(lambda index: [ReadRequest(), *steps]) as server:
        yield server


@contextlib.contextmanager
def answering(wire: bytes) -> Iterator[FaultServer]:
    """The same to every request, on connections that stay open where the reply has an end of its own."""
    framed = b"Content-Length:" in wire or b"Transfer-Encoding:" in wire
    with FaultServer(lambda index: [ReadRequest(), Send(wire)] * (9 if framed else 1)) as server:
        yield server


@contextlib.contextmanager
def healthy() -> Iterator[FaultServer]:
    with FaultServer(
        lambda index: [ReadRequest(), Send(http_reply(200, b"healthy", path_headers("pokt1a")))] * 9
    ) as one:
        yield one


def client_of(bad: FaultServer, *others: FaultServer, **options: Any) -> pathlb.AsyncClient:
    return path_client([bad.url, *(other.url for other in others)], prefer=bad.url, **options)


def post(client: pathlb.AsyncClient, body: Any, **options: Any) -> Any:
    return client.post("/v1", json=body, headers=of_service("eth"), **options)


async def left_nothing(client: pathlb.AsyncClient) -> None:
    """Nothing is in flight, and no connection is in use."""
    await at_rest(client.balancer)
    for upstream in client.balancer._upstreams.values():
        connections: Any = getattr(upstream, "_open", None)
        if connections is None:
            pool = upstream._transport._pool  # type: ignore[attr-defined]
            assert not [one for one in pool.connections if not one.is_idle() and not one.is_closed()]
        else:
            assert {one.state.value for one in connections} <= {"idle", "closed"}


# --- whole bodies

BODIES = {
    "chunked, long": (head(500, CHUNKED) + chunks(LONG), LONG),
    "chunked, in tiny pieces": (head(500, CHUNKED) + chunks(LONG[:3_000], 1), LONG[:3_000]),
    "length, long": (head(500, length(LONG)) + LONG, LONG),
    "until the end of the connection": (head(500) + LONG, LONG),
    "just as long as is looked at": (head(500, CHUNKED) + chunks(LONG[:PREFIX]), LONG[:PREFIX]),
    "one byte more": (head(500, CHUNKED) + chunks(LONG[: PREFIX + 1]), LONG[: PREFIX + 1]),
    "short": (head(500, length(NO_SESSION)) + NO_SESSION, NO_SESSION),
    "empty": (head(500, length(b"")), b""),
    "empty, chunked": (head(500, CHUNKED) + chunks(b""), b""),
    "of a 400": (head(400, CHUNKED) + chunks(LONG), LONG),
}


@pytest.mark.parametrize("case", BODIES)
async def test_the_caller_gets_every_byte(case: str) -> None:
    wire, body = BODIES[case]
    with answering(wire) as server:
        async with client_of(server) as client:
            response = await post(client, WRITE)
            assert response.content == body
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as streamed:
                assert b"".join([part async for part in streamed.aiter_raw()]) == body
            await left_nothing(client)


@pytest.mark.parametrize("pause_after", [0, 1, 100, PREFIX - 1, PREFIX, PREFIX + 1, 20_000])
async def test_a_body_that_comes_in_two_pieces(pause_after: int) -> None:
    """The verdict waits for as much as was asked for, the reply for no more than that."""
    first, rest = LONG[:pause_after], LONG[pause_after:]
    steps = [Send(head(500, length(LONG)) + first), WaitFor("the rest"), Send(rest), Fin()]
    with serving(*steps) as server:
        async with client_of(server) as client:
            if pause_after >= PREFIX:
                async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as response:
                    assert response.status_code == 500
                    server.set("the rest")
                    assert await response.aread() == LONG
            else:
                events = Events(client.balancer)
                async with anyio.create_task_group() as group:

                    async def ask() -> None:
                        assert (await post(client, WRITE)).content == LONG

                    group.start_soon(ask)
                    await until(lambda: server.requests)
                    await anyio.wait_all_tasks_blocked()
                    assert events.of(Observed) == []
                    server.set("the rest")
            await left_nothing(client)


@pytest.mark.parametrize("coding", ["gzip", "x-gzip"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_compressed_error_is_understood(coding: str, chunked: bool) -> None:
    packed = gzip.compress(NO_SESSION)
    encoding = (b"Content-Encoding", coding.encode())
    framing, sent = (CHUNKED, chunks(packed, 10)) if chunked else (length(packed), packed)
    with answering(head(500, encoding, framing) + sent) as server, healthy() as other:
        async with client_of(server, other) as client:
            response = await post(client, WRITE)
            assert response.content == b"healthy"
            first = attempts_of(response)[0].outcome
            assert (first.cause, first.key, first.unprocessed) == (Cause.SERVICE, "eth", True)
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as streamed:
                assert b"".join([part async for part in streamed.aiter_raw()]) == packed
            await left_nothing(client)


async def test_a_compressed_error_is_read_as_any_other() -> None:
    packed = gzip.compress(NO_SESSION)
    with answering(head(500, (b"Content-Encoding", b"gzip"), length(packed)) + packed) as server:
        async with client_of(server) as client:
            assert (await post(client, WRITE)).content == NO_SESSION


@pytest.mark.parametrize("encoding", [b"br", b"gzip, br", b"gzip"])
async def test_what_cannot_be_read_is_the_suppliers(encoding: bytes) -> None:
    """`gzip` that is none, and codings that are unknown here, reach the caller as they came."""
    with answering(head(500, (b"Content-Encoding", encoding), length(NO_SESSION)) + NO_SESSION) as server:
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as streamed:
                assert attempts_of(streamed)[-1].outcome.cause is Cause.BEYOND
                assert b"".join([part async for part in streamed.aiter_raw()]) == NO_SESSION


# --- bodies that break off

BROKEN: dict[str, Sequence[Step]] = {
    "reset within the prefix": [Send(head(500, length(LONG)) + LONG[:100]), WaitFor("read"), Reset()],
    "reset before the body": [Send(head(500, length(LONG))), WaitFor("read"), Reset()],
    "end within the prefix": [Send(head(500, length(LONG)) + LONG[:100]), Fin()],
    "end within a chunk": [Send(head(500, CHUNKED) + b"64\r\nabc"), Fin()],
    "no last chunk": [Send(head(500, CHUNKED) + chunks(LONG[:100], end=False)), Fin()],
    "no chunk size": [Send(head(500, CHUNKED) + b"ZZ\r\n"), Fin()],
}


@pytest.mark.parametrize("case", BROKEN)
async def test_broken_off_within_the_prefix(case: str) -> None:
    """There is no verdict and no reply yet: it is a failure of the instance like any other before the head."""
    with serving(*BROKEN[case]) as server, healthy() as other:
        server.set("read")
        async with client_of(server, other) as client:
            response = await post(client, READ)
            assert response.content == b"healthy"
            first = attempts_of(response)[0].outcome
            assert (first.cause, first.status) == (Cause.INSTANCE, None)
            written = await try_to(lambda: post(client, WRITE))
            assert isinstance(written, httpx.ReadError | httpx.RemoteProtocolError)
            assert [attempt.endpoint for attempt in attempts_of(written)] == [server.url]
            assert endpoint(client.balancer, server.url).counts["failed"] == 2
            assert breakers(client.balancer, server.url)[1] == "closed"
            await left_nothing(client)


@pytest.mark.parametrize("kind", ["read", "write"])
async def test_broken_off_after_the_prefix(kind: str) -> None:
    """The reply has been handed over: the reader is told, and the instance is charged once more."""
    body = READ if kind == "read" else WRITE
    steps = [Send(head(500, length(LONG)) + LONG[:20_000]), WaitFor("read"), Reset()]
    with serving(*steps) as server:
        async with client_of(server, retry=pathlb.Retry(attempts=1)) as client:
            events = Events(client.balancer)
            async with client.stream("POST", "/v1", json=body, headers=of_service("eth")) as response:
                assert response.status_code == 500
                received = b""
                server.set("read")
                error: httpx.HTTPError | None = None
                try:
                    async for part in response.aiter_raw():
                        received += part
                except httpx.HTTPError as exc:
                    error = exc
            assert isinstance(error, httpx.ReadError | httpx.RemoteProtocolError)
            assert LONG.startswith(received)
            assert len(received) >= PREFIX, "what was looked at comes first"
            assert [attempt.endpoint for attempt in attempts_of(error)] == [server.url]
            (failed,) = events.of(BodyFailed)
            assert failed.outcome.cause is Cause.INSTANCE
            await left_nothing(client)


@pytest.mark.parametrize("sent", [0, 100])
async def test_a_body_that_stalls_within_the_prefix_ends_with_the_read_timeout(sent: int) -> None:
    with serving(Send(head(500, length(LONG)) + LONG[:sent]), Hang()) as server, healthy() as other:
        async with client_of(server, other, read=0.3) as client:
            response = await client.get("/health", extensions={"pathlb": {"pin": other.url}})  # it is connected
            result = await try_to(lambda: post(client, READ))
            first = attempts_of(result)[0].outcome
            assert first.cause is Cause.BEYOND or of_this_process(first)
            assert attempts_of(result)[1].endpoint == other.url
            written = await try_to(lambda: post(client, WRITE))
            assert isinstance(written, httpx.ReadTimeout)
            assert len(attempts_of(written)) == 1
            assert breakers(client.balancer, server.url) == ("closed", "closed")
            await left_nothing(client)
            assert response.status_code == 200


async def test_a_body_that_stalls_within_the_prefix_ends_with_the_deadline() -> None:
    with serving(Send(head(500, length(LONG)) + LONG[:100]), Hang()) as server:
        async with client_of(server) as client:
            result = await try_to(lambda: post(client, READ, extensions={"pathlb": {"deadline": 0.3}}))
            assert isinstance(result, pathlb.DeadlineExceeded)
            assert len(attempts_of(result)) == 1
            await left_nothing(client)


async def test_a_body_that_trickles_ends_with_the_deadline() -> None:
    """No read timeout strikes while bytes keep coming."""
    trickle = [step for index in range(100) for step in (Send(LONG[index : index + 1]), WaitFor(f"never {index}"))]
    with serving(Send(head(500, length(LONG))), *trickle) as server:
        async with client_of(server, read=PATIENCE) as client:
            async with anyio.create_task_group() as group:

                async def feed() -> None:
                    for index in range(100):
                        server.set(f"never {index}")
                        await anyio.sleep(0.01)

                group.start_soon(feed)
                result = await try_to(lambda: post(client, WRITE, extensions={"pathlb": {"deadline": 0.3}}))
                group.cancel_scope.cancel()
            assert isinstance(result, pathlb.DeadlineExceeded)
            await left_nothing(client)


async def test_cancelled_while_the_prefix_is_read() -> None:
    with serving(Send(head(500, length(LONG)) + LONG[:100]), Hang()) as server:
        async with client_of(server) as client:
            async with anyio.create_task_group() as group:
                for _ in range(5):
                    group.start_soon(post, client, READ)
                await until(lambda: len(server.requests) == 5)
                await anyio.wait_all_tasks_blocked()
                assert client.balancer.snapshot().in_flight == 5
                group.cancel_scope.cancel()
            await left_nothing(client)
            assert endpoint(client.balancer, server.url).counts["failed"] == 0
            assert endpoint(client.balancer, server.url).counts["ignored"] == 5


@left_to_collect
async def test_left_after_the_prefix_was_read() -> None:
    """The reply is dropped half-read, or not read at all."""
    steps = [Send(head(500, length(LONG)) + LONG[:20_000]), Hang()]
    with serving(*steps) as server:
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")):
                assert client.balancer.snapshot().in_flight == 1
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as response:
                async for _ in response.aiter_raw():
                    break
            await left_nothing(client)


async def test_through_the_balancer_itself() -> None:
    with answering(head(500, CHUNKED) + chunks(LONG)) as server:
        async with Balancer([server.url], profile=pathlb.PATHProfile(services=["eth"], probes=False)) as balancer:
            body = b'{"jsonrpc":"2.0","id":1,"method":"eth_sendRawTransaction","params":["0x1"]}'
            timeouts = Timeouts(PATIENCE, PATIENCE, PATIENCE)
            request = Request("POST", b"/v1", [(b"Content-Length", b"%d" % len(body))], body, timeouts=timeouts)
            reply = await balancer.send(request)
            assert balancer.snapshot().in_flight == 1
            assert b"".join([part async for part in reply.body]) == LONG
            assert [part async for part in reply.body] == [], "once"
            await reply.body.aclose()
            await reply.body.aclose()
            assert balancer.snapshot().in_flight == 0


# --- what is not asked for


@pytest.mark.parametrize("status", [200, 403])
async def test_replies_are_never_read_ahead(status: int) -> None:
    """Piece by piece, each as it is sent; the connection is kept."""
    pieces = [b"%d" % number * 5_000 for number in range(5)]
    steps: list[Step] = [Send(head(status, CHUNKED))]
    for number, piece in enumerate(pieces):
        steps += [WaitFor(f"piece {number}"), Send(chunks(piece, 5_000, end=False))]
    steps += [WaitFor("end"), Send(b"0\r\n\r\n"), ReadRequest(), Send(http_reply())]
    with serving(*steps) as server:
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=READ, headers=of_service("eth")) as response:
                assert response.status_code == status
                parts = response.aiter_raw()
                for number, piece in enumerate(pieces):
                    server.set(f"piece {number}")
                    received = b""
                    while len(received) < len(piece):
                        received += await anext(parts)
                    assert received == piece
                server.set("end")
                assert [part async for part in parts] == []
            assert (await post(client, READ)).content == b"ok"
            assert server.connections == 1
            await left_nothing(client)


async def test_a_reply_of_which_no_byte_has_come_is_handed_over() -> None:
    with serving(Send(head(200, CHUNKED)), WaitFor("body"), Send(chunks(b"later"))) as server:
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=READ, headers=of_service("eth")) as response:
                assert response.status_code == 200
                server.set("body")
                assert await response.aread() == b"later"


@pytest.mark.parametrize("status", [429, 500, 502])
async def test_nor_is_a_failure_whose_head_decides(status: int) -> None:
    """Suppliers are listed: the caller of a write has the head at once."""
    fields = b"".join(b"%b: %b\r\n" % field for field in path_headers("pokt1a,pokt1b", 1))
    wire = b"HTTP/1.1 %d X\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (status, fields)
    with serving(Send(wire), WaitFor("body"), Send(chunks(LONG))) as server:
        async with client_of(server) as client:
            async with client.stream("POST", "/v1", json=WRITE, headers=of_service("eth")) as response:
                assert response.status_code == status
                server.set("body")
                assert await response.aread() == LONG


# --- classifiers of one's own


class Backend(HTTPClassifier):
    """The one in pathlb.classify's docstring."""

    def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
        if reply.status != 500:
            return self.by_head(reply)
        if body is None:
            return NeedBody(1024)
        if b"backend" in body:  # the gateway is fine, what is behind it is not
            return Outcome(Cause.BEYOND, retry=True, once=True, status=500)
        return self.by_head(reply)


@left_to_collect
@pytest.mark.parametrize(
    ("body", "cause"),
    [
        (b"the backend is down", Cause.BEYOND),
        (b"x" * 1017 + b"backend" + LONG, Cause.BEYOND),
        (b"x" * 1018 + b"backend" + LONG, Cause.INSTANCE),
        (b"out of memory", Cause.INSTANCE),
    ],
    ids=["short", "at the end of what is looked at", "just beyond", "other"],
)
async def test_the_classifier_of_the_documentation(body: bytes, cause: Cause) -> None:
    with answering(head(500, CHUNKED) + chunks(body, 100)) as server, healthy() as other:
        urls = [server.url, other.url]
        async with pathlb.AsyncClient(urls, classifier=Backend(), timeout=PATIENCE) as client:
            with anyio.fail_after(PATIENCE):
                response = await client.get("/", extensions={"pathlb": {"avoid": [other.url]}})
            assert response.content == b"healthy"
            assert [attempt.outcome.cause for attempt in attempts_of(response)] == [cause, Cause.OK]
        async with pathlb.AsyncClient([server.url], classifier=Backend(), timeout=PATIENCE) as client:
            response = await client.post("/")
            assert response.content == body
            await left_nothing(client)


@left_to_collect
@pytest.mark.parametrize("needed", [True, False], ids=["the body", "the head"])
async def test_a_classifier_that_raises(needed: bool) -> None:
    """The error is the caller's, nothing is left open, and no endpoint is to blame."""

    class Broken(PATHClassifier):
        def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
            if needed and body is None:
                return NeedBody(100)
            raise LookupError("a bug")

    with serving(Send(head(500, length(LONG)) + LONG), Hang()) as server:
        async with client_of(server, classifier=Broken()) as client:
            events = Events(client.balancer)
            for body in (READ, WRITE):
                with anyio.fail_after(PATIENCE), pytest.raises(LookupError, match="a bug"):
                    await post(client, body)
            assert [one.outcome.cause for one in events.of(Observed)] == [Cause.LOCAL] * 2
            assert events.of(BreakerChanged) == []
            assert len(server.requests) == 2
            await left_nothing(client)


@left_to_collect
async def test_a_classifier_that_asks_twice() -> None:
    class Greedy(PATHClassifier):
        def reply(self, request: Request, reply: Reply, body: bytes | None = None) -> Outcome | NeedBody:
            return NeedBody(100)

    with serving(Send(head(500, length(LONG)) + LONG), Hang()) as server:
        async with client_of(server, classifier=Greedy()) as client:
            with (
                anyio.fail_after(PATIENCE),
                pytest.raises(pathlb.UsageError, match=r"Greedy\.reply asked for the body"),
            ):
                await post(client, READ)
            assert len(server.requests) == 1
            await left_nothing(client)


async def test_a_classifier_whose_word_on_failures_raises() -> None:
    class Broken(PATHClassifier):
        def failure(self, request: Request, error: pathlb.UpstreamError) -> Outcome:
            raise LookupError("a bug")

    with serving(Reset()) as server:
        async with client_of(server, classifier=Broken()) as client:
            with anyio.fail_after(PATIENCE), pytest.raises(LookupError, match="a bug"):
                await post(client, READ)
            await left_nothing(client)

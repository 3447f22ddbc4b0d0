"""Every row of the fault table (reference/faults.md) that a client can meet, on real sockets.

One bad endpoint beside two healthy ones; every first attempt meets the bad one. A GET ends in the right reply or in a
typed error before its deadline; a POST is not seen twice unless it provably was not sent; nothing is left over.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import anyio
import pytest
from faultkit import (
    PATIENCE,
    STACKS,
    Events,
    Stack,
    at_rest,
    endpoint,
    nothing_left,
    open_connections,
    request_id,
    seen_by,
    until,
)

import pathlb
from pathlb import Breaker, Outlier, Retry
from pathlb.core.events import BodyFailed, BreakerChanged, Ejected, Retried
from pathlb.core.model import Cause, Sent
from pathlb.testing import (
    FaultServer,
    Fin,
    Fleet,
    HalfClose,
    Hang,
    Mode,
    Read,
    ReadRequest,
    Reset,
    Script,
    Send,
    SendSlowly,
    ServiceTime,
    WaitFor,
    black_hole,
    http_reply,
    refused_url,
)
from pathlb.testing.faults import Step, _Channel

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BOMB = gzip.compress(bytes(10_000_000))


@dataclass(frozen=True)
class Flood(Step):
    """Informational replies, as long as the client takes them, `at_once` of them every 0.01 seconds."""

    at_once: int = 10

    def play(self, channel: _Channel) -> None:
        while True:
            channel.sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n" * self.at_once)
            channel.wait(lambda: False, 0.01)


@dataclass(frozen=True)
class Row:
    """A fault and what a GET and a POST that meet it first come to.

    `healthy`: the reply of a healthy endpoint. `bad`: the reply of the bad one, which is right. Anything else is the
    name of an httpx error; `|` separates what may come.
    """

    name: str
    script: Callable[[int], Script]
    get: str
    post: str
    read: float = 0.5
    """The read timeout, short where it is what ends the attempt."""

    @property
    def least_charged(self) -> int:
        """Of three attempts: a timeout may be this process's own fault, when the machine is busy."""
        return 0 if "Timeout" in self.post else 3


def always(*steps: Step) -> Callable[[int], Script]:
    return lambda index: steps


def after_request(data: bytes, *steps: Step) -> Callable[[int], Script]:
    return lambda index: [ReadRequest(), Send(data), *steps]


def serving(step: Step) -> Callable[[int], Script]:
    """The same reply to every request of a connection that stays open."""
    return lambda index: [ReadRequest(), step] * 10


BROKEN = "ReadError|WriteError|RemoteProtocolError"

HEAD_ROWS = [
    # Where the end is noticed before the request is written, the POST provably was not sent.
    Row("reset at once", always(Reset()), "healthy", f"healthy|{BROKEN}"),
    Row("closed at once", always(Fin()), "healthy", f"healthy|{BROKEN}"),
    Row("reset before the head", always(ReadRequest(), Reset()), "healthy", BROKEN),
    Row("reset within the head", after_request(HEAD[:20], Reset()), "healthy", BROKEN),
    Row("half-closed before the head", always(ReadRequest(), HalfClose(), Hang()), "healthy", "RemoteProtocolError"),
    # The next request on that connection may cross the end: sent elsewhere when that is safe.
    Row(
        "half-closed after the reply", after_request(http_reply(), HalfClose(), Hang()), "bad|healthy", f"bad|{BROKEN}"
    ),
    Row("no reply", always(ReadRequest(), Hang()), "healthy", "ReadTimeout", 0.2),
    Row("partial head, then nothing", after_request(HEAD[:30], Hang()), "healthy", "ReadTimeout", 0.2),
    Row("partial head, then end", after_request(HEAD[:30], Fin()), "healthy", "RemoteProtocolError"),
    Row("slow reply", serving(SendSlowly(http_reply(), 0.002)), "bad", "bad"),
    Row(
        "head of 100 KiB",
        serving(Send(http_reply(headers=[(b"X-Long", b"x" * 102_400)]))),
        "bad|healthy",
        "bad|RemoteProtocolError",
    ),
    Row(
        "head of 200 KiB",
        serving(Send(http_reply(headers=[(b"X-Long", b"x" * 204_800)]))),
        "healthy",
        "RemoteProtocolError",
    ),
    Row(
        "10,000 header fields",
        after_request(
            b"HTTP/1.1 200 OK\r\n"
            + b"".join(b"X-Field-%d: v\r\n" % n for n in range(10_000))
            + b"Content-Length: 0\r\n\r\n",
            Fin(),
        ),
        "healthy",
        "RemoteProtocolError",
    ),
    Row("no HTTP at all", after_request(b"\x00\xffSSH-2.0-nothing\r\n\r\n", Fin()), "healthy", "RemoteProtocolError"),
    Row(
        "two lengths",
        after_request(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", Fin()),
        "healthy",
        "RemoteProtocolError",
    ),
    Row("a few 1xx", serving(Send(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 20 + http_reply())), "bad", "bad"),
    Row(
        "length and chunks",
        serving(
            Send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        ),
        # httpx takes the chunks, pathlb's own connections refuse what can be read in two ways.
        "bad|healthy",
        "bad|RemoteProtocolError",
    ),
]

# What breaks in the body is an error: the reply was handed over already.
BODY_ROWS = [
    Row("reset after the head", lambda n: [ReadRequest(), Send(HEAD), WaitFor(f"head {n}"), Reset()], BROKEN, BROKEN),
    Row(
        "reset within the body",
        lambda n: [ReadRequest(), Send(HEAD + b"abc"), WaitFor(f"head {n}"), Reset()],
        BROKEN,
        BROKEN,
    ),
    Row("body stops", after_request(HEAD + b"abc", Hang()), "ReadTimeout", "ReadTimeout", 0.2),
    Row("body too short", after_request(HEAD + b"abc", Fin()), "RemoteProtocolError", "RemoteProtocolError"),
    Row(
        "half-closed within",
        after_request(HEAD + b"a", HalfClose(), Hang()),
        "RemoteProtocolError",
        "RemoteProtocolError",
    ),
    Row(
        "bad chunk size", after_request(CHUNKED + b"ZZ\r\nok\r\n", Fin()), "RemoteProtocolError", "RemoteProtocolError"
    ),
    Row(
        "bad chunk end",
        after_request(CHUNKED + b"2\r\nokXX0\r\n\r\n", Fin()),
        "RemoteProtocolError",
        "RemoteProtocolError",
    ),
    Row("no last chunk", after_request(CHUNKED + b"2\r\nok\r\n", Fin()), "RemoteProtocolError", "RemoteProtocolError"),
]


async def expect(stack: Stack, client: Any, method: str, wanted: str, bad: str, healthy: Fleet) -> tuple[Any, str]:
    """Send one request and check what it comes to; answers its attempts and its X-Request-Id."""
    key = request_id()
    error: Exception | None = None
    with anyio.fail_after(PATIENCE):
        try:
            response = await client.request(method, "/row", headers={"X-Request-Id": key})
        except stack.lib.HTTPError as exc:
            error = exc
        if error is not None:
            assert type(error).__name__ in wanted.split("|"), repr(error)
            assert isinstance(error, pathlb.PathlbError)
            attempts = error.attempts
        else:
            attempts = response.extensions["pathlb"]["attempts"]
            assert response.status_code == 200, response
            if attempts[-1].endpoint == bad:
                assert "bad" in wanted.split("|"), response
                assert response.content == b"ok"
            else:
                assert "healthy" in wanted.split("|"), response
                assert response.headers["X-Gateway"].startswith("gateway-")
    assert attempts[0].endpoint == bad
    if method == "POST":
        assert all(attempt.sent is Sent.NOT_SENT for attempt in attempts[:-1])
    return attempts, key


def seen(healthy: Fleet, server: FaultServer | None = None) -> Counter[bytes]:
    counts = healthy.seen()
    return counts + seen_by(server) if server else counts


@pytest.mark.parametrize("row", HEAD_ROWS, ids=lambda row: row.name)
async def test_fault_up_to_the_head(stack: Stack, healthy: Fleet, row: Row) -> None:
    with FaultServer(row.script) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url, read=row.read) as client:
                for _ in range(2):
                    await expect(stack, client, "GET", row.get, server.url, healthy)
                _, key = await expect(stack, client, "POST", row.post, server.url, healthy)
                await at_rest(client.balancer)
                assert seen(healthy, server)[key.encode()] <= 1
                assert open_connections(client) == []
                charged = endpoint(client.balancer, server.url).counts["failed"]
                allowed = {"healthy": range(row.least_charged, 4), "bad": range(1)}
                assert charged in allowed.get(row.get, range(4))


@pytest.mark.parametrize("row", BODY_ROWS, ids=lambda row: row.name)
async def test_fault_in_the_body(stack: Stack, healthy: Fleet, row: Row) -> None:
    with FaultServer(row.script) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url, read=row.read) as client:
                events = Events(client.balancer)
                for index, method in enumerate(["GET", "POST", "GET"]):
                    key = request_id()
                    with anyio.fail_after(PATIENCE):
                        async with client.stream(method, "/row", headers={"X-Request-Id": key}) as response:
                            assert response.status_code == 200
                            server.set(f"head {index}")
                            with pytest.raises(stack.lib.TransportError) as caught:
                                await response.aread()
                    assert type(caught.value).__name__ in row.get.split("|")
                    assert isinstance(caught.value, pathlb.UpstreamError)
                    assert [attempt.endpoint for attempt in caught.value.attempts] == [server.url]
                    assert seen(healthy, server)[key.encode()] == 1
                await at_rest(client.balancer)
                broken = events.of(BodyFailed)
                assert [one.endpoint for one in broken] == [server.url] * 3
                assert sum(one.outcome.cause is Cause.INSTANCE for one in broken) >= row.least_charged
                assert open_connections(client) == []
                assert events.of(Ejected) == []


@contextlib.contextmanager
def unresolvable(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A name that does not resolve, without asking anybody."""
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name == "nonexistent.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        assert name in ("127.0.0.1", None), name
        return real(host, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield "http://nonexistent.invalid"


@pytest.mark.parametrize("what", ["refused", "black hole", "no such name"])
async def test_no_connection(stack: Stack, healthy: Fleet, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Provably not sent: sent elsewhere at once, a POST too, and a body that can be read only once."""
    addresses: dict[str, AbstractContextManager[str]] = {
        "refused": refused_url(),
        "black hole": black_hole(),
        "no such name": unresolvable(monkeypatch),
    }

    async def parts() -> Any:
        yield b"once"

    with addresses[what] as bad:
        async with nothing_left():
            async with stack.client([bad, *healthy.urls], prefer=bad, connect=0.2) as client:
                for method in ["GET", "POST", "GET"]:
                    attempts, key = await expect(stack, client, method, "healthy", bad, healthy)
                    assert attempts[0].sent is Sent.NOT_SENT
                    if what != "black hole":  # else its timeout may be this process's own fault
                        assert attempts[0].outcome.cause is Cause.INSTANCE
                    assert healthy.seen()[key.encode()] == 1
                response = await client.post("/row", content=parts())
                assert len(response.extensions["pathlb"]["attempts"]) == 2
                await at_rest(client.balancer)
                assert open_connections(client) == []
            # And nowhere else to go: the error says what the connect came to.
            async with stack.client([bad], connect=0.2, deadline=2.0) as client:
                with anyio.fail_after(PATIENCE), pytest.raises(stack.lib.TransportError) as caught:
                    await client.get("/row")
                name = "ConnectTimeout" if what == "black hole" else "ConnectError"
                assert type(caught.value).__name__ in (name, "DeadlineExceeded")
                assert all(attempt.sent is Sent.NOT_SENT for attempt in caught.value.attempts[:-1])
                await at_rest(client.balancer)


async def test_stale_keep_alive(stack: Stack, healthy: Fleet) -> None:
    """FIN after a reply: the next request gets a new connection or, when it crossed the FIN, another endpoint."""
    with FaultServer(lambda n: [ReadRequest(), Send(http_reply()), Fin()]) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                for _ in range(10):
                    with anyio.fail_after(PATIENCE):
                        response = await client.get("/row")
                    assert response.status_code == 200
                await at_rest(client.balancer)
                now = endpoint(client.balancer, server.url)
                assert now.counts["failed"] == 0
                assert now.breaker.state == "closed"
                assert open_connections(client) == []


async def test_pitfall_11_stale_keep_alive(stack: Stack, healthy: Fleet) -> None:
    """FIN after a next request's first byte: a GET goes elsewhere, a POST is an error; nobody is to blame."""
    reply = [ReadRequest(), Send(http_reply())]
    with FaultServer(lambda n: [*reply, *reply, Read(1), Fin()]) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                for _ in range(10):
                    await expect(stack, client, "GET", "bad", server.url, healthy)
                    await expect(stack, client, "GET", "bad", server.url, healthy)
                    attempts, _ = await expect(stack, client, "GET", "healthy", server.url, healthy)
                    assert attempts[0].outcome.cause is Cause.LOCAL
                for _ in range(2):
                    await expect(stack, client, "GET", "bad", server.url, healthy)
                attempts, key = await expect(
                    stack, client, "POST", "RemoteProtocolError|ReadError", server.url, healthy
                )
                assert len(attempts) == 1
                assert seen(healthy, server)[key.encode()] == 0
                await at_rest(client.balancer)
                now = endpoint(client.balancer, server.url)
                assert now.counts["failed"] == 0
                assert now.breaker.state == "closed"
                assert open_connections(client) == []


async def test_1xx_flood_ends(stack: Stack, healthy: Fleet, anyio_backend: str) -> None:
    """No read timeout fires while bytes keep coming. pathlb's own connections count them; on httpx's it is the
    deadline that ends it, without evidence from the peers.
    """
    ours = anyio_backend == "asyncio"
    with FaultServer(always(ReadRequest(), Flood())) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url, outlier=None) as client:
                if ours:
                    await expect(stack, client, "GET", "healthy", server.url, healthy)
                    await expect(stack, client, "POST", "RemoteProtocolError", server.url, healthy)
                for method in [] if ours else ["GET", "POST"]:
                    key = request_id()
                    with anyio.fail_after(PATIENCE), pytest.raises(stack.lib.TimeoutException) as caught:
                        await client.request(
                            method, "/row", headers={"X-Request-Id": key}, extensions=_within(client, 0.3)
                        )
                    assert isinstance(caught.value, pathlb.DeadlineExceeded)
                    assert seen(healthy, server)[key.encode()] == 1
                await at_rest(client.balancer)
                assert open_connections(client) == []


@pytest.mark.parametrize("what", ["flood", "slow head"])
async def test_head_that_never_ends_is_given_up(stack: Stack, healthy: Fleet, what: str) -> None:
    """With evidence of what is usual, an attempt far beyond it is given up and sent elsewhere."""
    step = Flood(at_once=1) if what == "flood" else SendSlowly(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000, 0.01)
    outlier = Outlier(overdue_floor=0.1, overdue_factor=1)
    with FaultServer(always(ReadRequest(), step)) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url, outlier=outlier) as client:
                events = Events(client.balancer)
                for _ in range(20):
                    await client.get("/row", extensions={"pathlb": {"avoid": [server.url]}})
                async with anyio.create_task_group() as group:
                    group.start_soon(_steady, client, server.url)
                    attempts, _ = await expect(stack, client, "GET", "healthy", server.url, healthy)
                    group.cancel_scope.cancel()
                assert attempts[0].outcome.cause is Cause.GIVEN_UP
                assert [one.endpoint for one in events.of(Ejected)] == [server.url]
                await at_rest(client.balancer)
                assert open_connections(client) == []


def _within(client: Any, seconds: float) -> dict[str, Any]:
    """Extensions for a request with this deadline; the read timeout stays the client's."""
    return {"pathlb": {"deadline": seconds}}


async def _steady(client: Any, avoid: str) -> None:
    """Traffic on the other endpoints: peers to compare with."""
    while True:
        await client.get("/row", extensions={"pathlb": {"avoid": [avoid]}})
        await anyio.sleep(0.01)


async def test_body_longer_than_its_length(stack: Stack, healthy: Fleet) -> None:
    """What follows the reply is not the next request's reply."""
    evil = http_reply(body=b"evil")
    with FaultServer(lambda n: [ReadRequest(), Send(http_reply() + evil), ReadRequest(), Send(http_reply())]) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                for _ in range(4):
                    with anyio.fail_after(PATIENCE):
                        response = await client.get("/row")
                    assert response.status_code == 200
                    assert response.content != b"evil"
                await at_rest(client.balancer)
                assert open_connections(client) == []


async def test_compressed_body_is_relayed(stack: Stack, healthy: Fleet) -> None:
    """10 MB in 10 kB pass through the balancer as they are."""
    reply = http_reply(body=BOMB, headers=[(b"Content-Encoding", b"gzip")])
    with FaultServer(after_request(reply, Fin())) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                async with client.stream("GET", "/row") as response:
                    raw = b"".join([part async for part in response.aiter_raw()])
                assert raw == BOMB
                await at_rest(client.balancer)


async def test_fast_failure(stack: Stack, healthy: Fleet) -> None:
    with Fleet(1) as one:
        one[0].set_mode(Mode.FAIL, status=500)
        bad = one.urls[0]
        async with nothing_left():
            async with stack.client([bad, *healthy.urls], prefer=bad) as client:
                events = Events(client.balancer)
                for _ in range(2):
                    await expect(stack, client, "GET", "healthy", bad, healthy)
                key = request_id()
                response = await client.post("/row", headers={"X-Request-Id": key})
                assert response.status_code == 500
                assert (healthy.seen() + one.seen())[key.encode()] == 1
                for _ in range(2):
                    await expect(stack, client, "GET", "healthy", bad, healthy)
                # The fifth failure in a row: nothing goes there any more.
                assert [(one.endpoint, one.after) for one in events.of(BreakerChanged)] == [(bad, "open")]
                before = one[0].stats().requests
                for _ in range(5):
                    response = await client.get("/row")
                    assert len(response.extensions["pathlb"]["attempts"]) == 1
                assert one[0].stats().requests == before
                await at_rest(client.balancer)


async def test_gray_latency(stack: Stack, healthy: Fleet) -> None:
    """An endpoint ten times slower than its peers, and over the floor, is ejected; nothing is lost."""
    with Fleet(3, service_time=ServiceTime.constant(0.02)) as fleet:
        fleet[0].set_mode(Mode.SLOW, factor=10)
        slow = fleet.urls[0]
        async with nothing_left():
            async with stack.client(fleet.urls, read=5.0, outlier=Outlier(confirm=0.1)) as client:
                events = Events(client.balancer)
                statuses: Counter[int] = Counter()

                async def worker() -> None:
                    while not events.of(Ejected):
                        response = await client.get("/row")
                        statuses[response.status_code] += 1

                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for _ in range(12):
                            group.start_soon(worker)
                assert [(one.endpoint, one.signal) for one in events.of(Ejected)] == [(slow, "latency")]
                assert set(statuses) == {200}
                await at_rest(client.balancer)


RETRY_AFTER = {
    "none": None,
    "zero": b"0",
    "seconds": b"1",
    "date to come": formatdate(time.time() + 3600, usegmt=True).encode(),
    "date gone by": b"Wed, 21 Oct 2015 07:28:00 GMT",
    "negative": b"-5",
    "huge": b"99999999999999999999",
    "infinite": b"inf",
    "not a number": b"nan",
    "garbage": b"\xff soon, \x01 maybe",
    "bad date": b"Wed, 99 Foo 99999 99:99:99 +99999",
    "empty": b"",
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("after", RETRY_AFTER)
async def test_retry_after(anyio_backend: str, healthy: Fleet, status: int, after: str) -> None:
    """Another endpoint beats sleeping, whatever is asked for; a POST gets the reply itself."""
    stack, value = STACKS["httpx"], RETRY_AFTER[after]
    # h11 refuses control characters in a field before pathlb can read it.
    headers = [] if value is None else [(b"Retry-After", value.replace(b"\x01", b""))]
    reply = http_reply(status, b"not now", headers)
    with FaultServer(lambda n: [ReadRequest(), Send(reply), ReadRequest(), Send(reply), Fin()]) as server:
        async with nothing_left():
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                # The POST first: a 429 throttles the endpoint.
                key = request_id()
                with anyio.fail_after(PATIENCE):
                    response = await client.post("/row", headers={"X-Request-Id": key})
                assert response.status_code == status
                assert response.content == b"not now"
                assert seen(healthy, server)[key.encode()] == 1
            async with stack.client([server.url, *healthy.urls], prefer=server.url) as client:
                attempts, _ = await expect(stack, client, "GET", "healthy", server.url, healthy)
                assert [attempt.outcome.status for attempt in attempts] == [status, 200]
                await at_rest(client.balancer)
                assert open_connections(client) == []
                now = endpoint(client.balancer, server.url)
                assert now.counts["overloaded" if status == 429 else "failed"] == 1


@pytest.mark.parametrize("after", RETRY_AFTER)
async def test_retry_after_with_nowhere_else_to_go(anyio_backend: str, after: str) -> None:
    """It is waited for when the deadline allows; otherwise the reply is the answer, at once."""
    stack, value = STACKS["httpx"], RETRY_AFTER[after]
    headers = [] if value is None else [(b"Retry-After", value.replace(b"\x01", b""))]

    no, yes = http_reply(429, b"not now", headers), http_reply()
    # On the connection of the first reply, or on another.
    after_no = [ReadRequest(), Send(no), ReadRequest(), Send(yes), Hang()]
    with FaultServer([after_no, [ReadRequest(), Send(yes), Hang()]]) as server:
        async with nothing_left():
            async with stack.client([server.url]) as client:
                events = Events(client.balancer)
                with anyio.fail_after(PATIENCE):
                    response = await client.get("/row")
                waits = [one.wait for one in events.of(Retried)]
                if after in ("date to come", "huge"):
                    assert response.status_code == 429
                    assert waits == []
                else:
                    assert response.status_code == 200
                    assert len(waits) == 1
                    assert (waits[0] >= 1) is (after == "seconds")
                await at_rest(client.balancer)
                assert open_connections(client) == []


async def test_stall_of_the_event_loop(stack: Stack, healthy: Fleet) -> None:
    """This process sleeps past every timeout with requests connecting, waiting and reading: nobody is blamed."""
    with (
        Fleet(3, service_time=ServiceTime.constant(0.05)) as fleet,
        FaultServer(lambda n: [ReadRequest(), Send(HEAD + b"abc"), WaitFor("go on"), Send(b"defghij")]) as server,
    ):
        async with nothing_left():
            settings = {"connect": 0.2, "read": 0.2, "breaker": Breaker(failures=3)}
            async with stack.client([*fleet.urls, server.url], retry=Retry(budget_reserve=1e3), **settings) as client:
                events = Events(client.balancer)
                streaming = 0
                results: Counter[str] = Counter()

                async def get() -> None:
                    response = await client.get("/row", extensions={"pathlb": {"avoid": [server.url]}})
                    results[str(response.status_code)] += 1

                async def stream() -> None:
                    nonlocal streaming
                    only = {"pathlb": {"pin": server.url}}
                    async with client.stream("GET", "/row", extensions=only) as response:
                        streaming += 1
                        try:
                            await response.aread()
                            results["read"] += 1
                        except stack.lib.ReadTimeout:
                            results["ReadTimeout"] += 1

                for stall in (0.3, 0.5, 0.3):
                    streaming = 0
                    with anyio.fail_after(PATIENCE):
                        async with anyio.create_task_group() as group:
                            for _ in range(5):
                                group.start_soon(stream)
                            await until(lambda: streaming == 5)  # noqa: B023
                            for _ in range(20):
                                group.start_soon(get)
                            await anyio.lowlevel.checkpoint()
                            time.sleep(stall)  # noqa: ASYNC251  the stall itself
                            server.set("go on")
                await at_rest(client.balancer)
                assert results["200"] == 60
                assert results["read"] + results["ReadTimeout"] == 15
                assert events.of(BreakerChanged, Ejected) == []
                assert [one.counts["failed"] for one in client.balancer.snapshot().endpoints] == [0, 0, 0, 0]

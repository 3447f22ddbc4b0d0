"""`AsyncClient` is an httpx client: what httpx's own documentation promises, through the balance."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import pytest
from io_helpers import LARGE_BODY, Answer, Seen, Site, Stack, reply, scripted

import pathlb
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Close, FaultServer, Fleet, ReadRequest, ScriptedUpstream, Send, http_reply, refused_url

pytestmark = pytest.mark.anyio


async def test_it_is_the_librarys_own_class(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        assert isinstance(client, stack.http.AsyncClient)
        response = await client.get("/v1")
        assert isinstance(response, stack.http.Response)
        assert response.status_code == 200
        assert response.reason_phrase == "OK"
        assert response.http_version == "HTTP/1.1"
        assert isinstance(response.elapsed, timedelta)
        assert response.request.method == "GET"
        assert response.request.url.path == "/v1"
        assert response.is_closed
    assert client.is_closed


@pytest.mark.parametrize("method", ["get", "head", "options", "delete", "post", "put", "patch"])
async def test_every_method_arrives(stack: Stack, fleet: Fleet, method: str) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        response = await getattr(client, method)("/v1")
        assert response.status_code == 200
        assert (await client.request(method.upper(), "/v2")).status_code == 200
    received = [(one.method, one.target) for gateway in fleet for one in gateway.received()]
    assert sorted(received) == [(method.upper(), b"/v1"), (method.upper(), b"/v2")]


async def test_bodies_of_every_kind(stack: Stack, fleet: Fleet) -> None:
    async def generated() -> AsyncIterator[bytes]:
        yield b"one "
        yield b"two"

    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        await client.post("/json", json={"id": 1})
        await client.post("/form", data={"a": "1", "b": "ü"})
        await client.post("/bytes", content=b"\x00\xff")
        await client.post("/text", content="ü")
        await client.post("/stream", content=generated())
        await client.post("/files", files={"upload": ("a.txt", b"content", "text/plain")}, data={"k": "v"})
        await client.get("/params", params={"q": "a b", "r": ["1", "2"]})
    received = {one.target.partition(b"?")[0]: one for one in fleet[0].received()}
    assert json.loads(received[b"/json"].body) == {"id": 1}
    assert received[b"/form"].body == b"a=1&b=%C3%BC"
    assert received[b"/bytes"].body == b"\x00\xff"
    assert received[b"/text"].body == "ü".encode()
    assert received[b"/stream"].body == b"one two"
    assert (b"Transfer-Encoding", b"chunked") in received[b"/stream"].headers
    assert b'filename="a.txt"' in received[b"/files"].body
    assert b"content" in received[b"/files"].body
    assert received[b"/params"].target in (b"/params?q=a+b&r=1&r=2", b"/params?q=a%20b&r=1&r=2")


async def test_streaming_a_reply(stack: Stack, fleet: Fleet) -> None:
    fleet[0].set_body(b"first\nsecond\nthird")
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        async with client.stream("GET", "/lines") as response:
            assert [line async for line in response.aiter_lines()] == ["first", "second", "third"]
        async with client.stream("GET", "/bytes") as response:
            assert await response.aread() == b"first\nsecond\nthird"
        request = client.build_request("POST", "/built", content=b"x")
        fleet[0].set_body(LARGE_BODY)
        response = await client.send(request, stream=True)
        assert client.balancer.snapshot().in_flight == 1
        assert b"".join([part async for part in response.aiter_bytes()]) == LARGE_BODY
        await response.aclose()
        assert client.balancer.snapshot().in_flight == 0
        assert response.request is request


async def test_leaving_a_stream_early_ends_the_request(stack: Stack, fleet: Fleet) -> None:
    fleet[0].set_body(LARGE_BODY)
    async with stack.pathlb.AsyncClient(fleet.urls[:1]) as client:
        async with client.stream("GET", "/") as response:
            assert response.status_code == 200
            assert client.balancer.snapshot().in_flight == 1
        assert client.balancer.snapshot().in_flight == 0
        assert (await client.get("/")).status_code == 200


async def test_compressed_replies_come_raw_or_decoded(stack: Stack) -> None:
    packed = gzip.compress(b"plain text")
    with Site(lambda seen: Answer(200, [("Content-Encoding", "gzip")], packed)) as site:
        async with stack.pathlb.AsyncClient([site.url]) as client:
            assert (await client.get("/")).text == "plain text"
            async with client.stream("GET", "/") as response:
                assert b"".join([part async for part in response.aiter_raw()]) == packed


async def test_cookies_persist_whichever_instance_answers(stack: Stack) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(200, [("Set-Cookie", "session=s3cret; Path=/")] if seen.target == "/login" else [])

    with Site(answer) as first, Site(answer) as second:
        async with stack.pathlb.AsyncClient([first.url, second.url], policy=pathlb.RoundRobin()) as client:
            await client.get("/login")
            assert client.cookies["session"] == "s3cret"
            for _ in range(2):
                await client.get("/page")
        pages = [seen for seen in first.seen + second.seen if seen.target == "/page"]
        assert [seen.all("cookie") for seen in pages] == [["session=s3cret"]] * 2
        assert first.seen
        assert second.seen


async def test_secure_cookies_need_endpoints_that_all_speak_tls(stack: Stack) -> None:
    async with stack.pathlb.AsyncClient(["https://a.invalid", "https://b.invalid"]) as client:
        assert client.base_url.scheme == "https"
    async with stack.pathlb.AsyncClient(["https://a.invalid", "http://b.invalid"]) as client:
        assert client.base_url.scheme == "http"


async def test_basic_auth_and_default_headers_and_params(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(
        fleet.urls[:1], auth=("user", "pass"), headers={"X-Default": "1"}, params={"v": "2"}, cookies={"c": "3"}
    ) as client:
        await client.get("/")
    (received,) = fleet[0].received()
    headers = {name.lower(): value for name, value in received.headers}
    assert headers[b"authorization"] == b"Basic dXNlcjpwYXNz"
    assert headers[b"x-default"] == b"1"
    assert headers[b"cookie"] == b"c=3"
    assert received.target == b"/?v=2"


async def test_an_auth_flow_may_answer_a_401(stack: Stack) -> None:
    class Token(stack.http.Auth):  # type: ignore[misc, name-defined]
        requires_response_body = True

        def auth_flow(self, request: Any) -> Generator[Any, Any, None]:
            response = yield request
            if response.status_code == 401:
                request.headers["Authorization"] = f"Token {response.json()['nonce']}"
                yield request

    def answer(seen: Seen) -> Answer:
        return Answer(200) if seen.all("authorization") == ["Token 42"] else Answer(401, [], b'{"nonce": 42}')

    with Site(answer) as first, Site(answer) as second:
        async with stack.pathlb.AsyncClient([first.url, second.url], auth=Token()) as client:
            response = await client.post("/", content=b"body")
            assert response.status_code == 200
            assert client.balancer.snapshot().in_flight == 0
    assert [seen.body for seen in first.seen + second.seen] == [b"body"] * 2


async def test_event_hooks_see_each_exchange_and_may_raise(stack: Stack) -> None:
    told: list[str] = []

    async def on_request(request: Any) -> None:
        told.append(f"> {request.method} {request.url.path}")
        request.headers["X-Hook"] = "yes"

    async def on_response(response: Any) -> None:
        told.append(f"< {response.status_code} {len(response.extensions['pathlb']['attempts'])}")
        if response.status_code == 404:
            response.raise_for_status()

    with Site(lambda seen: Answer(404 if seen.target == "/none" else 200)) as site:
        async with stack.pathlb.AsyncClient(
            [site.url], event_hooks={"request": [on_request], "response": [on_response]}
        ) as client:
            await client.get("/there")
            with pytest.raises(stack.http.HTTPStatusError):
                await client.get("/none")
            assert client.balancer.snapshot().in_flight == 0, "httpx closes what a hook rejects"
    assert told == ["> GET /there", "< 200 1", "> GET /none", "< 404 1"]
    assert [seen.all("x-hook") for seen in site.seen] == [["yes"], ["yes"]]


async def test_redirects_are_followed_when_asked(stack: Stack) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(302, [("Location", "/new?x=1")]) if seen.target == "/old" else Answer(200, [], b"new")

    with Site(answer) as site:
        async with stack.pathlb.AsyncClient([site.url], follow_redirects=True) as client:
            response = await client.get("/old")
            assert (response.text, response.request.url.raw_path) == ("new", b"/new?x=1")
            assert [one.status_code for one in response.history] == [302]
            stays = await client.get("/old", follow_redirects=False)
            assert stays.status_code == 302
            assert stays.next_request is not None
            assert (await client.send(stays.next_request)).text == "new"
            assert client.balancer.snapshot().in_flight == 0


async def test_a_307_keeps_method_and_body(stack: Stack) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(307, [("Location", "/new")]) if seen.target == "/old" else Answer(200)

    with Site(answer) as site:
        async with stack.pathlb.AsyncClient([site.url], follow_redirects=True, max_redirects=1) as client:
            assert (await client.post("/old", content=b"kept")).status_code == 200
    assert [(seen.method, seen.target, seen.body) for seen in site.seen] == [
        ("POST", "/old", b"kept"),
        ("POST", "/new", b"kept"),
    ]


async def test_redirects_end(stack: Stack) -> None:
    with Site(lambda seen: Answer(302, [("Location", "/again")])) as site:
        async with stack.pathlb.AsyncClient([site.url], follow_redirects=True, max_redirects=2) as client:
            with pytest.raises(stack.http.TooManyRedirects):
                await client.get("/")
            assert client.balancer.snapshot().in_flight == 0


async def test_default_encoding_is_passed_on(stack: Stack) -> None:
    with Site(lambda seen: Answer(200, [], "grün".encode("latin-1"))) as site:
        async with stack.pathlb.AsyncClient([site.url], default_encoding="latin-1") as client:
            assert (await client.get("/")).text == "grün"


async def test_timeouts_go_to_every_attempt(stack: Stack) -> None:
    seen: list[tuple[float | None, ...]] = []

    def answer(request: Request, extra: Headers) -> Reply:
        seen.append(request.timeouts)
        return reply(503 if len(seen) == 1 else 200)

    first, second = ScriptedUpstream(answer), ScriptedUpstream(answer)
    balancer = scripted(first, second)
    async with balancer, stack.pathlb.AsyncClient(balancer) as client:
        await client.get("/", timeout=stack.http.Timeout(1.0, read=2.0, write=3.0, pool=4.0))
        assert seen == [(1.0, 2.0, 3.0, 4.0)] * 2
        await client.get("/", timeout=None)
        assert seen[2] == (None, None, None, None)


async def test_a_read_timeout_is_the_librarys_own_and_per_attempt(stack: Stack, fleet: Fleet) -> None:
    with FaultServer([[ReadRequest(), ReadRequest()]]) as silent:
        async with stack.pathlb.AsyncClient([silent.url], outlier=None) as client:
            with pytest.raises(stack.http.ReadTimeout) as caught:
                await client.post("/", timeout=stack.http.Timeout(5, read=0.05))
    assert isinstance(caught.value, pathlb.UpstreamError)
    assert caught.value.request.method == "POST"
    (attempt,) = caught.value.attempts
    assert attempt.endpoint == silent.url
    assert len(silent.requests) == 1, "it may have been sent: not again"


class TestOneShotBodies:
    """A body that comes from a generator can be sent once, and only as long as nobody touched it."""

    async def test_it_is_sent_elsewhere_when_the_connect_is_refused(self, stack: Stack, fleet: Fleet) -> None:
        taken: list[str] = []

        async def body() -> AsyncGenerator[bytes, None]:
            taken.append("once")
            yield b"data"

        with refused_url() as dead:
            async with stack.pathlb.AsyncClient([dead, fleet.urls[0]], policy=pathlb.RoundRobin()) as client:
                response = await client.put("/", content=body())
                assert response.status_code == 200
                attempts = response.extensions["pathlb"]["attempts"]
        assert [attempt.endpoint for attempt in attempts][-1] == fleet.urls[0]
        assert taken == ["once"]
        assert fleet[0].received()[0].body == b"data"

    async def test_it_is_not_sent_again_once_it_was_touched(self, stack: Stack) -> None:
        async def body() -> AsyncGenerator[bytes, None]:
            yield b"data"

        with ExitStack() as servers:
            failing = [
                servers.enter_context(FaultServer([[ReadRequest(), Send(http_reply(503)), Close()]])) for _ in range(2)
            ]
            async with stack.pathlb.AsyncClient([one.url for one in failing]) as client:
                response = await client.put("/", content=body())
                assert response.status_code == 503, "the reply there is, not an error about streams"
                assert len(response.extensions["pathlb"]["attempts"]) == 1
            assert sum(len(one.requests) for one in failing) == 1

    async def test_a_body_in_memory_is_sent_again(self, stack: Stack) -> None:
        with ExitStack() as servers:
            failing = [servers.enter_context(Site(lambda seen: Answer(503))) for _ in range(2)]
            async with stack.pathlb.AsyncClient([one.url for one in failing]) as client:
                response = await client.put("/", content=b"data")
                assert response.status_code == 503
                assert len(response.extensions["pathlb"]["attempts"]) == 3
            assert [seen.body for one in failing for seen in one.seen] == [b"data"] * 3


async def test_a_sync_body_is_refused_as_the_library_does(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        with pytest.raises(RuntimeError, match="sync request"):
            await client.post("/", content=iter([b"x"]))


async def test_a_reply_that_breaks_off_is_the_librarys_error_with_the_attempts(stack: Stack) -> None:
    broken = http_reply(200, b"")[:-4].replace(b"Content-Length: 0", b"Content-Length: 100") + b"\r\n\r\npart"
    with FaultServer([[ReadRequest(), Send(broken), Close()]]) as server:
        async with stack.pathlb.AsyncClient([server.url]) as client:
            async with client.stream("GET", "/") as response:
                assert response.status_code == 200
                with pytest.raises(stack.http.RemoteProtocolError) as caught:
                    await response.aread()
            snapshot = client.balancer.snapshot()
    assert isinstance(caught.value, pathlb.UpstreamError)
    assert [attempt.endpoint for attempt in caught.value.attempts] == [server.url]
    assert caught.value.request.url.path == "/"
    assert snapshot.in_flight == 0
    assert snapshot.endpoints[0].counts["broken"] == 1, "the endpoint's failure all the same"


async def test_trace_extension_reaches_the_transport(stack: Stack, fleet: Fleet) -> None:
    told: list[str] = []

    async def trace(name: str, info: Any) -> None:
        told.append(name)

    upstream = pathlb.TransportUpstreams(stack=stack.http)  # pathlb's own connections have no such events
    async with stack.pathlb.AsyncClient(fleet.urls, upstream=upstream) as client:
        response = await client.get("/", extensions={"trace": trace})
        assert "network_stream" in response.extensions
    assert "http11.send_request_headers.started" in told


async def test_closing_twice_is_fine_and_using_it_afterwards_is_not(stack: Stack, fleet: Fleet) -> None:
    client = stack.pathlb.AsyncClient(fleet.urls)
    assert (await client.get("/")).status_code == 200, "works without `async with`"
    await client.aclose()
    await client.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await client.get("/")
    with pytest.raises(pathlb.UsageError, match="closed"):
        client.balancer.update(fleet.urls)

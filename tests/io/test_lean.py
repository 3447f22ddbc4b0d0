"""The short ways of the clients come to what httpx's own come to."""

from __future__ import annotations

import gzip
import logging
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from io_helpers import LARGE_BODY, Answer, Site, Stack, scripted

import pathlb
import pathlb.adapters.httpx
from pathlb.testing import Fleet, ScriptedUpstream

NAMES = [
    "X-One",
    "x-one",
    "X-Two",
    "Accept",
    "user-agent",
    "Content-Type",
    "content-length",
    "Host",
    "Cookie",
    "Expect",
]
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.just(""), st.just([]), st.just({}), st.just({"ä": ["€", 1.5, None]})
)
CONTENT = st.one_of(st.none(), st.binary(max_size=20), st.text(max_size=20))
HEADERS = st.one_of(
    st.none(),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    st.lists(st.tuples(st.sampled_from(NAMES), VALUES), max_size=4),
    st.dictionaries(st.sampled_from(NAMES).map(str.encode), VALUES.map(str.encode), max_size=3),
)
URLS = st.sampled_from(["/v1", "v1/x?q=1", "/a b?ü", "http://gw/abs", "http://gw/abs/../up", "", "?q", "/%2e/x"])


def facts(request: Any) -> tuple[Any, ...]:
    return (
        request.method,
        request.url,
        request.headers.raw,
        request.content,
        b"".join(request.stream),
        type(request.stream).__name__,
        request.extensions,
    )


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "post", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "QUERY"]),
    url=URLS,
    content=CONTENT,
    json=JSON,
    headers=HEADERS,
    defaults=HEADERS,
)
@pytest.mark.parametrize("which", ["httpx", "httpx2"])
def test_a_request_is_what_httpx_would_have_built(which: str, **given: Any) -> None:
    http = pytest.importorskip(which)
    ours = pathlb.AsyncClient if which == "httpx" else pathlb.httpx2.AsyncClient
    method, url, defaults = given.pop("method"), given.pop("url"), given.pop("defaults")
    client = ours(scripted(ScriptedUpstream()), base_url="http://gw", headers=defaults)
    plain = http.AsyncClient(base_url="http://gw", headers=defaults, timeout=client.timeout)
    theirs = plain.build_request(method, url, **given)
    for _ in range(2):  # what was kept the first time serves the second
        assert facts(client.build_request(method, url, **given)) == facts(theirs)


def test_what_the_client_is_given_later_counts(stack: Stack) -> None:
    client = stack.pathlb.AsyncClient(scripted(ScriptedUpstream()), base_url="http://gw/a")
    assert str(client.build_request("GET", "x").url) == "http://gw/a/x"
    client.base_url = "http://gw/b"
    assert str(client.build_request("GET", "x").url) == "http://gw/b/x"
    client.headers["X-New"] = "1"
    assert client.build_request("GET", "x").headers["x-new"] == "1"
    del client.headers["x-new"]
    assert "x-new" not in client.build_request("GET", "x").headers
    client.params = {"q": "1"}
    assert str(client.build_request("GET", "x").url) == "http://gw/b/x?q=1"
    client.params = {}
    client.cookies.set("a", "b")
    assert client.build_request("GET", "x").headers["cookie"] == "a=b"


def test_a_header_httpx_refuses_is_refused(stack: Stack) -> None:
    client = stack.pathlb.AsyncClient(scripted(ScriptedUpstream()))
    for headers in ({"X": "ü"}, {"ü": "x"}):
        with pytest.raises(UnicodeEncodeError):
            client.build_request("GET", "/", headers=headers)
    with pytest.raises(TypeError):
        client.build_request("GET", "/", headers={"X": 1})


def test_a_url_given_in_any_form_is_merged(stack: Stack) -> None:
    client = stack.pathlb.AsyncClient(scripted(ScriptedUpstream()), base_url="http://gw")
    for number in range(600):  # more than are kept
        assert client.build_request("GET", f"/{number}").url.path == f"/{number}"
        assert client.build_request("GET", stack.http.URL(f"/{number}")).url.path == f"/{number}"


PACKED = gzip.compress(b'{"a": "b"}')
ANSWERS = {
    "plain": Answer(200, [("Content-Type", "application/json; charset=utf-8")], b'{"a": "b"}'),
    "compressed": Answer(200, [("Content-Encoding", "gzip"), ("X-Latin", "\xfc")], PACKED),
    "cookies": Answer(200, [("Set-Cookie", "a=b; Path=/"), ("Set-Cookie", "c=d; Path=/")], b"x"),
    "large": Answer(200, [], LARGE_BODY),
    "redirect": Answer(302, [("Location", "/elsewhere")], b"go"),
    "error": Answer(404, [], b"none"),
    "empty": Answer(204, [], b""),
}


def seen(response: Any) -> dict[str, Any]:
    """What a user can ask a response for."""
    following = response.next_request
    return {
        "status": response.status_code,
        "reason": response.reason_phrase,
        "version": response.http_version,
        "headers": [pair for pair in response.headers.raw if pair[0] != b"Date"],
        "content": response.content,
        "text": response.text,
        "encoding": response.encoding,
        "closed": response.is_closed,
        "consumed": response.is_stream_consumed,
        "downloaded": response.num_bytes_downloaded,
        "history": response.history,
        "elapsed": isinstance(response.elapsed, timedelta) and response.elapsed > timedelta(0),
        "next": following and (following.method, following.url, following.headers.raw),
        "cookies": dict(response.cookies),
        "extensions": sorted(response.extensions),
        "request": response.request.url,
        "default": response.default_encoding,
    }


@pytest.mark.anyio
@pytest.mark.parametrize("kind", list(ANSWERS))
async def test_a_response_is_what_httpx_would_have_made_of_it(
    stack: Stack, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first request of a client takes httpx's own way, the later ones the short one."""
    caplog.set_level(logging.INFO, logger=stack.http.__name__)
    with Site(lambda request: ANSWERS[kind]) as site:
        async with stack.pathlb.AsyncClient([site.url], default_encoding="latin-1") as client:
            own = seen(await client.get("/x"))
            jar = dict(client.cookies)
            client.cookies.clear()
            short = seen(await client.get("/x"))
            assert short == own
            assert dict(client.cookies) == jar
            with pytest.raises(stack.http.StreamConsumed):
                await (await client.get("/x")).aiter_raw().__anext__()
    told = [record.getMessage() for record in caplog.records if record.name == stack.http.__name__]
    assert told[0] == told[1]
    assert "HTTP Request: GET" in told[1]


@pytest.mark.anyio
async def test_the_short_way_is_taken(stack: Stack, fleet: Fleet) -> None:
    """Or nothing here would be tested: from the second request on, httpx's bound streams are not made."""
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        kinds = [type((await client.get("/")).stream).__name__ for _ in range(3)]
        streamed = await client.send(client.build_request("GET", "/"), stream=True)
        kinds.append(type(streamed.stream).__name__)
        await streamed.aclose()
    assert [kind == "BoundAsyncStream" for kind in kinds] == [True, False, False, True]


@pytest.mark.anyio
async def test_what_needs_more_takes_the_long_way(stack: Stack, fleet: Fleet) -> None:
    """Hooks, auth and redirects that are set later, or for one request."""
    called: list[str] = []

    async def note(what: Any) -> None:
        called.append(type(what).__name__)

    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        for _ in range(2):
            await client.get("/")
        client.event_hooks = {"request": [note], "response": [note]}
        await client.get("/")
        assert called == ["Request", "Response"]
        client.event_hooks = {}
        await client.get("/", auth=("user", "password"))
        client.auth = ("client", "password")
        await client.get("/")
        client.auth = None
        await client.get("http://url:password@pathlb.invalid/")
        await client.get("/")
    sent = [one for gateway in fleet for one in gateway.received()]
    assert sum(any(name == b"Authorization" for name, _ in one.headers) for one in sent) == 3
    with pytest.raises(RuntimeError, match="closed"):
        await client.get("/")


@pytest.mark.anyio
async def test_a_location_that_is_no_url_is_what_it_is_to_the_library(stack: Stack) -> None:
    outcomes = []
    with Site(lambda request: Answer(302, [("Location", "http://x:abc/")], b"")) as site:
        async with stack.pathlb.AsyncClient([site.url]) as client:
            for _ in range(3):
                try:
                    outcomes.append((await client.get("/")).next_request)
                except stack.http.RemoteProtocolError as exc:
                    outcomes.append(type(exc))
    assert len(set(outcomes)) == 1, outcomes


@pytest.mark.anyio
async def test_patches_and_replacements_are_met_by_every_request(
    stack: Stack, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As instrumentation and tests of other people do them: on the library's class, a subclass, or one client."""
    met: list[str] = []

    class Own(stack.pathlb.AsyncClient):  # type: ignore[name-defined,misc]
        async def _send_single_request(self, request: Any) -> Any:
            met.append("subclass")
            return await super()._send_single_request(request)

    async with Own(fleet.urls) as client:
        for _ in range(3):
            await client.get("/")
    assert met == ["subclass"] * 3

    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        await client.get("/")
        original = stack.http.AsyncClient.send

        async def send(self: Any, *args: Any, **kwargs: Any) -> Any:
            met.append("class")
            return await original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(stack.http.AsyncClient, "send", send)
            for _ in range(3):
                await client.get("/")
        assert met[3:] == ["class"] * 3
        client._transport = stack.http.MockTransport(lambda request: stack.http.Response(299))
        assert [(await client.get("/")).status_code for _ in range(3)] == [299] * 3


@pytest.mark.anyio
async def test_mounts_keep_their_place(stack: Stack, fleet: Fleet) -> None:
    def elsewhere(request: Any) -> Any:
        return stack.http.Response(201)

    mounts = {"http://other": stack.http.MockTransport(elsewhere)}
    async with stack.pathlb.AsyncClient(fleet.urls, mounts=mounts) as client:
        for _ in range(2):
            assert (await client.get("http://other/")).status_code == 201
            assert (await client.get("/")).status_code == 200

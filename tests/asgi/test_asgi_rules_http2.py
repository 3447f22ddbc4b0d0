"""The rules where callers speak HTTP/2, under the servers that do."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from rules_kit import Front, Upstream

from pathlb.testing import Fin


@pytest.fixture
def client(front: Front) -> Iterator[httpx.Client]:
    if front.kind.startswith("uvicorn"):
        pytest.skip("speaks HTTP/1.1 only")
    url = f"http://127.0.0.1:{front.port}"
    with httpx.Client(http1=False, http2=True, base_url=url, headers={"Host": "gateway.test"}, timeout=20) as client:
        yield client


def test_a_body_whose_length_nobody_says_arrives(client: httpx.Client, front: Front) -> None:
    for size in (5, 100_000):
        with Upstream() as upstream:
            front.gateway(upstream)
            reply = client.post("/a?b", content=iter([b"x" * size]))
            assert (reply.http_version, reply.status_code, reply.content) == ("HTTP/2", 200, b"ok")
            request = upstream.one()
            assert request.line == b"POST /a?b HTTP/1.1"
            assert request.one(b"host") == b"gateway.test"
            if size == 5:
                assert request.body == b"xxxxx"
            else:
                assert request.one(b"transfer-encoding") == b"chunked"
                assert request.body.count(b"x") == size


def test_no_body_stays_none(client: httpx.Client, front: Front) -> None:
    with Upstream() as upstream:
        front.gateway(upstream)
        assert client.get("/").status_code == 200
        request = upstream.one()
        assert request.body == b""
        assert request.all(b"content-length") == request.all(b"transfer-encoding") == []


def test_via_says_what_came(client: httpx.Client, front: Front) -> None:
    with Upstream() as upstream:
        front.gateway(upstream)
        client.get("/", headers={"Via": "1.0 one"})
        assert upstream.one().one(b"via") == b"1.0 one, 2 gateway-test"


def test_cookies_are_one_field_again(client: httpx.Client, front: Front) -> None:
    with Upstream() as upstream:
        front.gateway(upstream)
        client.get("/", headers=[("Cookie", "a=1"), ("X-Mine", "1"), ("Cookie", "b=2")])
        assert upstream.one().all(b"cookie") == [b"a=1; b=2"]


def test_a_body_cut_short_aborts_the_stream(client: httpx.Client, front: Front) -> None:
    if front.kind == "hypercorn":
        pytest.skip("leaves the stream open, for the caller's own timeout")
    for cut in (b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", b"Content-Length: 10\r\n\r\nabc"):
        with Upstream(b"HTTP/1.1 200 OK\r\n" + cut, Fin()) as upstream:
            front.gateway(upstream)
            with pytest.raises(httpx.RemoteProtocolError):
                client.get("/")

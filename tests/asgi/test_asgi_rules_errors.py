"""What callers get where there is no reply to hand over, under real servers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from rules_kit import Answer, Front, Upstream, chunked, get, post

from pathlb.testing import Close, Hang, http_reply, refused_url

SINGLE = b'{"jsonrpc":"2.0","id":%b,"method":"eth_call","params":[]}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"eth_subscription","params":[]}'


def assert_outer(answer: Answer, *secrets: str) -> None:
    """Nothing in it is about the inside."""
    everything = b"".join([*(name + value for name, value in answer.headers), answer.body])
    for secret in ("127.0.0.1", "Traceback", "File ", "pathlb", *secrets):
        assert secret.encode() not in everything


@pytest.fixture
def broken() -> Iterator[Upstream]:
    """An upstream that never answers."""
    with Upstream(Close()) as upstream:
        yield upstream


class TestStatuses:
    """Each of them is problem+json, and says what to do about it."""

    def test_400_malformed(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        with front.call() as caller:
            answer = caller.ask(get(b"/../x"))
            assert (answer.status, answer.problem["title"]) == (400, "Bad Request")
            assert_outer(answer)
            assert caller.ended()  # nobody knows what follows

    def test_404_no_route(self, broken: Upstream, front: Front) -> None:
        front.gateway(routes=[{"path": "/only", "endpoints": [broken.url]}])
        answer = front.ask(get(b"/other"))
        assert (answer.status, answer.problem["title"]) == (404, "Not Found")
        assert_outer(answer)

    def test_405_not_forwarded(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        answer = front.ask(get(b"/", b"Max-Forwards: 0", method=b"TRACE"))
        assert (answer.status, answer.problem["title"]) == (405, "Method Not Allowed")
        assert_outer(answer)

    @pytest.mark.parametrize(
        "request_",
        [
            post(b"x" * 1001),
            get(b"/", b"Content-Length: 99999999999", method=b"POST"),
            get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"x" * 600, b"x" * 600),
            get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + b"3e9\r\n" + b"x" * 1001,  # and never ends
        ],
    )
    def test_413_too_large(self, request_: bytes, front: Front) -> None:
        with Upstream() as upstream:
            front.gateway(upstream, max_body=1000)
            answer = front.ask(request_)
            assert (answer.status, answer.problem["title"]) == (413, "Content Too Large")
            assert upstream.requests == []
            assert front.ask(post(b"x" * 1000)).status == 200
        assert_outer(answer)

    def test_413_too_large_while_it_streams(self, front: Front) -> None:
        with Upstream() as upstream:
            front.gateway(upstream, max_body=200_000)
            request = get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"x" * 100_000, b"x" * 100_001)
            assert front.ask(request).status == 413
            assert upstream.requests == []  # no whole one

    def test_502_upstream_broke(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        answer = front.ask(get())
        assert (answer.status, answer.problem["title"]) == (502, "Bad Gateway")
        assert_outer(answer, str(broken.port))

    def test_502_upstream_refuses(self, front: Front) -> None:
        with refused_url() as nobody:
            front.gateway(nobody)
            answer = front.ask(get())
        assert (answer.status, answer.problem["title"]) == (502, "Bad Gateway")
        assert_outer(answer, nobody.rpartition(":")[2])

    def test_503_nothing_eligible(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken, balancer={"drained": True})
        answer = front.ask(get())
        assert (answer.status, answer.problem["title"]) == (503, "Service Unavailable")
        assert answer.one(b"retry-after") == b"1"
        assert broken.connections == 0
        assert_outer(answer, str(broken.port))

    def test_503_shed(self, front: Front) -> None:
        with Upstream(Hang(), http_reply()) as upstream, front.call() as first:
            front.gateway(upstream, balancer={"concurrency": 1})
            first.send(get())
            upstream.wait_for_requests(1)
            answer = front.ask(get())
            assert (answer.status, answer.problem["title"]) == (503, "Service Unavailable")
            assert answer.one(b"retry-after") == b"1"
            upstream.release()
            assert first.answer().status == 200
        assert_outer(answer)

    def test_504_deadline(self, front: Front) -> None:
        with Upstream(Hang()) as upstream:
            front.gateway(upstream, balancer={"deadline": 0.1})
            answer = front.ask(get())
            assert (answer.status, answer.problem["title"]) == (504, "Gateway Timeout")
            assert_outer(answer, str(upstream.port))

    def test_an_answer_to_head_has_no_body(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        with front.call() as caller:
            for _ in range(2):
                answer = caller.ask(get(method=b"HEAD"))
                assert (answer.status, answer.body) == (502, b"")


class TestJsonRpc:
    """A JSON-RPC request gets a JSON-RPC error with its id, whatever the status."""

    def errors(self, front: Front, body: bytes, status: int = 502) -> Any:
        answer = front.ask(post(body))
        assert answer.status == status
        assert answer.one(b"content-type") == b"application/json"
        assert_outer(answer)
        return json.loads(answer.body)

    @pytest.mark.parametrize("id_", [1, 0, -7, 12345678901234567890, "a", "", "\U0001f600", None, 1.5])
    def test_a_call(self, id_: Any, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        assert self.errors(front, SINGLE % json.dumps(id_).encode()) == {
            "jsonrpc": "2.0",
            "id": id_,
            "error": {"code": -32014, "message": "Bad Gateway: the gateway did not answer"},
        }

    @pytest.mark.parametrize("id_", [b"true", b"[1]", b"{}", b"NaN", b"1e999", b"-Infinity"])
    def test_an_id_that_is_none(self, id_: bytes, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        assert self.errors(front, SINGLE % id_)["id"] is None

    def test_a_batch(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        batch = b"[%b]" % b",".join([SINGLE % b"1", NOTIFICATION, SINGLE % b'"b"', b"7"])
        answers = self.errors(front, batch)
        assert [answer["id"] for answer in answers] == [1, "b", None]
        assert {answer["error"]["code"] for answer in answers} == {-32014}

    @pytest.mark.parametrize("body", [NOTIFICATION, b"[%b,%b]" % (NOTIFICATION, NOTIFICATION)])
    def test_a_notification_has_no_answer_but_the_request_has(
        self, body: bytes, broken: Upstream, front: Front
    ) -> None:
        front.gateway(broken)
        assert front.ask(post(body)).problem["status"] == 502

    @pytest.mark.parametrize("body", [b'{"jsonrpc":"2.0","id":1', b'[{"jsonrpc":"2.0"', b'{"jsonrpc":' + b"[" * 60_000])
    def test_a_broken_call(self, body: bytes, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        assert self.errors(front, body)["id"] is None

    @pytest.mark.parametrize("body", [b'{"id":1,"method":"x"}', b"x=1", b'"jsonrpc"', b"[]", b'{"jsonrpc":"2.0"}', b""])
    def test_what_is_not_json_rpc(self, body: bytes, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        assert front.ask(post(body)).problem["status"] == 502

    @pytest.mark.parametrize("coded", [False, True])
    def test_a_call_too_long_to_be_held(self, coded: bool, broken: Upstream, front: Front) -> None:
        front.gateway(broken)
        body = SINGLE % b"1" + b" " * 100_000
        if coded:
            answer = front.ask(get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(body))
        else:
            answer = front.ask(post(body))
        assert (answer.status, answer.one(b"content-type")) == (502, b"application/json")
        assert json.loads(answer.body)["error"]["code"] == -32014

    @pytest.mark.parametrize(("drained", "status", "code"), [(True, 503, -32011), (False, 502, -32014)])
    def test_unavailable(self, drained: bool, status: int, code: int, broken: Upstream, front: Front) -> None:
        front.gateway(broken, balancer={"drained": drained})
        assert self.errors(front, SINGLE % b"1", status)["error"]["code"] == code

    def test_no_route(self, broken: Upstream, front: Front) -> None:
        front.gateway(routes=[{"path": "/only", "endpoints": [broken.url]}])
        assert self.errors(front, SINGLE % b"7", 404)["id"] == 7

    def test_a_deadline(self, front: Front) -> None:
        with Upstream(Hang()) as upstream:
            front.gateway(upstream, balancer={"deadline": 0.1})
            assert self.errors(front, SINGLE % b"7", 504)["error"]["code"] == -32015

    def test_too_large(self, broken: Upstream, front: Front) -> None:
        front.gateway(broken, max_body=100)
        body = SINGLE % b"7" + b" " * 100
        assert front.ask(post(body)).problem["status"] == 413  # refused unread
        answer = front.ask(get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(body[:60], body[60:]))
        assert answer.status == 413


def test_an_answer_of_a_gateway_is_not_touched(front: Front) -> None:
    error = b'{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"10.0.0.1"}}'
    with Upstream(http_reply(500, error, [(b"Content-Type", b"application/json")])) as upstream:
        front.gateway(upstream)
        answer = front.ask(post(SINGLE % b"1"))
    assert (answer.status, answer.body) == (500, error)

"""What an intermediary does to replies, rule by rule (RFC 9110, 9112), under real servers."""

from __future__ import annotations

import gzip

import pytest
from rules_kit import Answer, Front, Gone, Upstream, chunked, get

from pathlb.testing import Close, Fin, Reset, Step, WaitFor, http_reply

OK = b"HTTP/1.1 200 OK\r\n"
SERVERS_OWN = (b"date", b"server", b"connection", b"transfer-encoding", b"content-length")


def relayed(front: Front, *reply: Step | bytes, request: bytes = b"") -> Answer:
    """What the caller gets of what an upstream says."""
    with Upstream(*reply) as upstream:
        front.gateway(upstream)
        return front.ask(request or get())


def refused(front: Front, reply: bytes, request: bytes = b"") -> None:
    """A reply that is not handed over, whose connection is closed, and whose caller can go on."""
    gone = Gone()
    with Upstream(reply, gone) as upstream, front.call() as caller:
        front.gateway(upstream)
        for number in (1, 2):
            answer = caller.ask(request or get())
            assert answer.status == 502
            assert answer.problem["title"] == "Bad Gateway"
            assert upstream.connections == number
        gone.wait()


class TestFraming:
    def test_content_length_with_transfer_encoding_is_a_502_and_closes_the_upstream(self, front: Front) -> None:
        refused(front, OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"abc"))

    @pytest.mark.parametrize(
        "reply",
        [
            OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
            OK + b"Content-Length: -3\r\n\r\nabc",
            OK + b"Content-Length: 99999999999999999999\r\n\r\nabc",
            OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunked(b"abc"),
            OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(b"abc"),
            OK + b"X Y: 1\r\nContent-Length: 0\r\n\r\n",
            OK + b"X: a\0b\r\nContent-Length: 0\r\n\r\n",
            OK + b"X: a\rb\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n",
            b"ICY 200 OK\r\n\r\n",
            b"\x16\x03\x01 no HTTP at all\r\n\r\n",
        ],
    )
    def test_broken_framing_is_a_502_and_closes_the_upstream(self, reply: bytes, front: Front) -> None:
        refused(front, reply)

    def test_a_status_that_is_none_is_a_502(self, front: Front) -> None:
        assert relayed(front, b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n").status == 502

    def test_an_upstream_that_ends_before_its_head_is_a_502(self, front: Front) -> None:
        for reply in ((Close(),), (OK + b"X: ", Fin()), (Reset(),)):
            assert relayed(front, *reply).status == 502

    def test_obs_fold_is_a_502_or_a_space(self, front: Front) -> None:
        answer = relayed(front, OK + b"X: a\r\n  b\r\nContent-Length: 2\r\n\r\nok")
        assert answer.status == 502 or answer.one(b"x") == b"a b"

    def test_101_only_when_asked_for(self, front: Front) -> None:
        switch = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: tea/1\r\n\r\n"
        refused(front, switch)
        refused(front, switch, get(b"/", b"Connection: Upgrade", b"Upgrade: tea/1"))

    def test_a_reply_that_ends_with_its_connection_gets_a_framing(self, front: Front) -> None:
        for version in (b"1.0", b"1.1"):
            answer = relayed(front, b"HTTP/%b 200 OK\r\nX: 1\r\n\r\nuntil the end" % version, Fin())
            assert (answer.body, answer.framed, answer.whole) == (b"until the end", True, True)


class TestFields:
    def test_fields_of_one_hop_are_dropped(self, front: Front) -> None:
        answer = relayed(
            front,
            http_reply(
                headers=[
                    (b"Connection", b"keep-alive, X-Mine"),
                    (b"X-Mine", b"1"),
                    (b"Keep-Alive", b"timeout=5"),
                    (b"Proxy-Connection", b"keep-alive"),
                    (b"Proxy-Authenticate", b"Basic"),
                    (b"Trailer", b"X-Sum"),
                    (b"Upgrade", b"h2c"),
                    (b"X-Kept", b"2"),
                ]
            ),
        )
        assert [pair for pair in answer.headers if pair[0] not in SERVERS_OWN] == [(b"x-kept", b"2")]

    def test_unknown_fields_go_through_and_those_of_a_name_keep_their_order(self, front: Front) -> None:
        cookies = [(b"Set-Cookie", b"b=2; Path=/"), (b"X-Odd", b"\xe9 a  b"), (b"Set-Cookie", b"a=1")]
        answer = relayed(front, http_reply(headers=[*cookies, (b"WWW-Authenticate", b"Bearer")]))
        assert answer.all(b"set-cookie") == [b"b=2; Path=/", b"a=1"]
        assert answer.one(b"x-odd") == b"\xe9 a  b"
        assert answer.one(b"www-authenticate") == b"Bearer"

    @pytest.mark.parametrize("status", [200, 201, 206, 301, 400, 401, 404, 418, 429, 500, 503, 599])
    def test_statuses_go_through(self, status: int, front: Front) -> None:
        with Upstream(http_reply(status, b"its own", [(b"Retry-After", b"7")])) as upstream:
            front.gateway(upstream)
            answer = front.ask(get())
            assert (answer.status, answer.body, answer.one(b"retry-after")) == (status, b"its own", b"7")

    def test_trailers_are_dropped_and_never_merged(self, front: Front) -> None:
        body = chunked(b"abc", trailers=[b"X-Sum: 1", b"Set-Cookie: evil=1"])
        with Upstream(OK + b"Transfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n", body) as upstream:
            front.gateway(upstream)
            with front.call() as caller:
                caller.send(get(b"/", b"Connection: close", b"TE: trailers"))
                raw = caller.rest()
            assert raw.endswith((b"\r\n\r\nabc", b"abc\r\n0\r\n\r\n"))
            assert b"x-sum" not in raw.lower()
            assert b"evil" not in raw


class TestBodies:
    def test_bodies_are_relayed_as_bytes_never_decoded(self, front: Front) -> None:
        packed = gzip.compress(b"hello" * 10)
        answer = relayed(front, http_reply(body=packed, headers=[(b"Content-Encoding", b"gzip")]))
        assert answer.body == packed
        assert answer.one(b"content-encoding") == b"gzip"
        assert answer.one(b"content-length") == b"%d" % len(packed)

    @pytest.mark.parametrize("size", [0, 1, 65_536, 1_000_000])
    @pytest.mark.parametrize("coded", [False, True])
    def test_bodies_of_any_size_come_whole(self, size: int, coded: bool, front: Front) -> None:
        body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
        if coded:
            reply = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(*([body] if body else []))
        else:
            reply = http_reply(body=body)
        answer = relayed(front, reply)
        assert answer.body == body
        assert answer.whole
        assert answer.all(b"content-length") in ([b"%d" % size], [] if coded else None)

    def test_head_has_no_body_and_keeps_its_content_length(self, front: Front) -> None:
        with Upstream(OK + b"Content-Length: 5\r\nX: 1\r\n\r\n") as upstream, front.call() as caller:
            front.gateway(upstream)
            for _ in range(2):  # the connection can be used again
                answer = caller.ask(get(method=b"HEAD"))
                assert (answer.status, answer.one(b"content-length"), answer.one(b"x")) == (200, b"5", b"1")
            assert upstream.connections == 1

    @pytest.mark.parametrize("status", [204, 304])
    @pytest.mark.parametrize("field", [b"", b"Content-Length: 5\r\n"])
    def test_204_and_304_have_no_body(self, status: int, field: bytes, front: Front) -> None:
        if status == 204:
            field = field.replace(b"5", b"0")  # that of a 304 is about another reply
        reply = b'HTTP/1.1 %d X\r\nETag: "a"\r\n%b\r\n' % (status, field)
        with Upstream(reply) as upstream, front.call() as caller:
            front.gateway(upstream)
            for _ in range(2):
                answer = caller.ask(get())
                assert (answer.status, answer.one(b"etag")) == (status, b'"a"')
                assert answer.all(b"transfer-encoding") == []
                assert answer.all(b"content-length") == []

    @pytest.mark.parametrize("end", [Close(), Reset(), Fin()])
    @pytest.mark.parametrize(
        "cut",
        [
            b"Content-Length: 10\r\n\r\nabc",
            b"Content-Length: 10\r\n\r\n",
            b"Content-Length: 1000000\r\n\r\n" + b"x" * 500_000,
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nab",
            b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n",
            b"Transfer-Encoding: chunked\r\n\r\n7a120\r\n" + b"x" * 500_000 + b"\r\n",
        ],
    )
    def test_a_body_cut_short_aborts_the_caller(self, cut: bytes, end: Step, front: Front) -> None:
        with Upstream(OK + cut, end) as upstream, front.call() as caller:
            front.gateway(upstream)
            try:
                answer = caller.ask(get())
            except EOFError:
                return  # nothing at all is no answer either
            # A reset may overtake the head: then there is a real answer to give.
            assert not answer.whole or answer.status == 502
            assert answer.whole or caller.ended()

    @pytest.mark.parametrize("cut", [b"3\r\nabcX\r\n", b"X\r\n", b"ffffffffffffffffff\r\n", b"-1\r\n"])
    def test_a_body_that_goes_wrong_aborts_the_caller(self, cut: bytes, front: Front) -> None:
        gone = Gone()
        reply = (OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", WaitFor("read"), cut, gone)
        with Upstream(*reply) as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get())
            assert caller.until(b"abc\r\n")
            upstream.set("read")
            assert b"0\r\n\r\n" not in caller.rest()
            gone.wait()

    def test_a_body_cut_short_aborts_an_http_1_0_caller_where_it_can_tell(self, front: Front) -> None:
        request = get().replace(b"HTTP/1.1", b"HTTP/1.0")
        assert not relayed(front, OK + b"Content-Length: 10\r\n\r\nabc", Fin(), request=request).whole
        answer = relayed(front, OK + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", Fin(), request=request)
        assert not (answer.framed and answer.whole)  # unframed, the end of the connection is all there is

"""What an intermediary does to requests, rule by rule (RFC 9110, 9112, 7239), under real servers.

The upstream's bytes are what is looked at. Where the servers differ: README.md.
"""

from __future__ import annotations

import pytest
from rules_kit import Answer, Does, Front, Upstream, chunked, get, post

from pathlb.testing import Reset, Send, http_reply, refused_url

OURS = (
    b"x-forwarded-for: 127.0.0.1\r\nx-forwarded-proto: http\r\nx-forwarded-host: gateway.test\r\n"
    b"x-real-ip: 127.0.0.1\r\nvia: 1.1 gateway-test\r\n"
)
"""The fields that every request gets."""


def arriving(front: Front, request: bytes, **options: object) -> bytes:
    """The only request the upstream gets for it, raw, without what every one has."""
    with Upstream() as upstream:
        front.gateway(upstream, **options)
        assert front.ask(request).status == 200
        raw = upstream.one().raw
    assert raw.count(OURS) == 1
    return raw.replace(OURS, b"")


def refused(front: Front, request: bytes, status: int = 400) -> Answer:
    """The answer to a request of which no upstream hears."""
    with Upstream() as upstream:
        front.gateway(upstream)
        answer = front.ask(request)
        assert answer.status == status
        assert upstream.requests == []
    return answer


def test_what_is_not_for_this_hop_goes_through_byte_for_byte(front: Front) -> None:
    with Upstream() as upstream:
        front.gateway(upstream)
        fields = (b"Accept: */*", b"X-One: a  b", b"X-Two:", b"X-Three: \xe9\xff")
        assert front.ask(post(b"\x00body\xff", *fields, target=b"/a/%7Eb;c?d=%20e&f")).status == 200
        assert upstream.one().raw == (
            b"POST /a/%7Eb;c?d=%20e&f HTTP/1.1\r\nHost: gateway.test\r\n"
            b"accept: */*\r\nx-one: a  b\r\nx-two: \r\nx-three: \xe9\xff\r\n"
            + OURS
            + b"Content-Length: 6\r\n\r\n\x00body\xff"
        )


class TestHopByHop:
    def test_what_connection_names_is_dropped_and_itself(self, front: Front) -> None:
        request = get(
            b"/", b"Connection: close, X-Mine", b"X-Mine: 1", b"Connection: x-other", b"X-Other: 2", b"X-Kept: 3"
        )
        assert arriving(front, request) == b"GET / HTTP/1.1\r\nHost: gateway.test\r\nx-kept: 3\r\n\r\n"

    @pytest.mark.parametrize(
        "field",
        [
            b"Keep-Alive: timeout=5",
            b"Proxy-Connection: keep-alive",
            b"Proxy-Authorization: Basic eDp5",
            b"TE: gzip",
            b"Trailer: X-Sum",
            b"Upgrade: tea/1",
        ],
    )
    def test_fields_of_one_hop_are_dropped(self, field: bytes, front: Front) -> None:
        assert arriving(front, get(b"/", field)) == b"GET / HTTP/1.1\r\nHost: gateway.test\r\n\r\n"

    def test_transfer_encoding_is_of_one_hop(self, front: Front) -> None:
        request = get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"abc", b"de")
        assert arriving(front, request) == b"POST / HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 5\r\n\r\nabcde"

    def test_te_is_dropped_except_trailers(self, front: Front) -> None:
        request = get(b"/", b"TE: gzip;q=0.5, trailers", b"Connection: TE")
        assert arriving(front, request) == (
            b"GET / HTTP/1.1\r\nHost: gateway.test\r\nte: trailers\r\nconnection: te\r\n\r\n"
        )

    def test_connection_may_not_nominate_host_nor_our_own_fields(self, front: Front) -> None:
        names = b"Connection: Host, Content-Length, X-Forwarded-For, X-Forwarded-Proto, X-Real-IP, Via, Authorization"
        raw = arriving(front, post(b"abc", names, b"Authorization: Bearer x"))
        assert raw == (
            b"POST / HTTP/1.1\r\nHost: gateway.test\r\nauthorization: Bearer x\r\nContent-Length: 3\r\n\r\nabc"
        )


class TestFraming:
    def test_content_length_with_transfer_encoding_is_refused(self, front: Front) -> None:
        request = get(b"/", b"Content-Length: 13", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"abc")
        if (
            front.kind == "granian"
        ):  # hides the length, goes by the chunks and closes the connection, as RFC 9112 allows
            with Upstream() as upstream, front.call() as caller:
                front.gateway(upstream)
                assert caller.ask(request).status == 200
                assert caller.ended()
                assert upstream.one().body == b"abc"
        else:
            refused(front, request)

    @pytest.mark.parametrize("lengths", [(b"3", b"4"), (b"3,4",), (b"+3",), (b"3,",), (b"0x3",), (b"-3",)])
    def test_content_lengths_that_differ_or_are_none_are_refused(
        self, lengths: tuple[bytes, ...], front: Front
    ) -> None:
        fields = [b"Content-Length: " + length for length in lengths]
        refused(front, get(b"/", *fields, method=b"POST") + b"abcd")

    def test_repeated_content_length_only_if_identical(self, front: Front) -> None:
        request = get(b"/", b"Content-Length: 3", b"Content-Length: 3", method=b"POST") + b"abc"
        if front.kind == "uvicorn-httptools":
            refused(front, request)
        else:
            expected = b"POST / HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 3\r\n\r\nabc"
            assert arriving(front, request) == expected

    @pytest.mark.parametrize("coding", [b"gzip, chunked", b"gzip", b"xchunked", b"chunked, chunked", b"\x0bchunked"])
    def test_a_transfer_encoding_other_than_chunked_is_refused(self, coding: bytes, front: Front) -> None:
        request = get(b"/", b"Transfer-Encoding: " + coding, method=b"POST") + chunked(b"abc")
        with Upstream() as upstream:
            front.gateway(upstream)
            assert front.ask(request).status in (400, 501)
            assert upstream.requests == []

    def test_http_1_0_has_no_transfer_encoding(self, front: Front) -> None:
        request = get(b"/", b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"abc")
        refused(front, request.replace(b"HTTP/1.1", b"HTTP/1.0"))

    @pytest.mark.parametrize("byte", [b"\r", b"\0"])
    def test_cr_lf_and_nul_in_a_value_are_refused(self, byte: bytes, front: Front) -> None:
        # A lone LF ends the line, for servers that take it at all: test_asgi_smuggling.py.
        refused(front, get(b"/", b"X-Mine: a" + byte + b"b"))

    def test_trailers_are_dropped_or_taken_for_fields_never_forwarded_after_the_body(self, front: Front) -> None:
        body = chunked(b"abc", trailers=[b"X-Sum: 1"])
        raw = arriving(front, get(b"/", b"Transfer-Encoding: chunked", b"Trailer: X-Sum", method=b"POST") + body)
        merged = b"x-sum: 1\r\n" if front.kind == "uvicorn-httptools" else b""
        assert raw == b"POST / HTTP/1.1\r\nHost: gateway.test\r\n" + merged + b"Content-Length: 3\r\n\r\nabc"

    def test_a_body_that_the_server_has_lost_is_not_taken_for_none(self, front: Front) -> None:
        upgrade = (b"Connection: Upgrade", b"Upgrade: h2c")
        for request in (
            post(b"abc", *upgrade),
            get(b"/", *upgrade, b"Transfer-Encoding: chunked", method=b"POST") + chunked(b"abc"),
        ):
            if front.kind == "uvicorn-httptools":
                refused(front, request)
            else:
                expected = b"POST / HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 3\r\n\r\nabc"
                assert arriving(front, request) == expected


class TestTarget:
    def test_exactly_one_host(self, front: Front) -> None:
        refused(front, b"GET / HTTP/1.1\r\nAccept: */*\r\n\r\n")
        refused(front, b"GET / HTTP/1.1\r\nHost:\r\n\r\n")
        refused(front, get(b"/", b"Host: other.test"))
        refused(front, get(b"/", b"Host: gateway.test"))
        refused(front, get(b"/", host=b"a b"))

    @pytest.mark.parametrize(
        "target", [b"http://evil.test/p", b"HTTP://evil.test/p", b"http://evil.test@gateway.test/p"]
    )
    def test_absolute_form_is_refused_or_reduced(self, target: bytes, front: Front) -> None:
        if front.kind in ("uvicorn-h11", "hypercorn"):
            refused(front, get(target))
        else:  # the server has reduced it, and tells nobody
            assert arriving(front, get(target)) == b"GET /p HTTP/1.1\r\nHost: gateway.test\r\n\r\n"

    def test_a_path_that_begins_with_two_slashes_is_a_path(self, front: Front) -> None:
        assert arriving(front, get(b"//evil.test/p?q")) == b"GET //evil.test/p?q HTTP/1.1\r\nHost: gateway.test\r\n\r\n"

    def test_options_for_the_server_as_a_whole_is_answered_here(self, front: Front) -> None:
        answer = refused(front, get(b"*", method=b"OPTIONS"), 200)
        assert answer.body == b""

    @pytest.mark.parametrize("target", [b"/..", b"/a/../../b", b"/%2e%2E/b", b"/a/.%2e/..//../b", b"//../b"])
    def test_a_path_that_leads_out_of_its_root_is_refused(self, target: bytes, front: Front) -> None:
        refused(front, get(target))

    @pytest.mark.parametrize(
        "target", [b"/a/../b", b"/a/./b", b"/a%2Fb", b"/%61", b"/a//b", b"/a?/../../b", b"/...", b"/%00"]
    )
    def test_target_bytes_go_through_untouched(self, target: bytes, front: Front) -> None:
        assert arriving(front, get(target)) == b"GET %b HTTP/1.1\r\nHost: gateway.test\r\n\r\n" % target

    def test_connect_is_refused(self, front: Front) -> None:
        request = get(b"evil.test:443", host=b"evil.test:443", method=b"CONNECT")
        if front.kind == "uvicorn-httptools":  # which cannot parse it
            refused(front, request)
        else:
            assert b"POST" in refused(front, request, 405).one(b"allow")


class TestVia:
    def test_via_is_appended(self, front: Front) -> None:
        with Upstream() as upstream:
            front.gateway(upstream)
            front.ask(get(b"/", b"Via: 1.0 one", b"X-Mine: 1", b"Via: 1.1 two (c), 2 gateway-test2"))
            front.ask(get(b"/").replace(b"HTTP/1.1", b"HTTP/1.0"))
            assert [request.all(b"via") for request in upstream.sent] == [
                [b"1.0 one, 1.1 two (c), 2 gateway-test2, 1.1 gateway-test"],
                [b"1.0 gateway-test"],
            ]

    def test_a_request_that_has_been_here_is_refused(self, front: Front) -> None:
        answer = refused(front, get(b"/", b"Via: 1.0 one, 1.1 gateway-test (x), 1.1 two"), 508)
        assert answer.problem["title"] == "Loop Detected"

    def test_max_forwards_counts_down(self, front: Front) -> None:
        for method in (b"OPTIONS", b"TRACE"):
            raw = arriving(front, get(b"/", b"Max-Forwards: 7", method=method))
            assert raw == b"%b / HTTP/1.1\r\nHost: gateway.test\r\nmax-forwards: 6\r\n\r\n" % method

    def test_max_forwards_0_goes_no_further(self, front: Front) -> None:
        assert refused(front, get(b"/", b"Max-Forwards: 0", method=b"OPTIONS"), 200).body == b""
        assert b"TRACE" not in refused(front, get(b"/", b"Max-Forwards: 0", method=b"TRACE"), 405).one(b"allow")
        refused(front, get(b"/", b"Max-Forwards: -1", method=b"OPTIONS"))

    def test_max_forwards_is_about_trace_and_options_only(self, front: Front) -> None:
        assert b"max-forwards: 0\r\n" in arriving(front, get(b"/", b"Max-Forwards: 0"))


class TestExpect:
    def test_expect_100_continue_is_answered(self, front: Front) -> None:
        with Upstream() as upstream, front.call() as caller:
            front.gateway(upstream)
            caller.send(get(b"/", b"Expect: 100-continue", b"Content-Length: 3", method=b"POST"))
            assert caller.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            assert caller.ask(b"abc").status == 200
            assert upstream.one().body == b"abc"
            assert upstream.one().all(b"expect") == []

    def test_a_request_that_is_refused_is_not_asked_to_continue(self, front: Front) -> None:
        with Upstream() as upstream, front.call() as caller:
            front.gateway(upstream, max_body=10)
            answer = caller.ask(get(b"/", b"Expect: 100-continue", b"Content-Length: 11", method=b"POST"))
            assert answer.status == 413
            assert caller.interim == ([100] if front.kind == "hypercorn" else [])  # which says so before it asks
            assert upstream.requests == []

    def test_never_a_1xx_to_http_1_0(self, front: Front) -> None:
        with Upstream() as upstream, front.call() as caller:
            front.gateway(upstream)
            request = post(b"abc", b"Expect: 100-continue").replace(b"HTTP/1.1", b"HTTP/1.0")
            assert caller.ask(request).status == 200
            assert caller.interim == ([100] if front.kind == "uvicorn-httptools" else [])  # its own doing
            assert upstream.one().body == b"abc"

    def test_a_1xx_of_the_upstream_is_not_passed_on(self, front: Front) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        with Upstream(early, http_reply()) as upstream, front.call() as caller:
            front.gateway(upstream)
            assert caller.ask(get()).status == 200
            assert caller.interim == []

    def test_nothing_else_may_be_expected(self, front: Front) -> None:
        assert refused(front, post(b"abc", b"Expect: tea"), 417).problem["title"] == "Expectation Failed"


class TestFields:
    def test_unknown_fields_go_through_and_those_of_a_name_keep_their_order(self, front: Front) -> None:
        odd = b"!#$%&'*+-.^_`|~: odd"
        raw = arriving(front, get(b"/", b"X-B: 2", b"X-A: 1", b"X-B: 1", odd, b"X-A: 0"))
        if front.kind == "granian":  # which has those of a name together
            fields = (b"x-b: 2", b"x-b: 1", b"x-a: 1", b"x-a: 0", odd)
        else:
            fields = (b"x-b: 2", b"x-a: 1", b"x-b: 1", odd, b"x-a: 0")
        assert raw == b"\r\n".join([b"GET / HTTP/1.1", b"Host: gateway.test", *fields, b"", b""])

    def test_authorization_is_untouched(self, front: Front) -> None:
        fields = (b"Authorization: Bearer a.b.c==", b"Cookie: a=1; b=2")
        assert arriving(front, get(b"/", *fields)) == (
            b"GET / HTTP/1.1\r\nHost: gateway.test\r\nauthorization: Bearer a.b.c==\r\ncookie: a=1; b=2\r\n\r\n"
        )

    @pytest.mark.parametrize("method", [b"PATCH", b"DELETE", b"QUERY", b"PURGE", b"PROPFIND"])
    def test_methods_go_through(self, method: bytes, front: Front) -> None:
        if method == b"QUERY" and front.kind == "uvicorn-httptools":
            pytest.skip("its parser takes the methods it knows")
        raw = arriving(front, post(b"abc", method=method))
        assert raw == b"%b / HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: 3\r\n\r\nabc" % method

    def test_the_gateways_own_host_is_sent_where_one_is_set(self, front: Front) -> None:
        assert arriving(front, get(), host="inner.test:81") == b"GET / HTTP/1.1\r\nHost: inner.test:81\r\n\r\n"


class TestForwarded:
    FORGED = (
        b"Forwarded: for=1.2.3.4;proto=https",
        b"X-Forwarded-For: 1.2.3.4",
        b"X-Forwarded-Proto: https",
        b"X-Forwarded-Host: evil.test",
        b"X-Forwarded-Port: 443",
        b"X-Forwarded-Prefix: /evil",
        b"X-Forwarded-Server: evil",
        b"X-Real-IP: 1.2.3.4",
        b"X_Forwarded_For: 1.2.3.4",
        b"X-Real_IP: 1.2.3.4",
    )

    def test_what_an_untrusted_peer_says_is_stripped(self, front: Front) -> None:
        for trusted in ([], ["10.0.0.0/8", "::1"]):
            raw = arriving(front, get(b"/", *self.FORGED), trusted=trusted)
            assert raw == b"GET / HTTP/1.1\r\nHost: gateway.test\r\n\r\n"

    def test_trusted_networks_are_walked_from_the_right(self, front: Front) -> None:
        with Upstream() as upstream:
            front.gateway(upstream, trusted=["127.0.0.1", "10.0.0.0/8"])
            told = (b"X-Forwarded-For: 1.2.3.4, 192.0.2.7", b"X-Forwarded-For: 10.1.1.1", b"X-Forwarded-Proto: https")
            front.ask(get(b"/", *told, b"X-Forwarded-Host: www.test", b"X-Real-IP: 1.2.3.4"))
            request = upstream.one()
        assert request.one(b"x-forwarded-for") == b"1.2.3.4, 192.0.2.7, 10.1.1.1, 127.0.0.1"
        assert request.one(b"x-real-ip") == b"192.0.2.7"
        assert request.one(b"x-forwarded-proto") == b"https"
        assert request.one(b"x-forwarded-host") == b"www.test"
        assert request.all(b"forwarded") == []


class TestNoForgery:
    """No destination is taken from the request."""

    @pytest.mark.parametrize(
        "request_",
        [
            get(host=b"evil.test"),
            get(b"/", b"X-Forwarded-Host: evil.test"),
            get(b"//evil.test/"),
            get(b"/http://evil.test/"),
            get(b"/@evil.test/"),
            get(b"/", b"X-Original-URL: http://evil.test/", b"X-Rewrite-URL: /evil"),
        ],
    )
    def test_no_destination_from_the_request(self, request_: bytes, front: Front) -> None:
        with Upstream() as upstream:
            front.gateway(upstream)
            assert front.ask(request_).status == 200
            assert upstream.one().line.split()[1] == request_.split()[1]

    def test_redirects_are_not_followed(self, front: Front) -> None:
        with (
            Upstream() as elsewhere,
            Upstream(http_reply(302, b"", [(b"Location", elsewhere.url.encode())])) as upstream,
        ):
            front.gateway(upstream)
            answer = front.ask(get())
            assert (answer.status, answer.one(b"location")) == (302, elsewhere.url.encode())
            assert len(upstream.requests) == 1
            assert elsewhere.connections == 0

    def test_the_environment_names_no_proxy(self, front: Front) -> None:
        arriving(front, get())  # the server's names one that does not exist


class TestRetries:
    """Of two upstreams whichever is asked first resets the connection after it has read the request."""

    @pytest.mark.parametrize(
        ("request_", "sent"),
        [
            (post(b"abc"), 1),
            (post(b"abc", method=b"PATCH"), 1),
            (get(), 2),
            (post(b"abc", method=b"PUT"), 2),
            (post(b"abc", b"Idempotency-Key: 1"), 2),
        ],
    )
    def test_what_is_not_idempotent_is_not_sent_again_when_it_may_have_been_sent(
        self, request_: bytes, sent: int, front: Front
    ) -> None:
        steps = [Reset(), Send(http_reply())]

        class Next(Does):
            def play(self, channel: object) -> None:
                steps.pop(0).play(channel)  # type: ignore[arg-type]

        with Upstream(Next(print)) as one, Upstream(Next(print)) as two:
            front.gateway(one, two, balancer={"attempts": 3})
            assert front.ask(request_).status == (200 if sent == 2 else 502)
            assert len(one.requests) + len(two.requests) == sent

    def test_what_is_provably_not_sent_is_sent_elsewhere(self, front: Front) -> None:
        with Upstream() as upstream, refused_url() as nobody:
            front.gateway(nobody, upstream, balancer={"attempts": 3}, tell=True)
            answers = [front.ask(post(b"abc")) for _ in range(2)]
            assert [answer.status for answer in answers] == [200, 200]
            assert sorted(answer.one(b"x-pathlb-attempts") for answer in answers) == [b"1", b"2"]
            assert len(upstream.requests) == 2

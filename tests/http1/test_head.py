"""Request heads: refused, or read by h11 as exactly the request that was given. Nothing in between."""

from __future__ import annotations

import string
from typing import Any

import h11
import pytest
from http1_servers import Stream, ask
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pathlb.exchange import Headers, Request
from pathlb.upstream.http1 import head as head_module
from pathlb.upstream.http1.head import Head, InvalidRequest, write_head

FUZZ = settings(max_examples=400, deadline=None, derandomize=True, database=None)


def head_of(request: Request, target: bytes = b"/", host: bytes = b"gw", extra: Headers | None = None) -> Head:
    return write_head(request, target, host, extra or [])


def parsed(raw: bytes) -> tuple[h11.Request, bytes, bytes]:
    """The one request h11 reads in these bytes, its body, and what is left over."""
    server = h11.Connection(h11.SERVER, max_incomplete_event_size=10_000_000)
    server.receive_data(raw)
    request = server.next_event()
    assert isinstance(request, h11.Request), request
    body = b""
    while isinstance(event := server.next_event(), h11.Data):
        body += event.data
    assert isinstance(event, h11.EndOfMessage), event
    return request, body, server.trailing_data[0]


def same(request: Request, target: bytes, host: bytes, extra: Headers, head: Head) -> None:
    """h11 reads what was given, and what it reads ends where the request does."""
    assert isinstance(request.body, bytes)
    body = request.body if head.length is not None else b"%x\r\n%b\r\n0\r\n\r\n" % (len(request.body), request.body)
    if head.length is None and not request.body:
        body = b"0\r\n\r\n"
    read, content, rest = parsed(head.data + body)
    assert (read.method, read.target) == (request.method.encode(), target)
    assert (content, rest) == (request.body, b"")
    pairs = [(b"Host", host), *request.headers, *extra]
    given = [(name.lower(), value.strip(b" \t")) for name, value in pairs]  # blanks around a value are not part of it
    heard = [(name, value) for name, value in read.headers]
    # h11 makes one of equal lengths, and lower case of chunked; a length that was not given is the writer's.
    framing = (b"content-length", b"transfer-encoding")
    assert [pair for pair in heard if pair[0] not in framing] == [pair for pair in given if pair[0] not in framing]
    for name in framing:
        values = {value.lower() for known, value in given if known == name}
        heard_values = [value for known, value in heard if known == name]
        if values:
            assert heard_values == list(values)
        elif heard_values:
            assert (name, heard_values) == (b"content-length", [b"%d" % len(request.body)])


# --- anything at all

NASTY = st.sampled_from([b"\r", b"\n", b"\0", b"\r\n", b" ", b"\t", b":", b"\x0b", b"\x7f", b"\xff", b"\x85", b"a"])
ANYTHING = st.one_of(st.binary(max_size=12), st.lists(NASTY, max_size=6).map(b"".join))
NAMES = st.sampled_from(
    b"A|x-b|Content-Length|content-length|Transfer-Encoding|Connection|Host|Upgrade|Expect|A b|A:||\xc3\xa9".split(b"|")
)
VALUES = st.sampled_from([b"0", b"5", b"05", b"+5", b"5, 5", b"chunked", b"CHUNKED", b"gzip, chunked", b"close", b"b"])
TOKENS = st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~", min_size=1, max_size=12)
METHODS = st.one_of(TOKENS, st.sampled_from(["GET", "POST", "HEAD", "", "GE T", "GET\r\n", "G\0T", "GÉT"]), st.text())
TARGETS = st.one_of(ANYTHING.map(lambda data: b"/" + data), st.binary(max_size=8), st.just(b"/a?b=%20c"), st.just(b"*"))
HEADERS = st.lists(st.tuples(st.one_of(NAMES, ANYTHING), st.one_of(VALUES, ANYTHING)), max_size=4)
BODIES = st.sampled_from([b"", b"hello"])
HOSTS = st.one_of(st.just(b"gw:80"), ANYTHING)


def h11_would_not(method: str, headers: Headers, host: bytes) -> bool:
    """What h11 refuses and we do not: white space other than blanks in a value. And it has other plans with CONNECT."""
    values = [host, *(value for _, value in headers)]
    return method == "CONNECT" or any(odd in value for odd in b"\x0b\x0c" for value in values)


@FUZZ
@given(METHODS, TARGETS, HEADERS, BODIES, HOSTS, HEADERS)
@example("GET", b"/", [(b"A", b"b\r\n\r\nGET /evil HTTP/1.1")], b"", b"gw", [])
@example("POST", b"/", [(b"Content-Length", b"5"), (b"content-length", b"5")], b"hello", b"gw", [])
@example("POST", b"/", [], b"hello", b"gw", [(b"Transfer-Encoding", b"chunked")])
def test_refused_or_read_as_it_was_given(
    method: str, target: bytes, headers: Headers, body: bytes, host: bytes, extra: Headers
) -> None:
    request = ask(method, headers, body)
    try:
        head = write_head(request, target, host, extra)
    except InvalidRequest:
        return
    if not h11_would_not(method, [*headers, *extra], host):
        same(request, target, host, extra, head)


# --- valid requests, none of which may be refused

VISIBLE = "".join(map(chr, range(0x21, 0x7F)))
VALID_VALUES = st.binary(max_size=20).map(lambda data: data.translate(None, b"\r\n\0\x0b\x0c"))
VALID_HEADERS = st.lists(st.tuples(TOKENS.map(str.encode).map(lambda name: b"X-" + name), VALID_VALUES), max_size=6)


@FUZZ
@given(
    TOKENS.filter(lambda method: method != "CONNECT"),
    st.text(VISIBLE, min_size=1, max_size=20).map(str.encode),
    VALID_HEADERS,
    st.binary(max_size=20),
    VALID_HEADERS,
    st.booleans(),
)
def test_every_valid_request_is_written(
    method: str, target: bytes, headers: Headers, body: bytes, extra: Headers, chunked: bool
) -> None:
    if chunked:
        headers = [*headers, (b"Transfer-Encoding", b"chunked")]
    request = ask(method, headers, body)
    same(request, target, b"gw", extra, write_head(request, target, b"gw", extra))


# --- by name

SMUGGLED = b"b\r\n\r\nGET /evil HTTP/1.1\r\nHost: evil\r\n\r\n"
CHUNKED = (b"Transfer-Encoding", b"chunked")
FIVE = (b"Content-Length", b"5")


@pytest.mark.parametrize(
    "headers",
    [
        [(b"A", SMUGGLED)],
        [(b"A", b"b\rc")],
        [(b"A", b"b\nc")],
        [(b"A", b"b\0c")],
        [(b"A", b"\r\n")],
        [(b"A", b"b\r\n folded")],
        [(b"A\r\nB", b"b")],
        [(b"A\0", b"b")],
        [(b"A ", b"b")],
        [(b"A: b\r\nB", b"b")],
        [(b"Transfer-Encoding ", b"chunked")],
        [(b"\tTransfer-Encoding", b"chunked")],
        [(b"", b"b")],
        [(b"\xc3\xa9", b"b")],
        [(b"Host", b"other")],
        [(b"hOST", b"gw")],
        [FIVE, CHUNKED],
        [CHUNKED, FIVE],
        [CHUNKED, CHUNKED],
        [(b"Transfer-Encoding", b"gzip, chunked")],
        [(b"Transfer-Encoding", b"chunked, identity")],
        [(b"Transfer-Encoding", b"identity")],
        [(b"Transfer-Encoding", b"xchunked")],
        [(b"Transfer-Encoding", b" chunked")],
        [(b"Transfer-Encoding", b"chunked\x0b")],
        [(b"Transfer-Encoding", b"")],
        [FIVE, (b"Content-Length", b"6")],
        [(b"Content-Length", b"4")],
        [(b"Content-Length", b"6")],
        [(b"Content-Length", b"+5")],
        [(b"Content-Length", b"-5")],
        [(b"Content-Length", b"5 ")],
        [(b"Content-Length", b"5, 5")],
        [(b"Content-Length", b"0x5")],
        [(b"Content-Length", b"5_0")],
        [(b"Content-Length", "\u0665".encode())],
        [(b"Content-Length", b"")],
        [(b"Content-Length", b"9" * 5000)],
    ],
    ids=lambda headers: repr(headers)[:60],
)
@pytest.mark.parametrize("where", ["headers", "extra"])
def test_headers_that_two_readers_could_take_for_different_requests(headers: Headers, where: str) -> None:
    request = ask("POST", headers if where == "headers" else [], b"hello")
    for _ in range(2):  # what was looked at before is not let through the second time
        with pytest.raises(InvalidRequest) as caught:
            head_of(request, extra=headers if where == "extra" else [])
    assert "evil" not in str(caught.value)


def test_one_framing_from_each_side() -> None:
    for headers, extra in ([FIVE], [CHUNKED]), ([CHUNKED], [FIVE]), ([FIVE], [(b"Content-Length", b"6")]):
        with pytest.raises(InvalidRequest):
            head_of(ask("POST", headers, b"hello"), extra=extra)


@pytest.mark.parametrize("host", [b"gw\r\nA: b", b"gw\n", b"\rgw", b"g\0w", SMUGGLED])
def test_a_host_that_is_more_than_one(host: bytes) -> None:
    with pytest.raises(InvalidRequest):
        head_of(ask(), host=host)


@pytest.mark.parametrize(
    "target", [b"", b" ", b"/ ", b"/a b", b"/\r\nA: b", b"/\n", b"/\0", b"/\x7f", b"/\xc3\xa9", b"/\t"]
)
def test_a_target_that_is_more_than_one(target: bytes) -> None:
    with pytest.raises(InvalidRequest):
        head_of(ask(), target)


@pytest.mark.parametrize(
    "method", ["", " ", "GET ", "GET /evil HTTP/1.1\r\n\r\nGET", "G\nT", "G\0", "GÉT", "G:T", "G\u212aT"]
)
def test_a_method_that_is_none(method: str) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            head_of(ask(method))


@pytest.mark.parametrize("body", [b"hello", b""])
def test_equal_lengths_are_one_length(body: bytes) -> None:
    length = (b"Content-Length", b"%d" % len(body))
    assert head_of(ask("POST", [length, length], body)).length == len(body)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (ask(), {"length": 0}),
        (ask("POST", body=b"hello"), {"length": 5}),
        (ask("POST", [CHUNKED], b"hello"), {"length": None}),
        (ask("POST", body=Stream().body), {"length": None}),
        (ask("POST", [FIVE], Stream().body), {"length": 5}),
        (ask("POST", [CHUNKED], Stream().body), {"length": None}),
        (ask(headers=[(b"connection", b"keep-alive, Close")]), {"closes": True}),
        (ask(headers=[(b"Connection", b"keep-alive")]), {}),
        (ask(headers=[(b"Connection", b"upgrade"), (b"Upgrade", b"websocket")]), {"upgrades": True}),
        (ask("POST", [(b"expect", b"100-Continue")], b"x"), {"expects": True, "length": 1}),
        (ask("POST", [(b"Expect", b"100-continue")], Stream().body), {"expects": True, "length": None}),
        (ask("POST", [(b"Expect", b"100-continue")]), {}),
        (ask("POST", [(b"Expect", b"other")], b"x"), {"length": 1}),
    ],
)
def test_what_the_head_says_to_the_connection(request_: Request, expected: dict[str, Any]) -> None:
    head = head_of(request_)
    facts = {"length": 0, "closes": False, "upgrades": False, "expects": False} | expected
    assert {name: getattr(head, name) for name in facts} == facts


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that makes up methods and names must not fill the memory; they are let through all the same."""
    methods: dict[str, bytes] = {}
    names: set[bytes] = set()
    monkeypatch.setattr(head_module, "_METHODS", methods)
    monkeypatch.setattr(head_module, "_PLAIN_NAMES", names)
    monkeypatch.setattr(head_module, "_KNOWN_MAX", 10)
    for number in range(30):
        raw = head_of(ask(f"M{number}", [(b"X-%d" % number, b"a")])).data
        assert raw.startswith(b"M%d / " % number)
        assert b"X-%d: a\r\n" % number in raw
    assert (len(methods), len(names)) == (10, 10)


def test_names_that_were_remembered_are_not_mixed_up_with_special_ones() -> None:
    """Content-Length is looked at every time."""
    for body in (b"hello", b"", b"ab"):
        assert head_of(ask("POST", [(b"Content-Length", b"%d" % len(body))], body)).length == len(body)
    with pytest.raises(InvalidRequest):
        head_of(ask("POST", [FIVE], b"ab"))

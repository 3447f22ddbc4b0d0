"""The fields of requests, as servers hand them over: those that none of the real ones lets through, too."""

from __future__ import annotations

import pytest

from pathlb.asgi.headers import BadRequest, Framing, Known, read_request
from pathlb.exchange import Headers

HOST = (b"host", b"www.test")


def read(*fields: tuple[bytes, bytes], version: str = "1.1", known: Known | None = None) -> Framing:
    return read_request([HOST, *fields], known or Known(), version)


@pytest.mark.parametrize(
    "field",
    [
        (b"x-a", b"b\r\nc: d"),
        (b"x-a", b"b\nc"),
        (b"x-a", b"b\rc"),
        (b"x-a", b"b\0c"),
        (b"via", b"b\nc"),
        (b"x-a\n", b"b"),
        (b"x a", b"b"),
        (b"x-a:", b"b"),
        (b"", b"b"),
        (b"x-\xe9", b"b"),
        (b"host", b"www.test"),
        (b"host", b"other.test"),
        (b"transfer-encoding", b"gzip"),
        (b"transfer-encoding", b"chunked, chunked"),
        (b"transfer-encoding", b""),
        (b"content-length", b""),
        (b"content-length", b"-1"),
        (b"content-length", b"1_0"),
        (b"content-length", b"\xb2"),
        (b"content-length", b"1" * 19),
        (b"content-length", b"1, 2"),
    ],
)
def test_what_is_refused(field: tuple[bytes, bytes]) -> None:
    known = Known()
    for _ in range(2):  # what has been seen before is no better
        with pytest.raises(BadRequest) as refused:
            read(field, known=known)
        assert refused.value.status == 400


@pytest.mark.parametrize("host", [b"", b" ", b"a b", b"a/b", b"a@b", b"a?b", b"a#b", b"a\\b", b"a,b/c", b"\xe9"])
def test_hosts_that_are_none(host: bytes) -> None:
    with pytest.raises(BadRequest, match="Host"):
        read_request([(b"host", host)], Known())


@pytest.mark.parametrize(
    "host", [b"a", b"a.test:80", b"127.0.0.1:8080", b"[2001:db8::1]:80", b"a_b", b"xn--caf-dma.test"]
)
def test_hosts(host: bytes) -> None:
    known = Known()
    assert [read_request([(b"host", host)], known).host for _ in range(2)] == [host, host]


@pytest.mark.parametrize("lengths", [[b"3"], [b"3", b"3"], [b"3, 3"], [b"3", b"3,3"], [b" 3 "]])
def test_lengths(lengths: list[bytes]) -> None:
    framing = read(*((b"content-length", length) for length in lengths))
    assert (framing.length, framing.open_ended) == (3, False)


def test_a_length_and_chunks() -> None:
    for fields in ([(b"content-length", b"3"), (b"transfer-encoding", b"chunked")],):
        for order in (fields, fields[::-1]):
            with pytest.raises(BadRequest, match="exclude"):
                read(*order)


def test_chunks() -> None:
    framing = read((b"transfer-encoding", b"Chunked"))
    assert (framing.length, framing.open_ended, framing.headers) == (None, True, [])
    for version in ("1.0", "1"):
        with pytest.raises(BadRequest, match=r"HTTP/1\.0"):
            read((b"transfer-encoding", b"chunked"), version=version)


def test_http_2() -> None:
    cookies = [(b"cookie", b"a=1"), (b"x-a", b"1"), (b"cookie", b"b=2")]
    framing = read(*cookies, version="2")
    assert framing.open_ended
    assert framing.headers == [(b"x-a", b"1"), (b"cookie", b"a=1; b=2")]
    assert read(*cookies).headers == cookies
    assert not read((b"content-length", b"3"), version="2").open_ended


def test_names_in_any_case_and_order() -> None:
    known = Known()
    fields = [(b"X-B", b"2"), (b"x-a", b"1"), (b"Accept", b"*/*"), (b"x-b", b"1")]
    expected = [(name.lower(), value) for name, value in fields]
    for _ in range(2):
        assert read(*fields, known=known).headers == expected
    lowered = [(name.lower(), value) for name, value in fields]
    for _ in range(2):
        assert read(*lowered, known=known).headers == expected


def test_names_beyond_those_kept_in_mind() -> None:
    known = Known()
    for number in range(1_100):
        read((b"x-%d" % number, b""), known=known)
    read((b"x" * 1_000, b""), known=known)
    assert len(known.plain) == 1_000
    assert max(map(len, known.plain)) < 10
    for _ in range(2):
        assert read((b"x-1", b"a"), (b"x-new", b"b"), (b"x-1", b"c"), known=known).headers == [
            (b"x-1", b"a"),
            (b"x-new", b"b"),
            (b"x-1", b"c"),
        ]
        with pytest.raises(BadRequest, match="name"):
            read((b"x new", b""), known=known)


@pytest.mark.parametrize(
    ("connection", "left"),
    [
        (b"keep-alive", [b"x-a", b"x-b", b"authorization"]),
        (b"close", [b"x-a", b"x-b", b"authorization"]),
        (b"X-A", [b"x-b", b"authorization"]),
        (b" x-a ,, X-B,Authorization , Content-Type", [b"authorization"]),
        (b"", [b"x-a", b"x-b", b"authorization"]),
    ],
)
def test_nominations(connection: bytes, left: list[bytes]) -> None:
    fields: Headers = [(b"x-a", b""), (b"x-b", b""), (b"authorization", b"")]
    assert [name for name, _ in read((b"connection", connection), *fields).headers] == left


def test_what_is_kept_apart() -> None:
    framing = read((b"via", b"1.0 a"), (b"x_real-ip", b"1.2.3.4"), (b"Via", b"1.1 b"), (b"upgrade", b"h2c"))
    assert framing.via == [b"1.0 a", b"1.1 b"]
    assert framing.told == [(b"x_real-ip", b"1.2.3.4")]
    assert (framing.upgrade, framing.headers) == (True, [])

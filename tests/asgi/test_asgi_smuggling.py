"""Requests that two readers may read in two ways: for one that is sent, at most one reaches an upstream.

What follows on the connection is the proof: the next request arrives as it was sent, and nothing was in between.
"""

from __future__ import annotations

import contextlib
import socket

import pytest
from rules_kit import Front, Sent, Upstream, chunked, get, post

HIDDEN = get(b"/smuggled")
ENCODED = b"/first%0d%0aHost:%20evil.test%0d%0a%0d%0aGET%20/smuggled"
CHUNKED = b"Transfer-Encoding: chunked"


def _te(*fields: bytes) -> bytes:
    return get(b"/first", *fields, method=b"POST")


ATTACKS = {
    "CL.TE": _te(b"Content-Length: %d" % (5 + len(HIDDEN)), CHUNKED) + b"0\r\n\r\n" + HIDDEN,
    "TE.CL": _te(b"Content-Length: 4", CHUNKED) + chunked(HIDDEN),
    "TE.CL, 0 in front": _te(b"Content-Length: 0", CHUNKED) + chunked(HIDDEN),
    "TE.TE": _te(CHUNKED, b"Transfer-Encoding: identity") + chunked(HIDDEN),
    "TE twice": _te(CHUNKED, CHUNKED) + chunked(HIDDEN),
    "TE after a list": _te(b"Transfer-Encoding: gzip, chunked") + chunked(HIDDEN),
    "TE with a vertical tab": _te(b"Transfer-Encoding: \x0bchunked", b"Content-Length: 4") + chunked(HIDDEN),
    "TE in a fold": _te(b"Transfer-Encoding:\r\n chunked", b"Content-Length: 4") + chunked(HIDDEN),
    "TE before a space": _te(b"Transfer-Encoding : chunked", b"Content-Length: 4") + chunked(HIDDEN),
    "TE with an underscore": _te(b"Transfer_Encoding: chunked", b"Content-Length: 4") + b"0\r\n\r",
    "TE with a NUL": _te(b"Transfer-Encoding: chunked\0", b"Content-Length: 4") + chunked(HIDDEN),
    "TE in HTTP/1.0": _te(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0") + chunked(HIDDEN),
    "two CL": _te(b"Content-Length: 0", b"Content-Length: %d" % len(HIDDEN)) + HIDDEN,
    "two CL, the other way": _te(b"Content-Length: %d" % len(HIDDEN), b"Content-Length: 0") + HIDDEN,
    "CL in a list": _te(b"Content-Length: 0, %d" % len(HIDDEN)) + HIDDEN,
    "CL with a sign": _te(b"Content-Length: +%d" % len(HIDDEN)) + HIDDEN,
    "CL with a space": _te(b"Content-Length : %d" % len(HIDDEN)) + HIDDEN,
    "CL in a fold": _te(b"Content-Length: 0\r\n %d" % len(HIDDEN)) + HIDDEN,
    "CL of a GET": get(b"/first", b"Content-Length: %d" % len(HIDDEN)) + HIDDEN,
    "CL too great": _te(b"Content-Length: 18446744073709551616") + HIDDEN,
    "bare LF before TE": _te(b"X: a\nTransfer-Encoding: chunked", b"Content-Length: 4") + chunked(HIDDEN),
    "bare LF everywhere": _te(b"Content-Length: 0").replace(b"\r\n", b"\n") + HIDDEN.replace(b"/smuggled", b"/second"),
    "bare CR before CL": _te(b"X: a\rContent-Length: %d" % len(HIDDEN)) + HIDDEN,
    "bare LF for a chunk's end": _te(CHUNKED) + b"2\nab\n0\n\n" + HIDDEN.replace(b"/smuggled", b"/second"),
    "a chunk size in hex": _te(CHUNKED) + b"0x%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    "a chunk extension with a LF": _te(CHUNKED) + b"2;\nab\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(HIDDEN), HIDDEN),
    "a chunk that is too long": _te(CHUNKED) + b"2\r\nabc\r\n0\r\n\r\n" + HIDDEN,
    "a chunk size too great": _te(CHUNKED) + b"10000000000000000\r\n" + HIDDEN,
    "a trailer that frames": _te(CHUNKED) + chunked(b"ab", trailers=[b"Content-Length: %d" % len(HIDDEN)]),
    "absolute form": get(b"http://evil.test/first", host=b"gateway.test"),
    "a path like a host": get(b"//evil.test/first"),
    "a path with a line break": get(ENCODED),
    "a path with a space": get(b"/first HTTP/1.1 /smuggled"),
    "a name with a line break": get(b"/first", b"X\r: a"),
    "a name that is empty": get(b"/first", b": a"),
    "a value with a line break": get(b"/first", b"X: a\r\n\tGET /smuggled HTTP/1.1"),
    "a Host with a path": get(b"/first", host=b"gateway.test/smuggled"),
    "a Host with a line": get(b"/first", host=b"gateway.test\nX-Evil: 1"),
    "no Host": b"GET /first HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /first\r\n",
    "HTTP/3.0": get(b"/first").replace(b"HTTP/1.1", b"HTTP/3.0"),
    "an upgrade with a body": post(HIDDEN, b"Connection: Upgrade", b"Upgrade: h2c", target=b"/first"),
    "an upgrade with chunks": _te(b"Connection: Upgrade", b"Upgrade: h2c", CHUNKED) + chunked(HIDDEN),
    "a CONNECT with a body": get(b"/first", b"Content-Length: 0", method=b"CONNECT") + b"",
    "a nominated length": post(HIDDEN, b"Connection: Content-Length", target=b"/first"),
    "nominated chunks": _te(b"Connection: Transfer-Encoding", CHUNKED) + chunked(HIDDEN),
    "a long body in chunks": _te(CHUNKED) + chunked(*[HIDDEN * 100] * 20),
    "a long body that is announced": post(HIDDEN * 2000, target=b"/first"),
    "an expectation": post(HIDDEN, b"Expect: 100-continue", target=b"/first"),
    "an expectation of tea": post(HIDDEN, b"Expect: tea", target=b"/first"),
}


AFTER = post(b"after", b"Connection: close", target=b"/after")


def arriving(front: Front, *parts: bytes) -> list[Sent]:
    """All that arrives at an upstream of these bytes on one connection, and of two requests on others after it."""
    with Upstream() as upstream, Upstream() as nothing:
        front.gateway(upstream)
        # The servers may close before all of it is written.
        with front.call() as caller, contextlib.suppress(OSError):
            caller.send(*parts)
            caller.sock.shutdown(socket.SHUT_WR)
            caller.rest()
        for _ in range(2):
            assert front.ask(AFTER).status == 200
        front.gateway(nothing)  # which ends whatever may still be under way
        return upstream.sent


def is_after(request: Sent) -> bool:
    return request.line == b"POST /after HTTP/1.1" and request.raw.endswith(b"\r\nContent-Length: 5\r\n\r\nafter")


@pytest.mark.parametrize("attack", ATTACKS)
def test_at_most_one_request_reaches_an_upstream_for_each_that_is_sent(attack: str, front: Front) -> None:
    """What follows on the connection is somebody else's, where a proxy in front shares it between callers."""
    sent = 2 if b"/second" in ATTACKS[attack] else 1  # to a server that takes bare line ends
    arrived = arriving(front, ATTACKS[attack], AFTER)
    after = sum(map(is_after, arrived))
    assert 2 <= after <= 3
    assert len(arrived) <= after + sent
    for request in arrived:
        assert request.one(b"host") == b"gateway.test"
        assert request.line.split()[1] in (b"/after", b"/first", b"/second", b"//evil.test/first", ENCODED)

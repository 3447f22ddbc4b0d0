"""A request head as bytes, and how its body is framed. What is not valid HTTP never leaves (`InvalidRequest`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...exchange import Headers, Request

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2: methods and field names
_TARGET = re.compile(rb"[\x21-\x7e]+")  # RFC 9112 3.2, without taking it apart: the servers' business
_KNOWN_TOKENS: set[bytes] = set()
_KNOWN_TOKENS_MAX = 1_000  # callers use a few dozen names; one that makes them up must not fill the memory

# Fields that say something to a connection, by the length of their name: most names are ruled out by that alone.
_SPECIAL_LENGTHS = frozenset(
    map(len, (b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"))
)

_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH"})
"""Methods whose empty body is announced (RFC 9110 8.6)."""


class InvalidRequest(ValueError):
    """The request cannot be written as HTTP/1.1; nothing was sent. The message quotes no value: it may be a secret."""


class Head(NamedTuple):
    """A request head, ready to be written."""

    data: bytes
    length: int | None
    """Bytes of body to follow; None is chunked."""
    closes: bool
    """The request says `Connection: close`."""
    upgrades: bool
    """It asks for another protocol: a 101 is an answer."""
    expects: bool
    """It says `Expect: 100-continue` and has a body: the body waits for the go-ahead."""


def write_head(request: Request, target: bytes, host: bytes, extra: Headers) -> Head:
    """The head of a request. Raises `InvalidRequest`.

    A body without a framing field of its own gets one. Field values may hold anything but CR, LF and NUL (RFC 9110
    5.5): those would be somebody else's request.
    """
    method = request.method.encode("ascii", "replace")
    if method not in _KNOWN_TOKENS:
        _check_token("method", method)
    if not _TARGET.fullmatch(target):
        raise InvalidRequest("the request target has characters that are not allowed there; encode them")
    body = request.body
    in_memory = isinstance(body, bytes)
    length: int | None = None
    chunked = closes = upgrades = expects = False
    lines = [b"%b %b HTTP/1.1\r\nHost: %b\r\n" % (method, target, host)]
    for pair in (*request.headers, *extra) if extra else request.headers:
        name = pair[0]
        if name not in _KNOWN_TOKENS:
            _check_token("header name", name)
        lines.append(b"%b: %b\r\n" % pair)
        if len(name) in _SPECIAL_LENGTHS:
            lower = name.lower()
            if lower == b"content-length":
                length = _length(pair[1], length)
            elif lower == b"transfer-encoding":
                if chunked or pair[1].lower() != b"chunked":
                    raise InvalidRequest("the only Transfer-Encoding of a request that is supported is chunked")
                chunked = True
            elif lower == b"connection":
                closes = closes or b"close" in pair[1].lower()
            elif lower == b"host":
                raise InvalidRequest("a second Host, which another reader may take for the only one")
            elif lower == b"upgrade":
                upgrades = True
            elif lower == b"expect":
                expects = pair[1].lower() == b"100-continue"
    if chunked and length is not None:
        raise InvalidRequest("a request with both Content-Length and Transfer-Encoding can be read in two ways")
    if in_memory and not chunked:
        assert isinstance(body, bytes)
        if length is None:
            length = len(body)
            if length or request.method in _BODY_EXPECTED:
                lines.append(b"Content-Length: %d\r\n" % length)
        elif length != len(body):
            raise InvalidRequest(f"the Content-Length is {length}, the body has {len(body)} bytes")
    elif length is None and not chunked:
        lines.append(b"Transfer-Encoding: chunked\r\n")
    lines.append(b"\r\n")
    data = b"".join(lines)
    # Every line but the empty one is a piece, and one of ours holds two: more line ends came with a value.
    ends = len(lines) + 1
    if data.count(b"\n") != ends or data.count(b"\r") != ends or b"\0" in data:
        raise InvalidRequest("a header value holds a line end or a NUL")
    return Head(data, length, closes, upgrades, expects and length != 0)


def _length(value: bytes, before: int | None) -> int:
    if not value.isdigit():
        raise InvalidRequest("the Content-Length is not a number")
    length = int(value)
    if before is not None and before != length:
        raise InvalidRequest("two Content-Length fields that differ")
    return length


def _check_token(what: str, token: bytes) -> None:
    if not _TOKEN.fullmatch(token):
        raise InvalidRequest(f"a {what} has characters that are not allowed there")
    if len(_KNOWN_TOKENS) < _KNOWN_TOKENS_MAX:
        _KNOWN_TOKENS.add(token)

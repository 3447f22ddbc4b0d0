"""A request head as bytes, and how its body is framed. What is not valid HTTP never leaves (`InvalidRequest`)."""

from __future__ import annotations

import re
from typing import NamedTuple

from ...exchange import Headers, Request

_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2: methods and field names
_TARGET = re.compile(rb"[\x21-\x7e]+")  # RFC 9112 3.2, without taking it apart: the servers' business
_SPECIAL = frozenset({b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade", b"expect"})
"""Fields that say something to the connection."""

_LINE = b": ".join

_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH", "QUERY"})
"""Methods whose empty body is announced (RFC 9110 8.6)."""

# Callers use a few dozen methods, names and targets; those that passed are not looked at again. One who makes them up
# must not fill the memory.
_METHODS: dict[str, bytes] = {}
_TARGETS: set[bytes] = set()
_PLAIN_NAMES: set[bytes] = set()
_KNOWN_MAX = 1_000
_KNOWN_LENGTH = 100
_LONGEST = 15  # digits of a length: beyond any body, and where readers begin to differ


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
    method = _METHODS.get(request.method) or _method(request.method)
    if target not in _TARGETS and not _is_target(target):
        raise InvalidRequest("the request target has characters that are not allowed there; encode them")
    body = request.body
    length: int | None = None
    chunked = closes = upgrades = expects = False
    headers = [*request.headers, *extra] if extra else request.headers
    for name, value in [pair for pair in headers if pair[0] not in _PLAIN_NAMES]:
        name = _special(name)
        if name == b"content-length":
            length = _length(value, length)
        elif name == b"transfer-encoding":
            if chunked or value.lower() != b"chunked":
                raise InvalidRequest("the only Transfer-Encoding of a request that is supported is chunked")
            chunked = True
        elif name == b"connection":
            closes = closes or b"close" in value.lower()
        elif name == b"host":
            raise InvalidRequest("a second Host, which another reader may take for the only one")
        elif name == b"upgrade":
            upgrades = True
        elif name == b"expect":
            expects = value.lower() == b"100-continue"
    lines = [b"%b %b HTTP/1.1" % (method, target), b"Host: " + host, *map(_LINE, headers)]
    if chunked and length is not None:
        raise InvalidRequest("a request with both Content-Length and Transfer-Encoding can be read in two ways")
    if length is None and not chunked:
        lines += map(_LINE, framing_of(request))
        if isinstance(body, bytes):
            length = len(body)
    elif isinstance(body, bytes) and length is not None and length != len(body):
        raise InvalidRequest(f"the Content-Length is {length}, the body has {len(body)} bytes")
    lines += (b"", b"")
    data = b"\r\n".join(lines)
    ends = len(lines) - 1
    if data.count(b"\n") != ends or data.count(b"\r") != ends or b"\0" in data:
        raise InvalidRequest("a header value holds a line end or a NUL")
    return Head(data, length, closes, upgrades, expects and length != 0)


def framing_of(request: Request) -> Headers:
    """The field that a body without one is to have."""
    body = request.body
    if not isinstance(body, bytes):
        return [(b"Transfer-Encoding", b"chunked")]
    if body or request.method in _BODY_EXPECTED:
        return [(b"Content-Length", b"%d" % len(body))]
    return []


def _method(method: str) -> bytes:
    token = method.encode("ascii", "replace")
    if not _TOKEN.fullmatch(token):
        raise InvalidRequest("the method has characters that are not allowed there")
    if len(_METHODS) < _KNOWN_MAX and len(method) < _KNOWN_LENGTH:
        _METHODS[method] = token
    return token


def _is_target(target: bytes) -> bool:
    if not _TARGET.fullmatch(target):
        return False
    if len(_TARGETS) < _KNOWN_MAX and len(target) < _KNOWN_LENGTH:
        _TARGETS.add(target)
    return True


def _special(name: bytes) -> bytes:
    """The lower-case name of a field that says something to the connection; empty for all others, once checked."""
    lower = name.lower()
    if lower in _SPECIAL:
        return lower
    if not _TOKEN.fullmatch(name):
        raise InvalidRequest("a header name has characters that are not allowed there")
    if len(_PLAIN_NAMES) < _KNOWN_MAX and len(name) < _KNOWN_LENGTH:
        _PLAIN_NAMES.add(name)
    return b""


def _length(value: bytes, before: int | None) -> int:
    if not value.isdigit() or len(value) > _LONGEST:
        raise InvalidRequest("the Content-Length is not a number a body can have")
    length = int(value)
    if before is not None and before != length:
        raise InvalidRequest("two Content-Length fields that differ")
    return length

"""The header fields an intermediary takes out, refuses or adds (RFC 9110, section 7; RFC 9112, section 6).

ASGI servers differ in what they let through, so nothing is taken for checked that is not checked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from ..exchange import Headers
from ..orca import FIELD
from .forwarded import FORWARDED


class BadRequest(Exception):
    """The request cannot be forwarded; the text says why, to the caller."""

    def __init__(self, detail: str, status: int = 400) -> None:
        super().__init__(detail)
        self.status = status


class BadReply(Exception):
    """The reply cannot be handed over; the text says why, to the log."""


class Framing(NamedTuple):
    """What the fields of a request say about its body, and where it is meant to go."""

    headers: Headers
    """Those to forward, in order, without Host, Via and what is in `told`."""
    host: bytes
    length: int | None
    """Content-Length, if there is one."""
    open_ended: bool
    """A body may come whose length nobody has said: chunks, or HTTP/2."""
    via: list[bytes]
    told: Headers
    """What the peer says about where the request came from: X-Forwarded-For and the like."""
    upgrade: bool
    """It would rather speak another protocol than HTTP/1.1."""
    expects: bool
    """The caller sends its body only when it is asked for (`Expect: 100-continue`)."""
    trailers: bool
    """Fields after the body of the reply are welcome."""


_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_OF_REPLIES = _HOP_BY_HOP | {FIELD, FIELD + b"-bin"}
"""What of a reply is for this hop: the load of an endpoint is not that of the gateway, either."""
TAKEN_OUT = _HOP_BY_HOP | FORWARDED | {b"content-length", b"expect", b"host", b"via"}
"""Fields of a request that are not simply passed on."""
_NEVER_NOMINATED = frozenset(
    {b"authorization", b"cache-control", b"content-encoding", b"content-language", b"content-location"}
    | {b"content-range", b"content-type", b"cookie", b"idempotency-key", b"origin", b"range", b"set-cookie"}
    | {b"content-length"}
)
"""What nobody may have taken out by naming it in Connection: it is meant for all who see the message."""
_NUL, _LF, _CR = b"\0\n\r"  # as numbers: looking for those is a tenth of the work
_USUAL = frozenset({b"keep-alive", b"close"})
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch
_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]+").fullmatch
_KEPT = 1_000
_LONGEST_KEPT = 64
_BODILESS = frozenset({204, 304})


class Known:
    """Names and hosts known to be valid, so that the usual ones are not matched again and again."""

    def __init__(self) -> None:
        self.plain: set[bytes] = set()
        """Names of request fields that are passed on as they are."""
        self.lower: dict[bytes, bytes] = {}
        """The same of reply fields, as gateways spell them, and in lower case."""
        self._hosts: set[bytes] = set()

    def check_name(self, name: bytes) -> None:
        """Raise `BadRequest` for what is no field name."""
        if not _TOKEN(name):
            raise BadRequest("a field name is malformed")
        _keep(self.plain, name)

    def check_host(self, host: bytes | None) -> bytes:
        """Raise `BadRequest` for what is no Host."""
        if host in self._hosts:
            return host
        host = host.strip() if host is not None else b""
        if not _HOST(host):
            raise BadRequest("there is no valid Host field")
        _keep(self._hosts, host)
        return host


def read_request(raw: Iterable[tuple[bytes, bytes]], known: Known, version: str = "1.1") -> Framing:
    """Check the fields of a request and take out what concerns this hop only. Raises `BadRequest`."""
    if type(raw) is not list:
        raw = list(raw)
    if _breaks_lines(raw):
        raise BadRequest("a field value contains a line break or a NUL")
    # Nearly all fields are passed on, and nearly always they have been seen before.
    plain = known.plain
    headers = [pair for pair in raw if pair[0] in plain]
    host: bytes | None = None
    length: int | None = None
    nominated: list[bytes] = []
    coding: list[bytes] = []
    via: list[bytes] = []
    told: Headers = []
    upgrade = expects = trailers = learned = False
    for name, value in [pair for pair in raw if pair[0] not in plain]:
        name = name.lower()
        if name == b"host":
            if host is not None:
                raise BadRequest("there are two Host fields")
            host = value
        elif name == b"content-length":
            length = _length(length, value)
        elif name == b"connection":
            if value not in _USUAL:
                nominated.append(value)
        elif name not in TAKEN_OUT:
            known.check_name(name)
            learned = True
        elif name == b"transfer-encoding":
            coding.append(value)
        elif name == b"via":
            via.append(value)
        elif name in FORWARDED:
            told.append((name, value))
        elif name == b"upgrade":
            upgrade = True
        elif name == b"te":
            trailers = trailers or b"trailers" in _tokens([value])
        elif name == b"expect":
            if value.strip().lower() != b"100-continue":
                raise BadRequest("nothing but 100-continue may be expected", 417)
            expects = True
    if learned:
        headers = [(lower, value) for name, value in raw if (lower := name.lower()) not in TAKEN_OUT]
    host = known.check_host(host)
    if coding:
        _check_coding(coding, length, version)
    if nominated:
        headers = _less_nominated(headers, nominated)
    multiplexed = version[0] != "1"
    if multiplexed:
        headers = _with_one_cookie(headers)
    open_ended = length is None and (multiplexed or bool(coding))
    return Framing(headers, host, length, open_ended, via, told, upgrade and not multiplexed, expects, trailers)


def read_reply(raw: Headers, status: int, known: Known) -> Headers:
    """The fields of a reply that are for the caller, names in lower case as ASGI wants them. Raises `BadReply`."""
    if _breaks_lines(raw):
        raise BadReply("a field value contains a line break or a NUL")
    lower = known.lower
    headers = [(lower[name], value) for name, value in raw if name in lower]
    if len(headers) < len(raw):
        headers = _less_hop_by_hop(raw, lower)
    if status in _BODILESS:
        # In a 204 there must be none. That of a 304 is about what is not sent, and servers would wait for it.
        headers = [pair for pair in headers if pair[0] != b"content-length"]
    return headers


def is_field(name: object, value: object) -> bool:
    """Whether this can be sent as a field."""
    if not isinstance(name, str) or not isinstance(value, str) or not is_token(name):
        return False
    return all(ch == "\t" or " " <= ch <= "\xff" for ch in value) and "\x7f" not in value


def is_token(text: str) -> bool:
    """Whether this can be the name of a field, or of a proxy."""
    return _TOKEN(text.encode("utf-8", "replace")) is not None


def is_host(text: str) -> bool:
    """Whether this can be a Host."""
    return _HOST(text.encode("utf-8", "replace")) is not None


def _breaks_lines(raw: Headers) -> bool:
    """Whether a value would end its line. Names are looked at when they are first seen."""
    values = b"".join([value for _, value in raw])
    return _LF in values or _CR in values or _NUL in values


def _length(known: int | None, value: bytes) -> int:
    # A list of equal values is one value (RFC 9110, 8.6); anything else smuggles.
    texts = {value} if value.isdigit() else {part.strip() for part in value.split(b",")}
    text = texts.pop()
    if texts or not text.isdigit() or len(text) > 18 or (known is not None and known != int(text)):
        raise BadRequest("the Content-Length is malformed, or there are several")
    return int(text)


def _check_coding(coding: list[bytes], length: int | None, version: str) -> None:
    if length is not None:
        raise BadRequest("Content-Length and Transfer-Encoding exclude each other")
    if b",".join(coding).strip().lower() != b"chunked":
        raise BadRequest("the only Transfer-Encoding taken is chunked")
    if version in ("1.0", "1"):
        raise BadRequest("HTTP/1.0 has no Transfer-Encoding")


def _less_hop_by_hop(raw: Headers, known: dict[bytes, bytes]) -> Headers:
    headers: Headers = []
    nominated: list[bytes] = []
    chunked = False
    for spelt, value in raw:
        name = spelt.lower()
        if name not in _OF_REPLIES:
            if not _TOKEN(name):
                raise BadReply("a field name is malformed")
            headers.append((name, value))
            if len(known) < _KEPT and len(name) <= _LONGEST_KEPT:
                known[spelt] = name
        elif name == b"connection":
            nominated.append(value)
        elif name == b"transfer-encoding":
            chunked = True
    if chunked and any(name == b"content-length" for name, _ in headers):
        raise BadReply("Content-Length and Transfer-Encoding exclude each other")
    return _less_nominated(headers, nominated) if nominated else headers


def _tokens(values: list[bytes]) -> set[bytes]:
    return {token.strip().lower() for token in b",".join(values).split(b",")}


def _less_nominated(headers: Headers, nominated: list[bytes]) -> Headers:
    names = _tokens(nominated) - _NEVER_NOMINATED
    return [pair for pair in headers if pair[0] not in names]


def _with_one_cookie(headers: Headers) -> Headers:
    """HTTP/2 may send the cookies one by one, HTTP/1.1 may not (RFC 9113, 8.2.3)."""
    cookies = [value for name, value in headers if name == b"cookie"]
    if len(cookies) < 2:
        return headers
    return [*(pair for pair in headers if pair[0] != b"cookie"), (b"cookie", b"; ".join(cookies))]


def _keep(known: set[bytes], one: bytes) -> None:
    if len(known) < _KEPT and len(one) <= _LONGEST_KEPT:
        known.add(one)

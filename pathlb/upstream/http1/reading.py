"""Replies out of the bytes of a connection, without any I/O; parsing is llhttp's (httptools), the framing rules ours.

    idle --expect--> head --head--> body --end--> idle
                     head --1xx--> head
                     head --101--> tunnel

`expect` names the reply that is filled next; bytes that nobody expects set `surplus`, after which the connection must
not be used again: what follows may be read as the answer to somebody else's request. (Not so bare line ends, which
llhttp skips before a head: they can be part of no reply.)
"""

from __future__ import annotations

import enum
import re
from typing import Any, NoReturn, Protocol

import httptools

from ...exchange import Headers
from .settings import Pool

_VERSIONS = {"1.1": b"HTTP/1.1", "1.0": b"HTTP/1.0"}
_FRAMING_NAMES = frozenset(map(len, (b"content-length", b"transfer-encoding")))  # by their length: nearly free
_BAD_REASON = re.compile(rb"[\0\v\f]")  # llhttp takes anything
_HUGE_LENGTH = 15  # digits of a Content-Length: beyond any body, and where parsers begin to differ


class BadReply(Exception):
    """The bytes are no reply, or not one that can be told apart from what follows."""


class Phase(enum.Enum):
    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    TUNNEL = "tunnel"


_IDLE, _HEAD, _BODY, _TUNNEL = Phase


class Incoming(Protocol):
    """What a reader fills: one reply."""

    status: int
    reason: bytes
    version: bytes
    headers: Headers
    trailers: Headers
    parts: list[bytes]
    """Pieces of the body nobody has taken yet."""
    held: int
    """Their bytes."""
    headed: bool
    """The head is complete."""
    whole: bool
    """The body is, too."""


class ReplyReader:
    """Reads the replies of one connection, one after the other."""

    __slots__ = (
        "_fed",
        "_fields",
        "_head_only",
        "_informational",
        "_long",
        "_parser",
        "_reason",
        "_refusal",
        "_reply",
        "_settings",
        "_stale",
        "_upgrades",
        "early",
        "keep_alive",
        "phase",
        "proceed",
        "surplus",
    )

    def __init__(self, settings: Pool) -> None:
        self._settings = settings
        self._parser: Any = httptools.HttpResponseParser(self)
        self._stale = False  # the parser waits for a body that does not come
        self._reply: Incoming | None = None
        self._head_only = False
        self._upgrades = False
        self._informational = 0
        self._reason = b""
        self._fields: Headers = []  # where the next field belongs
        self._fed = 0  # bytes since the head began, or without a byte of body
        self._refusal = ""
        self.phase = _IDLE
        self.keep_alive = False
        """After a whole reply: another one may follow on this connection."""
        self.surplus = False
        """There were bytes that belong to no reply."""
        self.proceed = False
        """A 100 (Continue) has come."""
        self.early = b""
        """The first bytes of the other protocol, after a 101."""

    def expect(self, reply: Incoming, *, head_only: bool, upgrades: bool) -> None:
        """Fill `reply` next. `head_only`: it is one to a HEAD; `upgrades`: a 101 was asked for."""
        if self._stale:
            self._parser = httptools.HttpResponseParser(self)
            self._stale = False
        self.phase = _HEAD
        self._reply = reply
        self._fields = reply.headers
        self._head_only = head_only
        self._upgrades = upgrades
        self._informational = self._fed = 0
        self.proceed = False

    def feed(self, data: bytes | memoryview) -> None:
        """Take in bytes. Raises `BadReply`, and then the reply is as complete as it will get."""
        reply = self._reply
        if reply is None:
            if bytes(data).strip(b"\r\n"):
                self.surplus = True
            return
        self._long = self._fed + len(data) > self._settings.max_head  # then the head is to be measured
        headed, held, informational = reply.headed, reply.held, self._informational
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self.early = bytes(data[exc.args[0] :])
            reply.headed = True
            self._reply = None
        except httptools.HttpParserCallbackError:
            raise BadReply(self._refusal) from None
        except httptools.HttpParserError as exc:
            if self._reply is not None:
                raise BadReply(self._explain(exc)) from None
            self.surplus = True  # the reply is whole; what came behind it ends the connection
        if self.phase is _HEAD:
            if self._informational == informational:  # else they are of two heads, and measured when the next is whole
                self._count(len(data), "the head of the reply")
        elif not headed or reply.held > held:
            self._fed = 0
        elif not reply.whole:
            self._count(len(data), "what the chunks of the reply bring beside their data")

    def end(self) -> None:
        """The server has closed its side. Raises `BadReply` when that cuts a reply short."""
        reply = self._reply
        if reply is None:
            return
        if self.phase is _HEAD:
            if not self._fed:
                raise BadReply("the server closed the connection without sending a reply")
            raise BadReply("the server closed the connection within the head of its reply")
        framing = {name.lower(): value for name, value in reply.headers}
        if b"transfer-encoding" in framing:
            raise BadReply("the server closed the connection before the last chunk of its reply")
        if b"content-length" in framing:
            raise BadReply(
                f"the server closed the connection before byte {int(framing[b'content-length'])} of its reply"
            )
        self.keep_alive = False
        self._finish(reply)  # a body without a length ends here

    def detach(self) -> None:
        """The connection is gone: let go of the parser, which refers back here and would wait for the collector."""
        self._reply = self._parser = None

    # --- what the parser calls

    def on_message_begin(self) -> None:
        self._reason = b""
        if self._reply is None:
            self.surplus = True

    def on_status(self, text: bytes) -> None:
        self._reason += text  # in pieces, if it came so

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields.append((name, value.rstrip(b" \t")))
        if len(name) in _FRAMING_NAMES:
            self._check_framing(name.lower(), value)

    def on_headers_complete(self) -> None:
        reply = self._reply
        if reply is None:
            return
        if self._long or self._informational:
            self._check_size(reply.headers, "the head of the reply")
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._inform(reply, status)
            return
        version = _VERSIONS.get(self._parser.get_http_version())
        if version is None or status < 100:
            self._refuse("the reply is neither HTTP/1.1 nor HTTP/1.0, or has no valid status")
        self._check_count(reply.headers)
        reply.status = status
        reply.version = version
        reply.reason = self._reason
        if self._reason != b"OK" and _BAD_REASON.search(self._reason):
            self._refuse("the reason phrase of the reply holds characters that are not allowed there")
        if status == 101:
            if not self._upgrades:
                self._refuse("the server switches protocols (101), and nobody asked it to")
            self.phase = _TUNNEL  # the parser has yet to agree: then the head is complete
            return
        reply.headed = True
        self.phase = _BODY
        self._fields = reply.trailers
        if self._head_only:
            self.keep_alive = _persists(version, reply.headers)
            self._stale = True
            self._finish(reply)

    def on_body(self, data: bytes) -> None:
        reply = self._reply
        if reply is None:
            self.surplus = True
            return
        if self.phase is not _BODY:
            self._refuse("an informational reply with a body")
        reply.parts.append(data)
        reply.held += len(data)

    def on_message_complete(self) -> None:
        reply = self._reply
        if reply is not None and self.phase is _BODY:
            self._check_count(reply.trailers)
            if reply.trailers:
                self._check_size(reply.trailers, "the trailer of the reply")
            self.keep_alive = self._parser.should_keep_alive()
            if reply.version == b"HTTP/1.0":
                self.keep_alive = _persists(reply.version, reply.headers)
            self._finish(reply)

    # --- the inside

    def _inform(self, reply: Incoming, status: int) -> None:
        reply.headers.clear()
        self._fed = 0
        self._informational += 1
        if self._informational > self._settings.max_informational:
            self._refuse(f"more than {self._settings.max_informational} informational replies (Pool.max_informational)")
        if status == 100:
            self.proceed = True

    def _finish(self, reply: Incoming) -> None:
        reply.whole = True
        self._reply = None
        self.phase = _IDLE

    def _check_count(self, fields: Headers) -> None:
        if len(fields) > self._settings.max_fields:
            self._refuse(f"the reply has more than {self._settings.max_fields} header fields (Pool.max_fields)")

    def _check_framing(self, name: bytes, value: bytes) -> None:
        if name == b"transfer-encoding" and (
            value.rstrip(b" ").lower() != b"chunked" or any(other.lower() == name for other, _ in self._fields[:-1])
        ):
            self._refuse("the reply has a Transfer-Encoding other than chunked, or two")
        if name == b"content-length" and len(value) > _HUGE_LENGTH:
            self._refuse("the reply has a Content-Length no body can have")

    def _check_size(self, fields: Headers, what: str) -> None:
        if sum(len(name) + len(value) + 4 for name, value in fields) > self._settings.max_head:
            self._refuse(f"{what} has more than {self._settings.max_head} bytes (Pool.max_head)")

    def _count(self, size: int, what: str) -> None:
        self._fed += size
        if self._fed > self._settings.max_head:
            raise BadReply(f"{what} has more than {self._settings.max_head} bytes (Pool.max_head)")

    def _refuse(self, why: str) -> NoReturn:
        """Stop the parser, from within one of its calls; `feed` says why."""
        self._refusal = why
        raise BadReply(why)

    def _explain(self, error: Exception) -> str:
        if self.phase is _TUNNEL:
            return "the server switches protocols (101) and does not say to which"
        return f"the reply is not valid HTTP: {error}"


def _persists(version: bytes, headers: Headers) -> bool:
    """Whether the connection outlives the reply (RFC 9112 9.3; 6.1 for chunks in HTTP/1.0). llhttp would keep it after
    `keep-alive, close` in HTTP/1.0, and for a Proxy-Connection.
    """
    tokens: set[bytes] = set()
    chunked = False
    for name, value in headers:
        size = len(name)
        if size == 10 and name.lower() == b"connection":
            tokens.update(token.strip().lower() for token in value.split(b","))
        elif size == 17 and name.lower() == b"transfer-encoding":
            chunked = True
    return b"close" not in tokens and (version == b"HTTP/1.1" or (b"keep-alive" in tokens and not chunked))

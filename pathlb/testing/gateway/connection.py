"""One connection of an emulated gateway: parses requests, writes replies in their order."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from typing import Protocol, cast

import httptools

from .model import ReceivedRequest

_NO_LINGER = struct.pack("ii", 1, 0)


class Exchange:
    """One request at the gateway, from its last byte to its reply."""

    __slots__ = ("connection", "health", "keep_alive", "request", "without_body")

    def __init__(
        self,
        connection: Connection,
        request: ReceivedRequest | None,
        health: bool,
        without_body: bool,
        keep_alive: bool,
    ) -> None:
        self.connection = connection
        self.request = request
        """None unless the gateway wants requests whole."""
        self.health = health
        self.without_body = without_body
        """The reply must not carry its body: it answers a HEAD."""
        self.keep_alive = keep_alive


class Owner(Protocol):
    """What a connection tells the gateway it belongs to."""

    wants_requests: bool
    """Requests are kept whole, headers and body."""

    def opened(self, connection: Connection) -> None: ...

    def head_read(self, connection: Connection, target: bytes, request_ids: list[bytes]) -> None: ...

    def received_whole(self, request: ReceivedRequest) -> None: ...

    def arrived(self, exchange: Exchange) -> None:
        """The request is complete and the one its connection is to answer next."""

    def malformed(self, connection: Connection) -> None: ...

    def closed(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """The protocol asyncio calls, and the callbacks of its parser."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._pipelined: deque[Exchange] = deque()
        self.active: Exchange | None = None
        """The request being answered; pipelined ones wait for their turn behind it."""
        self.unanswered = 0
        """Heads read and not answered."""
        self.lost = asyncio.Event()
        """Set once the socket is closed."""
        self.gone = False
        """Nothing can be written any more."""
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._request_ids: list[bytes] = []
        self._body: list[bytes] = []

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request is complete and answered like any other, but what follows it is not HTTP.
            if self.active is not None:
                self.active.keep_alive = False
        except httptools.HttpParserError:
            self._owner.malformed(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self._pipelined.clear()
        # The parser's bound callbacks point back here: without this the pair waits for the cycle collector.
        del self._parser
        self._owner.closed(self)
        self.lost.set()

    # httptools' side

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []
        self._request_ids = []
        self._body = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 12 and name.lower() == b"x-request-id":
            self._request_ids.append(value)
        if self._owner.wants_requests:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.unanswered += 1
        self._owner.head_read(self, self._target, self._request_ids)

    def on_body(self, body: bytes) -> None:
        if self._owner.wants_requests:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self.gone:
            return
        method = self._parser.get_method()
        request: ReceivedRequest | None = None
        if self._owner.wants_requests:
            request = ReceivedRequest(method.decode("ascii"), self._target, self._headers, b"".join(self._body))
            self._owner.received_whole(request)
        health = method == b"GET" and self._target.partition(b"?")[0] == b"/health"
        exchange = Exchange(self, request, health, method == b"HEAD", self._parser.should_keep_alive())
        if self.active is not None:
            self._pipelined.append(exchange)
        else:
            self.active = exchange
            self._owner.arrived(exchange)

    # the gateway's side

    def reply(self, data: bytes, keep_alive: bool) -> None:
        """Write the reply to the active request and go on to the next one."""
        if self.gone:
            return
        self.active = None
        self._transport.write(data)
        if not keep_alive:
            self.gone = True
            self._pipelined.clear()
            self._transport.close()
        elif self._pipelined:
            self.active = self._pipelined.popleft()
            # Not by a plain call: a long pipeline answered at once would recurse.
            asyncio.get_running_loop().call_soon(self._owner.arrived, self.active)

    def hang_up(self) -> None:
        """Close without an answer, cleanly."""
        self.gone = True
        if self._transport.get_write_buffer_size():
            # A client that does not read its replies must not keep the gateway from stopping.
            self._transport.abort()
        else:
            self._transport.close()

    def reset(self) -> None:
        """Close with a RST (on a unix socket, which has none, with whatever the kernel makes of it)."""
        self.gone = True
        sock: socket.socket = self._transport.get_extra_info("socket")
        if sock.fileno() != -1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()

"""An HTTP server for an ASGI app on a listening socket it is given: uvicorn, with the accepting and the end its own.

This is the one place that knows which server it is. What is asked of it (`HTTPServer`): accept from a socket that other
processes accept from as well, and end without losing a request. Servers as they are lose some: those whose connection
waits to be accepted when they close the socket, and those that were on their way on a connection they took for idle.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..asgi.types import ASGIApp, Message, Receive, Scope, Send
from .board import Board

logger = logging.getLogger("pathlb.serving")

BACKLOG = 2048
"""Connections that may wait to be accepted."""
HEAD_LIMIT = 65_536
"""Bytes of a request head, read while it is not complete; a little more may be read at once."""
HEAD_TIMEOUT = 30.0
"""Seconds a caller may take for the head of a request."""
_QUIET = 0.5  # seconds without a new request after which no more is expected on the connections that are left
_LOOK_EVERY = 0.02
_LOOK_FOR_SLOW_EVERY = 1.0
_TLS_TIMEOUT = 10.0  # seconds for a handshake
_TLS_GOODBYE = 1.0  # seconds to wait for a peer's close_notify; many never send one
_ACCEPT_PAUSE = 1.0  # seconds without accepting when there are no descriptors left
_LEAVE = 0.001  # seconds in which the other workers may take a connection
_LEAVE_AT_MOST = 3  # times in a row: they may be stuck
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class HTTPServer(Protocol):
    """What a worker needs of a server."""

    async def start(self) -> None:
        """Accept connections from now on."""

    async def drain(self, grace: float) -> int:
        """Stop accepting and let the requests under way, and those on their way, end within `grace` seconds.

        The answer is how many were cut off.
        """

    def requests(self) -> set[asyncio.Task[None]]:
        """Those under way, by the tasks they run in."""


class UvicornServer:
    """uvicorn's protocol and its end, around `app`.

    `max_message`: bytes of a WebSocket message, 0 for no WebSockets. `place`: where it is among the processes that
    accept from `listener`, if there are others.
    """

    def __init__(
        self,
        app: ASGIApp,
        listener: socket.socket,
        *,
        tls: ssl.SSLContext | None = None,
        keep_alive: float = 75.0,
        max_message: int = 0,
        place: tuple[Board, int] | None = None,
    ) -> None:
        self._app = app
        self._ending = False
        self._last_request = 0.0
        self._listener = listener
        self._tls = tls
        self._place = place
        self._left = 0
        self._config = uvicorn.Config(
            self._call,
            http=Connection,
            ws=_websockets_by() if max_message else "none",
            ws_max_size=max_message,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=math.ceil(keep_alive),
        )
        self._server = uvicorn.Server(self._config)
        self._joining: set[asyncio.Task[Any]] = set()
        self._sweep: asyncio.TimerHandle | None = None

    def _call(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutine of its own: this is on the way of every request.
        if self._ending:
            self._last_request = time.monotonic()
            send = _closing(send)
        return self._app(scope, receive, send)

    async def start(self) -> None:
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup(sockets=[])
        self._loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self._look_for_slow_heads()

    async def drain(self, grace: float) -> int:
        end = time.monotonic() + grace
        self._ending = True
        self._last_request = time.monotonic()
        self._loop.remove_reader(self._listener)
        while self._accept_one():  # who has connected before is served
            pass
        self._listener.close()
        if self._joining:
            await asyncio.wait(self._joining, timeout=min(grace, _TLS_TIMEOUT))
        # Every answer from now on says that it is the connection's last; connections idle now may have a request on
        # its way, which a caller could not know to be lost.
        state = self._server.server_state
        while state.connections and time.monotonic() < min(end, self._last_request + _QUIET):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_EVERY)
        if self._sweep is not None:
            self._sweep.cancel()
        self._config.timeout_graceful_shutdown = math.ceil(max(0.0, end - time.monotonic()))
        await self._server.shutdown(sockets=[])
        cut = [task for task in state.tasks if not task.done()]
        if cut:  # they have been cancelled
            await asyncio.wait(cut, timeout=1.0)
        return len(cut)

    def requests(self) -> set[asyncio.Task[None]]:
        return set(self._server.server_state.tasks)

    # --- accepting

    def _accept(self) -> None:
        if self._place is None:
            while self._accept_one():
                pass
            return
        # One after the other, so that whoever is less busy gets the next one.
        board, slot = self._place
        self.count()
        if board.is_ahead(slot) and self._left < _LEAVE_AT_MOST:
            self._left += 1
            self._pause(_LEAVE)
        else:
            self._left = 0
            self._accept_one()

    def _accept_one(self) -> bool:
        """Take one connection; false when there is none to take."""
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # somebody else was faster, or the caller has left
        except OSError as exc:
            if exc.errno not in _EXHAUSTED:
                raise
            if not self._ending:
                logger.warning("cannot accept a connection: %s; the next try is in %g s", exc.strerror, _ACCEPT_PAUSE)
                self._pause(_ACCEPT_PAUSE)
            return False
        task = self._loop.create_task(self._join(connection))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)
        return True

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        if not self._ending:
            self._loop.add_reader(self._listener, self._accept)

    def count(self) -> None:
        """Tell the other processes how many connections there are here."""
        if self._place is not None:
            board, slot = self._place
            board.put(slot, len(self._server.server_state.connections) + len(self._joining))

    async def _join(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        encrypted: dict[str, Any] = {}
        if self._tls is not None:
            encrypted = {
                "ssl": self._tls,
                "ssl_handshake_timeout": _TLS_TIMEOUT,
                "ssl_shutdown_timeout": _TLS_GOODBYE,
            }
        try:
            await self._loop.connect_accepted_socket(self._make_protocol, connection, **encrypted)
        except OSError as exc:  # no TLS, or gone before it was done
            logger.debug("a caller did not get as far as a request: %s", exc)
            connection.close()

    def _make_protocol(self) -> asyncio.Protocol:
        connection = Connection(self._config, self._server.server_state, {}, self._loop)
        connection.on_lost = self.count
        return connection

    # --- slow and endless heads

    def _look_for_slow_heads(self) -> None:
        late = time.monotonic() - HEAD_TIMEOUT
        for connection in list(self._server.server_state.connections):
            if isinstance(connection, Connection) and connection.head_since < late:
                connection.transport.close()
        self.count()
        self._sweep = self._loop.call_later(_LOOK_FOR_SLOW_EVERY, self._look_for_slow_heads)


class Connection(HttpToolsProtocol):
    """uvicorn's, with bounds on the head of a request: it knows none."""

    head_since = math.inf
    """When the head that is being received began (monotonic)."""
    on_lost: Callable[[], None]
    _head_size = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.head_since = time.monotonic()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()

    def data_received(self, data: bytes) -> None:
        if self.head_since != math.inf:
            self._head_size += len(data)
        super().data_received(data)
        if self._head_size > HEAD_LIMIT and self.head_since != math.inf and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()

    def on_message_begin(self) -> None:
        self.head_since = min(self.head_since, time.monotonic())
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.head_since = math.inf
        self._head_size = 0
        super().on_headers_complete()


def _closing(send: Send) -> Send:
    """Tell the caller with the answer that no other one follows on this connection."""

    async def send_closing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return send_closing


def _websockets_by() -> str:
    # What uvicorn chooses by itself was another one, and deprecated, in some of its versions.
    return "websockets-sansio" if find_spec("websockets") is not None else "auto"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's, where there is one."""
    try:
        import uvloop
    except ImportError:  # not for this platform
        return asyncio.new_event_loop()
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def allow_many_connections() -> None:
    """As many descriptors as this user may have: the usual limit of 1,024 is for programs that use `select`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

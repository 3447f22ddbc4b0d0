"""An HTTP server for an ASGI app on a listening socket it is given: uvicorn, with the accepting and the end its own.

This is the one place that knows which server it is. What is asked of it: accept from a socket that other processes
accept from as well, and end without losing a request. Servers as they are lose some: those whose connection waits to be
accepted when they close the socket, and those that were on their way on a connection they took for idle. And it bounds
what a caller can hold here by being slow, which uvicorn leaves to a proxy in front.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import math
import resource
import socket
import ssl
import sys
import termios
import time
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..asgi.types import ASGIApp, Message, Receive, Scope, Send
from .board import Board
from .listen import refuse_new

logger = logging.getLogger("pathlb.serving")

HEAD_LIMIT = 65_536
"""Bytes of a request head, or of trailers, read while they are not complete; a little more may be read at once."""
HEAD_TIMEOUT = 30.0
"""Seconds a caller may take for the head of a request."""
STALL_TIMEOUT = 60.0
"""Seconds in which a caller has to take something of what is waiting for it."""
_QUIET = 0.5  # seconds without a new request after which no more is expected on the connections that are left
_LOOK_EVERY = 0.02
_LOOK_FOR_SLOW_EVERY = 1.0
_TLS_TIMEOUT = 10.0  # seconds for a handshake
_TLS_GOODBYE = 1.0  # seconds to wait for the close_notify of a peer that has everything; many never send one
_PONGS = 2**24  # bytes that may wait for a caller of WebSockets beyond a message; its pings are answered unread or not
_TLS_CLOSING = 300.0  # seconds for what is left to be sent and the goodbye; _look_for_slow() is stricter
_ACCEPT_PAUSE = 1.0  # seconds without accepting when there are no descriptors left
_LEAVE = 0.001  # seconds in which the other workers may take a connection
_LEAVE_AT_MOST = 3  # times in a row: they may be stuck
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


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
        self.tls = tls
        """What connections are encrypted with, from their beginning: another one is for new connections."""
        self._place = place
        self._left = 0
        self._most_unsent = max_message + _PONGS
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
        self._unsent: dict[Any, tuple[float, float]] = {}  # how much, and since when it has not become less

    def _call(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # No coroutines of its own: this is on the way of every request.
        if self._ending:
            self._last_request = time.monotonic()

        def send_or_close(message: Message) -> Awaitable[None]:
            # Tell the caller with the answer that no other one follows, if the end began before the answer does.
            if self._ending and message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            return send(message)

        return self._app(scope, receive, send_or_close)

    async def start(self) -> None:
        """Accept connections from now on."""
        self._config.load()
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup(sockets=[])
        self._loop = asyncio.get_running_loop()
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._accept)
        self._look_for_slow()

    async def drain(self, grace: float) -> int:
        """Stop accepting and let the requests under way, and those on their way, end within `grace` seconds.

        The answer is how many were cut off.
        """
        end = time.monotonic() + grace
        self._ending = True
        self._last_request = time.monotonic()
        self._loop.remove_reader(self._listener)
        refuse_new(self._listener)
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
        self._config.timeout_graceful_shutdown = math.ceil(max(0.0, end - time.monotonic()))
        await self._server.shutdown(sockets=[])
        cut = [task for task in state.tasks if not task.done()]
        if cut:  # they have been cancelled
            await asyncio.wait(cut, timeout=1.0)
        if self._sweep is not None:
            self._sweep.cancel()
        return len(cut)

    def requests(self) -> set[asyncio.Task[None]]:
        """Those under way, by the tasks they run in."""
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
        if self.tls is not None:
            encrypted = {
                "ssl": self.tls,
                "ssl_handshake_timeout": _TLS_TIMEOUT,
                "ssl_shutdown_timeout": _TLS_CLOSING,
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

    # --- callers that are too slow

    def _look_for_slow(self) -> None:
        now = time.monotonic()
        unsent: dict[Any, tuple[float, float]] = {}
        for connection in list(self._server.server_state.connections):
            transport = connection.transport
            if isinstance(connection, Connection) and connection.head_is_late(now) and not transport.is_closing():
                transport.close()
            # Closed or not: a connection stays until its caller has taken everything, which it need not do ever.
            if not (transport.is_closing() or transport.get_write_buffer_size()):
                continue
            if (size := _unsent(transport)) is None:
                continue
            before, since = self._unsent.get(connection, (math.inf, now))
            if size < before:
                since = now
            elif now - since >= (STALL_TIMEOUT if size else _TLS_GOODBYE):
                transport.abort()
            if size > self._most_unsent and not isinstance(connection, Connection):
                transport.abort()
            unsent[connection] = size, since
        self._unsent = unsent
        self.count()
        self._sweep = self._loop.call_later(_LOOK_FOR_SLOW_EVERY, self._look_for_slow)


class Connection(HttpToolsProtocol):
    """uvicorn's, with bounds on the head of a request, and on its trailers: it knows none."""

    head_since = math.inf
    """When the head that is being received began, or is waited for without another limit (monotonic)."""
    on_lost: Callable[[], None]
    _size = 0  # bytes of a head, of trailers, of lines between requests; of all that is not body
    _in_body = False  # with its trailers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.head_since = time.monotonic()
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()

    def shutdown(self) -> None:
        if not self.transport.is_closing():  # closed twice, asyncio's TLS transports do not know what is left any more
            super().shutdown()

    def head_is_late(self, now: float) -> bool:
        return self.head_since < now - HEAD_TIMEOUT and self._is_idle()

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        super().data_received(data)
        if self._size > HEAD_LIMIT and not self.transport.is_closing():
            if not self._in_body and self._is_idle():
                self.transport.write(_HEAD_TOO_LARGE)
            self.transport.close()
        # uvicorn's limit for idle connections ends with any data. It need not be a head: empty lines are allowed before
        # one, and the rest of a body may come after its answer, at its pace.
        if self._is_idle() and (self._in_body or self.head_since == math.inf):
            self.head_since = time.monotonic()

    def on_message_begin(self) -> None:
        self.head_since = min(self.head_since, time.monotonic())
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_body:  # trailers are no fields of the head
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.head_since = math.inf
        self._size = 0
        self._in_body = True
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._size = 0
        self._in_body = False
        super().on_message_complete()

    def _is_idle(self) -> bool:
        """Whether no request waits for its answer."""
        return self.cycle is None or self.cycle.response_complete


def _unsent(transport: asyncio.Transport) -> int | None:
    """Bytes that the caller has not taken yet, with those in the kernel, where it tells. None: that is not known."""
    try:
        size = transport.get_write_buffer_size()
        waiting = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except AttributeError:  # see `Connection.shutdown`
        return None
    except (OSError, ValueError):  # not for sockets on this system, or closed already
        return size
    return size + int.from_bytes(waiting, sys.byteorder)


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

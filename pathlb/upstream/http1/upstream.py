"""The pool: the connections to one endpoint, and how a request goes over one of them."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import ssl
from contextvars import Context
from functools import partial

from ...core.model import Endpoint, Rng, Sent
from ...errors import Fault, UpstreamError
from ...exchange import Headers, Reply, ReplyBody, Request, WholeBody, is_event_stream
from .connection import Connection, State
from .dial import Dialer
from .head import InvalidRequest, write_head
from .network_stream import TunnelBody
from .reply import IncomingReply
from .sending import SLICE, send_with_body
from .settings import Pool

_READ = 65_536  # bytes at once, at most
_LIFETIME_JITTER = 0.1
_WARM_TIMEOUT = 5.0  # seconds to connect ahead of need
_WARM_AGAIN = 1.0  # seconds between two tries of that, at least
_CLOSE_TIMEOUT = 1.0  # seconds to wait for the last connections to be closed


class Http1Upstream:
    """HTTP/1.1 to one endpoint, on asyncio: connections in a stack, the one used last first.

    `ssl_context` is for the connections to an `https` endpoint. It must be used, and closed, on one event loop.
    """

    kind = "http1"

    def __init__(
        self,
        endpoint: Endpoint,
        pool: Pool = Pool(),
        ssl_context: ssl.SSLContext | None = None,
        *,
        rng: Rng = random,
    ) -> None:
        self._endpoint = endpoint
        self._settings = pool
        self.warm = pool.min_connections > 0
        """Whether `keep_warm` has anything to do."""
        self._rng = rng
        if ssl_context is not None:
            ssl_context.set_alpn_protocols(["http/1.1"])
        self._dialer = Dialer(endpoint, ssl_context if endpoint.scheme == "https" else None, pool.local_address)
        self._idle: list[Connection] = []  # the one used last at the end
        self.buffer = memoryview(bytearray(_READ))
        """What is read goes in here (`connection.Owner`)."""
        self._open: set[Connection] = set()
        self._closing: set[Connection] = set()
        self._dialling = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False
        self._thinned = asyncio.Event()
        """A connection was lost, or the pool closed."""

    # --- a request

    async def send(self, request: Request, extra_headers: Headers) -> Reply:
        endpoint = self._endpoint
        try:
            head = write_head(
                request, endpoint.base_path + request.target, request.host or endpoint.authority, extra_headers
            )
        except InvalidRequest as exc:
            raise UpstreamError(Fault.LOCAL_PROTOCOL, Sent.NOT_SENT, endpoint.url, str(exc)) from None
        timeouts = request.timeouts
        connection = self._take()
        if connection is None:
            connection = await self._dial(timeouts.connect, request.extensions.get("sni_hostname"))
        reply = IncomingReply(connection, timeouts.read)
        reused = connection.used
        connection.start(reply, head_only=request.method == "HEAD", upgrades=head.upgrades, close_after=head.closes)
        try:
            body = request.body
            if (
                isinstance(body, bytes)
                and head.length is not None
                and not head.expects
                and (len(body) <= SLICE or not connection.secure)
            ):
                if not connection.write(head.data + body if body else head.data):
                    await connection.drained(timeouts.write)
                connection.sent(completely=True)
            else:
                await send_with_body(connection, head, request)
            while not reply.headed:
                reply.check()
                await reply.more()
        except BaseException:
            connection.abandon(reply)
            reply.error = None  # whose traceback holds this frame, and so the reply
            raise
        if reply.whole:
            reply_body: ReplyBody = WholeBody(reply.take())
        elif connection.tunnel is not None:
            reply_body = TunnelBody(connection.tunnel)
        else:
            reply_body = reply
            if request.events_may_pause and is_event_stream(reply.headers):
                reply.read_timeout = None
        return Reply(
            reply.status,
            reply.headers,
            reply_body,
            reply.version,
            reply.reason,
            {"network_stream": connection.tunnel or connection.info},
            reused,
        )

    # --- connections

    def _take(self) -> Connection | None:
        """An idle connection that may be used, the one used last; older ones that are in its way are closed."""
        idle = self._idle
        while idle:
            connection = idle.pop()
            now = connection.loop.time()
            if (
                connection.state is State.IDLE
                and now - connection.idle_since < self._settings.keepalive_expiry
                and now < connection.retire_at
                and not connection.readable()
            ):
                return connection
            connection.close()
        return None

    async def _dial(self, timeout: float | None, server_hostname: str | None) -> Connection:
        """A new connection. Raises `UpstreamError`, NOT_SENT."""
        self._check_open()
        most = self._settings.max_connections
        if most is not None and len(self._open) + self._dialling >= most:
            raise UpstreamError(
                Fault.POOL_TIMEOUT,
                Sent.NOT_SENT,
                self._endpoint.url,
                f"all {most} connections are in use (Pool.max_connections); Limits(concurrency=...) should be lower",
                local=True,
            )
        loop = asyncio.get_running_loop()
        make = partial(Connection, loop, self, self._settings, self._endpoint.url)
        # In a context of its own: the connection keeps it for as long as it lives, and the request's is not its.
        dial = loop.create_task(self._dialer.dial(make, timeout, server_hostname), context=Context())
        self._dialling += 1
        try:
            connection = await dial
        except asyncio.CancelledError:
            if dial.done() and not dial.cancelled() and dial.exception() is None:
                dial.result().close()  # connected and cancelled at once
            raise
        finally:
            self._dialling -= 1
        if connection.state is State.CLOSED:
            raise UpstreamError(
                Fault.CONNECT, Sent.NOT_SENT, self._endpoint.url, "the server closed the connection before a request"
            )
        self._open.add(connection)
        life = self._settings.max_lifetime
        if life < math.inf:
            connection.retire_at = loop.time() + life * (1 - _LIFETIME_JITTER * self._rng.random())
        try:
            self._check_open()
        except UpstreamError:
            connection.close()
            raise
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise UpstreamError(Fault.CONNECT, Sent.NOT_SENT, self._endpoint.url, "its connection pool is closed")

    async def keep_warm(self) -> None:
        """Keep at least `min_connections` open, until the pool is closed."""
        while not self._closed:
            began = asyncio.get_running_loop().time()
            missing = self._settings.min_connections - len(self._open) - self._dialling
            await asyncio.gather(*(self._add_idle() for _ in range(missing)))
            self._thinned.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WARM_AGAIN):  # the endpoint may have been down
                    await self._thinned.wait()
            # Those that expire are replaced at once; a server that closes them right away is not hammered for it.
            await asyncio.sleep(began + _WARM_AGAIN - asyncio.get_running_loop().time())

    async def _add_idle(self) -> None:
        with contextlib.suppress(UpstreamError):
            self.put(await self._dial(_WARM_TIMEOUT, None))

    async def aclose(self) -> None:
        """Close every connection, those in use too; returns when they are closed."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        self._idle.clear()
        for connection in list(self._open):
            connection.fail(Fault.READ, "the connection pool was closed")
        self._thinned.set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):  # the event loop tells of each, except of TLS half set up
                while self._closing:
                    self._thinned.clear()
                    await self._thinned.wait()

    def put(self, connection: Connection) -> None:
        """A connection is idle (`connection.Owner`)."""
        if self._closed:
            connection.close()
            return
        connection.idle_since = connection.loop.time()
        self._idle.append(connection)
        if self._sweeper is None and self._settings.keepalive_expiry < math.inf:
            self._sweep_at(connection.loop, connection.idle_since + self._settings.keepalive_expiry)

    def closing(self, connection: Connection) -> None:
        """A connection is nobody's any more, and being closed (`connection.Owner`)."""
        if connection in self._open:
            self._open.remove(connection)
            self._closing.add(connection)
            self._thinned.set()

    def lost(self, connection: Connection) -> None:
        """A connection is closed (`connection.Owner`)."""
        self._closing.discard(connection)
        self._thinned.set()

    def _sweep_at(self, loop: asyncio.AbstractEventLoop, when: float) -> None:
        self._sweeper = loop.call_at(when, self._sweep, loop, context=Context())

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what has been idle for too long; the oldest come first."""
        self._sweeper = None
        expired = loop.time() - self._settings.keepalive_expiry
        idle = self._idle
        count = next((index for index, one in enumerate(idle) if one.idle_since > expired), len(idle))
        for connection in idle[:count]:
            connection.close()
        del idle[:count]
        if idle:
            self._sweep_at(loop, idle[0].idle_since + self._settings.keepalive_expiry)

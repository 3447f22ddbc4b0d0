"""One connection: a protocol that writes a request, hands the bytes that come to its reader, and keeps time.

    idle --start--> busy --reply whole, request sent--> idle
                    busy --101--> tunnel
    any --close, failure, end of stream--> closed

It belongs to one request at a time. What is in doubt is closed: a failure, a cancellation, surplus bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import select
from contextvars import Context
from typing import Any, Protocol

import anyio

from ...core.errors import IllegalEvent
from ...core.model import Sent
from ...errors import Fault, UpstreamError
from ..oserrors import is_local, reason_of
from .network_stream import InfoStream, NetworkStream
from .reading import BadReply, Phase, ReplyReader
from .reply import IncomingReply
from .settings import Pool


class State(enum.Enum):
    IDLE = "idle"
    BUSY = "busy"
    TUNNEL = "tunnel"
    CLOSED = "closed"


_IDLE, _BUSY, _TUNNEL, _CLOSED = State


class Owner(Protocol):
    """Where connections come home to: the pool."""

    buffer: memoryview
    """What is read next goes in here; each read is dealt with before the next, so one serves all connections."""

    def put(self, connection: Connection) -> None: ...

    def closing(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One connection to one endpoint (`url`, for errors).

    Buffered, because a plain protocol has the event loop allocate 256 KiB for every read, which depending on the state
    of the heap costs more than all else here.
    """

    __slots__ = (
        "_close_after",
        "_due",
        "_fault",
        "_owner",
        "_poll",
        "_reading_paused",
        "_sent",
        "_settings",
        "_timer",
        "_wakes_at",
        "_write_waiter",
        "_writing_paused",
        "idle_since",
        "info",
        "loop",
        "reader",
        "reply",
        "retire_at",
        "secure",
        "state",
        "transport",
        "tunnel",
        "upload",
        "url",
        "used",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, owner: Owner, settings: Pool, url: str) -> None:
        self.loop = loop
        self.url = url
        self.state = _IDLE
        self.transport: Any = None
        self.reader = ReplyReader(settings)
        self.reply: IncomingReply | None = None
        """What is being read."""
        self.used = False
        """It has carried a request before."""
        self.secure = False
        """It speaks TLS."""
        self.idle_since = 0.0
        self.retire_at = math.inf
        self.info: InfoStream
        """What replies say about it; made with the transport."""
        self.tunnel: NetworkStream | None = None
        """After a 101: what the connection has become."""
        self.upload: anyio.CancelScope | None = None
        """Around the wait for the rest of a request body, whose caller may be slow; it ends when nobody wants it."""
        self._owner = owner
        self._settings = settings
        self._sent = True  # the request is written, body and all
        self._close_after = False
        self._reading_paused = self._writing_paused = False
        self._write_waiter: asyncio.Future[None] | None = None
        self._due = math.inf  # when what is waited for is overdue, on the loop's clock
        self._fault = Fault.READ_TIMEOUT
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = math.inf  # when the timer does; uvloop's do not all say
        self._poll: Any = None

    # --- a request

    def start(self, reply: IncomingReply, *, head_only: bool, upgrades: bool, close_after: bool) -> None:
        """A request is about to be written, whose reply fills `reply`."""
        if self.state is not _IDLE:
            raise IllegalEvent(f"connection: started while {self.state.value}")
        self.state = _BUSY
        self.reply = reply
        self._sent = False
        self._close_after = close_after
        self.reader.expect(reply, head_only=head_only, upgrades=upgrades)

    def write(self, data: bytes) -> bool:
        """Hand bytes to the system; false when `drained` should be awaited before the next."""
        self.transport.write(data)
        return not self._writing_paused

    async def drained(self, timeout: float | None) -> None:
        """Wait until what was written is with the system, for at most `timeout` seconds; also ends with the reply's
        failure, or with a reply that makes sending more pointless.
        """
        while self._writing_paused and not self.unwanted:
            waiter = self._write_waiter = self.loop.create_future()
            self._expect(timeout, Fault.WRITE_TIMEOUT)
            try:
                await waiter
            finally:
                self._write_waiter = None
                self._due = math.inf

    async def go_ahead(self, seconds: float) -> bool:
        """Wait for the 100 (Continue) that the request asked for; false when its final reply came instead.

        A server that says nothing for `seconds` does not know the word: then the body goes out all the same.
        """
        reply = self.reply
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (self.reader.proceed or self.unwanted or (reply is not None and reply.headed)):
                    waiter = self._write_waiter = self.loop.create_future()
                    try:
                        await waiter
                    finally:
                        self._write_waiter = None
        return not (self.unwanted or (reply is not None and reply.headed))

    @property
    def unwanted(self) -> bool:
        """Nobody reads the rest of the request: the connection is gone, or the reply is an error before its end."""
        reply = self.reply
        return (
            self.state is _CLOSED
            or reply is None
            or (reply.headed and reply.status >= 400)
            or self.transport.is_closing()
        )

    def sent(self, *, completely: bool) -> None:
        """The request was written, or as much as anybody wants of it: then the connection ends with the reply."""
        self._sent = True
        if not completely or self._writing_paused:
            self._close_after = True
        if self.reply is not None and self.reply.whole:
            self._finish()

    def abandon(self, reply: IncomingReply) -> None:
        """Nobody waits for this reply any more."""
        if self.reply is reply:
            self.close()

    # --- time

    def expect_read(self, timeout: float | None) -> None:
        """Something must come within `timeout` seconds; None expects nothing."""
        self._expect(timeout, Fault.READ_TIMEOUT)

    def _expect(self, timeout: float | None, fault: Fault) -> None:
        if timeout is None or timeout == math.inf:
            self._due = math.inf
            return
        due = self._due = self.loop.time() + timeout
        self._fault = fault
        # The timer is left where it is when it comes early enough: it looks, and goes on to the time that holds then.
        # Nearly all requests end long before, and a timer each would cost more than all else here. Its context is a
        # fresh one: it outlives the request that happens to set it.
        if due < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wake_at(due)

    def _wake_at(self, when: float) -> None:
        self._wakes_at = when
        self._timer = self.loop.call_at(when, self._look, context=Context())

    def _look(self) -> None:
        self._timer = None
        self._wakes_at = math.inf
        if self._due == math.inf:
            return
        if self.loop.time() < self._due:
            self._wake_at(self._due)
            return
        waited = "sent nothing" if self._fault is Fault.READ_TIMEOUT else "took nothing of the request"
        self.fail(self._fault, f"the server {waited} for as long as the timeout")

    # --- what the transport calls

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.secure = transport.get_extra_info("ssl_object") is not None
        self.info = InfoStream(transport)
        # As httpx means it: written is what the system has taken, so a write timeout is about the server. (TLS has a
        # buffer of its own below: there the request goes out in slices, and this holds for all but the last.)
        transport.set_write_buffer_limits(high=0)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._owner.buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = self._owner.buffer[:nbytes]
        if self.tunnel is not None:
            self.tunnel.feed(data)
            return
        if self.state is _CLOSED:
            return
        reply = self.reply
        reader = self.reader
        try:
            reader.feed(data)
        except BadReply as exc:
            self.fail(Fault.REMOTE_PROTOCOL, str(exc))
            return
        if reply is None:
            if reader.surplus:
                self.close()  # nobody asked for these bytes
            return
        if reply.whole:
            self._due = math.inf
            if self._sent:
                self._finish()
            else:
                self._wake_writer()
            reply.wake()
        elif reply.headed:
            self._due = math.inf
            if reader.phase is Phase.TUNNEL:
                self.state = _TUNNEL
                self.tunnel = NetworkStream(self, reader.early)
            elif reply.held > self._settings.buffer and not self._reading_paused:
                self._reading_paused = True
                self.transport.pause_reading()
            if not self._sent:
                self._wake_writer()
            reply.wake()
        else:
            if reader.proceed:
                self._wake_writer()
            if reply.waiter is not None:
                self._due = math.inf
                reply.wake()

    def eof_received(self) -> bool:
        reply = self.reply
        if self.tunnel is not None:
            self.tunnel.end()
            return not self.secure  # half closed: it may still be written to
        try:
            self.reader.end()
        except BadReply as exc:
            self.fail(Fault.REMOTE_PROTOCOL, str(exc))
            return False
        self.close()
        if reply is not None:
            reply.wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is None and self.state is not _CLOSED:
            self.eof_received()  # uvloop does not tell where TLS ends without a close_notify
        elif exc is not None:
            detail = reason_of(exc) if isinstance(exc, OSError) else str(exc)
            self.fail(Fault.READ, detail or type(exc).__name__, local=is_local([exc]))
        self.close()
        self.reader.detach()
        self.gone()

    def gone(self) -> None:
        """There is nothing behind this any more."""
        if self.tunnel is not None:
            self.tunnel.end()
        self._owner.lost(self)

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._wake_writer()

    # --- the ends

    def resume_body(self, reply: IncomingReply) -> None:
        """The body's reader has room again."""
        if self._reading_paused and self.reply is reply:
            self._resume()

    def readable(self) -> bool:
        """Whether an idle connection has something to read: its end, or bytes nobody asked for.

        The event loop has not looked since it last polled. Not for TLS: session tickets may come at any time.
        """
        if self._poll is None:
            sock = self.transport.get_extra_info("socket")
            if self.secure or sock is None:
                return False
            self._poll = select.poll()
            self._poll.register(sock.fileno(), select.POLLIN)
        return bool(self._poll.poll(0))

    def fail(self, fault: Fault, detail: str, *, local: bool = False) -> None:
        """End the request in progress, if there is one, with an error, and the connection."""
        reply = self.reply
        if self.tunnel is not None and self.state is _TUNNEL:
            self.tunnel.fail(fault, detail)
        elif reply is not None and not reply.whole and reply.error is None:
            reply.error = UpstreamError(
                fault, Sent.MAYBE_SENT, self.url, detail, local=local, reused=self.used and not reply.headed
            )
        self.close()
        if reply is not None:
            reply.wake()

    def close(self) -> None:
        """Close at once; closing twice is fine. Nothing that is written may still matter to anybody."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        self.reply = None
        self._due = math.inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_writer()
        self._owner.closing(self)
        if self.transport is not None:
            self.transport.abort()

    def _finish(self) -> None:
        """The reply is whole and the request sent."""
        self.reply = None
        reader = self.reader
        if self._close_after or reader.surplus or not reader.keep_alive or self.state is not _BUSY:
            self.close()
            return
        self.state = _IDLE
        self.used = True
        if self._reading_paused:
            self._resume()
        self._owner.put(self)

    def _resume(self) -> None:
        self._reading_paused = False
        self.transport.resume_reading()

    def _wake_writer(self) -> None:
        waiter = self._write_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        if self.upload is not None and self.unwanted:
            self.upload.cancel()

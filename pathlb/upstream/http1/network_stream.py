"""A connection that speaks another protocol after a 101, in the terms of httpx's `network_stream` extension."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from ...core.model import Sent
from ...errors import Fault, UpstreamError
from ..oserrors import reason_of

if TYPE_CHECKING:
    from .connection import Connection

_T = TypeVar("_T")
_HELD = 65_536  # bytes kept for a slow reader before the connection is not read any more
_INFO = {"client_addr": "sockname", "server_addr": "peername", "ssl_object": "ssl_object", "socket": "socket"}


class NetworkStream:
    """Raw bytes both ways. One reader and one writer at a time. Failures are `UpstreamError`s."""

    def __init__(self, connection: Connection, early: bytes) -> None:
        self._connection = connection
        self._buffer = bytearray(early)
        self._ended = False
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._failure: tuple[Fault, str] | None = None

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Between 1 and `max_bytes` bytes, or none at the end of the stream."""
        while not self._buffer and not self._ended:
            self._check()
            self._waiter = self._connection.loop.create_future()
            try:
                await self._within(timeout, self._waiter, Fault.READ_TIMEOUT)
            finally:
                self._waiter = None
        if not self._buffer:
            self._check()
        data = bytes(self._buffer[:max_bytes])
        del self._buffer[:max_bytes]
        if self._paused and len(self._buffer) <= _HELD:
            self._paused = False
            self._connection.transport.resume_reading()
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Hand all of it to the system."""
        connection = self._connection
        if not connection.transport.is_closing() and not connection.write(buffer):
            await connection.drained(timeout)
        if connection.transport.is_closing():
            fault, detail = self._failure or (Fault.WRITE, "the connection is closed")
            # Whatever ended it, to a writer it is a failure to write.
            raise self._error(fault if fault is Fault.WRITE_TIMEOUT else Fault.WRITE, detail)

    async def aclose(self) -> None:
        """Close it. What the system has not taken yet is lost; `write` waits for that."""
        self._connection.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> NetworkStream:
        """Speak TLS from here on; this same stream carries it."""
        connection = self._connection
        try:
            connection.transport = await self._within(
                timeout,
                connection.loop.start_tls(
                    connection.transport, connection, ssl_context, server_hostname=server_hostname or ""
                ),
                Fault.CONNECT_TIMEOUT,
            )
        except BaseException as exc:
            connection.close()
            connection.gone()  # asyncio does not tell of a handshake that was given up
            if isinstance(exc, OSError):
                raise self._error(Fault.CONNECT, reason_of(exc)) from exc
            raise
        connection.secure = True
        connection.transport.set_write_buffer_limits(high=0)
        return self

    def get_extra_info(self, info: str) -> Any:
        """httpx's names: `client_addr`, `server_addr`, `ssl_object`, `socket`, `is_readable`."""
        if info == "is_readable":
            return bool(self._buffer) or self._ended
        return self._connection.transport.get_extra_info(_INFO.get(info, info))

    # --- what the connection calls

    def feed(self, data: memoryview) -> None:
        """Bytes have come."""
        self._buffer += data
        if len(self._buffer) > _HELD and not self._paused:
            self._paused = True
            self._connection.transport.pause_reading()
        self._wake()

    def end(self) -> None:
        """No more will come."""
        self._ended = True
        self._wake()

    def fail(self, fault: Fault, detail: str) -> None:
        """No more will come, and that is a failure."""
        self._failure = (fault, detail)
        self.end()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._error(*self._failure)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _within(self, timeout: float | None, work: Awaitable[_T], fault: Fault) -> _T:
        try:
            async with asyncio.timeout(timeout):
                return await work
        except TimeoutError as exc:
            raise self._error(fault, f"not done within {timeout:g} s") from exc

    def _error(self, fault: Fault, detail: str) -> UpstreamError:
        return UpstreamError(fault, Sent.MAYBE_SENT, self._connection.url, detail)


class InfoStream:
    """The `network_stream` of an ordinary reply: only what can be asked about the connection."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def get_extra_info(self, info: str) -> Any:
        """httpx's names: `client_addr`, `server_addr`, `ssl_object`, `socket`."""
        return self._transport.get_extra_info(_INFO.get(info, info))


class TunnelBody:
    """The body of a 101: empty; closing it closes the connection."""

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream

    def __aiter__(self) -> TunnelBody:
        return self

    async def __anext__(self) -> bytes:
        raise StopAsyncIteration

    async def aclose(self) -> None:
        await self._stream.aclose()

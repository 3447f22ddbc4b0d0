"""One reply as it comes in: filled by the connection's reader, taken piece by piece by whoever reads the body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from ...core.model import Sent
from ...errors import Fault, UpstreamError
from ...exchange import Headers

if TYPE_CHECKING:
    from .connection import Connection


class IncomingReply:
    """Head and body of a reply (`reading.Incoming`), and its body for the balancer (`exchange.ReplyBody`).

    What it holds is its own and not the connection's, which may serve the next request before this body is read.
    """

    __slots__ = (
        "_connection",
        "error",
        "headed",
        "headers",
        "held",
        "parts",
        "read_timeout",
        "reason",
        "status",
        "trailers",
        "version",
        "waiter",
        "whole",
    )

    def __init__(self, connection: Connection, read_timeout: float | None) -> None:
        self._connection = connection
        self.read_timeout = read_timeout
        """Seconds to wait for more; None is no limit."""
        self.status = 0
        self.reason = b""
        self.version = b""
        self.headers: Headers = []
        self.trailers: Headers = []
        """Fields after a chunked body; never mixed with the headers."""
        self.parts: list[bytes] = []
        self.held = 0
        self.headed = False
        self.whole = False
        self.error: UpstreamError | None = None
        self.waiter: asyncio.Future[None] | None = None
        """Set while somebody waits for more."""

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.error is not None:
            raise self.error

    async def more(self) -> None:
        """Wait until there is more of the reply, or its failure; for at most the read timeout."""
        connection = self._connection
        waiter = self.waiter = connection.loop.create_future()
        connection.expect_read(self.read_timeout)
        try:
            await waiter
        except BaseException:
            if connection.reply is self:
                connection.expect_read(None)
            raise
        finally:
            # Only this reply's: once it is whole, the connection may be another request's before this task runs.
            self.waiter = None

    def wake(self) -> None:
        """There is more, or nothing more to come."""
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def take(self) -> bytes:
        """The pieces that have come, as one."""
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self.parts = []
        self.held = 0
        return data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        while not self.parts:
            self.check()
            if self.whole:
                raise StopAsyncIteration
            await self.more()
        data = self.take()
        if not self.whole:
            self._connection.resume_body(self)
        return data

    async def aclose(self) -> None:
        """Done with it: a connection whose reply is not whole is closed, what would still come is nobody's."""
        self.parts = []
        if self.whole or self.error is not None:
            return
        self.error = UpstreamError(
            Fault.READ, Sent.MAYBE_SENT, self._connection.url, "the reply was closed before its body was read"
        )
        self._connection.abandon(self)
        self.wake()

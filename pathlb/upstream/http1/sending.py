"""Writing a request whose body does not simply go out with its head: streams, chunks, `Expect: 100-continue`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio

from ...core.model import Sent
from ...errors import Fault, UpstreamError
from ...exchange import OneShotBody, Request
from .connection import Connection
from .head import Head

SLICE = 65_536
"""Bytes written at once over TLS, whose transport takes any amount and says it is with the system."""

_GO_AHEAD = 1.0  # seconds to wait for a 100 (Continue), curl's: a server that does not know it says nothing


async def send_with_body(connection: Connection, head: Head, request: Request) -> None:
    """Write the head and then the body, at the pace of the server.

    It ends early when the reply has: with an error status, or because the connection is gone. A body that is longer or
    shorter than announced raises `UpstreamError`; what the caller's own stream raises goes through.
    """
    timeout = request.timeouts.write
    if not connection.write(head.data):
        await connection.drained(timeout)
    if head.expects and not await connection.go_ahead(_GO_AHEAD):
        connection.sent(completely=False)
        return
    parts = _parts(request.body)
    completely = False
    left = head.length
    try:
        with anyio.CancelScope() as connection.upload:
            async for part in parts:
                if connection.unwanted:
                    break
                if left is not None:
                    left -= len(part)
                    if left < 0:
                        raise _wrong_length(connection, head, "more")
                for piece in _slices(part) if connection.secure else (part,):
                    data = piece if left is not None else b"%x\r\n%b\r\n" % (len(piece), piece)
                    if piece and not connection.write(data):
                        await connection.drained(timeout)
            else:
                completely = not connection.unwanted
    finally:
        connection.upload = None
        if not completely and hasattr(parts, "aclose"):
            await parts.aclose()
    if completely:
        if left:
            raise _wrong_length(connection, head, "less")
        if left is None and not connection.write(b"0\r\n\r\n"):
            await connection.drained(timeout)
    connection.sent(completely=completely)


def _slices(part: bytes) -> Iterator[bytes]:
    return (part[at : at + SLICE] for at in range(0, len(part), SLICE))


def _parts(body: bytes | OneShotBody) -> AsyncIterator[bytes]:
    return _one(body) if isinstance(body, bytes) else aiter(body)


async def _one(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _wrong_length(connection: Connection, head: Head, what: str) -> UpstreamError:
    return UpstreamError(
        Fault.LOCAL_PROTOCOL,
        Sent.MAYBE_SENT,
        connection.url,
        f"the request body has {what} than the {head.length} bytes of its Content-Length",
    )

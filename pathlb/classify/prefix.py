"""The first bytes of a reply's body, read for a classifier without taking them from the caller."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

import anyio

from ..exchange import Headers, Reply, ReplyBody, WholeBody


class ReadAhead:
    """A body of which some parts have been read: it gives those first, then goes on with the rest."""

    __slots__ = ("_parts", "_rest", "inner")

    def __init__(self, parts: list[bytes], rest: AsyncIterator[bytes], inner: ReplyBody) -> None:
        self._parts = parts
        self._rest = rest
        self.inner = inner

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return self._parts.pop(0) if self._parts else await self._rest.__anext__()

    async def aclose(self) -> None:
        self._parts.clear()
        await self.inner.aclose()


async def read_prefix(reply: Reply, limit: int) -> bytes:
    """The first `limit` bytes of the body, or all if it is shorter; the reply keeps a body that begins with them.

    Raises `UpstreamError` when the body breaks off before.
    """
    body = reply.body
    if isinstance(body, WholeBody):
        return body.content[:limit]
    rest = aiter(body)
    parts: list[bytes] = []
    size = 0
    while size < limit:
        try:
            part = await anext(rest)
        except StopAsyncIteration:
            # It is in memory now, and its connection free for others.
            content = b"".join(parts)
            reply.body = WholeBody(content)
            with anyio.CancelScope(shield=True):
                await body.aclose()
            return content
        parts.append(part)
        size += len(part)
    reply.body = ReadAhead(parts, rest, body)
    return b"".join(parts)[:limit]


def decoded(headers: Headers, body: bytes, limit: int = 65_536) -> bytes | None:
    """At most `limit` bytes of what a body, or the beginning of one, says without its Content-Encoding.

    None for a coding other than gzip and deflate, and for what is not in the coding it claims.
    """
    codings = [value.strip().lower() for name, value in headers if name.lower() == b"content-encoding"]
    if not codings or codings == [b"identity"]:
        return body[:limit]
    if codings not in ([b"gzip"], [b"x-gzip"], [b"deflate"]):
        return None
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, limit)
    except zlib.error:
        return None

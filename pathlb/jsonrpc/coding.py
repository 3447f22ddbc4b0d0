"""Replies read to their end: the coding taken off, and put together anew."""

from __future__ import annotations

import zlib
from dataclasses import replace

import anyio

from ..errors import DeadlineExceeded, UpstreamError
from ..exchange import Headers, Reply, WholeBody

_MOST = 256 * 1024 * 1024  # bytes a reply may grow to; beyond every answer, and short of what a compressed bomb makes
_READABLE = frozenset({b"gzip", b"x-gzip", b"deflate", b"identity"})
# What describes the bytes of a body that is no longer the one.
_OF_THE_BODY = frozenset(
    {
        b"content-length",
        b"transfer-encoding",
        b"trailer",
        b"content-encoding",
        b"content-md5",
        b"content-digest",
        b"digest",
        b"repr-digest",
        b"etag",
    }
)


async def read_whole(reply: Reply, seconds: float) -> bytes:
    """The body of a reply, as it came, and closed. The reply has it in memory afterwards.

    Raises `UpstreamError` when it breaks off and `DeadlineExceeded` when it takes longer than `seconds`.
    """
    body = reply.body
    if type(body) is WholeBody:
        return body.content
    parts: list[bytes] = []
    ended = False
    try:
        with anyio.move_on_after(max(0.0, seconds)):
            async for part in body:
                parts.append(part)  # noqa: PERF401  reads better than a comprehension with an await in it
            ended = True
    except UpstreamError as exc:
        exc.attempts = exc.attempts or reply.attempts
        raise
    finally:
        with anyio.CancelScope(shield=True):
            await body.aclose()
    if not ended:
        raise DeadlineExceeded("the reply did not end before the deadline", reply.attempts)
    content = b"".join(parts)
    reply.body = WholeBody(content)
    return content


def decoded(reply: Reply, content: bytes) -> bytes:
    """A body without its Content-Encoding. Raises `ValueError` for one that cannot be read."""
    coding = b""
    for name, value in reply.headers:
        if len(name) == 16 and name.lower() == b"content-encoding":
            if coding:
                raise ValueError("it has several Content-Encodings")
            coding = value.strip().lower()
    if not coding or coding == b"identity":
        return content
    if coding in (b"gzip", b"x-gzip"):
        return _inflate(content, 16 + zlib.MAX_WBITS)
    if coding == b"deflate":
        # RFC 9110 means the zlib format; many servers send the bare one.
        zlibbed = content[:1] and content[0] & 0x0F == 8 and int.from_bytes(content[:2]) % 31 == 0
        return _inflate(content, zlib.MAX_WBITS if zlibbed else -zlib.MAX_WBITS)
    raise ValueError(f"its Content-Encoding {coding.decode('latin-1')!r} is not one that was asked for")


def _inflate(content: bytes, window: int) -> bytes:
    grown: list[bytes] = []
    left = _MOST
    while True:
        machine = zlib.decompressobj(window)
        try:
            grown.append(machine.decompress(content, left))
        except zlib.error as exc:
            raise ValueError(f"its compression is broken ({exc})") from None
        left -= len(grown[-1])
        if not machine.eof:
            raise ValueError("its compression breaks off" if left else "it grows too large")
        content = machine.unused_data  # a gzip file may have several members
        if not content:
            return b"".join(grown)
        if window < 16 or left <= 0:
            raise ValueError("something follows its compressed bytes")


def asking_for_readable(headers: Headers) -> Headers:
    """Request headers that ask for no coding but those `decoded` knows and the caller named; else for none."""
    asked = [value for name, value in headers if len(name) == 15 and name.lower() == b"accept-encoding"]
    if not asked:
        return headers
    codings = [coding.strip() for coding in b",".join(asked).split(b",")]
    kept = [coding for coding in codings if coding.split(b";")[0].strip().lower() in _READABLE]
    if len(kept) == len(codings):
        return headers
    less = [pair for pair in headers if pair[0].lower() != b"accept-encoding"]
    return [*less, (b"Accept-Encoding", b", ".join(kept) or b"identity")]


def with_content(reply: Reply, content: bytes) -> Reply:
    """A reply with another body than the one it came with, and the success that this body tells of."""
    headers = [pair for pair in reply.headers if pair[0].lower() not in _OF_THE_BODY]
    headers.append((b"Content-Length", b"%d" % len(content)))
    return replace(reply, status=200, reason=b"OK", headers=headers, body=WholeBody(content))

"""TLS for a server that is played by hand."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Any

import trustme
from http1_kit import PATIENCE
from http1_servers import Peer

from pathlb.testing import http_reply


def server_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class TLSPeer:
    """TLS over a peer, played by hand as well."""

    def __init__(self, peer: Peer, context: ssl.SSLContext) -> None:
        self.peer = peer
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._in, self._out, server_side=True)

    async def _do(self, step: Any, *args: Any) -> Any:
        """Do it, reading as it needs; what it writes is kept."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    return step(*args)
                await self.flush()
                if not self.peer._inbox:
                    await self.peer._more()
                self._in.write(self.peer._take(len(self.peer._inbox)))

    async def flush(self) -> None:
        await self.peer.send(self._out.read())

    async def handshake(self, *, flush: bool = True) -> None:
        await self._do(self.tls.do_handshake)
        if flush:
            await self.flush()

    async def request(self) -> bytes:
        """One request without a body."""
        raw = b""
        while not raw.endswith(b"\r\n\r\n"):
            raw += await self.read(65536)
        return raw

    async def read(self, most: int) -> bytes:
        """Between 1 and `most` bytes. Raises `EOFError` when the client has ended TLS."""
        data: bytes = await self._do(self.tls.read, most)
        if not data:
            raise EOFError
        return data

    async def send(self, data: bytes) -> None:
        self.tls.write(data)
        await self.flush()

    async def answer(self, reply: bytes = http_reply()) -> bytes:
        raw = await self.request()
        await self.send(reply)
        return raw

    def say_goodbye(self) -> None:
        """Write a close_notify; the client's is not waited for."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()

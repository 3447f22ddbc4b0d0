"""The `network_stream` of a 101 from pathlb's own connections, as httpx's: with the errors WebSocket clients catch."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from typing import Any

import httpcore

from ...errors import UpstreamError
from ...upstream.http1.network_stream import NetworkStream


class CoreStream(httpcore.AsyncNetworkStream):
    """Raw bytes both ways; failures are httpcore's (`ReadError`, `WriteTimeout` ...)."""

    def __init__(self, stream: NetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with _as_core():
            return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with _as_core():
            await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> CoreStream:
        with _as_core():
            await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return self

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@contextlib.contextmanager
def _as_core() -> Iterator[None]:
    try:
        yield
    except UpstreamError as exc:
        raise getattr(httpcore, exc.fault.value)(str(exc)) from exc

"""Which upstream leads to an endpoint unless the caller says otherwise: pathlb's own, or a transport of httpx."""

from __future__ import annotations

import ssl
from types import ModuleType
from typing import Any

from ..core.model import Endpoint
from .base import Upstream
from .http1 import Http1Upstream, Pool
from .transport import DEFAULT_STACK, TransportUpstreams


class Upstreams:
    """Makes the upstream of an endpoint: pathlb's own HTTP/1.1 pool on asyncio, one httpx transport where that cannot
    do it: on trio, with HTTP/2, through a proxy. `snapshot()` says which.

    `verify`, `cert`, `http1`, `http2`, `trust_env` and `proxy` mean what they mean to `httpx.AsyncClient`; `pool` is
    about pathlb's own connections; `stack` is the `httpx` or the `httpx2` module. Raises `ConfigError`.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        http1: bool = True,
        http2: bool = False,
        trust_env: bool = True,
        proxy: Any = None,
        pool: Pool = Pool(),
        stack: ModuleType = DEFAULT_STACK,
    ) -> None:
        self._transports = TransportUpstreams(
            verify=verify, cert=cert, http1=http1, http2=http2, trust_env=trust_env, proxy=proxy, stack=stack
        )
        self._only_transports = http2 or proxy is not None
        self._pool = pool

    def __call__(self, endpoint: Endpoint) -> Any:
        if self._only_transports:
            return self._transports(endpoint)
        # Loaded here, and not at the first request: it is where certificates are found to be unusable.
        context = self._transports.ssl_context(endpoint) if endpoint.scheme == "https" else None
        return _ByLibrary(endpoint, self._transports, self._pool, context)


class _ByLibrary:
    """Not decided before the first request: only then is it known which async library runs (`base.Undecided`)."""

    def __init__(
        self, endpoint: Endpoint, transports: TransportUpstreams, pool: Pool, context: ssl.SSLContext | None
    ) -> None:
        self._endpoint = endpoint
        self._transports = transports
        self._pool = pool
        self._context = context

    def decide(self, library: str) -> Upstream:
        if library == "asyncio":
            return Http1Upstream(self._endpoint, self._pool, self._context)
        return self._transports(self._endpoint)

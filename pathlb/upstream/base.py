"""The contract between the balancer and whatever moves the bytes."""

from __future__ import annotations

from typing import Any, Protocol

from ..core.model import Endpoint
from ..exchange import Headers, Reply, Request


class Upstream(Protocol):
    """The way to one endpoint. Several requests use it at once; it never makes one wait for another.

    An implementation keeps these promises:

    - `send` returns when the reply head is there. The target on the wire is the endpoint's base path plus
      `request.target`, the Host is `request.host` or the endpoint's authority, `extra_headers` follow the request's.
    - Every failure is an `UpstreamError` that says `NOT_SENT` only where no byte of the request can have reached
      the endpoint, and then the body was not touched either.
    - Bodies that break off raise `UpstreamError` from the iteration; closing is safe at any point and twice.
    - Cancelling `send` or the iteration leaves the connections consistent.
    """

    kind: str
    """Which one it is, for snapshots: `http1`, `httpx`, `httpx2`, `scripted`, ..."""

    async def send(self, request: Request, extra_headers: Headers) -> Reply: ...

    async def aclose(self) -> None: ...


class Undecided(Protocol):
    """What a factory may make instead of an upstream: one that depends on the async library it will run on."""

    def decide(self, library: str) -> Upstream:
        """The upstream, on `asyncio` or `trio`; called once, with the first request or when the endpoint joins."""


class UpstreamFactory(Protocol):
    """Makes the upstream of an endpoint, once, when the endpoint joins.

    An `Undecided` will do, and so will an httpx or httpx2 async transport; give that one no connection limit, or its
    pool is a hidden queue.
    """

    def __call__(self, endpoint: Endpoint, /) -> Any: ...

"""A reply body that ends its lease: the request stays in flight until the body is closed, or dropped and collected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from .core.lease import Lease
from .errors import UpstreamError
from .exchange import ReplyBody


class LeaseEnds(Protocol):
    """Where leases end: the balancer."""

    def release(self, lease: Lease) -> None: ...

    def fail_body(self, lease: Lease, error: UpstreamError) -> None: ...

    def dropped(self, body: LeasedBody) -> None: ...


class LeasedBody:
    """The body of a reply, tied to the lease: closing it, or dropping it, ends the request."""

    __slots__ = ("_done", "_ends", "_parts", "inner", "lease")

    def __init__(self, inner: ReplyBody, lease: Lease, ends: LeaseEnds) -> None:
        self.inner = inner
        self.lease = lease
        self._ends = ends
        self._done = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        # Not an async generator, which would cost twice as much a reply.
        self._parts = aiter(self.inner)
        return self

    async def __anext__(self) -> bytes:
        try:
            return await self._parts.__anext__()
        except UpstreamError as exc:
            if not self._done:
                self._ends.fail_body(self.lease, exc)
            raise

    async def aclose(self) -> None:
        if self._done:
            return
        self._done = True
        try:
            await self.inner.aclose()
        finally:
            self._ends.release(self.lease)

    def __del__(self) -> None:
        if not self._done:
            self._ends.dropped(self)

"""The ends of leases: a request stays in flight until its reply's body is closed, or dropped and collected."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio

from .core.engine import Engine
from .core.lease import Lease
from .core.model import Clock, Outcome
from .errors import UpstreamError
from .exchange import Reply, ReplyBody, Request, WholeBody

logger = logging.getLogger("pathlb")

_DRAIN_BYTES = 65_536  # of a discarded reply that are read to keep its connection; a longer one is closed
_DRAIN_SECONDS = 0.1
_NO_REQUEST = Request("", b"", [])


class LeaseEnds:
    """Where the leases of one balancer end. `left` is told the URL of a removed endpoint that has nothing in flight any
    more.
    """

    classify: Callable[[Request, UpstreamError, Lease], Outcome]
    """What a failure means; set right after construction."""

    def __init__(self, engine: Engine, clock: Clock, left: Callable[[str], None]) -> None:
        self._engine = engine
        self._clock = clock
        self._left = left
        # Bodies dropped without being closed; the garbage collector may find them on any thread.
        self._dropped: deque[LeasedBody] = deque()

    def release(self, lease: Lease) -> None:
        """The request of this lease is no longer in flight."""
        if self._engine.release(self._clock(), lease):
            self._left(lease.endpoint.url)

    def fail_body(self, lease: Lease, error: UpstreamError) -> None:
        """The reply body of this lease broke off."""
        self._engine.fail_body(self._clock(), lease, self.classify(_NO_REQUEST, error, lease))

    def dropped(self, body: LeasedBody) -> None:
        """A body was collected without being closed; the next `collect` sees to it. Safe from any thread."""
        self._dropped.append(body)

    def collect(self) -> Iterator[ReplyBody]:
        """Release what was dropped; the bodies are left to close."""
        while self._dropped:
            body = self._dropped.popleft()
            self.release(body.lease)
            yield body.inner

    async def discard(self, reply: Reply | None, lease: Lease) -> None:
        """End an attempt whose reply, if there is one, nobody gets."""
        try:
            if reply is not None and type(reply.body) is not WholeBody:
                with anyio.move_on_after(_DRAIN_SECONDS, shield=True):
                    await _drain(reply)
                with anyio.CancelScope(shield=True):
                    await close_quietly(reply.body)
        finally:
            self.release(lease)


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


async def _drain(reply: Reply) -> None:
    """Read a short body nobody wants, so that its connection can be kept."""
    length = next((value for name, value in reply.headers if name.lower() == b"content-length"), b"")
    if not length.isdigit() or int(length) > _DRAIN_BYTES:
        return
    try:
        async for _ in reply.body:
            pass
    except UpstreamError:
        logger.debug("the body of a discarded reply broke off", exc_info=True)


async def close_quietly(closable: Any) -> None:
    """Close something nobody waits for any more; its failure concerns nobody."""
    try:
        await closable.aclose()
    except Exception:
        logger.debug("closing %r failed", closable, exc_info=True)

"""What the calls made while handling somebody's request must keep to: the time it has left, and that it is still there.

    with deadline_scope(2.5):
        await client.get(...)    # has its reply head within what is left of the 2.5 s

It holds for the code within and for tasks started there (it is a context variable); the earliest deadline counts.
`pathlb.asgi.BalancerMiddleware` makes one of the request an app is handling.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar, Token
from dataclasses import replace
from types import TracebackType

from .core.config import check_number
from .core.model import Sent
from .errors import DeadlineExceeded, Fault, UpstreamError
from .exchange import Reply, ReplyBody, Request, WholeBody
from .runner import AttemptScope, Runner

_FOREVER = 1e9
_GONE = "the caller it was for has left"


class Bound:
    """Ends the balanced calls made within, at a time or by `cancel`; so does the one around it."""

    __slots__ = ("_around", "_ends", "_gone", "_scopes")

    def __init__(self, ends: float = math.inf, around: Bound | None = None) -> None:
        self._ends = ends
        self._around = around
        self._gone = False
        self._scopes: set[AttemptScope] = set()

    @property
    def remaining(self) -> float:
        """Seconds that are left; infinite without a deadline."""
        ends, around = self._ends, self._around
        while around is not None:
            ends, around = min(ends, around._ends), around._around
        return ends - time.monotonic()

    @property
    def gone(self) -> bool:
        """It was cancelled, and is not lifted."""
        return self._gone or (self._around is not None and self._around.gone)

    def cancel(self) -> None:
        """Nobody waits for the results any more: end what is under way, and refuse what is to come."""
        self._gone = True
        for scope in self._scopes:
            scope.cancel()

    def lift(self) -> None:
        """The request is answered: what still runs in its name need not keep to anything."""
        self._ends = math.inf
        self._gone = False

    def hold(self, scope: AttemptScope) -> None:
        """`cancel` this scope too, until `let_go`."""
        self._scopes.add(scope)
        if self._around is not None:
            self._around.hold(scope)

    def let_go(self, scope: AttemptScope) -> None:
        self._scopes.discard(scope)
        if self._around is not None:
            self._around.let_go(scope)

    async def send(
        self, runner: Runner, request: Request, deadline: float, way: Callable[[Request], Awaitable[Reply]]
    ) -> Reply:
        """`way(request)`, within this. `deadline` are the seconds it has otherwise, where the request does not say.

        Raises `DeadlineExceeded`, which says nothing of attempts when it is `cancel` that ended the call: they go with
        it, and the one under way has no outcome. And what `way` raises.
        """
        left = self.remaining
        if self.gone or left <= 0:
            why = _GONE if self.gone else "the deadline of the request being handled has passed"
            raise DeadlineExceeded(f"{why}; nothing was sent")
        if left < (deadline if request.deadline is None else request.deadline):
            request = replace(request, deadline=left)
        scope = runner.scope(_FOREVER)
        self.hold(scope)
        try:
            with scope:
                reply = await way(request)
                if type(reply.body) is not WholeBody:
                    reply.body = _BoundBody(reply, self, runner)
                return reply
        finally:
            self.let_go(scope)
        raise DeadlineExceeded(f"{_GONE}; the call was cancelled")


class _BoundBody:
    """The body of a reply, cut off when nobody waits for it any more."""

    __slots__ = ("_body", "_bound", "_parts", "_runner", "_url")

    def __init__(self, reply: Reply, bound: Bound, runner: Runner) -> None:
        self._body: ReplyBody = reply.body
        self._url = reply.attempts[-1].endpoint
        self._bound = bound
        self._runner = runner

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._parts = aiter(self._body)
        return self

    async def __anext__(self) -> bytes:
        bound = self._bound
        if not bound.gone:
            scope = self._runner.scope(_FOREVER)
            bound.hold(scope)
            try:
                with scope:
                    return await self._parts.__anext__()
            finally:
                bound.let_go(scope)
        raise UpstreamError(Fault.READ, Sent.MAYBE_SENT, self._url, f"given up: {_GONE}")

    async def aclose(self) -> None:
        await self._body.aclose()


BOUND: ContextVar[Bound | None] = ContextVar("pathlb_bound", default=None)
"""What calls made now must keep to."""


class deadline_scope:
    """`with deadline_scope(2.5):` every balanced call made within has its reply head by then, or `DeadlineExceeded`.

    A shorter deadline around it, or of the request itself, goes before. `None` sets the calls within free: of every
    deadline around, and of the caller's leaving. Raises `ConfigError`.
    """

    __slots__ = ("_seconds", "_token")

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None:
            check_number("deadline_scope", "seconds", seconds, 0)
        self._seconds = seconds

    def __enter__(self) -> None:
        seconds = self._seconds
        bound = None if seconds is None else Bound(time.monotonic() + seconds, BOUND.get())
        self._token: Token[Bound | None] = BOUND.set(bound)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        BOUND.reset(self._token)

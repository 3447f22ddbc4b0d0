"""A balancer for the handlers of an ASGI app: started, shared and closed with it, and bound to who is waiting."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping

from ..balancer import Balancer
from ..core.config import check_number
from ..core.errors import ConfigError
from ..deadline import BOUND, Bound
from ..exchange import Headers
from ..telemetry import incoming
from .caller import Caller
from .headers import is_field
from .lookout import Lookout
from .problems import Problem, render
from .shedding import Limiter
from .types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("pathlb")

_SHED = Problem(503, "Service Unavailable", "this service is at its limit", retry_after=1)
_GRPC_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


class BalancerMiddleware:
    """Gives the handlers of an app their balancers, and the calls they make the limits of who asked.

        app = BalancerMiddleware(app, balancers=balancer)                   # request.state.balancer
        app.add_middleware(BalancerMiddleware, balancers={"gateways": b})   # request.state.gateways

    - `balancers`: one, or several by name. They start and close with the app's lifespan, whether or not the app itself
      knows of lifespans; where none reaches it (an app mounted in another, Django) they start with the first request,
      and closing them is up to `lifespan`, or to nobody.
    - `deadline_header`: the field that says how many seconds the caller waits (`X-Request-Timeout: 2.5`; milliseconds
      if its name ends in `-ms`, gRPC's notation if it is `grpc-timeout`). Every balanced call made for the request has
      its reply head by then, and by `max_deadline` seconds whatever the field says. Default None: not asked; what
      makes no sense, or is 0, counts as not said.
    - `concurrency`: how many requests the app works on at once; `queue` more wait, first come first served, at most
      `queue_timeout` seconds each; the rest is answered 503 with Retry-After. Default None: no limit.

    When a caller leaves before its request is answered, the balanced calls made for it are cancelled: those under way
    fail with `DeadlineExceeded` (a reply's body with `ReadError`), and so do later ones. Only the calls: the app goes
    on, as it does under its server. `with pathlb.deadline.deadline_scope(None):` keeps out what must not end with the
    caller, and so does running it after the response (a background task). Calls join the trace the request came with,
    where nothing else has opened a span.

    WebSockets get the balancers and the trace, and are not limited. Raises `ConfigError`.
    """

    def __init__(
        self,
        app: ASGIApp,
        balancers: Balancer | Mapping[str, Balancer],
        *,
        deadline_header: str | None = None,
        max_deadline: float = 30.0,
        concurrency: int | None = None,
        queue: int = 0,
        queue_timeout: float = 5.0,
    ) -> None:
        owner = type(self).__name__
        self.app = app
        self._balancers = _check_balancers(balancers)
        if deadline_header is not None and not is_field(deadline_header, ""):
            raise ConfigError(f"{owner}.deadline_header", f"is no name of a field: {deadline_header!r}")
        self._deadline_header = deadline_header.lower().encode("ascii") if deadline_header is not None else None
        check_number(owner, "max_deadline", max_deadline, 1e-6)
        self._max_deadline = max_deadline
        if concurrency is not None:
            check_number(owner, "concurrency", concurrency, 1, whole=True)
        elif queue:
            raise ConfigError(f"{owner}.queue", "has no effect without concurrency=")
        check_number(owner, "queue", queue, 0, whole=True)
        check_number(owner, "queue_timeout", queue_timeout, 0)
        self._limiter = Limiter(concurrency, queue) if concurrency is not None else None
        self._queue_timeout = queue_timeout
        self._lookout = Lookout()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            self._place(scope)
            await self._http(scope, receive, send)
        elif kind == "websocket":
            self._place(scope)
            trace = incoming.join(scope["headers"])
            try:
                await self.app(scope, receive, send)
            finally:
                if trace is not None:
                    incoming.leave(trace)
        elif kind == "lifespan":
            if "state" in scope:
                scope["state"].update(self._balancers)
            await _Lifespan(list(self._balancers.values()), receive, send).run(self.app, scope)
        else:
            await self.app(scope, receive, send)

    def _place(self, scope: Scope) -> None:
        """Put the balancers where handlers find them. Starlette makes `request.state` of this, in mounted apps too."""
        state = scope.get("state")
        if state is None:  # the server has none
            scope["state"] = dict(self._balancers)
        else:
            state.update(self._balancers)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = self._deadline_header
        seconds = math.inf if name is None else _told_deadline(name, scope["headers"], self._max_deadline)
        bound = Bound(time.monotonic() + seconds, BOUND.get())
        caller = Caller(self._lookout, scope, receive, send, bound)
        token = BOUND.set(bound)
        trace = incoming.join(scope["headers"])
        try:
            if self._limiter is None:
                await self.app(scope, caller.receive, caller.send)
            else:
                await self._limited(self._limiter, scope, caller)
        finally:
            if trace is not None:
                incoming.leave(trace)
            BOUND.reset(token)
            caller.end()

    async def _limited(self, limiter: Limiter, scope: Scope, caller: Caller) -> None:
        turn = limiter.enter()
        if turn is not None and not turn.granted:
            bound = caller.bound
            patience = self._lookout.runner.scope(min(self._queue_timeout, max(0.0, bound.remaining)))
            bound.hold(patience)
            try:
                await limiter.wait(turn, patience)
            finally:
                bound.let_go(patience)
        if turn is None or not turn.granted:
            if not caller.left:
                await _refuse(caller.send)
            return
        try:
            await self.app(scope, caller.receive, caller.send)
        finally:
            limiter.leave()


@contextlib.asynccontextmanager
async def lifespan(*balancers: Balancer) -> AsyncIterator[None]:
    """Start balancers and close them: for the lifespan of the app that others are mounted in.

    async def lifespan(app):
        async with pathlb.asgi.lifespan(balancer):
            yield
    """
    async with contextlib.AsyncExitStack() as stack:
        for balancer in balancers:
            await stack.enter_async_context(balancer)
        yield


class _Lifespan:
    """The lifespan of an app, with that of the balancers around it; all of it where the app has none of its own.

    Once the server has been told that all is well they stay open until it ends, whatever becomes of the app's.
    """

    def __init__(self, balancers: list[Balancer], receive: Receive, send: Send) -> None:
        self._balancers = balancers
        self._receive = receive
        self._send = send
        self._open = contextlib.AsyncExitStack()
        self._heard = 0  # how many messages the server has sent
        self._answered = False  # the first of them
        self._serving = False  # the server has been told that all is well
        self._failed = False  # it has been told that the balancers cannot start

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        async with self._open:
            try:
                await app(scope, self.receive, self.send)
            except Exception:
                if self._serving and self._heard == 1:
                    # Servers serve on, and requests need them.
                    logger.exception("the app's lifespan broke off; its balancers stay open until the server ends")
                    await self.receive()
                if self._heard:  # it was told to start, or to end: what that means is for the server to say
                    raise
                logger.debug("the app has no lifespan of its own", exc_info=True)
            if not self._heard:
                await self.receive()
            if not self._answered:
                await self.send({"type": "lifespan.startup.complete"})
            if self._serving:
                if self._heard == 1:
                    await self.receive()
                await self.send({"type": "lifespan.shutdown.complete"})

    async def receive(self) -> Message:
        if self._failed:  # the server will say no more, and the app is to clean up
            return {"type": "lifespan.shutdown"}
        message = await self._receive()
        self._heard += 1
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            self._answered = self._serving = True
            try:
                for balancer in self._balancers:
                    await self._open.enter_async_context(balancer)
            except Exception as exc:
                self._serving, self._failed = False, True
                message = {"type": "lifespan.startup.failed", "message": str(exc)}
        elif kind == "lifespan.startup.failed":
            self._answered = True
        else:
            self._serving = False
            await self._open.aclose()  # after the app's own end, which may still use them
            if self._failed:
                return
        await self._send(message)


def _check_balancers(given: Balancer | Mapping[str, Balancer]) -> dict[str, Balancer]:
    if isinstance(given, Balancer):
        return {"balancer": given}
    where = "BalancerMiddleware.balancers"
    if not isinstance(given, Mapping):
        raise ConfigError(where, f"must be a pathlb.Balancer, or several by name, not {type(given).__name__}")
    for name, balancer in given.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(where, f"{name!r} cannot be an attribute of request.state")
        if not isinstance(balancer, Balancer):
            raise ConfigError(f"{where}[{name!r}]", f"must be a pathlb.Balancer, not {type(balancer).__name__}")
    return dict(given)


def _told_deadline(field: bytes, headers: Headers, most: float) -> float:
    """Seconds the caller waits, at most `most`; infinite where it does not say, or makes no sense."""
    value = next((value.strip() for name, value in headers if name == field), b"")
    unit = 1.0
    if field == b"grpc-timeout":
        unit = _GRPC_UNITS.get(value[-1:], math.nan)
        value = value[:-1]
    elif field.endswith(b"-ms"):
        unit = 1e-3
    if not value.replace(b".", b"", 1).isdigit() or len(value) > 20:
        return math.inf
    seconds = float(value) * unit
    return min(seconds, most) if seconds > 0 else math.inf


async def _refuse(send: Send) -> None:
    headers, body = render(_SHED, None)
    await send({"type": "http.response.start", "status": _SHED.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

"""A reverse proxy as an ASGI app: from the scope to `Balancer.send`, and the reply back, both streaming."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack

import anyio

from ..balancer import Balancer
from ..core.config import check_number
from ..core.errors import ConfigError
from ..errors import PathlbError, UpstreamError
from ..exchange import Attempt, Headers, OneShotBody, Reply, ReplyBody, Request, WholeBody
from . import problems
from .forwarded import Forwarding
from .headers import BadReply, BadRequest, Framing, Known, is_host, is_token, read_reply, read_request
from .intake import Intake, TooLarge
from .lookout import Lookout
from .problems import Problem, problem_of, render
from .routes import Destination, Route, Router
from .rules import HeaderRules
from .targets import Targets
from .types import Message, Receive, Scope, Send
from .watch import Call, Disconnected

logger = logging.getLogger("pathlb")

_OWN_CONNECTION = ("1.1", "1.0", "1")  # versions with one request at a time on a connection; granian's 1 is 1.0
_TRAILERS = ((b"te", b"trailers"), (b"connection", b"te"))
_UNHURRIED = 1e9  # seconds: a body that streams takes as long as its caller does
_TOLD = (b"x-pathlb-endpoint", b"x-pathlb-attempts")


class Gateway:
    """An ASGI app that hands requests to balanced gateways: alone under any server, or mounted at a path.

        app.mount("/rpc", Gateway(balancer))

    - `balancer`: where requests go that no route takes; its owner starts and closes it, or `lifespan` where this app is
      the whole application. `routes`: others, by path prefix, host or header.
    - `max_body`: bytes of a request body, more is a 413 (default 75 MiB, as PATH's).
    - `max_message`: bytes of a WebSocket message, either way, more is a close 1009 (default 16 MiB; the server below
      has a limit of its own for what callers send).
    - `rewrite`: `(prefix, replacement)` of the path, whole segments, after the mount's own prefix is taken off.
    - `host`: the Host to send (default: the caller's).
    - `set_request_headers`, `set_response_headers`: fields to replace (or, with None, to take out).
    - `trusted`: networks of the proxies in front, whose X-Forwarded fields count (`unix:` for those on a unix socket;
      `forwarded:10.0.0.0/8` for those that write Forwarded instead; default: nobody's). The server must leave the
      fields alone: uvicorn needs `--no-proxy-headers`.
    - `tell`: answers say `X-Pathlb-Endpoint` and `X-Pathlb-Attempts` (default False: the endpoint is an inner address).
    - `name`: what it calls itself in Via; a request that has been here before is refused. Workers of one service
      should share a name (default: one by chance).

    Bodies of up to 64 KiB can be sent again elsewhere; longer ones stream, both ways, at the pace of the slower side:
    for a request whose body streams the balancer's timeouts hold, and not its deadline. A caller that leaves cancels
    its request. Raises `ConfigError`.
    """

    def __init__(
        self,
        balancer: Balancer | None = None,
        *,
        routes: Sequence[Route] = (),
        max_body: int = 75 * 2**20,
        max_message: int = 16 * 2**20,
        rewrite: tuple[str, str] | None = None,
        host: str | None = None,
        set_request_headers: Mapping[str, str | None] | None = None,
        set_response_headers: Mapping[str, str | None] | None = None,
        trusted: Iterable[str] = (),
        tell: bool = False,
        name: str | None = None,
    ) -> None:
        check_number("Gateway", "max_body", max_body, 0, whole=True)
        check_number("Gateway", "max_message", max_message, 1, whole=True)
        self._router = Router(routes, balancer)
        self._max_body = max_body
        self._max_message = max_message
        if host is not None and not (isinstance(host, str) and is_host(host)):
            raise ConfigError("Gateway.host", f"must be a host, with or without a port, not {host!r}")
        if name is not None and not (isinstance(name, str) and is_token(name)):
            raise ConfigError("Gateway.name", f"must be one word of ASCII letters, digits, - . _, not {name!r}")
        self._host = host.encode("ascii") if host is not None else None
        self._targets = Targets(rewrite)
        self._request_rules = HeaderRules("Gateway.set_request_headers", set_request_headers)
        self._response_rules = HeaderRules("Gateway.set_response_headers", set_response_headers)
        self._forwarding = Forwarding(trusted)
        self._tell = tell
        self._known = Known()
        self._pseudonym = (name or f"pathlb-{secrets.token_hex(4)}").encode("ascii")
        versions = {"1.1": b"1.1", "1.0": b"1.0", "1": b"1.0", "2": b"2", "3": b"3"}
        self._via = {version: b"%b %b" % (said, self._pseudonym) for version, said in versions.items()}
        self._lookout = Lookout()

    @property
    def balancers(self) -> list[Balancer]:
        """Those it hands requests to."""
        return self._router.balancers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(receive, send)
        else:
            raise NotImplementedError(kind)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        """Alone under a server: the balancers live as long as it does."""
        await receive()
        phase = "startup"
        try:
            async with AsyncExitStack() as running:
                for balancer in self.balancers:
                    await running.enter_async_context(balancer)
                await send({"type": "lifespan.startup.complete"})
                phase = "shutdown"
                await receive()
        except Exception as exc:
            await send({"type": f"lifespan.{phase}.failed", "message": f"{type(exc).__name__}: {exc}"})
            return
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            framing, destination, problem = self._direct(scope)
        except BadRequest as exc:
            await self._answer(scope, send, problem_of(exc), None, closing=True)  # where it ends is anybody's guess
            return
        with Call(self._lookout, receive) as call:
            intake = Intake(receive, framing, self._max_body, call)
            try:
                await self._serve(scope, framing, destination, problem, intake, send, call)
            except Disconnected:
                return
        if call.overdue:
            if call.answering:
                raise BrokenOff("its caller does not take the reply")
            await self._answer(scope, send, problems.SLOW, intake.seen, closing=True)

    async def _serve(
        self,
        scope: Scope,
        framing: Framing,
        destination: Destination | None,
        problem: Problem | None,
        intake: Intake,
        send: Send,
        call: Call,
    ) -> None:
        """Take the body in and forward the request, or say what is wrong. Raises `Disconnected`."""
        body: bytes | OneShotBody = b""
        closing = False
        try:
            if destination is not None or scope["method"] == "POST":  # JSON-RPC gets its refusal as JSON-RPC
                body = await intake.begin()
        except BadRequest as exc:
            destination, problem, closing = None, problem_of(exc), True
        except TooLarge:
            destination, problem = None, problems.TOO_LARGE
        if destination is None:
            seen = await intake.glimpse()
            call.end()
            await self._answer(scope, send, problem or problems.INTERNAL, seen, closing=closing)
            return
        request = self._request(scope, framing, destination, body)
        if framing.trailers:
            request.headers += _TRAILERS
        if not isinstance(body, bytes):
            request.deadline = _UNHURRIED
        await self._forward(destination.balancer, request, scope, send, intake, call)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        from . import websocket  # needs a library

        await receive()  # that there is one, which the scope says too
        # As the HTTP request it came as: what holds for those holds for it.
        scope = {**scope, "method": "GET", "scheme": "https" if scope.get("scheme") == "wss" else "http"}
        attempts: Sequence[Attempt] = ()
        try:
            handshake = websocket.Handshake(scope.get("subprotocols") or (), self._max_message)
            framing, destination, problem = self._direct(scope)
            if destination is not None:
                request = handshake.into(self._request(scope, framing, destination, b""))
                await websocket.forward(handshake, destination.balancer, request, self._fields, scope, receive, send)
                return
        except BadRequest as exc:
            problem = problem_of(exc)
        except websocket.NotOpened as exc:
            problem, attempts = exc.problem, exc.attempts
        problem = problem or problems.INTERNAL
        headers, data = self._said(problem, None, attempts)
        await websocket.refuse(scope, send, problem.status, headers, data)

    def _direct(self, scope: Scope) -> tuple[Framing, Destination | None, Problem | None]:
        """What is asked, and where it goes; else what is answered. Raises `BadRequest`."""
        framing = read_request(scope["headers"], self._known, scope.get("http_version", "1.1"))
        problem = self._refuses(scope, framing)
        if problem is not None:
            return framing, None, problem
        target = self._targets.of(scope)
        destination = self._router.find(target, framing.host, framing.headers)
        return framing, destination, problems.NOT_FOUND if destination is None else None

    async def _forward(
        self, balancer: Balancer, request: Request, scope: Scope, send: Send, intake: Intake, call: Call
    ) -> None:
        """Send the request, and to the caller the reply, or what is to be said instead. Raises `Disconnected`."""
        attempts: Sequence[Attempt] = ()
        closing = False
        try:
            reply = await balancer.send(request)
        except Disconnected:
            raise
        except TooLarge:
            problem = problems.TOO_LARGE
        except BadRequest as exc:
            problem, closing = problem_of(exc), True
        except PathlbError as exc:
            problem, attempts = problem_of(exc), exc.attempts
            logger.debug("no reply to hand over: %s", exc)
        except Exception:  # a bug, whose trace is nothing for callers
            problem = problems.INTERNAL
            logger.exception("the gateway failed")
        else:
            call.body_read = True  # nobody reads on, whether there is more of it or not
            try:
                start = self._start(reply)
            except BadReply as exc:
                problem, attempts = problems.BAD_REPLY, reply.attempts
                logger.warning("a reply of %s that cannot be handed over: %s", attempts[-1].endpoint, exc)
                await _close(reply.body)
            else:
                await _relay(start, reply.body, send, call)
                return
        seen = await intake.glimpse()
        call.end()
        await self._answer(scope, send, problem, seen, attempts, closing=closing)

    async def _answer(
        self,
        scope: Scope,
        send: Send,
        problem: Problem,
        seen: bytes | None,
        attempts: Sequence[Attempt] = (),
        *,
        closing: bool = False,
    ) -> None:
        """Say it ourselves. `seen` is what is known of the request body; `closing` ends the connection, too."""
        headers, data = self._said(problem, seen, attempts)
        if closing and scope.get("http_version", "1.1") in _OWN_CONNECTION:
            headers = [*headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await send({"type": "http.response.body", "body": data})

    def _said(self, problem: Problem, seen: bytes | None, attempts: Sequence[Attempt]) -> tuple[Headers, bytes]:
        """The fields and the body of an answer of our own."""
        headers, data = render(problem, seen)
        headers = self._response_rules.apply(headers)
        return [*headers, *_told(attempts)] if self._tell and attempts else headers, data

    def _start(self, reply: Reply) -> Message:
        """The beginning of the reply for the caller. Raises `BadReply`."""
        if not 200 <= reply.status <= 599:
            raise BadReply(f"its status is {reply.status}")
        return {"type": "http.response.start", "status": reply.status, "headers": self._fields(reply)}

    def _fields(self, reply: Reply) -> Headers:
        """Those of the reply as they are for the caller. Raises `BadReply`."""
        headers = self._response_rules.apply(read_reply(reply.headers, reply.status, self._known))
        if self._tell:
            headers = [*(pair for pair in headers if pair[0] not in _TOLD), *_told(reply.attempts)]
        return headers

    def _refuses(self, scope: Scope, framing: Framing) -> Problem | None:
        """What is answered here: loops, and requests that may go no further (Max-Forwards). Raises `BadRequest`."""
        method = scope["method"]
        if method == "CONNECT":
            return problems.NOT_ALLOWED
        if framing.via and self._has_been_here(framing.via):
            return problems.LOOP
        if method not in ("TRACE", "OPTIONS"):
            return None
        if method == "OPTIONS" and scope.get("raw_path") == b"*":
            return problems.NO_FURTHER  # about the server as a whole, which this is
        for index, (name, value) in enumerate(framing.headers):
            if name == b"max-forwards":
                if not value.isdigit() or len(value) > 9:
                    raise BadRequest("Max-Forwards is not a number")
                if int(value) == 0:
                    return problems.NOT_ALLOWED if method == "TRACE" else problems.NO_FURTHER
                framing.headers[index] = (name, b"%d" % (int(value) - 1))
        return None

    def _has_been_here(self, via: list[bytes]) -> bool:
        return any(self._pseudonym in hop.split()[1:2] for value in via for hop in value.split(b","))

    def _request(self, scope: Scope, framing: Framing, to: Destination, body: bytes | OneShotBody) -> Request:
        client = scope.get("client")
        peer = client[0] if client else ""
        host = framing.host
        headers = framing.headers + self._forwarding.apply(framing.told, peer, scope.get("scheme", "http"), host)
        via = self._via.get(scope.get("http_version", "1.1"), self._via["1.1"])
        headers.append((b"via", b", ".join([*framing.via, via]) if framing.via else via))
        headers = self._request_rules.apply(headers)
        if framing.length is not None and not isinstance(body, bytes):
            headers.append((b"content-length", b"%d" % framing.length))
        return Request(
            scope["method"],
            to.target,
            headers,
            body,
            host=self._host or host,
            timeouts=to.balancer.timeouts,
            events_may_pause=True,
        )


class BrokenOff(Exception):
    """The upstream's reply ended before its end, after its head was handed over."""


async def _relay(start: Message, body: ReplyBody, send: Send, call: Call) -> None:
    """Hand over a reply, at the pace of the slower side. Raises `BrokenOff`."""
    if isinstance(body, WholeBody):
        call.end()
        await send(start)
        await send({"type": "http.response.body", "body": body.content})
        return
    call.answering = True
    try:
        call.wait_for_taking()
        await send(start)
        # Some servers keep the head to themselves until there is body, which may take long or never come.
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        call.go_on()
        async for part in body:
            call.wait_for_taking()
            await send({"type": "http.response.body", "body": part, "more_body": True})
            call.go_on()
        call.end()
        await send({"type": "http.response.body", "body": b""})
    except UpstreamError as exc:
        # Whatever is raised now makes the server cut the connection: a body cut short must not look complete.
        raise BrokenOff(f"the reply broke off: {exc.detail}") from None
    finally:
        await _close(body)


async def _close(body: ReplyBody) -> None:
    with anyio.CancelScope(shield=True):
        await body.aclose()


def _told(attempts: Sequence[Attempt]) -> Headers:
    return list(zip(_TOLD, (attempts[-1].endpoint.encode("latin-1"), b"%d" % len(attempts)), strict=True))

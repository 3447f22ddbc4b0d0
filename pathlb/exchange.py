"""A request and its reply as pathlb sees them: method, target bytes, raw header pairs, body; no library's types."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from .core.model import Outcome, Sent

Headers = list[tuple[bytes, bytes]]


class Timeouts(NamedTuple):
    """Seconds one attempt may spend on each step, as httpx means them; None is no limit.

    `pool` is the wait in pathlb's queue.
    """

    connect: float | None = 0.5
    read: float | None = 15.0
    write: float | None = 15.0
    pool: float | None = None


class OneShotBody:
    """A request body that can be sent once; `started` tells whether anybody has begun to."""

    __slots__ = ("_parts", "started")

    def __init__(self, parts: AsyncIterable[bytes]) -> None:
        self._parts = parts
        self.started = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        self.started = True
        return aiter(self._parts)


@dataclass(slots=True)
class Request:
    """What to send, and what the caller said about sending it. One object serves all attempts of a request."""

    method: str
    target: bytes
    """Path and query as they go on the wire, before the endpoint's base path."""
    headers: Headers
    """Raw pairs in order, without Host."""
    body: bytes | OneShotBody = b""
    host: bytes | None = None
    """The Host to send; None is the chosen endpoint's own authority."""
    timeouts: Timeouts = Timeouts()
    deadline: float | None = None
    """Seconds from now for everything up to the reply head; None is the balancer's default."""
    idempotent: bool | None = None
    """Whether it may be sent twice; None leaves it to method, Idempotency-Key and the balancer's setting."""
    pin: str | None = None
    """URL of the only endpoint that will do."""
    avoid: frozenset[str] = frozenset()
    """URLs of endpoints passed over while another is eligible."""
    key: str | None = None
    """The part of the endpoints this request needs (a service id); None for none in particular."""
    events_may_pause: bool = False
    """The body of a reply that is a stream of events is waited for without a read timeout."""
    extensions: dict[str, Any] = field(default_factory=dict)
    """The HTTP library's own (`trace`, `sni_hostname`), handed through to the upstream."""
    present: Callable[[Reply | Exception], Any] | None = None
    """Turns a neutral result into what the caller's retry strategies expect; set by the adapters."""
    expose: Any = None
    """The caller's own request object, for an `idempotent=` function."""

    @property
    def replayable(self) -> bool:
        """Whether the body can be sent (again): it is in memory, or nobody has touched it yet."""
        return isinstance(self.body, bytes) or not self.body.started


class ReplyBody(Protocol):
    """The bytes of a reply as they arrive. `aclose` gives the connection back, or closes it; calling it twice is fine.

    Iterating raises `UpstreamError` when the body breaks off.
    """

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None: ...


class WholeBody:
    """A reply body that is in memory, whole: nothing is in flight any more, and closing it is not necessary."""

    __slots__ = ("_rest", "content")

    def __init__(self, content: bytes) -> None:
        self.content = content
        self._rest = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        rest, self._rest = self._rest, b""
        if not rest:
            raise StopAsyncIteration
        return rest

    async def aclose(self) -> None:
        self._rest = b""


@dataclass(slots=True)
class Reply:
    """A reply head with its body still to come."""

    status: int
    headers: Headers
    body: ReplyBody
    http_version: bytes = b"HTTP/1.1"
    reason: bytes = b""
    extensions: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    """It came on a connection that had carried a request before."""
    attempts: tuple[Attempt, ...] = ()
    """Every attempt made for this request, the one that brought this reply last."""


def is_event_stream(headers: Headers) -> bool:
    """Whether a reply is a stream of server-sent events, by its fields."""
    return any(
        len(name) == 12 and name.lower() == b"content-type" and value.lower().startswith(b"text/event-stream")
        for name, value in headers
    )


class Attempt(NamedTuple):
    """One attempt, explained: where, why there, how it ended and how long that took."""

    endpoint: str
    """URL of the endpoint."""
    reason: str
    """Why this endpoint: the policy's name, or `probe`, `panic`, `pinned`, `only candidate`."""
    in_flight: int
    """Requests in flight there when it was picked, this one not counted."""
    candidates: int
    """How many endpoints the pick could choose from."""
    outcome: Outcome
    duration: float
    """Seconds from the pick to the reply head or the failure."""

    @property
    def sent(self) -> Sent:
        return self.outcome.sent

    def __str__(self) -> str:
        what = self.outcome.detail or (str(self.outcome.status) if self.outcome.status else self.outcome.cause.value)
        return f"{self.endpoint} ({self.reason}): {what} after {self.duration * 1000:.0f} ms"

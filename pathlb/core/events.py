"""What happened, as frozen records for telemetry, logs and people. Built only while somebody listens.

`at` is the balancer's monotonic clock in seconds; `endpoint` is the endpoint's URL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from .model import Outcome


@dataclass(frozen=True, slots=True)
class Picked:
    """An attempt got its endpoint. `in_flight` does not count it yet."""

    at: float
    endpoint: str
    reason: str
    in_flight: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Observed:
    """An attempt has its reply head or its failure, `duration` seconds after the pick."""

    at: float
    endpoint: str
    outcome: Outcome
    duration: float


@dataclass(frozen=True, slots=True)
class BodyFailed:
    """The body of a reply broke off, after its head was `Observed`."""

    at: float
    endpoint: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Released:
    """A reply body was closed (or the attempt failed): it no longer counts as in flight."""

    at: float
    endpoint: str
    in_flight: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A caller's request has its reply head or its error."""

    at: float
    attempts: int
    relays: int
    """Requests the endpoints made behind themselves for it, over all attempts, as far as they say so."""


@dataclass(frozen=True, slots=True)
class Retried:
    """Another attempt was decided on, after `wait` seconds (0: at once)."""

    at: float
    endpoint: str
    """Where the attempt failed that is made up for."""
    outcome: Outcome
    wait: float


@dataclass(frozen=True, slots=True)
class RetryRefused:
    """An attempt failed and another would have been allowed, but for `why` (budget, attempts, deadline ...)."""

    at: float
    endpoint: str
    outcome: Outcome
    why: str


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A circuit breaker changed state. `key` is None for the breaker of the whole endpoint."""

    at: float
    endpoint: str
    key: str | None
    before: str
    after: str
    why: str


@dataclass(frozen=True, slots=True)
class Ejected:
    """An endpoint was set aside as an outlier, for `seconds`. `why` gives the figures that decided."""

    at: float
    endpoint: str
    signal: str
    """`failures`, `latency` or `stall`."""
    seconds: float
    why: str
    key: str | None = None
    """The only service it is set aside for; None for all."""


@dataclass(frozen=True, slots=True)
class Returned:
    """An ejected endpoint may be picked again, on the slow-start ramp if it was out for all services."""

    at: float
    endpoint: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class GivenUp:
    """Attempts hanging on an endpoint that was ejected, or whose breaker opened, are being sent elsewhere."""

    at: float
    endpoint: str
    attempts: int


@dataclass(frozen=True, slots=True)
class HealthChanged:
    """Active probes changed their verdict: `unknown`, `up` or `down`."""

    at: float
    endpoint: str
    before: str
    after: str
    why: str
    key: str | None = None
    """The only service the verdict is about; None for the whole endpoint."""


@dataclass(frozen=True, slots=True)
class PanicChanged:
    """Picks began (or ceased) to fail open because too few endpoints are eligible."""

    at: float
    panicking: bool
    eligible: int
    total: int


@dataclass(frozen=True, slots=True)
class Queued:
    """A request waits because every eligible endpoint is at its limit. `depth` counts it."""

    at: float
    depth: int


@dataclass(frozen=True, slots=True)
class Dequeued:
    """A request left the queue after `waited` seconds. `why`: `granted`, `timeout`, `cancelled` or `refused`."""

    at: float
    depth: int
    waited: float
    why: str


@dataclass(frozen=True, slots=True)
class QueueOverflow:
    """A request was refused because the queue was full."""

    at: float
    depth: int


@dataclass(frozen=True, slots=True)
class EndpointsChanged:
    """`update`, `drain` or `undrain` changed the set; URLs."""

    at: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    drained: tuple[str, ...] = ()
    undrained: tuple[str, ...] = ()


Event: TypeAlias = (
    Picked
    | Observed
    | BodyFailed
    | Released
    | Finished
    | Retried
    | RetryRefused
    | BreakerChanged
    | Ejected
    | Returned
    | GivenUp
    | HealthChanged
    | PanicChanged
    | Queued
    | Dequeued
    | QueueOverflow
    | EndpointsChanged
)

Listener: TypeAlias = Callable[[Event], Any]


class Outbox:
    """Holds events until the state is consistent again, then delivers them in order."""

    __slots__ = ("_events", "_flushing", "listeners")

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._flushing = False
        self.listeners: tuple[Listener, ...] = ()
        """Empty means that no event need be built."""

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Deliver every event to `listener` from now on; the answer ends that."""
        self.listeners = (*self.listeners, listener)

        def unsubscribe() -> None:
            self.listeners = tuple(one for one in self.listeners if one is not listener)

        return unsubscribe

    def add(self, event: Event) -> None:
        if self.listeners:
            self._events.append(event)

    def flush(self) -> None:
        """Deliver. A listener that changes something makes further events: they come after those before them."""
        if self._flushing:
            return
        self._flushing = True
        try:
            while self._events:
                event = self._events.popleft()
                for listener in self.listeners:
                    listener(event)
        finally:
            self._flushing = False

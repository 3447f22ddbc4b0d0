"""The state of a balancer at one moment: frozen, and plain data all through."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .breaker import BreakerState, CircuitBreaker
from .eligibility import standing
from .endpoints import EndpointState


@dataclass(frozen=True, slots=True)
class BreakerSnapshot:
    """`state` is closed, open, half-open or probing; `reopens_in` (seconds) is None unless open."""

    state: str
    consecutive_failures: int
    reopens_in: float | None


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """What an endpoint said of its own load, `age` seconds ago; None where it did not say."""

    utilization: float | None
    in_flight: int | None
    rps: float | None
    age: float


@dataclass(frozen=True, slots=True)
class EndpointSnapshot:
    """One endpoint. Times in seconds."""

    url: str
    state: str
    """`ready`, or the reason why it gets less or nothing (`core.eligibility.Standing`)."""
    weight: float
    """Present weight; below the configured one during a slow start."""
    in_flight: int
    latency: float | None
    """Time-decayed mean time to the reply head; None before the first reply."""
    breaker: BreakerSnapshot
    breakers: Mapping[str, BreakerSnapshot]
    """Breakers of single keys (service ids) that are not closed."""
    services: Mapping[str, str]
    """How it stands for single keys, where that is not `state`."""
    heights: Mapping[str, int]
    """Block heights by key, where `BlockHeight` asks for them."""
    health: str
    """`up`, `down` or `unknown`; always `up` without active probes."""
    ejected_for: float | None
    """Seconds until an ejected endpoint returns; None when it is in."""
    counts: Mapping[str, int]
    """Since it joined: picks, ok, failed, overloaded, ignored, broken (bodies), released, ejections, breaker_opens."""
    metadata: Mapping[str, Any]
    upstream: str = ""
    """What moves the bytes: `httpx`, `httpx2`, ..."""
    reported_load: LoadSnapshot | None = None
    """What it says of its own load (the `endpoint-load-metrics` field); None when it does not."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A balancer at one moment."""

    policy: str
    endpoints: tuple[EndpointSnapshot, ...]
    """Members, then removed ones with requests still in flight."""
    in_flight: int
    queued: int
    panic: bool
    retry_budget: float
    """Retries that could be made now."""

    def to_dict(self) -> dict[str, Any]:
        """As plain dicts, lists, numbers and strings, for `json.dumps` (metadata: if yours is)."""
        return dataclasses.asdict(self)


def describe(state: EndpointState, now: float) -> EndpointSnapshot:
    """The snapshot of one endpoint."""
    until, told = state.ejection.until, state.reported_load
    return EndpointSnapshot(
        url=state.url,
        state=standing(state).value,
        weight=round(state.weight, 6),
        in_flight=state.in_flight,
        latency=state.latency.seconds,
        breaker=_breaker(state.breaker, now),
        breakers={
            key: _breaker(scope.breaker, now)
            for key, scope in state.scopes.items()
            if scope.breaker.state is not BreakerState.CLOSED
        },
        services={key: stands.value for key in state.scopes if (stands := standing(state, key)) is not standing(state)},
        heights={key: scope.height for key, scope in state.scopes.items() if scope.height is not None},
        health=state.health.state.value,
        ejected_for=None if until is None else max(0.0, until - now),
        counts=dataclasses.asdict(state.counts),
        metadata=dict(state.endpoint.metadata),
        reported_load=None if told is None else LoadSnapshot(told.utilization, told.in_flight, told.rps, now - told.at),
    )


def _breaker(breaker: CircuitBreaker, now: float) -> BreakerSnapshot:
    reopens = breaker.reopens_at - now if breaker.state is BreakerState.OPEN else math.inf
    return BreakerSnapshot(
        breaker.state.value, breaker.consecutive_failures, None if math.isinf(reopens) else max(0.0, reopens)
    )

"""Which endpoints a pick may choose from: health x breaker x ejection x what the operator said, or panic."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

from .breaker import BreakerState, CircuitBreaker
from .config import Panic
from .endpoints import Admin, EndpointState
from .health import Health


class Standing(enum.Enum):
    """Why an endpoint is, or is not, eligible. The first that applies, from the last to the first."""

    READY = "ready"
    SLOW_START = "slow start"
    THROTTLED = "throttled"
    HALF_OPEN = "half-open"
    EJECTED = "ejected"
    OPEN = "breaker open"
    DOWN = "health check failed"
    UNKNOWN = "not checked yet"
    DRAINING = "draining"
    REMOVED = "removed"


_ADMIN = {Admin.DRAINING: Standing.DRAINING, Admin.REMOVED: Standing.REMOVED}
_HEALTH = {Health.DOWN: Standing.DOWN, Health.UNKNOWN: Standing.UNKNOWN}
_BREAKER = {
    BreakerState.OPEN: Standing.OPEN,
    BreakerState.PROBING: Standing.HALF_OPEN,
    BreakerState.HALF_OPEN: Standing.HALF_OPEN,
}


def breakers_of(state: EndpointState, key: str | None) -> tuple[CircuitBreaker, ...]:
    """The breakers a request for `key` has to pass: the endpoint's, and that of the key if it has one."""
    scoped = state.key_breakers.get(key) if key is not None else None
    return (state.breaker,) if scoped is None else (state.breaker, scoped)


def standing(state: EndpointState, key: str | None = None) -> Standing:
    """How the endpoint stands for requests that need `key`."""
    if state.admin is not Admin.READY:
        return _ADMIN[state.admin]
    if state.health.state is not Health.UP:
        return _HEALTH[state.health.state]
    states = {breaker.state for breaker in breakers_of(state, key)}
    for breaker_state, verdict in _BREAKER.items():
        if breaker_state in states:
            return verdict
    if state.ejection.until is not None:
        return Standing.EJECTED
    if state.throttled_until > -math.inf:
        return Standing.THROTTLED
    return Standing.SLOW_START if state.ramp_from is not None else Standing.READY


@dataclass(frozen=True, slots=True)
class View:
    """What picks choose from until something changes."""

    ready: tuple[EndpointState, ...]
    """Eligible."""
    throttled: tuple[EndpointState, ...]
    """Eligible, but asked not to be: only when no ready one will do."""
    half_open: tuple[EndpointState, ...]
    """Eligible for a probe alone."""
    fallback: tuple[EndpointState, ...]
    """What panic chooses from: everything not drained."""
    panic: bool
    """Too few are eligible, and there is something to fail open to."""


def survey(states: Iterable[EndpointState], panic: Panic, key: str | None = None) -> View:
    """Sort the endpoints for requests that need `key`."""
    ready: list[EndpointState] = []
    throttled: list[EndpointState] = []
    half_open: list[EndpointState] = []
    fallback: list[EndpointState] = []
    for state in states:
        stands = standing(state, key)
        if stands in (Standing.DRAINING, Standing.REMOVED):
            continue
        fallback.append(state)
        if stands in (Standing.READY, Standing.SLOW_START):
            ready.append(state)
        elif stands is Standing.THROTTLED:
            throttled.append(state)
        elif stands is Standing.HALF_OPEN:
            half_open.append(state)
    eligible = len(ready) + len(throttled)
    return View(
        tuple(ready),
        tuple(throttled),
        tuple(half_open),
        tuple(fallback),
        bool(fallback) and not panic.fail_closed and eligible <= panic.threshold * len(fallback),
    )


def least_recently_failed(states: Iterable[EndpointState]) -> list[EndpointState]:
    """Those whose last failure is longest ago. Within one second they count as equal, so that in a full outage the
    load is still spread.
    """
    ranked: dict[float, list[EndpointState]] = {}
    for state in states:
        failed = state.last_failed
        ranked.setdefault(failed if math.isinf(failed) else float(int(failed)), []).append(state)
    return ranked[min(ranked)]

"""Which endpoints a pick may choose from: health x breaker x ejection x what the operator said, or panic."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass

from .breaker import BreakerState
from .config import BlockHeight, Panic
from .endpoints import Admin, EndpointState
from .health import Health
from .scope import Scope


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


IN_SERVICE = (Standing.READY, Standing.SLOW_START, Standing.THROTTLED)
"""Gets requests as the policy has it."""

_ADMIN = {Admin.DRAINING: Standing.DRAINING, Admin.REMOVED: Standing.REMOVED}
_HEALTH = {Health.DOWN: Standing.DOWN, Health.UNKNOWN: Standing.UNKNOWN}
_BREAKER = {
    BreakerState.OPEN: Standing.OPEN,
    BreakerState.PROBING: Standing.HALF_OPEN,
    BreakerState.HALF_OPEN: Standing.HALF_OPEN,
}


def scopes_of(state: EndpointState, key: str | None) -> tuple[Scope, ...]:
    """What a request for `key` has to pass: the endpoint as a whole, and the key's scope if there is one."""
    scoped = state.scopes.get(key) if key is not None else None
    return (state,) if scoped is None else (state, scoped)


def standing(state: EndpointState, key: str | None = None) -> Standing:
    """How the endpoint stands for requests that need `key`."""
    if state.admin is not Admin.READY:
        return _ADMIN[state.admin]
    scopes = scopes_of(state, key)
    for scope in scopes:
        if scope.health.state is not Health.UP:
            return _HEALTH[scope.health.state]
    states = {scope.breaker.state for scope in scopes}
    for breaker_state, verdict in _BREAKER.items():
        if breaker_state in states:
            return verdict
    if any(scope.ejection.until is not None for scope in scopes):
        return Standing.EJECTED
    if state.throttled_until > -math.inf:
        return Standing.THROTTLED
    return Standing.SLOW_START if state.ramp_from is not None else Standing.READY


@dataclass(frozen=True, slots=True)
class View:
    """What picks choose from until something changes."""

    ready: tuple[EndpointState, ...]
    """Eligible."""
    reserve: tuple[EndpointState, ...]
    """Eligible, but throttled, or blocks behind: only when no ready one will do."""
    half_open: tuple[EndpointState, ...]
    """Eligible for a probe alone."""
    fallback: tuple[EndpointState, ...]
    """What panic chooses from: everything not drained."""
    panic: bool
    """Too few are eligible, and there is something to fail open to."""


def survey(
    states: Iterable[EndpointState], panic: Panic, key: str | None = None, heights: BlockHeight | None = None
) -> View:
    """Sort the endpoints for requests that need `key`."""
    ready: list[EndpointState] = []
    reserve: list[EndpointState] = []
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
            reserve.append(state)
        elif stands is Standing.HALF_OPEN:
            half_open.append(state)
    eligible = len(ready) + len(reserve)
    if heights is not None:
        behind = _behind(ready, key, heights)
        reserve += behind
        ready = [state for state in ready if state not in behind]
    return View(
        tuple(ready),
        tuple(reserve),
        tuple(half_open),
        tuple(fallback),
        bool(fallback) and not panic.fail_closed and eligible <= panic.threshold * len(fallback),
    )


def _behind(ready: list[EndpointState], key: str | None, heights: BlockHeight) -> list[EndpointState]:
    """Those that lag, as far as enough others are left."""
    known = {state: height for state in ready if (height := scopes_of(state, key)[-1].height) is not None}
    highest = max(known.values(), default=0)
    lagging = sorted((height, state.url) for state, height in known.items() if highest - height > heights.lag)
    spared = {url for _, url in lagging[: max(0, len(ready) - heights.min_endpoints)]}
    return [state for state in ready if state.url in spared]


def least_recently_failed(states: Iterable[EndpointState], key: str | None = None) -> list[EndpointState]:
    """Those whose last failure is longest ago. Within one second they count as equal, so that in a full outage the
    load is still spread.
    """
    ranked: dict[float, list[EndpointState]] = {}
    for state in states:
        failed = max(scope.last_failed for scope in scopes_of(state, key))
        ranked.setdefault(failed if math.isinf(failed) else float(int(failed)), []).append(state)
    return ranked[min(ranked)]

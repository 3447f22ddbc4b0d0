"""Who may be picked: health x breaker x ejection x admin state, or panic."""

from __future__ import annotations

import itertools
import math

import pytest

from pathlb.core.breaker import BreakerState, CircuitBreaker
from pathlb.core.config import Breaker, Panic
from pathlb.core.eligibility import Standing, least_recently_failed, standing, survey
from pathlb.core.endpoints import Admin, EndpointState
from pathlb.core.health import Health, HealthState
from pathlb.core.model import Endpoint
from pathlb.core.scope import Scope

from .helpers import ScriptedRng


def breaker(state: BreakerState = BreakerState.CLOSED) -> CircuitBreaker:
    one = CircuitBreaker(Breaker(), ScriptedRng(), lambda *change: None)
    one.state = state
    return one


def scope(state: BreakerState = BreakerState.CLOSED) -> Scope:
    one = Scope(HealthState(probed=False))
    one.breaker = breaker(state)
    return one


def make(
    number: int = 0,
    *,
    admin: Admin = Admin.READY,
    health: Health = Health.UP,
    closed: BreakerState = BreakerState.CLOSED,
    ejected: bool = False,
    throttled: bool = False,
    ramping: bool = False,
    failed: float = -math.inf,
) -> EndpointState:
    state = EndpointState(Endpoint(f"http://gw{number}"), HealthState(probed=False))
    state.breaker = breaker(closed)
    state.admin = admin
    state.health.state = health
    state.ejection.until = 5.0 if ejected else None
    state.throttled_until = 5.0 if throttled else -math.inf
    state.ramp_from = 0.0 if ramping else None
    state.last_failed = failed
    return state


def expected(
    admin: Admin, health: Health, closed: BreakerState, ejected: bool, throttled: bool, ramping: bool
) -> Standing:
    """The precedence, from what weighs most to what weighs least."""
    if admin is not Admin.READY:
        return Standing.DRAINING if admin is Admin.DRAINING else Standing.REMOVED
    if health is not Health.UP:
        return Standing.DOWN if health is Health.DOWN else Standing.UNKNOWN
    if closed is BreakerState.OPEN:
        return Standing.OPEN
    if closed is not BreakerState.CLOSED:
        return Standing.HALF_OPEN
    if ejected:
        return Standing.EJECTED
    if throttled:
        return Standing.THROTTLED
    return Standing.SLOW_START if ramping else Standing.READY


def test_standing_of_every_combination() -> None:
    checked = 0
    for admin, health, closed, *flags in itertools.product(
        Admin, Health, BreakerState, (False, True), (False, True), (False, True)
    ):
        ejected, throttled, ramping = flags
        state = make(admin=admin, health=health, closed=closed, ejected=ejected, throttled=throttled, ramping=ramping)
        assert standing(state) is expected(admin, health, closed, ejected, throttled, ramping)
        checked += 1
    assert checked == 3 * 3 * 4 * 8


@pytest.mark.parametrize(
    ("own", "scoped", "verdict"),
    [
        (BreakerState.CLOSED, BreakerState.OPEN, Standing.OPEN),
        (BreakerState.CLOSED, BreakerState.HALF_OPEN, Standing.HALF_OPEN),
        (BreakerState.HALF_OPEN, BreakerState.OPEN, Standing.OPEN),
        (BreakerState.OPEN, BreakerState.CLOSED, Standing.OPEN),
        (BreakerState.CLOSED, BreakerState.CLOSED, Standing.READY),
    ],
)
def test_a_key_needs_both_breakers(own: BreakerState, scoped: BreakerState, verdict: Standing) -> None:
    state = make(closed=own)
    state.scopes["eth"] = scope(scoped)
    assert standing(state, "eth") is verdict
    without = Standing.READY if own is BreakerState.CLOSED else None
    if without:
        assert standing(state) is standing(state, "btc") is without


def test_survey_sorts() -> None:
    ready, ramping, throttled = make(0), make(1, ramping=True), make(2, throttled=True)
    half_open, probing = make(3, closed=BreakerState.HALF_OPEN), make(4, closed=BreakerState.PROBING)
    opened, ejected, down = make(5, closed=BreakerState.OPEN), make(6, ejected=True), make(7, health=Health.DOWN)
    unknown, draining = make(8, health=Health.UNKNOWN), make(9, admin=Admin.DRAINING)
    everyone = [ready, ramping, throttled, half_open, probing, opened, ejected, down, unknown, draining]
    view = survey(everyone, Panic())
    assert view.ready == (ready, ramping)
    assert view.reserve == (throttled,)
    assert view.half_open == (half_open, probing)
    assert view.fallback == tuple(everyone[:-1])
    assert not view.panic


@pytest.mark.parametrize(
    ("eligible", "out", "threshold", "panic"),
    [
        (0, 3, 0.0, True),
        (1, 9, 0.0, False),
        (1, 1, 0.5, True),
        (2, 1, 0.5, False),
        (2, 0, 1.0, True),
        (0, 0, 0.0, False),
    ],
)
def test_panic_threshold(eligible: int, out: int, threshold: float, panic: bool) -> None:
    states = [make(n) for n in range(eligible)] + [make(9 + n, ejected=True) for n in range(out)]
    assert survey(states, Panic(threshold=threshold)).panic is panic


def test_fail_closed_never_panics() -> None:
    assert not survey([make(ejected=True)], Panic(fail_closed=True)).panic


def test_the_drained_are_nothing_to_fail_open_to() -> None:
    view = survey([make(admin=Admin.DRAINING), make(1, admin=Admin.REMOVED)], Panic())
    assert (view.fallback, view.panic) == ((), False)


def test_throttled_endpoints_are_eligible() -> None:
    assert not survey([make(throttled=True)], Panic()).panic


def test_least_recently_failed() -> None:
    never, also_never, early, late = make(0), make(1), make(2, failed=10.2), make(3, failed=90.0)
    early_too = make(4, failed=10.9)
    assert least_recently_failed([late, never, early, also_never]) == [never, also_never]
    assert least_recently_failed([late, early, early_too]) == [early, early_too]
    assert least_recently_failed([late]) == [late]

"""One pick: what comes before the policy has its say."""

from __future__ import annotations

from typing import Any

from pathlb.core.breaker import BreakerState
from pathlb.core.config import Panic
from pathlb.core.eligibility import View, survey
from pathlb.core.endpoints import EndpointState
from pathlb.core.lease import Want
from pathlb.core.picker import NONE_ELIGIBLE, SATURATED, Choice, Picker
from pathlb.core.policy import LeastConnections

from .helpers import ScriptedRng
from .test_eligibility import make, scope

HALF_OPEN = BreakerState.HALF_OPEN


def picker(concurrency: int = 10, fail_closed: bool = False) -> Picker:
    return Picker(LeastConnections(), ScriptedRng(0.0), concurrency, fail_closed=fail_closed)


def view_of(*states: EndpointState, key: str | None = None, **panic: Any) -> View:
    return survey(states, Panic(**panic), key)


def want(tried: tuple[EndpointState, ...] = (), **wants: Any) -> Want:
    one = Want(**wants)
    for state in tried:
        one.failed_on(state)
    return one


def choose(view: View, asked: Want | None = None, now: float = 0.0, by: Picker | None = None) -> Choice:
    choice = (by or picker()).pick(view, asked or want(), now)
    assert isinstance(choice, Choice), choice
    return choice


def loaded(number: int, in_flight: int, **settings: Any) -> EndpointState:
    state = make(number, **settings)
    state.in_flight = in_flight
    return state


def test_the_policy_decides_among_the_ready() -> None:
    a, b, c = loaded(0, 3), loaded(1, 1), loaded(2, 2)
    assert choose(view_of(a, b, c)) == Choice(b, "least connections", 3)
    assert choose(view_of(a)) == Choice(a, "only candidate", 1)


def test_untried_before_tried_before_nothing() -> None:
    a, b = loaded(0, 0), loaded(1, 9)
    assert choose(view_of(a, b), want((a,))).endpoint is b
    assert choose(view_of(a, b), want((a, b))).endpoint is a


def test_a_saturated_untried_endpoint_is_waited_for() -> None:
    a, b = loaded(0, 0), loaded(1, 10)
    assert picker().pick(view_of(a, b), want((a,)), 0.0) is SATURATED


def test_an_untried_throttled_endpoint_before_a_tried_ready_one() -> None:
    a, b = make(0), make(1, throttled=True)
    assert choose(view_of(a, b), want((a,))).endpoint is b


def test_throttled_only_when_nothing_else_is_free() -> None:
    a, b = loaded(0, 9), loaded(1, 0, throttled=True)
    assert choose(view_of(a, b)).endpoint is a
    a.in_flight = 10
    assert choose(view_of(a, b)).endpoint is b
    assert choose(view_of(make(5, throttled=True))).panic is False


def test_avoid_is_a_wish_and_no_order() -> None:
    a, b = loaded(0, 0), loaded(1, 9)
    assert choose(view_of(a, b), want(avoid=frozenset({a.url}))).endpoint is b
    b.in_flight = 10
    assert choose(view_of(a, b), want(avoid=frozenset({a.url}))).endpoint is a
    assert choose(view_of(a), want(avoid=frozenset({a.url}))).endpoint is a


def test_pinned() -> None:
    a, b = loaded(0, 0), loaded(1, 9)
    assert choose(view_of(a, b), want(pin=b.url)) == Choice(b, "pinned", 1)
    b.in_flight = 10
    assert picker().pick(view_of(a, b), want(pin=b.url), 0.0) is SATURATED
    assert picker().pick(view_of(a, b), want(pin="http://other"), 0.0) is NONE_ELIGIBLE
    assert choose(view_of(a, b), want((a,), pin=a.url)).endpoint is a


def test_pinned_to_one_that_is_out_is_panic() -> None:
    a, b = make(0), make(1, ejected=True)
    assert choose(view_of(a, b), want(pin=b.url)) == Choice(b, "panic", 1, panic=True)
    assert picker(fail_closed=True).pick(view_of(a, b, fail_closed=True), want(pin=b.url), 0.0) is NONE_ELIGIBLE


def test_panic_takes_the_least_recently_failed() -> None:
    a, b = make(0, ejected=True, failed=50.0), make(1, ejected=True, failed=10.0)
    assert choose(view_of(a, b)) == Choice(b, "panic", 1, panic=True)
    assert choose(view_of(a, b), want((b,))).endpoint is a
    assert picker(fail_closed=True).pick(view_of(a, b, fail_closed=True), want(), 0.0) is NONE_ELIGIBLE


def test_panic_spreads_over_those_who_failed_together() -> None:
    a, b = loaded(0, 4, ejected=True, failed=10.0), loaded(1, 1, ejected=True, failed=10.5)
    assert choose(view_of(a, b)) == Choice(b, "panic", 2, panic=True)


def test_nobody_there() -> None:
    assert picker().pick(view_of(), want(), 0.0) is NONE_ELIGIBLE


def test_a_probe_comes_first_and_is_no_retry() -> None:
    a, b = make(0), make(1, closed=HALF_OPEN)
    assert choose(view_of(a, b), want(resendable=True)) == Choice(b, "probe", 1, probing=b.breaker)
    assert choose(view_of(a, b), want((make(7),), resendable=True)).endpoint is a
    assert choose(view_of(a, b), want(pin=a.url, resendable=True)).endpoint is a
    assert choose(view_of(a, b), want(avoid=frozenset({b.url}), resendable=True)).endpoint is a
    assert choose(view_of(a, b), want(pin=b.url, resendable=True)).reason == "probe"
    b.in_flight = 10
    assert choose(view_of(a, b), want(resendable=True)).endpoint is a


def test_what_may_not_be_sent_twice_probes_only_after_the_patience() -> None:
    a, b = make(0), make(1, closed=HALF_OPEN)
    assert choose(view_of(a, b), want(), now=0.5).endpoint is a
    assert choose(view_of(a, b), want(), now=1.0).endpoint is b


def test_a_retry_probes_when_nothing_is_ready() -> None:
    tried, half_open = make(0, ejected=True), make(1, closed=HALF_OPEN)
    assert choose(view_of(tried, half_open), want((tried,), resendable=True)).reason == "probe"


def test_a_retry_never_probes_where_it_failed() -> None:
    failed, other = make(0, closed=HALF_OPEN), make(1, throttled=True)
    assert choose(view_of(failed, other), want((failed,), resendable=True)).endpoint is other


def test_no_probe_past_a_breaker_that_takes_none() -> None:
    """The endpoint is being probed: a key of it that is half-open has to wait for that."""
    a, b = make(0), make(1, closed=BreakerState.PROBING)
    b.scopes["eth"] = scope(HALF_OPEN)
    view = view_of(a, b, key="eth")
    assert b in view.half_open
    assert choose(view, want(key="eth", resendable=True)).endpoint is a


def test_a_key_is_probed_on_its_own_breaker() -> None:
    a, b = make(0), make(1)
    b.scopes["eth"] = scope(HALF_OPEN)
    choice = choose(view_of(a, b, key="eth"), want(key="eth", resendable=True))
    assert choice == Choice(b, "probe", 1, probing=b.scopes["eth"].breaker)
    b.breaker.state = HALF_OPEN
    choice = choose(view_of(a, b, key="eth"), want(key="eth", resendable=True))
    assert choice.probing is b.breaker

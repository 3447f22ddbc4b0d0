"""Scopes: what is known of one service (key) on one endpoint, and what of that concerns the rest of the endpoint."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core import events
from pathlb.core.breaker import BreakerState
from pathlb.core.cluster import Settings
from pathlb.core.config import Breaker, Outlier
from pathlb.core.eligibility import Standing, standing
from pathlb.core.health import Health, HealthState
from pathlb.core.lease import Lease
from pathlb.core.model import Cause, Outcome
from pathlb.core.outlier import Verdict
from pathlb.core.scope import Scope

from .helpers import BROKEN, CANCELLED, OK, Rig
from .test_eligibility import breaker
from .test_snapshot import of

S = BreakerState
ETH = Outcome(Cause.SERVICE, retry=True, status=500, key="eth")
BEYOND = Outcome(Cause.BEYOND, retry=True, status=500)
KEPT = 200


def keyed(rig: Rig, key: str = "eth", number: int = 0) -> Scope:
    return rig.state(number).scopes[key]


def opened(outcome: Outcome = ETH, key: str = "eth", count: int = 2) -> Rig:
    """The breaker of a key is open on gw0."""
    rig = Rig(count)
    for _ in range(5):
        rig.request(0.0, outcome, pin="http://gw0", key=key)
    assert keyed(rig, key).breaker.state is S.OPEN
    return rig


def eject(rig: Rig, now: float, number: int, key: str | None) -> None:
    """As if the comparison had found it."""
    state = rig.state(number)
    verdict = Verdict(state if key is None else state.scopes[key], "latency", "")
    rig.engine._cluster._eject(now, state, key, verdict, rig.settings.outlier or Outlier())
    rig.engine.tick(now)


# --- whose success and whose failure


@pytest.mark.parametrize(
    ("outcome", "whole", "scoped"),
    [
        (OK, "success", "success"),
        (Outcome(Cause.OK, key="eth"), "success", "success"),
        (Outcome(Cause.OK, key="btc"), "success", None),
        (Outcome(Cause.REQUEST, status=400), "success", "success"),
        (ETH, "success", "failure"),
        (Outcome(Cause.SERVICE, key="btc"), "success", None),
        (Outcome(Cause.SERVICE), "failure", None),
        (BROKEN, "failure", None),
        (BEYOND, None, None),
        (Outcome(Cause.OVERLOAD, key="eth"), None, None),
        (CANCELLED, None, None),
    ],
)
def test_a_failure_counts_for_what_it_speaks_about_and_a_success_for_all(
    outcome: Outcome, whole: str | None, scoped: str | None
) -> None:
    rig = Rig(1)
    for failed in (BROKEN, ETH):  # each has one failure before
        rig.request(0.0, failed, key="eth")
    state, now = rig.state(0), 1.0
    state.breaker.consecutive_failures = 1
    rig.request(now, outcome, key="eth")
    results = {"success": 0, "failure": 2, None: 1}
    assert state.breaker.consecutive_failures == results[whole]
    assert keyed(rig).breaker.consecutive_failures == results[scoped]


def test_no_number_of_instance_faults_opens_the_breaker_of_a_key() -> None:
    rig = Rig(1, Settings(breaker=Breaker(failures=10_000, min_requests=10_000)))
    for _ in range(50):
        rig.request(0.0, BROKEN, key="eth")
    assert keyed(rig).breaker.consecutive_failures == 0
    rig = Rig(1)
    for _ in range(5):
        rig.request(0.0, BROKEN, key="eth")
    assert (rig.state(0).breaker.state, keyed(rig).breaker.state) == (S.OPEN, S.CLOSED)


def test_no_number_of_service_faults_opens_the_breaker_of_the_endpoint() -> None:
    rig = Rig(1)
    for _ in range(50):
        rig.request(0.0, ETH, key="eth")
        rig.request(0.0, ETH)  # not asked for by that name
    assert (rig.state(0).breaker.state, keyed(rig).breaker.state) == (S.CLOSED, S.OPEN)


def test_a_request_without_a_key_may_speak_of_one() -> None:
    """The scope comes to be with what is said of it."""
    rig = Rig(1)
    for _ in range(4):
        rig.request(0.0, ETH)
    assert keyed(rig).breaker.consecutive_failures == 4
    rig.request(0.0, Outcome(Cause.OK, key="eth"))
    assert keyed(rig).breaker.consecutive_failures == 0
    rig.request(0.0, Outcome(Cause.OVERLOAD, key="btc"))
    assert "btc" not in rig.state(0).scopes


def test_what_each_scope_remembers() -> None:
    """For the comparison with the peers: a fault of another service is none of this one."""
    rig = Rig(1)
    for outcome in (OK, BROKEN, BEYOND, ETH, Outcome(Cause.SERVICE, key="btc"), CANCELLED):
        rig.request(0.0, outcome, key="eth")
    rig.request(0.0, OK, key="btc")
    rig.request(0.0, BROKEN)
    failed = [sample.failed for sample in keyed(rig).recent.since(0.0)]
    assert failed == [False, True, True, True]
    whole = [(sample.key, sample.failed) for sample in rig.state(0).recent.since(0.0)]
    assert whole == [("eth", False), ("eth", True), ("eth", True), ("btc", False), (None, True)]


@pytest.mark.parametrize(
    ("outcome", "after"),
    [
        (OK, S.CLOSED),
        (Outcome(Cause.REQUEST, status=404), S.CLOSED),
        (ETH, S.OPEN),
        (BROKEN, S.HALF_OPEN),
        (BEYOND, S.CLOSED),  # it could tell of a fault behind it
        (Outcome(Cause.BEYOND, detail="no reply"), S.HALF_OPEN),
        (Outcome(Cause.OVERLOAD, status=429, key="eth"), S.CLOSED),
        (Outcome(Cause.OVERLOAD, status=429), S.HALF_OPEN),
        (Outcome(Cause.SERVICE), S.HALF_OPEN),
        (Outcome(Cause.SERVICE, key="btc"), S.HALF_OPEN),
        (Outcome(Cause.GIVEN_UP), S.HALF_OPEN),
        (CANCELLED, S.HALF_OPEN),
    ],
)
def test_the_probe_of_a_key_is_passed_or_failed_by_what_speaks_about_it(outcome: Outcome, after: S) -> None:
    rig = opened()
    rig.tick(0.0, 1.0)
    probe = rig.lease(1.0, key="eth", resendable=True)
    assert probe.reason == "probe"
    rig.finish(1.1, probe, outcome)
    assert keyed(rig).breaker.state is after


def test_a_service_fault_of_a_key_passes_the_probe_of_the_endpoint() -> None:
    rig = Rig(2)
    rig.fail(0, 0.0, 5)
    rig.tick(0.0, 1.0)
    probe = rig.lease(1.0, key="eth", resendable=True)
    assert probe.probing is rig.state(0).breaker
    rig.finish(1.1, probe, ETH)
    assert rig.state(0).breaker.state is S.CLOSED


@pytest.mark.parametrize(
    ("outcome", "after"),
    [
        (BEYOND, S.CLOSED),
        (Outcome(Cause.BEYOND), S.OPEN),
        (Outcome(Cause.OVERLOAD, status=429, key="eth"), S.CLOSED),
        (Outcome(Cause.OVERLOAD, status=429), S.OPEN),
    ],
)
def test_in_panic_a_fault_behind_an_endpoint_proves_that_it_works(outcome: Outcome, after: S) -> None:
    rig = Rig(1)
    rig.fail(0, 0.0, 5)
    rig.request(0.1, outcome)
    assert rig.state(0).breaker.state is after


def test_a_panicking_request_for_a_service_proves_the_endpoint_by_its_fault() -> None:
    rig = Rig(1)
    rig.fail(0, 0.0, 5)
    lease = rig.lease(0.1, key="eth")
    assert lease.panic
    rig.finish(0.2, lease, ETH)
    assert rig.state(0).breaker.state is S.CLOSED
    assert keyed(rig).breaker.consecutive_failures == 1


def test_a_service_that_comes_back_is_judged_on_what_it_does_from_then_on() -> None:
    """The failures that opened its breaker must not get it ejected once the probe has passed."""
    rig = Rig(5, Settings(breaker=Breaker(failures=8)))
    for _ in range(8):
        for number in range(5):
            rig.request(0.0, ETH if number == 0 else OK, pin=f"http://gw{number}", key="eth")
            rig.request(0.0, pin=f"http://gw{number}", key="btc")
    rig.tick(0.0, 1.0)
    rig.finish(1.0, rig.lease(1.0, key="eth", resendable=True))
    assert (keyed(rig).breaker.state, keyed(rig).recent.since(0.0)) == (S.CLOSED, [])
    rig.tick(1.0, 3.0)
    assert rig.seen(events.Ejected) == []


def test_an_endpoint_that_comes_back_is_judged_on_what_its_services_do_from_then_on() -> None:
    for way in ("breaker", "ejection"):
        rig = Rig(2, Settings(outlier=Outlier(eject_for=1.0, jitter=0.0)))
        rig.request(0.0, BEYOND, pin="http://gw0", key="eth")
        if way == "breaker":
            rig.fail(0, 0.0, 5)
        else:
            eject(rig, 0.0, 0, None)
        rig.tick(0.0, 1.0)
        if way == "breaker":
            rig.finish(1.0, rig.lease(1.0, resendable=True))
        assert standing(rig.state(0)) is Standing.SLOW_START
        assert keyed(rig).recent.since(0.0) == []


# --- an ejection of one service


def test_an_ejected_service_is_passed_over_on_that_endpoint_only_and_returns() -> None:
    rig = Rig(2, Settings(outlier=Outlier(eject_for=2.0, jitter=0.0)))
    for service in ("eth", "btc"):
        rig.request(0.0, pin="http://gw0", key=service)
    eject(rig, 1.0, 0, "eth")
    assert {rig.request(1.0, key="eth").url for _ in range(20)} == {"http://gw1"}
    others: list[str | None] = ["btc", "other", None]
    for key in others:
        assert {rig.request(1.0, key=key).url for _ in range(20)} == {"http://gw0", "http://gw1"}
    assert (standing(rig.state(0)), standing(rig.state(0), "eth")) == (Standing.READY, Standing.EJECTED)
    assert of(rig, 1.0, 0).services == {"eth": "ejected"}
    assert rig.seen(events.Ejected) == [events.Ejected(1.0, "http://gw0", "latency", 2.0, "", "eth")]
    assert rig.state(0).counts.ejections == 1
    rig.tick(1.0, 3.0)
    assert [(event.endpoint, event.key) for event in rig.seen(events.Returned)] == [("http://gw0", "eth")]
    assert {rig.request(3.0, key="eth").url for _ in range(20)} == {"http://gw0", "http://gw1"}
    assert rig.state(0).ramp_from is None  # it never was without traffic
    assert of(rig, 3.0, 0).services == {}


def test_ejections_of_a_service_grow_and_are_forgotten() -> None:
    rig = Rig(2, Settings(outlier=Outlier(eject_for=1.0, jitter=0.0)))
    rig.request(0.0, pin="http://gw0", key="eth")
    now = 0.0
    for seconds in (1.0, 2.0):
        eject(rig, now, 0, "eth")
        now = rig.tick(now, now + seconds)
        assert keyed(rig).ejection.until is None
    assert keyed(rig).ejection.recent == 2
    assert not keyed(rig).idle(now + 100.0)
    now = rig.tick(now, now + 1.0)
    assert keyed(rig).ejection.recent == 1
    rig.tick(now, now + 1.0)
    assert keyed(rig).ejection.recent == 0
    assert rig.state(0).ejection.recent == 0


def test_what_hangs_for_an_ejected_service_is_given_up_and_nothing_else() -> None:
    rig = Rig(2)
    leases = {key: rig.lease(0.0, pin="http://gw0", key=key, resendable=True) for key in ("eth", "btc")}
    given_up: list[str] = []
    for key, lease in leases.items():
        lease.want.pin = None
        lease.give_up = partial(given_up.append, key)
    eject(rig, 1.0, 0, "eth")
    assert given_up == ["eth"]


def test_what_an_ejected_service_did_is_forgotten_of_the_endpoint_and_nothing_else() -> None:
    rig = Rig(1)
    for key in ("eth", "btc", None):
        rig.request(0.0, BEYOND, key=key)
    eject(rig, 0.0, 0, "eth")
    assert [sample.key for sample in rig.state(0).recent.since(0.0)] == ["btc", None]


def test_what_becomes_of_attempts_from_before_an_ejection_says_nothing() -> None:
    """Writes cannot be given up: they hang on, and end one day."""
    rig = Rig(2, Settings(outlier=Outlier(eject_for=1.0, jitter=0.0)))
    early = [rig.lease(0.0, pin="http://gw0", key="eth") for _ in range(4)]
    eject(rig, 0.5, 0, "eth")
    state = rig.state(0)
    rig.finish(0.6, early[0], BEYOND)
    rig.finish(0.6, early[1], OK)
    assert (state.recent.since(0.0), keyed(rig).recent.since(0.0)) == ([], [])
    assert (state.counts.ok, state.counts.failed, state.last_failed) == (1, 1, 0.6)
    rig.tick(0.6, 2.0)
    assert keyed(rig).ejection.until is None
    rig.finish(2.0, early[2], BEYOND)
    assert (state.recent.since(0.0), keyed(rig).recent.since(0.0)) == ([], [])
    assert early[3].set_aside
    late = rig.lease(2.0, pin="http://gw0", key="eth")
    assert not late.set_aside
    rig.finish(2.1, late, BEYOND)
    assert len(state.recent.since(0.0)) == len(keyed(rig).recent.since(0.0)) == 1
    before = rig.lease(2.2, pin="http://gw0")
    eject(rig, 2.5, 0, None)
    rig.tick(2.5, 4.0)
    assert before.set_aside
    rig.finish(4.0, before, BEYOND)
    assert state.recent.since(0.0) == []


# --- memory


def test_a_few_of_many_keys_are_remembered() -> None:
    """Made-up keys, each with an open breaker, all within the window."""
    rig = Rig(2, Settings(breaker=Breaker(failures=1)))
    for number in range(3000):
        key = f"made-up-{number}"
        rig.request(number / 1000, Outcome(Cause.SERVICE, key=key), pin="http://gw0", key=key)
    scopes = rig.state(0).scopes
    assert len(scopes) == KEPT
    assert {scope.breaker.state for scope in scopes.values()} == {S.OPEN}
    assert list(scopes) == [f"made-up-{number}" for number in range(3000 - KEPT, 3000)]
    assert rig.state(1).scopes == {}


def test_views_of_a_few_of_many_keys_are_kept() -> None:
    rig = Rig(2)
    for number in range(3000):
        rig.request(0.0, key=f"made-up-{number}")
    views = rig.engine._cluster._views
    assert len(views) <= 1000
    assert len(set(views.values())) == 1  # nothing sets them apart


def test_a_forgotten_key_is_picked_again() -> None:
    rig = opened(count=2)
    assert {rig.request(0.0, key="eth").url for _ in range(9)} == {"http://gw1"}
    for number in range(KEPT - 1):
        key = f"made-up-{number}"
        rig.request(0.1, Outcome(Cause.SERVICE, key=key), pin="http://gw0", key=key)
    assert {rig.request(0.1, key="eth").url for _ in range(9)} == {"http://gw1"}
    rig.request(0.1, pin="http://gw0", key="one more")
    assert "eth" not in rig.state(0).scopes
    assert {rig.request(0.1, key="eth").url for _ in range(9)} == {"http://gw0", "http://gw1"}


def test_the_key_in_use_is_not_the_one_that_is_forgotten() -> None:
    rig = Rig(1, Settings(breaker=Breaker(failures=10_000, min_requests=10_000)))
    rig.request(0.0, ETH, key="eth")
    eth = keyed(rig)
    for number in range(KEPT + 5):
        rig.request(0.1, key="eth")
        key = f"made-up-{number}"
        rig.request(0.1, Outcome(Cause.SERVICE, key=key), key=key)
        assert keyed(rig) is eth


def test_keys_with_nothing_to_remember_go_first() -> None:
    rig = Rig(1)
    rig.request(0.0, ETH, key="eth")
    for number in range(KEPT - 1):
        rig.request(0.1, key=f"fine-{number}")
    assert len(rig.state(0).scopes) == KEPT
    rig.request(0.1, key="one-more")
    assert "eth" in rig.state(0).scopes
    assert len(rig.state(0).scopes) == KEPT // 2 + 2  # those not used longest, but for the one with a failure


def test_leases_of_a_forgotten_key_end_all_the_same() -> None:
    """And what becomes of them is not counted for the scope that has come to be since."""
    rig = Rig(1, Settings(breaker=Breaker(failures=1, open_for=1.0)))
    rig.request(0.0, ETH, key="eth")
    rig.tick(0.0, 1.0)
    probe, bystander = rig.lease(1.0, key="eth", resendable=True), rig.lease(1.0, key="btc")
    assert probe.reason == "probe"
    held = [rig.lease(1.0, key=f"made-up-{number}") for number in range(KEPT + 5)]
    assert not {"eth", "btc"} & rig.state(0).scopes.keys()
    again = rig.lease(1.1, key="eth")
    seen = len(rig.seen(events.BreakerChanged))
    rig.finish(1.2, probe, ETH)
    rig.engine.observe(1.2, bystander, OK)
    rig.engine.fail_body(1.3, bystander, Outcome(Cause.SERVICE, key="btc"))
    rig.engine.release(1.3, bystander)
    assert len(rig.seen(events.BreakerChanged)) == seen
    assert keyed(rig).breaker.state is S.CLOSED
    for lease in [*held, again]:
        rig.finish(1.4, lease)
    assert (rig.state(0).in_flight, list(rig.state(0).waiting)) == (0, [])
    assert all(not scope.waiting for scope in rig.state(0).scopes.values())


@given(
    uses=st.lists(st.tuples(st.integers(0, 400), st.sampled_from([OK, ETH, BROKEN, CANCELLED])), max_size=60),
    seed=st.integers(0, 99),
)
def test_memory_is_bounded_whatever_happens(uses: list[tuple[int, Outcome]], seed: int) -> None:
    rig, rng = Rig(2), random.Random(seed)
    held: list[Lease] = []
    for first, outcome in uses:
        for number in range(first, first + 30):
            lease = rig.lease(0.0, key=f"key-{number}")
            if rng.random() < 0.2:
                held.append(lease)
            else:
                key = lease.key if outcome is ETH else None
                rig.finish(0.0, lease, Outcome(outcome.cause, key=key))
            assert all(len(state.scopes) <= KEPT for state in rig.engine.members)
    for lease in held:
        rig.finish(0.1, lease)
    assert not rig.engine.busy


def test_idle() -> None:
    def scope() -> Scope:
        one = Scope(HealthState(probed=False, rise=2, fall=2))
        one.breaker = breaker()
        return one

    assert scope().idle(0.0)
    opened, unwell, suspected, out, offender, high = (scope() for _ in range(6))
    opened.breaker = breaker(S.OPEN)
    suspected.health.record(False, "")
    for _ in range(2):
        unwell.health.record(False, "")
    out.ejection.until = 5.0
    offender.ejection.recent = 1
    high.height = 7
    assert not any(one.idle(0.0) for one in (opened, unwell, suspected, out, offender, high))
    assert [one.in_service for one in (opened, unwell, suspected, out, offender, high)] == [
        False, False, True, False, True, True,
    ]  # fmt: skip
    rig = Rig(1)
    rig.lease(0.0, key="eth")
    assert not keyed(rig).idle(0.0)  # something waits


# --- health of a service


def test_health_of_a_service() -> None:
    rig = Rig(2, Settings(rise=2, fall=2))
    probe: Any = rig.engine.record_probe
    probe(0.0, "http://gw0", False, "503", "eth")
    assert rig.engine.health_changing("http://gw0", "eth")
    assert not rig.engine.health_changing("http://gw0")
    assert keyed(rig).health.state is Health.UP
    probe(1.0, "http://gw0", False, "503", "eth")
    assert not rig.engine.health_changing("http://gw0", "eth")
    assert {rig.request(1.0, key="eth").url for _ in range(9)} == {"http://gw1"}
    assert {rig.request(1.0, key="btc").url for _ in range(9)} == {"http://gw0", "http://gw1"}
    assert (standing(rig.state(0)), standing(rig.state(0), "eth")) == (Standing.READY, Standing.DOWN)
    assert of(rig, 1.0, 0).services == {"eth": "health check failed"}
    assert of(rig, 1.0, 0).health == "up"
    probe(2.0, "http://gw0", True, "200", "eth")
    assert rig.engine.health_changing("http://gw0", "eth")
    probe(3.0, "http://gw0", True, "200", "eth")
    assert {rig.request(3.0, key="eth").url for _ in range(9)} == {"http://gw0", "http://gw1"}
    assert rig.state(0).ramp_from is None
    assert rig.seen(events.HealthChanged) == [
        events.HealthChanged(1.0, "http://gw0", "up", "down", "503", "eth"),
        events.HealthChanged(3.0, "http://gw0", "down", "up", "200", "eth"),
    ]


def test_the_health_of_a_service_does_not_depend_on_that_of_the_endpoint() -> None:
    rig = Rig(1, Settings(probed=True))
    rig.engine.record_probe(0.0, "http://gw0", True, "", "eth")
    assert standing(rig.state(0), "eth") is Standing.UNKNOWN
    rig.engine.record_probe(0.0, "http://gw0", True, "")
    assert standing(rig.state(0), "eth") is Standing.READY
    rig.engine.record_probe(0.0, "http://gw0", False, "")
    assert standing(rig.state(0), "eth") is Standing.DOWN
    assert of(rig, 0.0, 0).services == {}  # no different from the endpoint


def test_a_service_that_is_down_everywhere_is_panic_for_it_alone() -> None:
    rig = Rig(2)
    for number in range(2):
        rig.engine.record_probe(0.0, f"http://gw{number}", False, "", "eth")
    assert rig.lease(0.0, key="eth").reason == "panic"
    assert rig.lease(0.0, key="btc").reason == "least connections"
    assert rig.seen(events.PanicChanged) == []


def test_probes_of_a_service_of_an_endpoint_that_left_are_ignored() -> None:
    rig = Rig(1)
    rig.engine.record_probe(0.0, "http://gone", False, "", "eth")
    assert not rig.engine.health_changing("http://gone", "eth")
    assert not rig.engine.health_changing("http://gw0", "eth")
    assert rig.seen(events.HealthChanged) == []


# --- overload of a service


def test_too_much_of_one_service_throttles_nobody() -> None:
    rig = Rig(2)
    for _ in range(20):
        rig.request(1.0, Outcome(Cause.OVERLOAD, status=429, retry_after=30.0, key="eth"), pin="http://gw0", key="eth")
    state = rig.state(0)
    assert (standing(state), standing(state, "eth")) == (Standing.READY, Standing.READY)
    assert (state.counts.overloaded, state.overload_streak) == (20, 0)
    assert (state.breaker.state, keyed(rig).breaker.state) == (S.CLOSED, S.CLOSED)
    assert keyed(rig).recent.since(0.0) == []
    rig.request(1.0, Outcome(Cause.OVERLOAD, status=429), pin="http://gw0", key="eth")
    assert standing(state) is Standing.THROTTLED

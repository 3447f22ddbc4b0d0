"""The engine: how the parts work together, event by event."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pathlb.core import events
from pathlb.core.admission import Waiter
from pathlb.core.breaker import BreakerState
from pathlb.core.cluster import Settings
from pathlb.core.config import Breaker, Limits, Outlier, Panic, Retry, SlowStart
from pathlb.core.eligibility import Standing, standing
from pathlb.core.endpoints import Admin, check_endpoints
from pathlb.core.engine import Engine, Refusal
from pathlb.core.errors import ConfigError, IllegalEvent
from pathlb.core.health import Health
from pathlb.core.lease import Lease, LeaseState, Want
from pathlb.core.model import Cause, Endpoint, Outcome
from pathlb.core.outlier import Verdict
from pathlb.core.policy import P2C, LeastConnections, RoundRobin
from pathlb.core.retry import FINAL, Again, Decision, Final

from .helpers import BROKEN, BUSY, CANCELLED, GIVEN_UP, LOCAL, OK, REFUSED, Rig, recorder, unset, urls

S = BreakerState
FAULT = Outcome(Cause.SERVICE, retry=True, status=500, key="eth")


def tight(concurrency: int = 1, queue: int = 10, **others: Any) -> Settings:
    return Settings(limits=Limits(concurrency=concurrency, queue=queue), **others)


def wait(rig: Rig, now: float = 0.0, **wants: Any) -> Waiter[Any]:
    waiter = rig.engine.acquire(now, Want(**wants), unset)
    assert isinstance(waiter, Waiter), waiter
    return waiter


def granted(waiter: Waiter[Any]) -> Lease:
    assert isinstance(waiter.grant, Lease), waiter.grant
    return waiter.grant


# --- a lease and its two ends


def test_the_road_of_a_lease() -> None:
    rig = Rig(1)
    lease = rig.lease(1.0, resendable=True)
    _, lease.give_up = recorder()
    state = rig.state(0)
    assert (lease.endpoint, lease.reason, lease.started, lease.state) == (
        state,
        "only candidate",
        1.0,
        LeaseState.PICKED,
    )
    assert (state.in_flight, lease.in_flight, list(state.waiting)) == (1, 0, [lease])
    assert rig.engine.busy
    rig.engine.observe(1.2, lease, OK)
    assert (state.in_flight, list(state.waiting), state.latency.seconds) == (1, [], pytest.approx(0.2))
    assert lease.state is LeaseState.OBSERVED
    assert lease.give_up is None  # nothing to give up any more, and no callback kept alive
    assert rig.engine.release(9.0, lease) is False
    assert (state.in_flight, lease.state, rig.engine.busy) == (0, LeaseState.RELEASED, False)
    assert (state.counts.picks, state.counts.ok, state.counts.released) == (1, 1, 1)


def test_both_ends_are_one_shot() -> None:
    rig = Rig(1)
    lease = rig.lease(0.0)
    with pytest.raises(IllegalEvent, match="released while picked"):
        rig.engine.release(0.0, lease)
    with pytest.raises(IllegalEvent, match="body failed while picked"):
        rig.engine.fail_body(0.0, lease, BROKEN)
    rig.engine.observe(0.0, lease, OK)
    with pytest.raises(IllegalEvent, match="observed while observed"):
        rig.engine.observe(0.0, lease, OK)
    rig.engine.release(0.0, lease)
    for again in (rig.engine.release, lambda now, one: rig.engine.observe(now, one, OK)):
        with pytest.raises(IllegalEvent, match="while released"):
            again(0.0, lease)
    with pytest.raises(IllegalEvent, match="while released"):
        rig.engine.fail_body(0.0, lease, BROKEN)
    assert rig.state(0).in_flight == 0


@pytest.mark.parametrize(
    ("cause", "counted", "latency", "opens", "last_failed"),
    [
        (Cause.OK, "ok", True, False, False),
        (Cause.REQUEST, "ok", True, False, False),
        (Cause.INSTANCE, "failed", False, True, True),
        (Cause.SERVICE, "failed", False, True, True),
        (Cause.BEYOND, "failed", False, False, True),
        (Cause.OVERLOAD, "overloaded", False, False, False),
        (Cause.CANCELLED, "ignored", False, False, False),
        (Cause.GIVEN_UP, "ignored", False, False, False),
        (Cause.HEDGE_LOST, "ignored", False, False, False),
        (Cause.LOCAL, "ignored", False, False, False),
    ],
)
def test_what_each_cause_moves(cause: Cause, counted: str, latency: bool, opens: bool, last_failed: bool) -> None:
    rig = Rig(1)
    for _ in range(5):
        rig.request(1.0, Outcome(cause), seconds=0.1)
    state = rig.state(0)
    assert getattr(state.counts, counted) == 5
    assert state.counts.ok + state.counts.failed + state.counts.overloaded + state.counts.ignored == 5
    assert (state.latency.seconds is not None) == latency
    assert (state.breaker.state is S.OPEN) == opens
    assert (state.last_failed > 0) == last_failed
    assert len(state.recent.since(0.0)) == (5 if latency or last_failed else 0)


def test_a_broken_body_is_the_endpoints_failure() -> None:
    rig = Rig(1, Settings(breaker=Breaker(failures=1)))
    lease = rig.lease(1.0)
    rig.engine.observe(1.1, lease, OK)
    rig.engine.fail_body(5.0, lease, BROKEN)
    state = rig.state(0)
    assert (state.counts.ok, state.counts.broken, state.breaker.state) == (1, 1, S.OPEN)
    assert state.last_failed == 5.0
    assert [sample.failed for sample in state.recent.since(0.0)] == [False, True]
    assert rig.seen(events.BodyFailed) == [events.BodyFailed(5.0, "http://gw0", BROKEN)]
    rig.engine.release(5.0, lease)
    assert state.in_flight == 0


def test_a_probe_counts_once() -> None:
    """Its head closed the breaker; a body that breaks off later was picked before that and says nothing."""
    rig = Rig(1, Settings(breaker=Breaker(failures=1)))
    rig.fail(0, 0.0, 1)
    rig.tick(0.0, 1.0)
    lease = rig.lease(1.05, resendable=True)
    assert lease.reason == "probe"
    rig.engine.observe(1.1, lease, OK)
    rig.engine.fail_body(1.2, lease, BROKEN)
    assert rig.state(0).breaker.state is S.CLOSED


# --- the set


def test_update_keeps_the_load_of_survivors_and_drains_the_removed() -> None:
    rig = Rig(2)
    stays, goes = rig.lease(0.0, pin="http://gw0"), rig.lease(0.0, pin="http://gw1")
    other = rig.lease(0.0, pin="http://gw1")
    change = rig.engine.apply(1.0, check_endpoints(["http://gw0", "http://gw2"]))
    assert [state.url for state in change.removed] == ["http://gw1"]
    assert rig.state(0).in_flight == 1
    assert rig.engine.busy
    rig.engine.observe(2.0, goes, OK)
    assert rig.engine.release(2.0, goes) is False
    rig.engine.observe(2.0, other, OK)
    assert rig.engine.release(2.0, other) is True  # the last one: its upstream may be closed
    rig.finish(3.0, stays)
    assert not rig.engine.busy
    assert rig.seen(events.EndpointsChanged)[-1] == events.EndpointsChanged(1.0, ("http://gw2",), ("http://gw1",))


def test_an_update_that_changes_nothing_is_no_event() -> None:
    rig = Rig(2)
    rig.events.clear()
    rig.engine.apply(1.0, check_endpoints(urls(2)))
    assert rig.events == []


def test_a_listener_can_bring_back_a_removed_endpoint_at_its_last_release() -> None:
    rig = Rig(2)
    lease = rig.lease(0.0, pin="http://gw1")
    rig.engine.apply(0.0, check_endpoints(urls(1)))

    def bring_back(event: events.Event) -> None:
        if isinstance(event, events.Released):
            rig.engine.apply(1.0, check_endpoints(urls(2)))

    rig.engine.subscribe(bring_back)
    rig.engine.observe(1.0, lease, OK)
    assert rig.engine.release(1.0, lease) is False
    assert rig.state(1) is lease.endpoint


def test_endpoints_at_the_start_do_not_ramp_and_later_ones_do() -> None:
    rig = Rig(1)
    assert rig.state(0).weight == 1.0
    rig.engine.apply(5.0, [Endpoint("http://gw0"), Endpoint("http://gw1", weight=4)])
    weights = []
    for now in (5.0, 6.0, 10.0, 14.0, 15.0, 16.0):
        rig.engine.tick(now)
        weights.append(rig.state(1).weight)
    assert weights == pytest.approx([0.4, 0.4, 2.0, 3.6, 4.0, 4.0])
    assert rig.state(0).weight == 1.0
    assert standing(rig.state(1)) is Standing.READY


def test_no_ramp_when_turned_off() -> None:
    rig = Rig(1, Settings(slow_start=SlowStart(window=0)))
    rig.engine.apply(5.0, check_endpoints(urls(2)))
    assert (rig.state(1).weight, standing(rig.state(1))) == (1.0, Standing.READY)


def test_a_new_weight_is_taken_over() -> None:
    rig = Rig(1)
    rig.engine.apply(5.0, [Endpoint("http://gw0", weight=3)])
    assert rig.state(0).weight == 3.0


def test_drain_and_undrain() -> None:
    rig = Rig(2)
    rig.events.clear()
    rig.engine.drain(1.0, "http://gw0")
    rig.engine.drain(2.0, "http://gw0")
    assert {rig.request(2.0).url for _ in range(20)} == {"http://gw1"}
    rig.engine.apply(2.5, check_endpoints(urls(2)))
    assert rig.state(0).admin is Admin.DRAINING
    rig.engine.undrain(3.0, "http://gw0")
    rig.engine.undrain(8.0, "http://gw0")  # not drained any more: its ramp goes on
    assert rig.state(0).ramp_from == 3.0
    assert rig.seen(events.EndpointsChanged) == [
        events.EndpointsChanged(1.0, drained=("http://gw0",)),
        events.EndpointsChanged(3.0, undrained=("http://gw0",)),
    ]


def test_draining_an_unknown_endpoint() -> None:
    rig = Rig(2)
    for act in (rig.engine.drain, rig.engine.undrain):
        with pytest.raises(
            ConfigError, match=r"endpoint: 'http://x' is not one of the endpoints: http://gw0, http://gw1"
        ):
            act(0.0, "http://x")


def test_the_drained_get_nothing_even_in_panic() -> None:
    rig = Rig(2)
    rig.engine.drain(0.0, "http://gw0")
    rig.fail(1, 0.0, 5)
    assert rig.request(0.0).url == "http://gw1"
    rig.engine.drain(0.0, "http://gw1")
    refusal = rig.engine.acquire(0.0, Want(), unset)
    assert isinstance(refusal, Refusal)
    assert not refusal.queue_full
    assert refusal.why == "http://gw0 is draining, http://gw1 is draining"


def test_refusals_say_why() -> None:
    rig = Rig(2, Settings(panic=Panic(fail_closed=True)))
    assert rig.engine.acquire(0.0, Want(pin="http://x"), unset) == Refusal(
        "pinned to http://x, which is not one of the endpoints"
    )
    rig.fail(0, 0.0, 5)
    assert rig.engine.acquire(0.0, Want(pin="http://gw0"), unset) == Refusal("http://gw0 is breaker open")
    empty = Rig(0)
    assert empty.engine.acquire(0.0, Want(), unset) == Refusal("the set of endpoints is empty")


# --- health


def test_active_health() -> None:
    rig = Rig(2, Settings(probed=True, rise=2, fall=2))
    assert rig.lease(0.0).reason == "panic"  # nobody is known to be up
    rig.engine.record_probe(0.1, "http://gw0", True, "")
    assert {rig.request(0.2).url for _ in range(9)} == {"http://gw0"}
    rig.engine.record_probe(0.3, "http://gw1", False, "refused")
    assert rig.state(1).health.state is Health.DOWN
    assert not rig.engine.health_changing("http://gw1")
    rig.engine.record_probe(5.0, "http://gw1", True, "200")
    assert rig.engine.health_changing("http://gw1")
    rig.engine.record_probe(5.5, "http://gw1", True, "200")
    assert (rig.state(1).health.state, rig.state(1).ramp_from) == (Health.UP, 5.5)
    assert rig.state(0).ramp_from is None
    assert rig.seen(events.HealthChanged)[-1] == events.HealthChanged(5.5, "http://gw1", "down", "up", "200")


def test_probes_of_an_endpoint_that_left_are_ignored() -> None:
    rig = Rig(1, Settings(probed=True))
    rig.engine.record_probe(0.0, "http://gone", True, "")
    assert not rig.engine.health_changing("http://gone")
    assert rig.seen(events.HealthChanged) == []


def test_the_ramp_of_a_newcomer_begins_when_it_may_serve() -> None:
    rig = Rig(1, Settings(probed=True))
    rig.engine.record_probe(0.0, "http://gw0", True, "")
    rig.engine.apply(1.0, check_endpoints(urls(2)))
    rig.tick(1.0, 6.0)
    rig.engine.record_probe(6.0, "http://gw1", True, "")
    assert rig.state(1).weight == pytest.approx(0.1)


def test_a_failed_probe_makes_an_endpoint_the_last_choice_in_panic() -> None:
    rig = Rig(2, Settings(probed=True))
    rig.engine.record_probe(5.0, "http://gw0", False, "")
    assert {rig.request(6.0).url for _ in range(9)} == {"http://gw1"}


# --- breaker, probe, panic


def test_an_open_breaker_keeps_traffic_away_then_probes_then_ramps() -> None:
    rig = Rig(2)
    rig.fail(0, 1.0, 5)
    assert {rig.request(1.1, resendable=True).url for _ in range(20)} == {"http://gw1"}
    rig.tick(1.1, 2.0)
    probe = rig.lease(2.05, resendable=True)
    assert (probe.reason, probe.endpoint.url) == ("probe", "http://gw0")
    assert {rig.request(2.05, resendable=True).url for _ in range(20)} == {"http://gw1"}
    rig.finish(2.1, probe)
    assert (rig.state(0).breaker.state, rig.state(0).ramp_from) == (S.CLOSED, 2.1)
    changes = [(event.before, event.after) for event in rig.seen(events.BreakerChanged)]
    assert changes == [("closed", "open"), ("open", "half-open"), ("half-open", "probing"), ("probing", "closed")]
    assert rig.state(0).counts.breaker_opens == 1


def test_a_cancelled_probe_says_nothing() -> None:
    rig = Rig(2)
    rig.fail(0, 1.0, 5)
    rig.tick(1.0, 2.0)
    rig.finish(2.1, rig.lease(2.05, resendable=True), CANCELLED)
    assert rig.state(0).breaker.state is S.HALF_OPEN
    assert rig.lease(2.2, resendable=True).reason == "probe"


def test_panic_fails_open_and_a_success_proves() -> None:
    rig = Rig(2)
    rig.fail(0, 1.0, 5)
    rig.fail(1, 1.0, 5)
    assert rig.seen(events.PanicChanged) == [events.PanicChanged(1.0, True, 0, 2)]
    lease = rig.lease(1.1)
    assert (lease.reason, lease.panic) == ("panic", True)
    rig.finish(1.2, lease)
    assert lease.endpoint.breaker.state is S.CLOSED
    assert rig.seen(events.PanicChanged)[-1] == events.PanicChanged(1.2, False, 1, 2)


def test_a_panicking_pick_of_before_the_opening_proves_nothing() -> None:
    rig = Rig(1, Settings(breaker=Breaker(failures=1), panic=Panic(threshold=1.0)))
    early = rig.lease(0.0)
    assert early.panic
    rig.request(0.0, BROKEN)
    rig.finish(0.1, early)
    assert rig.state(0).breaker.state is S.OPEN


def test_fail_closed_refuses() -> None:
    rig = Rig(1, Settings(panic=Panic(fail_closed=True)))
    rig.fail(0, 1.0, 5)
    assert isinstance(rig.engine.acquire(1.0, Want(), unset), Refusal)


def test_a_probe_that_hangs_is_given_up() -> None:
    rig = Rig(2, Settings(breaker=Breaker(failures=1, probe_timeout=1.0)))
    rig.fail(0, 0.0, 1)
    rig.tick(0.0, 1.0)
    probe = rig.lease(1.0, resendable=True)
    calls, probe.give_up = recorder()
    rig.tick(1.0, 2.1)
    assert rig.state(0).breaker.state is S.OPEN
    assert calls == [1]


# --- keys


def test_a_service_fault_shuts_its_service_on_that_endpoint_only() -> None:
    rig = Rig(2)
    for _ in range(5):
        rig.request(0.0, FAULT, pin="http://gw0", key="eth")
    assert {rig.request(0.0, key="eth").url for _ in range(20)} == {"http://gw1"}
    assert {rig.request(0.0, key="btc").url for _ in range(20)} == {"http://gw0", "http://gw1"}
    assert {rig.request(0.0).url for _ in range(20)} == {"http://gw0", "http://gw1"}
    assert standing(rig.state(0)) is Standing.READY
    assert rig.state(0).recent.since(0.0)
    assert not any(sample.failed for sample in rig.state(0).recent.since(0.0))  # no outlier either
    assert rig.state(0).counts.failed == 5
    rig.tick(0.0, 1.0)
    probe = rig.lease(1.0, key="eth", resendable=True)
    assert (probe.reason, probe.probing) == ("probe", rig.state(0).scopes["eth"].breaker)
    rig.finish(1.1, probe)
    assert rig.state(0).scopes["eth"].breaker.state is S.CLOSED
    assert rig.state(0).ramp_from is None  # the endpoint was never out


def test_successes_of_a_service_break_the_row_of_its_failures() -> None:
    """Whether or not the classifier names the service on a success."""
    for success in (OK, Outcome(Cause.OK, key="eth")):
        rig = Rig(1)
        for _ in range(19):
            rig.request(0.0, FAULT, key="eth")
            for _ in range(5):
                rig.request(0.0, success, key="eth")
        assert rig.state(0).scopes["eth"].breaker.state is S.CLOSED


def test_successes_of_services_break_the_row_of_the_endpoints_failures() -> None:
    rig = Rig(1)
    for _ in range(19):
        rig.request(0.0, BROKEN)
        for _ in range(5):
            rig.request(0.0, Outcome(Cause.OK, key="eth"), key="eth")
    assert rig.state(0).breaker.state is S.CLOSED


def test_an_answer_about_another_service_says_nothing_about_this_one() -> None:
    rig = Rig(1)
    other = Outcome(Cause.SERVICE, retry=True, key="btc")
    for _ in range(4):
        rig.request(0.0, FAULT, key="eth")
    rig.request(0.0, other, key="eth")
    scopes = rig.state(0).scopes
    assert [scopes[key].breaker.consecutive_failures for key in ("eth", "btc")] == [4, 1]
    rig.request(0.0, Outcome(Cause.OK, key="btc"), key="eth")
    assert [scopes[key].breaker.consecutive_failures for key in ("eth", "btc")] == [4, 0]


def test_a_probe_of_a_service_that_is_answered_for_another_is_abandoned() -> None:
    rig = Rig(2)
    for _ in range(5):
        rig.request(0.0, FAULT, pin="http://gw0", key="eth")
    rig.tick(0.0, 1.0)
    rig.finish(1.0, rig.lease(1.0, key="eth", resendable=True), Outcome(Cause.OK, key="btc"))
    assert rig.state(0).scopes["eth"].breaker.state is S.HALF_OPEN


def test_a_service_fault_proves_that_the_endpoint_works() -> None:
    rig = Rig(2)
    rig.fail(0, 0.0, 5)
    rig.tick(0.0, 1.0)
    rig.finish(1.0, rig.lease(1.0, key="eth", resendable=True), FAULT)
    assert rig.state(0).breaker.state is S.CLOSED
    assert rig.state(0).scopes["eth"].breaker.consecutive_failures == 1


def test_any_number_of_keys_takes_bounded_memory() -> None:
    rig = Rig(1)
    for number in range(3000):
        key = f"service-{number}"
        rig.request(number * 1.0, Outcome(Cause.SERVICE, key=key), key=key)
        rig.request(number * 1.0, OK, key=key)
    assert len(rig.state(0).scopes) <= 200
    assert len(rig.engine._cluster._views) <= 1000


def test_only_attempts_for_a_service_are_given_up_when_its_breaker_opens() -> None:
    rig = Rig(2)
    hanging = {key: rig.lease(0.0, pin="http://gw0", key=key, resendable=True) for key in ("eth", "btc")}
    for lease in hanging.values():
        lease.want.pin = None
    (eth, hanging["eth"].give_up), (btc, hanging["btc"].give_up) = recorder(), recorder()
    for _ in range(5):
        rig.request(0.0, FAULT, pin="http://gw0", key="eth")
    assert (eth, btc) == ([1], [])


# --- overload


def test_429_passes_the_endpoint_over_for_a_while_and_longer_each_time() -> None:
    rig = Rig(2)
    now, pauses = 1.0, []
    for _ in range(8):
        rig.request(now, BUSY, pin="http://gw0")
        assert rig.request(now).url == "http://gw1"
        pauses.append(rig.state(0).throttled_until - now)
        now = rig.state(0).throttled_until
    assert pauses == pytest.approx([0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0])
    assert rig.state(0).breaker.state is S.CLOSED
    rig.request(now, OK, pin="http://gw0")
    rig.request(now, BUSY, pin="http://gw0")
    assert rig.state(0).throttled_until - now == pytest.approx(0.25)


def test_429s_to_requests_sent_together_are_one() -> None:
    rig = Rig(2)
    leases = [rig.lease(1.0, pin="http://gw0") for _ in range(10)]
    for lease in leases:
        rig.finish(1.0, lease, BUSY)
    assert rig.state(0).throttled_until == pytest.approx(1.25)


@pytest.mark.parametrize(("asked", "seconds"), [(3.0, 3.0), (1e9, 30.0), (0.0, 0.0), (-5.0, 0.0), (math.inf, 30.0)])
def test_retry_after_is_honoured_within_reason(asked: float, seconds: float) -> None:
    rig = Rig(2)
    rig.request(1.0, Outcome(Cause.OVERLOAD, status=429, retry_after=asked), pin="http://gw0")
    assert rig.state(0).throttled_until == 1.0 + seconds
    rig.engine.tick(1.0 + seconds)
    assert standing(rig.state(0)) is Standing.READY


def test_a_throttled_endpoint_is_used_when_nothing_else_is_there() -> None:
    rig = Rig(1)
    rig.request(1.0, BUSY)
    lease = rig.lease(1.0)
    assert (lease.reason, lease.panic) == ("only candidate", False)


# --- the queue


def test_beyond_the_limit_requests_wait_in_order() -> None:
    rig = Rig(2, tight())
    leases = [rig.lease(0.0), rig.lease(0.0)]
    calls, settle = recorder()
    first = rig.engine.acquire(0.0, Want(), settle)
    second = wait(rig)
    assert isinstance(first, Waiter)
    assert calls == []
    rig.finish(1.0, leases[1])
    assert calls == [1]
    assert granted(first).endpoint is leases[1].endpoint
    assert second.waiting
    rig.finish(2.0, leases[0])
    assert granted(second).endpoint is leases[0].endpoint
    assert rig.seen(events.Queued) == [events.Queued(0.0, 1), events.Queued(0.0, 2)]
    assert rig.seen(events.Dequeued) == [
        events.Dequeued(1.0, 1, 1.0, "granted"),
        events.Dequeued(2.0, 0, 2.0, "granted"),
    ]


def test_a_full_queue_fails_at_once() -> None:
    rig = Rig(1, tight(queue=1))
    rig.lease(0.0)
    wait(rig)
    assert rig.engine.acquire(0.0, Want(), unset) == Refusal("1 requests are waiting already", queue_full=True)
    assert rig.seen(events.QueueOverflow) == [events.QueueOverflow(0.0, 1)]
    none = Rig(1, tight(queue=0))
    none.lease(0.0)
    refusal = none.engine.acquire(0.0, Want(), unset)
    assert isinstance(refusal, Refusal)
    assert refusal.queue_full


def test_a_queue_full_of_others_is_no_reason_to_refuse_what_is_free() -> None:
    rig = Rig(2, tight(queue=1))
    rig.lease(0.0, pin="http://gw0")
    wait(rig, pin="http://gw0")
    assert rig.lease(0.0).endpoint is rig.state(1)


def test_leaving_the_queue() -> None:
    rig = Rig(1, tight(queue=1))
    lease = rig.lease(0.0)
    waiter = wait(rig)
    assert rig.engine.busy
    assert rig.engine.leave_queue(0.5, waiter, "timeout")
    assert not rig.engine.leave_queue(0.5, waiter, "timeout")
    assert rig.seen(events.Dequeued) == [events.Dequeued(0.5, 0, 0.5, "timeout")]
    granted_late = wait(rig, 0.5)
    rig.finish(1.0, lease)
    assert not rig.engine.leave_queue(1.0, granted_late, "timeout")
    rig.finish(1.0, granted(granted_late))
    assert not rig.engine.busy


def test_a_special_waiter_blocks_nobody_and_is_blocked_by_nobody() -> None:
    rig = Rig(2, tight())
    busy = [rig.lease(0.0, pin=f"http://gw{n}") for n in range(2)]
    plain, pinned, late = wait(rig), wait(rig, pin="http://gw0"), wait(rig)
    rig.finish(1.0, busy[1])
    assert granted(plain).endpoint is rig.state(1)
    assert pinned.waiting
    assert late.waiting
    rig.finish(2.0, plain.grant)
    assert granted(late).endpoint is rig.state(1)
    rig.finish(3.0, busy[0])
    assert granted(pinned).endpoint is rig.state(0)


def test_a_waiter_who_takes_anything_does_not_hold_up_one_whose_wish_is_free() -> None:
    rig = Rig(2, tight())
    busy = rig.lease(0.0, pin="http://gw1")
    rig.state(0).in_flight += 1
    plain, pinned = wait(rig), wait(rig, pin="http://gw0")
    rig.state(0).in_flight -= 1
    rig.fail(1, 0.0, 0)
    rig.engine._cluster._eject(0.0, rig.state(0), None, Verdict(rig.state(0), "latency", ""), Outlier())
    rig.engine.tick(0.0)
    assert granted(pinned).reason == "panic"
    assert plain.waiting
    rig.finish(0.1, busy)
    assert granted(plain).endpoint is rig.state(1)


def test_waiters_for_different_services_do_not_hold_each_other_up() -> None:
    rig = Rig(2, tight())
    for _ in range(5):
        rig.request(0.0, FAULT, pin="http://gw0", key="eth")
    rig.lease(0.0, pin="http://gw1")
    busy = rig.lease(0.0, pin="http://gw0")
    eth, eth_too, btc = wait(rig, key="eth"), wait(rig, key="eth"), wait(rig, key="btc")
    rig.finish(0.1, busy)
    assert granted(btc).endpoint is rig.state(0)
    assert eth.waiting
    assert eth_too.waiting


def test_the_queue_is_served_when_endpoints_come_and_refused_when_they_go() -> None:
    rig = Rig(1, tight())
    rig.lease(0.0)
    first, second = wait(rig), wait(rig)
    rig.engine.apply(1.0, check_endpoints(urls(2)))
    assert granted(first).endpoint is rig.state(1)
    rig.engine.drain(2.0, "http://gw0")
    rig.engine.drain(2.0, "http://gw1")
    assert second.grant == Refusal("http://gw0 is draining, http://gw1 is draining")
    assert rig.seen(events.Dequeued)[-1].why == "refused"


def test_time_serves_the_queue_too() -> None:
    """Whoever waited first gets the probe that time alone has allowed."""
    rig = Rig(2, tight())
    rig.lease(0.0, pin="http://gw1")
    rig.fail(0, 0.0, 5)
    waiter = wait(rig)
    rig.tick(0.0, 1.0)
    assert rig.state(0).breaker.state is S.HALF_OPEN
    assert waiter.waiting  # may not be sent twice: not the probe, for a second
    newcomer = rig.engine.acquire(2.1, Want(), unset)
    assert isinstance(newcomer, Waiter)
    assert granted(waiter).reason == "probe"


def test_a_resendable_waiter_is_the_probe() -> None:
    rig = Rig(2, tight())
    rig.lease(0.0, pin="http://gw1")
    rig.fail(0, 0.0, 5)
    waiter = wait(rig, resendable=True)
    rig.tick(0.0, 1.0)
    assert granted(waiter).reason == "probe"


@pytest.mark.parametrize("policy", [LeastConnections, RoundRobin, P2C])
def test_every_policy_skips_the_saturated(policy: Any) -> None:
    rig = Rig(4, tight(concurrency=3), policy())
    for _ in range(12):
        rig.lease(0.0)
    assert [state.in_flight for state in rig.engine.members] == [3, 3, 3, 3]
    wait(rig)


# --- decide


def ask(rig: Rig, now: float, outcome: Outcome, **others: Any) -> tuple[Decision, Lease]:
    lease = others.pop("lease", None) or rig.lease(now, resendable=others.pop("resendable", True))
    if lease.state is LeaseState.PICKED:
        rig.finish(now, lease, outcome)
    lease.want.failed_on(lease.endpoint)
    arguments: dict[str, Any] = {"attempts": 1, "unsent": 0, "replayable": True, "deadline": now + 30.0} | others
    return rig.engine.decide(now, lease, outcome, **arguments), lease


def test_decide_sends_elsewhere_at_once() -> None:
    rig = Rig(2)
    decision, lease = ask(rig, 1.0, BROKEN)
    assert decision == Again(0.0)
    assert rig.seen(events.Retried) == [events.Retried(1.0, lease.endpoint.url, BROKEN, 0.0)]
    assert rig.lease(1.0, lease.want).endpoint is not lease.endpoint


def test_decide_waits_when_everybody_was_tried() -> None:
    rig = Rig(1)
    decision, _ = ask(rig, 1.0, BROKEN)
    assert isinstance(decision, Again)
    assert 0 < decision.wait <= 0.025


def test_decide_refuses_with_a_reason() -> None:
    rig = Rig(2)
    decision, _ = ask(rig, 1.0, BROKEN, resendable=False)
    assert decision == Final("not safe to send twice")
    assert rig.seen(events.RetryRefused)[-1].why == "not safe to send twice"
    assert ask(rig, 1.0, OK)[0] == FINAL
    assert len(rig.seen(events.RetryRefused)) == 1


def test_decide_knows_the_fastest_and_the_deadline() -> None:
    rig = Rig(2)
    rig.request(0.0, OK, seconds=0.5, pin="http://gw0")
    rig.request(0.0, OK, seconds=2.0, pin="http://gw1")
    assert isinstance(ask(rig, 5.0, BROKEN, deadline=5.6)[0], Again)
    assert isinstance(ask(rig, 5.0, BROKEN, deadline=5.4)[0], Final)


def test_the_budget_is_earned_by_requests_and_not_by_retries() -> None:
    settings = Settings(retry=Retry(budget_reserve=0.0, budget_ratio=0.5))
    rig = Rig(3, settings)
    assert ask(rig, 1.0, BROKEN)[0] == Final("the retry budget is used up")
    decision, lease = ask(rig, 1.0, BROKEN)
    assert decision == Again(0.0)
    rig.finish(1.0, rig.lease(1.0, lease.want), BROKEN)
    assert ask(rig, 1.0, BROKEN, lease=lease)[0] == Final("the retry budget is used up")
    assert ask(rig, 1.0, REFUSED)[0] == Again(0.0)  # reached nobody: free


def test_what_fails_beyond_the_endpoints_is_sent_again_once() -> None:
    """However the causes alternate: what failed retries by itself, and each attempt multiplies that."""
    rig = Rig(5, Settings(outlier=None, retry=Retry(budget_reserve=100.0)))
    beyond = Outcome(Cause.BEYOND, retry=True, once=True, status=502)
    too_many = Outcome(Cause.OVERLOAD, retry=True, once=True, status=429, key="eth")
    for first, second in itertools.product((beyond, too_many), repeat=2):
        want = Want(resendable=True, key="eth")
        decisions = []
        for attempt, outcome in enumerate((first, BROKEN, second), 1):
            lease = rig.lease(1.0, want)
            decisions.append(ask(rig, 1.0, outcome, lease=lease, attempts=attempt)[0])
        assert decisions[:2] == [Again(0.0)] * 2
        assert decisions[2] == Final("it fails beyond the endpoints, and a second one has tried")
        assert isinstance(ask(rig, 1.0, BROKEN, lease=rig.lease(1.0, want), attempts=3)[0], Again)


def test_a_second_attempt_that_was_refused_has_not_been_made() -> None:
    rig = Rig(2, Settings(retry=Retry(budget_reserve=0.0, budget_ratio=0.0)))
    beyond = Outcome(Cause.BEYOND, retry=True, once=True)
    decision, lease = ask(rig, 1.0, beyond)
    assert decision == Final("the retry budget is used up")
    assert not lease.want.once_spent


def test_what_was_refused_goes_elsewhere_whatever_it_is() -> None:
    rig = Rig(2)
    assert ask(rig, 1.0, BROKEN, resendable=False)[0] == Final("not safe to send twice")
    decision, lease = ask(rig, 1.0, replace(BROKEN, unprocessed=True), resendable=False)
    assert decision == Again(0.0)
    assert rig.lease(1.0, lease.want).endpoint is not lease.endpoint


def test_a_service_all_endpoints_are_known_to_fail_is_not_tried_on_all_of_them_again() -> None:
    rig = Rig(3)
    for number in range(3):
        rig.request(0.0, replace(FAULT, trip=True), pin=f"http://gw{number}", key="eth")
    lease = rig.lease(0.1, key="eth", resendable=True)
    assert lease.panic
    assert ask(rig, 0.1, FAULT, lease=lease)[0] == Final("every endpoint fails this service")
    lease = rig.lease(0.2, key="eth", resendable=True)
    assert ask(rig, 0.2, BROKEN, lease=lease)[0] == Again(0.0)  # that is news


def test_where_some_endpoint_may_serve_a_panicking_request_goes_on() -> None:
    """The others are out for all services: nothing is known of this one on them."""
    rig = Rig(2)
    rig.request(0.0, replace(FAULT, trip=True), pin="http://gw0", key="eth")
    rig.fail(1, 0.0, 5)
    lease = rig.lease(0.1, key="eth", pin="http://gw0", resendable=True)
    lease.want.pin = None
    assert lease.panic
    assert ask(rig, 0.1, FAULT, lease=lease)[0] == Again(0.0)


def test_one_failure_that_is_proof_shuts_what_it_speaks_about() -> None:
    rig = Rig(2)
    hanging = hang(rig, 0, 1, key="eth")
    rig.request(1.0, replace(FAULT, trip=True), pin="http://gw0", key="eth")
    assert (rig.state(0).scopes["eth"].breaker.state, rig.state(0).breaker.state) == (S.OPEN, S.CLOSED)
    assert hanging[0][1] == [1]
    rig.request(1.0, replace(BROKEN, trip=True), pin="http://gw0", key="btc")
    assert (rig.state(0).scopes["btc"].breaker.state, rig.state(0).breaker.state) == (S.CLOSED, S.OPEN)
    rig.request(1.0, replace(OK, trip=True), pin="http://gw1")
    rig.request(1.0, Outcome(Cause.BEYOND, trip=True), pin="http://gw1")
    assert rig.state(1).breaker.state is S.CLOSED
    assert [event.why for event in rig.seen(events.BreakerChanged)] == ["one failure was proof"] * 2


def test_a_body_that_breaks_off_can_be_proof() -> None:
    rig = Rig(1)
    lease = rig.lease(0.0)
    rig.engine.observe(0.0, lease, OK)
    rig.engine.fail_body(1.0, lease, replace(BROKEN, trip=True))
    assert rig.state(0).breaker.state is S.OPEN


# --- whether it may be sent twice


def asked(answer: bool = True) -> tuple[list[int], Callable[[], bool]]:
    """Whether it may be sent twice, and how often that was asked."""
    calls: list[int] = []

    def resendable() -> bool:
        calls.append(1)
        return answer

    return calls, resendable


def test_a_request_that_succeeds_is_never_asked_whether_it_may_be_sent_twice() -> None:
    rig = Rig(2)
    rig.request(0.0, replace(FAULT, trip=True), pin="http://gw1", key="eth")
    calls, resendable = asked()
    rig.request(0.1, key="eth", resendable=resendable)
    lease = rig.lease(0.1, key="btc", resendable=resendable)
    lease.give_up = lambda: None
    rig.tick(0.1, 0.5)
    rig.finish(0.5, lease)
    assert ask(rig, 0.5, OK, lease=lease)[0] == FINAL
    assert calls == []


def test_it_is_asked_once() -> None:
    rig = Rig(3)
    calls, resendable = asked()
    decision, lease = ask(rig, 1.0, BROKEN, resendable=resendable)
    assert (decision, calls) == (Again(0.0), [1])
    lease = rig.lease(1.0, lease.want)
    assert isinstance(ask(rig, 1.0, BROKEN, lease=lease, attempts=2)[0], Again)
    assert lease.want.resendable
    assert calls == [1]
    calls, resendable = asked(False)
    decision, lease = ask(rig, 1.0, BROKEN, resendable=resendable)
    assert (decision, calls) == (Final("not safe to send twice"), [1])
    assert not lease.want.resendable
    assert calls == [1]


@pytest.mark.parametrize(
    "outcome", [OK, CANCELLED, REFUSED, replace(BROKEN, unprocessed=True), replace(BROKEN, retry=False)]
)
def test_it_is_not_asked_where_it_does_not_matter(outcome: Outcome) -> None:
    calls, resendable = asked(False)
    ask(Rig(3), 1.0, outcome, resendable=resendable)
    assert calls == []


def test_it_is_asked_for_a_probe_that_is_due_and_not_before() -> None:
    rig = Rig(2, Settings(breaker=Breaker(failures=1)))
    rig.fail(0, 0.0, 1)
    calls, resendable = asked(False)
    rig.request(0.5, resendable=resendable)  # open
    rig.tick(0.5, 1.0)
    other = rig.lease(1.0, pin="http://gw1", resendable=resendable)
    avoiding = rig.lease(1.0, avoid=frozenset({"http://gw0"}), resendable=resendable)
    assert calls == []
    assert rig.request(1.0, resendable=resendable) is rig.state(1)
    assert calls == [1]
    probe = rig.lease(1.0, resendable=True)
    assert probe.reason == "probe"
    calls, resendable = asked()
    rig.request(1.1, resendable=resendable)  # it is being probed
    assert calls == []
    for lease in (other, avoiding, probe):
        rig.finish(1.2, lease)


def test_it_is_asked_of_what_hangs_where_it_would_be_given_up() -> None:
    rig = Rig(3)
    rig.request(0.0, seconds=0.2)
    asks = {}
    for name, wants in {
        "eth": {"key": "eth"},
        "btc": {"key": "btc"},
        "late": {"key": "eth", "deadline": 0.6},
        "not ours": {"key": "eth"},
    }.items():
        asks[name], resendable = asked()
        ((lease, _),) = hang(rig, 0, 1, resendable=resendable, **wants)
        if name == "not ours":
            lease.give_up = None
    rig.request(0.5, replace(FAULT, trip=True), pin="http://gw0", key="eth")
    assert asks == {"eth": [1], "btc": [], "late": [], "not ours": []}
    assert rig.seen(events.GivenUp) == [events.GivenUp(0.5, "http://gw0", 1)]


# --- giving up what hangs


def hang(rig: Rig, number: int, count: int, **wants: Any) -> list[tuple[Lease, list[int]]]:
    """Attempts on one endpoint that may be given up, with the list of their callbacks."""
    made = []
    for _ in range(count):
        lease = rig.lease(0.0, pin=f"http://gw{number}", **({"resendable": True} | wants))
        lease.want.pin = None
        calls, lease.give_up = recorder()
        made.append((lease, calls))
    return made


def test_an_opening_breaker_gives_up_what_hangs_and_pays_for_it() -> None:
    rig = Rig(3)
    hanging, unsafe = hang(rig, 0, 3), hang(rig, 0, 1, resendable=False)
    untouched = rig.lease(0.0, pin="http://gw0", resendable=True)  # the shell cannot give this one up
    rig.fail(0, 0.5, 5)
    assert [calls for _, calls in hanging] == [[1], [1], [1]]
    assert unsafe[0][1] == []
    assert not untouched.given_up
    assert rig.seen(events.GivenUp) == [events.GivenUp(0.5, "http://gw0", 3)]
    before = rig.engine.snapshot(0.5, lambda url: "").retry_budget
    for lease, calls in hanging:
        assert (lease.give_up, lease.given_up) == (None, True)
        decision, _ = ask(rig, 0.6, GIVEN_UP, lease=lease)
        assert decision == Again(0.0)
        assert calls == [1]
    assert rig.engine.snapshot(0.6, lambda url: "").retry_budget == before


def test_what_the_budget_does_not_cover_stays() -> None:
    settings = Settings(retry=Retry(budget_reserve=0.2, budget_ratio=0.0))
    rig = Rig(2, settings)
    hanging = hang(rig, 0, 4)
    rig.fail(0, 0.5, 5)
    assert [calls for _, calls in hanging] == [[1], [1], [], []]
    assert [lease.given_up for lease, _ in hanging] == [True, True, False, False]


def test_nothing_is_given_up_when_there_is_nowhere_to_go() -> None:
    rig = Rig(2)
    hanging = hang(rig, 0, 2)
    rig.fail(1, 0.2, 5)
    rig.fail(0, 0.5, 5)
    assert [calls for _, calls in hanging] == [[], []]
    rig = Rig(2)
    ((lease, calls),) = hang(rig, 0, 1)
    lease.want.failed_on(rig.state(1))
    rig.fail(0, 0.5, 5)
    assert calls == []
    assert rig.seen(events.GivenUp) == []


# --- time, stalls, ticks


def test_a_stall_of_this_process_is_nobodys_latency() -> None:
    rig = Rig(1)
    rig.engine.tick(0.0)
    lease = rig.lease(0.0)
    rig.engine.observe(5.15, lease, OK)
    assert rig.state(0).latency.seconds == pytest.approx(0.05)
    assert rig.engine.stalled_during(lease, 5.15) == pytest.approx(5.1)
    rig.engine.tick(5.15)
    later = rig.lease(5.15)
    assert rig.engine.stalled_during(later, 5.2) == pytest.approx(0.0)


def test_an_attempt_picked_within_a_stall_took_no_negative_time() -> None:
    """The stall is found out late and counted from its beginning, which was before the pick."""
    rig = Rig(2)
    rig.engine.tick(0.0)
    lease = rig.lease(0.14)  # late, but not late enough to be called a stall
    rig.finish(0.16, lease)
    assert lease.endpoint.latency.seconds == 0.0
    rig.request(0.16, pin="http://gw0" if lease.endpoint.url != "http://gw0" else "http://gw1")
    rig.tick(0.16, 1.0)  # the comparison takes logarithms


def test_a_stall_is_no_silence_of_a_probe() -> None:
    """Whichever comes first after the pause: the late heartbeat, a reply, a request or a snapshot."""
    acts: list[Any] = [
        lambda engine: engine.tick(15.0),
        lambda engine: engine.acquire(15.0, Want(), unset),
        lambda engine: engine.snapshot(15.0, lambda url: ""),
    ]
    for act in acts:
        rig = Rig(2, Settings(breaker=Breaker(failures=1, probe_timeout=10.0)))
        rig.fail(0, 0.0, 1)
        rig.tick(0.0, 1.0)
        rig.lease(1.0, resendable=True)
        rig.tick(1.0, 2.0)
        act(rig.engine)
        assert rig.state(0).breaker.state is S.PROBING, act
        rig.engine.tick(15.0)
        rig.tick(15.0, 23.9)
        assert rig.state(0).breaker.state is S.PROBING
        rig.tick(23.9, 24.2)
        assert rig.state(0).breaker.state is S.OPEN


def test_a_stall_is_no_silence_of_a_probe_of_a_service() -> None:
    rig = Rig(2, Settings(breaker=Breaker(failures=1, probe_timeout=2.0)))
    rig.request(0.0, FAULT, pin="http://gw0", key="eth")
    rig.tick(0.0, 1.0)
    rig.lease(1.0, key="eth", resendable=True)
    rig.engine.tick(6.0)
    assert rig.state(0).scopes["eth"].breaker.state is S.PROBING


def test_nobody_is_compared_right_after_a_stall() -> None:
    """Also when a reply was read before the late heartbeat came."""
    for read_first in (False, True):
        rig = Rig(2)
        rig.engine.tick(0.0)
        judged: list[float] = []
        rig.engine._cluster.eject_outliers = lambda now, running, judged=judged: judged.append(now)  # type: ignore
        lease = rig.lease(0.0)
        if read_first:
            rig.finish(5.0, lease)
        rig.engine.tick(5.0)
        assert judged == []
        rig.engine.tick(5.05)
        assert judged == [5.05]


def test_pause() -> None:
    rig = Rig(1)
    rig.engine.tick(0.0)
    rig.engine.pause()
    lease = rig.lease(100.0)
    rig.finish(100.2, lease)
    assert rig.state(0).latency.seconds == pytest.approx(0.2)


def test_a_request_alone_moves_time() -> None:
    """Nobody ticks while nothing is in flight: the next request finds what has become due."""
    rig = Rig(2)
    rig.fail(0, 0.0, 5)
    assert rig.lease(500.0, resendable=True).reason == "probe"


def test_without_an_outlier_configuration_nobody_is_compared() -> None:
    rig = Rig(2, Settings(outlier=None))
    rig.tick(0.0, 1.0)
    assert rig.engine._cluster._next_judgement == -math.inf


def test_nothing_is_built_for_nobody() -> None:
    engine = Engine(Settings(), LeastConnections(), random.Random(1))
    engine.apply(0.0, check_endpoints(urls(2)))
    lease = engine.acquire(0.0, Want(), unset)
    assert isinstance(lease, Lease)
    engine.observe(0.0, lease, OK)
    engine.release(0.0, lease)
    assert not engine._outbox._events


def test_local_faults_cost_no_health() -> None:
    rig = Rig(1)
    for _ in range(50):
        rig.request(0.0, LOCAL)
    assert standing(rig.state(0)) is Standing.READY
    assert rig.state(0).recent.since(0.0) == []


# --- deadlines, bodies, policies of the caller


def test_a_body_that_broke_off_for_no_fault_of_the_endpoint() -> None:
    for outcome in (LOCAL, CANCELLED, FAULT):
        rig = Rig(1)
        lease = rig.lease(1.0)
        rig.engine.observe(1.1, lease, OK)
        rig.engine.fail_body(5.0, lease, outcome)
        state = rig.state(0)
        assert (state.counts.broken, state.last_failed) == (1, -math.inf)
        assert not any(sample.failed for sample in state.recent.since(0.0))


def test_the_probe_leaves_its_request_time_to_go_elsewhere() -> None:
    rig = Rig(2, Settings(breaker=Breaker(failures=1, probe_timeout=10.0)))
    rig.fail(0, 0.0, 1)
    rig.tick(0.0, 1.0)
    probe = rig.lease(1.0, resendable=True, deadline=5.0)
    calls, probe.give_up = recorder()
    assert probe.reason == "probe"
    rig.tick(1.0, 2.9)
    assert (rig.state(0).breaker.state, calls) == (S.PROBING, [])
    rig.tick(2.9, 3.1)
    assert (rig.state(0).breaker.state, calls) == (S.OPEN, [1])
    assert rig.seen(events.BreakerChanged)[-1].why == "no answer from the probe in 2 s"


@pytest.mark.parametrize("known_of", ["http://gw0", "http://gw1"])
def test_short_deadlines_do_not_keep_a_healthy_endpoint_out(known_of: str) -> None:
    """It answers in 0.3 s and every request has 0.5 s: half of that would fail every probe."""
    rig = Rig(2, Settings(breaker=Breaker(failures=1)))
    rig.request(0.0, OK, seconds=0.3, pin=known_of)
    rig.fail(0, 1.0, 1)
    rig.tick(1.0, 2.0)
    probe = rig.lease(2.0, resendable=True, deadline=2.5)
    assert probe.reason == "probe"
    rig.tick(2.0, 2.3)
    rig.finish(2.3, probe)
    assert rig.state(0).breaker.state is S.CLOSED


def test_nothing_is_given_up_that_could_not_be_answered_in_time() -> None:
    rig = Rig(2)
    rig.request(0.0, OK, seconds=0.2, pin="http://gw1")
    late, soon = hang(rig, 0, 1, deadline=1.1), hang(rig, 0, 1, deadline=1.3)
    rig.fail(0, 1.0, 5)
    assert (late[0][1], soon[0][1]) == ([], [1])


class BrokenPolicy(LeastConnections):
    broken = False

    def pick(self, candidates: Any, rng: Any, /) -> Any:
        if self.broken:
            raise RuntimeError("policy")
        return super().pick(candidates, rng)


def test_a_policy_that_raises_fails_the_request_it_was_asked_for() -> None:
    """Not the one whose release made room."""
    policy = BrokenPolicy()
    rig = Rig(3, tight(), policy)
    busy = [rig.lease(0.0) for _ in range(3)]
    waiter = wait(rig)
    rig.engine.observe(0.5, busy[0], OK)
    policy.broken = True
    rig.engine.release(1.0, busy[0])
    assert isinstance(waiter.grant, Refusal)
    assert isinstance(waiter.grant.error, RuntimeError)
    assert rig.seen(events.Dequeued)[-1].why == "refused"
    with pytest.raises(RuntimeError, match="policy"):
        rig.engine.acquire(1.0, Want(), unset)
    for lease in busy[1:]:
        rig.finish(2.0, lease)
    assert [state.in_flight for state in rig.engine.members] == [0, 0, 0]


@pytest.mark.parametrize(("configured", "endpoints", "allowed"), [(None, 2, 3), (None, 5, 5), (2, 5, 2)])
def test_attempts_allowed(configured: int | None, endpoints: int, allowed: int) -> None:
    assert Rig(endpoints, Settings(retry=Retry(attempts=configured))).engine.attempts_allowed == allowed


def test_no_attempt_where_nobody_is_eligible() -> None:
    rig = Rig(1, Settings(panic=Panic(fail_closed=True), breaker=Breaker(failures=1)))
    assert ask(rig, 1.0, BROKEN)[0] == Final("no endpoint is eligible")


@pytest.mark.parametrize("paced", [True, False])
def test_a_body_at_its_callers_pace_says_nothing_of_how_fast_an_endpoint_is(paced: bool) -> None:
    """Uploads of slow callers: neither overdue nor slow, however long they take; their failures count."""
    rig = Rig(2, Settings(outlier=Outlier(confirm=0.0)))
    slow, peer = rig.state(0), rig.state(1)
    uploads = [rig.lease(0.0, paced=paced, pin=slow.url) for _ in range(5)]
    now = 0.0
    for _ in range(100):
        rig.request(now, seconds=0.05, pin=peer.url)
        now = rig.tick(now, now + 0.1)
    assert [event.endpoint for event in rig.seen(events.Ejected)] == ([] if paced else [slow.url])
    for upload in uploads[:3]:
        rig.finish(now, upload)
    assert (slow.latency.seconds is None) is paced
    assert [sample.seconds for sample in slow.recent.since(-math.inf)] == [] if paced else [pytest.approx(now)] * 3
    rig.finish(now, uploads[3], BROKEN)
    assert slow.counts.failed == 1

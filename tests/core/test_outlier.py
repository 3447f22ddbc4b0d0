"""Outlier detection: the tests by hand-made evidence, then whole fleets simulated on fake time."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.cluster import Settings
from pathlb.core.config import Breaker, Outlier, Retry
from pathlb.core.endpoints import EndpointState
from pathlb.core.events import Ejected, Returned
from pathlb.core.lease import Lease, Want
from pathlb.core.load import Sample
from pathlb.core.model import Cause, Outcome
from pathlb.core.outlier import Verdict, judge, luck

from .helpers import BROKEN, BUSY, Rig
from .simulation import Distribution, Simulation, constant, exponential, lognormal
from .test_eligibility import make

NOW = 100.0
CONFIG = Outlier(confirm=0.0)
SERVICE: dict[str, Distribution] = {
    "exponential": exponential(0.05),
    "lognormal": lognormal(0.05),
    "constant": constant(0.05),
}


def endpoint(
    number: int,
    *latencies: float,
    failed: int = 0,
    waits: tuple[float, ...] = (),
    retried: bool = False,
    last_head: float = NOW,
    at: float = NOW,
) -> EndpointState:
    """One with these replies just now, this many failures, and attempts that have waited so long."""
    state = make(number)
    for seconds in latencies:
        state.recent.add(Sample(at, False, seconds))
    for _ in range(failed):
        state.recent.add(Sample(at, True, None))
    for wait in sorted(waits, reverse=True):
        want = Want()
        if retried:
            want.failed_on(make(99))
        state.waiting[Lease(state, want, NOW - wait, NOW - wait, "", 1)] = None
    state.recent.last_head = state.recent.last_answered = last_head
    return state


def verdicts(*states: EndpointState, **settings: Any) -> list[tuple[str, str]]:
    config = Outlier(**{"confirm": 0.0} | settings)
    return [(verdict.scope.url, verdict.signal) for verdict in judge(states, NOW, config)]


FAST = [0.045, 0.05, 0.055] * 7
SLOW = [0.45, 0.5, 0.55] * 7


# --- by hand


def test_one_endpoint_is_compared_with_nobody() -> None:
    assert judge([], NOW, CONFIG) == []
    assert verdicts(endpoint(0, *SLOW, failed=30, waits=(9.0,) * 5, last_head=0.0)) == []


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7])
def test_each_signal_fires_with_few_endpoints(count: int) -> None:
    peers = [endpoint(number, *FAST) for number in range(1, count)]
    assert verdicts(endpoint(0, *FAST), *peers) == []
    assert verdicts(endpoint(0, *FAST[:10], failed=20), *peers) == [("http://gw0", "failures")]
    assert verdicts(endpoint(0, *SLOW), *peers) == [("http://gw0", "latency")]
    assert verdicts(endpoint(0, waits=(0.6,) * 3, last_head=NOW - 9), *peers) == [("http://gw0", "stall")]


def test_the_worst_signal_is_named() -> None:
    everything = endpoint(0, *SLOW, failed=20, waits=(9.0,) * 3, last_head=NOW - 9)
    ((verdict),) = judge([everything, endpoint(1, *FAST)], NOW, CONFIG)
    assert verdict == Verdict(everything, "stall", "nothing for 9.00 s with 3 attempts overdue, most take 550 ms")


def test_what_does_not_answer_goes_before_what_is_slow() -> None:
    """Not all of them may be allowed to go."""
    slow, failing = endpoint(0, *SLOW), endpoint(1, *FAST[:10], failed=30)
    hanging, good = endpoint(2, waits=(4.0,) * 3, last_head=NOW - 9), [endpoint(n, *FAST * 2) for n in (3, 4, 5)]
    assert verdicts(slow, failing, hanging, *good) == [
        ("http://gw2", "stall"),
        ("http://gw1", "failures"),
        ("http://gw0", "latency"),
    ]


def test_the_figures_are_given() -> None:
    (failing,) = judge([endpoint(0, *FAST[:10], failed=20), endpoint(1, *FAST)], NOW, CONFIG)
    assert failing.why == "20 of 30 failed, of the peers' 0 of 21"
    (slow,) = judge([endpoint(0, *[0.5] * 20), endpoint(1, *[0.05] * 20)], NOW, CONFIG)
    assert slow.why == "typically 500 ms, the peers 50 ms"


def test_two_bad_ones_do_not_hide_each_other() -> None:
    good = [endpoint(number, *FAST) for number in (2, 3, 4)]
    assert verdicts(endpoint(0, *SLOW), endpoint(1, *SLOW), *good) == [
        ("http://gw0", "latency"),
        ("http://gw1", "latency"),
    ]
    both = [endpoint(number, *FAST[:10], failed=40) for number in (0, 1)]
    assert [signal for _, signal in verdicts(*both, *good)] == ["failures", "failures"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_median_peer_is_found_whatever_the_order(place: int) -> None:
    states = [endpoint(number, *(SLOW if number == place else FAST)) for number in range(3)]
    assert verdicts(*states) == [(f"http://gw{place}", "latency")]


def test_what_all_suffer_is_nobodys_fault() -> None:
    assert verdicts(*(endpoint(number, *SLOW) for number in range(4))) == []
    assert verdicts(*(endpoint(number, *FAST, failed=30) for number in range(4))) == []
    hanging = [endpoint(number, *FAST, waits=(5.0,) * 4, last_head=NOW - 5) for number in range(4)]
    assert verdicts(*hanging) == []


# --- failures


@given(own=st.tuples(st.integers(0, 6), st.integers(0, 6)), peers=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_luck_counts_all_ways(own: tuple[int, int], peers: tuple[int, int]) -> None:
    failed, total = own[0], sum(own)
    others_failed, others = peers[0], sum(peers)
    outcomes = [1] * (failed + others_failed) + [0] * (own[1] + peers[1])
    draws = [sum(draw) >= failed for draw in combinations(outcomes, total)]
    assert luck(failed, total, others_failed, others) == pytest.approx(sum(draws) / len(draws))


def test_the_margin_and_the_minimum() -> None:
    peers = endpoint(1, *FAST * 3)
    assert verdicts(endpoint(0, failed=7), peers) == []
    assert verdicts(endpoint(0, failed=8), peers) == [("http://gw0", "failures")]
    assert verdicts(endpoint(0, failed=8), endpoint(1, *FAST[:7]), failure_sigma=0.0) == []
    assert verdicts(endpoint(0, *FAST * 2, failed=10), peers, failure_sigma=0.0) == []  # 19% is below the margin
    assert verdicts(endpoint(0, *FAST * 2, failed=12), peers, failure_sigma=0.0) == [("http://gw0", "failures")]


def test_luck_is_no_difference() -> None:
    """5 of 10 against 5 of 40: a coincidence that 36,000 comparisons an hour would see often."""
    one, peers = endpoint(0, *FAST[:5], failed=5), endpoint(1, *FAST, *FAST[:14], failed=5)
    assert verdicts(one, peers) == []
    assert verdicts(one, peers, failure_sigma=2.0) == [("http://gw0", "failures")]


def test_old_outcomes_do_not_count() -> None:
    assert verdicts(endpoint(0, failed=20, at=NOW - 10.1), endpoint(1, *FAST * 2)) == []
    assert verdicts(endpoint(0, failed=20, at=NOW - 9.9), endpoint(1, *FAST * 2)) == [("http://gw0", "failures")]


# --- latency


def test_the_factor_and_the_floor() -> None:
    def fires(own: float, peer: float) -> bool:
        return bool(verdicts(endpoint(0, *[own] * 64), endpoint(1, *[peer] * 64)))

    assert not fires(0.28, 0.1)
    assert fires(0.36, 0.1)
    assert not fires(0.049, 0.001)  # 49 times, and nobody would notice
    assert fires(0.06, 0.001)
    assert not fires(0.0, 0.0)


def test_few_samples_need_a_greater_difference() -> None:
    peers = endpoint(1, *[0.05, 0.1] * 30)
    assert verdicts(endpoint(0, *[0.4, 0.8] * 2), peers) == []
    assert verdicts(endpoint(0, *[0.4, 0.8] * 3), peers) == [("http://gw0", "latency")]
    assert verdicts(endpoint(0, *[0.2, 0.4] * 3), peers) == []
    assert verdicts(endpoint(0, *[0.2, 0.4] * 30), peers) == [("http://gw0", "latency")]


def test_regular_figures_are_no_proof_by_themselves() -> None:
    """Five replies that happen to take exactly as long as each other are still only five."""
    peers = endpoint(1, *[0.1] * 20)
    assert verdicts(endpoint(0, *[0.35] * 5), peers) == []
    assert verdicts(endpoint(0, *[0.35] * 20), endpoint(1, *[0.1] * 60)) == []
    assert verdicts(endpoint(0, *[0.5] * 5), peers) == [("http://gw0", "latency")]


def test_fewer_than_ten_replies_tell_nothing_usual() -> None:
    peers = endpoint(1, *[0.05] * 4)
    assert verdicts(endpoint(0, *[0.5] * 5, waits=(60.0,) * 5, last_head=0.0), peers) == []


def test_a_peer_with_few_samples_is_no_peer() -> None:
    assert verdicts(endpoint(0, *SLOW), endpoint(1, *FAST[:4])) == []


def test_attempts_that_wait_longer_than_usual_count() -> None:
    waiting = endpoint(0, *FAST[:2], waits=(0.4,) * 16)
    assert verdicts(waiting, endpoint(1, *FAST)) == [("http://gw0", "latency")]
    barely = endpoint(0, *FAST[:2], waits=(0.04,) * 16)
    assert verdicts(barely, endpoint(1, *FAST)) == []


def test_latency_is_confirmed_and_hysteresis_keeps_the_suspicion() -> None:
    config = Outlier(confirm=0.3)

    def at(now: float, seconds: float) -> list[str]:
        for state, own in ((one, seconds), (peer, 0.05)):
            state.recent.clear()
            for _ in range(30):
                state.recent.add(Sample(now, False, own))
        return [verdict.signal for verdict in judge([one, peer], now, config)]

    one, peer = make(0), make(1)
    assert at(100.0, 0.5) == []
    assert one.ejection.slow_since == 100.0
    assert at(100.2, 0.1) == []  # better, but not below 1.5 times
    assert one.ejection.slow_since == 100.0
    assert at(100.3, 0.5) == ["latency"]
    assert at(100.4, 0.05) == []
    assert one.ejection.slow_since is None
    assert at(100.41, 0.1) == []  # twice as slow: no reason for suspicion
    assert at(100.5, 0.5) == []
    assert at(100.75, 0.5) == []
    assert at(100.76, 0.14) == []  # twice to three times as slow is not enough to begin with, or to go on
    assert at(100.8, 0.5) == ["latency"]


# --- stalls


@pytest.mark.parametrize(("count", "patience"), [(4, 0.5), (3, 0.5), (2, 1.0), (1, 2.0)])
def test_the_more_attempts_hang_the_sooner_it_counts(count: int, patience: float) -> None:
    def fires(waited: float) -> bool:
        hanging = endpoint(0, waits=(waited,) * count, last_head=NOW - 50)
        return bool(verdicts(hanging, endpoint(1, *FAST)))

    assert not fires(patience - 0.01)
    assert fires(patience + 0.01)


def test_after_a_common_pause_nobody_is_condemned_for_not_being_the_first_to_answer() -> None:
    config = Outlier(confirm=0.3)
    late, first = endpoint(0, *FAST, waits=(3.0,) * 4, last_head=NOW - 3), endpoint(1, *FAST)
    assert judge([late, first], NOW, config) == []
    late.recent.answered(NOW + 0.1, NOW - 3)
    assert judge([late, first], NOW + 0.2, config) == []
    late.recent.last_head = NOW - 3
    assert judge([late, first], NOW + 0.3, config) == []  # the answer in between has set back the clock
    first.recent.answered(NOW + 0.6, NOW + 0.5)
    ((verdict),) = judge([late, first], NOW + 0.6, config)
    assert verdict.signal == "stall"


def test_what_is_younger_than_all_that_peers_have_answered_waits_for_what_all_wait_for() -> None:
    peer = endpoint(1, *FAST, last_head=NOW - 2)
    assert verdicts(endpoint(0, waits=(1.9,) * 4, last_head=NOW - 9), peer) == []
    assert verdicts(endpoint(0, waits=(2.1,) * 4, last_head=NOW - 9), peer) == [("http://gw0", "stall")]


def test_the_last_to_have_answered_is_overtaken_by_nobody() -> None:
    """Its own answers are no proof that the others answer."""
    hanging = endpoint(0, waits=(2.1,) * 4, last_head=NOW - 2.05)
    assert verdicts(hanging, endpoint(1, *FAST, last_head=NOW - 3)) == []
    assert verdicts(hanging, endpoint(1, *FAST, last_head=NOW - 2)) == [("http://gw0", "stall")]


def test_a_reply_meanwhile_is_no_silence() -> None:
    assert verdicts(endpoint(0, waits=(9.0,) * 3, last_head=NOW - 0.4), endpoint(1, *FAST)) == []


def test_overdue_is_far_beyond_what_replies_take() -> None:
    """Where one reply in twenty takes 0.4 s, 0.6 s is nothing unusual."""
    peers = endpoint(1, *FAST, *[0.4] * 3)
    assert verdicts(endpoint(0, waits=(0.6,) * 3, last_head=0.0), peers) == []
    assert verdicts(endpoint(0, waits=(1.3,) * 3, last_head=0.0), peers) == [("http://gw0", "stall")]


def test_a_request_that_hangs_everywhere_condemns_nobody() -> None:
    """What failed or was given up elsewhere and is slow again may itself be the reason."""
    assert verdicts(endpoint(0, waits=(9.0,) * 3, retried=True, last_head=0.0), endpoint(1, *FAST)) == []


def test_of_a_pile_up_only_so_many_attempts_are_read() -> None:
    assert verdicts(endpoint(0, waits=(9.0,) * 5000, last_head=0.0), endpoint(1, *FAST)) == [("http://gw0", "stall")]


def test_the_cost_is_linear_in_the_endpoints() -> None:
    """2,000 endpoints, 16 samples each: a comparison of all pairs would take most of a minute."""
    rng = random.Random(1)
    states = [endpoint(number, *[rng.expovariate(20) for _ in range(16)]) for number in range(2000)]
    states[0] = endpoint(0, *SLOW)
    assert ("http://gw0", "latency") in verdicts(*states)


# --- simulated fleets

SIZES = [2, 3, 5, 7]


def change(sim: Simulation, at: float = 10.0, **what: Any) -> Simulation:
    """Run until `at`, then endpoint 0 behaves differently."""
    sim.run(at)
    assert sim.ejected == []
    for name, value in what.items():
        setattr(sim.behaviours[0], name, value)
    return sim


@pytest.mark.parametrize("service", SERVICE)
@pytest.mark.parametrize("count", SIZES)
def test_ten_times_slower_is_out_within_a_second_of_the_evidence(service: str, count: int) -> None:
    """At 400 requests/s: its first slow replies come half a second after the change."""
    for seed in range(3):
        sim = change(Simulation(count, 400, SERVICE[service], seed), factor=10.0)
        sim.run(11.5 if service != "exponential" else 12.0)
        assert [event.endpoint for event in sim.ejected] == ["http://gw0"]
        assert sim.ejected[0].signal in ("latency", "stall")


@pytest.mark.parametrize("service", SERVICE)
def test_ten_times_slower_at_little_traffic_takes_the_replies_it_takes(service: str) -> None:
    sim = change(Simulation(5, 50, SERVICE[service], 1), factor=10.0)
    sim.run(18.0)
    assert [event.endpoint for event in sim.ejected] == ["http://gw0"]


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("rate", "within"), [(50, 12.0), (400, 2.0)])
def test_failing_30_percent_against_1(count: int, rate: float, within: float) -> None:
    """The breaker is told to stay out of it."""
    settings = Settings(breaker=Breaker(failures=10_000, min_requests=10_000))
    sim = Simulation(count, rate, SERVICE["exponential"], 3, settings)
    for behaviour in sim.behaviours:
        behaviour.failure_rate = 0.01
    change(sim, 20.0, failure_rate=0.3).run(20.0 + within)
    assert [(event.endpoint, event.signal) for event in sim.ejected] == [("http://gw0", "failures")]


@pytest.mark.parametrize("service", ["exponential", "lognormal"])
@pytest.mark.parametrize("rate", [50, 400])
@pytest.mark.parametrize("trouble", ["none", "all fail", "all slow", "load doubles", "all pause for 3 s"])
def test_nobody_is_ejected_for_what_all_share(service: str, rate: float, trouble: str) -> None:
    settings = Settings(breaker=Breaker(failures=10_000, min_requests=10_000))
    for seed in range(2):
        sim = Simulation(5, rate, SERVICE[service], 10 + seed, settings)
        sim.run(10.0)
        if trouble == "load doubles":
            sim.rate *= 2
        for behaviour in sim.behaviours:
            behaviour.failure_rate = 0.3 if trouble == "all fail" else 0.0
            behaviour.factor = {"all slow": 10.0, "load doubles": 3.0}.get(trouble, 1.0)
            behaviour.paused_until = 13.0 if trouble == "all pause for 3 s" else 0.0
        sim.run(20.0 if rate == 400 else 60.0)
        assert sim.ejected == []


@pytest.mark.parametrize("service", SERVICE)
@pytest.mark.parametrize(
    ("count", "rate", "within"), [(2, 50, 1.1), (3, 50, 1.4), (5, 50, 2.6), (5, 400, 0.9), (7, 400, 0.9)]
)
def test_a_hanging_endpoint_is_noticed_while_it_hangs(service: str, count: int, rate: float, within: float) -> None:
    """Its attempts are given up, paid for and answered elsewhere; nobody waits for the timeout."""
    sim = change(Simulation(count, rate, SERVICE[service], 2), hangs=True)
    before = sim.engine.snapshot(10.0, lambda url: "").retry_budget
    hanging = sim.engine.members[0]
    sim.run(10.0 + within)
    assert [event.endpoint for event in sim.ejected] == ["http://gw0"]
    assert sim.ejected[0].signal in ("stall", "latency")
    assert sim.given_up > 0
    assert (hanging.in_flight, len(hanging.waiting)) == (0, 0)
    assert hanging.counts.ignored == sim.given_up
    after = sim.engine.snapshot(sim.now, lambda url: "").retry_budget
    earned = sim.settings.retry.budget_ratio * within * rate * 2
    assert after <= before - sim.given_up + earned
    sim.run(19.0)
    assert sim.lost == 0
    assert max(seconds for at, seconds in sim.latencies if at > 10.0) < within + 1.0


def test_on_average_a_hang_is_noticed_within_about_a_second_at_50_requests_per_second() -> None:
    took = []
    for seed in range(10):
        sim = change(Simulation(5, 50, SERVICE["exponential"], seed), hangs=True)
        sim.run(13.0)
        took.append(sim.ejected[0].at - 10.0)
    assert sum(took) / len(took) < 1.5


def test_without_budget_hanging_attempts_stay() -> None:
    settings = Settings(retry=Retry(budget_ratio=0.0, budget_reserve=0.0))
    sim = change(Simulation(5, 100, SERVICE["exponential"], 2, settings), hangs=True)
    sim.run(13.0)
    assert [event.signal for event in sim.ejected] == ["stall"]
    assert sim.given_up == 0


@pytest.mark.parametrize("service", SERVICE)
@pytest.mark.parametrize("rate", [50, 400])
def test_a_stall_of_this_process_condemns_nobody(service: str, rate: float) -> None:
    for seconds in (0.5, 5.0):
        sim = Simulation(5, rate, SERVICE[service], 4)
        sim.run(10.0)
        sim.stall(seconds)
        sim.run(10.0 + seconds + 5.0)
        assert sim.ejected == []
        assert sim.opened == []
        assert sim.given_up == 0
        latency = [state.latency.seconds for state in sim.engine.members]
        assert max(one for one in latency if one is not None) < 0.2


def test_one_is_left_in_service_whatever_share_may_go() -> None:
    rig = Rig(2, Settings(outlier=Outlier(max_ejected=1.0, confirm=0.0)))
    failing, hanging = rig.engine.members
    for state, number in ((failing, 0), (hanging, 1)):
        stand_in = endpoint(number, *FAST[:10], failed=40 * (number == 0), waits=(4.0,) * 3 * number, at=NOW - 5)
        state.recent, state.waiting = stand_in.recent, stand_in.waiting
    failing.recent.last_answered, hanging.recent.last_head = NOW, NOW - 5
    assert len(judge([failing, hanging], NOW, CONFIG)) == 2
    rig.engine.tick(NOW)
    assert [event.endpoint for event in rig.seen(Ejected)] == ["http://gw1"]


def test_one_that_returns_is_judged_on_what_it_does_from_then_on() -> None:
    rig = Rig(2, Settings(outlier=Outlier(eject_for=1.0, jitter=0.0)))
    for number, cause in ((0, Cause.BEYOND), (1, Cause.OK)):
        for _ in range(30):
            rig.request(0.0, Outcome(cause), pin=f"http://gw{number}")
    rig.tick(0.0, 5.0)
    assert [event.endpoint for event in rig.seen(Ejected)] == ["http://gw0"]
    assert len(rig.seen(Returned)) == 1


@pytest.mark.parametrize(("share", "most"), [(0.5, 3), (0.3, 2), (1e-6, 1), (1.0, 6)])
def test_no_more_than_the_maximum_share_is_out(share: float, most: int) -> None:
    settings = Settings(outlier=Outlier(max_ejected=share), breaker=Breaker(failures=10_000, min_requests=10_000))
    sim = Simulation(7, 400, SERVICE["exponential"], 5, settings)
    sim.run(5.0)
    for number, behaviour in enumerate(sim.behaviours):
        if number < 6:
            behaviour.failure_rate = 0.5 + number / 20
    out = 0
    for step in range(100):
        sim.run(5.0 + step / 10)
        out = max(out, len(sim.out_now()))
        assert len(sim.out_now()) <= most
    assert out == most or share == 1.0


def test_no_flapping_at_a_steady_ratio_below_the_factor() -> None:
    for service in SERVICE:
        for rate in (50, 400):
            sim = Simulation(5, rate, SERVICE[service], 6)
            sim.behaviours[0].factor = 2.5
            sim.run(80.0 if rate == 50 else 15.0)
            assert sim.ejected == [], (service, rate)


def test_ejections_of_one_that_stays_bad_grow_and_are_forgotten_by_one_that_mends() -> None:
    sim = change(Simulation(3, 150, SERVICE["constant"], 7), factor=10.0)
    sim.run(70.0)
    assert len(sim.ejected) >= 3
    for number, event in enumerate(sim.ejected, 1):
        assert 10.0 * number <= event.seconds <= 12.0 * number
    state = sim.engine.members[0]
    recent = state.ejection.recent
    assert recent == len(sim.ejected)
    sim.behaviours[0].factor = 1.0
    sim.run(sim.ejected[-1].at + sim.ejected[-1].seconds + 1.0)
    assert state.ejection.recent == recent
    sim.run(sim.now + 10.0 * recent)
    assert state.ejection.recent == 0
    assert math.isinf(state.ejection.forget_at)


def test_the_longest_ejection() -> None:
    sim = change(
        Simulation(3, 200, SERVICE["constant"], 7, Settings(outlier=Outlier(eject_max=12.0, jitter=0.0))), factor=10.0
    )
    sim.run(60.0)
    assert [event.seconds for event in sim.ejected][:3] == [10.0, 12.0, 12.0]


def test_back_from_an_ejection_on_the_ramp() -> None:
    sim = Simulation(5, 400, SERVICE["exponential"], 8)
    sim.keep_picks = True
    change(sim, hangs=True).run(15.0)
    sim.behaviours[0].hangs = False
    back = sim.ejected[0].at + sim.ejected[0].seconds
    sim.run(back + 15.0)
    assert len(sim.ejected) == len(sim.returned) == 1
    assert sim.share(0, 15.0, back) == 0
    early, middle, late = (sim.share(0, back + t, back + t + 2.0) for t in (0.0, 4.0, 12.0))
    assert early < 0.08 < middle < 0.2
    assert 0.15 < late < 0.25


@pytest.mark.parametrize("outcome", [BROKEN, BUSY], ids=["500", "429"])
@pytest.mark.parametrize("seconds", [0.0005, 0.0025])
@pytest.mark.parametrize(("count", "rate"), [(2, 100), (5, 50), (5, 400), (7, 400)])
def test_a_fast_failing_endpoint_draws_no_traffic(outcome: Any, seconds: float, count: int, rate: float) -> None:
    """At most 2/N of the picks in the first second, at most 1% after five (probes aside)."""
    sim = Simulation(count, rate, SERVICE["exponential"], 9)
    sim.keep_picks = True
    change(sim, failure_rate=1.0, failure=outcome, failure_seconds=seconds).run(40.0)
    assert sim.share(0, 10.0, 11.0) <= 2 / count
    assert sim.share(0, 11.0, 12.0) <= 2 / count
    assert sim.share(0, 15.0, 40.0, probes=False) <= 0.01
    assert sim.share(0, 15.0, 40.0) <= 0.015
    assert sim.lost == 0
    assert (len(sim.opened) > 0) == (outcome is BROKEN)  # overload is not death

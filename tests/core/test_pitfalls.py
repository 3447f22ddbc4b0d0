"""The pitfalls of load balancers that live in the core, one regression test each (numbers as in reference/peers.md)."""

from __future__ import annotations

import random

import pytest

from pathlb.core import events
from pathlb.core.breaker import BreakerState
from pathlb.core.cluster import Settings
from pathlb.core.config import Breaker, Limits, Retry
from pathlb.core.eligibility import Standing, standing
from pathlb.core.endpoints import check_endpoints
from pathlb.core.engine import Engine
from pathlb.core.lease import Lease, Want
from pathlb.core.policy import P2C, LeastConnections, RoundRobin
from pathlb.core.retry import Again, Final

from .helpers import BROKEN, BUSY, CANCELLED, OK, Rig, unset, urls
from .simulation import Simulation, exponential


@pytest.mark.parametrize("policy", [LeastConnections, P2C, RoundRobin])
def test_pitfall_01_fast_fail_black_hole(policy: type) -> None:
    """1. Fast-fail black hole: latency or in-flight policies reward fast errors; a server failing 20x faster drew 99%
    of traffic.
    """
    sim = Simulation(5, 400, exponential(0.05), 1, policy=policy())
    sim.keep_picks = True
    sim.run(10.0)
    failing = sim.behaviours[0]
    failing.failure_rate, failing.failure_seconds = 1.0, 0.0025
    sim.run(30.0)
    assert sim.share(0, 10.0, 11.0) <= 2 / 5
    assert sim.share(0, 15.0, 30.0, probes=False) <= 0.01
    assert sim.engine.members[0].latency.seconds is None or sim.engine.members[0].latency.seconds > 0.02
    assert sim.lost == 0


def test_pitfall_02_stale_starvation() -> None:
    """2. Stale starvation: an estimate that never decays means a once-slow host is never tried again."""
    sim = Simulation(5, 400, exponential(0.05), 2)
    sim.keep_picks = True
    sim.run(5.0)
    sim.behaviours[0].factor = 20.0
    sim.run(12.0)
    assert [event.endpoint for event in sim.ejected] == ["http://gw0"]
    sim.behaviours[0].factor = 1.0
    sim.run(50.0)
    assert 0.15 < sim.share(0, 40.0, 50.0) < 0.25
    assert len(sim.ejected) == 1
    estimate = sim.engine.members[0].latency
    estimate.seconds = 10.0  # remembered as very slow: a minute of silence, and one reply outweighs it
    estimate.record(sim.now + 60.0, 0.05)
    assert estimate.seconds < 0.1


def test_pitfall_03_connecting_requests_are_counted() -> None:
    """3. Connecting requests invisible to the counter: 300 ms connects, 13 requests against 3. Count at pick."""
    rig = Rig(2)
    leases = [rig.lease(0.0) for _ in range(16)]  # none has connected, let alone answered
    assert [state.in_flight for state in rig.engine.members] == [8, 8]
    rig.finish(0.3, leases[0])
    assert sorted(state.in_flight for state in rig.engine.members) == [7, 8]


def test_pitfall_04_counter_leaks() -> None:
    """4. Counter leaks on cancel, on endpoint flap, on a dropped body."""
    rig = Rig(2, Settings(limits=Limits(concurrency=2, queue=4)))
    rng = random.Random(4)
    held: list[Lease] = []
    seen = {state.url: [state] for state in rig.engine.members}
    for step in range(2000):
        now = step / 100
        grant = rig.engine.acquire(now, Want(), unset)
        if isinstance(grant, Lease):
            held.append(grant)
        elif hasattr(grant, "settle"):
            rig.engine.leave_queue(now, grant, "cancelled")
            if isinstance(grant.grant, Lease):
                held.append(grant.grant)
        if rng.random() < 0.6 and held:
            lease = held.pop(rng.randrange(len(held)))
            if rng.random() < 0.5:
                rig.finish(now, lease, CANCELLED)  # before its head
            else:
                rig.engine.observe(now, lease, OK)
                rig.engine.fail_body(now, lease, BROKEN)  # dropped half-way
                rig.engine.release(now, lease)
        if step % 50 == 0:
            rig.engine.apply(now, check_endpoints(urls(1 + step // 50 % 3)))
        for state in rig.engine.members:
            seen.setdefault(state.url, [])
            if state not in seen[state.url]:
                seen[state.url].append(state)
            assert state.in_flight == sum(lease.endpoint is state for lease in held)
    for lease in held:
        rig.finish(20.0, lease, CANCELLED)
    assert all(state.in_flight == 0 and not state.waiting for states in seen.values() for state in states)
    assert not rig.engine.busy


def test_pitfall_05_budget_does_not_shrink_because_requests_fail() -> None:
    """5. Budget denominators that shrink as requests fail."""

    def retries(failure_rate: float) -> int:
        settings = Settings(
            retry=Retry(budget_reserve=0.0, budget_ratio=0.2, attempts=2),
            breaker=Breaker(failures=10_000, min_requests=10_000),
            outlier=None,
        )
        sim = Simulation(3, 100, exponential(0.01), 5, settings)
        made: list[events.Retried] = []
        sim.engine.subscribe(lambda event: made.append(event) if isinstance(event, events.Retried) else None)
        for behaviour in sim.behaviours:
            behaviour.failure_rate = failure_rate
        sim.run(20.0)
        return len(made)

    requests = 100 * 20
    assert retries(0.5) == pytest.approx(0.2 * requests, rel=0.15)
    assert retries(1.0) == pytest.approx(0.2 * requests, rel=0.15)


def test_pitfall_06_a_retry_goes_elsewhere() -> None:
    """6. Retry that hits the same host."""
    for policy in (LeastConnections(), RoundRobin(), P2C()):
        rig = Rig(4, Settings(outlier=None, retry=Retry(budget_reserve=100.0)), policy)
        for start in range(20):
            want = Want(resendable=True)
            tried = []
            for attempt in range(1, 5):
                lease = rig.lease(float(start), want)
                tried.append(lease.endpoint.url)
                rig.finish(float(start), lease, BUSY)
                want.failed_on(lease.endpoint)
                decision = rig.engine.decide(
                    float(start), lease, BUSY, attempts=attempt, unsent=0, replayable=True, deadline=start + 30.0
                )
                assert decision == (Again(0.0) if attempt < 4 else Final("no attempts are left"))
            assert sorted(tried) == urls(4)


def test_pitfall_07_each_failure_is_charged_to_the_host_that_failed() -> None:
    """7. Every failure charged to the last host instead of the one that failed."""
    rig = Rig(3)
    for _ in range(5):
        want = Want(resendable=True, pin="http://gw0")
        first = rig.lease(1.0, want)
        second = rig.lease(1.0, resendable=True, pin="http://gw1")
        rig.finish(1.1, second, OK)
        rig.finish(1.2, first, BROKEN)  # ends last, began first
        want.failed_on(first.endpoint)
        want.pin = None
        again = rig.lease(1.2, want)
        assert again.endpoint is not first.endpoint
        rig.finish(1.3, again, OK)
    failed = [(state.counts.failed, state.breaker.consecutive_failures) for state in rig.engine.members]
    assert failed == [(5, 5), (0, 0), (0, 0)]
    assert [state.breaker.state for state in rig.engine.members] == [
        BreakerState.OPEN,
        BreakerState.CLOSED,
        BreakerState.CLOSED,
    ]


@pytest.mark.parametrize("way_out", ["ejection", "breaker", "drain"])
def test_pitfall_08_recovery_herd(way_out: str) -> None:
    """8. Recovery herd: a host back from ejection gets its full share at once."""
    sim = Simulation(5, 400, exponential(0.05), 8)
    sim.keep_picks = True
    sim.run(5.0)
    state = sim.engine.members[0]
    if way_out == "drain":
        sim.engine.drain(5.0, state.url)
        sim.run(10.0)
        sim.engine.undrain(10.0, state.url)
    else:
        sim.behaviours[0].hangs = way_out == "ejection"
        sim.behaviours[0].failure_rate = 1.0 if way_out == "breaker" else 0.0
        sim.run(8.0)
        sim.behaviours[0].hangs, sim.behaviours[0].failure_rate = False, 0.0
    while standing(state) is not Standing.SLOW_START:
        sim.run(sim.now + 0.05)
    back = sim.now
    assert state.weight < 0.12
    sim.run(back + 14.0)
    assert sim.share(0, back, back + 1.0) < 0.08
    assert sim.share(0, back + 1.0, back + 3.0) < 0.12
    assert sim.share(0, back + 11.0, back + 14.0) > 0.15


def test_pitfall_09_429_is_load_and_not_death() -> None:
    """9. 429 marks a host dead. It counts as load, not as death."""
    rig = Rig(2)
    for _ in range(50):
        rig.request(1.0, BUSY, pin="http://gw0")
    state = rig.state(0)
    assert (state.breaker.state, state.breaker.consecutive_failures) == (BreakerState.CLOSED, 0)
    assert (state.counts.overloaded, state.counts.failed, state.recent.since(0.0)) == (50, 0, [])
    assert standing(state) is Standing.THROTTLED
    assert rig.request(1.0).url == "http://gw1"  # the load goes elsewhere
    rig.request(1.0, BUSY, pin="http://gw1")
    assert not rig.lease(1.0).panic  # and when all are busy they are still used, as what they are
    rig.tick(1.0, 10.0)
    assert standing(state) is Standing.READY
    assert state.weight == 1.0
    assert not rig.seen(events.Ejected)


def test_pitfall_12_own_stalls_are_not_the_hosts_latency() -> None:
    """12. Event-loop stalls in the client look like slow hosts: subtract, and never eject on them."""
    sim = Simulation(5, 200, exponential(0.05), 12)
    for start in (5.0, 15.0, 25.0):
        sim.run(start)
        sim.stall(5.0)
    sim.run(35.0)
    assert sim.ejected == []
    assert sim.opened == []
    assert sim.given_up == 0
    for state in sim.engine.members:
        assert state.latency.seconds == pytest.approx(0.05, abs=0.03)


def test_pitfall_13_every_pick_is_explained() -> None:
    """13. "Least-request looks uneven": ship an explanation of each pick."""
    rig = Rig(3, Settings(breaker=Breaker(failures=1)))
    rig.events.clear()
    busy = rig.lease(0.0, pin="http://gw1")
    chosen = rig.lease(0.1, avoid=frozenset({"http://gw0"}))
    picks = rig.seen(events.Picked)
    assert picks[0] == events.Picked(0.0, "http://gw1", "pinned", 0, 1)
    assert picks[1] == events.Picked(0.1, "http://gw2", "least connections", 0, 2)
    assert (busy.reason, chosen.reason, chosen.candidates, chosen.in_flight) == ("pinned", "least connections", 2, 0)
    for number in (0, 1, 2):
        rig.fail(number, 1.0, 1)
    reasons = [rig.lease(1.1).reason]
    rig.tick(1.1, 2.2)
    reasons.append(rig.lease(2.2, resendable=True).reason)
    assert reasons == ["panic", "probe"]
    opened = [event for event in rig.seen(events.BreakerChanged) if event.after == "open"]
    assert {event.why for event in opened} == {"1 failures in a row"}


def test_the_same_seed_gives_the_same_picks() -> None:
    def picks(seed: int) -> list[str]:
        engine = Engine(Settings(), LeastConnections(), random.Random(seed))
        engine.apply(0.0, check_endpoints(urls(5)))
        made = []
        for _ in range(200):
            lease = engine.acquire(0.0, Want(), unset)
            assert isinstance(lease, Lease)
            made.append(lease.endpoint.url)
        return made

    assert picks(1) == picks(1)
    assert picks(1) != picks(2)

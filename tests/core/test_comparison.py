"""Endpoint or service: what stands out where the traffic is of several. By hand, then whole fleets simulated."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from pathlb.core.breaker import BreakerState
from pathlb.core.cluster import Settings
from pathlb.core.comparison import Judge, active_keys
from pathlb.core.config import Breaker, Outlier
from pathlb.core.eligibility import standing
from pathlb.core.endpoints import EndpointState
from pathlb.core.events import BreakerChanged, Ejected
from pathlb.core.health import HealthState
from pathlb.core.lease import Lease, Want
from pathlb.core.load import Sample
from pathlb.core.model import Cause, Outcome
from pathlb.core.scope import Scope

from .helpers import OK, Rig
from .simulation import Behaviour, Service, Simulation, constant, exponential, lognormal
from .test_eligibility import breaker, make

NOW = 100.0
CONFIG = Outlier(confirm=0.0)
BEYOND = Outcome(Cause.BEYOND, retry=True, once=True, status=500)
STAY_OUT = Breaker(failures=10_000, min_requests=10_000)


def did(
    state: EndpointState,
    key: str | None,
    *latencies: float,
    failed: int = 0,
    waits: tuple[float, ...] = (),
    at: float = NOW,
    last_head: float | None = None,
) -> EndpointState:
    """What an endpoint did for a service, on top of what it did before."""
    scopes: list[Scope] = [state]
    if key is not None:
        if key not in state.scopes:
            state.scopes[key] = Scope(HealthState(probed=False))
            state.scopes[key].breaker = breaker()
        scopes.append(state.scopes[key])
    for scope in scopes:
        for seconds in latencies:
            scope.recent.add(Sample(at, False, seconds, key))
            scope.recent.answered(at, at - seconds)
        for _ in range(failed):
            scope.recent.add(Sample(at, True, None, key))
        if last_head is not None:
            scope.recent.last_head = scope.recent.last_answered = last_head
    for wait in sorted(waits, reverse=True):
        lease = Lease(state, Want(key=key), NOW - wait, NOW - wait, "", 1)
        lease.scope = state.scopes[key] if key is not None else None
        for scope in scopes:
            scope.waiting[lease] = None
    return state


def fleet(**services: list[float]) -> list[EndpointState]:
    """Four endpoints, gw1 to gw4, that took so long for these services just now."""
    states = [make(number) for number in range(1, 5)]
    for state in states:
        for key, latencies in services.items():
            did(state, key, *latencies)
    return states


def found(*states: EndpointState, times: int = 1, **settings: Any) -> list[tuple[str, str | None, str]]:
    judge = Judge(Outlier(**{"confirm": 0.0} | settings))
    for _ in range(times):
        findings = judge.compare(states, NOW)
    return [(state.url[-3:], key, verdict.signal) for state, key, verdict in findings]


FAST = [0.045, 0.05, 0.055] * 7
TEN_TIMES = [0.45, 0.5, 0.55] * 7


# --- by hand


def test_nobody_to_compare() -> None:
    assert found() == found(did(did(make(0), "eth", *TEN_TIMES), "btc", *FAST)) == []


def badly(state: EndpointState, key: str | None, signal: str) -> EndpointState:
    """It does something badly enough to be noticed, by that signal."""
    if signal == "latency":
        return did(state, key, *TEN_TIMES)
    if signal == "failures":
        return did(state, key, *FAST[:10], failed=30)
    return did(state, key, waits=(3.0,) * 4, last_head=NOW - 9)


SIGNALS = pytest.mark.parametrize("signal", ["latency", "failures", "stall"])


@SIGNALS
def test_one_service_stands_out(signal: str) -> None:
    one = badly(did(make(0), "btc", *FAST), "eth", signal)
    one.recent.last_head = one.recent.last_answered = NOW
    assert found(one, *fleet(eth=FAST, btc=FAST)) == [("gw0", "eth", signal)]


@SIGNALS
def test_all_services_stand_out(signal: str) -> None:
    one = badly(badly(make(0), "eth", signal), "btc", signal)
    assert found(one, *fleet(eth=FAST, btc=FAST)) == [("gw0", None, signal)]


def test_too_little_of_each_service_but_enough_of_all() -> None:
    """Twenty services, of which none is asked for often enough to be judged by itself."""
    keys = [f"service-{number}" for number in range(20)]
    peers = fleet()
    for state in peers:
        for key in keys:
            did(state, key, *[0.05] * 3, at=NOW - 50)
            did(state, key, *[0.05] * 2)
    slow, failing, hanging = make(0), make(0), make(0)
    for key in keys:
        did(slow, key, *[0.5] * 2)
        did(failing, key, 0.05, failed=1)
        did(hanging, key, waits=(3.0,), last_head=NOW - 9)
    assert found(slow, *peers) == [("gw0", None, "latency")]
    assert found(failing, *peers, failure_sigma=3.0) == [("gw0", None, "failures")]
    assert found(hanging, *peers) == [("gw0", None, "stall")]


def test_what_is_usual_for_a_rare_service_is_remembered() -> None:
    """One gets the slow ones of them alone, each too rare to tell by the last seconds what is usual for it."""
    slow, fast = [f"slow-{number}" for number in range(12)], [f"fast-{number}" for number in range(12)]
    peers = fleet(**dict.fromkeys(fast, [0.05] * 2))
    for longer_ago, findings in ((0, [("gw0", None, "latency")]), (10, [])):
        one = make(0)
        for key in slow:
            did(one, key, *[5.0] * longer_ago, at=NOW - 50)
            did(one, key, *[5.0] * 2)
        assert found(one, *peers, times=9) == findings


def test_services_nothing_is_known_of_are_compared_as_one() -> None:
    """Every request has a key of its own."""
    states = [make(number) for number in range(3)]
    for number, state in enumerate(states):
        for request in range(30):
            did(state, f"made-up-{number}-{request}", 0.5 if number == 0 else 0.05)
    assert found(*states) == [("gw0", None, "latency")]


def test_a_mix_of_slow_and_fast_accuses_nobody() -> None:
    """One gets the slow service nearly alone, which a comparison of everything with everything holds against it."""
    peers = fleet(fast=FAST, slow=[5.0] * 4)
    one = did(did(make(0), "fast", *FAST[:2]), "slow", *[5.0] * 30)
    assert found(one, *peers) == []
    did(one, "slow", waits=(6.0, 5.5), last_head=NOW - 5.2)
    assert found(one, *peers) == []
    everything = [make(0), *(make(number) for number in range(1, 5))]
    for state, of in zip(everything, [one, *peers], strict=True):
        for sample in of.recent.since(0.0):
            did(state, None, sample.seconds or 0.0)
    assert found(*everything) == [("gw0", None, "latency")]


def test_slower_than_peers_by_what_is_usual_for_the_service() -> None:
    """Ten times slower in all it does, whatever its mix; the figures are those of its own mix."""
    peers = fleet(fast=[0.05] * 20, slow=[1.0] * 20)
    one = did(did(make(0), "fast", *[0.5] * 9), "slow", *[10.0] * 9)
    (finding,) = Judge(CONFIG).compare([one, *peers], NOW)
    assert (finding[1], finding[2].why) == (None, "typically 2236 ms, the peers 224 ms")


def test_the_floor_holds_for_a_mix_too() -> None:
    """Forty times slower, but nobody would notice."""
    one = did(did(make(0), "eth", *[0.04] * 20), "btc", *[0.04] * 20)
    assert found(one, *fleet(eth=[0.001] * 20, btc=[0.001] * 20)) == []


def test_a_service_that_fails_everywhere_accuses_nobody() -> None:
    """Not even the one that gets the most of it."""
    peers = fleet(eth=FAST)
    for state in peers:
        did(state, "btc", failed=4)
    one = did(did(make(0), "eth", *FAST[:9]), "btc", failed=30)
    assert found(one, *peers) == []
    plain = [did(did(make(n), None, *FAST[: 9 if n == 0 else 21]), None, failed=30 if n == 0 else 4) for n in range(5)]
    assert found(*plain) == [("gw0", None, "failures")]


def test_several_services_that_fail_everywhere_accuse_nobody() -> None:
    peers = fleet(eth=FAST)
    for state in peers:
        did(did(state, "btc", failed=2), "doge", failed=2)
    assert found(did(did(did(make(0), "eth", *FAST[:9]), "btc", failed=20), "doge", failed=20), *peers) == []


def test_what_only_one_is_asked_for_is_compared_with_nothing() -> None:
    """Or with next to nothing, which tells no more for what else the peers did."""
    peers = fleet(eth=FAST)
    assert found(did(did(make(0), "eth", *FAST), "pinned", failed=40), *peers) == []
    did(did(peers[0], "pinned", 0.05), "held", 0.05)
    assert found(did(did(did(make(0), "eth", *FAST[:6]), "pinned", failed=25), "held", failed=25), *peers) == []


@pytest.mark.parametrize(
    ("share", "hanging", "whole"), [(0.5, 2, False), (0.5, 3, True), (0.3, 2, True), (0.6, 2, True)]
)
def test_that_few_services_hang_is_told_from_that_only_they_were_asked_for(
    share: float, hanging: int, whole: bool
) -> None:
    """Nothing has come back since. If only they hung, all the last requests would have been for them by coincidence."""
    before = round(30 * share)
    services = {"eth": before, "btc": before, "doge": 30 - before, "sol": 30 - before}
    peers = fleet(**{key: [0.05] * count for key, count in services.items()})
    one = make(0)
    for key, count in services.items():
        did(one, key, *[0.05] * count, at=NOW - 1.6)
    for key in ["eth", "btc", "eth"][:hanging]:
        did(one, key, waits=(1.4,))
    assert found(one, *peers) == ([("gw0", None, "stall")] if whole else [])


def test_services_that_hang_while_another_answers() -> None:
    peers = fleet(eth=FAST, btc=FAST, sol=FAST)
    one = did(did(did(make(0), "eth", *FAST[:5]), "btc", *FAST[:5]), "sol", *FAST)
    for key in ("eth", "btc"):
        did(one, key, waits=(3.0, 2.9), last_head=NOW - 5)
    one.recent.last_head, one.recent.last_answered = NOW - 0.7, NOW - 0.75
    assert found(one, *peers) == [("gw0", "eth", "stall"), ("gw0", "btc", "stall")]


def test_a_heavy_service_that_makes_the_whole_stand_out_is_not_the_whole() -> None:
    """Nine in ten requests are for it. It is not accused itself yet: the whole has to wait for that."""
    peers = fleet(heavy=FAST * 3, light=FAST[:7])
    one = did(did(make(0), "light", *FAST[:7]), "heavy", *TEN_TIMES)
    assert found(one, *peers) == [("gw0", "heavy", "latency")]
    one.scopes["heavy"].recent.clear()
    assert found(one, *peers) == []
    failing = did(did(make(0), "light", *FAST[:7]), "heavy", *FAST, failed=40)
    failing.scopes["heavy"].recent.clear()
    assert found(failing, *peers) == []
    hanging = did(did(make(0), "light", *FAST[:7]), "heavy", waits=(3.0,) * 5, last_head=NOW - 9)
    hanging.scopes["heavy"].waiting.clear()
    assert found(hanging, *peers) == []
    did(hanging, "light", waits=(3.0,), last_head=NOW - 9)
    assert found(hanging, *peers) == [("gw0", None, "stall")]


@SIGNALS
def test_requests_without_a_key_are_about_the_endpoint(signal: str) -> None:
    peers = fleet(eth=FAST, btc=FAST)
    for state in peers:
        did(state, None, *FAST)
    one = badly(did(did(make(0), "eth", *FAST[:2]), "btc", *FAST[:2]), None, signal)
    assert found(one, *peers) == [("gw0", None, signal)]


def test_a_service_accused_where_nothing_else_is_asked_for_is_the_endpoint() -> None:
    peers = fleet(eth=FAST, btc=FAST)
    one = did(make(0), "eth", *TEN_TIMES)
    one.recent.clear()
    assert found(one, *peers) == [("gw0", None, "latency")]
    did(one, "btc", *FAST[:4])
    assert found(one, *peers) == [("gw0", None, "latency")]
    did(one, "btc", failed=3)  # failures do not speak for it
    assert found(one, *peers) == [("gw0", None, "latency")]
    did(one, None, 0.05)
    assert found(one, *peers) == [("gw0", "eth", "latency")]


def test_what_is_out_does_not_speak_for_an_endpoint() -> None:
    peers = fleet(eth=FAST, btc=FAST)
    one = did(did(make(0), "eth", *TEN_TIMES), "btc", *FAST)
    one.recent.clear()
    assert found(one, *peers) == [("gw0", "eth", "latency")]
    one.scopes["btc"].ejection.until = NOW + 5
    assert found(one, *peers) == [("gw0", None, "latency")]


def test_a_service_accused_before_is_accused_again_where_nothing_speaks_for_the_endpoint() -> None:
    """One that hangs holds so many requests that others are not sent there."""
    peers = fleet(eth=FAST, btc=FAST)
    one = did(make(0), "eth", *TEN_TIMES)
    one.recent.clear()
    one.scopes["eth"].ejection.recent = 1
    assert found(one, *peers) == [("gw0", "eth", "latency")]


def test_services_that_are_out_are_not_judged() -> None:
    peers = fleet(eth=FAST, btc=FAST)
    for how in ("breaker", "ejection", "health"):
        one = did(did(make(0), "eth", *TEN_TIMES), "btc", *FAST)
        one.recent.clear()
        eth = one.scopes["eth"]
        if how == "breaker":
            eth.breaker.state = BreakerState.OPEN
        elif how == "ejection":
            eth.ejection.until = NOW + 5
        else:
            eth.health.record(False, "")
        assert found(one, *peers) == []


def test_what_waits_for_an_ejected_service_does_not_accuse_the_endpoint() -> None:
    """However much of it there is."""
    peers = fleet(eth=FAST, btc=FAST)
    one = did(did(make(0), "btc", *FAST), "eth", waits=(9.0,) * 300, last_head=NOW - 9)
    one.scopes["eth"].ejection.until = NOW + 5
    assert found(one, *peers) == []
    for state in (one, *peers):
        del state.scopes["btc"]  # no other service: the plain comparison
    assert found(one, *peers) == []
    did(one, None, waits=(3.0,) * 4, last_head=NOW - 9)
    assert found(one, *peers) == [("gw0", None, "stall")]


def test_the_surest_signal_comes_first() -> None:
    peers = fleet(eth=FAST * 2, btc=FAST * 2)[2:]
    slow = did(did(make(0), "eth", *TEN_TIMES), "btc", *FAST)
    hanging = did(did(make(1), "btc", *FAST), "eth", waits=(3.0,) * 4, last_head=NOW - 9)
    failing = did(did(make(2), "btc", *FAST), "eth", *FAST[:10], failed=30)
    hanging.recent.last_head = NOW
    assert found(slow, hanging, failing, *peers) == [
        ("gw1", "eth", "stall"),
        ("gw2", "eth", "failures"),
        ("gw0", "eth", "latency"),
    ]


def test_luck_has_as_many_chances_as_there_are_services() -> None:
    def states(others: int) -> list[EndpointState]:
        peers = [did(make(number), "eth", *[0.05, 0.1] * 30) for number in (1, 2)]
        one = did(make(0), "eth", *[0.28, 0.56] * 4)
        for state in (one, *peers):
            for number in range(others):
                did(state, f"other-{number}", *FAST[:7])
            state.recent.clear()
        return [one, *peers]

    assert found(*states(1)) == [("gw0", "eth", "latency")]
    assert found(*states(60), times=9) == []


def test_a_service_is_looked_at_for_longer_than_an_endpoint() -> None:
    """It takes longer to see as much of it."""
    one = did(did(make(0), "btc", *FAST), "eth", *[0.5] * 8, at=NOW - 6.0)
    assert found(one, *fleet(eth=FAST, btc=FAST)) == [("gw0", "eth", "latency")]
    plain = [did(make(0), None, *[0.5] * 8, at=NOW - 6.0), *(did(make(n), None, *FAST) for n in (1, 2))]
    assert found(*plain) == []


def test_keys_have_their_turn() -> None:
    """What one comparison costs is bounded, however many keys there are."""
    keys = [f"service-{number}" for number in range(40)]
    states = fleet(**dict.fromkeys(keys, FAST))
    did(states[0], "service-33", failed=40)
    judge = Judge(CONFIG)
    for state in states:
        state.recent.clear()
    seen = [judge.compare(states, NOW) for _ in range(12)]  # seven of them each time
    assert judge.compared == 4 + 28
    assert [[(state.url, key) for state, key, _ in findings] for findings in seen if findings] == [
        [("http://gw1", "service-33")],
        [("http://gw1", "service-33")],
    ]


def test_active_keys() -> None:
    one, other = did(make(0), "old", 0.05, at=NOW - 20), did(make(1), "recent", 0.05)
    did(one, "waits", waits=(30.0,))
    did(other, "old", 0.05, at=NOW - 11)
    assert list(active_keys([one, other], NOW - 10)) == ["waits", "recent"]
    assert list(active_keys([one, other], NOW - 30)) == ["old", "waits", "recent"]


def test_outcomes_are_compared_over_the_same_time() -> None:
    """All fail from one moment on. Those with more traffic have forgotten more of the time before."""

    def states(before: int) -> list[EndpointState]:
        made = [make(0), make(1), make(2)]
        for number, state in enumerate(made):
            did(state, None, *[0.05] * (0 if number == 0 else 40), at=NOW - 5)
            did(state, None, failed=64 if number == 0 else 20)
        did(made[0], None, *[0.05] * before)
        return made

    assert found(*states(0)) == []
    assert found(*states(60)) == []  # it was first to recover
    busy = [did(make(0), None, failed=64), *(did(make(n), None, *FAST, at=NOW - 0.1) for n in (1, 2))]
    assert found(*busy) == [("gw0", None, "failures")]  # the time they share tells too little


# --- simulated fleets

TROUBLES: dict[str, dict[str, Any]] = {
    "slow": {"factor": 10.0},
    "hanging": {"hangs": True},
    "failing": {"failure_rate": 1.0, "failure": BEYOND},
}
Names = list[tuple[str, str | None]]


def services(count: int = 5, writes: float = 0.0) -> dict[str, Service]:
    return {f"service-{number}": Service(1.0, exponential(0.05), writes) for number in range(count)}


def afflict(behaviour: Behaviour, **trouble: Any) -> None:
    for name, value in trouble.items():
        setattr(behaviour, name, value)


def ejected(sim: Simulation) -> Names:
    return [(event.endpoint, event.key) for event in sim.ejected]


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize(("count", "within"), [(2, 3.0), (5, 5.0)])
def test_one_bad_service_on_one_gateway(trouble: str, count: int, within: float) -> None:
    """It is ejected there, and there only; the other services keep going there."""
    for seed in range(2):
        sim = Simulation(5, 400, constant(0.05), seed, services=services(count))
        sim.keep_picks = True
        sim.run(10.0)
        assert ejected(sim) == []
        afflict(sim.behaviours[0].services["service-1"], **TROUBLES[trouble])
        sim.run(10.0 + within)
        assert ejected(sim) == [("http://gw0", "service-1")]
        assert standing(sim.engine.members[0]).value == "ready"
        start, end = sim.ejected[0].at, sim.ejected[0].at + 8.0
        sim.run(end)
        assert ejected(sim) == [("http://gw0", "service-1")]
        assert sim.share(0, start, end, key="service-1") == 0.0
        assert sim.share(0, start, end, key="service-0") > 0.14
        assert sim.opened == []


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_bad_service_that_most_of_the_traffic_is_for(trouble: str) -> None:
    mix = {"heavy": Service(0.8, exponential(0.05)), "light": Service(0.2, exponential(0.05))}
    for seed in range(2):
        sim = Simulation(5, 400, constant(0.05), seed, services=mix)
        sim.run(10.0)
        afflict(sim.behaviours[0].services["heavy"], **TROUBLES[trouble])
        sim.run(18.0)
        assert ejected(sim) == [("http://gw0", "heavy")]


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("count", [0, 5, 20])
def test_a_gateway_that_is_bad_for_all_services_goes_as_a_whole(trouble: str, count: int) -> None:
    """In the time it takes without any keys; for 20 services slowness takes half a second more to be that of most."""
    for seed in range(2):
        sim = Simulation(5, 400, exponential(0.05), seed, services=services(count))
        sim.run(10.0)
        for behaviour in (sim.behaviours[0], *sim.behaviours[0].services.values()):
            afflict(behaviour, **TROUBLES[trouble])
        sim.run(10.0 + {"failing": 0.4, "hanging": 0.9, "slow": 1.2 if count < 20 else 1.8}[trouble])
        assert ejected(sim) == [("http://gw0", None)]


MIXES = {
    "rare and slow": {"fast": Service(0.96, exponential(0.02)), "slow": Service(0.04, exponential(2.0))},
    "rare and as slow as ever": {"fast": Service(0.96, exponential(0.02)), "slow": Service(0.04, constant(2.0))},
    "very rare and very slow": {"fast": Service(0.99, exponential(0.02)), "slow": Service(0.01, lognormal(8.0))},
    "three": {
        "fast": Service(0.6, exponential(0.01)),
        "middling": Service(0.3, exponential(0.2)),
        "slow": Service(0.1, exponential(3.0)),
    },
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("rate", "seconds"), [(10, 240.0), (50, 60.0), (400, 12.0)])
def test_a_mix_of_slow_and_fast_services_ejects_nobody(mix: str, rate: float, seconds: float) -> None:
    sim = Simulation(5, rate, constant(0.05), 1, services=MIXES[mix])
    sim.run(seconds)
    assert ejected(sim) == []


@pytest.mark.parametrize("cause", [Cause.BEYOND, Cause.SERVICE])
@pytest.mark.parametrize("rate", [50, 200])
@pytest.mark.parametrize("failure_rate", [0.5, 1.0])
def test_a_network_wide_outage_of_one_service(cause: Cause, rate: float, failure_rate: float) -> None:
    """No endpoint is ejected and none has its breaker opened; the other services are as they were."""
    key = "service-1" if cause is Cause.SERVICE else None
    for seed in range(2):
        sim = Simulation(5, rate, constant(0.05), seed, services=services(2))
        sim.keep_picks = True
        sim.run(10.0)
        for behaviour in sim.behaviours:
            outcome = Outcome(cause, retry=True, once=True, status=500, key=key)
            afflict(behaviour.services["service-1"], failure_rate=failure_rate, failure_seconds=0.01, failure=outcome)
        sim.run(24.0)
        assert ejected(sim) == []
        assert {event.key for event in sim.opened} == ({"service-1"} if cause is Cause.SERVICE else set())
        assert all(standing(state).value == "ready" for state in sim.engine.members)
        assert sim.lost_of["service-0"] == 0
        shares = [sim.share(number, 12.0, 24.0, key="service-0") for number in range(5)]
        assert 0.15 < min(shares) <= max(shares) < 0.25


@pytest.mark.parametrize("trouble", ["failing", "hanging"])
def test_one_service_only_is_the_same_as_none(trouble: str) -> None:
    """The same requests, at the same times, answered alike."""
    for seed in range(2):
        runs = []
        for keyed in (False, True):
            sim = Simulation(5, 200, exponential(0.05), seed, services=services(1) if keyed else {})
            sim.run(10.0)
            for behaviour in (sim.behaviours[0], *sim.behaviours[0].services.values()):
                afflict(behaviour, **TROUBLES[trouble])
            sim.run(30.0)
            runs.append([(event.at, event.endpoint, event.signal, event.seconds, event.why) for event in sim.ejected])
            assert {event.key for event in sim.ejected} == {None}
        assert runs[0] == runs[1]


@pytest.mark.parametrize(("share", "most"), [(0.5, 2), (0.3, 1), (1e-6, 1), (0.8, 3)])
def test_no_more_than_the_maximum_share_is_out_for_each_service(share: float, most: int) -> None:
    """Two services of four, bad on three of five gateways."""
    settings = Settings(outlier=Outlier(max_ejected=share), breaker=STAY_OUT)
    sim = Simulation(5, 200, constant(0.05), 5, settings, services=services(4))
    sim.run(5.0)
    for behaviour in sim.behaviours[:3]:
        for key in ("service-0", "service-1"):
            afflict(behaviour.services[key], failure_rate=1.0, failure=BEYOND)
    out: Counter[str] = Counter()
    for step in range(60):
        sim.run(5.0 + step / 5)
        for key in sim.services:
            scopes = [state.scopes[key] for state in sim.engine.members]
            out[key] = max(out[key], sum(scope.ejection.until is not None for scope in scopes))
    assert set(ejected(sim)) <= {(f"http://gw{n}", f"service-{s}") for n in range(3) for s in range(2)}
    assert out == {"service-0": most, "service-1": most, "service-2": 0, "service-3": 0}


def test_a_service_returns_and_is_ejected_again_for_longer_as_long_as_it_is_bad() -> None:
    sim = Simulation(5, 400, constant(0.05), 1, services=services(3))
    sim.run(10.0)
    afflict(sim.behaviours[0].services["service-1"], failure_rate=1.0, failure=BEYOND)
    sim.run(40.0)
    assert ejected(sim) == [("http://gw0", "service-1")] * 2
    assert [(event.endpoint, event.key) for event in sim.returned] == [("http://gw0", "service-1")]
    assert sim.returned[0].at == pytest.approx(sim.ejected[0].at + sim.ejected[0].seconds, abs=0.06)
    assert 10.0 <= sim.ejected[0].seconds <= 12.0
    assert 20.0 <= sim.ejected[1].seconds <= 24.0
    afflict(sim.behaviours[0].services["service-1"], failure_rate=0.0)
    scope = sim.engine.members[0].scopes["service-1"]
    sim.run(sim.ejected[1].at + sim.ejected[1].seconds + 1.0)
    assert (len(sim.returned), scope.ejection.recent) == (2, 2)
    sim.run(sim.now + 20.0)
    assert (len(sim.ejected), scope.ejection.recent) == (2, 0)
    assert math.isinf(scope.ejection.forget_at)


@pytest.mark.parametrize("rate", [50, 200])
@pytest.mark.parametrize("mends", [True, False])
def test_writes_that_hang_do_not_get_the_endpoint_ejected_afterwards(rate: float, mends: bool) -> None:
    """They cannot be given up: they are there when the service is ejected, fail meanwhile, and outlast the ejection."""
    mix = {"writes": Service(0.5, exponential(0.05), writes=1.0), "reads": Service(0.5, exponential(0.05))}
    for seed in range(2):
        sim = Simulation(5, rate, constant(0.05), seed, services=mix, read_timeout=13.0)
        sim.run(10.0)
        afflict(sim.behaviours[0].services["writes"], hangs=True)
        sim.run(14.0)
        assert ejected(sim) == [("http://gw0", "writes")]
        assert sim.engine.members[0].scopes["writes"].waiting
        if mends:
            afflict(sim.behaviours[0].services["writes"], hangs=False)
        sim.run(38.0)
        assert set(ejected(sim)) == {("http://gw0", "writes")}
        assert (len(sim.ejected) == 1) == mends
        assert all(event.key is None for event in sim.opened) or not sim.opened


# --- the engine


def test_a_key_is_ejected_by_the_engine() -> None:
    rig = Rig(3, Settings(outlier=Outlier(confirm=0.0), breaker=STAY_OUT))
    for number in range(3):
        for key in ("eth", "btc"):
            for _ in range(20):
                rig.request(0.0, BEYOND if (number, key) == (0, "eth") else OK, pin=f"http://gw{number}", key=key)
    rig.engine.tick(0.05)
    (event,) = rig.seen(Ejected)
    assert (event.endpoint, event.key, event.signal) == ("http://gw0", "eth", "failures")
    assert event.why == "20 of 20 failed, of the peers' 0 of 40"
    assert rig.seen(BreakerChanged) == []


def test_one_is_left_in_service_for_each_key_whatever_share_may_go() -> None:
    """The breaker of the other has opened meanwhile."""
    rig = Rig(2, Settings(outlier=Outlier(confirm=0.0, max_ejected=1.0), breaker=STAY_OUT))
    for number in range(2):
        for key in ("eth", "btc"):
            for _ in range(20):
                rig.request(0.0, BEYOND if (number, key) == (0, "eth") else OK, pin=f"http://gw{number}", key=key)
    rig.request(0.0, Outcome(Cause.SERVICE, trip=True, key="eth"), pin="http://gw1", key="eth")
    rig.engine.tick(0.05)
    assert rig.seen(Ejected) == []

"""Outlier detection: which endpoints do worse than their peers.

Every comparison leaves the judged endpoint out of what it is compared with. The usual test (farther than k standard
deviations from the mean of all) cannot fire with few endpoints: with n of them, k bad, no z-score exceeds
sqrt((n - k) / k).

All times here are running time: the clock less the pauses of this process, which are nobody's latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from statistics import median, median_low
from typing import NamedTuple

from .config import Outlier
from .endpoints import EndpointState


class Verdict(NamedTuple):
    """An endpoint stands out. `signal` is `failures`, `latency` or `stall`; `why` gives the figures."""

    endpoint: EndpointState
    signal: str
    why: str


@dataclass(slots=True)
class Evidence:
    """What one endpoint did lately."""

    endpoint: EndpointState
    total: int
    failed: int
    latencies: list[float]
    """Seconds to the reply head, recent ones."""
    waits: list[float]
    """Seconds that the attempts without a reply head have waited so far, longest first."""
    silence: float
    """Seconds without any reply head while at least one attempt waited."""


_LATENCY_SPAN = 1.0  # seconds of replies a median is taken over, where there are enough
_LATENCY_SAMPLES = 8  # what is enough; below it the last so many, however old the window allows
_WAITS_READ = 64  # attempts looked at an endpoint: enough for any verdict, and bounds the cost of a pile-up
_USUAL_SAMPLES = 10  # replies it takes to speak of a usual latency


def gather(state: EndpointState, now: float, config: Outlier) -> Evidence:
    """Collect the evidence of one endpoint."""
    samples = state.recent.since(now - config.window)
    timed = [(sample.at, sample.seconds) for sample in samples if sample.seconds is not None]
    recent = [seconds for at, seconds in timed if at >= now - _LATENCY_SPAN]
    if len(recent) < _LATENCY_SAMPLES:
        recent = [seconds for _, seconds in timed[-_LATENCY_SAMPLES:]]
    waits = [now - lease.began for lease in islice(state.waiting, _WAITS_READ)]
    return Evidence(
        state,
        total=len(samples),
        failed=sum(sample.failed for sample in samples),
        latencies=recent,
        waits=waits,
        silence=min(waits[0], now - state.recent.last_head) if waits else 0.0,
    )


def judge(states: Iterable[EndpointState], now: float, config: Outlier) -> list[Verdict]:
    """The endpoints that stand out now. `states` are those not already out."""
    evidence = [gather(state, now, config) for state in states]
    if len(evidence) < 2:
        return []
    usual = _usual_latency(evidence)
    verdicts: list[Verdict] = []
    for one in evidence:
        peers = [other for other in evidence if other is not one]
        verdict = _stalls(one, peers, usual, config) or _fails(one, peers, config) or _lags(one, peers, now, config)
        if verdict is not None:
            verdicts.append(verdict)
    return verdicts


def _usual_latency(evidence: list[Evidence]) -> float | None:
    known = [seconds for one in evidence for seconds in one.latencies]
    return median(known) if len(known) >= _USUAL_SAMPLES else None


def _stalls(one: Evidence, peers: list[Evidence], usual: float | None, config: Outlier) -> Verdict | None:
    """Nothing has come back for far longer than usual, while the peers answer."""
    if usual is None:
        return None
    overdue_after = max(config.overdue_floor, config.overdue_factor * usual)
    overdue = sum(wait > overdue_after for wait in one.waits)
    patience = overdue_after if overdue >= config.stalled_attempts else 4 * overdue_after
    if one.silence <= patience or all(peer.silence > overdue_after for peer in peers):
        return None  # it answers, or nobody does
    why = f"nothing for {one.silence:.2f} s with {overdue} attempts overdue, usual is {usual * 1000:.0f} ms"
    return Verdict(one.endpoint, "stall", why)


def _fails(one: Evidence, peers: list[Evidence], config: Outlier) -> Verdict | None:
    """Its failure rate exceeds the peers': two-proportion z-test, one success and one failure added to either side
    (Agresti and Caffo 2000), which keeps it honest for small counts and rates of 0 and 1.
    """
    total = sum(peer.total for peer in peers)
    if one.total < config.min_requests or total < config.min_requests:
        return None
    failed = sum(peer.failed for peer in peers)
    own_n, peers_n = one.total + 2, total + 2
    own, others = (one.failed + 1) / own_n, (failed + 1) / peers_n
    error = math.sqrt(own * (1 - own) / own_n + others * (1 - others) / peers_n)
    if own - others < config.failure_margin or own - others < config.failure_sigma * error:
        return None
    return Verdict(one.endpoint, "failures", f"{one.failed} of {one.total} failed, of the peers' {failed} of {total}")


def _lags(one: Evidence, peers: list[Evidence], now: float, config: Outlier) -> Verdict | None:
    """Its median latency is several times the peers', and has been for a while.

    Attempts still waiting longer than the peers take count with the time they have waited: it can only grow.
    """
    ejection = one.endpoint.ejection
    medians = [median(peer.latencies) for peer in peers if len(peer.latencies) >= _LATENCY_SAMPLES]
    if not medians:
        ejection.slow_since = None
        return None
    usual = median_low(medians)
    seen = one.latencies + [wait for wait in one.waits if wait > usual]
    if len(seen) < _LATENCY_SAMPLES:
        return None
    own = median(seen)
    if own < config.latency_clear * usual:
        ejection.slow_since = None
    if own <= config.latency_factor * usual or own <= usual + config.latency_floor:
        return None
    if ejection.slow_since is None:
        ejection.slow_since = now
    if now - ejection.slow_since < config.confirm:
        return None
    return Verdict(one.endpoint, "latency", f"median {own * 1000:.0f} ms, of the peers {usual * 1000:.0f} ms")

"""Outlier detection: which endpoints do worse than their peers.

Every comparison leaves the judged endpoint out of what it is compared with. The usual test (farther than k standard
deviations from the mean of all) cannot fire with few endpoints: with n of them, k bad, no z-score exceeds
sqrt((n - k) / k).

Asking ten times a second is asking 36,000 times an hour, so luck has to be ruled out each time: `failure_sigma` and
`latency_sigma` say how surely.

All times here are running time: the clock less the pauses of this process, which are nobody's latency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from .config import Outlier
from .endpoints import EndpointState
from .lease import Lease


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
    replies: list[tuple[float, float]]
    """(when, logarithm of the seconds to the reply head), oldest first."""
    waiting: list[Lease]
    """Attempts without a reply head, oldest first."""
    silence: float
    """Seconds without any reply head while at least one attempt waited."""
    overtaken: float = -math.inf
    """Peers have answered attempts that began up to here. What is younger may be waiting for what all wait for."""

    def waits(self, now: float) -> list[float]:
        """Seconds that its overtaken attempts have waited so far, longest first."""
        return [now - lease.began for lease in self.waiting if lease.began < self.overtaken]

    def first_waits(self, now: float) -> list[float]:
        """Those of requests that failed nowhere before: what hangs a second time may be due to the request."""
        return [now - lease.began for lease in self.waiting if lease.began < self.overtaken and not lease.want.tried]


class Summary(NamedTuple):
    """Latencies of one endpoint over one span, as logarithms: ratios are what is compared."""

    size: int
    mean: float
    deviation: float
    """Sum of the squared distances from the mean."""


_SPANS = (0.5, 1.0, 2.0, 4.0)  # seconds over which latencies are compared; the shortest sees a change first
_SIGNALS = ("stall", "failures", "latency")
_ENOUGH = 5  # latencies it takes to compare
_WAITS_READ = 64  # attempts looked at an endpoint: enough for any verdict, and bounds the cost of a pile-up
_USUAL_SAMPLES = 10  # replies it takes to speak of a usual latency
_BULK = 0.95  # share of the replies that tells how long one may well take
_LEAST_SECONDS = 1e-4  # added to each, so that what takes no time at all has a logarithm
_LEAST_SPREAD = 0.25  # of log latency, a quarter up or down: nobody is as regular as a few samples may look


def gather(state: EndpointState, now: float, config: Outlier) -> Evidence:
    """Collect the evidence of one endpoint."""
    samples = state.recent.since(now - config.window)
    waiting = list(islice(state.waiting, _WAITS_READ))
    return Evidence(
        state,
        total=len(samples),
        failed=sum(sample.failed for sample in samples),
        replies=[(at, math.log(seconds + _LEAST_SECONDS)) for at, _, seconds in samples if seconds is not None],
        waiting=waiting,
        silence=min(now - waiting[0].began, now - state.recent.last_head) if waiting else 0.0,
    )


def judge(states: Iterable[EndpointState], now: float, config: Outlier) -> list[Verdict]:
    """The endpoints that stand out now, the surest signal first. `states` are those not already out.

    The cost is linear in their number.
    """
    evidence = [gather(state, now, config) for state in states]
    if len(evidence) < 2:
        return []
    latest = sorted(one.endpoint.recent.last_answered for one in evidence)
    for one in evidence:
        one.overtaken = latest[-1] if one.endpoint.recent.last_answered < latest[-1] else latest[-2]
    known = [log_seconds for one in evidence for _, log_seconds in one.replies]
    usual = bulk = math.inf
    if len(known) >= _USUAL_SAMPLES:
        known.sort()
        usual, bulk = (math.exp(known[int(share * len(known))]) for share in (0.5, _BULK))
    stalls = _stalls(evidence, bulk, now, config)
    lags = _lags(evidence, usual, now, config)
    total, failed = sum(one.total for one in evidence), sum(one.failed for one in evidence)
    verdicts: list[Verdict] = []
    for one, stall, lag in zip(evidence, stalls, lags, strict=True):
        fails = _fails(one, failed - one.failed, total - one.total, config)
        for signal, why in zip(_SIGNALS, (stall, fails, lag), strict=True):
            if why:
                verdicts.append(Verdict(one.endpoint, signal, why))
                break
    # Not all of them may go: one that does not answer at all before one that is slow.
    return sorted(verdicts, key=lambda verdict: _SIGNALS.index(verdict.signal))


def _stalls(evidence: list[Evidence], bulk: float, now: float, config: Outlier) -> list[str]:
    """Nothing has come back for far longer than nearly all replies take, though peers answered what began later, and
    have for `confirm` seconds: after a pause of everybody somebody is the first to answer.
    """
    overdue_after = max(config.overdue_floor, config.overdue_factor * bulk)
    found: list[str] = []
    for one in evidence:
        ejection, waits = one.endpoint.ejection, one.first_waits(now)

        def stalled(ahead: float, one: Evidence = one, waits: list[float] = waits) -> int:
            """How many attempts are overdue `ahead` seconds from now, if the silence is long enough then; else 0."""
            overdue = sum(wait + ahead > overdue_after for wait in waits)
            # Each one missing to `stalled_attempts` doubles the patience.
            patience = overdue_after * 2.0 ** min(2, max(0, config.stalled_attempts - overdue))
            return overdue if one.silence + ahead > patience else 0

        if not stalled(config.confirm):
            ejection.stalled_since = None
        elif ejection.stalled_since is None:
            ejection.stalled_since = now
        overdue = stalled(0.0) if _lasted(ejection.stalled_since, now, config) else 0
        why = f"nothing for {one.silence:.2f} s with {overdue} attempts overdue, most take {bulk * 1000:.0f} ms"
        found.append(why if overdue else "")
    return found


def _fails(one: Evidence, failed: int, total: int, config: Outlier) -> str:
    """Its failure rate exceeds that of its peers, `failed` of `total`, by more than luck explains."""
    if one.total < config.min_requests or total < config.min_requests:
        return ""
    if one.failed / one.total - failed / total < config.failure_margin:
        return ""
    if luck(one.failed, one.total, failed, total) > math.erfc(config.failure_sigma / math.sqrt(2)) / 2:
        return ""
    return f"{one.failed} of {one.total} failed, of the peers' {failed} of {total}"


def luck(own_failed: int, own_total: int, failed: int, total: int) -> float:
    """How likely as many or more of all failures fall on this one with no difference between them: Fisher's exact test,
    which holds for any counts and rates.
    """
    everything, bad = own_total + total, own_failed + failed
    ways = sum(
        math.comb(bad, k) * math.comb(everything - bad, own_total - k)
        for k in range(own_failed, min(own_total, bad) + 1)
    )
    return ways / math.comb(everything, own_total)


def _lags(evidence: list[Evidence], usual: float, now: float, config: Outlier) -> list[str]:
    """Its latency is several times that of the median peer, more than luck explains, and has been for a while.

    Attempts that have waited longer than usual, and were overtaken, count with that time: it can only grow.
    """
    found = [""] * len(evidence)
    ratios = [0.0] * len(evidence)
    spans = zip(*(_summarise(one, now, usual) for one in evidence), strict=True)
    for summaries in spans:
        ranked = sorted((one.mean, index) for index, one in enumerate(summaries) if one.size >= _ENOUGH)
        freedom = sum(summaries[index].size - 1 for _, index in ranked)
        if len(ranked) < 2:
            continue
        common = sum(summaries[index].deviation for _, index in ranked) / freedom
        middle = (len(ranked) - 2) // 2  # the lower median of the others, for all who are slower than it
        peer = summaries[ranked[middle][1]]
        for mean, index in ranked[middle + 1 :]:
            own = summaries[index]
            spread = math.sqrt(max(common, own.deviation / (own.size - 1), _LEAST_SPREAD**2))
            error = spread * math.sqrt(1 / own.size + 1 / peer.size)
            typical, peers = math.exp(mean), math.exp(peer.mean)
            if typical <= peers + config.latency_floor:
                continue
            ratios[index] = max(ratios[index], typical / peers)
            if mean - peer.mean - config.latency_sigma * error > math.log(config.latency_factor):
                found[index] = f"typically {typical * 1000:.0f} ms, the peers {peers * 1000:.0f} ms"
    return [
        why if _confirmed(one.endpoint, ratio, now, config) else ""
        for one, ratio, why in zip(evidence, ratios, found, strict=True)
    ]


def _summarise(one: Evidence, now: float, usual: float) -> list[Summary]:
    """One summary for each of the spans."""
    waits = [math.log(wait) for wait in one.waits(now) if wait > usual]
    size, total, squares = len(waits), sum(waits), sum(value * value for value in waits)
    replies, index = one.replies, len(one.replies)
    summaries: list[Summary] = []
    for span in _SPANS:
        while index and replies[index - 1][0] >= now - span:
            index -= 1
            value = replies[index][1]
            size += 1
            total += value
            squares += value * value
        mean = total / max(1, size)
        summaries.append(Summary(size, mean, max(0.0, squares - mean * total)))
    return summaries


def _confirmed(state: EndpointState, ratio: float, now: float, config: Outlier) -> bool:
    """Whether it has looked slow for `confirm` seconds. Once it does, only a ratio below `latency_clear` ends that."""
    ejection = state.ejection
    if ratio < config.latency_clear:
        ejection.slow_since = None
    elif ejection.slow_since is None and ratio > config.latency_factor:
        ejection.slow_since = now
    return _lasted(ejection.slow_since, now, config)


def _lasted(since: float | None, now: float, config: Outlier) -> bool:
    return since is not None and now - since >= config.confirm - 1e-9  # ticks add up with rounding errors

"""Outlier detection: which endpoints do worse than their peers.

Every comparison leaves the judged endpoint out of what it is compared with. The usual test (farther than k standard
deviations from the mean of all) cannot fire with few endpoints: with n of them, k bad, no z-score exceeds
sqrt((n - k) / k).

Asking ten times a second is asking 36,000 times an hour, so luck has to be ruled out each time: `failure_sigma` and
`latency_sigma` say how surely.

Like is compared with like. Failures are counted over the same span of time for all, as the outcomes that are kept go
back less far where there is more traffic. Where the traffic is of several services, latencies are measured by what is
usual for the service, and failures by those of the same services at the peers.

All times here are running time: the clock less the pauses of this process, which are nobody's latency.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import NamedTuple, TypeAlias

from .config import Outlier
from .lease import Lease
from .load import Sample
from .scope import Ejection, Scope


class Verdict(NamedTuple):
    """A scope stands out. `signal` is `failures`, `latency` or `stall`; `why` gives the figures."""

    scope: Scope
    signal: str
    why: str


class Norm(NamedTuple):
    """What the replies for a service take, in seconds: half of them, and nearly all. Infinity is for not known."""

    usual: float
    bulk: float

    @property
    def known(self) -> bool:
        return self.usual < math.inf


Latency: TypeAlias = tuple[float, str | None, float, float]
"""When, of which service, and how long as a logarithm: of seconds, or of multiples of what is usual there, the
logarithm of which comes last.
"""


class Wait(NamedTuple):
    """An attempt that has waited for `seconds`, and is overdue after so many."""

    key: str | None
    seconds: float
    overdue_after: float
    bulk: float


class Summary(NamedTuple):
    """Latencies of one endpoint over one span, as logarithms: ratios are what is compared."""

    size: int
    mean: float
    deviation: float
    """Sum of the squared distances from the mean."""
    norm: float
    """Mean of what is usual for the services in question, if they are told apart."""


class Tally(NamedTuple):
    """Outcomes and failures by service, over one span."""

    total: dict[str | None, int]
    failed: dict[str | None, int]


class Figures(NamedTuple):
    """Failures and outcomes of one scope, and of its peers."""

    failed: int
    total: int
    peers_failed: int
    peers_total: int

    def enough(self, config: Outlier) -> bool:
        """Whether they can be compared."""
        return self.total >= config.min_requests and self.peers_total >= config.min_requests

    @property
    def excess(self) -> float:
        """By how much its failure rate is higher."""
        return self.failed / self.total - self.peers_failed / self.peers_total


@dataclass(slots=True)
class Evidence:
    """What one scope did lately."""

    scope: Scope
    ejection: Ejection
    """Where a suspicion is kept until it is confirmed."""
    samples: list[Sample]
    waiting: list[Lease]
    """Attempts without a reply head, oldest first."""
    silence: float
    """Seconds without any reply head while at least one attempt waited."""
    overtaken: float = -math.inf
    """Peers have answered attempts that began up to here. What is younger may be waiting for what all wait for."""


_SPANS = (0.5, 1.0, 2.0, 4.0)  # seconds over which latencies are compared; the shortest sees a change first
_LONG_SPAN = 8.0  # one more where the traffic is split into many: it takes longer to see as much
_SIGNALS = ("stall", "failures", "latency")
_ENOUGH = 5  # latencies it takes to compare
_WAITS_READ = 64  # attempts looked at an endpoint: enough for any verdict, and bounds the cost of a pile-up
_USUAL_SAMPLES = 10  # replies it takes to speak of a usual latency
_BULK = 0.95  # share of the replies that tells how long one may well take
_LEAST_SECONDS = 1e-4  # added to each, so that what takes no time at all has a logarithm
UNKNOWN = Norm(math.inf, math.inf)
_LATEST = 24  # latencies by which the services are told apart that are behind a verdict
_FEW = 3  # outcomes that say something of one of them
_LEAST_SPREAD = 0.25  # of log latency, a quarter up or down: nobody is as regular as a few samples may look


def gather(scope: Scope, now: float, config: Outlier, without: Collection[str | None] = ()) -> Evidence:
    """Collect the evidence of one scope. `without` some services is a question of what if, and leaves no suspicion."""
    samples = scope.recent.since(now - config.window)
    counting = (lease for lease in scope.waiting if not lease.set_aside)
    if without:
        samples = [sample for sample in samples if sample.key not in without]
        counting = (lease for lease in counting if lease.key not in without)
    waiting = list(islice(counting, _WAITS_READ))
    silence = min(now - waiting[0].began, now - scope.recent.last_head) if waiting else 0.0
    return Evidence(scope, Ejection() if without else scope.ejection, samples, waiting, silence)


def norm_of(samples: Iterable[Sample]) -> Norm:
    """What is usual by these samples, if they are enough to tell."""
    known = sorted([sample.seconds for sample in samples if sample.seconds is not None])
    if len(known) < _USUAL_SAMPLES:
        return UNKNOWN
    usual, bulk = (known[int(share * len(known))] + _LEAST_SECONDS for share in (0.5, _BULK))
    return Norm(usual, bulk)


def judge(scopes: Iterable[Scope], now: float, config: Outlier) -> list[Verdict]:
    """Those that stand out now, the surest signal first. `scopes` are endpoints, or one service on each, that are in.

    The cost is linear in their number.
    """
    return Comparison([gather(scope, now, config) for scope in scopes], now, config).verdicts()


def surest_first(verdict: Verdict) -> int:
    """The order in which verdicts are carried out, as a sort key."""
    return _SIGNALS.index(verdict.signal)


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


class Comparison:
    """Some scopes against each other. With `norms`, what is usual by service, their traffic is told apart; `rest` is
    what is usual for all other traffic. `chances` is how many comparisons are made at a time: luck has as many.
    """

    def __init__(
        self,
        evidence: list[Evidence],
        now: float,
        config: Outlier,
        norms: Mapping[str | None, Norm] | None = None,
        chances: int = 1,
    ) -> None:
        self._evidence = evidence
        self._now = now
        self._config = config
        self._spans = _SPANS if chances == 1 else (*_SPANS, _LONG_SPAN)
        self._apart = norms is not None
        self._norms: Mapping[str | None, Norm] = norms or {}
        self._doubt = 2 * math.log(chances)
        """On top of the square of a sigma: what luck exceeds is then about as much less likely as it has chances."""
        every = [sample for one in evidence for sample in one.samples]
        self.rest = norm_of([sample for sample in every if sample.key not in self._norms] if norms else every)
        latest = sorted(one.scope.recent.last_answered for one in evidence)[-2:]
        for one in evidence:
            one.overtaken = latest[-1] if one.scope.recent.last_answered < latest[-1] else latest[0]

    def verdicts(self) -> list[Verdict]:
        """Who stands out, and has for `confirm` seconds."""
        if len(self._evidence) < 2:
            return []
        found = zip(self._stalls(), self._fails(), self._lags(), strict=True)
        verdicts: list[Verdict] = []
        for one, reasons in zip(self._evidence, found, strict=True):
            for signal, why in zip(_SIGNALS, reasons, strict=True):
                if why:
                    verdicts.append(Verdict(one.scope, signal, why))
                    break
        # Not all of them may go: one that does not answer at all before one that is slow.
        return sorted(verdicts, key=surest_first)

    # --- which services it comes from

    def share(self, scope: Scope, keys: Collection[str | None]) -> float:
        """Of its traffic, that for some services."""
        one = self._of(scope)
        traffic = [sample.key for sample in one.samples] or [lease.key for lease in one.waiting]
        return sum(key in keys for key in traffic) / len(traffic)

    def hanging(self, scope: Scope) -> list[str | None]:
        """The services of the attempts that are overdue, of those sent after the last that was answered."""
        latest = scope.recent.last_answered
        waits = [wait for wait in self._first_waits(self._of(scope)) if self._now - wait.seconds > latest]
        return [wait.key for wait in waits if wait.seconds > wait.overdue_after]

    def blame(self, verdict: Verdict) -> tuple[str | None, float]:
        """The service that most of the failures, or of the delay lately, is of; and what part of the traffic is for
        services that have less than half as much of it as the endpoint has, of those that can be judged.
        """
        one = self._of(verdict.scope)
        if verdict.signal == "failures":
            weighed = [(sample.key, float(sample.failed)) for sample in one.samples]
        else:
            weighed = [(key, value) for _, key, value, _ in self._latencies(one) + self._long_waits(one)][-_LATEST:]
        by_key: dict[str | None, list[float]] = {}
        for key, weight in weighed:
            by_key.setdefault(key, []).append(weight)
        half = fmean(weight for weights in by_key.values() for weight in weights) / 2
        judged = [weights for weights in by_key.values() if len(weights) >= _FEW]
        spared = sum(len(weights) for weights in judged if fmean(weights) < half)
        return max(by_key, key=lambda key: sum(by_key[key])), spared / max(1, sum(map(len, judged)))

    def _of(self, scope: Scope) -> Evidence:
        return next(one for one in self._evidence if one.scope is scope)

    def _norm(self, key: str | None) -> Norm:
        return self._norms.get(key, self.rest)

    # --- stalls

    def _stalls(self) -> list[str]:
        """Nothing has come back for far longer than nearly all replies take, though peers answered what began later,
        and have for `confirm` seconds: after a pause of everybody somebody is the first to answer.
        """
        found: list[str] = []
        for one in self._evidence:
            ejection, waits = one.ejection, self._first_waits(one)
            if not self._stalled(one, waits, self._config.confirm):
                ejection.stalled_since = None
            elif ejection.stalled_since is None:
                ejection.stalled_since = self._now
            found.append(self._stalled(one, waits, 0.0) if self._lasted(ejection.stalled_since) else "")
        return found

    def _first_waits(self, one: Evidence) -> list[Wait]:
        """Attempts that were overtaken, of requests that failed nowhere before: what hangs a second time may be due to
        the request.
        """
        config, waits = self._config, []
        for lease in one.waiting:
            if lease.began < one.overtaken and not lease.want.tried:
                bulk = self._norm(lease.key).bulk
                overdue_after = max(config.overdue_floor, config.overdue_factor * bulk)
                waits.append(Wait(lease.key, self._now - lease.began, overdue_after, bulk))
        return waits

    def _stalled(self, one: Evidence, waits: list[Wait], ahead: float) -> str:
        """Which are overdue `ahead` seconds from now, if the silence is long enough then; else nothing."""
        why = ""
        overdue = sorted((wait.overdue_after, wait.bulk) for wait in waits if wait.seconds + ahead > wait.overdue_after)
        for count, (after, bulk) in enumerate(overdue, 1):
            # Each one missing to `stalled_attempts` doubles the patience.
            patience = after * 2.0 ** min(2, max(0, self._config.stalled_attempts - count))
            if one.silence + ahead > patience:
                why = f"nothing for {one.silence:.2f} s with {count} attempts overdue, most take {bulk * 1000:.0f} ms"
        return why

    # --- failures

    def _fails(self) -> list[str]:
        """Its failure rate exceeds that of its peers by more than luck explains."""
        if not any(sample.failed for one in self._evidence for sample in one.samples):
            return [""] * len(self._evidence)
        tallies, alike = self._tallies(-math.inf), self._tallies(self._common_start())
        return [self._failing(_standardised(tallies, at), _standardised(alike, at)) for at in range(len(tallies))]

    def _common_start(self) -> float:
        """From when on the outcomes of all are kept: what began or ended before would be told of some only."""
        return max(one.scope.recent.complete_since for one in self._evidence)

    def _tallies(self, start: float) -> list[Tally]:
        tallies: list[Tally] = []
        for one in self._evidence:
            total: dict[str | None, int] = {}
            failed: dict[str | None, int] = {}
            for at, bad, _, key in one.samples:
                if at >= start:
                    service = key if self._apart else None
                    total[service] = total.get(service, 0) + 1
                    failed[service] = failed.get(service, 0) + bad
            tallies.append(Tally(total, failed))
        return tallies

    def _failing(self, window: Figures, alike: Figures) -> str:
        """By all that is known of the window, unless the span of time that all are known of contradicts."""
        config = self._config
        if not window.enough(config) or window.excess < config.failure_margin:
            return ""
        if alike.enough(config) and alike.excess < config.failure_margin:
            return ""
        sigma = math.sqrt(config.failure_sigma**2 + self._doubt)
        if luck(*window) > math.erfc(sigma / math.sqrt(2)) / 2:
            return ""
        return f"{window.failed} of {window.total} failed, of the peers' {window.peers_failed} of {window.peers_total}"

    # --- latency

    def _lags(self) -> list[str]:
        """Its latency is several times that of the median peer, more than luck explains, and has been for a while.

        Attempts that have waited longer than usual, and were overtaken, count with that time: it can only grow.
        """
        evidence, config = self._evidence, self._config
        found = [""] * len(evidence)
        ratios = [0.0] * len(evidence)
        sigma = math.sqrt(config.latency_sigma**2 + self._doubt)
        for summaries in zip(*(self._summarise(one) for one in evidence), strict=True):
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
                typical, peers = math.exp(mean + own.norm), math.exp(peer.mean + own.norm)
                if typical <= peers + config.latency_floor:
                    continue
                ratios[index] = max(ratios[index], typical / peers)
                if mean - peer.mean - sigma * error > math.log(config.latency_factor):
                    found[index] = f"typically {typical * 1000:.0f} ms, the peers {peers * 1000:.0f} ms"
        return [
            why if self._confirmed(one.ejection, ratio) else ""
            for one, ratio, why in zip(evidence, ratios, found, strict=True)
        ]

    def _summarise(self, one: Evidence) -> list[Summary]:
        """One summary for each of the spans."""
        replies = self._latencies(one)
        size, total, squares, norms, index = 0, 0.0, 0.0, 0.0, len(replies)
        for _, _, value, norm in self._long_waits(one):
            size += 1
            total += value
            squares += value * value
            norms += norm
        summaries: list[Summary] = []
        for span in self._spans:
            start = self._now - span
            while index and replies[index - 1][0] >= start:
                index -= 1
                _, _, value, norm = replies[index]
                size += 1
                total += value
                squares += value * value
                norms += norm
            mean = total / max(1, size)
            summaries.append(Summary(size, mean, max(0.0, squares - mean * total), norms / max(1, size)))
        return summaries

    def _latencies(self, one: Evidence) -> list[Latency]:
        """Of the replies in the longest span, oldest first."""
        start = self._now - self._spans[-1]
        replies = [(at, key, seconds) for at, _, seconds, key in one.samples if at >= start and seconds is not None]
        if not self._apart:
            return [(at, key, math.log(seconds + _LEAST_SECONDS), 0.0) for at, key, seconds in replies]
        norms = {key: self._measure(key) for key in {key for _, key, _ in replies}}
        return [
            (at, key, math.log(seconds + _LEAST_SECONDS) - norm, norm)
            for at, key, seconds in replies
            if (norm := norms[key]) < math.inf
        ]

    def _long_waits(self, one: Evidence) -> list[Latency]:
        """Of the attempts that have waited longer than usual, and were overtaken."""
        waits: list[Latency] = []
        for lease in one.waiting:
            wait = self._now - lease.began
            if lease.began < one.overtaken and wait > self._norm(lease.key).usual:
                norm = self._measure(lease.key)
                waits.append((self._now, lease.key, math.log(wait) - norm, norm))
        return waits

    def _measure(self, key: str | None) -> float:
        """The logarithm of what latencies of a service are multiples of; infinity when that is not known."""
        return math.log(self._norm(key).usual) if self._apart else 0.0

    def _confirmed(self, ejection: Ejection, ratio: float) -> bool:
        """Whether it has looked slow for `confirm` seconds. Then only a ratio below `latency_clear` ends that."""
        config = self._config
        if ratio < config.latency_clear:
            ejection.slow_since = None
        elif ejection.slow_since is None and ratio > config.latency_factor:
            ejection.slow_since = self._now
        return self._lasted(ejection.slow_since)

    def _lasted(self, since: float | None) -> bool:
        # Ticks add up with rounding errors.
        return since is not None and self._now - since >= self._config.confirm - 1e-9


def _standardised(tallies: list[Tally], index: int) -> Figures:
    """Those of one and of its peers, had their traffic the same mix of services as its own. How many outcomes of the
    peers that stands for is Kish's effective size of a weighted sample.
    """
    own = tallies[index]
    own_failed, own_total, expected, squares = 0, 0, 0.0, 0.0
    for key, total in own.total.items():
        peers = sum(tally.total.get(key, 0) for tally in tallies) - total
        if peers:
            own_failed += own.failed[key]
            own_total += total
            expected += total * (sum(tally.failed.get(key, 0) for tally in tallies) - own.failed[key]) / peers
            squares += total * total / peers
    size = round(own_total**2 / squares) if squares else 0
    return Figures(own_failed, own_total, round(expected / own_total * size) if own_total else 0, size)

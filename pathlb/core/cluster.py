"""The endpoints side of the engine: what evidence, time and the operator do to each endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from . import events
from .breaker import BreakerState, CircuitBreaker
from .comparison import Judge
from .config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart, check_number
from .eligibility import IN_SERVICE, Standing, View, scopes_of, standing, survey
from .endpoints import Admin, EndpointSet, EndpointState, SetChange
from .errors import ConfigError
from .health import Health, HealthState
from .lease import Lease
from .load import Sample
from .model import SIGNALS, Cause, Endpoint, Mark, Outcome, Rng
from .outlier import Verdict
from .scope import Scope

_JUDGE_EVERY = 0.1  # seconds between outlier comparisons of up to 50 endpoints; longer for more, the cost is linear
_OVERLOAD_BACKOFF = 0.25  # seconds an endpoint is passed over after a first 429 without Retry-After, doubling
_OVERLOAD_MAX = 8.0
_RETRY_AFTER_MAX = 30.0  # what one reply may ask for on behalf of all requests to its endpoint
_VIEWS_KEPT = 1_000
_KEYS_KEPT = 200  # scopes of one endpoint, beyond which those with nothing to remember go, or the one not used longest
_RAMP_STEP = 0.1  # seconds between updates of a weight on the slow-start ramp


@dataclass(frozen=True, slots=True)
class Settings:
    """The parts of the core's configuration, one object each. `outlier=None` compares nobody."""

    breaker: Breaker = Breaker()
    outlier: Outlier | None = Outlier()
    panic: Panic = Panic()
    slow_start: SlowStart = SlowStart()
    limits: Limits = Limits()
    retry: Retry = Retry()
    probed: bool = False
    """Active probes decide the health; it is unknown until they do."""
    rise: int = 1
    fall: int = 1
    block_height: BlockHeight | None = None

    def __post_init__(self) -> None:
        for name in ("rise", "fall"):
            check_number("Settings", name, getattr(self, name), 1, whole=True)


def _is_scoped(outcome: Outcome) -> bool:
    """Whether one service on the endpoint is at fault, and the endpoint itself is not."""
    return outcome.cause is Cause.SERVICE and outcome.key is not None


def _is_passed_on(outcome: Outcome) -> bool:
    """Whether the endpoint told of a fault behind it: no reason to trust it less, and proof that it works."""
    behind = outcome.cause is Cause.BEYOND or (outcome.cause is Cause.OVERLOAD and outcome.key is not None)
    return behind and outcome.status is not None


class Cluster:
    """All endpoints with their state. `changed` is set whenever picks may turn out differently from now on."""

    def __init__(self, settings: Settings, rng: Rng, outbox: events.Outbox) -> None:
        self._settings = settings
        self._rng = rng
        self._outbox = outbox
        self._set = EndpointSet()
        self._started = False
        self._views: dict[str | None, View] = {}
        self._judge = Judge(settings.outlier) if settings.outlier is not None else None
        self._next_judgement = -math.inf
        self.changed = False
        self.next_advance = -math.inf
        """When time alone will next change something."""
        self.condemned: list[tuple[EndpointState, str | None]] = []
        """(endpoint, key) pairs just ejected or opened; what hangs there should be given up."""

    # --- members

    def __len__(self) -> int:
        return len(self._set)

    def members(self) -> list[EndpointState]:
        """The endpoints, drained ones included, removed ones not."""
        return list(self._set)

    def everyone(self) -> list[EndpointState]:
        """Members, and removed endpoints with requests still in flight."""
        return list(self._set.everyone())

    def apply(self, now: float, endpoints: Iterable[Endpoint]) -> SetChange:
        """Make these the endpoints. State of those already known is kept; new ones ramp up, except at the start."""
        change = self._set.apply([self._fresh(endpoint) for endpoint in endpoints])
        for state in change.added:
            if self._started:
                self._ramp(now, state)
        for state in change.kept:
            self._set_weight(now, state)
        self._started = True
        if change.added or change.removed:
            added, removed = (tuple(state.url for state in part) for part in (change.added, change.removed))
            self._outbox.add(events.EndpointsChanged(now, added, removed))
        self._invalidate()
        return change

    def forget(self, state: EndpointState) -> None:
        """A removed endpoint has nothing in flight any more."""
        self._set.forget(state)

    def drain(self, now: float, url: str) -> None:
        """Give it nothing new."""
        state = self._administer(url)
        if state.admin is Admin.DRAINING:
            return
        state.admin = Admin.DRAINING
        self._outbox.add(events.EndpointsChanged(now, drained=(url,)))
        self._invalidate()

    def undrain(self, now: float, url: str) -> None:
        """Take a drained endpoint back, on the ramp."""
        state = self._administer(url)
        if state.admin is Admin.READY:
            return
        state.admin = Admin.READY
        self._ramp(now, state)
        self._outbox.add(events.EndpointsChanged(now, undrained=(url,)))

    def record_probe(self, now: float, url: str, passed: bool, why: str, key: str | None = None) -> None:
        """Take in the result of an active probe, of one service if it has a `key`. An unknown URL is ignored: the
        endpoint was removed meanwhile.
        """
        state = self._set.get(url)
        if state is None:
            return
        if key is not None:
            self._record_key_probe(now, state, key, passed, why)
            return
        before = state.health.state
        if not passed:
            state.last_failed = now
        if state.health.record(passed, why):
            if before is Health.DOWN or state.ramp_from is not None:
                self._ramp(now, state)  # from the moment it may serve, not from the moment it joined
            self._invalidate()
            self._outbox.add(events.HealthChanged(now, url, before.value, state.health.state.value, why))

    def record_height(self, now: float, url: str, key: str | None, height: int) -> None:
        """An endpoint has told the block height of a service. Without `Settings.block_height` nobody asks."""
        config, state = self._settings.block_height, self._set.get(url)
        if config is None or state is None:
            return
        scope = state if key is None else self.scope(now, state, key)
        scope.height_until = now + config.max_age
        if scope.height != height:
            scope.height = height
            self._invalidate(scope.height_until)

    def _record_key_probe(self, now: float, state: EndpointState, key: str, passed: bool, why: str) -> None:
        health = self.scope(now, state, key).health
        before = health.state
        if health.record(passed, why):
            self._invalidate()
            self._outbox.add(events.HealthChanged(now, state.url, before.value, health.state.value, why, key))

    @property
    def fastest(self) -> float:
        """Seconds the fastest endpoint usually takes to a reply head; 0 before the first reply."""
        known = [state.latency.seconds for state in self._set if state.latency.seconds is not None]
        return min(known, default=0.0)

    def health_changing(self, url: str, key: str | None = None) -> bool:
        """Whether the last probe result contradicts the verdict, so that the next should come sooner."""
        state = self._set.get(url)
        scope = state if state is None or key is None else state.scopes.get(key)
        return scope is not None and scope.health.changing

    def view(self, key: str | None) -> View:
        """What picks for `key` choose from."""
        view = self._views.get(key)
        if view is None:
            if key is None or any(self._stands_apart(state.scopes.get(key)) for state in self._set):
                view = survey(self._set, self._settings.panic, key, self._settings.block_height)
            else:
                view = self.view(None)
            if len(self._views) >= _VIEWS_KEPT:
                self._views.clear()
            self._views[key] = view
        return view

    @staticmethod
    def _stands_apart(scope: Scope | None) -> bool:
        """Whether picks for its key may differ from those without one."""
        return scope is not None and (not scope.in_service or scope.height is not None)

    def scope(self, now: float, state: EndpointState, key: str) -> Scope:
        """What is known of a service on an endpoint. Callers make up keys, so only so many are kept."""
        scopes = state.scopes
        scope = scopes.pop(key, None)
        if scope is None:
            if len(scopes) >= _KEYS_KEPT:
                oldest = list(islice(scopes.items(), _KEYS_KEPT // 2))
                for known in [known for known, one in oldest if one.idle(now)] or [oldest[0][0]]:
                    if self._stands_apart(scopes.pop(known)):
                        self._invalidate(math.inf)
            scope = Scope(HealthState(probed=False, rise=self._settings.rise, fall=self._settings.fall))
            scope.breaker = self._new_breaker(state, key)
        scopes[key] = scope  # the one used last comes last
        return scope

    # --- evidence

    def succeeded(self, running: float, lease: Lease, seconds: float) -> None:
        """A reply head arrived after `seconds`. `running` is the time less the stalls of this process."""
        state, scope = lease.endpoint, lease.scope
        sample = Sample(running, False, seconds, lease.key)
        if not lease.want.paced:
            state.latency.record(running, seconds)
        state.recent.answered(running, running - seconds)
        if scope is None:
            if not lease.want.paced:
                state.recent.add(sample)
        else:
            scope.recent.answered(running, running - seconds)
            if not lease.set_aside:
                state.recent.add(sample)
                scope.recent.add(sample)
        state.overload_streak = 0
        state.counts.ok += 1

    def failed(self, now: float, running: float, lease: Lease, outcome: Outcome) -> None:
        """An outcome that was no success, for every signal but the breakers."""
        state = lease.endpoint
        if outcome.status is not None:
            state.recent.answered(running, lease.began)
            if lease.scope is not None:
                lease.scope.recent.answered(running, lease.began)
        if outcome.cause is Cause.OVERLOAD:
            state.counts.overloaded += 1
            if outcome.key is None:  # too much of one service says nothing of the others
                self._throttle(now, state, outcome.retry_after)
        elif SIGNALS[outcome.cause].outlier is Mark.FAILURE:
            state.counts.failed += 1
            self._note_failure(now, running, lease, outcome)
        else:
            state.counts.ignored += 1

    def body_failed(self, now: float, running: float, lease: Lease, outcome: Outcome) -> None:
        """The body of a reply broke off whose head was counted already."""
        lease.endpoint.counts.broken += 1
        if SIGNALS[outcome.cause].outlier is Mark.FAILURE:
            self._note_failure(now, running, lease, outcome)

    def _note_failure(self, now: float, running: float, lease: Lease, outcome: Outcome) -> None:
        scoped = _is_scoped(outcome)
        if not scoped:
            lease.endpoint.last_failed = now
        elif lease.scope is not None:
            lease.scope.last_failed = now
        if lease.set_aside:
            return
        sample = Sample(running, True, None, lease.key)
        if lease.scope is not None and outcome.key in (None, lease.key):
            lease.scope.recent.add(sample)
        if not scoped:
            lease.endpoint.recent.add(sample)

    def inform_breakers(self, now: float, lease: Lease, outcome: Outcome) -> None:
        """Let the breakers of the endpoint and of the keys concerned count it, and end the probe the lease may be.

        A failure counts for the scope it speaks about alone; a success for all the request went through.
        """
        state, mark, trip = lease.endpoint, SIGNALS[outcome.cause].breaker, outcome.trip
        if (lease.probing is not None or lease.panic) and _is_passed_on(outcome):
            mark = Mark.SUCCESS
        breaker, scoped = state.breaker, _is_scoped(outcome)
        # An instance that answers for one of its services being at fault is itself at work.
        own = Mark.SUCCESS if scoped else mark
        breaker.observe(now, own, lease.epoch, probe=lease.probing is breaker, panic=lease.panic, trip=trip)
        about = Mark.IGNORE if mark is Mark.FAILURE and not scoped else mark
        elsewhere = outcome.key is not None and outcome.key != lease.key
        if lease.scope is not None and lease.key is not None and state.scopes.get(lease.key) is lease.scope:
            keyed, mine = lease.scope.breaker, Mark.IGNORE if elsewhere else about
            keyed.observe(now, mine, lease.key_epoch, probe=keyed is lease.probing, panic=lease.panic, trip=trip)
        if elsewhere and outcome.key is not None and about is not Mark.IGNORE:
            keyed = self.scope(now, state, outcome.key).breaker
            keyed.observe(now, about, keyed.epoch, trip=trip)

    def eject_outliers(self, now: float, running: float) -> None:
        """Compare the endpoints and set aside what stands out, as far as the maximum share allows."""
        judge = self._judge
        if judge is None or now < self._next_judgement:
            return
        stands = {state: standing(state) for state in self._set}
        judged = [state for state, stand in stands.items() if stand in IN_SERVICE]
        findings = judge.compare(judged, running)
        self._next_judgement = now + _JUDGE_EVERY * max(1.0, judge.compared / 50)
        present = sum(stand is not Standing.DRAINING for stand in stands.values())
        for state, key, verdict in findings:
            in_service = sum(standing(one, key) in IN_SERVICE for one in judged)
            out = sum(any(scope.ejection.until is not None for scope in scopes_of(one, key)) for one in self._set)
            if out < max(1, int(judge.config.max_ejected * present)) and in_service > 1:
                self._eject(now, state, key, verdict, judge.config)

    def forgive_stall(self, seconds: float) -> None:
        """This process stalled: probes under way get the time back."""
        for state in self._set:
            state.breaker.forgive(seconds)
            for scope in state.scopes.values():
                scope.breaker.forgive(seconds)

    # --- time

    def advance(self, now: float) -> None:
        """Do what time alone does: reopen breakers, return the ejected and the throttled, climb the ramps."""
        if now < self.next_advance:
            return
        due = math.inf
        for state in self._set:
            due = min(due, self._advance_one(now, state))
        self.next_advance = due

    def _advance_one(self, now: float, state: EndpointState) -> float:
        """The time of the next change of this endpoint."""
        due = self._advance_scope(now, state, None, state)
        for key, scope in list(state.scopes.items()):
            due = min(due, self._advance_scope(now, state, key, scope))
        if now >= state.throttled_until > -math.inf:
            state.throttled_until = -math.inf
            self._invalidate()
        elif state.throttled_until > now:
            due = min(due, state.throttled_until)
        if state.ramp_from is not None:
            self._set_weight(now, state)
            due = min(due, now + _RAMP_STEP)
        return due

    def _advance_scope(self, now: float, state: EndpointState, key: str | None, scope: Scope) -> float:
        scope.breaker.advance(now)
        if now >= scope.height_until:
            scope.height, scope.height_until = None, math.inf
            self._invalidate()
        due = min(scope.breaker.next_change, scope.height_until)
        ejection = scope.ejection
        if ejection.until is not None:
            if now < ejection.until:
                return min(due, ejection.until)
            ejection.until, ejection.returned = None, now
            ejection.forget_at = now + self._outlier.eject_for
            self._start_afresh(now, state, key)
            self._invalidate()
            self._outbox.add(events.Returned(now, state.url, key))
        elif now >= ejection.forget_at:
            ejection.recent -= 1
            ejection.forget_at = now + self._outlier.eject_for if ejection.recent else math.inf
        return min(due, ejection.forget_at)

    # --- the inside

    @property
    def _outlier(self) -> Outlier:
        assert self._settings.outlier is not None  # nobody is ejected without one
        return self._settings.outlier

    def _fresh(self, endpoint: Endpoint) -> EndpointState:
        settings = self._settings
        health = HealthState(probed=settings.probed, rise=settings.rise, fall=settings.fall)
        state = EndpointState(endpoint, health)
        state.breaker = self._new_breaker(state, None)
        return state

    def _new_breaker(self, state: EndpointState, key: str | None) -> CircuitBreaker:
        return CircuitBreaker(self._settings.breaker, self._rng, partial(self._breaker_changed, state, key))

    def _breaker_changed(
        self, state: EndpointState, key: str | None, now: float, before: BreakerState, after: BreakerState, why: str
    ) -> None:
        due = -math.inf
        if after is BreakerState.OPEN:
            scope = state if key is None else state.scopes[key]
            due = scope.breaker.reopens_at
            scope.last_failed = now
            state.counts.breaker_opens += before is BreakerState.CLOSED
            self.condemned.append((state, key))
        elif after is BreakerState.CLOSED:
            self._start_afresh(now, state, key)
        self._outbox.add(events.BreakerChanged(now, state.url, key, before.value, after.value, why))
        self._invalidate(due)

    def _start_afresh(self, now: float, state: EndpointState, key: str | None) -> None:
        """What comes back is judged on what it does from now on, and an endpoint gets its share little by little."""
        if key is not None:
            state.scopes[key].recent.clear()
            return
        for scope in (state, *state.scopes.values()):
            scope.recent.clear()
        self._ramp(now, state)

    def _eject(self, now: float, state: EndpointState, key: str | None, verdict: Verdict, config: Outlier) -> None:
        scope = state if key is None else state.scopes[key]
        ejection = scope.ejection
        ejection.recent += 1
        seconds = min(config.eject_max, config.eject_for * ejection.recent) * (1 + config.jitter * self._rng.random())
        ejection.until = now + seconds
        ejection.forget_at = math.inf
        ejection.slow_since = ejection.stalled_since = None
        scope.last_failed = now
        state.counts.ejections += 1
        if key is not None:
            state.recent.forget(key)  # of what the service did, it must not be accused as a whole
        self.condemned.append((state, key))
        self._outbox.add(events.Ejected(now, state.url, verdict.signal, seconds, verdict.why, key))
        self._invalidate()

    def _throttle(self, now: float, state: EndpointState, retry_after: float | None) -> None:
        """Pass the endpoint over for as long as it asked, or a little longer each time in a row."""
        if now >= state.throttled_until:  # answers to requests sent before it was throttled say nothing new
            state.overload_streak += 1
        if retry_after is None:
            seconds = min(_OVERLOAD_MAX, _OVERLOAD_BACKOFF * 2.0 ** min(state.overload_streak - 1, 30))
        else:
            seconds = max(0.0, min(_RETRY_AFTER_MAX, retry_after))
        state.throttled_until = max(state.throttled_until, now + seconds)
        self._invalidate()

    def _administer(self, url: str) -> EndpointState:
        state = self._set.get(url)
        if state is None:
            known = ", ".join(state.url for state in self._set)
            raise ConfigError("endpoint", f"{url!r} is not one of the endpoints: {known}")
        return state

    def _ramp(self, now: float, state: EndpointState) -> None:
        if self._settings.slow_start.window:
            state.ramp_from = now
            self._set_weight(now, state)
        self._invalidate()

    def _set_weight(self, now: float, state: EndpointState) -> None:
        state.weight = state.endpoint.weight
        if state.ramp_from is None:
            return
        slow_start = self._settings.slow_start
        share = (now - state.ramp_from) / slow_start.window
        if share >= 1:
            state.ramp_from = None
        else:
            state.weight *= max(slow_start.floor, share)

    def _invalidate(self, due: float = -math.inf) -> None:
        """Something changed, and time alone will change it again when it is `due`; by default that is to be found."""
        self._views.clear()
        self.changed = True
        self.next_advance = min(self.next_advance, due)

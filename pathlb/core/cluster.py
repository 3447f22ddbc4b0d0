"""The endpoints side of the engine: what evidence, time and the operator do to each endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from . import events
from .breaker import BreakerState, CircuitBreaker
from .config import Breaker, Limits, Outlier, Panic, Retry, SlowStart, check_number
from .eligibility import Standing, View, standing, survey
from .endpoints import Admin, EndpointSet, EndpointState, SetChange
from .errors import ConfigError
from .health import Health, HealthState
from .lease import Lease
from .load import Sample
from .model import SIGNALS, Cause, Endpoint, Mark, Outcome, Rng
from .outlier import Verdict, judge

_JUDGE_EVERY = 0.1  # seconds between outlier comparisons of up to 50 endpoints; longer for more, the cost is linear
_OVERLOAD_BACKOFF = 0.25  # seconds an endpoint is passed over after a first 429 without Retry-After, doubling
_OVERLOAD_MAX = 8.0
_RETRY_AFTER_MAX = 30.0  # what one reply may ask for on behalf of all requests to its endpoint
_KEYS_KEPT = 100  # breakers of keys on one endpoint, beyond which those with nothing to remember are dropped
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

    def __post_init__(self) -> None:
        for name in ("rise", "fall"):
            check_number("Settings", name, getattr(self, name), 1, whole=True)


def _is_scoped(outcome: Outcome) -> bool:
    """Whether one service on the endpoint is at fault, and the endpoint itself is not."""
    return outcome.cause is Cause.SERVICE and outcome.key is not None


class Cluster:
    """All endpoints with their state. `changed` is set whenever picks may turn out differently from now on."""

    def __init__(self, settings: Settings, rng: Rng, outbox: events.Outbox) -> None:
        self._settings = settings
        self._rng = rng
        self._outbox = outbox
        self._set = EndpointSet()
        self._started = False
        self._views: dict[str | None, View] = {}
        self._shut: frozenset[str] | None = None
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

    def record_probe(self, now: float, url: str, passed: bool, why: str) -> None:
        """Take in the result of an active probe; of an endpoint removed meanwhile it is ignored."""
        state = self._set.get(url)
        if state is None:
            return
        before = state.health.state
        if not passed:
            state.last_failed = now
        if state.health.record(passed, why):
            if before is Health.DOWN or state.ramp_from is not None:
                self._ramp(now, state)  # from the moment it may serve, not from the moment it joined
            self._invalidate()
            self._outbox.add(events.HealthChanged(now, url, before.value, state.health.state.value, why))

    @property
    def fastest(self) -> float:
        """Seconds the fastest endpoint usually takes to a reply head; 0 before the first reply."""
        known = [state.latency.seconds for state in self._set if state.latency.seconds is not None]
        return min(known, default=0.0)

    def health_changing(self, url: str) -> bool:
        """Whether the last probe result contradicts the verdict, so that the next should come sooner."""
        state = self._set.get(url)
        return state is not None and state.health.changing

    def view(self, key: str | None) -> View:
        """What picks for `key` choose from."""
        view = self._views.get(key)
        if view is None:
            if key is not None and key not in self._shut_keys():
                return self.view(None)  # nothing sets it apart; keys come from callers, there may be any number
            view = self._views[key] = survey(self._set, self._settings.panic, key)
        return view

    def _shut_keys(self) -> frozenset[str]:
        """Keys with a breaker that is not closed."""
        if self._shut is None:
            self._shut = frozenset(
                key
                for state in self._set
                for key, breaker in state.key_breakers.items()
                if breaker.state is not BreakerState.CLOSED
            )
        return self._shut

    # --- evidence

    def succeeded(self, running: float, state: EndpointState, seconds: float) -> None:
        """A reply head arrived after `seconds`. `running` is the time less the stalls of this process."""
        state.latency.record(running, seconds)
        state.recent.answered(running, running - seconds)
        state.recent.add(Sample(running, False, seconds))
        state.overload_streak = 0
        state.counts.ok += 1

    def failed(self, now: float, running: float, lease: Lease, outcome: Outcome) -> None:
        """An outcome that was no success, for every signal but the breakers."""
        state = lease.endpoint
        if outcome.status is not None:
            state.recent.answered(running, lease.began)
        if outcome.cause is Cause.OVERLOAD:
            state.counts.overloaded += 1
            self._throttle(now, state, outcome.retry_after)
        elif SIGNALS[outcome.cause].outlier is Mark.FAILURE:
            state.counts.failed += 1
            self._note_failure(now, running, state, outcome)
        else:
            state.counts.ignored += 1

    def body_failed(self, now: float, running: float, state: EndpointState, outcome: Outcome) -> None:
        """The body of a reply broke off whose head was counted already."""
        state.counts.broken += 1
        if SIGNALS[outcome.cause].outlier is Mark.FAILURE:
            self._note_failure(now, running, state, outcome)

    def _note_failure(self, now: float, running: float, state: EndpointState, outcome: Outcome) -> None:
        if not _is_scoped(outcome):
            state.recent.add(Sample(running, True, None))
            state.last_failed = now

    def inform_breakers(self, now: float, lease: Lease, outcome: Outcome) -> None:
        """Let the breakers of the endpoint and of the keys concerned count it, and end the probe the lease may be."""
        state, mark = lease.endpoint, SIGNALS[outcome.cause].breaker
        breaker, keyed = state.breaker, lease.key is not None or outcome.key is not None
        # An instance that answers for one of its services being at fault is itself at work.
        own = Mark.SUCCESS if keyed and _is_scoped(outcome) else mark
        breaker.observe(now, own, lease.epoch, probe=lease.probing is breaker, panic=lease.panic)
        if not keyed:
            return
        if outcome.key is not None and mark is Mark.FAILURE and outcome.key not in state.key_breakers:
            self._add_key_breaker(now, state, outcome.key)
        for key in dict.fromkeys((lease.key, outcome.key)):
            scoped = state.key_breakers.get(key) if key is not None else None
            if scoped is None:
                continue
            about = mark if outcome.key is None or outcome.key == key else Mark.IGNORE
            epoch = lease.key_epoch if key == lease.key else scoped.epoch
            scoped.observe(now, about, epoch, probe=scoped is lease.probing, panic=lease.panic)

    def _add_key_breaker(self, now: float, state: EndpointState, key: str) -> None:
        breakers = state.key_breakers
        if len(breakers) >= _KEYS_KEPT:
            for idle in [known for known, breaker in breakers.items() if breaker.idle(now)]:
                del breakers[idle]
        breakers[key] = self._new_breaker(state, key)

    def eject_outliers(self, now: float, running: float) -> None:
        """Compare the endpoints and set aside what stands out, as far as the maximum share allows."""
        config = self._settings.outlier
        if config is None or now < self._next_judgement:
            return
        self._next_judgement = now + _JUDGE_EVERY * max(1.0, len(self._set) / 50)
        stands = {state.url: standing(state) for state in self._set}
        in_service = (Standing.READY, Standing.SLOW_START, Standing.THROTTLED)
        judged = [state for state in self._set if stands[state.url] in in_service]
        present = sum(verdict is not Standing.DRAINING for verdict in stands.values())
        out = sum(state.ejection.until is not None for state in self._set)
        room = min(max(1, int(config.max_ejected * present)) - out, len(judged) - 1)
        for verdict in judge(judged, running, config)[: max(0, room)]:
            self._eject(now, verdict, config)

    def forgive_stall(self, seconds: float) -> None:
        """This process stalled: probes under way get the time back."""
        for state in self._set:
            state.breaker.forgive(seconds)
            for breaker in state.key_breakers.values():
                breaker.forgive(seconds)

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
        due = math.inf
        for breaker in (state.breaker, *state.key_breakers.values()):
            breaker.advance(now)
            due = min(due, breaker.next_change)
        ejection = state.ejection
        if ejection.until is not None:
            if now >= ejection.until:
                ejection.until = None
                ejection.forget_at = now + self._outlier.eject_for
                state.recent.clear()
                self._ramp(now, state)
                self._outbox.add(events.Returned(now, state.url))
            else:
                due = min(due, ejection.until)
        elif now >= ejection.forget_at:
            ejection.recent -= 1
            ejection.forget_at = now + self._outlier.eject_for if ejection.recent else math.inf
        if now >= state.throttled_until > -math.inf:
            state.throttled_until = -math.inf
            self._invalidate()
        elif state.throttled_until > now:
            due = min(due, state.throttled_until)
        if state.ramp_from is not None:
            self._set_weight(now, state)
            due = min(due, now + _RAMP_STEP)
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
        if after is BreakerState.OPEN:
            state.last_failed = now
            state.counts.breaker_opens += before is BreakerState.CLOSED
            self.condemned.append((state, key))
        elif after is BreakerState.CLOSED and key is None:
            state.recent.clear()
            self._ramp(now, state)
        self._outbox.add(events.BreakerChanged(now, state.url, key, before.value, after.value, why))
        self._invalidate()

    def _eject(self, now: float, verdict: Verdict, config: Outlier) -> None:
        state, ejection = verdict.endpoint, verdict.endpoint.ejection
        ejection.recent += 1
        seconds = min(config.eject_max, config.eject_for * ejection.recent) * (1 + config.jitter * self._rng.random())
        ejection.until = now + seconds
        ejection.forget_at = math.inf
        ejection.slow_since = ejection.stalled_since = None
        state.last_failed = now
        state.counts.ejections += 1
        self.condemned.append((state, None))
        self._outbox.add(events.Ejected(now, state.url, verdict.signal, seconds, verdict.why))
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

    def _invalidate(self) -> None:
        self._views.clear()
        self._shut = None
        self.changed = True
        self.next_advance = -math.inf

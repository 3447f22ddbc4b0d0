"""The circuit breaker of one scope (an endpoint, or one service on it), as a (state, event) -> state table.

In words: closed, it counts outcomes. Tripped, it stays open for a while, longer each time. Then it is half-open and
lets one request through as a probe. A probe that passes closes it; one that fails, or does not answer within its
lease, opens it for twice as long; one whose caller cancelled says nothing, and another may be tried. While it is open
an outcome of a request picked in panic can prove the endpoint works, which closes it too. What was picked before a
transition says nothing after it: every pick carries the `epoch` it was made in.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable

from .config import Breaker
from .errors import IllegalEvent
from .model import Mark, Rng
from .window import SlidingCount


class BreakerState(enum.Enum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"
    PROBING = "probing"


class BreakerEvent(enum.Enum):
    TRIPPED = "too many failures"
    ELAPSED = "open time is over"
    PROBE_STARTED = "probe sent"
    PROBE_PASSED = "probe succeeded"
    PROBE_FAILED = "probe failed"
    PROBE_ABANDONED = "probe said nothing"
    PROVED = "a request sent in panic succeeded"


_S, _E = BreakerState, BreakerEvent

TRANSITIONS: dict[tuple[BreakerState, BreakerEvent], BreakerState] = {
    (_S.CLOSED, _E.TRIPPED): _S.OPEN,
    (_S.OPEN, _E.ELAPSED): _S.HALF_OPEN,
    (_S.OPEN, _E.PROVED): _S.CLOSED,
    (_S.HALF_OPEN, _E.PROBE_STARTED): _S.PROBING,
    (_S.HALF_OPEN, _E.PROVED): _S.CLOSED,
    (_S.PROBING, _E.PROBE_PASSED): _S.CLOSED,
    (_S.PROBING, _E.PROBE_FAILED): _S.OPEN,
    (_S.PROBING, _E.PROBE_ABANDONED): _S.HALF_OPEN,
    (_S.PROBING, _E.PROVED): _S.CLOSED,
}

_CLOSED = BreakerState.CLOSED  # an enum's own lookup costs more than the rest of a line
_SUCCESS, _FAILURE, _IGNORE = Mark.SUCCESS, Mark.FAILURE, Mark.IGNORE

OnChange = Callable[[float, BreakerState, BreakerState, str], None]


class CircuitBreaker:
    """One breaker. `on_change(now, before, after, why)` is told of every transition."""

    __slots__ = (
        "_config",
        "_failures",
        "_half_open_since",
        "_on_change",
        "_open_epoch",
        "_probe_lease",
        "_rng",
        "_successes",
        "closed_at",
        "consecutive_failures",
        "epoch",
        "opens",
        "probe_deadline",
        "reopens_at",
        "state",
    )

    def __init__(self, config: Breaker, rng: Rng, on_change: OnChange) -> None:
        self._config = config
        self._rng = rng
        self._on_change = on_change
        self._successes = SlidingCount(config.window)
        self._failures = SlidingCount(config.window)
        self._half_open_since = 0.0
        self._open_epoch = 0
        self.state = _CLOSED
        self.epoch = 0
        """Number of transitions so far; what was picked in an earlier epoch no longer counts."""
        self.consecutive_failures = 0
        self.opens = 0
        """Openings in a row without `window` seconds closed in between; decides the next open time."""
        self.closed_at = -math.inf
        self.reopens_at = math.inf
        """When the open time is over and a probe may be sent."""
        self.probe_deadline = math.inf
        self._probe_lease = math.inf

    # --- picks

    def may_probe(self, now: float, resendable: bool) -> bool:
        """Whether a request may go as the probe: for `probe_patience` seconds only one that may be sent twice."""
        return self.state is BreakerState.HALF_OPEN and (
            resendable or now - self._half_open_since >= self._config.probe_patience
        )

    def start_probe(self, now: float, patience: float = math.inf) -> None:
        """The pick that carries the epoch from here on is the probe. Its lease lasts `probe_timeout` seconds, or
        `patience` if that is less.
        """
        self._fire(now, BreakerEvent.PROBE_STARTED)
        self._probe_lease = min(self._config.probe_timeout, patience)
        self.probe_deadline = now + self._probe_lease

    # --- outcomes

    def observe(
        self, now: float, mark: Mark, epoch: int, *, probe: bool = False, panic: bool = False, trip: bool = False
    ) -> None:
        """Count an outcome of a request picked in `epoch`, as the probe or in panic; to `trip` a failure is enough."""
        if self.state is _CLOSED:
            if epoch == self.epoch and mark is not _IGNORE:
                self._count(now, mark is _FAILURE, trip)
        elif probe and epoch == self.epoch:
            self._fire(now, _PROBE_EVENTS[mark])
        elif panic and epoch >= self._open_epoch and mark is _SUCCESS:
            self._fire(now, BreakerEvent.PROVED)

    def _count(self, now: float, failed: bool, trip: bool) -> None:
        if not failed:
            self._successes.add(now)
            self.consecutive_failures = 0
            return
        self._failures.add(now)
        self.consecutive_failures += 1
        good, bad = self._successes.total(now), self._failures.total(now)
        config = self._config
        if trip:
            self._fire(now, BreakerEvent.TRIPPED, "one failure was proof")
        elif self.consecutive_failures >= config.failures:
            self._fire(now, BreakerEvent.TRIPPED, f"{self.consecutive_failures} failures in a row")
        elif good + bad >= config.min_requests and good < config.success_rate * (good + bad):
            self._fire(now, BreakerEvent.TRIPPED, f"{bad} of {good + bad} failed in {config.window:g} s")

    # --- time

    @property
    def next_change(self) -> float:
        """When `advance` has something to do; infinity for never."""
        if self.state is BreakerState.OPEN:
            return self.reopens_at
        return self.probe_deadline if self.state is BreakerState.PROBING else math.inf

    def advance(self, now: float) -> None:
        """Do what time alone does: end the open time, end a probe's lease."""
        if self.state is BreakerState.OPEN and now >= self.reopens_at:
            self._fire(now, BreakerEvent.ELAPSED)
        elif self.state is BreakerState.PROBING and now >= self.probe_deadline:
            why = f"no answer from the probe in {self._probe_lease:.3g} s"
            self._fire(now, BreakerEvent.PROBE_FAILED, why)

    def idle(self, now: float) -> bool:
        """Whether it knows nothing that a new one would not: closed, and has been; no failure in the window."""
        return (
            self.state is _CLOSED
            and now - self.closed_at >= self._config.window
            and not self.consecutive_failures
            and not self._failures.total(now)
        )

    def forgive(self, seconds: float) -> None:
        """This process stalled for `seconds`: a probe under way gets them back."""
        self.probe_deadline += seconds

    def _fire(self, now: float, event: BreakerEvent, why: str | None = None) -> None:
        before = self.state
        try:
            after = TRANSITIONS[before, event]
        except KeyError:
            raise IllegalEvent(f"circuit breaker: {event.name} while {before.value}") from None
        self.state = after
        self.epoch += 1
        if after is BreakerState.OPEN:
            self._open(now, before)
        elif after is BreakerState.HALF_OPEN:
            self._half_open_since = now
        elif after is _CLOSED:
            self.closed_at = now
            self.consecutive_failures = 0
            self._successes.clear()
            self._failures.clear()
        self._on_change(now, before, after, why or event.value)

    def _open(self, now: float, before: BreakerState) -> None:
        config = self._config
        if before is _CLOSED:
            self._open_epoch = self.epoch
            if now - self.closed_at >= config.window:
                self.opens = 0
        self.opens += 1
        # The exponent is bounded only to keep the float finite; open_max caps the time long before.
        seconds = min(config.open_max, config.open_for * 2.0 ** min(self.opens - 1, 60))
        self.reopens_at = now + seconds * (1 - config.jitter * self._rng.random())


_PROBE_EVENTS = {
    Mark.SUCCESS: BreakerEvent.PROBE_PASSED,
    Mark.FAILURE: BreakerEvent.PROBE_FAILED,
    Mark.IGNORE: BreakerEvent.PROBE_ABANDONED,
}

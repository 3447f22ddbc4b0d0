"""The settings of the core: frozen, validated when built, every one with its unit, default and reason.

A wrong value raises `ConfigError` naming the field, here and not at the first request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from inspect import iscoroutinefunction
from typing import Any, Protocol

from .errors import ConfigError


def check_number(owner: str, name: str, value: Any, low: float, high: float = math.inf, *, whole: bool = False) -> None:
    """Raise `ConfigError` unless `low <= value <= high` (and whole, if asked); NaN and non-numbers never pass."""
    field_name = f"{owner}.{name}" if owner else name
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(field_name, f"must be a number, not {value!r}")
    if whole and not isinstance(value, int):
        raise ConfigError(field_name, f"must be a whole number, not {value!r}")
    if not low <= value <= high:
        limits = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ConfigError(field_name, f"must be {limits}, not {value!r}")


def _check_all(settings: Any, **bounds: tuple[float, float] | tuple[float, float, str]) -> None:
    """Check the named fields of a dataclass against (low, high) or (low, high, "whole")."""
    for name, (low, high, *kind) in bounds.items():
        check_number(type(settings).__name__, name, getattr(settings, name), low, high, whole=bool(kind))


_ANY = math.inf
_HUGE = 1e9  # for what is multiplied: infinity times zero is no number
_TINY = 1e-6  # the shortest time that means anything; rules out zero and negative durations


@dataclass(frozen=True, slots=True)
class Breaker:
    """When a circuit breaker opens, for how long, and how it proves its endpoint again.

    It opens after `failures` failures in a row, or when over `window` seconds, with at least `min_requests`
    outcomes, fewer than `success_rate` of them were successes (the triggers of Finagle and Resilience4j).
    It stays open for `open_for` seconds, doubled at each failed probe up to `open_max`, each jittered by up to
    `jitter` of itself. Then one request probes; it must answer within `probe_timeout` seconds. For
    `probe_patience` seconds only a request that may be sent twice is taken as the probe.
    """

    failures: int = 5
    success_rate: float = 0.8
    min_requests: int = 20
    window: float = 30.0
    open_for: float = 1.0
    open_max: float = 60.0
    jitter: float = 0.2
    probe_timeout: float = 10.0
    probe_patience: float = 1.0

    def __post_init__(self) -> None:
        _check_all(
            self,
            failures=(1, _ANY, "whole"),
            success_rate=(0, 1),
            min_requests=(1, _ANY, "whole"),
            window=(_TINY, _ANY),
            open_for=(_TINY, _ANY),
            open_max=(_TINY, _ANY),
            jitter=(0, 0.5),
            probe_timeout=(_TINY, _ANY),
            probe_patience=(0, _ANY),
        )
        if self.open_max < self.open_for:
            raise ConfigError("Breaker.open_max", f"must be at least open_for ({self.open_for:g} s)")


@dataclass(frozen=True, slots=True)
class Outlier:
    """When an endpoint is set aside because it does worse than its peers.

    Three comparisons, each against the other endpoints (leave-one-out), each able to fire with two endpoints:

    - failures: its share of failures over the last `window` seconds exceeds the peers' by `failure_margin`, and luck
      explains that only with the probability of `failure_sigma` standard deviations (Fisher's exact test);
    - latency: its typical (geometric mean) latency is over `latency_factor` times that of the median peer, by more than
      `latency_sigma` standard errors, and over it by `latency_floor` seconds, for `confirm` seconds; it counts as
      recovered below `latency_clear` times;
    - stall: `stalled_attempts` attempts have waited longer than `overdue_factor` times what 19 of 20 replies take, and
      at least `overdue_floor` seconds, and nothing came back in that time, though peers answered what began
      later; one fewer counts after twice that time, a single one after four times.

    An ejection lasts `eject_for` seconds times the number of recent ejections, at most `eject_max`, with up to
    `jitter` added. At most `max_ejected` of the endpoints are out at once, rounded down, but always one of two or more.
    """

    window: float = 10.0
    min_requests: int = 8
    failure_margin: float = 0.2
    failure_sigma: float = 4.5
    latency_factor: float = 3.0
    latency_sigma: float = 3.0
    latency_clear: float = 1.5
    latency_floor: float = 0.05
    confirm: float = 0.3
    overdue_factor: float = 3.0
    overdue_floor: float = 0.5
    stalled_attempts: int = 3
    eject_for: float = 10.0
    eject_max: float = 300.0
    jitter: float = 0.2
    max_ejected: float = 0.5

    def __post_init__(self) -> None:
        _check_all(
            self,
            window=(_TINY, _ANY),
            min_requests=(1, _ANY, "whole"),
            failure_margin=(0, 1),
            failure_sigma=(0, _ANY),
            latency_factor=(1, _ANY),
            latency_sigma=(0, _ANY),
            latency_clear=(1, _ANY),
            latency_floor=(0, _ANY),
            confirm=(0, _ANY),
            overdue_factor=(1, _ANY),
            overdue_floor=(0, _ANY),
            stalled_attempts=(1, _ANY, "whole"),
            eject_for=(_TINY, _ANY),
            eject_max=(_TINY, _ANY),
            jitter=(0, 0.5),
            max_ejected=(_TINY, 1),
        )
        if self.latency_clear > self.latency_factor:
            raise ConfigError("Outlier.latency_clear", f"must be at most latency_factor ({self.latency_factor:g})")
        if self.eject_max < self.eject_for:
            raise ConfigError("Outlier.eject_max", f"must be at least eject_for ({self.eject_for:g} s)")


@dataclass(frozen=True, slots=True)
class Panic:
    """What to do when too few endpoints are eligible.

    When the eligible share is at or below `threshold` (default 0: none at all), picks fail open to the endpoint that
    failed least recently, drained ones never. `fail_closed=True` raises `NoEligibleEndpoint` instead.
    """

    threshold: float = 0.0
    fail_closed: bool = False

    def __post_init__(self) -> None:
        _check_all(self, threshold=(0, 1))
        if not isinstance(self.fail_closed, bool):
            raise ConfigError("Panic.fail_closed", f"must be True or False, not {self.fail_closed!r}")
        if self.fail_closed and self.threshold > 0:
            raise ConfigError("Panic.threshold", "has no meaning with fail_closed=True; leave it at 0")


@dataclass(frozen=True, slots=True)
class BlockHeight:
    """Prefer the endpoints of a blockchain service that have seen its latest blocks.

    Those more than `lag` blocks behind the highest are passed over while others will do, but for the `min_endpoints`
    highest. A height not heard of for `max_age` seconds is unknown, and an unknown one holds nobody back.
    """

    lag: int = 3
    min_endpoints: int = 2
    max_age: float = 15.0

    def __post_init__(self) -> None:
        _check_all(self, lag=(0, _ANY, "whole"), min_endpoints=(1, _ANY, "whole"), max_age=(_TINY, _ANY))


@dataclass(frozen=True, slots=True)
class SlowStart:
    """The ramp of an endpoint that joined or came back: its weight grows from `floor` of itself to all of it.

    `window` is in seconds (0 turns the ramp off). Endpoints present at the start do not ramp.
    """

    window: float = 10.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _check_all(self, window=(0, _ANY), floor=(_TINY, 1))


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be in flight and how much may wait.

    `concurrency` is per endpoint; beyond it requests wait in one first-in-first-out queue of at most `queue`
    requests, each at most `queue_timeout` seconds (a request's own httpx pool timeout, if set, is used instead).
    A full queue fails at once.
    """

    concurrency: int = 1_000
    queue: int = 5_000
    queue_timeout: float = 5.0

    def __post_init__(self) -> None:
        _check_all(self, concurrency=(1, _ANY, "whole"), queue=(0, _ANY, "whole"), queue_timeout=(0, _ANY))

    @classmethod
    def modest(cls) -> Limits:
        """Pool 100, queue 1,000: the first gateway settings of the original plan."""
        return cls(concurrency=100, queue=1_000)

    @classmethod
    def generous(cls) -> Limits:
        """Pool 500, queue 5,000: the raised gateway settings of the original plan."""
        return cls(concurrency=500, queue=5_000)


class StopStrategy(Protocol):
    """tenacity's `stop_*` objects: called with a `tenacity.RetryCallState`, true ends the attempts."""

    def __call__(self, retry_state: Any, /) -> bool: ...


class WaitStrategy(Protocol):
    """tenacity's `wait_*` objects: called with a `tenacity.RetryCallState`, the answer is in seconds."""

    def __call__(self, retry_state: Any, /) -> float: ...


class RetryStrategy(Protocol):
    """tenacity's `retry_if_*` objects: called with a `tenacity.RetryCallState`, true asks for another attempt."""

    def __call__(self, retry_state: Any, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Retry:
    """How often, when and on whose budget a request is sent again.

    `attempts` counts attempts that may have reached an endpoint (default: one per endpoint, at least 3); one that
    provably did not is free. Replies with a status in `statuses` are retried. Waits happen only when every endpoint
    was tried: full jitter from `wait_base` doubling to `wait_max` seconds, or the reply's Retry-After.

    The budget (Finagle's): each request earns `budget_ratio` of a retry, kept for `budget_ttl` seconds, on top of
    `budget_reserve` retries a second.

    `stop`, `wait` and `retry` take tenacity's strategy objects. They can ask for more or less patience, never for
    sending twice what is not safe to send twice.
    """

    attempts: int | None = None
    statuses: frozenset[int] | Sequence[int] = frozenset({429, 500, 502, 503, 504})
    wait_base: float = 0.025
    wait_max: float = 0.25
    budget_ratio: float = 0.2
    budget_reserve: float = 1.0
    budget_ttl: float = 10.0
    stop: StopStrategy | None = field(default=None, compare=False)
    wait: WaitStrategy | None = field(default=None, compare=False)
    retry: RetryStrategy | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.attempts is not None:
            _check_all(self, attempts=(1, _ANY, "whole"))
        _check_all(
            self,
            wait_base=(0, _HUGE),
            wait_max=(0, _HUGE),
            budget_ratio=(0, _HUGE),
            budget_reserve=(0, _HUGE),
            budget_ttl=(1, _HUGE),
        )
        if not isinstance(self.statuses, Iterable):
            raise ConfigError("Retry.statuses", f"must be a set of status codes, not {self.statuses!r}")
        statuses = list(self.statuses)
        for status in statuses:
            check_number("Retry", "statuses", status, 400, 599, whole=True)
        object.__setattr__(self, "statuses", frozenset(statuses))
        if self.wait_max < self.wait_base:
            raise ConfigError("Retry.wait_max", f"must be at least wait_base ({self.wait_base:g} s)")
        for name in ("stop", "wait", "retry"):
            strategy = getattr(self, name)
            if strategy is not None and not callable(strategy):
                raise ConfigError(f"Retry.{name}", f"must be a tenacity strategy object, not {strategy!r}")
            if iscoroutinefunction(strategy) or iscoroutinefunction(getattr(strategy, "__call__", None)):  # noqa: B004
                raise ConfigError(f"Retry.{name}", "must not be async: decisions are made between two awaits")
        if self.stop is not None and self.attempts is not None:
            raise ConfigError("Retry.stop", "contradicts attempts=; give one of the two")

"""What is known of an endpoint's load: its latency estimate, its recent outcomes, and what it says itself."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


class LatencyEstimate:
    """Time-decayed mean of the time to the reply head, in seconds; None until the first sample.

    A sample that comes `dt` seconds after the one before weighs 1 - exp(-dt / tau): an old estimate gives way to
    the first new sample, so a once-slow endpoint is not remembered as slow (pitfall 2).
    """

    __slots__ = ("_tau", "_updated", "seconds")

    def __init__(self, tau: float = 10.0) -> None:
        self._tau = tau
        self._updated = 0.0
        self.seconds: float | None = None

    def record(self, now: float, seconds: float) -> None:
        """Take in one sample."""
        if self.seconds is None:
            self.seconds = seconds
        else:
            self.seconds += (seconds - self.seconds) * -math.expm1((self._updated - now) / self._tau)
        self._updated = now


@dataclass(frozen=True, slots=True)
class ReportedLoad:
    """What an endpoint says of its own load; None where it does not say."""

    at: float
    """Clock reading at which it came."""
    utilization: float | None = None
    """Of what it can do, as a fraction; above 1 is more than it wants."""
    in_flight: int | None = None
    """Requests it is working on, whoever they came from."""
    rps: float | None = None
    """Requests it answers a second."""


class Sample(NamedTuple):
    """One outcome as the outlier comparison sees it. `at` is in running time (the clock less own stalls)."""

    at: float
    failed: bool
    seconds: float | None
    """Time to the reply head; None when it says nothing about the endpoint."""
    key: str | None = None


class RecentOutcomes:
    """The last outcomes of a scope, at most `size` of them."""

    __slots__ = ("_samples", "last_answered", "last_head")

    def __init__(self, size: int = 64) -> None:
        self._samples: deque[Sample] = deque(maxlen=size)
        self.last_head = -math.inf
        """When a reply head last arrived, in running time."""
        self.last_answered = -math.inf
        """When the latest of the attempts with a reply head began, in running time."""

    @property
    def last_added(self) -> float:
        """When the latest sample came."""
        return self._samples[-1].at if self._samples else -math.inf

    def add(self, sample: Sample) -> None:
        self._samples.append(sample)

    def answered(self, now: float, began: float) -> None:
        """A reply head arrived."""
        self.last_head = now
        if began > self.last_answered:
            self.last_answered = began

    @property
    def complete_since(self) -> float:
        """From when on none is missing."""
        full = len(self._samples) == self._samples.maxlen
        return self._samples[0].at if full else -math.inf

    def clear(self) -> None:
        """Forget them, so that an endpoint coming back is judged on what it does from now on."""
        self._samples.clear()

    def forget(self, key: str) -> None:
        """Forget what one service did."""
        kept = [sample for sample in self._samples if sample.key != key]
        self._samples.clear()
        self._samples.extend(kept)

    def since(self, start: float) -> list[Sample]:
        """The samples from `start` on, oldest first."""
        return [sample for sample in self._samples if sample.at >= start]

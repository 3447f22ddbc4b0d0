"""What is known of one scope: an endpoint as a whole, or one service (key) on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .breaker import BreakerState, CircuitBreaker
from .health import Health, HealthState
from .load import RecentOutcomes

if TYPE_CHECKING:
    from .lease import Lease


@dataclass(slots=True)
class Ejection:
    """Whether the scope is out as an outlier, until when, and how often lately."""

    until: float | None = None
    recent: int = 0
    """Decides how long the next one lasts; one is forgotten for every `eject_for` spent in."""
    forget_at: float = math.inf
    slow_since: float | None = None
    """Since when its latency stands out, for the hysteresis."""
    stalled_since: float | None = None
    """Since when it has been silent while its peers answered."""
    returned: float = -math.inf
    """Clock reading at which it last came back."""


class Scope:
    """Breaker, health, ejection and load of one scope; the endpoint's own counts what its services do as well."""

    __slots__ = ("breaker", "ejection", "health", "height", "height_until", "last_failed", "recent", "waiting")

    breaker: CircuitBreaker
    """Set right after construction: its callback needs this object."""

    def __init__(self, health: HealthState) -> None:
        self.health = health
        self.ejection = Ejection()
        self.recent = RecentOutcomes()
        self.waiting: dict[Lease, None] = {}
        """Leases without a reply head, oldest first."""
        self.last_failed = -math.inf
        """Clock reading."""
        self.height: int | None = None
        """Block height last seen, None when that is too long ago."""
        self.height_until = math.inf
        """When it will be."""

    @property
    def in_service(self) -> bool:
        """Whether it is not itself the reason to pass an endpoint over."""
        return (
            self.breaker.state is BreakerState.CLOSED and self.ejection.until is None and self.health.state is Health.UP
        )

    def idle(self, now: float) -> bool:
        """Whether it knows nothing a new one would not, but for outcomes that its peers remember too."""
        return (
            self.breaker.idle(now)
            and self.health.plain
            and not self.waiting
            and self.height is None
            and self.ejection.until is None
            and not self.ejection.recent
        )

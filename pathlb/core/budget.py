"""The retry budget: retries may be a share of the requests, plus a small reserve (Finagle's RetryBudget)."""

from __future__ import annotations

from .config import Retry
from .window import SlidingCount


class RetryBudget:
    """What the requests of the last `budget_ttl` seconds earned, less the retries they paid for.

    Each request deposits `budget_ratio` when it arrives, not when it succeeds: the budget does not shrink because
    requests fail (pitfall 5). The balance is never negative.
    """

    __slots__ = ("_deposits", "_ratio", "_reserve", "_withdrawals")

    def __init__(self, config: Retry) -> None:
        self._ratio = config.budget_ratio
        self._reserve = config.budget_reserve * config.budget_ttl
        self._deposits = SlidingCount(config.budget_ttl)
        self._withdrawals = SlidingCount(config.budget_ttl)

    def deposit(self, now: float) -> None:
        """A request arrived."""
        self._deposits.add(now)

    def balance(self, now: float) -> float:
        """Retries that may be made now."""
        earned = self._reserve + self._ratio * self._deposits.total(now)
        return max(0.0, earned - self._withdrawals.total(now))

    def withdraw(self, now: float) -> bool:
        """Pay for one retry; false when there is not enough."""
        if self.balance(now) < 1:
            return False
        self._withdrawals.add(now)
        return True

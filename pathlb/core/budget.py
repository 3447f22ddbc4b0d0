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


class RetryBudgets:
    """One budget for each key: a service that fails everywhere spends its own retries, and nobody else's.

    Beyond `KEPT` keys in use the others share the one of requests without a key, so made-up keys earn nothing.
    """

    KEPT = 50

    __slots__ = ("_by_key", "_common", "_config", "_used")

    def __init__(self, config: Retry) -> None:
        self._config = config
        self._common = RetryBudget(config)
        self._by_key: dict[str, RetryBudget] = {}
        self._used: dict[str, float] = {}

    def of(self, now: float, key: str | None) -> RetryBudget:
        """The budget a request for `key` earns and spends."""
        if key is None:
            return self._common
        budget = self._by_key.get(key)
        if budget is None:
            if len(self._by_key) >= self.KEPT and not self._drop_unused(now):
                return self._common
            budget = self._by_key[key] = RetryBudget(self._config)
        self._used[key] = now
        return budget

    def balance(self, now: float) -> float:
        """Retries that may be made now, over all."""
        return self._common.balance(now) + sum(budget.balance(now) for budget in self._by_key.values())

    def _drop_unused(self, now: float) -> bool:
        """Forget those that nothing was earned or spent on for so long that they are as new."""
        unused = [key for key, used in self._used.items() if now - used > self._config.budget_ttl]
        for key in unused:
            del self._by_key[key], self._used[key]
        return bool(unused)

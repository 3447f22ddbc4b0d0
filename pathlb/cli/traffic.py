"""Steady traffic at a rate of its own, whatever becomes of the answers, and the account of it."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import anyio

from ..core.model import Clock

TOO_LATE = 1.0
"""Seconds behind its time at which a request is not sent any more: this process could not keep up."""

_WINDOW = 1.0  # seconds that the live figures look back


async def open_loop(
    rate: float, seconds: float, fire: Callable[[], object], account: Account, clock: Clock = time.monotonic
) -> None:
    """Call `fire` `rate` times a second, each time when it is due and not when the last answer is there.

    A loop that waits for answers slows down with a slow server and hides it. One that falls behind itself catches up;
    what is more than `TOO_LATE` seconds late is left out, and the account says so.
    """
    began = clock()
    try:
        for number in range(max(1, round(rate * seconds))):
            ahead = began + number / rate - clock()
            # Also when behind: the requests sent need the loop as well.
            await anyio.sleep(max(0.0, ahead))
            account.due += 1
            if ahead > -TOO_LATE:
                account.sent += 1
                fire()
        await anyio.sleep(max(0.0, began + seconds - clock()))
    finally:
        account.seconds = clock() - began


@dataclass(slots=True)
class Tally:
    """How many requests for one service ended, and how."""

    ended: int = 0
    lost: int = 0
    hopeless: int = 0
    """Of the lost: nobody could have answered them."""
    retried: int = 0
    """Requests that took more than one attempt."""

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.ended + other.ended,
            self.lost + other.lost,
            self.hopeless + other.hopeless,
            self.retried + other.retried,
        )


@dataclass(slots=True)
class Account:
    """What came of the requests that ended in one phase. Times in seconds."""

    phase: str
    seconds: float = 0.0
    due: int = 0
    """Requests the schedule asked for."""
    sent: int = 0
    tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    """By service."""
    latencies: list[float] = field(default_factory=list)
    """Of the answered requests: from the call to the last byte of the body."""
    answered_by: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> Tally:
        """Of all services."""
        return sum(self.tallies.values(), Tally())

    @property
    def rate(self) -> float:
        """Requests a second really sent."""
        return self.sent / self.seconds if self.seconds else 0.0

    def share(self, instance: str) -> float:
        """Of the answered requests, the part this instance answered."""
        total = self.answered_by.total()
        return self.answered_by[instance] / total if total else 0.0


class Ledger:
    """The accounts of all phases, and what happened within the last second."""

    def __init__(self) -> None:
        self.accounts: list[Account] = []
        self.reasons: Counter[str] = Counter()
        """Why requests were lost, in words."""
        self._recent: deque[tuple[float, str, float]] = deque()

    @property
    def current(self) -> Account:
        return self.accounts[-1]

    def open(self, phase: str) -> Account:
        """From now on requests end in this phase."""
        account = Account(phase)
        self.accounts.append(account)
        return account

    def answered(self, service: str, now: float, instance: str, seconds: float, attempts: int) -> None:
        account = self.current
        account.latencies.append(seconds)
        account.answered_by[instance] += 1
        tally = account.tallies[service]
        tally.ended += 1
        tally.retried += attempts > 1
        self._recent.append((now, instance, seconds))

    def lost(self, service: str, reason: str, attempts: int, hopeless: bool = False) -> None:
        tally = self.current.tallies[service]
        tally.ended += 1
        tally.lost += 1
        tally.hopeless += hopeless
        tally.retried += attempts > 1
        self.reasons[reason] += 1

    def totals(self) -> defaultdict[str, Tally]:
        """Over all phases, by service."""
        totals: defaultdict[str, Tally] = defaultdict(Tally)
        for account in self.accounts:
            for service, tally in account.tallies.items():
                totals[service] += tally
        return totals

    def recent(self, now: float) -> Recent:
        """The answers of the last second."""
        while self._recent and self._recent[0][0] < now - _WINDOW:
            self._recent.popleft()
        latencies: dict[str, list[float]] = {}
        for _, instance, seconds in self._recent:
            latencies.setdefault(instance, []).append(seconds)
        return Recent(latencies)


@dataclass(frozen=True, slots=True)
class Recent:
    """Latencies of the answers of the last second, by instance."""

    latencies: dict[str, list[float]]

    def rate(self, instance: str) -> float:
        return len(self.latencies.get(instance, ())) / _WINDOW

    def p50(self, instance: str) -> float | None:
        return percentile(self.latencies.get(instance, ()), 50)

    def share(self, instance: str) -> float:
        total = sum(map(len, self.latencies.values()))
        return len(self.latencies.get(instance, ())) / total if total else 0.0

    def everything(self) -> list[float]:
        return [seconds for one in self.latencies.values() for seconds in one]


def percentile(values: Iterable[float], percent: float) -> float | None:
    """The smallest value that `percent` of them do not exceed (nearest rank); None of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)] if ranked else None

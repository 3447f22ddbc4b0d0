"""What the tests of the core share: outcomes, an engine with its events recorded, a random source that is told."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pathlb.core.cluster import Settings
from pathlb.core.endpoints import EndpointState, check_endpoints
from pathlb.core.engine import TICK, Engine
from pathlb.core.events import Event
from pathlb.core.lease import Lease, Want
from pathlb.core.model import Cause, Outcome, Sent
from pathlb.core.policy import LeastConnections, Policy

OK = Outcome(Cause.OK, status=200)
BROKEN = Outcome(Cause.INSTANCE, retry=True, status=500)
REFUSED = Outcome(Cause.INSTANCE, sent=Sent.NOT_SENT, retry=True, detail="connection refused")
BUSY = Outcome(Cause.OVERLOAD, retry=True, status=429)
CANCELLED = Outcome(Cause.CANCELLED)
GIVEN_UP = Outcome(Cause.GIVEN_UP, retry=True)
LOCAL = Outcome(Cause.LOCAL, retry=True)

EventT = TypeVar("EventT")


def urls(count: int) -> list[str]:
    return [f"http://gw{number}" for number in range(count)]


def unset() -> None:
    """The `settle` of a waiter nobody waits for."""


class ScriptedRng:
    """Gives the numbers it was given, round and round."""

    def __init__(self, *numbers: float) -> None:
        self._numbers = numbers or (0.0,)
        self._next = 0

    def random(self) -> float:
        number = self._numbers[self._next % len(self._numbers)]
        self._next += 1
        return number

    def randrange(self, stop: int, /) -> int:
        return int(self.random() * stop)


class Rig:
    """An engine with `count` endpoints gw0, gw1, ... and all its events."""

    def __init__(
        self,
        count: int | Iterable[Any] = 3,
        settings: Settings | None = None,
        policy: Policy | None = None,
        seed: int = 1,
    ) -> None:
        self.settings = settings or Settings()
        self.engine = Engine(self.settings, policy or LeastConnections(), random.Random(seed))
        self.events: list[Event] = []
        self.engine.subscribe(self.events.append)
        given = urls(count) if isinstance(count, int) else count
        if given:
            self.engine.apply(0.0, check_endpoints(given))

    def state(self, number: int) -> EndpointState:
        return next(state for state in self.engine.members if state.url == f"http://gw{number}")

    def lease(self, now: float, want: Want | None = None, **wants: Any) -> Lease:
        grant = self.engine.acquire(now, want or Want(**wants), unset)
        assert isinstance(grant, Lease), grant
        return grant

    def finish(self, now: float, lease: Lease, outcome: Outcome = OK) -> None:
        self.engine.observe(now, lease, outcome)
        self.engine.release(now, lease)

    def request(self, now: float, outcome: Outcome = OK, seconds: float = 0.0, **wants: Any) -> EndpointState:
        lease = self.lease(now, **wants)
        self.finish(now + seconds, lease, outcome)
        return lease.endpoint

    def fail(self, number: int, now: float, times: int = 5, outcome: Outcome = BROKEN) -> EndpointState:
        """Requests pinned to one endpoint, all failing."""
        for _ in range(times):
            self.request(now, outcome, pin=f"http://gw{number}")
        return self.state(number)

    def tick(self, start: float, end: float) -> float:
        """The heartbeats of a span of time."""
        steps = round((end - start) / TICK)
        for step in range(1, steps + 1):
            self.engine.tick(start + step * TICK)
        return start + steps * TICK

    def seen(self, kind: type[EventT]) -> list[EventT]:
        return [event for event in self.events if isinstance(event, kind)]


def shares(picks: Sequence[str]) -> dict[str, float]:
    return {url: picks.count(url) / len(picks) for url in set(picks)}


def recorder() -> tuple[list[int], Callable[[], None]]:
    """A list that grows by one with every call of the function."""
    calls: list[int] = []
    return calls, lambda: calls.append(1)

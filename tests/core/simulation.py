"""A small discrete-event simulation that drives an Engine the way the async shell does, on fake time.

Requests arrive as a Poisson stream; each endpoint answers by its `Behaviour`, which may change while the simulation
runs. Heartbeats come every TICK, except while the process is stalled.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pathlb.core import events
from pathlb.core.admission import Waiter
from pathlb.core.cluster import Settings
from pathlb.core.endpoints import check_endpoints
from pathlb.core.engine import TICK, Engine, Refusal
from pathlb.core.lease import Lease, LeaseState, Want
from pathlb.core.model import Outcome
from pathlb.core.policy import LeastConnections, Policy
from pathlb.core.retry import Again

from .helpers import BROKEN, GIVEN_UP, OK, urls

Distribution = Callable[[random.Random], float]


def exponential(mean: float) -> Distribution:
    return lambda rng: rng.expovariate(1 / mean)


def lognormal(mean: float, sigma: float = 1.0) -> Distribution:
    mu = math.log(mean) - sigma * sigma / 2
    return lambda rng: rng.lognormvariate(mu, sigma)


def constant(seconds: float) -> Distribution:
    return lambda rng: seconds


@dataclass
class Behaviour:
    """How an endpoint answers from now on. A failure takes `failing` as long as a success."""

    service: Distribution
    factor: float = 1.0
    failure_rate: float = 0.0
    failure: Outcome = BROKEN
    failure_seconds: float | None = None
    hangs: bool = False
    """What is sent while it hangs is never answered."""
    paused_until: float = 0.0
    """It answers nothing before, and then everything."""
    services: dict[str, Behaviour] = field(default_factory=dict)
    """Of single services (keys), where it differs."""


@dataclass(frozen=True)
class Service:
    """One service (key): its share of the traffic, how long it takes, what part of it is not safe to send twice."""

    share: float
    duration: Distribution
    writes: float = 0.0


@dataclass
class Request:
    want: Want
    arrived: float
    attempts: int = 0


@dataclass
class Simulation:
    """`run` to a point in time, change `behaviours`, `run` on."""

    count: int
    rate: float
    service: Distribution
    seed: int = 0
    settings: Settings = field(default_factory=Settings)
    policy: Policy = field(default_factory=LeastConnections)
    read_timeout: float = 15.0
    deadline: float = 30.0
    services: dict[str, Service] = field(default_factory=dict)
    """Of which the traffic is made; without any, requests have no key."""

    def __post_init__(self) -> None:
        self.now = 0.0
        self.rng = random.Random(self.seed)
        self.engine = Engine(self.settings, self.policy, random.Random(self.seed + 1))
        self.behaviours = [Behaviour(self.service) for _ in range(self.count)]
        for behaviour in self.behaviours:
            behaviour.services = {key: Behaviour(service.duration) for key, service in self.services.items()}
        self._numbers = {url: number for number, url in enumerate(urls(self.count))}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self.stalled_until = 0.0
        self.ejected: list[events.Ejected] = []
        self.returned: list[events.Returned] = []
        self.opened: list[events.BreakerChanged] = []
        self.given_up = 0
        self.done = 0
        self.lost = 0
        self.lost_of: Counter[str | None] = Counter()
        self.latencies: list[tuple[float, float]] = []
        self.picks: list[tuple[float, int, str]] = []
        self.keys: list[str | None] = []
        """Of the picks."""
        self.keep_picks = False
        self.engine.subscribe(self._listen)
        self.engine.apply(0.0, check_endpoints(urls(self.count)))
        self.engine.tick(0.0)
        self._at(TICK, self._tick)
        self._at(self.rng.expovariate(self.rate), self._arrive)

    # --- the clock

    def _at(self, when: float, act: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (when, self._sequence, act))

    def run(self, until: float) -> None:
        """Everything up to `until`. During a stall nothing runs; what was due happens right after it."""
        heap = self._heap
        while heap and heap[0][0] <= until:
            when, _, act = heapq.heappop(heap)
            if when < self.stalled_until:
                # Replies are read before late timers fire: the tick goes to the end of that moment.
                self._at(self.stalled_until + (1e-6 if act == self._tick else 0.0), act)
                continue
            self.now = max(self.now, when)
            act()
        self.now = until

    def stall(self, seconds: float) -> None:
        self.stalled_until = self.now + seconds

    def _tick(self) -> None:
        self.engine.tick(self.now)
        self._at(self.now + TICK, self._tick)

    # --- requests

    def _arrive(self) -> None:
        self._at(self.now + self.rng.expovariate(self.rate), self._arrive)
        if not self.services:
            self._admit(Request(Want(resendable=True), self.now))
            return
        (key,) = (
            self.services
            if len(self.services) == 1
            else self.rng.choices(list(self.services), [service.share for service in self.services.values()])
        )
        writes = self.services[key].writes
        resendable = not writes or self.rng.random() >= writes
        self._admit(Request(Want(resendable=resendable, key=key), self.now))

    def _admit(self, request: Request) -> None:
        holder: list[Any] = []
        grant = self.engine.acquire(
            self.now, request.want, lambda: self._at(self.now, lambda: self._granted(request, holder[0]))
        )
        if isinstance(grant, Waiter):
            holder.append(grant)
        else:
            self._start(request, grant)

    def _granted(self, request: Request, waiter: Waiter[Lease | Refusal]) -> None:
        assert waiter.grant is not None
        self._start(request, waiter.grant)

    def _start(self, request: Request, grant: Lease | Refusal) -> None:
        if isinstance(grant, Refusal):
            self._lose(request)
            return
        request.attempts += 1
        number = self._numbers[grant.endpoint.url]
        if self.keep_picks:
            self.picks.append((self.now, number, grant.reason))
            self.keys.append(grant.key)
        behaviour = self.behaviours[number]
        if behaviour.services and grant.key is not None:
            behaviour = behaviour.services[grant.key]
        grant.give_up = partial(self._given_up, request, grant)
        if behaviour.hangs:
            self._at(self.now + self.read_timeout, lambda: self._end(request, grant, BROKEN))
            return
        fails = behaviour.failure_rate > 0 and self.rng.random() < behaviour.failure_rate
        seconds = behaviour.service(self.rng) * behaviour.factor
        if fails and behaviour.failure_seconds is not None:
            seconds = behaviour.failure_seconds
        outcome = behaviour.failure if fails else OK
        if behaviour.paused_until > self.now:
            seconds += behaviour.paused_until - self.now
        if seconds > self.read_timeout:
            seconds, outcome = self.read_timeout, BROKEN
        self._at(self.now + seconds, lambda: self._end(request, grant, outcome))

    def _given_up(self, request: Request, lease: Lease) -> None:
        self.given_up += 1
        self._at(self.now, lambda: self._end(request, lease, GIVEN_UP))

    def _end(self, request: Request, lease: Lease, outcome: Outcome) -> None:
        if lease.state is not LeaseState.PICKED:
            return  # it was given up
        engine, now = self.engine, self.now
        engine.observe(now, lease, outcome)
        engine.release(now, lease)
        if outcome is OK:
            self.done += 1
            self.latencies.append((now, now - request.arrived))
            return
        request.want.failed_on(lease.endpoint)
        decision = engine.decide(
            now,
            lease,
            outcome,
            attempts=request.attempts,
            unsent=0,
            replayable=True,
            deadline=request.arrived + self.deadline,
        )
        if isinstance(decision, Again):
            self._at(now + decision.wait, lambda: self._admit(request))
        else:
            self._lose(request)

    def _lose(self, request: Request) -> None:
        self.lost += 1
        self.lost_of[request.want.key] += 1

    # --- what is asked of a run

    def _listen(self, event: events.Event) -> None:
        if isinstance(event, events.Ejected):
            self.ejected.append(event)
        elif isinstance(event, events.Returned):
            self.returned.append(event)
        elif isinstance(event, events.BreakerChanged) and event.after == "open":
            self.opened.append(event)

    def share(self, number: int, start: float, end: float, *, probes: bool = True, key: str | None = None) -> float:
        """Share of the picks of a span (for one service) that went to one endpoint."""
        picks = [
            (who, why)
            for (at, who, why), service in zip(self.picks, self.keys, strict=True)
            if start <= at < end and key in (None, service)
        ]
        return sum(who == number and (probes or why != "probe") for who, why in picks) / max(1, len(picks))

    def out_now(self) -> Counter[str]:
        return Counter(state.url for state in self.engine.members if state.ejection.until is not None)

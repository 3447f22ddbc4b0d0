"""An engine and an independent model of what it may do: every event is checked against the model as it comes.

The model never asks the engine who is eligible. It follows the events (breakers, ejections, membership), keeps its own
verdict of the health probes and its own counts, and derives from those what each pick was allowed to choose from.
Every operation takes plain numbers, so that a log of them can be replayed.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

from pathlb.core import events
from pathlb.core.admission import Waiter
from pathlb.core.breaker import TRANSITIONS
from pathlb.core.cluster import Settings
from pathlb.core.config import BlockHeight, Breaker, Limits, Outlier, Panic, SlowStart
from pathlb.core.endpoints import EndpointState, check_endpoints
from pathlb.core.engine import TICK, Engine
from pathlb.core.errors import IllegalEvent
from pathlb.core.lease import Lease, LeaseState, Want
from pathlb.core.model import Cause, Outcome, Sent
from pathlb.core.policy import P2C, LeastConnections, RoundRobin
from pathlb.core.retry import Again

from .helpers import CANCELLED, GIVEN_UP, OK

URLS = [f"http://gw{number}" for number in range(5)]
KEYS = [None, None, "eth", "btc"]
CAUSES = list(Cause)
POLICIES = [LeastConnections, RoundRobin, P2C]
LEGAL = {(before.value, after.value) for (before, _), after in TRANSITIONS.items()}
BREAKER = Breaker(failures=3, min_requests=8, window=20.0, open_for=1.0, open_max=4.0, probe_timeout=3.0)
OUTLIER = Outlier(min_requests=4, failure_sigma=2.0, eject_for=2.0, eject_max=5.0, max_ejected=0.5)


@dataclass
class Member:
    """What the model knows of one endpoint."""

    draining: bool = False
    health: str = "up"
    contradicting: int = 0
    ejected: set[str | None] = field(default_factory=set)
    """For which keys; None is for all."""
    unwell: set[str] = field(default_factory=set)
    """Keys whose own probes failed."""
    breakers: dict[str | None, str] = field(default_factory=lambda: defaultdict(lambda: "closed"))
    opens: dict[str | None, int] = field(default_factory=lambda: defaultdict(int))
    closed_at: dict[str | None, float] = field(default_factory=lambda: defaultdict(lambda: -1e9))
    in_flight: int = 0


class World:
    """One engine with its model. Public methods without underscore are the operations."""

    def __init__(self, seed: int, policy: int, concurrency: int, fail_closed: bool, probed: bool) -> None:
        self.settings = Settings(
            breaker=BREAKER,
            outlier=OUTLIER,
            panic=Panic(fail_closed=fail_closed),
            slow_start=SlowStart(window=2.0),
            limits=Limits(concurrency=concurrency, queue=4),
            probed=probed,
            rise=2,
            fall=2,
            block_height=BlockHeight(lag=2, min_endpoints=1, max_age=5.0),
        )
        self.engine = Engine(self.settings, POLICIES[policy % 3](), random.Random(seed))
        self.now = 100.0
        self.members: dict[str, Member] = {}
        self.gone: dict[str, Member] = {}
        """Removed, with requests in flight."""
        self.log: list[events.Event] = []
        self._fresh: list[events.Event] = []
        self.live: list[Lease] = []
        self.retrying: list[tuple[Lease, Outcome, int]] = []
        self.spent: list[Want] = []
        """Requests that were sent again for an outcome that is worth one more attempt."""
        self.waiting: list[Waiter[Any]] = []
        self._grants: list[tuple[Lease, bool]] = []
        self.states: dict[int, EndpointState] = {}
        self.attempts: dict[int, int] = {}
        self.deposits = 0
        self.bodies: dict[int, int] = defaultdict(int)
        """Bodies that broke off, by endpoint."""
        self._stalled = False
        self.engine.subscribe(self._fresh.append)
        self.engine.tick(self.now)
        self.apply(0b111)

    # --- operations

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def tick(self) -> None:
        self.now += TICK
        self.engine.tick(self.now)
        self._check()

    def ticks(self, count: int) -> None:
        for _ in range(count):
            self.tick()

    def stall(self, seconds: float) -> None:
        """This process does not run for a while; then the late heartbeat comes."""
        self.engine.tick(self.now)
        self._check()
        probing = [
            (state.url, key)
            for state in self.engine.members
            for key, scope in [(None, state), *state.scopes.items()]
            # What ends before the heartbeat that will be late has ended in time.
            if scope.breaker.state.value == "probing" and scope.breaker.probe_deadline > self.now + 2 * TICK
        ]
        self.now += seconds + 2 * TICK + 0.1
        self._stalled = True
        self.engine.tick(self.now)
        self._check()
        self._stalled = False
        for url, key in probing:
            assert self.members[url].breakers[key] == "probing", "a stall of this process failed a probe"

    def apply(self, mask: int) -> None:
        chosen = [url for number, url in enumerate(URLS) if mask >> number & 1]
        before = {state.url: state for state in self.engine.members}
        change = self.engine.apply(self.now, check_endpoints(chosen)) if chosen else self.engine.apply(self.now, [])
        assert [state.url for state in self.engine.members] == chosen
        for state in change.kept:
            assert before[state.url] is state
        self._check()

    def drain(self, number: int, back: bool) -> None:
        url = URLS[number % len(URLS)]
        if url in self.members:
            self.members[url].draining = not back
            (self.engine.undrain if back else self.engine.drain)(self.now, url)
            self._check()

    def probe(self, number: int, passed: bool) -> None:
        url = URLS[number % len(URLS)]
        member = self.members.get(url)
        if member is not None and self.settings.probed:
            verdict = "up" if passed else "down"
            if member.health == verdict:
                member.contradicting = 0
            else:
                member.contradicting += 1
                if member.health == "unknown" or member.contradicting == 2:
                    member.health, member.contradicting = verdict, 0
        if self.settings.probed:
            self.engine.record_probe(self.now, url, passed, "probe")
            self._check()

    def probe_key(self, number: int, key: int, passed: bool) -> None:
        url, scope = URLS[number % len(URLS)], KEYS[key % len(KEYS)]
        if scope is not None:
            self.engine.record_probe(self.now, url, passed, "probe", scope)
            self._check()

    def tell_height(self, number: int, key: int, height: int) -> None:
        """It changes who is preferred, and nothing else that the model knows of."""
        self.engine.record_height(self.now, URLS[number % len(URLS)], KEYS[key % len(KEYS)], height)
        self._check()

    def acquire(self, resendable: bool, key: int, pin: int, avoid: int) -> None:
        want = Want(
            resendable=resendable,
            key=KEYS[key % len(KEYS)],
            pin=URLS[pin] if pin < len(URLS) else None,
            avoid=frozenset(url for number, url in enumerate(URLS) if avoid >> number & 1),
        )
        self._acquire(want)

    def observe(
        self, number: int, cause: int, unsent: bool, keyed: bool, retry_after: float | None, flags: int
    ) -> None:
        picked = [lease for lease in self.live if lease.state is LeaseState.PICKED]
        if not picked:
            return
        lease = picked[number % len(picked)]
        outcome = Outcome(
            CAUSES[cause % len(CAUSES)],
            sent=Sent.NOT_SENT if unsent else Sent.MAYBE_SENT,
            retry=True,
            once=bool(flags & 1),
            unprocessed=bool(flags & 2),
            trip=bool(flags & 4),
            retry_after=retry_after,
            status=None if unsent else 500,
            key=lease.key if keyed else None,
        )
        if lease.given_up:
            outcome = GIVEN_UP
        self._observe(lease, outcome)

    def release(self, number: int) -> None:
        observed = [lease for lease in self.live if lease.state is LeaseState.OBSERVED]
        if observed:
            self._release(observed[number % len(observed)])

    def end_twice(self, number: int) -> None:
        """A second end is refused and changes nothing."""
        if not self.live:
            return
        lease = self.live[number % len(self.live)]
        before = (lease.endpoint.in_flight, lease.endpoint.counts.released, len(lease.endpoint.waiting), lease.state)
        act = self.engine.release if lease.state is LeaseState.PICKED else self._observe_again
        with pytest.raises(IllegalEvent):
            act(self.now, lease)
        after = (lease.endpoint.in_flight, lease.endpoint.counts.released, len(lease.endpoint.waiting), lease.state)
        assert after == before

    def fail_body(self, number: int) -> None:
        observed = [lease for lease in self.live if lease.state is LeaseState.OBSERVED]
        if observed:
            lease = observed[number % len(observed)]
            self.bodies[id(lease.endpoint)] += 1
            self.engine.fail_body(self.now, lease, Outcome(Cause.INSTANCE))
            self._check()

    def retry(self, number: int, replayable: bool) -> None:
        if not self.retrying:
            return
        lease, outcome, attempts = self.retrying.pop(number % len(self.retrying))
        decision = self.engine.decide(
            self.now, lease, outcome, attempts=attempts, unsent=0, replayable=replayable, deadline=self.now + 20.0
        )
        self._check()
        if isinstance(decision, Again):
            assert replayable
            assert lease.want.resendable or outcome.unprocessed or outcome.sent is Sent.NOT_SENT
            if outcome.once:
                assert all(want is not lease.want for want in self.spent), "a second time for what is worth one"
                self.spent.append(lease.want)
            self._acquire(lease.want, attempts)

    def leave(self, number: int) -> None:
        if self.waiting:
            waiter = self.waiting.pop(number % len(self.waiting))
            assert self.engine.leave_queue(self.now, waiter, "cancelled")
            assert not self.engine.leave_queue(self.now, waiter, "cancelled")
            self._check()

    def acquire_plainly(self, resendable: bool) -> None:
        self._acquire(Want(resendable=resendable))

    def finish(self, number: int, cause: int) -> None:
        """Both ends of one at once."""
        picked = [lease for lease in self.live if lease.state is LeaseState.PICKED]
        if picked:
            lease = picked[number % len(picked)]
            self._observe(lease, Outcome(CAUSES[cause % len(CAUSES)], retry=True, status=500))
            self._release(lease)

    def burst(self, number: int, count: int, cause: int, key: int) -> None:
        """Pinned requests one after the other, all with one outcome."""
        url, scope = URLS[number % len(URLS)], KEYS[key % len(KEYS)]
        for _ in range(count):
            grant = self._acquire(Want(pin=url, resendable=True, key=scope))
            if isinstance(grant, Lease):
                self._observe(grant, Outcome(CAUSES[cause % len(CAUSES)], status=500, key=scope))
                self._release(grant)
            elif isinstance(grant, Waiter) and grant in self.waiting:
                self.waiting.remove(grant)
                self.engine.leave_queue(self.now, grant, "timeout")
                self._check()

    def one_does_worse(self, bad: int) -> None:
        """Enough for an ejection: faults beyond the instance, which open no breaker."""
        for number in range(len(URLS)):
            self.burst(number, 8, 3 if number == bad else 0, 0)
        self.ticks(3)

    def one_service_does_worse(self, bad: int, key: int) -> None:
        """Enough for an ejection of one service: the others do well there."""
        for number in range(len(URLS)):
            for other in range(2, len(KEYS)):
                self.burst(number, 9, 3 if (number, other) == (bad, 2 + key % 2) else 0, other)
        self.ticks(3)

    def rest(self) -> None:
        """Everything ends: nothing may be left over."""
        while self.waiting or self.live:
            for waiter in list(self.waiting):
                if waiter in self.waiting:
                    self.waiting.remove(waiter)
                    self.engine.leave_queue(self.now, waiter, "cancelled")
                    self._check()
            for lease in list(self.live):
                if lease.state is LeaseState.PICKED:
                    self._observe(lease, CANCELLED)
                self._release(lease)
        assert all(state.in_flight == 0 for state in self.states.values())
        assert all(not state.waiting for state in self.states.values())
        assert not self.engine.busy
        snapshot = self.engine.snapshot(self.now, lambda url: "")
        self._check()
        assert (snapshot.in_flight, snapshot.queued) == (0, 0)
        assert [one.url for one in snapshot.endpoints] == list(self.members)

    # --- one step each

    def _acquire(self, want: Want, attempts: int = 0) -> Any:
        self.deposits += not want.tried
        holder: list[Waiter[Any]] = []

        def settle() -> None:
            grant = holder[0].grant
            self.waiting.remove(holder[0])
            if isinstance(grant, Lease):
                self._grants.append((grant, True))
                self.attempts[id(grant)] = attempts + 1

        grant = self.engine.acquire(self.now, want, settle)
        if isinstance(grant, Waiter):
            assert grant.waiting
            holder.append(grant)
            self.waiting.append(grant)
        elif isinstance(grant, Lease):
            self._grants.append((grant, False))
            self.attempts[id(grant)] = attempts + 1
        elif grant.queue_full:
            assert len(self.waiting) == self.settings.limits.queue
        else:
            self._check()
            assert not self._pool(want)[0], "refused although somebody is eligible"
        self._check()
        return grant

    def _observe(self, lease: Lease, outcome: Outcome) -> None:
        breaker = lease.endpoint.breaker
        proof = outcome.trip and outcome.cause is Cause.INSTANCE and lease.epoch == breaker.epoch
        self.engine.observe(self.now, lease, outcome)
        assert not proof or breaker.state.value != "closed" or lease.panic
        if outcome.cause not in (Cause.OK, Cause.REQUEST, Cause.CANCELLED):
            lease.want.failed_on(lease.endpoint)
            self.retrying.append((lease, outcome, self.attempts[id(lease)]))
        self._check()

    def _observe_again(self, now: float, lease: Lease) -> None:
        self.engine.observe(now, lease, OK)

    def _release(self, lease: Lease) -> None:
        gone = self.engine.release(self.now, lease)
        self.live.remove(lease)
        self._check()
        last = lease.endpoint.in_flight == 0 and lease.endpoint not in self.engine.members
        assert gone == last

    # --- the model

    def _fits(self, member: Member, key: str | None) -> bool:
        scopes = {None, key}
        return (
            not member.draining
            and member.health == "up"
            and not member.ejected & scopes
            and not member.unwell & scopes
            and all(member.breakers[scope] == "closed" for scope in scopes)
        )

    def _pool(self, want: Want) -> tuple[list[str], bool]:
        """What this request may be sent to (probes aside), and whether that is in panic."""
        eligible = [url for url, member in self.members.items() if self._fits(member, want.key)]
        panic = False
        if not eligible or (want.pin is not None and want.pin not in eligible):
            panic = True
            eligible = [url for url, member in self.members.items() if not member.draining]
            if self.settings.panic.fail_closed:
                eligible = []
        return [url for url in eligible if want.pin in (None, url)], panic

    def _choice(self, want: Want) -> list[str]:
        """Of those the untried, if there are any."""
        pool, _ = self._pool(want)
        tried = {state.url for state in want.tried if any(state is one for one in self.engine.members)}
        return [url for url in pool if url not in tried] or pool

    def _check(self) -> None:
        """Take in what happened since the last check, event by event; then what must hold at rest."""
        happened, grants = list(self._fresh), list(self._grants)
        self._fresh.clear()
        self._grants.clear()
        self.log += happened
        for index, event in enumerate(happened):
            if isinstance(event, events.EndpointsChanged):
                self._membership(event)
            elif isinstance(event, events.BreakerChanged):
                self._breaker(event, happened[index + 1 :])
            elif isinstance(event, events.Ejected):
                self._ejection(event)
            elif isinstance(event, events.Returned):
                self._member(event.endpoint).ejected.remove(event.key)
            elif isinstance(event, events.HealthChanged):
                self._health(event)
            elif isinstance(event, events.Picked):
                self._picked(event, *grants.pop(0))
            elif isinstance(event, events.Released):
                self._member(event.endpoint).in_flight -= 1
        assert grants == []
        self._at_rest()

    def _member(self, url: str) -> Member:
        return self.members[url] if url in self.members else self.gone[url]

    def _membership(self, event: events.EndpointsChanged) -> None:
        for url in event.removed:
            self.gone[url] = self.members.pop(url)
        for url in event.added:
            back = self.gone.pop(url, None)
            if back is not None and back.in_flight:
                back.draining = False  # it was still there, with all that is known of it
            else:
                back = Member(health="unknown" if self.settings.probed else "up")
            self.members[url] = back
        self.members = {url: self.members[url] for url in URLS if url in self.members}

    def _breaker(self, event: events.BreakerChanged, later: list[events.Event]) -> None:
        member = self._member(event.endpoint)
        before = member.breakers[event.key]
        assert event.before == before
        assert (before, event.after) in LEGAL
        member.breakers[event.key] = event.after
        if event.after == "open":
            rested = before == "closed" and event.at - member.closed_at[event.key] >= BREAKER.window
            member.opens[event.key] = 1 if rested else member.opens[event.key] + 1
            again = any(isinstance(e, events.BreakerChanged) and e.endpoint == event.endpoint for e in later)
            state = next((state for state in self.engine.members if state.url == event.endpoint), None)
            if state is not None and not again:
                breaker = state.breaker if event.key is None else state.scopes[event.key].breaker
                full = min(BREAKER.open_max, BREAKER.open_for * 2.0 ** (member.opens[event.key] - 1))
                seconds = breaker.reopens_at - event.at
                assert (1 - BREAKER.jitter) * full - 1e-9 <= seconds <= full + 1e-9
        elif event.after == "closed":
            member.closed_at[event.key] = event.at
        elif event.after == "probing":
            first = next((e for e in later if isinstance(e, events.Picked)), None)
            assert first is not None, "a probe that nobody carries"
            assert (first.endpoint, first.reason) == (event.endpoint, "probe")

    def _health(self, event: events.HealthChanged) -> None:
        member = self.members[event.endpoint]
        if event.key is None:
            assert member.health == event.after
        elif event.after == "up":
            member.unwell.remove(event.key)
        else:
            member.unwell.add(event.key)

    def _ejection(self, event: events.Ejected) -> None:
        assert not self._stalled, "ejected right after a stall"
        member = self.members[event.endpoint]
        assert self._fits(member, event.key)
        member.ejected.add(event.key)
        out = sum(bool(one.ejected & {None, event.key}) for one in self.members.values())
        present = sum(not one.draining for one in self.members.values())
        assert out <= max(1, int(OUTLIER.max_ejected * present)), "too many ejected"
        assert any(self._fits(one, event.key) for one in self.members.values()), "nobody left"
        assert OUTLIER.eject_for <= event.seconds <= OUTLIER.eject_max * (1 + OUTLIER.jitter)

    def _picked(self, event: events.Picked, lease: Lease, queued: bool) -> None:
        want, url = lease.want, lease.endpoint.url
        member = self.members[url]
        assert (event.endpoint, event.reason, event.in_flight) == (url, lease.reason, member.in_flight)
        assert member.in_flight < self.settings.limits.concurrency
        assert want.pin in (None, url)
        assert not member.draining
        if lease.reason == "probe":
            self._probed(lease, member)
        else:
            pool, panic = self._pool(want)
            assert url in pool, f"{url} was not eligible"
            assert (lease.reason == "panic") == panic == lease.panic
            assert url in self._choice(want), "tried before, and there was one untried"
            if want.plain and want.key is None:
                earlier = [w for w in self.waiting if w.want.plain and w.want.key is None and w.since < event.at]
                assert queued or not earlier, "a newcomer before those who wait"
        member.in_flight += 1
        lease.give_up = lambda: None
        self.live.append(lease)
        self.states[id(lease.endpoint)] = lease.endpoint

    def _probed(self, lease: Lease, member: Member) -> None:
        assert not any(state is lease.endpoint for state in lease.want.tried)
        assert member.health == "up"
        scopes = {None, lease.key}
        assert sorted(member.breakers[scope] for scope in scopes if member.breakers[scope] != "closed")[-1:] == [
            "probing"
        ]
        assert all(member.breakers[scope] in ("closed", "half-open", "probing") for scope in scopes)
        assert lease.probing is not None
        probes = [
            one
            for one in self.live
            if one.probing is lease.probing
            and one.state is LeaseState.PICKED
            and lease.probing.epoch == (one.epoch if lease.probing is one.endpoint.breaker else one.key_epoch)
        ]
        assert probes == [], "a second probe at a time"

    def _at_rest(self) -> None:
        for state in [*self.engine.members, *self.states.values()]:
            counts = state.counts
            assert state.in_flight == counts.picks - counts.released >= 0
            ended = counts.ok + counts.failed + counts.overloaded + counts.ignored
            assert counts.picks == len(state.waiting) + ended
            assert counts.broken == self.bodies[id(state)]
        for state in self.engine.members:
            assert state.in_flight == self.members[state.url].in_flight
        assert len(self.waiting) <= self.settings.limits.queue
        order = [waiter.since for waiter in self.waiting if waiter.want.plain]
        assert order == sorted(order)
        limit = self.settings.limits.concurrency
        for waiter in self.waiting:
            choice = self._choice(waiter.want)
            assert choice, "waits for nobody"
            assert all(self.members[url].in_flight >= limit for url in choice), "a lost wake-up"
        budget = self.engine._budgets.balance(self.now)
        retry = self.settings.retry
        reserves = retry.budget_reserve * retry.budget_ttl * len(set(KEYS))
        assert 0 <= budget <= reserves + retry.budget_ratio * self.deposits + 1e-9

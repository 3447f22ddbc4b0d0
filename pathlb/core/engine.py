"""The state machine that ties the parts together: acquire, observe, decide, release, tick.

Everything here is synchronous and takes the time as an argument. Two callbacks reach back to the shell, both only
set an event there: `Waiter.settle` when a queued request gets its grant, `Lease.give_up` when an attempt should be
abandoned. Listeners are called at the end of the public methods, when the state is consistent; they must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from . import events
from .admission import Waiter, WaitQueue
from .budget import RetryBudgets
from .cluster import Cluster, Settings
from .eligibility import View, standing
from .endpoints import Admin, EndpointState, SetChange
from .errors import IllegalEvent
from .lease import Lease, LeaseState, Want
from .model import SIGNALS, Cause, Endpoint, Outcome, Rng
from .picker import Choice, NoneEligible, Picker
from .policy import Policy
from .retry import Again, Decision, Situation, Strategy, allowed_attempts, decide
from .snapshot import Snapshot, describe
from .stall import StallMeter

TICK = 0.05
"""Seconds between the ticks the shell gives while requests are in flight or queued."""

_STALL_TOLERANCE = 0.1  # seconds a tick may be late before the lateness counts as a stall of this process
_PROBE_PATIENCE = 4  # times its usual latency a probe is waited for at least, however short its deadline

_PICKED, _OBSERVED, _RELEASED = LeaseState.PICKED, LeaseState.OBSERVED, LeaseState.RELEASED


def _may_serve(state: EndpointState, key: str | None) -> bool:
    """Whether an endpoint, in service or not, is not known to fail this service."""
    scope = state.scopes.get(key) if key is not None else None
    return scope is None or scope.in_service


@dataclass(frozen=True, slots=True)
class Refusal:
    """No lease, and none to wait for. `queue_full` tells the two reasons apart; `why` is for people; `error` is what a
    policy of the caller's raised.
    """

    why: str
    queue_full: bool = False
    error: Exception | None = None


Grant: TypeAlias = Lease | Refusal


class Engine:
    """The decisions of one balancer."""

    def __init__(self, settings: Settings, policy: Policy, rng: Rng) -> None:
        self._settings = settings
        self._rng = rng
        self._policy = policy
        self._outbox = events.Outbox()
        self._cluster = Cluster(settings, rng, self._outbox)
        self._picker = Picker(policy, rng, settings.limits.concurrency, fail_closed=settings.panic.fail_closed)
        self._queue: WaitQueue[Grant] = WaitQueue(settings.limits.queue)
        self._budgets = RetryBudgets(settings.retry)
        self._stall = StallMeter(TICK, _STALL_TOLERANCE)
        self._forgiven = 0.0
        """Seconds of stall the probes under way have been given back."""
        self._stalled_at_tick = 0.0
        self._panicking = False

    # --- the set of endpoints

    def apply(self, now: float, endpoints: Iterable[Endpoint]) -> SetChange:
        """Make these the endpoints. State of those already known is kept; new ones ramp up, except at the start."""
        change = self._cluster.apply(now, endpoints)
        self._settle(now)
        return change

    def drain(self, now: float, url: str) -> None:
        """Give it nothing new. Raises `ConfigError` for an unknown URL."""
        self._cluster.drain(now, url)
        self._settle(now)

    def undrain(self, now: float, url: str) -> None:
        """Take a drained endpoint back, on the ramp. Raises `ConfigError` for an unknown URL."""
        self._cluster.undrain(now, url)
        self._settle(now)

    def record_probe(self, now: float, url: str, passed: bool, why: str, key: str | None = None) -> None:
        """Take in the result of an active health probe, of one service if it has a `key`."""
        self._cluster.record_probe(now, url, passed, why, key)
        self._settle(now)

    def record_height(self, now: float, url: str, key: str | None, height: int) -> None:
        """An endpoint has told the block height of a service."""
        self._cluster.record_height(now, url, key, height)
        self._settle(now)

    def health_changing(self, url: str, key: str | None = None) -> bool:
        """Whether the last health probe contradicts the verdict, so that the next should come sooner."""
        return self._cluster.health_changing(url, key)

    # --- the road of a request

    def acquire(self, now: float, want: Want, settle: Callable[[], None]) -> Lease | Waiter[Grant] | Refusal:
        """An endpoint for one attempt: a lease at once, a place in the queue, or a refusal.

        `settle` is called when the place in the queue turned into `Waiter.grant`.
        """
        if now >= self._cluster.next_advance:
            self._advance(now)
            self._settle(now)
        if not want.tried:
            self._budgets.of(now, want.key).deposit(now)
        if self._queue.depth:
            self._pump(now)  # nothing is free for those who wait, unless time alone allowed a probe
        grant = self._pick(now, want)
        if grant is not None:
            self._settle(now)
            return grant
        if self._queue.full:
            self._outbox.add(events.QueueOverflow(now, self._queue.depth))
            self._outbox.flush()
            return Refusal(f"{self._queue.depth} requests are waiting already", queue_full=True)
        waiter: Waiter[Grant] = Waiter(want, now, settle)
        self._queue.push(waiter)
        self._outbox.add(events.Queued(now, self._queue.depth))
        self._settle(now)
        return waiter

    def leave_queue(self, now: float, waiter: Waiter[Grant], why: str) -> bool:
        """Give up waiting; false when the grant came first, which is the caller's to use or to give back."""
        left = self._queue.leave(waiter)
        if left:
            self._outbox.add(events.Dequeued(now, self._queue.depth, now - waiter.since, why))
            self._settle(now)
        return left

    def observe(self, now: float, lease: Lease, outcome: Outcome) -> None:
        """The attempt has its reply head or its failure. Exactly once a lease."""
        if lease.state is not _PICKED:
            raise IllegalEvent(f"lease: observed while {lease.state.value}")
        lease.state = _OBSERVED
        lease.give_up = None
        state = lease.endpoint
        del state.waiting[lease]
        if lease.scope is not None:
            del lease.scope.waiting[lease]
        running = now - self._stall.read(now)
        if SIGNALS[outcome.cause].latency:
            # A stall is known of only when the heartbeat is late enough, and then from the moment it was due: for a
            # request picked in between, some of that time came before it.
            self._cluster.succeeded(running, lease, max(0.0, running - lease.began))
        else:
            self._cluster.failed(now, running, lease, outcome)
        self._cluster.inform_breakers(now, lease, outcome)
        if self._outbox.listeners:
            self._outbox.add(events.Observed(now, state.url, outcome, now - lease.started))
        self._settle(now)

    def fail_body(self, now: float, lease: Lease, outcome: Outcome) -> None:
        """The body of a reply broke off after its head was observed: the endpoint's failure all the same."""
        if lease.state is not _OBSERVED:
            raise IllegalEvent(f"lease: body failed while {lease.state.value}")
        self._cluster.body_failed(now, now - self._stall.read(now), lease, outcome)
        self._cluster.inform_breakers(now, lease, outcome)
        self._outbox.add(events.BodyFailed(now, lease.endpoint.url, outcome))
        self._settle(now)

    def release(self, now: float, lease: Lease) -> bool:
        """The request is no longer in flight. True when that was the last one of a removed endpoint."""
        if lease.state is not _OBSERVED:
            raise IllegalEvent(f"lease: released while {lease.state.value}")
        lease.state = _RELEASED
        state = lease.endpoint
        state.in_flight -= 1
        state.counts.released += 1
        if self._outbox.listeners:
            self._outbox.add(events.Released(now, state.url, state.in_flight))
        if self._queue.depth:
            self._pump(now)
        self._settle(now)
        if state.admin is Admin.REMOVED and not state.in_flight:
            self._cluster.forget(state)
            return True
        return False

    def decide(
        self,
        now: float,
        lease: Lease,
        outcome: Outcome,
        *,
        attempts: int,
        unsent: int,
        replayable: bool,
        deadline: float,
        strategy: Strategy | None = None,
    ) -> Decision:
        """What follows an attempt that did not simply succeed. `deadline` is a clock reading."""
        want = lease.want
        pool, _ = self._picker.eligible(self._cluster.view(want.key), want)
        situation = Situation(
            attempts=attempts,
            unsent=unsent,
            resendable=lambda: want.resendable,
            replayable=replayable,
            paid=lease.given_up,
            hopeless=lease.panic
            and outcome.cause is Cause.SERVICE
            and not any(_may_serve(state, want.key) for state in pool if state not in want.tried),
            once_spent=want.once_spent,
            eligible=bool(pool),
            untried=any(state not in want.tried for state in pool),
            endpoints=len(self._cluster),
            remaining=deadline - now,
            fastest=self._cluster.fastest,
        )
        withdraw = partial(self._budgets.of(now, want.key).withdraw, now)
        decision = decide(outcome, situation, self._settings.retry, withdraw, self._rng, strategy)
        if isinstance(decision, Again):
            want.once_spent |= outcome.once
            self._outbox.add(events.Retried(now, lease.endpoint.url, outcome, decision.wait))
        elif decision.why:
            self._outbox.add(events.RetryRefused(now, lease.endpoint.url, outcome, decision.why))
        self._outbox.flush()
        return decision

    def finish(self, now: float, attempts: int, relays: int) -> None:
        """A caller's request has come to its reply head or its error."""
        if self._outbox.listeners:
            self._outbox.add(events.Finished(now, attempts, relays))
            self._outbox.flush()

    # --- time

    def tick(self, now: float) -> None:
        """The heartbeat, every `TICK` seconds while anything is in flight or queued."""
        self._stall.beat(now)
        self._advance(now)
        stalled = self._stall.total
        if stalled == self._stalled_at_tick:  # right after a stall the replies of that time are still unread
            self._cluster.eject_outliers(now, now - stalled)
        self._stalled_at_tick = stalled
        self._settle(now)

    def pause(self) -> None:
        """No ticks until there is something in flight or queued again."""
        self._stall.pause()

    def stalled_during(self, lease: Lease, now: float) -> float:
        """Seconds this process itself stalled since the pick."""
        return self._stall.read(now) - (lease.started - lease.began)

    # --- reading

    @property
    def busy(self) -> bool:
        """Whether ticks are needed."""
        return self._queue.depth > 0 or any(state.in_flight for state in self._cluster.everyone())

    @property
    def attempts_allowed(self) -> int:
        """How many attempts of one request may reach an endpoint, without strategies of the caller."""
        return allowed_attempts(self._settings.retry, len(self._cluster))

    @property
    def members(self) -> list[EndpointState]:
        """The endpoints, drained ones included, removed ones not."""
        return self._cluster.members()

    def snapshot(self, now: float, upstream_of: Callable[[str], str]) -> Snapshot:
        """The state at this moment; `upstream_of` names the upstream of a URL."""
        self._advance(now)
        self._settle(now)
        described = [
            replace(describe(state, now), upstream=upstream_of(state.url)) for state in self._cluster.everyone()
        ]
        return Snapshot(
            policy=self._policy.name,
            endpoints=tuple(described),
            in_flight=sum(one.in_flight for one in described),
            queued=self._queue.depth,
            panic=self._cluster.view(None).panic,
            retry_budget=self._budgets.balance(now),
        )

    def subscribe(self, listener: events.Listener) -> Callable[[], None]:
        """Call `listener` with every event; the answer ends that."""
        return self._outbox.subscribe(listener)

    # --- the inside

    def _advance(self, now: float) -> None:
        """What time alone does. Time in which this process did not run is no probe's fault (pitfall 12)."""
        stalled = self._stall.read(now)
        if stalled > self._forgiven:
            self._cluster.forgive_stall(stalled - self._forgiven)
            self._forgiven = stalled
        self._cluster.advance(now)

    def _pick(self, now: float, want: Want) -> Grant | None:
        """A lease, a refusal, or None when every eligible endpoint is at its limit."""
        view = self._cluster.view(want.key)
        picker = self._picker
        ready = view.ready
        if want.plain and len(ready) > 1 and not view.half_open and not view.panic:
            state = picker.policy.pick(ready, self._rng)
            if picker.free(state):
                return self._lease(now, want, state, picker.policy.name, len(ready))
        choice = picker.pick(view, want, now)
        if isinstance(choice, Choice):
            return self._lease_choice(now, want, choice)
        if isinstance(choice, NoneEligible):
            return Refusal(self._why_none(want))
        return None

    def _lease(self, now: float, want: Want, state: EndpointState, reason: str, candidates: int) -> Lease:
        lease = Lease(state, want, now, now - self._stall.read(now), reason, candidates)
        if self._outbox.listeners:
            self._outbox.add(events.Picked(now, state.url, reason, state.in_flight, candidates))
        if want.key is not None:
            scope = lease.scope = self._cluster.scope(now, state, want.key)
            lease.key_epoch = scope.breaker.epoch
            scope.waiting[lease] = None
        state.in_flight += 1
        state.counts.picks += 1
        state.waiting[lease] = None
        return lease

    def _lease_choice(self, now: float, want: Want, choice: Choice) -> Lease:
        """A pick that was not the plain one: it may be a probe, or in panic, or for a key."""
        if choice.probing is not None:
            # Half of what the request has left, so that a probe that hangs can still be sent elsewhere in time; but no
            # less than the endpoint needs, or it would not come back as long as all deadlines are short.
            usual = choice.endpoint.latency.seconds or self._cluster.fastest
            choice.probing.start_probe(now, max((want.deadline - now) / 2, _PROBE_PATIENCE * usual))
        lease = self._lease(now, want, choice.endpoint, choice.reason, choice.candidates)
        lease.probing = choice.probing
        lease.panic = choice.panic
        return lease

    def _why_none(self, want: Want) -> str:
        members = self._cluster.members()
        if want.pin is not None and all(state.url != want.pin for state in members):
            return f"pinned to {want.pin}, which is not one of the endpoints"
        stands = ", ".join(
            f"{state.url} is {standing(state, want.key).value}"
            for state in members
            if want.pin is None or state.url == want.pin
        )
        return f"{stands or 'the set of endpoints is empty'}"

    def _pump(self, now: float) -> None:
        """Serve the queue, first come first, as far as there is room.

        When there is none for a waiter who takes anything, there is none for the others like it; a waiter who wants
        something special, or for whose key other endpoints are eligible, may still find room.
        """
        queue = self._queue
        full: list[View] = []
        for waiter in queue:
            want = waiter.want
            view = self._cluster.view(want.key)
            if want.plain and any(view is one for one in full):
                continue
            grant: Grant | None
            try:
                grant = self._pick(now, want)
            except Exception as exc:  # the policy's: it belongs to the request it was asked for, not to who is here
                grant = Refusal("the policy failed", error=exc)
            if grant is not None:
                why = "granted" if isinstance(grant, Lease) else "refused"
                queue.serve(waiter, grant)
                self._outbox.add(events.Dequeued(now, queue.depth, now - waiter.since, why))
            elif want.plain:
                if not queue.special:
                    break
                full.append(view)
        queue.trim()

    def _settle(self, now: float) -> None:
        """After a change: give up what hangs on the condemned, serve the queue, tell the listeners."""
        cluster = self._cluster
        while cluster.changed:
            cluster.changed = False
            self._note_panic(now)
            while cluster.condemned:
                self._give_up(now, *cluster.condemned.pop())
            if self._queue.depth:
                self._pump(now)
        if self._outbox.listeners:
            self._outbox.flush()

    def _give_up(self, now: float, state: EndpointState, key: str | None) -> None:
        """Abandon attempts that wait on an endpoint just ejected or opened, where another will take them.

        Their retries are paid for here, first come first: what the budget does not cover stays where it is.
        """
        abandoned = 0
        for lease in list(state.waiting):
            want = lease.want
            if lease.give_up is None or (key is not None and lease.key != key):
                continue
            if now + self._cluster.fastest >= want.deadline:
                continue
            view = self._cluster.view(want.key)
            pool, panic = self._picker.eligible(view, want)
            if panic or all(other is state or other in want.tried for other in pool):
                continue
            if not want.resendable:  # which may mean parsing its body, so it is asked last
                continue
            if not self._budgets.of(now, want.key).withdraw(now):
                continue  # another service may have some left
            give_up, lease.give_up, lease.given_up = lease.give_up, None, True
            give_up()
            abandoned += 1
        if abandoned:
            self._outbox.add(events.GivenUp(now, state.url, abandoned))

    def _note_panic(self, now: float) -> None:
        view = self._cluster.view(None)
        if view.panic is not self._panicking:
            self._panicking = view.panic
            eligible = len(view.ready) + len(view.reserve)
            self._outbox.add(events.PanicChanged(now, view.panic, eligible, len(view.fallback)))

"""One pick: from the view of the endpoints and what a request wants to an endpoint and the reason for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .breaker import BreakerState, CircuitBreaker
from .eligibility import View, least_recently_failed, scopes_of
from .endpoints import EndpointState
from .lease import Want
from .model import Rng
from .policy import Policy


@dataclass(frozen=True, slots=True)
class Choice:
    """An endpoint and why."""

    endpoint: EndpointState
    reason: str
    candidates: int
    panic: bool = False
    probing: CircuitBreaker | None = None


class Saturated:
    """Some endpoint is eligible, and all of those are at their limit: wait."""


class NoneEligible:
    """Waiting would not help."""


SATURATED = Saturated()
NONE_ELIGIBLE = NoneEligible()


class Picker:
    """Applies one policy, under a limit of `concurrency` requests in flight per endpoint."""

    def __init__(self, policy: Policy, rng: Rng, concurrency: int, *, fail_closed: bool) -> None:
        self.policy = policy
        self._rng = rng
        self._concurrency = concurrency
        self._fail_closed = fail_closed

    def free(self, state: EndpointState) -> bool:
        return state.in_flight < self._concurrency

    def pick(self, view: View, want: Want, now: float) -> Choice | Saturated | NoneEligible:
        """Choose, in this order: a probe that is due, an endpoint not tried before, one not to be avoided, one not
        in reserve, then what the policy says.
        """
        if view.half_open and (not want.tried or not view.ready):
            probe = self._probe(view, want, now)
            if probe is not None:
                return probe
        pool, panic = self.eligible(view, want)
        if not pool:
            return NONE_ELIGIBLE
        untried = [state for state in pool if state not in want.tried]
        free = [state for state in untried or pool if self.free(state)]
        if not free:
            return SATURATED
        candidates = [state for state in free if state.url not in want.avoid] or free
        candidates = [state for state in candidates if state not in view.reserve] or candidates
        if panic:
            group = least_recently_failed(candidates, want.key)
            return Choice(self.by_policy(group), "panic", len(group), panic=True)
        reason = "pinned" if want.pin is not None else self.reason(candidates)
        return Choice(self.by_policy(candidates), reason, len(candidates))

    def eligible(self, view: View, want: Want) -> tuple[Sequence[EndpointState], bool]:
        """What a request may go to, saturated ones included, and whether that is in panic."""
        pool: Sequence[EndpointState] = view.fallback if view.panic else view.ready + view.reserve
        if want.pin is None:
            return pool, view.panic
        pinned = [state for state in pool if state.url == want.pin]
        if pinned or self._fail_closed:
            return pinned, view.panic
        # For a pinned request the one endpoint is the whole pool: none of it eligible is panic.
        return [state for state in view.fallback if state.url == want.pin], True

    def by_policy(self, candidates: Sequence[EndpointState]) -> EndpointState:
        return candidates[0] if len(candidates) == 1 else self.policy.pick(candidates, self._rng)

    def reason(self, candidates: Sequence[EndpointState]) -> str:
        return "only candidate" if len(candidates) == 1 else self.policy.name

    def _probe(self, view: View, want: Want, now: float) -> Choice | None:
        for state in view.half_open:
            if state in want.tried or state.url in want.avoid or not self.free(state):
                continue
            if want.pin is not None and state.url != want.pin:
                continue
            breakers = (scope.breaker for scope in scopes_of(state, want.key))
            shut = [breaker for breaker in breakers if breaker.state is not BreakerState.CLOSED]
            if any(breaker.state is not BreakerState.HALF_OPEN for breaker in shut):
                continue
            if all(breaker.may_probe(now, want.resendable) for breaker in shut):
                return Choice(state, "probe", len(view.half_open), probing=shut[0])
        return None

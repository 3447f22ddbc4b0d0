"""Whether a failed attempt is followed by another: one function, all reasons in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from .config import Retry
from .model import Cause, Outcome, Rng, Sent


@dataclass(frozen=True, slots=True)
class Final:
    """This result stands: hand the reply over, or raise the failure. `why` says what forbids another attempt; empty
    when none was called for.
    """

    why: str = ""


@dataclass(frozen=True, slots=True)
class Again:
    """Make another attempt after `wait` seconds; 0 means at once, on an endpoint not tried yet."""

    wait: float


Decision: TypeAlias = Final | Again

FINAL = Final()


class Strategy(Protocol):
    """The caller's own retry strategies, bound to the attempt that just ended. None: no opinion."""

    def wants_retry(self) -> bool | None: ...

    def stops(self) -> bool | None: ...

    def wait(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a decision depends on, besides the outcome."""

    attempts: int
    """Made so far."""
    unsent: int
    """Of those, how many provably did not reach an endpoint."""
    resendable: Callable[[], bool]
    """May be sent twice; asked only when that decides."""
    replayable: bool
    """The body can be sent again."""
    paid: bool
    """The balancer gave the attempt up and has charged the budget already."""
    hopeless: bool
    """Every endpoint is known to fail this service, and this one has just done it again."""
    once_spent: bool
    """An outcome that is worth one more attempt only has had it."""
    eligible: bool
    """There is an endpoint to go to, tried or not."""
    untried: bool
    """An eligible endpoint was not tried yet."""
    endpoints: int
    """Size of the set."""
    remaining: float
    """Seconds to the deadline."""
    fastest: float
    """Seconds the fastest endpoint usually takes to a reply head: an attempt with less left cannot finish."""


def decide(
    outcome: Outcome,
    situation: Situation,
    config: Retry,
    withdraw: Callable[[], bool],
    rng: Rng,
    strategy: Strategy | None = None,
) -> Decision:
    """Return the result, or try again.

    `withdraw` takes one retry from the budget; it is asked last, so nothing is charged that is not made. No strategy
    of the caller can make unsafe what is refused as unsafe here.
    """
    wanted = strategy.wants_retry() if strategy else None
    if not (outcome.retry if wanted is None else wanted) or outcome.cause is Cause.CANCELLED:
        return FINAL
    if outcome.sent is Sent.MAYBE_SENT and not outcome.unprocessed and not situation.resendable():
        return Final("not safe to send twice")
    if outcome.once and situation.once_spent:
        return Final("it fails beyond the endpoints, and a second one has tried")
    if situation.hopeless:
        return Final("every endpoint fails this service")
    if not situation.replayable:
        return Final("its body is a stream and cannot be sent again")
    if not situation.eligible:
        return Final("no endpoint is eligible")
    stopped = strategy.stops() if strategy else None
    if _spent(situation, config) if stopped is None else stopped:
        return Final("no attempts are left")
    wait = strategy.wait() if strategy else None
    if wait is None:
        wait = 0.0 if situation.untried else _back_off(outcome, situation, config, rng)
    wait = max(0.0, wait)
    if wait + situation.fastest >= situation.remaining:
        return Final("another attempt would not finish before the deadline")
    if outcome.sent is Sent.MAYBE_SENT and not situation.paid and not withdraw():
        return Final("the retry budget is used up")
    return Again(wait)


def allowed_attempts(config: Retry, endpoints: int) -> int:
    """How many attempts may reach an endpoint: what is set, else one for each of them and at least 3."""
    return config.attempts or max(3, endpoints)


def _spent(situation: Situation, config: Retry) -> bool:
    allowed = allowed_attempts(config, situation.endpoints)
    # Attempts that reached nobody are free, but each endpoint refuses only once: no endless circle in a full outage.
    return situation.attempts - situation.unsent >= allowed or situation.attempts >= allowed + situation.endpoints


def _back_off(outcome: Outcome, situation: Situation, config: Retry, rng: Rng) -> float:
    """Full jitter (AWS, "Exponential backoff and jitter"), or what the reply asked for if that is longer."""
    ceiling = min(config.wait_max, config.wait_base * 2.0 ** min(situation.attempts - 1, 30))
    return max(rng.random() * ceiling, outcome.retry_after or 0.0)

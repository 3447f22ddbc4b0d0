"""The decision after a failed attempt."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.config import Retry
from pathlb.core.model import Cause, Outcome, Sent
from pathlb.core.retry import FINAL, Again, Decision, Final, Situation, decide

from .helpers import BROKEN, CANCELLED, OK, REFUSED, ScriptedRng


def yes() -> bool:
    return True


def no() -> bool:
    return False


def not_asked() -> bool:
    raise AssertionError("it does not matter whether it may be sent twice")


FIRST = Situation(
    attempts=1,
    unsent=0,
    resendable=yes,
    hopeless=False,
    once_spent=False,
    replayable=True,
    paid=False,
    eligible=True,
    untried=True,
    endpoints=3,
    remaining=30.0,
    fastest=0.1,
)


@dataclass
class Opinion:
    """A caller's strategy."""

    retry: bool | None = None
    stop: bool | None = None
    pause: float | None = None

    def wants_retry(self) -> bool | None:
        return self.retry

    def stops(self) -> bool | None:
        return self.stop

    def wait(self) -> float | None:
        return self.pause


def run(
    outcome: Outcome = BROKEN,
    situation: Situation = FIRST,
    config: Retry | None = None,
    strategy: Opinion | None = None,
    funds: bool = True,
    jitter: float = 0.5,
) -> tuple[Decision, int]:
    asked: list[bool] = []

    def withdraw() -> bool:
        asked.append(funds)
        return funds

    return decide(outcome, situation, config or Retry(), withdraw, ScriptedRng(jitter), strategy), len(asked)


def test_elsewhere_at_once_and_paid_for() -> None:
    assert run() == (Again(0.0), 1)


def test_nothing_to_retry() -> None:
    assert run(OK) == (FINAL, 0)
    assert run(replace(BROKEN, retry=False)) == (FINAL, 0)


def test_a_cancelled_request_is_over_whatever_anybody_wants() -> None:
    assert run(replace(CANCELLED, retry=True), strategy=Opinion(retry=True)) == (FINAL, 0)


def test_unsafe_to_send_twice() -> None:
    decision, charged = run(situation=replace(FIRST, resendable=no))
    assert (decision, charged) == (Final("not safe to send twice"), 0)


def test_provably_unsent_is_safe_and_free() -> None:
    assert run(REFUSED, replace(FIRST, resendable=no, attempts=1, unsent=1), funds=False) == (Again(0.0), 0)


def test_what_was_refused_is_safe_and_paid_for() -> None:
    """The endpoint says it did nothing with it."""
    refused = replace(BROKEN, unprocessed=True)
    assert run(refused, replace(FIRST, resendable=not_asked)) == (Again(0.0), 1)
    assert run(refused, replace(FIRST, resendable=no), funds=False)[0] == Final("the retry budget is used up")
    assert run(refused, replace(FIRST, replayable=False))[0] == Final("its body is a stream and cannot be sent again")


def test_whether_it_may_be_sent_twice_is_asked_only_when_that_decides() -> None:
    situation = replace(FIRST, resendable=not_asked)
    assert run(OK, situation) == (FINAL, 0)
    assert run(replace(OK, retry=False), situation, strategy=Opinion(retry=False)) == (FINAL, 0)
    assert run(replace(CANCELLED, retry=True), situation) == (FINAL, 0)
    assert run(REFUSED, situation) == (Again(0.0), 0)


@pytest.mark.parametrize("strategy", [None, Opinion(retry=True, stop=False, pause=0.0)])
def test_what_is_worth_one_more_attempt_gets_one(strategy: Opinion | None) -> None:
    once = replace(BROKEN, once=True)
    assert run(once, strategy=strategy) == (Again(0.0), 1)
    spent = replace(FIRST, once_spent=True)
    why = "it fails beyond the endpoints, and a second one has tried"
    assert run(once, spent, strategy=strategy) == (Final(why), 0)
    assert run(BROKEN, spent, strategy=strategy) == (Again(0.0), 1)


@pytest.mark.parametrize("strategy", [None, Opinion(retry=True, stop=False, pause=0.0)])
def test_what_every_endpoint_fails_is_final(strategy: Opinion | None) -> None:
    decision = run(BROKEN, replace(FIRST, hopeless=True), strategy=strategy)
    assert decision == (Final("every endpoint fails this service"), 0)
    assert run(OK, replace(FIRST, hopeless=True)) == (FINAL, 0)


def test_a_stream_cannot_be_sent_again() -> None:
    assert run(REFUSED, replace(FIRST, replayable=False))[0] == Final("its body is a stream and cannot be sent again")


@pytest.mark.parametrize(
    ("configured", "endpoints", "allowed"), [(None, 1, 3), (None, 3, 3), (None, 7, 7), (1, 5, 1), (2, 5, 2), (9, 2, 9)]
)
def test_number_of_attempts(configured: int | None, endpoints: int, allowed: int) -> None:
    config = Retry(attempts=configured)
    made = 1
    while isinstance(run(situation=replace(FIRST, attempts=made, endpoints=endpoints), config=config)[0], Again):
        made += 1
    assert made == allowed
    assert run(situation=replace(FIRST, attempts=made, endpoints=endpoints), config=config)[0] == Final(
        "no attempts are left"
    )


def test_unsent_attempts_are_free_once_per_endpoint() -> None:
    made = 1
    while isinstance(run(REFUSED, replace(FIRST, attempts=made, unsent=made, endpoints=5))[0], Again):
        made += 1
    assert made == 5 + 5
    assert isinstance(run(situation=replace(FIRST, attempts=4, unsent=2))[0], Again)
    assert isinstance(run(situation=replace(FIRST, attempts=5, unsent=2))[0], Final)


def test_full_jitter_when_everybody_was_tried() -> None:
    config = Retry(attempts=100, wait_base=0.025, wait_max=0.25)
    for attempts, ceiling in ((1, 0.025), (2, 0.05), (4, 0.2), (5, 0.25), (90, 0.25)):
        situation = replace(FIRST, attempts=attempts, untried=False)
        assert run(situation=situation, config=config, jitter=1.0)[0] == Again(pytest.approx(ceiling))
        assert run(situation=situation, config=config, jitter=0.0)[0] == Again(0.0)


@pytest.mark.parametrize(
    ("asked", "wait"), [(2.0, 2.0), (0.0, 0.0125), (-5.0, 0.0125), (math.nan, 0.0125), (None, 0.0125)]
)
def test_retry_after_is_a_minimum_when_everybody_was_tried(asked: float | None, wait: float) -> None:
    outcome = replace(BROKEN, retry_after=asked)
    assert run(outcome, replace(FIRST, untried=False))[0] == Again(wait)
    assert run(outcome)[0] == Again(0.0)


@pytest.mark.parametrize("asked", [29.9, 30.0, 1e9, math.inf])
def test_no_wait_beyond_the_deadline(asked: float) -> None:
    decision, charged = run(replace(BROKEN, retry_after=asked), replace(FIRST, untried=False))
    assert (decision, charged) == (Final("another attempt would not finish before the deadline"), 0)


def test_an_attempt_that_cannot_finish_is_not_started() -> None:
    assert isinstance(run(situation=replace(FIRST, remaining=0.1, fastest=0.1))[0], Final)
    assert isinstance(run(situation=replace(FIRST, remaining=0.11, fastest=0.1))[0], Again)
    assert isinstance(run(situation=replace(FIRST, remaining=0.0, fastest=0.0))[0], Final)


def test_the_budget_is_asked_last() -> None:
    assert run(funds=False) == (Final("the retry budget is used up"), 1)
    assert run(situation=replace(FIRST, paid=True), funds=False) == (Again(0.0), 0)


def test_strategies_have_their_say() -> None:
    assert run(replace(OK, status=200), strategy=Opinion(retry=True))[0] == Again(0.0)
    assert run(strategy=Opinion(retry=False))[0] == FINAL
    assert run(strategy=Opinion(stop=True))[0] == Final("no attempts are left")
    assert run(situation=replace(FIRST, attempts=50), strategy=Opinion(stop=False))[0] == Again(0.0)
    assert run(strategy=Opinion(pause=1.5))[0] == Again(1.5)
    assert run(replace(BROKEN, retry_after=9.0), strategy=Opinion(pause=1.5))[0] == Again(1.5)
    assert run(strategy=Opinion())[0] == Again(0.0)


@pytest.mark.parametrize("pause", [-1.0, math.nan, -math.inf])
def test_a_wait_that_is_no_time_is_no_wait(pause: float) -> None:
    assert run(strategy=Opinion(pause=pause))[0] == Again(0.0)


OPTIONAL = st.none() | st.booleans()
OUTCOMES = st.builds(
    Outcome,
    cause=st.sampled_from(Cause),
    sent=st.sampled_from(Sent),
    retry=st.booleans(),
    once=st.booleans(),
    unprocessed=st.booleans(),
    retry_after=st.none() | st.floats(),
    status=st.none() | st.sampled_from([200, 429, 500]),
)
SITUATIONS = st.integers(1, 12).flatmap(
    lambda attempts: st.builds(
        Situation,
        attempts=st.just(attempts),
        unsent=st.integers(0, attempts),
        resendable=st.sampled_from([yes, no]),
        replayable=st.booleans(),
        paid=st.booleans(),
        hopeless=st.booleans(),
        once_spent=st.booleans(),
        eligible=st.booleans(),
        untried=st.booleans(),
        endpoints=st.integers(1, 7),
        remaining=st.floats(-1, 40),
        fastest=st.floats(0, 5),
    )
)
STRATEGIES = st.none() | st.builds(Opinion, retry=OPTIONAL, stop=OPTIONAL, pause=st.none() | st.floats())


@given(
    outcome=OUTCOMES,
    situation=SITUATIONS,
    strategy=STRATEGIES,
    attempts=st.none() | st.integers(1, 5),
    funds=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_no_strategy_can_change(
    outcome: Outcome, situation: Situation, strategy: Opinion | None, attempts: int | None, funds: bool, seed: int
) -> None:
    asked: list[bool] = []

    def withdraw() -> bool:
        asked.append(funds)
        return funds

    decision = decide(outcome, situation, Retry(attempts=attempts), withdraw, random.Random(seed), strategy)
    maybe_sent = outcome.sent is Sent.MAYBE_SENT
    charged = bool(asked) and funds
    if isinstance(decision, Again):
        assert situation.replayable
        assert situation.eligible
        assert situation.resendable() or outcome.unprocessed or not maybe_sent
        assert not situation.hopeless
        assert not (outcome.once and situation.once_spent)
        assert outcome.cause is not Cause.CANCELLED
        assert 0 <= decision.wait < situation.remaining
        assert decision.wait + situation.fastest < situation.remaining
        assert charged == (maybe_sent and not situation.paid)
        if strategy is None:
            assert outcome.retry
            assert situation.attempts - situation.unsent < (attempts or max(3, situation.endpoints))
        if situation.untried and (strategy is None or strategy.pause is None):
            assert decision.wait == 0
    else:
        assert not charged
    assert len(asked) <= 1


def test_no_retry_without_an_endpoint_to_go_to() -> None:
    """The reply there is stands, rather than being thrown away for an error."""
    decision, charged = run(BROKEN, replace(FIRST, eligible=False, untried=False))
    assert decision == Final("no endpoint is eligible")
    assert not charged

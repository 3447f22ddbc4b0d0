"""The circuit breaker: its table, its triggers, its times."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pathlb.core.breaker import TRANSITIONS, BreakerEvent, BreakerState, CircuitBreaker
from pathlb.core.config import Breaker
from pathlb.core.errors import IllegalEvent
from pathlb.core.model import Mark, Rng

from .helpers import ScriptedRng

S, E = BreakerState, BreakerEvent
Change = tuple[float, BreakerState, BreakerState, str]


def make(rng: Rng | None = None, **settings: Any) -> tuple[CircuitBreaker, list[Change]]:
    changes: list[Change] = []
    breaker = CircuitBreaker(Breaker(**settings), rng or ScriptedRng(0.0), lambda *change: changes.append(change))
    return breaker, changes


def fail(breaker: CircuitBreaker, now: float, times: int = 5) -> None:
    for _ in range(times):
        breaker.observe(now, Mark.FAILURE, breaker.epoch)


# Everything a breaker can be told, as the call that brings the event about. From each state every event either leads
# where the table says or is refused.
@pytest.mark.parametrize("state", list(S))
@pytest.mark.parametrize("event", list(E))
def test_every_state_and_event_is_tabled_or_illegal(state: BreakerState, event: BreakerEvent) -> None:
    breaker, changes = make()
    breaker.state = state
    after = TRANSITIONS.get((state, event))
    if after is None:
        with pytest.raises(IllegalEvent, match=event.name):
            breaker._fire(10.0, event)
        assert (breaker.state, changes, breaker.epoch) == (state, [], 0)
    else:
        breaker._fire(10.0, event)
        assert breaker.state is after
        assert changes == [(10.0, state, after, event.value)]
        assert breaker.epoch == 1


def test_the_table_is_the_one_in_the_design() -> None:
    assert {(a.name, e.name): b.name for (a, e), b in TRANSITIONS.items()} == {
        ("CLOSED", "TRIPPED"): "OPEN",
        ("OPEN", "ELAPSED"): "HALF_OPEN",
        ("OPEN", "PROVED"): "CLOSED",
        ("HALF_OPEN", "PROBE_STARTED"): "PROBING",
        ("HALF_OPEN", "PROVED"): "CLOSED",
        ("PROBING", "PROBE_PASSED"): "CLOSED",
        ("PROBING", "PROBE_FAILED"): "OPEN",
        ("PROBING", "PROBE_ABANDONED"): "HALF_OPEN",
        ("PROBING", "PROVED"): "CLOSED",
    }


def test_failures_in_a_row_open_it() -> None:
    breaker, changes = make(failures=3)
    fail(breaker, 1.0, 2)
    breaker.observe(1.0, Mark.SUCCESS, 0)
    fail(breaker, 1.0, 2)
    assert breaker.state is S.CLOSED
    fail(breaker, 1.0, 1)
    assert breaker.state is S.OPEN
    assert changes == [(1.0, S.CLOSED, S.OPEN, "3 failures in a row")]


def test_what_says_nothing_breaks_no_row() -> None:
    breaker, _ = make(failures=2)
    fail(breaker, 1.0, 1)
    breaker.observe(1.0, Mark.IGNORE, 0)
    fail(breaker, 1.0, 1)
    assert breaker.state is S.OPEN


def test_a_low_success_rate_opens_it_from_the_minimum_volume_on() -> None:
    breaker, changes = make(failures=100, min_requests=20, success_rate=0.8)
    for _ in range(16):
        breaker.observe(1.0, Mark.SUCCESS, 0)
    fail(breaker, 1.0, 4)
    assert breaker.state is S.CLOSED  # 16 of 20 is not below 80%
    fail(breaker, 1.0, 1)
    assert breaker.state is S.OPEN
    assert changes[0][3] == "5 of 21 failed in 30 s"


def test_outcomes_older_than_the_window_do_not_count() -> None:
    breaker, _ = make(failures=100, min_requests=10, window=30.0)
    fail(breaker, 0.0, 9)
    fail(breaker, 31.0, 9)
    assert breaker.state is S.CLOSED
    fail(breaker, 31.0, 1)
    assert breaker.state is S.OPEN


def test_outcomes_of_an_earlier_epoch_do_not_count() -> None:
    breaker, _ = make(failures=1)
    fail(breaker, 0.0, 1)
    breaker.advance(1.0)
    breaker.start_probe(1.0)
    breaker.observe(1.1, Mark.SUCCESS, breaker.epoch, probe=True)
    assert breaker.state is S.CLOSED
    breaker.observe(1.2, Mark.FAILURE, 0)
    assert (breaker.state, breaker.consecutive_failures) == (S.CLOSED, 0)
    breaker.observe(1.2, Mark.FAILURE, breaker.epoch)
    assert breaker.state is S.OPEN


def test_closing_forgets_the_successes_of_before() -> None:
    breaker, _ = make(failures=3, min_requests=10, success_rate=0.8)
    for _ in range(100):
        breaker.observe(0.0, Mark.SUCCESS, 0)
    fail(breaker, 0.0, 3)
    breaker.advance(1.0)
    breaker.start_probe(1.0)
    breaker.observe(1.0, Mark.SUCCESS, breaker.epoch, probe=True)
    for number in range(10):
        breaker.observe(1.0, Mark.FAILURE if number % 3 == 2 else Mark.SUCCESS, breaker.epoch)
    assert breaker.state is S.CLOSED  # 7 of 10, but the last was a success
    breaker.observe(1.0, Mark.FAILURE, breaker.epoch)
    assert breaker.state is S.OPEN


def probing(**settings: Any) -> tuple[CircuitBreaker, list[Change]]:
    breaker, changes = make(failures=1, **settings)
    fail(breaker, 0.0, 1)
    breaker.advance(breaker.reopens_at)
    breaker.start_probe(breaker.reopens_at)
    changes.clear()
    return breaker, changes


@pytest.mark.parametrize(
    ("mark", "after"), [(Mark.SUCCESS, S.CLOSED), (Mark.FAILURE, S.OPEN), (Mark.IGNORE, S.HALF_OPEN)]
)
def test_the_probe_decides(mark: Mark, after: BreakerState) -> None:
    breaker, changes = probing()
    breaker.observe(1.5, mark, breaker.epoch)  # not the probe: says nothing
    assert changes == []
    breaker.observe(1.5, mark, breaker.epoch, probe=True)
    assert breaker.state is after


def test_a_probe_has_a_lease() -> None:
    breaker, changes = probing(probe_timeout=10.0)
    assert breaker.next_change == 11.0
    breaker.advance(10.9)
    assert breaker.state is S.PROBING
    epoch = breaker.epoch
    breaker.advance(11.0)
    assert changes == [(11.0, S.PROBING, S.OPEN, "no answer from the probe in 10 s")]
    breaker.observe(11.5, Mark.SUCCESS, epoch, probe=True)  # too late
    assert breaker.state is S.OPEN


def test_a_stall_of_this_process_extends_the_lease() -> None:
    breaker, _ = probing(probe_timeout=10.0)
    breaker.forgive(5.0)
    breaker.advance(15.9)
    assert breaker.state is S.PROBING
    breaker.advance(16.0)
    assert breaker.state is S.OPEN


def test_for_a_while_only_a_request_that_may_be_sent_twice_is_the_probe() -> None:
    breaker, _ = make(failures=1, probe_patience=1.0)
    assert not breaker.may_probe(0.0, True)
    fail(breaker, 0.0, 1)
    assert not breaker.may_probe(0.5, True)
    breaker.advance(1.0)
    assert breaker.may_probe(1.0, True)
    assert not breaker.may_probe(1.9, False)
    assert breaker.may_probe(2.0, False)
    breaker.start_probe(2.0)
    assert not breaker.may_probe(2.0, True)
    with pytest.raises(IllegalEvent):
        breaker.start_probe(2.0)


@pytest.mark.parametrize("before", [S.OPEN, S.HALF_OPEN, S.PROBING])
def test_a_request_picked_in_panic_can_prove_the_endpoint(before: BreakerState) -> None:
    breaker, _ = make(failures=1)
    fail(breaker, 0.0, 1)
    epoch = breaker.epoch
    if before is not S.OPEN:
        breaker.advance(1.0)
    if before is S.PROBING:
        breaker.start_probe(1.0)
    assert breaker.state is before
    breaker.observe(1.0, Mark.SUCCESS, epoch - 1, panic=True)  # picked before it opened
    breaker.observe(1.0, Mark.FAILURE, epoch, panic=True)
    breaker.observe(1.0, Mark.IGNORE, epoch, panic=True)
    assert breaker.state is before
    breaker.observe(1.0, Mark.SUCCESS, epoch, panic=True)
    assert breaker.state is S.CLOSED


def open_times(breaker: CircuitBreaker, failures: int) -> list[float]:
    now, seconds = 0.0, []
    fail(breaker, now, 1)
    for _ in range(failures):
        seconds.append(breaker.reopens_at - now)
        now = breaker.reopens_at
        assert breaker.next_change == now
        breaker.advance(now)
        assert breaker.next_change == math.inf
        breaker.start_probe(now)
        breaker.observe(now, Mark.FAILURE, breaker.epoch, probe=True)
    return seconds


def test_open_time_doubles_up_to_its_maximum() -> None:
    breaker, _ = make(failures=1, open_for=1.0, open_max=60.0)
    assert open_times(breaker, 8) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_open_time_after_very_many_failures_is_finite() -> None:
    breaker, _ = make(failures=1, open_max=5.0)
    assert open_times(breaker, 1200)[-1] == pytest.approx(5.0)


def test_open_time_is_jittered_downwards() -> None:
    breaker, _ = make(random.Random(1), failures=1, open_for=10.0, open_max=10.0, jitter=0.2)
    times = open_times(breaker, 200)
    assert min(times) >= 8.0
    assert max(times) <= 10.0
    assert max(times) - min(times) > 1.5


def test_open_time_starts_over_only_after_a_window_spent_closed() -> None:
    breaker, _ = make(failures=1, window=30.0)
    now = sum(open_times(breaker, 3))
    breaker.advance(now + 8)
    breaker.start_probe(now + 8)
    closed = now + 8
    breaker.observe(closed, Mark.SUCCESS, breaker.epoch, probe=True)
    fail(breaker, closed + 29, 1)
    assert breaker.reopens_at == pytest.approx(closed + 29 + 16)
    breaker.advance(breaker.reopens_at)
    breaker.start_probe(breaker.reopens_at)
    closed = breaker.reopens_at
    breaker.observe(closed, Mark.SUCCESS, breaker.epoch, probe=True)
    fail(breaker, closed + 30, 1)
    assert breaker.reopens_at == pytest.approx(closed + 31)


def test_one_failure_that_is_proof_opens_at_once() -> None:
    breaker, changes = make()
    breaker.observe(1.0, Mark.SUCCESS, 0, trip=True)
    breaker.observe(1.0, Mark.IGNORE, 0, trip=True)
    assert breaker.state is S.CLOSED
    breaker.observe(2.0, Mark.FAILURE, 0, trip=True)
    assert changes == [(2.0, S.CLOSED, S.OPEN, "one failure was proof")]
    assert (breaker.consecutive_failures, breaker.opens, breaker.reopens_at) == (1, 1, 3.0)
    breaker.observe(2.0, Mark.FAILURE, 0, trip=True)  # picked before: nothing new
    assert len(changes) == 1


def test_proof_of_failure_fails_the_probe() -> None:
    breaker, _ = make(failures=1)
    fail(breaker, 0.0, 1)
    breaker.advance(1.0)
    breaker.start_probe(1.0)
    breaker.observe(1.5, Mark.FAILURE, breaker.epoch, probe=True, trip=True)
    assert (breaker.state, breaker.reopens_at) == (S.OPEN, 3.5)


def test_next_change() -> None:
    breaker, _ = make(failures=1, probe_timeout=4.0)
    seen = [breaker.next_change]
    fail(breaker, 0.0, 1)
    seen.append(breaker.next_change)
    breaker.advance(1.0)
    seen.append(breaker.next_change)
    breaker.start_probe(1.5)
    seen.append(breaker.next_change)
    assert seen == [math.inf, 1.0, math.inf, 5.5]


def test_idle_knows_nothing_worth_keeping() -> None:
    breaker, _ = make(failures=2, window=30.0)
    assert breaker.idle(0.0)
    fail(breaker, 0.0, 1)
    assert not breaker.idle(100.0)  # one failure of the next row
    breaker.observe(0.0, Mark.SUCCESS, 0)
    assert not breaker.idle(1.0)
    assert breaker.idle(31.0)
    fail(breaker, 40.0, 2)
    assert not breaker.idle(1000.0)
    breaker.advance(1000.0)
    breaker.start_probe(1000.0)
    breaker.observe(1000.0, Mark.SUCCESS, breaker.epoch, probe=True)
    assert not breaker.idle(1001.0)  # its next open time depends on having been open
    assert breaker.idle(1031.0)


class BreakerMachine(RuleBasedStateMachine):
    """Random traffic on one breaker without jitter, against the properties it promises."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Breaker(failures=3, min_requests=6, window=10.0, open_max=8.0, jitter=0.0, probe_timeout=4.0)
        self.changes: list[Change] = []
        self.breaker = CircuitBreaker(self.config, random.Random(0), lambda *change: self.changes.append(change))
        self.now = 0.0
        self.picked: list[tuple[int, bool, bool]] = []
        self.checked = 0
        self.last_open = 0.0
        self.closed_at = -math.inf

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.9, 3.0, 9.0, 11.0]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.breaker.advance(self.now)

    @rule(panic=st.booleans())
    def pick(self, panic: bool) -> None:
        self.picked.append((self.breaker.epoch, False, panic))

    @rule(resendable=st.booleans())
    def probe(self, resendable: bool) -> None:
        if self.breaker.may_probe(self.now, resendable):
            assert self.breaker.state is S.HALF_OPEN
            self.breaker.start_probe(self.now)
            self.picked.append((self.breaker.epoch, True, False))
        elif self.breaker.state is not S.HALF_OPEN:
            with pytest.raises(IllegalEvent):
                self.breaker.start_probe(self.now)

    @rule(data=st.data(), mark=st.sampled_from(Mark), trip=st.sampled_from([False, False, True]))
    @precondition(lambda self: self.picked)
    def outcome(self, data: st.DataObject, mark: Mark, trip: bool) -> None:
        epoch, probe, panic = self.picked.pop(data.draw(st.integers(0, len(self.picked) - 1)))
        before, epoch_before = self.breaker.state, self.breaker.epoch
        self.breaker.observe(self.now, mark, epoch, probe=probe, panic=panic, trip=trip)
        if trip and mark is Mark.FAILURE and epoch == epoch_before:
            assert self.breaker.state in (S.OPEN, S.HALF_OPEN)
        if mark is Mark.IGNORE and not (before is S.PROBING and probe):
            assert self.breaker.epoch == epoch_before
        if epoch != epoch_before and not panic:
            assert self.breaker.epoch == epoch_before, "an outcome of an earlier epoch moved it"

    @rule()
    def steady_failures(self) -> None:
        for _ in range(self.config.failures):
            self.breaker.observe(self.now, Mark.FAILURE, self.breaker.epoch)
        assert self.breaker.state is not S.CLOSED

    @invariant()
    def transitions_are_tabled_and_times_back_off(self) -> None:
        legal = {(before, after) for (before, _), after in TRANSITIONS.items()}
        for now, before, after, _why in self.changes[self.checked :]:
            assert (before, after) in legal
            if after is S.OPEN:
                rested = before is S.CLOSED and now - self.closed_at >= self.config.window
                expected = 1.0 if rested or not self.last_open else min(self.config.open_max, 2 * self.last_open)
                assert self.breaker.reopens_at - now == pytest.approx(expected)
                self.last_open = expected
            elif after is S.CLOSED:
                self.closed_at = now
        self.checked = len(self.changes)
        assert self.breaker.epoch == len(self.changes)

    @invariant()
    def at_most_one_probe_counts(self) -> None:
        live = [epoch for epoch, probe, _ in self.picked if probe and epoch == self.breaker.epoch]
        assert len(live) <= (self.breaker.state is S.PROBING)

    @invariant()
    def time_is_never_overdue(self) -> None:
        assert self.breaker.next_change > self.now


TestBreakerMachine = BreakerMachine.TestCase

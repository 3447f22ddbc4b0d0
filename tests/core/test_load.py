"""The latency estimate and the recent outcomes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.load import LatencyEstimate, RecentOutcomes, Sample


def test_unknown_until_the_first_sample() -> None:
    estimate = LatencyEstimate()
    assert estimate.seconds is None
    estimate.record(5.0, 0.2)
    assert estimate.seconds == 0.2


def test_weight_of_a_sample_grows_with_the_time_since_the_last() -> None:
    estimate = LatencyEstimate(tau=10.0)
    estimate.record(0.0, 1.0)
    estimate.record(10.0, 0.0)
    assert estimate.seconds == pytest.approx(math.exp(-1))


def test_a_burst_at_one_moment_cannot_move_the_estimate() -> None:
    estimate = LatencyEstimate()
    estimate.record(0.0, 1.0)
    for _ in range(100):
        estimate.record(0.0, 50.0)
    assert estimate.seconds == 1.0


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 60)), min_size=1, max_size=30))
def test_stays_between_the_least_and_the_greatest_sample(samples: list[tuple[float, float]]) -> None:
    estimate = LatencyEstimate()
    now = 0.0
    for gap, seconds in samples:
        now += gap
        estimate.record(now, seconds)
    low, high = min(s for _, s in samples), max(s for _, s in samples)
    assert estimate.seconds is not None
    assert low - 1e-9 <= estimate.seconds <= high + 1e-9


def test_recent_outcomes_keep_the_last_and_forget_on_clear() -> None:
    recent = RecentOutcomes(size=3)
    for at in range(5):
        recent.add(Sample(float(at), False, 0.1))
    assert [sample.at for sample in recent.since(0.0)] == [2.0, 3.0, 4.0]
    assert [sample.at for sample in recent.since(3.0)] == [3.0, 4.0]
    recent.clear()
    assert recent.since(0.0) == []


def test_the_latest_beginning_of_what_was_answered() -> None:
    recent = RecentOutcomes()
    recent.answered(5.0, 4.0)
    recent.answered(6.0, 1.0)  # an older attempt, answered later
    assert (recent.last_head, recent.last_answered) == (6.0, 4.0)


def test_one_service_is_forgotten() -> None:
    recent = RecentOutcomes(size=4)
    for at, key in enumerate(["eth", None, "btc", "eth"]):
        recent.add(Sample(float(at), False, 0.1, key))
    recent.forget("eth")
    assert [(sample.at, sample.key) for sample in recent.since(0.0)] == [(1.0, None), (2.0, "btc")]
    for at in range(4, 9):
        recent.add(Sample(float(at), False, 0.1))
    assert len(recent.since(0.0)) == 4


def test_from_when_on_they_are_complete() -> None:
    recent = RecentOutcomes(size=3)
    assert (recent.complete_since, recent.last_added) == (-math.inf, -math.inf)
    for at in range(2):
        recent.add(Sample(float(at), False, 0.1))
    assert (recent.complete_since, recent.last_added) == (-math.inf, 1.0)
    for at in range(2, 5):
        recent.add(Sample(float(at), False, 0.1))
    assert (recent.complete_since, recent.last_added) == (2.0, 4.0)

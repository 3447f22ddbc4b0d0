"""Counting over a sliding window."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.window import SlidingCount


def test_counts_what_is_in_the_window() -> None:
    count = SlidingCount(10.0)
    for now in (100.0, 101.0, 105.0):
        count.add(now)
    assert count.total(105.0) == 3
    assert count.total(110.0) == 2
    assert count.total(111.5) == 1
    assert count.total(200.0) == 0


def test_a_bucket_that_comes_round_again_is_empty() -> None:
    count = SlidingCount(10.0)
    count.add(100.0)
    count.add(110.0)
    assert count.total(110.0) == 1


def test_clear() -> None:
    count = SlidingCount(10.0)
    count.add(1.0)
    count.clear()
    assert count.total(1.0) == 0
    count.add(1.5)
    assert count.total(1.5) == 1


@given(
    window=st.sampled_from([0.5, 1.0, 10.0, 30.0]),
    start=st.floats(0, 1e6),
    gaps=st.lists(st.floats(0, 20), max_size=40),
)
def test_nothing_young_is_missed_and_nothing_old_is_counted(window: float, start: float, gaps: list[float]) -> None:
    count = SlidingCount(window)
    times: list[float] = []
    now = start
    for gap in gaps:
        now += gap
        count.add(now)
        times.append(now)
        total = count.total(now)
        slack = window * 1e-6 + now * 1e-12
        assert total >= sum(now - at < 0.9 * window - slack for at in times)
        assert total <= sum(now - at <= window + slack for at in times)

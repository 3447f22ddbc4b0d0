"""Seconds in which this process did not run."""

from __future__ import annotations

import pytest

from pathlb.core.stall import StallMeter


@pytest.fixture
def meter() -> StallMeter:
    return StallMeter(interval=0.05, tolerance=0.1)


def test_ordinary_beats_are_no_stall(meter: StallMeter) -> None:
    for step in range(100):
        meter.beat(10 + step * 0.05)
    assert meter.total == 0.0


def test_lateness_within_tolerance_is_no_stall(meter: StallMeter) -> None:
    meter.beat(10.0)
    meter.beat(10.14)
    assert meter.total == 0.0


def test_a_late_beat_counts_its_whole_lateness(meter: StallMeter) -> None:
    meter.beat(10.0)
    meter.beat(15.05)
    assert meter.total == pytest.approx(5.0)
    meter.beat(15.10)
    assert meter.total == pytest.approx(5.0)


def test_a_reading_before_the_late_beat_includes_the_pause_once(meter: StallMeter) -> None:
    meter.beat(10.0)
    assert meter.read(15.05) == pytest.approx(5.0)
    assert meter.read(15.06) == pytest.approx(5.0)
    meter.beat(15.06)
    assert meter.total == pytest.approx(5.0)


def test_several_stalls_add_up(meter: StallMeter) -> None:
    meter.beat(10.0)
    meter.beat(11.05)
    meter.beat(13.10)
    assert meter.total == pytest.approx(3.0)


def test_time_without_expected_beats_is_no_stall(meter: StallMeter) -> None:
    assert meter.read(5.0) == 0.0
    meter.beat(10.0)
    meter.pause()
    assert meter.read(500.0) == 0.0
    meter.beat(501.0)
    assert meter.total == 0.0

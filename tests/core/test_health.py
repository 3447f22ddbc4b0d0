"""Rise and fall of active probes."""

from __future__ import annotations

import pytest

from pathlb.core.health import Health, HealthState


def test_up_without_probes() -> None:
    health = HealthState(probed=False)
    assert health.state is Health.UP
    assert not health.changing


@pytest.mark.parametrize(("passed", "verdict"), [(True, Health.UP), (False, Health.DOWN)])
def test_the_first_result_decides_alone(passed: bool, verdict: Health) -> None:
    health = HealthState(probed=True, rise=5, fall=5)
    assert health.state is Health.UNKNOWN
    assert health.changing
    assert health.record(passed, "first")
    assert health.state is verdict
    assert health.why == "first"
    assert not health.changing


def test_fall_and_rise_need_their_count_in_a_row() -> None:
    health = HealthState(probed=True, rise=2, fall=3)
    health.record(True, "")
    assert not health.record(False, "1")
    assert health.changing
    assert not health.record(False, "2")
    assert not health.record(True, "")  # the streak is broken
    assert not health.changing
    assert [health.record(False, str(n)) for n in range(3)] == [False, False, True]
    assert (health.state, health.why) == (Health.DOWN, "2")
    assert [health.record(True, "") for _ in range(2)] == [False, True]
    assert health.state is Health.UP

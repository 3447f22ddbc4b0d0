from __future__ import annotations

import random
import statistics

import pytest

from pathlb.testing import ServiceTime, Settings


def test_service_times_have_the_mean_they_say() -> None:
    rng = random.Random(1)
    assert {ServiceTime.constant(0.5).sample(rng) for _ in range(3)} == {0.5}
    for make in (ServiceTime.exponential, ServiceTime.lognormal):
        samples = [make(0.5).sample(rng) for _ in range(50_000)]
        assert statistics.fmean(samples) == pytest.approx(0.5, rel=0.05)
        assert min(samples) > 0


def test_the_spread_is_the_one_of_the_shape() -> None:
    rng = random.Random(2)
    exponential = statistics.median(ServiceTime.exponential(1.0).sample(rng) for _ in range(20_000))
    lognormal = statistics.median(ServiceTime.lognormal(1.0).sample(rng) for _ in range(20_000))
    assert exponential == pytest.approx(0.693, rel=0.05)
    assert lognormal == pytest.approx(0.607, rel=0.05)


@pytest.mark.parametrize("make", [ServiceTime.constant, ServiceTime.exponential, ServiceTime.lognormal])
def test_a_mean_of_zero_is_immediate(make: type[ServiceTime]) -> None:
    assert make(0).sample(random.Random(3)) == 0


@pytest.mark.parametrize("mean", [-1.0, float("inf"), float("nan")])
def test_impossible_means_are_refused(mean: float) -> None:
    with pytest.raises(ValueError, match="mean service time"):
        ServiceTime(mean)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="workers"):
        Settings(workers=0)
    with pytest.raises(ValueError, match="queue"):
        Settings(queue=-1)

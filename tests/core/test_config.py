"""Every setting that cannot work is refused where it is written, by name."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from pathlb.core.cluster import Settings
from pathlb.core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart, check_number
from pathlb.core.errors import ConfigError

DURATIONS = {
    Breaker: ("window", "open_for", "open_max", "probe_timeout"),
    Outlier: ("window", "eject_for", "eject_max"),
    BlockHeight: ("max_age",),
}
NOT_NEGATIVE = {
    Breaker: ("probe_patience",),
    Outlier: ("failure_sigma", "latency_sigma", "latency_floor", "confirm", "overdue_floor"),
    SlowStart: ("window",),
    Limits: ("queue_timeout",),
    Retry: ("wait_base", "wait_max", "budget_ratio", "budget_reserve"),
}
COUNTS = {
    Breaker: ("failures", "min_requests"),
    Outlier: ("min_requests", "stalled_attempts"),
    Limits: ("concurrency",),
    Retry: ("attempts",),
    Settings: ("rise", "fall"),
    BlockHeight: ("min_endpoints",),
}
RATIOS = {
    Breaker: ("success_rate",),
    Outlier: ("failure_margin", "max_ejected"),
    Panic: ("threshold",),
    SlowStart: ("floor",),
}
FACTORS = {Outlier: ("latency_factor", "latency_clear", "overdue_factor")}
NUMBERS = [DURATIONS, NOT_NEGATIVE, COUNTS, RATIOS, FACTORS]


def cases(*groups: dict[Any, tuple[str, ...]], values: list[Any]) -> list[Any]:
    return [
        pytest.param(kind, name, value, id=f"{kind.__name__}.{name}={value!r}")
        for group in groups
        for kind, names in group.items()
        for name in names
        for value in values
    ]


BAD = [
    *cases(*NUMBERS, values=[-1, math.nan, "3", True, -math.inf, [1]]),
    *cases(DURATIONS, COUNTS, values=[0]),
    *cases(COUNTS, values=[1.5, math.inf]),
    *cases(RATIOS, values=[1.0001, math.inf]),
    *cases(FACTORS, values=[0.99]),
    *cases({Breaker: ("jitter",), Outlier: ("jitter",)}, values=[-0.1, 0.51, math.nan, None]),
    *cases({Outlier: ("max_ejected",), SlowStart: ("floor",)}, values=[0]),
    *cases({Limits: ("queue",), BlockHeight: ("lag",)}, values=[-1, 0.5, math.nan, None]),
    *cases({Retry: ("budget_ttl",)}, values=[0.5, math.inf, math.nan]),
    *cases({Retry: ("wait_base", "wait_max", "budget_ratio", "budget_reserve")}, values=[math.inf]),
    *cases({Retry: ("statuses",)}, values=[500, None, [200], {600}, ["500"], "500", [502.0], [[500]]]),
    *cases({Retry: ("stop", "wait", "retry")}, values=[3, "stop"]),
    *cases({Panic: ("fail_closed",)}, values=["no", 1, None]),
]


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_a_bad_value_is_named(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    assert caught.value.field == f"{kind.__name__}.{name}"
    assert str(caught.value) == f"{kind.__name__}.{name}: {caught.value.problem}"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("kind", "settings", "field"),
    [
        (Breaker, {"open_for": 5.0, "open_max": 4.0}, "Breaker.open_max"),
        (Outlier, {"latency_factor": 2.0, "latency_clear": 2.5}, "Outlier.latency_clear"),
        (Outlier, {"eject_for": 10.0, "eject_max": 9.0}, "Outlier.eject_max"),
        (Panic, {"threshold": 0.5, "fail_closed": True}, "Panic.threshold"),
        (Retry, {"wait_base": 1.0, "wait_max": 0.5}, "Retry.wait_max"),
        (Retry, {"attempts": 3, "stop": lambda state: True}, "Retry.stop"),
    ],
)
def test_contradictions_are_named(kind: Any, settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**settings)
    assert caught.value.field == field


def test_the_limits_themselves_are_allowed() -> None:
    Breaker(failures=1, success_rate=0, min_requests=1, jitter=0.5, probe_patience=0, open_for=1, open_max=1)
    Outlier(failure_margin=1, max_ejected=1, confirm=0, latency_factor=1.5, latency_floor=0, jitter=0)
    Panic(threshold=1)
    SlowStart(window=0, floor=1)
    Limits(concurrency=1, queue=0, queue_timeout=math.inf)
    Retry(attempts=1, budget_ttl=1, wait_base=0, wait_max=0, statuses=[])
    Settings(outlier=None)
    BlockHeight(lag=0, min_endpoints=1, max_age=math.inf)


def test_statuses_become_a_set() -> None:
    assert Retry(statuses=[500, 503, 500]).statuses == frozenset({500, 503})


def test_strategies_that_can_be_called_are_taken() -> None:
    Retry(stop=lambda state: True, wait=lambda state: 1.0, retry=lambda state: False)


def test_presets() -> None:
    assert (Limits.modest().concurrency, Limits.modest().queue) == (100, 1_000)
    assert (Limits.generous().concurrency, Limits.generous().queue) == (500, 5_000)


def test_a_number_without_owner() -> None:
    with pytest.raises(ConfigError, match=r"^deadline: must be between 0 and 10, not 11$"):
        check_number("", "deadline", 11, 0, 10)
    with pytest.raises(ConfigError, match=r"^deadline: must be at least 1, not 0$"):
        check_number("", "deadline", 0, 1)


def test_strategies_must_not_be_async() -> None:
    async def later(state: Any) -> bool:
        return True

    class Later:
        async def __call__(self, state: Any) -> bool:
            return True

    for name in ("stop", "wait", "retry"):
        for strategy in (later, Later()):
            with pytest.raises(ConfigError, match="must not be async") as caught:
                Retry(**{name: strategy})
            assert caught.value.field == f"Retry.{name}"


def test_a_config_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("Retry.stop", "is wrong")))
    assert (error.field, error.problem, str(error)) == ("Retry.stop", "is wrong", "Retry.stop: is wrong")

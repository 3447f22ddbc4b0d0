"""Which event moves which instrument, and with which attributes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from pathlb.core.events import (
    BreakerChanged,
    Dequeued,
    Ejected,
    Event,
    GivenUp,
    HealthChanged,
    Observed,
    PanicChanged,
    Picked,
    Queued,
    QueueOverflow,
    Released,
    Retried,
    RetryRefused,
)
from pathlb.core.model import Cause, Outcome
from pathlb.telemetry.metrics import DURATION_BUCKETS, Metrics, metrics_configured

A, B = "http://10.0.0.1", "http://10.0.0.2"
BAD_GATEWAY = Outcome(Cause.BEYOND, status=502, retry=True)


@pytest.fixture
def reader() -> InMemoryMetricReader:
    return InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    provider = MeterProvider([reader], shutdown_on_exit=False)
    yield provider
    provider.shutdown()


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    data = reader.get_metrics_data()
    if data is None:
        return {}
    (resource,) = data.resource_metrics
    (scope,) = resource.scope_metrics
    assert scope.scope.name == "pathlb"
    return {metric.name: list(metric.data.data_points) for metric in scope.metrics}


def tell(provider: MeterProvider, *events: Event) -> None:
    metrics = Metrics(provider)
    for event in events:
        metrics(event)


@pytest.mark.parametrize(
    ("event", "name", "value", "attributes"),
    [
        (
            Retried(0.0, A, BAD_GATEWAY, 0.1),
            "pathlb.retries",
            1,
            {"pathlb.endpoint": A, "pathlb.outcome": "fault beyond the instance"},
        ),
        (
            RetryRefused(0.0, A, BAD_GATEWAY, "budget"),
            "pathlb.retries.refused",
            1,
            {"pathlb.endpoint": A, "pathlb.why": "budget"},
        ),
        (
            BreakerChanged(0.0, A, "service-7", "closed", "open", "5 failures"),
            "pathlb.breaker.transitions",
            1,
            {"pathlb.endpoint": A, "pathlb.breaker.before": "closed", "pathlb.breaker.after": "open"},
        ),
        (
            Ejected(0.0, A, "latency", 30.0, "800 ms against 90"),
            "pathlb.ejections",
            1,
            {"pathlb.endpoint": A, "pathlb.signal": "latency"},
        ),
        (GivenUp(0.0, A, 3), "pathlb.given_up", 3, {"pathlb.endpoint": A}),
        (PanicChanged(0.0, True, 1, 5), "pathlb.panic", 1, {}),
        (QueueOverflow(0.0, 100), "pathlb.queue.overflows", 1, {}),
        (Picked(0.0, A, "p2c", 4, 3), "pathlb.requests.in_flight", 1, {"pathlb.endpoint": A}),
    ],
)
def test_one_event_one_instrument(
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    event: Event,
    name: str,
    value: int,
    attributes: dict[str, str],
) -> None:
    tell(provider, event)
    found = points(reader)
    assert list(found) == [name]
    (point,) = found[name]
    assert (point.value, dict(point.attributes)) == (value, attributes)


@pytest.mark.parametrize(
    ("outcome", "attributes"),
    [
        (Outcome(Cause.OK, status=200), {"pathlb.outcome": "ok", "http.response.status_code": 200}),
        (
            BAD_GATEWAY,
            {
                "pathlb.outcome": "fault beyond the instance",
                "http.response.status_code": 502,
                "error.type": "502",
            },
        ),
        (
            Outcome(Cause.INSTANCE, detail="Connection refused"),
            {"pathlb.outcome": "instance fault", "error.type": "instance fault"},
        ),
        (Outcome(Cause.CANCELLED), {"pathlb.outcome": "cancelled by the caller", "error.type": "cancelled"}),
    ],
)
def test_the_duration_of_each_attempt(
    provider: MeterProvider, reader: InMemoryMetricReader, outcome: Outcome, attributes: dict[str, Any]
) -> None:
    tell(provider, Observed(0.0, A, outcome, 0.2))
    (point,) = points(reader)["http.client.request.duration"]
    assert (point.count, point.sum) == (1, 0.2)
    assert point.explicit_bounds == DURATION_BUCKETS
    assert dict(point.attributes) == {"pathlb.endpoint": A} | attributes


def test_the_wait_in_the_queue(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    tell(provider, Queued(0.0, 1), Dequeued(0.3, 0, 0.3, "granted"))
    (point,) = points(reader)["pathlb.queue.wait"]
    assert (point.count, point.sum, dict(point.attributes)) == (1, 0.3, {"pathlb.why": "granted"})


def test_requests_in_flight_rise_and_fall_by_endpoint(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    picked = [Picked(0.0, url, "p2c", 0, 2) for url in (A, A, B)]
    tell(provider, *picked, Released(0.0, A, 1), Released(0.0, B, 0))
    levels = {p.attributes["pathlb.endpoint"]: p.value for p in points(reader)["pathlb.requests.in_flight"]}
    assert levels == {A: 1, B: 0}


def test_ends_without_a_beginning_do_not_sink_a_level(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    """Subscribed while a request was under way and the balancer in panic."""
    tell(provider, Released(0.0, A, 0), PanicChanged(0.0, False, 5, 5), Picked(0.0, A, "p2c", 0, 2))
    found = points(reader)
    assert found["pathlb.requests.in_flight"][0].value == 1
    assert "pathlb.panic" not in found


def test_panic_ends(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    tell(provider, PanicChanged(0.0, True, 1, 5), PanicChanged(0.0, False, 5, 5))
    assert points(reader)["pathlb.panic"][0].value == 0


def test_other_events_are_passed_over(provider: MeterProvider, reader: InMemoryMetricReader) -> None:
    tell(provider, Queued(0.0, 1), HealthChanged(0.0, A, "unknown", "up", "200"))
    assert points(reader) == {}


def test_several_balancers_add_up(
    provider: MeterProvider, reader: InMemoryMetricReader, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        tell(provider, QueueOverflow(0.0, 1))
        tell(provider, QueueOverflow(0.0, 1))
    assert points(reader)["pathlb.queue.overflows"][0].value == 2
    assert not caplog.records


def test_nobody_need_listen_without_an_sdk(provider: MeterProvider) -> None:
    assert metrics_configured(provider)
    assert not metrics_configured()
    assert not metrics_configured(NoOpMeterProvider())
    Metrics()(QueueOverflow(0.0, 1))

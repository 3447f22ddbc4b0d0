"""OpenTelemetry metrics from the balancer's events. Needs the API package only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from opentelemetry import metrics
from opentelemetry.metrics import Meter, MeterProvider
from opentelemetry.util.types import AttributeValue

from ..core.events import (
    BreakerChanged,
    Dequeued,
    Ejected,
    Event,
    Finished,
    GivenUp,
    Observed,
    PanicChanged,
    Picked,
    QueueOverflow,
    Released,
    Retried,
    RetryRefused,
)
from .semconv import ENDPOINT, ERROR_TYPE, OUTCOME, SCHEMA_URL, SCOPE, STATUS_CODE, error_type, records, version

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds; what the conventions advise for `http.client.request.duration`."""

COUNT_BUCKETS = (1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 15.0, 25.0)

SIGNAL = "pathlb.signal"
WHY = "pathlb.why"
BEFORE = "pathlb.breaker.before"
AFTER = "pathlb.breaker.after"


def metrics_configured(meter_provider: MeterProvider | None = None) -> bool:
    """Whether anything would come of recording: false while no SDK is configured, so that nobody need listen."""
    return records(meter_provider or metrics.get_meter_provider())


class Metrics:
    """A listener that turns events into metrics. Subscribe it before the first request, to one balancer or several.

    | instrument | kind | attributes |
    |---|---|---|
    | `http.client.request.duration` | histogram, s, one value per attempt | `pathlb.endpoint`, `pathlb.outcome`,
      `http.response.status_code`, `error.type` |
    | `pathlb.request.attempts` | histogram, one value per caller's request; 0 for one that got no endpoint | |
    | `pathlb.request.relays` | histogram, one value per caller's request, if the endpoints told of any | |
    | `pathlb.requests.in_flight` | up-down counter | `pathlb.endpoint` |
    | `pathlb.retries` | counter | `pathlb.endpoint` (where it failed), `pathlb.outcome` |
    | `pathlb.retries.refused` | counter | `pathlb.endpoint`, `pathlb.why` |
    | `pathlb.breaker.transitions` | counter | `pathlb.endpoint`, `pathlb.breaker.before`, `pathlb.breaker.after` |
    | `pathlb.ejections` | counter | `pathlb.endpoint`, `pathlb.signal` |
    | `pathlb.given_up` | counter of attempts | `pathlb.endpoint` |
    | `pathlb.panic` | up-down counter: balancers failing open | |
    | `pathlb.queue.wait` | histogram, s | `pathlb.why` |
    | `pathlb.queue.overflows` | counter | |

    A request counts whatever becomes of it, cancelled ones too. Each part of a split batch is one of its own; what is
    refused for its size before it comes to an endpoint is none.

    Keys (service ids), paths and the text of errors are left out: they have no bound. An attempt without a reply has
    its cause as `error.type`; which fault it was is on the span.

    `meter_provider` is the global one by default. See `metrics_configured` for whether it is worth listening.
    """

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        provider = meter_provider or metrics.get_meter_provider()
        meter = provider.get_meter(SCOPE, version(), SCHEMA_URL)
        self._duration = meter.create_histogram(
            "http.client.request.duration",
            unit="s",
            description="Duration of HTTP client requests.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        )
        self._queue_wait = meter.create_histogram(
            "pathlb.queue.wait",
            unit="s",
            description="Time requests waited for an endpoint below its limit.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS,
        )
        self._attempts = meter.create_histogram(
            "pathlb.request.attempts",
            unit="{attempt}",
            description="Attempts made for one request of a caller.",
            explicit_bucket_boundaries_advisory=(0.0, *COUNT_BUCKETS),
        )
        self._relays = meter.create_histogram(
            "pathlb.request.relays",
            unit="{relay}",
            description="Relays the endpoints made behind themselves for one request of a caller, over all attempts.",
            explicit_bucket_boundaries_advisory=COUNT_BUCKETS,
        )
        self._in_flight = _Level(meter, "pathlb.requests.in_flight", "{request}", "Replies not yet closed.")
        self._panic = _Level(meter, "pathlb.panic", "{balancer}", "Balancers that fail open.")
        self._retries = meter.create_counter("pathlb.retries", "{retry}", "Attempts made up for by another.")
        self._refused = meter.create_counter("pathlb.retries.refused", "{retry}", "Retries that were not allowed.")
        self._transitions = meter.create_counter("pathlb.breaker.transitions", "{transition}", "Breaker changes.")
        self._ejections = meter.create_counter("pathlb.ejections", "{ejection}", "Outliers set aside.")
        self._given_up = meter.create_counter("pathlb.given_up", "{attempt}", "Hanging attempts sent elsewhere.")
        self._overflows = meter.create_counter("pathlb.queue.overflows", "{request}", "Refused by a full queue.")
        self._record: dict[type[Any], Callable[[Any], None]] = {
            Observed: self._on_observed,
            Finished: self._on_finished,
            Picked: self._on_picked,
            Released: self._on_released,
            Retried: self._on_retried,
            RetryRefused: self._on_retry_refused,
            BreakerChanged: self._on_breaker_changed,
            Ejected: self._on_ejected,
            GivenUp: self._on_given_up,
            PanicChanged: self._on_panic_changed,
            Dequeued: self._on_dequeued,
            QueueOverflow: self._on_queue_overflow,
        }

    def __call__(self, event: Event) -> None:
        record = self._record.get(type(event))
        if record is not None:
            record(event)

    def _on_observed(self, event: Observed) -> None:
        outcome = event.outcome
        attributes: dict[str, AttributeValue] = {ENDPOINT: event.endpoint, OUTCOME: outcome.cause.value}
        if outcome.status is not None:
            attributes[STATUS_CODE] = outcome.status
        if (wrong := error_type(outcome, outcome.status)) is not None:
            attributes[ERROR_TYPE] = wrong
        self._duration.record(event.duration, attributes)

    def _on_finished(self, event: Finished) -> None:
        self._attempts.record(event.attempts)
        if event.relays:
            self._relays.record(event.relays)

    def _on_picked(self, event: Picked) -> None:
        self._in_flight.up(event.endpoint, {ENDPOINT: event.endpoint})

    def _on_released(self, event: Released) -> None:
        self._in_flight.down(event.endpoint, {ENDPOINT: event.endpoint})

    def _on_retried(self, event: Retried) -> None:
        self._retries.add(1, {ENDPOINT: event.endpoint, OUTCOME: event.outcome.cause.value})

    def _on_retry_refused(self, event: RetryRefused) -> None:
        self._refused.add(1, {ENDPOINT: event.endpoint, WHY: event.why})

    def _on_breaker_changed(self, event: BreakerChanged) -> None:
        self._transitions.add(1, {ENDPOINT: event.endpoint, BEFORE: event.before, AFTER: event.after})

    def _on_ejected(self, event: Ejected) -> None:
        self._ejections.add(1, {ENDPOINT: event.endpoint, SIGNAL: event.signal})

    def _on_given_up(self, event: GivenUp) -> None:
        self._given_up.add(event.attempts, {ENDPOINT: event.endpoint})

    def _on_panic_changed(self, event: PanicChanged) -> None:
        if event.panicking:
            self._panic.up("", {})
        else:
            self._panic.down("", {})

    def _on_dequeued(self, event: Dequeued) -> None:
        self._queue_wait.record(event.waited, {WHY: event.why})

    def _on_queue_overflow(self, event: QueueOverflow) -> None:
        self._overflows.add(1)


class _Level:
    """An up-down counter that never sinks below zero.

    Whoever subscribes while requests are under way sees ends without their beginnings; counted, they would leave the
    figure too low for good.
    """

    def __init__(self, meter: Meter, name: str, unit: str, description: str) -> None:
        self._counter = meter.create_up_down_counter(name, unit, description)
        self._counts: dict[str, int] = {}

    def up(self, which: str, attributes: dict[str, AttributeValue]) -> None:
        self._counts[which] = self._counts.get(which, 0) + 1
        self._counter.add(1, attributes)

    def down(self, which: str, attributes: dict[str, AttributeValue]) -> None:
        count = self._counts.get(which, 0)
        if not count:
            return
        if count == 1:
            # Endpoints come and go by the thousand: only those in use are kept.
            del self._counts[which]
        else:
            self._counts[which] = count - 1
        self._counter.add(-1, attributes)

"""What an endpoint says of its own load: the `endpoint-load-metrics` field of ORCA (Open Request Cost Aggregation).

The metrics are those of `xds.data.orca.v3.OrcaLoadReport`, the formats Envoy's: `TEXT name=value,...` (with `:` from
some) and `JSON {...}`. The binary ones (`BIN `, gRPC's `endpoint-load-metrics-bin`) are not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from .core.load import ReportedLoad
from .exchange import Headers

FIELD = b"endpoint-load-metrics"

_LENGTH = len(FIELD)
_LONGEST = 4_096  # bytes that are read; a report has a handful of numbers
_MOST_UTILIZATION = 100.0  # times what it can do
_MOST = 1e9  # requests, in flight or a second
_APPLICATION, _CPU = "application_utilization", "cpu_utilization"
_IN_FLIGHT, _RPS = "in_flight", "rps_fractional"
# What stands for each: the names of the message, their form in JSON, and the named metric of `LoadReport`.
_NAMES = {
    _APPLICATION: _APPLICATION,
    "applicationUtilization": _APPLICATION,
    _CPU: _CPU,
    "cpuUtilization": _CPU,
    _RPS: _RPS,
    "rpsFractional": _RPS,
    "named_metrics.in_flight": _IN_FLIGHT,
    "namedMetrics.in_flight": _IN_FLIGHT,
}


def read_load(headers: Headers, now: float) -> ReportedLoad | None:
    """The load a reply reports; None when it reports none, or nothing that can be believed."""
    for name, value in headers:
        if len(name) == _LENGTH and name.lower() == FIELD:
            return parse(value, now)
    return None


def parse(value: bytes, now: float) -> ReportedLoad | None:
    """A report out of the value of the field. Metrics that are unknown, malformed or absurd are passed over."""
    if len(value) > _LONGEST:
        return None
    kind, _, content = value.partition(b" ")
    if kind == b"TEXT":
        metrics = _from_text(content)
    elif kind == b"JSON":
        metrics = _from_json(content)
    else:
        return None
    found: dict[str, float] = {}
    for name, number in metrics:
        known = _NAMES.get(name)
        if known is not None and (amount := _amount(number)) is not None:
            most = _MOST if known in (_IN_FLIGHT, _RPS) else _MOST_UTILIZATION
            if 0 <= amount <= most:
                found[known] = amount
    if not found:
        return None
    in_flight = found.get(_IN_FLIGHT)
    return ReportedLoad(
        now,
        # As gRPC's weighted policies read them (gRFC A58): 0 of the application is not set.
        utilization=found.get(_APPLICATION) or found.get(_CPU, found.get(_APPLICATION)),
        in_flight=None if in_flight is None else int(in_flight),
        rps=found.get(_RPS),
    )


def _from_text(content: bytes) -> Iterable[tuple[str, Any]]:
    for item in content.decode("latin-1").replace(":", "=").split(","):
        name, _, number = item.partition("=")
        yield name.strip(), number.strip()


def _from_json(content: bytes) -> Iterable[tuple[str, Any]]:
    try:
        report = json.loads(content)
    except (ValueError, RecursionError):
        return
    if not isinstance(report, dict):
        return
    for name, value in report.items():
        if isinstance(value, dict):
            for inner, number in value.items():
                yield f"{name}.{inner}", number
        else:
            yield name, value


def _amount(number: Any) -> float | None:
    """A finite number out of what stands for one; None if it is none."""
    if isinstance(number, bool) or not isinstance(number, str | int | float):
        return None
    if isinstance(number, str) and "_" in number:  # Python's own way to write them
        return None
    try:
        amount = float(number)
    except (ValueError, OverflowError):
        return None
    return amount if math.isfinite(amount) else None

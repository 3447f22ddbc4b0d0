"""A Python service behind a balancer says how loaded it is."""

from __future__ import annotations

import time

from ..core.config import check_number
from ..orca import FIELD
from .types import ASGIApp, Message, Receive, Scope, Send

_WINDOW = 1.0  # seconds that utilisation and rate are measured over, at least
_LONGEST = 2.0  # what is longer has a pause in it, and would say of a new burst that there is none


class LoadReport:
    """Adds the `endpoint-load-metrics` field (ORCA, TEXT format) to the responses of an app:

        endpoint-load-metrics: TEXT named_metrics.in_flight=12,cpu_utilization=0.310,rps_fractional=120.5

    - `named_metrics.in_flight`: requests the app is working on, this one included;
    - `cpu_utilization`: CPU time of this process, all its threads, as a fraction of one core, over the last second or
      two; not in the first second, nor in that after a pause. An event loop is at its end near 1, however many cores
      there are;
    - `rps_fractional`: requests ended a second, over the same time;
    - `application_utilization`: in flight by `concurrency`, the number of requests the app is good for, if given.

    pathlb reads it (`balancer.snapshot()`), and Envoy does. Each worker process of a server reports itself. A field of
    the app's own goes before. It tells outsiders how busy the service is: only for what is behind a balancer that
    takes it out. Raises `ConfigError`.
    """

    def __init__(self, app: ASGIApp, *, concurrency: int | None = None) -> None:
        if concurrency is not None:
            check_number(type(self).__name__, "concurrency", concurrency, 1, whole=True)
        self.app = app
        self._concurrency = concurrency
        self._in_flight = 0
        self._ended = 0
        self._measured = b""  # the metrics of the last window, as they are sent
        self._began = self._cpu = 0.0  # the window
        self._until = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def report(message: Message) -> None:
            await send(self._with_report(message) if message["type"] == "http.response.start" else message)

        self._in_flight += 1
        try:
            await self.app(scope, receive, report)
        finally:
            self._in_flight -= 1
            self._ended += 1

    def _with_report(self, message: Message) -> Message:
        headers = list(message.get("headers", ()))
        for name, _ in headers:
            if name == FIELD:
                return message
        now = time.monotonic()
        if now >= self._until:
            self._measure(now)
        in_flight = self._in_flight
        value = b"TEXT named_metrics.in_flight=%d%b" % (in_flight, self._measured)
        if self._concurrency is not None:
            value += b",application_utilization=%.3f" % (in_flight / self._concurrency)
        headers.append((FIELD, value))
        return {**message, "headers": headers}

    def _measure(self, now: float) -> None:
        """Close the window, if there is one, and begin the next."""
        cpu = time.process_time()
        seconds = now - self._began
        self._measured = b""
        if self._until and seconds <= _LONGEST:
            self._measured = b",cpu_utilization=%.3f,rps_fractional=%.1f" % (
                (cpu - self._cpu) / seconds,
                self._ended / seconds,
            )
        self._began, self._cpu, self._ended = now, cpu, 0
        self._until = now + _WINDOW

"""How long this process itself was not running, so that its own pauses are not blamed on endpoints (pitfall 12)."""

from __future__ import annotations


class StallMeter:
    """Adds up the time by which an expected heartbeat came late.

    The shell calls `beat` every `interval` seconds while requests are in flight. A reading taken after a pause but
    before the late heartbeat (replies are handled before timers) already includes that pause. Lateness up to
    `tolerance` seconds is ordinary scheduling.
    """

    __slots__ = ("_due", "_interval", "_tolerance", "total")

    def __init__(self, interval: float, tolerance: float) -> None:
        self._interval = interval
        self._tolerance = tolerance
        self._due: float | None = None
        self.total = 0.0
        """Seconds stalled since the beginning."""

    def beat(self, now: float) -> None:
        """The heartbeat came."""
        self.read(now)
        self._due = now + self._interval

    def pause(self) -> None:
        """No heartbeat is expected until the next `beat`."""
        self._due = None

    def read(self, now: float) -> float:
        """Seconds stalled up to `now`."""
        due = self._due
        if due is not None and now - due > self._tolerance:
            self.total += now - due
            self._due = now + self._interval
        return self.total

"""The verdict of active probes on one endpoint: `rise` successes in a row bring it up, `fall` failures take it down."""

from __future__ import annotations

import enum


class Health(enum.Enum):
    UNKNOWN = "unknown"
    """Probes are on and the first has not answered: not eligible yet."""
    UP = "up"
    DOWN = "down"


class HealthState:
    """Counts probe results. Without probes an endpoint is up.

    The first result decides alone: an endpoint must not wait `rise` rounds to serve at start.
    """

    __slots__ = ("_fall", "_rise", "_streak", "state", "why")

    def __init__(self, *, probed: bool, rise: int = 1, fall: int = 1) -> None:
        self._rise = rise
        self._fall = fall
        self._streak = 0  # results in a row that contradict the present verdict
        self.state = Health.UNKNOWN if probed else Health.UP
        self.why = ""

    @property
    def changing(self) -> bool:
        """Whether the last result contradicted the verdict, so that the next probe should come sooner."""
        return self._streak > 0 or self.state is Health.UNKNOWN

    @property
    def plain(self) -> bool:
        """Whether it says no more than that nothing is wrong."""
        return self.state is Health.UP and not self._streak

    def record(self, passed: bool, why: str) -> bool:
        """Take in one probe result; true when the verdict changed."""
        agrees = self.state is (Health.UP if passed else Health.DOWN)
        if agrees:
            self._streak = 0
            return False
        self._streak += 1
        needed = 1 if self.state is Health.UNKNOWN else (self._rise if passed else self._fall)
        if self._streak < needed:
            return False
        self._streak = 0
        self.state = Health.UP if passed else Health.DOWN
        self.why = why
        return True

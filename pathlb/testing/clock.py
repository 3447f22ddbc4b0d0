"""A clock that moves when told to."""

from __future__ import annotations


class FakeClock:
    """A monotonic clock in seconds that stands still until `advance`; it is a pathlb `Clock`.

    `start` is the first reading (default 0.0).
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds`. Raises `ValueError` for a step back, which no monotonic clock makes."""
        if not seconds >= 0:
            raise ValueError(f"a monotonic clock cannot advance by {seconds!r} seconds")
        self._now += seconds

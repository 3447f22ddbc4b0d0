"""A count over a sliding window of time."""

from __future__ import annotations


class SlidingCount:
    """How often something happened in the last `window` seconds, in ten buckets, whatever the traffic."""

    __slots__ = ("_buckets", "_current", "_width")

    _BUCKETS = 10

    def __init__(self, window: float) -> None:
        self._width = window / self._BUCKETS
        self._buckets = [0] * self._BUCKETS
        self._current = 0  # the bucket written last, numbered from the clock's zero

    def add(self, now: float) -> None:
        """Count one."""
        number = int(now / self._width)
        if number != self._current:
            self._turn_to(number)
        self._buckets[number % self._BUCKETS] += 1

    def total(self, now: float) -> int:
        """How many in the window."""
        number = int(now / self._width)
        if number != self._current:
            self._turn_to(number)
        return sum(self._buckets)

    def clear(self) -> None:
        self._buckets = [0] * self._BUCKETS

    def _turn_to(self, number: int) -> None:
        """Empty the buckets whose time has come round again."""
        for passed in range(max(self._current + 1, number - self._BUCKETS + 1), number + 1):
            self._buckets[passed % self._BUCKETS] = 0
        self._current = number

"""One timer that looks after the requests that have been under way for a while: a task of its own for each would cost
more than balancing it.
"""

from __future__ import annotations

import time
from typing import Protocol

from ..runner import Runner, Work, current_home, make_runner

_LOOK_EVERY = 0.05  # seconds a request may take before anybody waits for its caller to leave


class LookedAfter(Protocol):
    """A request under way."""

    began: float
    """When, on the monotonic clock."""

    def look(self) -> Work | None:
        """Do what its time calls for; the answer is run in the background."""


class Lookout:
    """Looks after the requests of one app."""

    def __init__(self) -> None:
        self._runner: Runner | None = None
        self._present: dict[LookedAfter, None] = {}  # in the order they came
        self._looking = False

    @property
    def runner(self) -> Runner:
        """That of this event loop."""
        runner = self._runner
        if runner is None or runner.home is not current_home():
            runner = self._runner = make_runner()
            self._present.clear()
            self._looking = False
        return runner

    def add(self, one: LookedAfter) -> None:
        """A request begins."""
        runner = self.runner
        self._present[one] = None
        if not self._looking:
            self._looking = True
            runner.tick(_LOOK_EVERY, self._look)

    def discard(self, one: LookedAfter) -> None:
        """It is answered, or over. Saying so twice is fine."""
        self._present.pop(one, None)

    def _look(self) -> bool:
        before = time.monotonic() - _LOOK_EVERY
        for one in self._present:
            if one.began > before:
                break  # the younger ones follow
            work = one.look()
            if work is not None:
                self.runner.spawn(work)
        self._looking = bool(self._present)
        return self._looking

"""tenacity's strategy objects, called directly: its vocabulary without its loop (45 us a call against 0.5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tenacity

from .core.config import Retry
from .errors import PathlbError
from .exchange import Reply

# Strategies get a RetryCallState, which wants the retrying object it came from. Nothing runs through this one.
_INERT = tenacity.AsyncRetrying()


class BoundStrategy:
    """The caller's strategies, bound to the attempt that just ended (`core.retry.Strategy`).

    `result` is shown to them as the caller's HTTP library would: as a response or as an exception of its own.
    """

    def __init__(
        self,
        config: Retry,
        result: Reply | PathlbError,
        present: Callable[[Reply | PathlbError], Any] | None,
        *,
        attempts: int,
        elapsed: float,
        slept: float,
    ) -> None:
        self._config = config
        self._wait: float | None = None
        shown = present(result) if present is not None else result
        state = self._state = tenacity.RetryCallState(_INERT, None, (), {})
        state.attempt_number = attempts
        state.idle_for = slept
        if isinstance(shown, BaseException):
            state.set_exception((type(shown), shown, shown.__traceback__))
        else:
            state.set_result(shown)
        assert state.outcome_timestamp is not None  # set with the result
        state.start_time = state.outcome_timestamp - elapsed

    def wants_retry(self) -> bool | None:
        strategy = self._config.retry
        return None if strategy is None else bool(strategy(self._state))

    def wait(self) -> float | None:
        strategy = self._config.wait
        if strategy is None:
            return None
        if self._wait is None:  # asked once: it may be drawn at random, and `stop` must see what will be waited
            self._wait = self._state.upcoming_sleep = max(0.0, float(strategy(self._state)))
        return self._wait

    def stops(self) -> bool | None:
        strategy = self._config.stop
        if strategy is None:
            return None
        self.wait()  # stop_before_delay looks at the sleep to come
        return bool(strategy(self._state))

"""A limit on how much is worked on at once, and a bounded queue in front of it."""

from __future__ import annotations

from collections import deque

import anyio

from ..runner import AttemptScope


class Turn:
    """A request's place. It must be waited for if it is not `granted` at once."""

    __slots__ = ("came", "granted")

    def __init__(self, *, granted: bool) -> None:
        self.granted = granted
        self.came: anyio.Event | None = None


class Limiter:
    """At most `concurrency` at once; `queue` more wait, first come first served."""

    def __init__(self, concurrency: int, queue: int) -> None:
        self._free = concurrency
        self._queue = queue
        self._waiting: deque[Turn] = deque()

    def enter(self) -> Turn | None:
        """A place, or None when the queue is full as well. Whoever is granted one calls `leave`, once."""
        if self._free:  # then nobody waits
            self._free -= 1
            return Turn(granted=True)
        if len(self._waiting) >= self._queue:
            return None
        turn = Turn(granted=False)
        self._waiting.append(turn)
        return turn

    async def wait(self, turn: Turn, scope: AttemptScope) -> bool:
        """Wait for the turn within `scope`; false when that ended first. When it raises, the place is given up."""
        turn.came = anyio.Event()
        try:
            with scope:
                await turn.came.wait()
        except BaseException:
            if turn.granted:
                self.leave()
            raise
        finally:
            if not turn.granted:
                self._waiting.remove(turn)
        return turn.granted

    def leave(self) -> None:
        """What was granted has ended: it is the next one's turn."""
        if not self._waiting:
            self._free += 1
            return
        turn = self._waiting.popleft()
        turn.granted = True
        assert turn.came is not None  # it waits
        turn.came.set()

"""The one queue: first in, first out, bounded. Its accounting only; the shell does the waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import IllegalEvent
from .lease import Want

GrantT = TypeVar("GrantT")


class Waiter(Generic[GrantT]):
    """A request in the queue. `settle(grant)` is called once, when it leaves with a lease or a refusal."""

    __slots__ = ("_settle", "grant", "since", "waiting", "want")

    def __init__(self, want: Want, since: float, settle: Callable[[], None]) -> None:
        self.want = want
        self.since = since
        self.waiting = True
        self.grant: GrantT | None = None
        self._settle = settle

    def settle(self, grant: GrantT) -> None:
        """Hand over what it waited for."""
        if not self.waiting:
            raise IllegalEvent("queue: a request that no longer waits cannot be granted")
        self.waiting = False
        self.grant = grant
        self._settle()


def _special(want: Want) -> bool:
    return not want.plain or want.key is not None


class WaitQueue(Generic[GrantT]):
    """Waiters in the order of their arrival. Those that gave up are skipped, in constant time each."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._waiters: deque[Waiter[GrantT]] = deque()
        self.depth = 0
        self.special = 0
        """How many of them cannot be served by just any endpoint."""

    @property
    def full(self) -> bool:
        return self.depth >= self._bound

    def push(self, waiter: Waiter[GrantT]) -> None:
        """Append one; the caller has looked at `full`."""
        if self.full:
            raise IllegalEvent("queue: push on a full queue")
        self._waiters.append(waiter)
        self.depth += 1
        self.special += _special(waiter.want)

    def leave(self, waiter: Waiter[GrantT]) -> bool:
        """The waiter gives up; false when it had been granted before it could."""
        if not waiter.waiting:
            return False
        waiter.waiting = False
        self._left(waiter)
        self.trim()
        return True

    def serve(self, waiter: Waiter[GrantT], grant: GrantT) -> None:
        """Hand the waiter its grant. Safe while iterating; call `trim` afterwards."""
        waiter.settle(grant)
        self._left(waiter)

    def __iter__(self) -> Iterator[Waiter[GrantT]]:
        """Those waiting, first come first."""
        return (waiter for waiter in self._waiters if waiter.waiting)

    def _left(self, waiter: Waiter[GrantT]) -> None:
        self.depth -= 1
        self.special -= _special(waiter.want)

    def trim(self) -> None:
        """Keep a waiting one at the head, and the memory of those that left bounded by those that wait."""
        waiters = self._waiters
        while waiters and not waiters[0].waiting:
            waiters.popleft()
        if len(waiters) > 2 * self.depth + 16:
            self._waiters = deque(waiter for waiter in waiters if waiter.waiting)

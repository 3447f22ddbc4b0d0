"""Background work and interruptible attempts on asyncio and trio, without a scope held open between calls.

An anyio task group must be left in the task that entered it, but a balancer is started by whichever request comes
first and closed by somebody else: so tasks of the event loop on asyncio, system tasks on trio. They run in a context of
their own: what the request that happens to start them has set (a span, say) is not theirs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import trio

Work = Callable[[], Awaitable[object]]


class AttemptScope(Protocol):
    """`with` it around an attempt: ends it after a time, or when `cancel` is called from elsewhere.

    Leaving it does not raise for that; `cut` tells.
    """

    cut: bool

    def __enter__(self) -> AttemptScope: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool: ...

    def cancel(self) -> None: ...


class Runner(Protocol):
    """What a balancer needs of the async library it runs on."""

    library: str
    """`asyncio` or `trio`."""
    home: object
    """The event loop, or the trio run, this runner belongs to."""

    def scope(self, seconds: float) -> AttemptScope:
        """A scope that ends an attempt after `seconds`."""

    def spawn(self, work: Work, *, finish: bool = False) -> None:
        """Run `work` in the background until it ends or the runner is closed; it must not raise.

        Closing waits for what is to `finish` and cancels the rest.
        """

    def tick(self, seconds: float, callback: Callable[[], bool]) -> None:
        """Call `callback` every `seconds` until it answers false."""

    async def aclose(self) -> None:
        """Cancel what runs and need not finish, and wait for the end of everything."""


def current_home() -> object:
    """The running event loop, or what stands for the trio run. Raises RuntimeError outside of both."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        import trio

        return trio.lowlevel.current_root_task()


def make_runner() -> Runner:
    """A runner for the async library of the caller."""
    home = current_home()
    return AsyncioRunner(home) if isinstance(home, asyncio.AbstractEventLoop) else TrioRunner(home)


class AsyncioScope:
    """An attempt on asyncio: what `asyncio.timeout` does, with one timer for all of them."""

    __slots__ = ("_cancelling", "_deadlines", "_struck", "_task", "cut", "deadline")

    def __init__(self, deadlines: _Deadlines, deadline: float) -> None:
        self._deadlines = deadlines
        self.deadline = deadline
        """On the clock of the event loop."""
        self._struck = False
        self.cut = False

    def __enter__(self) -> AsyncioScope:
        task = asyncio.current_task()
        assert task is not None  # only tasks can wait
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.add(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self._deadlines.discard(self)
        # Somebody else may have cancelled the task too: theirs goes on.
        if self._struck and self._task.uncancel() <= self._cancelling and exc_type is asyncio.CancelledError:
            self.cut = True
        return self.cut

    def cancel(self) -> None:
        self._deadlines.bring_forward(self)

    def strike(self) -> bool:
        """End the attempt; called by the event loop, with the task suspended.

        False when somebody else is cancelling the task already: a second cancellation on top of theirs would break
        into their clean-up, and an anyio scope would no longer know its own for what it is, and let it escape.
        """
        if self._task.cancelling() > self._cancelling:
            return False
        self._struck = True
        self._task.cancel()
        return True


class _Deadlines:
    """The deadlines of the attempts under way. Nearly all end long before theirs, so one timer waits for the earliest
    of those there were when it was set: a timer each costs more than all the rest of a scope.
    """

    __slots__ = ("_due", "_loop", "_scopes", "_timer")

    GRAIN = 0.002  # seconds a deadline may be late, so that thousands passing one by one do not each cost a search

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._scopes: set[AsyncioScope] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._due = math.inf

    def add(self, scope: AsyncioScope) -> None:
        self._scopes.add(scope)
        if scope.deadline < self._due:
            self._wait_until(scope.deadline)

    def discard(self, scope: AsyncioScope) -> None:
        self._scopes.discard(scope)

    def bring_forward(self, scope: AsyncioScope) -> None:
        """Its deadline is now. It is struck from the event loop, never from within its own task."""
        scope.deadline = -math.inf
        if scope in self._scopes:
            self._wait_until(self._loop.time())

    def rest(self) -> None:
        """Leave no timer behind where nothing is under way."""
        if self._timer is not None and not self._scopes:
            self._timer.cancel()
            self._due = math.inf

    def _wait_until(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._due = due
        self._timer = self._loop.call_at(due, self._strike, context=Context())

    def _strike(self) -> None:
        now = max(self._loop.time(), self._due)
        for scope in [scope for scope in self._scopes if scope.deadline <= now]:
            if scope.strike():
                self._scopes.remove(scope)
        self._due = math.inf
        if self._scopes:
            self._wait_until(max(now + self.GRAIN, min(scope.deadline for scope in self._scopes)))


class AsyncioRunner:
    """Tasks of one event loop."""

    library = "asyncio"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.home: object = loop
        self._loop = loop
        self._deadlines = _Deadlines(loop)
        self._tasks: dict[asyncio.Task[object], bool] = {}
        self._timer: asyncio.TimerHandle | None = None

    def scope(self, seconds: float) -> AttemptScope:
        return AsyncioScope(self._deadlines, self._loop.time() + seconds)

    def spawn(self, work: Work, *, finish: bool = False) -> None:
        task = self._loop.create_task(_run(work), context=Context())
        self._tasks[task] = finish
        task.add_done_callback(self._tasks.__delitem__)

    def tick(self, seconds: float, callback: Callable[[], bool]) -> None:
        # A timer and not a task: a loop closed under it leaves nothing pending to warn about.
        def once() -> None:
            self._timer = self._loop.call_later(seconds, once, context=clean) if callback() else None

        clean = Context()
        self._timer = self._loop.call_later(seconds, once, context=clean)

    async def aclose(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        tasks = dict(self._tasks)
        for task, finish in tasks.items():
            if not finish:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._deadlines.rest()


async def _run(work: Work) -> object:
    return await work()


class TrioScope:
    """An attempt on trio: a cancel scope."""

    __slots__ = ("_scope", "cut")

    def __init__(self, seconds: float) -> None:
        import trio

        self._scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        self.cut = False

    def __enter__(self) -> TrioScope:
        self._scope.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self.cut = bool(self._scope.__exit__(exc_type, exc, tb))
        return self.cut

    def cancel(self) -> None:
        self._scope.cancel()


class TrioRunner:
    """System tasks of one trio run."""

    library = "trio"

    def __init__(self, home: object) -> None:
        self.home = home
        self.scope = TrioScope
        self._running: dict[trio.CancelScope, trio.Event] = {}

    def spawn(self, work: Work, *, finish: bool = False) -> None:
        import trio

        scope, done = trio.CancelScope(shield=finish), trio.Event()
        self._running[scope] = done

        async def run() -> None:
            with scope:
                await work()
            del self._running[scope]
            done.set()

        trio.lowlevel.spawn_system_task(run, context=Context())

    def tick(self, seconds: float, callback: Callable[[], bool]) -> None:
        import trio

        async def run() -> None:
            more = True
            while more:
                await trio.sleep(seconds)
                more = callback()

        self.spawn(run)

    async def aclose(self) -> None:
        for scope, done in list(self._running.items()):
            if not scope.shield:
                scope.cancel()
            await done.wait()

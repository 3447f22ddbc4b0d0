"""Background work and interruptible attempts on asyncio and trio, without a scope held open between calls.

An anyio task group must be left in the task that entered it, but a balancer is started by whichever request comes
first and closed by somebody else: so tasks of the event loop on asyncio, system tasks on trio. They run in a context of
their own: what the request that happens to start them has set (a span, say) is not theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import trio

Work = Callable[[], Awaitable[object]]


class AttemptScope(Protocol):
    """`async with` it around an attempt: ends it after a time, or when `cancel` is called from elsewhere.

    Leaving it does not raise for that; `cut` tells.
    """

    cut: bool

    async def __aenter__(self) -> AttemptScope: ...

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool: ...

    def cancel(self) -> None: ...


class Runner(Protocol):
    """What a balancer needs of the async library it runs on."""

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
    """An attempt on asyncio: the standard library's timeout, which can also be ended early."""

    __slots__ = ("_timeout", "cut")

    def __init__(self, seconds: float) -> None:
        self._timeout = asyncio.timeout(seconds)
        self.cut = False

    async def __aenter__(self) -> AsyncioScope:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        try:
            await self._timeout.__aexit__(exc_type, exc, tb)
        except TimeoutError:
            self.cut = True
        return self.cut

    def cancel(self) -> None:
        if not self._timeout.expired():  # else it is ending already, and cannot be rescheduled
            self._timeout.reschedule(0)


class AsyncioRunner:
    """Tasks of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.home: object = loop
        self.scope = AsyncioScope
        self._loop = loop
        self._tasks: dict[asyncio.Task[object], bool] = {}
        self._timer: asyncio.TimerHandle | None = None

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


async def _run(work: Work) -> object:
    return await work()


class TrioScope:
    """An attempt on trio: a cancel scope."""

    __slots__ = ("_scope", "cut")

    def __init__(self, seconds: float) -> None:
        import trio

        self._scope = trio.CancelScope(deadline=trio.current_time() + seconds)
        self.cut = False

    async def __aenter__(self) -> TrioScope:
        self._scope.__enter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool:
        self.cut = bool(self._scope.__exit__(exc_type, exc, tb))
        return self.cut

    def cancel(self) -> None:
        self._scope.cancel()


class TrioRunner:
    """System tasks of one trio run."""

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

"""Cancelling something at each of its awaits."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from typing import Any

from http1_kit import PATIENCE


class Counted:
    """Awaits a coroutine and calls `then` with what it waits for when it suspends for the `at`-th time."""

    def __init__(self, work: Awaitable[Any], at: int, then: Callable[[Any], object]) -> None:
        self._work = work
        self._at = at
        self._then = then

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self._work.__await__()
        resume: Callable[[], Any] = partial(inner.send, None)
        for count in itertools.count(1):
            try:
                asked = resume()
            except StopIteration as done:
                return done.value
            if count == self._at:
                self._then(asked)
            try:
                answer = yield asked
            except BaseException as exc:
                resume = partial(inner.throw, exc)
            else:
                resume = partial(inner.send, answer)
        raise AssertionError("unreachable")


async def cancelled_at(work: Callable[[], Awaitable[Any]], at: int, *, late: bool = False) -> bool:
    """Run `work` and cancel it at its `at`-th suspension; answers whether it got that far.

    `late`: when what it waits for has come, but before it runs: the cancellation then takes the place of the result.
    """
    reached = False

    def cut(asked: Any) -> None:
        nonlocal reached
        reached = True
        if late and asked is not None:
            asked.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()

    async def run() -> None:
        await Counted(work(), at, cut)

    task = asyncio.create_task(run())
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()
    return reached


async def every_await(
    work: Callable[[], Awaitable[Any]], check: Callable[[], Awaitable[object]], *, late: bool = False
) -> int:
    """Cancel at the first await, the second, ... until it is over before; answers how many there were."""
    for at in itertools.count(1):
        reached = await cancelled_at(work, at, late=late)
        await check()
        if not reached:
            return at - 1
    raise AssertionError("unreachable")

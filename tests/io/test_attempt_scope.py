"""The attempt scope of the asyncio runner: deadlines on a shared timer, early ends, other people's cancellations."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from pathlb.runner import AsyncioRunner, AttemptScope

pytestmark = pytest.mark.asyncio


def runner() -> AsyncioRunner:
    return AsyncioRunner(asyncio.get_running_loop())


async def hang(scope: AttemptScope) -> None:
    """Wait for ever: only the scope ends it (or the test's own timeout fails it)."""
    with scope:
        await asyncio.Event().wait()


async def hang_and_note(scope: AttemptScope, order: list[AttemptScope]) -> None:
    await hang(scope)
    order.append(scope)


def own_cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_ends_at_its_deadline_and_leaves_the_task_uncancelled() -> None:
    scope = runner().scope(0.01)
    await hang(scope)
    assert scope.cut
    assert own_cancellations() == 0
    await asyncio.sleep(0)  # and nothing is still to come


async def test_not_cut_when_it_ends_in_time() -> None:
    one = runner()
    scope = one.scope(0.01)
    with scope:
        await asyncio.sleep(0)
    await hang(one.scope(0.02))  # by now the first deadline has passed
    assert not scope.cut


@pytest.mark.parametrize("seconds", [0.0, -1.0])
async def test_a_deadline_in_the_past_ends_it_at_the_first_wait(seconds: float) -> None:
    scope = runner().scope(seconds)
    await hang(scope)
    assert scope.cut


async def test_mixed_deadlines_end_in_their_order() -> None:
    """Also one that comes before the deadline the shared timer waits for."""
    one = runner()
    scopes = [one.scope(seconds) for seconds in (0.09, 0.03, 30.0, 0.06)]
    order: list[AttemptScope] = []
    tasks = [asyncio.create_task(hang_and_note(scope, order)) for scope in scopes]
    await asyncio.wait([tasks[0], tasks[1], tasks[3]])
    assert order == [scopes[1], scopes[3], scopes[0]]
    assert not scopes[2].cut
    tasks[2].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[2]


async def test_thousands_that_pass_one_by_one() -> None:
    one = runner()
    scopes = [one.scope(0.05 + index / 100_000) for index in range(3000)]
    await asyncio.gather(*(hang(scope) for scope in scopes))
    assert all(scope.cut for scope in scopes)


async def test_cancelled_from_elsewhere() -> None:
    scope = runner().scope(1000.0)
    asyncio.get_running_loop().call_soon(scope.cancel)
    await hang(scope)
    assert scope.cut
    assert own_cancellations() == 0


async def test_cancelled_before_it_is_entered_and_after_it_was_left() -> None:
    early, late = runner().scope(1000.0), runner().scope(1000.0)
    early.cancel()
    await hang(early)
    assert early.cut
    with late:
        await asyncio.sleep(0)
    late.cancel()
    await asyncio.sleep(0)
    assert not late.cut


async def test_cancelled_within_its_own_task() -> None:
    scope = runner().scope(1000.0)
    with scope:
        scope.cancel()  # no wait follows: nothing to end
    await asyncio.sleep(0)
    assert not scope.cut
    with (again := runner().scope(1000.0)):
        again.cancel()
        await asyncio.Event().wait()
    assert again.cut


async def test_the_callers_cancellation_wins_and_goes_on() -> None:
    scope = runner().scope(1000.0)
    task = asyncio.create_task(hang(scope))
    await asyncio.sleep(0)
    scope.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_under_asyncio_timeout() -> None:
    scope = runner().scope(1000.0)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await hang(scope)
    assert not scope.cut


async def test_does_not_strike_into_the_clean_up_of_a_cancellation() -> None:
    """anyio knows its own cancellation by the message; one of ours on top would leave its scope as a stray one."""
    cleaned = False
    with anyio.CancelScope() as outer:
        with runner().scope(1000.0) as scope:
            asyncio.get_running_loop().call_soon(outer.cancel)
            try:
                await asyncio.Event().wait()
            finally:
                try:
                    raise GeneratorExit  # as a transport's generators do: it hides what came before
                except GeneratorExit:
                    with anyio.CancelScope(shield=True):
                        scope.cancel()
                        await anyio.sleep(0.02)
                        cleaned = True
    assert cleaned
    assert outer.cancelled_caught
    assert not scope.cut
    assert own_cancellations() == 0


async def test_strikes_once_a_cancellation_of_somebody_else_has_ended_inside() -> None:
    with runner().scope(1000.0) as scope:
        with anyio.CancelScope() as inner:
            asyncio.get_running_loop().call_soon(inner.cancel)
            try:
                await asyncio.Event().wait()
            finally:
                with anyio.CancelScope(shield=True):
                    scope.cancel()
                    await anyio.sleep(0.02)
        await asyncio.Event().wait()
    assert inner.cancelled_caught
    assert scope.cut
    assert own_cancellations() == 0


async def test_closing_the_runner_leaves_no_timer() -> None:
    one = runner()
    with one.scope(1000.0):
        await asyncio.sleep(0)
    await one.aclose()
    assert one._deadlines._timer is None or one._deadlines._timer.cancelled()

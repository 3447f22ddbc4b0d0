"""The queue's accounting."""

from __future__ import annotations

import pytest

from pathlb.core.admission import Waiter, WaitQueue
from pathlb.core.errors import IllegalEvent
from pathlb.core.lease import Want

from .helpers import recorder, unset


def waiter(**wants: object) -> Waiter[str]:
    return Waiter(Want(**wants), 0.0, unset)  # type: ignore[arg-type]


def test_order_of_arrival() -> None:
    queue: WaitQueue[str] = WaitQueue(3)
    waiters = [waiter() for _ in range(3)]
    for one in waiters:
        queue.push(one)
    assert list(queue) == waiters
    assert (queue.depth, queue.full) == (3, True)


def test_a_full_queue_takes_nobody() -> None:
    queue: WaitQueue[str] = WaitQueue(0)
    assert queue.full
    with pytest.raises(IllegalEvent, match="full"):
        queue.push(waiter())


def test_a_grant_is_handed_over_once() -> None:
    calls, settle = recorder()
    one: Waiter[str] = Waiter(Want(), 0.0, settle)
    queue: WaitQueue[str] = WaitQueue(1)
    queue.push(one)
    queue.serve(one, "lease")
    queue.trim()
    assert (one.grant, one.waiting, calls, queue.depth) == ("lease", False, [1], 0)
    with pytest.raises(IllegalEvent, match="no longer waits"):
        one.settle("again")
    assert not queue.leave(one)
    assert queue.depth == 0


def test_leaving_wakes_nobody_and_makes_room() -> None:
    calls, settle = recorder()
    one: Waiter[str] = Waiter(Want(), 0.0, settle)
    queue: WaitQueue[str] = WaitQueue(1)
    queue.push(one)
    assert queue.leave(one)
    assert not queue.leave(one)
    assert calls == []
    assert not queue.full
    assert list(queue) == []


def test_serving_while_iterating() -> None:
    queue: WaitQueue[str] = WaitQueue(10)
    waiters = [waiter() for _ in range(4)]
    for one in waiters:
        queue.push(one)
    for number, one in enumerate(queue):
        if number % 2:
            queue.serve(one, "lease")
    queue.trim()
    assert list(queue) == [waiters[0], waiters[2]]


def test_those_who_gave_up_are_dropped() -> None:
    queue: WaitQueue[str] = WaitQueue(10_000)
    first = waiter()
    queue.push(first)
    for _ in range(1000):
        one = waiter()
        queue.push(one)
        queue.leave(one)
    assert len(queue._waiters) <= 2 * 1 + 16
    assert list(queue) == [first]
    queue.leave(first)
    assert len(queue._waiters) == 0


def test_counts_those_with_special_wishes() -> None:
    queue: WaitQueue[str] = WaitQueue(10)
    pinned, keyed, plain = waiter(pin="http://gw0"), waiter(key="eth"), waiter()
    for one in (pinned, keyed, plain):
        queue.push(one)
    assert queue.special == 2
    queue.leave(pinned)
    queue.serve(keyed, "lease")
    assert queue.special == 0
    assert queue.depth == 1

"""Events: built only while somebody listens, delivered in order."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest

from pathlb.core import events
from pathlb.core.events import Event, Outbox, Released

from .helpers import BUSY, Rig


def released(number: int) -> Released:
    return Released(0.0, "http://gw", number)


def test_nothing_is_kept_for_nobody() -> None:
    outbox = Outbox()
    outbox.add(released(1))
    seen: list[Event] = []
    outbox.subscribe(seen.append)
    outbox.flush()
    assert seen == []


def test_every_listener_gets_every_event_in_order() -> None:
    outbox = Outbox()
    one: list[Event] = []
    other: list[Event] = []
    outbox.subscribe(one.append)
    outbox.subscribe(other.append)
    for number in range(3):
        outbox.add(released(number))
    assert one == []
    outbox.flush()
    assert one == other == [released(0), released(1), released(2)]


def test_unsubscribing() -> None:
    outbox = Outbox()
    seen: list[Event] = []
    first, second = outbox.subscribe(seen.append), outbox.subscribe(lambda event: None)
    second()
    second()
    outbox.add(released(1))
    outbox.flush()
    first()
    outbox.add(released(2))
    outbox.flush()
    assert seen == [released(1)]
    assert outbox.listeners == ()


def test_events_made_by_a_listener_come_after_those_before_them_for_everybody() -> None:
    outbox = Outbox()
    seen: list[Event] = []

    def meddle(event: Event) -> None:
        if event == released(0):
            outbox.add(released(10))
            outbox.flush()

    outbox.subscribe(meddle)
    outbox.subscribe(seen.append)
    outbox.add(released(0))
    outbox.add(released(1))
    outbox.flush()
    assert seen == [released(0), released(1), released(10)]


def test_a_listener_that_raises_does_not_end_delivery_for_ever() -> None:
    outbox = Outbox()
    seen: list[Event] = []

    def fail(event: Event) -> None:
        raise RuntimeError("listener")

    unsubscribe = outbox.subscribe(fail)
    outbox.add(released(0))
    with pytest.raises(RuntimeError, match="listener"):
        outbox.flush()
    unsubscribe()
    outbox.subscribe(seen.append)
    outbox.add(released(1))
    outbox.flush()
    assert seen == [released(1)]


@pytest.mark.parametrize("kind", get_args(Event))
def test_events_are_frozen_records_with_a_time(kind: type[Event]) -> None:
    fields = [field.name for field in dataclasses.fields(kind)]
    assert fields[0] == "at"
    event = kind(*range(len(fields)))  # type: ignore[arg-type]
    with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
        event.at = 5.0  # type: ignore[misc]
    assert kind.__name__ in dir(events)


def test_the_events_of_one_request() -> None:
    rig = Rig(1)
    rig.events.clear()
    lease = rig.lease(1.0)
    rig.engine.observe(1.25, lease, BUSY)
    rig.engine.release(1.5, lease)
    assert rig.events[:1] == [events.Picked(1.0, "http://gw0", "only candidate", 0, 1)]
    assert events.Observed(1.25, "http://gw0", BUSY, 0.25) in rig.events
    assert rig.events[-1] == events.Released(1.5, "http://gw0", 0)


def test_the_end_of_a_request_is_told() -> None:
    rig = Rig(1)
    rig.engine.finish(2.0, 3, 7)
    assert rig.events[-1] == events.Finished(2.0, attempts=3, relays=7)
    rig.engine._outbox.listeners = ()
    rig.engine.finish(3.0, 1, 0)
    assert not rig.engine._outbox._events


def test_a_listener_may_use_the_engine() -> None:
    rig = Rig(1)
    depths: list[int] = []

    def look(event: Event) -> None:
        depths.append(rig.engine.snapshot(event.at, lambda url: "").in_flight)

    rig.engine.subscribe(look)
    rig.request(1.0)
    assert depths == [1, 1, 0]

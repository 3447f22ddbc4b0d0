"""A fleet of five at moderate load, one of them going bad mid-run: no idempotent request is lost."""

from __future__ import annotations

from collections import Counter

import anyio
import pytest
from faultkit import PATIENCE, Events, Stack, at_rest, nothing_left, open_connections, until

from pathlb.core.events import BreakerChanged, Ejected, Observed, Picked
from pathlb.core.model import Cause
from pathlb.testing import Fleet, Mode, ServiceTime

pytestmark = pytest.mark.anyio

FAULTS = {
    "killed": {"mode": Mode.REFUSE},
    "hung": {"mode": Mode.HANG},
    "resetting": {"mode": Mode.RESET},
    "failing fast": {"mode": Mode.FAIL, "status": 503},
    "10x slower": {"mode": Mode.SLOW, "factor": 10.0},
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_one_of_five(stack: Stack, fault: str) -> None:
    with Fleet(5, service_time=ServiceTime.constant(0.01)) as fleet:
        bad = fleet.urls[2]
        async with nothing_left():
            async with stack.client(fleet.urls, connect=5.0, read=PATIENCE, deadline=PATIENCE) as client:
                events = Events(client.balancer)
                results: Counter[int | str] = Counter()
                stop = False

                async def worker() -> None:
                    while not stop:
                        try:
                            response = await client.get("/")
                            results[response.status_code] += 1
                        except stack.lib.HTTPError as exc:
                            results[repr(exc)] += 1
                        await anyio.sleep(0.01)

                def out() -> bool:
                    """It gets nothing any more, for one reason or the other."""
                    opened = [one for one in events.of(BreakerChanged, endpoint=bad) if one.after == "open"]
                    return bool(opened or events.of(Ejected, endpoint=bad))

                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as group:
                        for _ in range(8):
                            group.start_soon(worker)
                        await until(lambda: sum(results.values()) >= 100)
                        assert not out()
                        began = len(events)
                        fleet[2].set_mode(**FAULTS[fault])
                        await until(out)
                        before = sum(results.values())
                        await until(lambda: sum(results.values()) >= before + 150)
                        stop = True
                assert set(results) == {200}
                others = [one.endpoint for one in events.of(Ejected, BreakerChanged) if one.endpoint != bad]
                assert others == []
                await at_rest(client.balancer)
                assert open_connections(client) == []
                if fault == "failing fast":
                    _share_stays_small(events, bad, began)


def _share_stays_small(events: Events, bad: str, began: int) -> None:
    """From its first failures on it gets probes alone."""
    failures = open_since = 0
    in_flight = [0]
    for event in list(events)[began:]:
        if getattr(event, "endpoint", None) != bad:
            continue
        if isinstance(event, Picked):
            if open_since:
                assert event.reason == "probe", event
            in_flight.append(event.in_flight + 1)
        elif isinstance(event, Observed):
            failures += event.outcome.cause is Cause.INSTANCE
        elif isinstance(event, BreakerChanged | Ejected):
            open_since += 1
    # Five failures open the breaker; besides there is what was in flight then, and the odd probe.
    assert open_since
    assert failures <= 5 + max(in_flight) + 3

"""Snapshots: frozen, plain, complete."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from pathlb.core.cluster import Settings
from pathlb.core.config import Breaker
from pathlb.core.engine import Engine
from pathlb.core.model import Cause, Endpoint, Outcome
from pathlb.core.policy import RoundRobin
from pathlb.core.snapshot import EndpointSnapshot, Snapshot

from .helpers import BROKEN, BUSY, CANCELLED, Rig


def snap(engine: Engine, now: float) -> Snapshot:
    return engine.snapshot(now, lambda url: f"upstream of {url}")


def of(rig: Rig, now: float, number: int) -> EndpointSnapshot:
    return next(one for one in snap(rig.engine, now).endpoints if one.url == f"http://gw{number}")


def test_a_fresh_balancer() -> None:
    rig = Rig(2, policy=RoundRobin())
    snapshot = snap(rig.engine, 0.0)
    assert (snapshot.policy, snapshot.in_flight, snapshot.queued, snapshot.panic) == ("round robin", 0, 0, False)
    assert snapshot.retry_budget == 10.0
    first = snapshot.endpoints[0]
    assert (first.url, first.state, first.weight, first.latency) == ("http://gw0", "ready", 1.0, None)
    assert (first.health, first.ejected_for, first.upstream) == ("up", None, "upstream of http://gw0")
    assert (first.breaker.state, first.breaker.reopens_in, first.breakers) == ("closed", None, {})
    assert set(first.counts.values()) == {0}


def test_counts_load_and_breakers() -> None:
    rig = Rig([Endpoint("http://gw0", metadata={"zone": "a"}), Endpoint("http://gw1")])
    rig.request(0.0, pin="http://gw0", seconds=0.25)
    rig.request(0.0, CANCELLED, pin="http://gw0")
    rig.request(0.0, BUSY, pin="http://gw0")
    rig.fail(1, 1.0, 5)
    rig.lease(1.0, pin="http://gw0")
    first, second = of(rig, 1.0, 0), of(rig, 1.0, 1)
    assert first.counts == {
        "picks": 4, "ok": 1, "failed": 0, "overloaded": 1, "ignored": 1, "broken": 0, "released": 3, "ejections": 0,
        "breaker_opens": 0,
    }  # fmt: skip
    assert (first.in_flight, first.latency, first.metadata) == (1, 0.25, {"zone": "a"})
    assert (second.state, second.breaker.state) == ("breaker open", "open")
    assert second.breaker.consecutive_failures == 5
    assert second.breaker.reopens_in is not None
    assert 0.8 <= second.breaker.reopens_in <= 1.0
    assert (second.counts["failed"], second.counts["breaker_opens"]) == (5, 1)
    assert snap(rig.engine, 1.0).in_flight == 1


def test_a_breaker_that_never_reopens() -> None:
    rig = Rig(2, Settings(breaker=Breaker(failures=1, open_for=float("inf"), open_max=float("inf"))))
    rig.fail(0, 1.0, 1)
    assert (of(rig, 2.0, 0).breaker.state, of(rig, 2.0, 0).breaker.reopens_in) == ("open", None)


def test_time_is_taken_into_account() -> None:
    rig = Rig(2)
    rig.fail(0, 1.0, 5)
    assert of(rig, 1.0, 0).breaker.state == "open"
    assert of(rig, 3.0, 0).breaker.state == "half-open"


def test_breakers_of_keys_are_shown_while_they_are_not_closed() -> None:
    rig = Rig(2)
    fault = Outcome(Cause.SERVICE, retry=True, status=500, key="eth")
    for _ in range(4):
        rig.request(0.0, fault, pin="http://gw0", key="eth")
    assert of(rig, 0.0, 0).breakers == {}
    rig.request(0.0, fault, pin="http://gw0", key="eth")
    first = of(rig, 0.0, 0)
    assert {key: one.state for key, one in first.breakers.items()} == {"eth": "open"}
    assert (first.state, first.breaker.state) == ("ready", "closed")


def test_removed_endpoints_are_shown_while_they_have_requests() -> None:
    rig = Rig(2)
    lease = rig.lease(0.0, pin="http://gw1")
    rig.engine.apply(1.0, [Endpoint("http://gw0")])
    snapshot = snap(rig.engine, 1.0)
    assert [(one.url, one.state, one.in_flight) for one in snapshot.endpoints] == [
        ("http://gw0", "ready", 0),
        ("http://gw1", "removed", 1),
    ]
    rig.finish(2.0, lease)
    assert len(snap(rig.engine, 2.0).endpoints) == 1


def test_frozen_and_json_able() -> None:
    rig = Rig(2)
    rig.fail(0, 0.0, 5)
    rig.state(1).ejection.until = 7.0
    snapshot = snap(rig.engine, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.queued = 5  # type: ignore[misc]
    plain: Any = json.loads(json.dumps(snapshot.to_dict(), allow_nan=False))
    assert plain["endpoints"][0]["breaker"]["state"] == "open"
    assert plain["endpoints"][1]["ejected_for"] == 6.5
    assert plain == snapshot.to_dict() | {"endpoints": plain["endpoints"]}


def test_a_snapshot_does_not_change_afterwards() -> None:
    rig = Rig(1)
    before = snap(rig.engine, 0.0)
    rig.request(0.0, BROKEN)
    assert before.endpoints[0].counts["picks"] == 0

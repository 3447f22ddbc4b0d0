"""Block heights: who lags is passed over, as long as enough others are there and the figures are fresh."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pathlb.core import events
from pathlb.core.cluster import Settings
from pathlb.core.config import BlockHeight, Limits, Panic
from pathlb.core.eligibility import survey
from pathlb.core.endpoints import EndpointState
from pathlb.core.model import Cause, Outcome

from .helpers import BUSY, Rig
from .test_eligibility import make, scope
from .test_snapshot import of


def told(rig: Rig, now: float, *heights: int | None, key: str | None = "eth") -> None:
    """Each endpoint tells its height; None says nothing."""
    for number, height in enumerate(heights):
        if height is not None:
            rig.engine.record_height(now, f"http://gw{number}", key, height)


def rig_with(count: int = 4, limits: Limits | None = None, **heights: Any) -> Rig:
    return Rig(count, Settings(block_height=BlockHeight(**heights), limits=limits or Limits()))


def picked(rig: Rig, now: float = 0.0, key: str | None = "eth", times: int = 40) -> set[int]:
    return {int(rig.request(now, key=key).url[-1]) for _ in range(times)}


def test_laggards_are_passed_over() -> None:
    rig = rig_with()
    told(rig, 0.0, 100, 97, 96, 100)
    assert picked(rig) == {0, 1, 3}
    assert picked(rig, key="btc") == picked(rig, key=None) == {0, 1, 2, 3}
    told(rig, 1.0, 101, 100, 100)
    assert picked(rig, 1.0) == {0, 1, 2, 3}
    told(rig, 2.0, None, None, None, 99)  # a block taken back
    assert picked(rig, 2.0) == {0, 1, 2, 3}


def test_a_laggard_is_used_when_nothing_else_is() -> None:
    rig = rig_with(3, Limits(concurrency=1), min_endpoints=1)
    told(rig, 0.0, 100, 50, 50)
    first = rig.lease(0.0, key="eth")
    assert (first.endpoint, first.reason, first.panic) == (rig.state(0), "only candidate", False)
    assert rig.lease(0.0, key="eth").endpoint is not rig.state(0)  # the only one up to date is full
    rig = rig_with(2, min_endpoints=1)
    told(rig, 0.0, 100, 50)
    rig.fail(0, 0.0, 5)
    lease = rig.lease(0.0, key="eth")
    assert (lease.endpoint, lease.reason, lease.panic) == (rig.state(1), "only candidate", False)
    assert rig.seen(events.PanicChanged) == []


def test_a_retry_goes_to_a_laggard_before_it_goes_back() -> None:
    rig = rig_with(2, min_endpoints=1)
    told(rig, 0.0, 100, 50)
    first = rig.lease(0.0, key="eth", resendable=True)
    rig.finish(0.0, first, Outcome(Cause.BEYOND, retry=True))
    first.want.failed_on(first.endpoint)
    assert rig.lease(0.0, first.want).endpoint is rig.state(1)


def test_enough_are_left_however_far_behind() -> None:
    rig = rig_with(5)
    told(rig, 0.0, 100, 10, 30, 20, 40)
    assert picked(rig) == {0, 4}
    rig = rig_with(5, min_endpoints=4)
    told(rig, 0.0, 100, 10, 30, 20, 40)
    assert picked(rig) == {0, 2, 3, 4}
    rig = rig_with(2)
    told(rig, 0.0, 100, 10)
    assert picked(rig) == {0, 1}


def test_the_ones_that_are_out_are_not_enough() -> None:
    rig = rig_with(4)
    told(rig, 0.0, 100, 100, 50, 60)
    rig.fail(1, 0.0, 5)
    assert picked(rig) == {0, 3}


def test_one_absurd_height_leaves_enough() -> None:
    rig = rig_with(5)
    told(rig, 0.0, 10**30, 100, 100, 99, 100)
    assert len(picked(rig)) == 2
    assert 0 in picked(rig)


def test_what_is_not_known_holds_nobody_back() -> None:
    rig = rig_with(4, min_endpoints=1)
    told(rig, 0.0, 100, None, 50)
    assert picked(rig) == {0, 1, 3}


def test_equal_heights_hold_nobody_back() -> None:
    rig = rig_with(4, lag=0, min_endpoints=1)
    told(rig, 0.0, 7, 7, 7, 7)
    assert picked(rig) == {0, 1, 2, 3}
    told(rig, 0.0, 0, 0, 0, 0)
    assert picked(rig) == {0, 1, 2, 3}
    told(rig, 0.0, 1)
    assert picked(rig) == {0}


def test_heights_age_by_time_alone() -> None:
    rig = rig_with(3, max_age=10.0)
    assert picked(rig) == {0, 1, 2}
    told(rig, 0.0, 100, 50, 100)
    told(rig, 4.0, 100, None, 100)
    assert picked(rig, 9.9) == {0, 2}
    assert of(rig, 9.9, 1).heights == {"eth": 50}
    assert picked(rig, 10.0) == {0, 1, 2}
    assert of(rig, 10.0, 1).heights == {}
    assert [of(rig, 10.0, number).heights for number in (0, 2)] == [{"eth": 100}] * 2
    told(rig, 14.0, None, 100)
    assert [of(rig, 14.0, number).heights for number in range(3)] == [{}, {"eth": 100}, {}]


def test_a_height_told_again_is_fresh_again() -> None:
    rig = rig_with(3, max_age=10.0)
    for now in (0.0, 6.0, 12.0, 18.0):
        told(rig, now, 100, 50, 100)
        assert picked(rig, now + 5.9) == {0, 2}
    assert picked(rig, 27.9) == {0, 2}
    assert picked(rig, 28.0) == {0, 1, 2}


def test_heights_without_a_key() -> None:
    """One service, so nobody names it."""
    rig = rig_with(3, max_age=10.0)
    told(rig, 0.0, 100, 50, 100, key=None)
    assert picked(rig, key=None) == {0, 2}
    assert picked(rig, 10.0, key=None) == {0, 1, 2}


def test_nobody_asks_without_the_setting() -> None:
    rig = Rig(3)
    told(rig, 0.0, 100, 50, 100)
    assert picked(rig) == {0, 1, 2}
    assert [of(rig, 0.0, number).heights for number in range(3)] == [{}, {}, {}]


def test_heights_of_an_endpoint_that_left_are_ignored() -> None:
    rig = rig_with(2)
    rig.engine.record_height(0.0, "http://gone", "eth", 5)
    assert picked(rig) == {0, 1}


def test_a_laggard_before_one_that_is_throttled() -> None:
    """Behind is who is behind those that may be asked."""
    rig = rig_with(3, min_endpoints=1)
    told(rig, 0.0, 100, 50, 100)
    rig.request(0.0, BUSY, pin="http://gw2")
    assert picked(rig) == {0}
    rig.engine.drain(0.0, "http://gw0")
    assert picked(rig) == {1}


def state_at(number: int, height: int | None) -> EndpointState:
    state = make(number)
    state.scopes["eth"] = scope()
    state.scopes["eth"].height = height
    return state


@given(
    heights=st.lists(st.none() | st.integers(0, 20) | st.just(10**18), min_size=1, max_size=8),
    lag=st.integers(0, 5),
    least=st.integers(1, 4),
)
def test_who_is_behind(heights: list[int | None], lag: int, least: int) -> None:
    states = [state_at(number, height) for number, height in enumerate(heights)]
    view = survey(states, Panic(), "eth", BlockHeight(lag=lag, min_endpoints=least))
    assert not view.panic
    assert sorted([*view.ready, *view.reserve], key=states.index) == states
    assert len(view.ready) >= min(least, len(states))
    known = [height for height in heights if height is not None]
    kept = [height for state in view.ready if (height := state.scopes["eth"].height) is not None]
    for state in view.reserve:
        height = state.scopes["eth"].height
        assert height is not None
        assert max(known) - height > lag
        assert all(height <= other for other in kept)
    behind = sum(max(known) - height > lag for height in known) if known else 0
    assert len(view.reserve) == min(behind, max(0, len(states) - least))
    assert survey(states, Panic(), "btc", BlockHeight()).reserve == ()

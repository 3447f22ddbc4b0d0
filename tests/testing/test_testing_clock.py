from __future__ import annotations

import pytest

from pathlb.core.model import Clock
from pathlb.testing import FakeClock


def test_stands_still_until_advanced() -> None:
    clock: Clock = (fake := FakeClock(100.0))
    assert (clock(), clock()) == (100.0, 100.0)
    fake.advance(2.5)
    assert clock() == 102.5


@pytest.mark.parametrize("seconds", [-0.1, float("nan")])
def test_refuses_to_go_back(seconds: float) -> None:
    clock = FakeClock()
    with pytest.raises(ValueError, match="cannot advance"):
        clock.advance(seconds)
    assert clock() == 0.0

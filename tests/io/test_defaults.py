"""What applies when nothing is said."""

from __future__ import annotations

import pytest
from io_helpers import Stack, scripted

import pathlb
from pathlb.testing import ScriptedUpstream

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def patience() -> None:
    """The real defaults here, not the other tests' longer ones."""


async def test_timeouts_of_an_attempt(stack: Stack) -> None:
    upstream = ScriptedUpstream()
    async with scripted(upstream) as balancer, stack.pathlb.AsyncClient(balancer) as client:
        await client.get("/")
    ((request, _),) = upstream.calls
    assert request.timeouts == (0.5, 15.0, 15.0, None)
    assert request.deadline is None


async def test_the_rest() -> None:
    assert pathlb.config.DEADLINE == 30
    async with scripted(ScriptedUpstream()) as balancer:
        snapshot = balancer.snapshot()
    assert snapshot.policy == pathlb.LeastConnections().name
    assert pathlb.Retry().statuses == {429, 500, 502, 503, 504}
    assert pathlb.Retry().attempts is None
    assert pathlb.Panic() == pathlb.Panic(threshold=0, fail_closed=False)

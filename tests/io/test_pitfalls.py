"""The pitfalls of other balancers that only show with connections; the rest is in tests/core/test_pitfalls.py.

Pitfall 11 (stale keep-alive) is in tests/faults/test_fault_table.py.
"""

from __future__ import annotations

import pytest
from io_helpers import Stack

from pathlb import SlowStart
from pathlb.testing import Fleet, ServiceTime

pytestmark = pytest.mark.anyio


async def test_pitfall_10_scale_up_is_not_seen_until_a_disconnect(stack: Stack) -> None:
    """ "DNS scale-up unseen until a disconnect": an endpoint that joins gets requests while all connections live on."""
    with Fleet(3, service_time=ServiceTime.constant(0)) as fleet:
        async with stack.pathlb.AsyncClient(fleet.urls[:2], slow_start=SlowStart(window=0)) as client:
            for _ in range(20):
                assert (await client.get("/")).status_code == 200
            connected = [gateway.stats().connections for gateway in fleet]
            client.balancer.update(fleet.urls)
            for _ in range(60):
                assert (await client.get("/")).status_code == 200
            assert [gateway.stats().connections for gateway in fleet][:2] == connected[:2]
            assert fleet[2].stats().requests > 5

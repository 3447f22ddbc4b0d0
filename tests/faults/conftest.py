"""What the fault tests share: both async libraries, both HTTP stacks, and two healthy gateways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from faultkit import STACKS, Stack

from pathlb.testing import Fleet, ServiceTime


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(STACKS))
def stack(request: pytest.FixtureRequest) -> Stack:
    return STACKS[request.param]


@pytest.fixture(scope="module")
def healthy() -> Iterator[Fleet]:
    """Two gateways that answer at once."""
    with Fleet(2, service_time=ServiceTime.constant(0)) as fleet:
        yield fleet

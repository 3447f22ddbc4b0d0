from __future__ import annotations

from collections.abc import Iterator

import pytest
from web3_chain import Chain

from pathlb.testing import Fleet, ServiceTime


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def fleet(chain: Chain) -> Iterator[Fleet]:
    """Five PATH gateways in front of one chain."""
    with Fleet(5, path=["eth"], answer=chain.answer, service_time=ServiceTime.constant(0), record=True) as fleet:
        yield fleet

from __future__ import annotations

from collections.abc import Iterator

import httpx
import httpx2
import pytest
import trustme
from io_helpers import Stack

import pathlb
import pathlb.adapters.httpx
import pathlb.adapters.httpx2
import pathlb.httpx2
from pathlb.testing import Fleet, ServiceTime

STACKS = {
    "httpx": Stack(httpx, pathlb, pathlb.adapters.httpx),
    "httpx2": Stack(httpx2, pathlb.httpx2, pathlb.adapters.httpx2),
}


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["httpx", "httpx2"])
def stack(request: pytest.FixtureRequest) -> Stack:
    return STACKS[request.param]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second for a connect is a lot for a gateway and little for a test machine that is busy elsewhere."""
    for one in STACKS.values():
        defaults = one.pathlb.AsyncClient.__init__.__kwdefaults__
        monkeypatch.setitem(defaults, "timeout", one.http.Timeout(15.0, pool=None))


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    with Fleet(3, service_time=ServiceTime.constant(0), record=True) as fleet:
        yield fleet


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()

"""The HTTP/1.1 pool is asyncio's own; on trio it does not exist."""

from __future__ import annotations

import pytest


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

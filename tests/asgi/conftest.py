from __future__ import annotations

from collections.abc import Iterator

import pytest
from rules_kit import KINDS, Front, serving


@pytest.fixture(scope="session", params=KINDS)
def front(request: pytest.FixtureRequest) -> Iterator[Front]:
    """One server of each kind, for the whole session."""
    with serving(request.param) as front:
        yield front

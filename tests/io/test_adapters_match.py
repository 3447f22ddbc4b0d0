"""The two adapters are one text: whatever is fixed in one is fixed in the other."""

from __future__ import annotations

import inspect
from pathlib import Path

import httpx
import httpx2
import pytest

import pathlb
import pathlb.adapters.httpx
import pathlb.adapters.httpx2
import pathlb.httpx2

_ADAPTERS = Path(pathlb.adapters.httpx.__file__).parents[1]


def _second(text: str) -> str:
    return text.replace("httpx", "httpx2").replace("httpcore", "httpcore2")


def test_the_httpx2_adapter_is_the_httpx_one_by_another_name() -> None:
    texts = {path.name: _second(path.read_text()) for path in (_ADAPTERS / "httpx").glob("*.py")}
    assert len(texts) > 3
    assert {path.name: path.read_text() for path in (_ADAPTERS / "httpx2").glob("*.py")} == texts


def test_the_public_names_are_the_adapters() -> None:
    assert pathlb.AsyncClient is pathlb.adapters.httpx.AsyncClient
    assert pathlb.httpx2.AsyncClient is pathlb.adapters.httpx2.AsyncClient
    assert pathlb.httpx2.BalancedTransport is pathlb.adapters.httpx2.BalancedTransport
    assert all(hasattr(pathlb, name) for name in pathlb.__all__)
    assert all(hasattr(pathlb.httpx2, name) for name in pathlb.httpx2.__all__)


@pytest.mark.parametrize(
    ("own", "library"),
    [(pathlb.AsyncClient, httpx.AsyncClient), (pathlb.httpx2.AsyncClient, httpx2.AsyncClient)],
    ids=["httpx", "httpx2"],
)
def test_every_argument_of_the_librarys_client_is_taken_or_refused_by_name(own: type, library: type) -> None:
    """A new one upstream must be decided about here, not end in **options."""
    theirs = set(inspect.signature(library).parameters)
    ours = set(inspect.signature(own).parameters)
    assert theirs - ours == {"limits"}, "pathlb.Limits, one of the balancer's options"


def test_an_error_class_has_the_same_bases_on_both_stacks() -> None:
    first, second = pathlb.adapters.httpx, pathlb.adapters.httpx2
    classes = [name for name, one in vars(first).items() if isinstance(one, type)]
    assert "DeadlineExceeded" in classes
    for name in classes:
        assert [base.__name__ for base in getattr(first, name).__mro__] == [
            base.__name__ for base in getattr(second, name).__mro__
        ]

"""Settings that cannot work are refused when they are built."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from pathlb.core.errors import ConfigError
from pathlb.jsonrpc import JSONRPC, Safety


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"methods": ["eth_call"]}, "JSONRPC.methods"),
        ({"methods": {"": Safety.READ}}, "JSONRPC.methods"),
        ({"methods": {"eth_*Filter": Safety.READ}}, "JSONRPC.methods"),
        ({"methods": {1: Safety.READ}}, "JSONRPC.methods"),
        ({"methods": {"eth_call": "read"}}, "JSONRPC.methods['eth_call']"),
        ({"sticky_filters": 1}, "JSONRPC.sticky_filters"),
        ({"resend_transactions": None}, "JSONRPC.resend_transactions"),
        ({"split": 0}, "JSONRPC.split"),
        ({"split": 1.5}, "JSONRPC.split"),
        ({"split": True}, "JSONRPC.split"),
        ({"max_batch": 0}, "JSONRPC.max_batch"),
        ({"max_body": "1 MB"}, "JSONRPC.max_body"),
        ({"split": 101, "max_batch": 100}, "JSONRPC.split"),
    ],
)
def test_what_cannot_work(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        JSONRPC(**settings)
    assert caught.value.field == field


def test_the_table_is_the_callers_at_the_time() -> None:
    mine = {"x_*": Safety.READ}
    config = JSONRPC(mine)
    mine["y_*"] = Safety.READ
    assert dict(config.methods) == {"x_*": Safety.READ}
    assert config == JSONRPC({"x_*": Safety.READ})
    assert hash(config) == hash(JSONRPC())


def test_bodies_are_looked_into_only_if_something_asks_for_it() -> None:
    assert not JSONRPC({"x_*": Safety.READ}).needs_body
    options: list[dict[str, Any]] = [
        {"sticky_filters": True},
        {"split": 1},
        {"max_batch": 1},
        {"max_body": 1},
        {"resend_transactions": True},
    ]
    assert all(JSONRPC(**one).needs_body for one in options)


def test_resending_transactions_needs_keccak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eth_hash.auto", None)
    with pytest.raises(ConfigError, match=r"pip install 'pathlb\[web3\]'"):
        JSONRPC(resend_transactions=True)
    JSONRPC()

"""Which methods may be sent twice, and which bodies."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jsonrpc_helpers import FUZZ, call

from pathlb.jsonrpc import DEFAULT_METHODS, MethodRules, Safety
from pathlb.jsonrpc.methods import _TABLE

RULES = MethodRules({})


class TestTable:
    @pytest.mark.parametrize(
        "method",
        [
            *("eth_blockNumber", "eth_call", "eth_callMany", "eth_getBalance", "eth_getLogs", "eth_estimateGas"),
            *("eth_feeHistory", "eth_chainId", "eth_getTransactionReceipt", "net_version", "web3_clientVersion"),
            *("debug_traceTransaction", "debug_traceCall", "trace_block", "txpool_content", "getBalance", "getSlot"),
            *("getLatestBlockhash", "getblockhash", "getrawtransaction", "abci_query", "status", "tx_search"),
            *(
                "sui_getObject",
                "suix_getBalance",
                "state_getStorage",
                "chain_getBlock",
                "starknet_call",
                "account_info",
            ),
            *("query", "EXPERIMENTAL_changes", "simulateTransaction", "platform.getHeight"),
        ],
    )
    def test_reads(self, method: str) -> None:
        assert RULES.safety(method) is Safety.READ

    @pytest.mark.parametrize(
        "method",
        [
            *("eth_sendRawTransaction", "eth_sendTransaction", "eth_newFilter", "eth_newBlockFilter"),
            *("eth_newPendingTransactionFilter", "eth_submitWork", "eth_submitHashrate", "eth_sendUserOperation"),
            *("eth_sign", "eth_signTransaction", "eth_subscribe", "eth_sendRawTransactionConditional"),
            *("sendTransaction", "requestAirdrop", "sendrawtransaction", "sendtoaddress", "submitblock"),
            *("getnewaddress", "getrawchangeaddress", "getwork", "broadcast_tx_sync", "broadcast_tx_commit", "send_tx"),
            *("sui_executeTransactionBlock", "author_submitExtrinsic", "starknet_addInvokeTransaction", "submit"),
            *("submit_multisigned", "personal_unlockAccount", "admin_addPeer", "miner_start", "platform.issueTx"),
        ],
    )
    def test_writes(self, method: str) -> None:
        assert RULES.safety(method) is Safety.WRITE

    @pytest.mark.parametrize("method", ["eth_getFilterChanges", "eth_getFilterLogs", "eth_uninstallFilter"])
    def test_filters(self, method: str) -> None:
        assert RULES.safety(method) is Safety.FILTER

    @pytest.mark.parametrize("method", ["", "*", "eth", "ETH_CALL", "eth_callback ".upper(), "mychain_doIt", "eth_"])
    def test_what_nobody_knows_is_a_write(self, method: str) -> None:
        assert RULES.safety(method) is Safety.WRITE

    def test_no_pattern_is_in_it_twice(self) -> None:
        patterns = [pattern for _, row in _TABLE for pattern in row.split()]
        assert len(patterns) == len(set(patterns)) == len(DEFAULT_METHODS)
        assert not [pattern for pattern in patterns if "*" in pattern[:-1]]

    def test_a_users_table_adds_and_replaces(self) -> None:
        rules = MethodRules({"mychain_*": Safety.READ, "mychain_send*": Safety.WRITE, "eth_getWork": Safety.WRITE})
        assert rules.safety("mychain_height") is Safety.READ
        assert rules.safety("mychain_sendIt") is Safety.WRITE
        assert rules.safety("eth_getWork") is Safety.WRITE
        assert rules.safety("eth_getBalance") is Safety.READ

    def test_the_most_specific_line_wins_whoever_wrote_it(self) -> None:
        rules = MethodRules({"*": Safety.READ, "eth_*": Safety.READ})
        assert rules.safety("anything") is Safety.READ
        assert rules.safety("eth_sendRawTransaction") is Safety.WRITE
        assert rules.safety("personal_sign") is Safety.WRITE


class TestBody:
    @pytest.mark.parametrize(
        "body",
        [
            b'{"jsonrpc":"2.0","id":1,"method":"eth_call","params":[]}',
            b' \r\n\t{"method":"eth_call"} ',
            b'{"method":"eth_call"}',  # a notification changes nothing either
            b'[{"method":"eth_call","id":1},{"method":"eth_getLogs","id":1}]',
            b' [ {"method":"eth_call"} ] ',
            b'{"method":"eth_\\u0063all"}',
            b'{"method":"eth_call","params":[{"method":"eth_sendTransaction","Method":1}]}',
            b'{"method":"eth_call","id":123456789012345678901234567890,"params":[1e999]}',
        ],
    )
    def test_reads_may_be_sent_twice(self, body: bytes) -> None:
        assert RULES.may_send_twice(body)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b" ",
            b"null",
            b"1",
            b'"eth_call"',
            b"{}",
            b"[]",
            b"[1]",
            b"[[]]",
            b'[[{"method":"eth_call"}]]',
            b'{"method":"eth_call"',
            b'{"method":"eth_call"}}',
            b'{"method":"eth_call"} {"method":"eth_sendTransaction"}',
            b'[{"method":"eth_call"}] 1',
            b'[{"method":"eth_call"},]',
            b'[{"method":"eth_call"} {"method":"eth_call"}]',
            b'{"method":1}',
            b'{"method":null}',
            b'{"method":["eth_call"]}',
            b'{"id":1}',
            b'{"Method":"eth_call"}',
            b'{"method":"eth_call","Method":"eth_sendTransaction"}',
            b'{"METHOD":"eth_sendTransaction","method":"eth_call"}',
            b'{"method":"eth_sendTransaction","method":"eth_call"}',
            b'{"method":"eth_call","m\\u0065thod":"eth_call"}',
            b'{"method":"eth_call","params":[1],"param\xc5\xbf":[2]}',  # Go folds the long s to s
            b'{"method":"eth_call","x":NaN}',
            b'{"method":"eth_call","x":' + b"9" * 5000 + b"}",
            b'\xff{"method":"eth_call"}',
            b'{"method":"eth_call\xff"}',
            b'\xef\xbb\xbf{"method":"eth_call"}',
            '{"method":"eth_call"}'.encode("utf-16"),
            b'{"method":"eth_call","x":"\x01"}',
            b'{"method":"eth_sendRawTransaction"}',
            b'{"method":"eth_getFilterChanges"}',
            b'[{"method":"eth_call"},{"method":"eth_sendRawTransaction"}]',
            b'[{"method":"eth_call"},{}]',
            b"[" * 100_000,
            b'{"method":"eth_call","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            b'{"x":' * 100_000,
        ],
        ids=lambda body: repr(body[:60]),
    )
    def test_everything_else_may_not(self, body: bytes) -> None:
        assert not RULES.may_send_twice(body)

    @FUZZ
    @given(st.binary(max_size=200))
    @example(b"[" * 5000)
    def test_it_raises_nothing(self, body: bytes) -> None:
        assert RULES.may_send_twice(body) in (True, False)

    @FUZZ
    @given(st.lists(st.sampled_from(["eth_call", "eth_getLogs", "eth_sendTransaction", "eth_getFilterLogs", "x"])))
    def test_a_batch_is_as_safe_as_its_least_safe_item(self, methods: list[str]) -> None:
        body: list[Any] = [call(method) for method in methods]
        expected = bool(methods) and all(method in ("eth_call", "eth_getLogs") for method in methods)
        assert RULES.may_send_twice(json.dumps(body).encode()) is expected

"""A local chain (eth-tester on py-evm) that answers JSON-RPC as a node does: hexadecimal numbers, errors with codes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from eth_tester import EthereumTester, PyEVMBackend
from eth_tester.exceptions import TransactionFailed
from web3 import EthereumTesterProvider, Web3

CHAIN_ID = 131277322940537
KEY = "0x" + "00" * 31 + "01"
"""Of `RICH`, one of the accounts every eth-tester chain begins with; they are part of its source."""
RICH = "0x7E5F4552091A69125d5DfCb7b8C2659029395Bdf"
WEALTH = 10**24
NOBODY = "0x00000000000000000000000000000000DeaDBeef"

COUNTER_ABI: list[dict[str, Any]] = [
    {
        "type": "function",
        "name": "number",
        "stateMutability": "view",
        "inputs": [],
        "outputs": [{"name": "", "type": "uint256"}],
    },
    {
        "type": "function",
        "name": "add",
        "stateMutability": "nonpayable",
        "inputs": [{"name": "amount", "type": "uint256"}],
        "outputs": [],
    },
]
"""A contract that keeps a number and adds to it, and reverts when there is nothing to add."""

_COUNTER = "".join(
    [
        "60003560e01c",  # the selector
        "80638381f58a14601f57",  # number(): go to 1f
        "80631003e2d214602b57",  # add(uint256): go to 2b
        "5b600080fd",  # 1a: revert
        "5b60005460005260206000f3",  # 1f: return what is stored
        "5b6004358015601a57600054016000550000",  # 2b: revert for 0, else store the sum
    ]
)
COUNTER_BYTECODE = f"60{len(_COUNTER) // 2:02x}80600b6000396000f3{_COUNTER}"


class Chain:
    """Answers one call at a time, from any thread. A transaction is in a block of its own when it is answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()
        """How often each method was called."""
        provider = EthereumTesterProvider(EthereumTester(PyEVMBackend()))
        w3 = Web3(provider, middleware=[])
        self._request = provider.request_func(w3, w3.middleware_onion)

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        """The JSON-RPC answer to a call."""
        with self._lock:
            self.calls[call["method"]] += 1
            try:
                outcome = dict(self._request(call["method"], call["params"]))
            except TransactionFailed as exc:
                outcome = {"error": {"code": 3, "message": str(exc)}}
            except Exception as exc:  # one of the many ways in which py-evm refuses a transaction
                outcome = {"error": {"code": -32000, "message": str(exc)}}
        if "result" in outcome:
            outcome["result"] = _hexed(outcome["result"])
        return {**outcome, "jsonrpc": "2.0", "id": call["id"]}


def _hexed(value: Any) -> Any:
    """As it goes over the wire."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return hex(value)
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Mapping):
        hexed = {name: _hexed(one) for name, one in value.items()}
        if "logsBloom" in hexed:
            hexed["logsBloom"] = f"0x{value['logsBloom']:0512x}"
        return hexed
    return [_hexed(one) for one in value]

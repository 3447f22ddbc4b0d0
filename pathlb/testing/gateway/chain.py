"""The chain behind an emulated PATH gateway, as its suppliers show it: JSON-RPC calls in, answers out."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

Answer = Callable[[dict[str, Any]], dict[str, Any]]
"""A JSON-RPC call in, its complete answer out."""

_FILTER_USES = {"eth_getFilterChanges", "eth_getFilterLogs", "eth_uninstallFilter"}


class Chain:
    """What one gateway shows of the chain: its height, the transactions sent through it, the filters made on it.

    `eth_chainId` is 1; a call it does not know is answered with its own method and params.
    """

    def __init__(self, rng: random.Random, answer: Answer | None = None) -> None:
        self.height = 1000
        self.transactions: Counter[str] = Counter()
        """How often each raw transaction arrived, known ones included."""
        self._rng = rng
        self._answer = answer
        self._filters: set[str] = set()

    def call(self, call: dict[str, Any]) -> dict[str, Any]:
        """Carry out one call and answer it."""
        params = call.get("params")
        first = params[0] if isinstance(params, list) and params else None
        known = False
        if call.get("method") == "eth_sendRawTransaction" and isinstance(first, str):
            known = first in self.transactions
            self.transactions[first] += 1
        if self._answer is None:
            return answer_to(call, **self._outcome(call, first, known))
        try:
            return self._answer(call)
        except Exception as exc:
            # A test waiting for this answer is told what went wrong by the answer.
            return answer_to(call, error={"code": -32603, "message": repr(exc)})

    def _outcome(self, call: dict[str, Any], first: Any, known: bool) -> dict[str, Any]:
        method = call.get("method")
        if method == "eth_chainId":
            return {"result": "0x1"}
        if method == "eth_blockNumber":
            return {"result": hex(self.height)}
        if method == "eth_sendRawTransaction":
            if not isinstance(first, str):
                return {"error": {"code": -32602, "message": "missing value for required argument 0"}}
            if known:
                return {"error": {"code": -32000, "message": "already known"}}
            return {"result": "0x" + hashlib.sha256(first.encode()).hexdigest()}
        if method in ("eth_newFilter", "eth_newBlockFilter"):
            made = f"0x{self._rng.getrandbits(128):032x}"
            self._filters.add(made)
            return {"result": made}
        if method in _FILTER_USES:
            if not isinstance(first, str) or first not in self._filters:
                return {"error": {"code": -32000, "message": "filter not found"}}
            if method == "eth_uninstallFilter":
                self._filters.remove(first)
                return {"result": True}
            return {"result": []}
        return {"result": {"method": method, "params": call.get("params")}}


def answer_to(call: dict[str, Any], **outcome: Any) -> dict[str, Any]:
    """The JSON-RPC answer with the call's id: `result=...` or `error=...`."""
    return {"jsonrpc": "2.0", "id": call.get("id"), **outcome}

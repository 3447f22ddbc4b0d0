"""`eth_sendRawTransaction` sent to a second endpoint: that the first had taken it is no failure."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from ..core.model import Sent
from ..exchange import Reply, Request
from .calls import Call, Id
from .coding import asking_for_readable, decoded, read_whole, with_content
from .text import parse_answer

METHOD = "eth_sendRawTransaction"

# How nodes say that they have this very transaction, by its hash. "nonce too low" is not among them: the nonce may have
# been used by another transaction. Nor is "replacement transaction underpriced", which speaks of another one too.
_ALREADY_KNOWN = re.compile(
    r"(?:^|: )(?:"
    r"already known"  # geth (txpool.ErrAlreadyKnown), Reth, Nethermind; Erigon with "ALREADY_EXISTS: " before it
    r"|AlreadyKnown"  # Nethermind until 2025
    r"|known transaction"  # Besu, and geth before 1.9.12 with the hash after it
    r"|existing tx with same hash"  # Erigon's pool, with "INTERNAL_ERROR: " before it
    r"|transaction with the same hash was already imported"  # OpenEthereum and its heirs
    r")\b",
    re.IGNORECASE,
)

# First bytes of the transactions whose hash is that of all their bytes (EIP-2718): lists of RLP, which have no type,
# and types 1, 2 and 4. Type 3 comes with its blobs, which its hash leaves out; other chains' types have rules of their
# own (zkSync's 0x71).
_TYPES_HASHED_WHOLE = frozenset({1, 2, 4, *range(0xC0, 0xFF)})


def find_keccak() -> Callable[[bytes], bytes]:
    """Keccak-256, of eth-hash. Raises `ImportError` without it, or without a library it can use."""
    from eth_hash.auto import keccak  # comes with pathlb[web3], and is not there without it

    keccak(b"")  # it looks for its library when it is first used
    return keccak


class Resender:
    """Makes raw transactions safe to send twice. `clock` is monotonic, `deadline` the balancer's, in seconds."""

    def __init__(
        self, send: Callable[[Request], Awaitable[Reply]], clock: Callable[[], float], deadline: float
    ) -> None:
        self._send = send
        self._clock = clock
        self._deadline = deadline
        self._keccak = find_keccak()

    async def send(self, request: Request, call: Call) -> Reply:
        """Send a raw transaction, again where the balancer sees fit.

        If an earlier attempt may have reached an endpoint and the last one hears that the transaction is known, the
        reply is the success the first would have been. Every other reply is as it came. Raises what sending raises.
        """
        until = self._clock() + (self._deadline if request.deadline is None else request.deadline)
        headers = asking_for_readable(request.headers)
        reply = await self._send(replace(request, idempotent=True, headers=headers))
        if call.id is None or not any(
            attempt.sent is Sent.MAYBE_SENT and not attempt.outcome.unprocessed for attempt in reply.attempts[:-1]
        ):
            return reply
        content = await read_whole(reply, until - self._clock())
        if not _says_already_known(reply, content):
            return reply
        transaction_hash = self._hash(call.params)
        if transaction_hash is None:
            return reply
        return with_content(reply, _success(call.id, transaction_hash))

    def _hash(self, params: Any) -> str | None:
        """The hash of the transaction, unless its rules are not known here."""
        if not isinstance(params, list) or len(params) != 1 or not isinstance(params[0], str):
            return None
        digits = params[0]
        try:
            raw = bytes.fromhex(digits[2:]) if digits.startswith("0x") else b""
        except ValueError:
            return None
        return "0x" + self._keccak(raw).hex() if raw and raw[0] in _TYPES_HASHED_WHOLE else None


def _says_already_known(reply: Reply, content: bytes) -> bool:
    try:
        answer = parse_answer(decoded(reply, content))
    except ValueError:
        return False
    error = answer.get("error") if isinstance(answer, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return isinstance(message, str) and _ALREADY_KNOWN.search(message) is not None


def _success(request_id: Id, result: str) -> bytes:
    return f'{{"jsonrpc":"2.0","id":{json.dumps(request_id)},"result":"{result}"}}'.encode()

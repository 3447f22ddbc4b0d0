"""What PATH writes itself: its replies and their bodies, word for word."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

TEXT = "text/plain; charset=utf-8"
_INTERNAL_ERROR = -31001
_INVALID_REQUEST = -32600


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of PATH, before it is bytes."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    factor: float = 0.0
    """How many service times it takes: 0 when nothing is relayed."""
    close: bool = False
    """The connection ends with it."""


def encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def relay_headers(tried: Sequence[str] = (), retries: int = 0) -> tuple[tuple[str, str], ...]:
    """The headers by which an answer of the relay handler is known, errors too."""
    return (
        ("X-Archival-Request", "false"),
        ("X-Retry-Count", str(retries)),
        ("X-Suppliers-Tried", ",".join(tried[:10])),
    )


def internal_error(
    request_id: Any, error: str, headers: tuple[tuple[str, str], ...] = (), factor: float = 0.0, close: bool = False
) -> Reply:
    """500 -31001, with a cause PATH knows."""
    body = _error(request_id, _INTERNAL_ERROR, f"internal error: {error}", {"error": error, "retryable": "true"})
    return Reply(500, body, headers=headers or relay_headers(), factor=factor, close=close)


def no_response() -> Reply:
    """500 -31001 without a cause: what an oversized batch gets."""
    message = (
        "Failed to receive any response from endpoints. "
        "This could be due to network issues or high load. Please try again."
    )
    body = _error(None, _INTERNAL_ERROR, message, {"retryable": "true"})
    return Reply(500, body, headers=relay_headers())


def incomplete_batch(expected: int, got: int, headers: tuple[tuple[str, str], ...], factor: float) -> Reply:
    """500 -31001 for a batch some items of which have no answer."""
    error = f"batch response length mismatch: expected {expected} responses, got {got}"
    message = f"Failed to marshal batch response: {error}"
    body = _error(None, _INTERNAL_ERROR, message, {"error": error, "retryable": "true"})
    return Reply(500, body, headers=headers, factor=factor)


def invalid_request(error: str) -> Reply:
    """400 -32600: no JSON-RPC."""
    body = _error(None, _INVALID_REQUEST, f"invalid request: {error}", {"error": error, "retryable": "false"})
    return Reply(400, body, headers=relay_headers())


def not_configured(service: str, available: list[str]) -> Reply:
    message = f"Service '{service}' is not configured"
    return _refused(message, {"available_services": available, "service_id": service})


def rpc_type_refused(service: str, error: str, allowed: list[str]) -> Reply:
    data = {"allowed_rpc_types": allowed, "detected_type": "unknown", "service_id": service}
    return _refused(f"Failed to detect RPC type: {error}", data)


def missing_service() -> Reply:
    message = "no service ID provided in 'Target-Service-Id' header: no service ID provided"
    return Reply(400, encode({"code": 400, "message": message}), content_type=TEXT, headers=relay_headers())


def _refused(message: str, data: dict[str, Any]) -> Reply:
    # Its keys are sorted, unlike the other errors'.
    error = {"code": _INVALID_REQUEST, "data": data, "message": message}
    return Reply(400, encode({"error": error, "id": None, "jsonrpc": "2.0"}), headers=relay_headers())


def _error(request_id: Any, code: int, message: str, data: dict[str, str]) -> bytes:
    return encode({"id": request_id, "jsonrpc": "2.0", "error": {"code": code, "message": message, "data": data}})

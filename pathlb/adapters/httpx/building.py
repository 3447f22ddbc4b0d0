"""Requests with a body in memory and headers in a plain dict, put together as httpx does it, in half the time.

httpx merges URL, headers, cookies and parameters of client and request, makes a `Request`, looks through its headers
for what to add, and makes them anew. For most requests that comes to: the client's headers, then the caller's, then the
length of the body. A test holds what comes out against what httpx would have made.
"""

from __future__ import annotations

import json as json_module
from typing import Any

import httpx

Pair = tuple[bytes, bytes]

_OURS = frozenset({b"host", b"content-length", b"transfer-encoding"})
"""Fields that change what is added: whoever sets them gets httpx's own way."""

SECOND = httpx.__version__.startswith("2.")
"""This is httpx2, not httpx: the few places where they differ."""

_BODY_EXPECTED = frozenset({"POST", "PUT", "PATCH"} | ({"QUERY"} if SECOND else set()))
_NAMES_KEPT = 1_000
_names: dict[str, Pair] = {}
"""Header names as bytes, as written and in lower case."""


class LeanRequests:
    """Builds requests with the headers of one client, as long as these allow it."""

    __slots__ = ("_defaults", "_names")

    def __init__(self) -> None:
        self._defaults: list[Pair] | None = None
        self._names: frozenset[bytes] = frozenset()

    def build(
        self,
        method: str,
        url: httpx.URL,
        content: Any,
        json: Any,
        headers: Any,
        defaults: httpx.Headers,
        extensions: dict[str, Any],
    ) -> httpx.Request | None:
        """The request, or None where only httpx's own way will do. `defaults` are the client's headers."""
        raw = defaults.raw
        if raw != self._defaults:
            self._defaults = raw
            self._names = frozenset(name.lower() for name, _ in raw)
        taken = self._names
        if not taken.isdisjoint(_OURS):
            return None
        pairs = [(b"Host", url.netloc), *raw]
        if headers is not None:
            if type(headers) is not dict:
                return None
            for key, value in headers.items():
                if type(key) is not str or type(value) is not str:
                    return None
                name, lower = _names.get(key) or _remember(key)
                if lower in taken or lower in _OURS or (lower == b"content-type" and content is None):
                    return None
                pairs.append((name, value.encode("ascii")))
            if len(headers) > 1 and len({key.lower() for key in headers}) < len(headers):
                return None
        if isinstance(content, str):
            content = content.encode()
        if type(content) is bytes:
            body = content
        elif content is not None:
            return None
        elif json is not None:
            if b"content-type" in taken:
                return None
            body = json_module.dumps(json, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        else:
            body = b""
        if body:
            pairs.append((b"Content-Length", b"%d" % len(body)))
        elif method.upper() in _BODY_EXPECTED:
            pairs.insert(1, (b"Content-Length", b"0"))
        if content is None and json is not None:
            pairs.append((b"Content-Type", b"application/json"))
        stream = httpx.ByteStream(body)
        request = httpx.Request(method, url, headers=pairs, stream=stream, extensions=extensions)
        request.read()
        return request


def _remember(key: str) -> Pair:
    name = key.encode("ascii")
    pair = (name, name.lower())
    if len(_names) < _NAMES_KEPT:
        _names[key] = pair
    return pair

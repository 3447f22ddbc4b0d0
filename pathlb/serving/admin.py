"""What the operator asks: an ASGI app on a listener of its own, in the supervisor.

GET /health                    the process is up
GET /ready                     200 if some endpoint is in service and new requests are welcome, else 503
GET /snapshot                  what every worker knows
POST /drain?endpoint=URL       send nothing new there (with `Authorization: Bearer TOKEN`)
POST /undrain?endpoint=URL     take it back
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from typing import Any, Protocol
from urllib.parse import parse_qs

from ..asgi.types import Receive, Scope, Send
from ..core.eligibility import IN_SERVICE
from ..core.errors import ConfigError

_IN_SERVICE = frozenset(standing.value for standing in IN_SERVICE)
_PATHS = {"/health": "GET", "/ready": "GET", "/snapshot": "GET", "/drain": "POST", "/undrain": "POST"}


class Operated(Protocol):
    """What is operated."""

    @property
    def admin_token(self) -> str | None:
        """Who may change anything; None for nobody."""

    async def snapshots(self) -> list[dict[str, Any]]:
        """One a worker."""

    async def set_drained(self, url: str, drained: bool) -> list[str]:
        """Drain an endpoint, or take it back; the answer is what went wrong. Raises `ConfigError` if unknown."""


class Admin:
    """The app. `is_stopping` says whether new requests had better go elsewhere."""

    def __init__(self, operated: Operated, is_stopping: Callable[[], bool] = lambda: False) -> None:
        self._operated = operated
        self._is_stopping = is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, told = await self._answer(scope)
        body = json.dumps(told).encode() + b"\n"
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        headers.append((b"cache-control", b"no-store"))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope) -> tuple[int, dict[str, Any]]:
        path = scope["path"]
        if path not in _PATHS:
            return 404, {"error": f"there are {', '.join(_PATHS)}"}
        if scope["method"] != _PATHS[path] and (scope["method"], _PATHS[path]) != ("HEAD", "GET"):
            return 405, {"error": f"{path} takes {_PATHS[path]}"}
        if path == "/health":
            return 200, {"status": "up"}
        if path in ("/drain", "/undrain"):
            return await self._drain(scope, path == "/drain")
        workers = await self._operated.snapshots()
        if path == "/snapshot":
            return 200, {"workers": workers}
        in_service = any(one["state"] in _IN_SERVICE for worker in workers for one in worker.get("endpoints", ()))
        ready = in_service and not self._is_stopping()
        return (200, {"ready": True}) if ready else (503, {"ready": False})

    async def _drain(self, scope: Scope, drained: bool) -> tuple[int, dict[str, Any]]:
        token = self._operated.admin_token
        if token is None:
            return 403, {"error": "no admin token is configured: set PATHLB_ADMIN_TOKEN or admin_token"}
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, secret = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(secret.strip(), token.encode("ascii")):
            return 401, {"error": "the admin token is needed: Authorization: Bearer TOKEN"}
        wanted = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("endpoint", [])
        if len(wanted) != 1:
            return 400, {"error": "name one endpoint: ?endpoint=URL"}
        try:
            problems = await self._operated.set_drained(wanted[0], drained)
        except ConfigError as exc:
            return 404, {"error": exc.problem}
        if problems:
            return 500, {"error": "; ".join(problems)}
        return 200, {"endpoint": wanted[0], "draining": drained}

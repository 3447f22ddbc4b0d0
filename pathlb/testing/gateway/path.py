"""An emulated gateway that behaves like PATH: its routes, and relays instead of one reply for everything."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any
from urllib.parse import parse_qs, unquote

from .chain import Answer
from .connection import Exchange
from .model import Mode, PathSettings, ReceivedRequest, ServiceMode, Stats
from .relays import Relays, header, supplier_url
from .replies import TEXT, Reply, encode
from .server import Gateway, reason_phrase


class PathGateway(Gateway):
    """A `Gateway` with PATH's services.

    Its modes are still those of the instance, and what they reply comes without PATH's headers, as from something in
    between. Service requests take a worker and their service time; they are relayed when they get the worker, at the
    start of their time. The operational routes are answered at once, as `/health` is.
    """

    def __init__(self, settings: PathSettings, answer: Answer | None = None) -> None:
        super().__init__(settings)
        self.wants_requests = True
        self._relays = Relays(settings, answer)

    def set_service(self, service: str, mode: ServiceMode, *, share: float = 1.0, factor: float = 10.0) -> None:
        """See `FleetGateway.set_service`."""
        self._relays.set_service(service, mode, share, factor)

    def set_height(self, height: int) -> None:
        """The block height from now on."""
        self._relays.chain.height = height

    def transactions(self) -> dict[str, int]:
        """How often each raw transaction reached the chain through this gateway."""
        return dict(self._relays.chain.transactions)

    def stats(self) -> Stats:
        return dataclasses.replace(super().stats(), relays=self._relays.count)

    def arrived(self, exchange: Exchange) -> None:
        request = exchange.request
        assert request is not None
        if exchange.connection.gone:
            return
        mode = self._mode
        if mode is Mode.HANG or mode is Mode.RESET:
            if _is_relayed(request):
                self._relays.answer(request)
        elif mode is not Mode.FAIL and mode is not Mode.REFUSE and not _is_relayed(request):
            self._send_reply(exchange, self._operational(request))
            return
        super().arrived(exchange)

    def _serve(self, exchange: Exchange) -> None:
        assert exchange.request is not None
        reply = self._relays.answer(exchange.request)
        if reply is None:
            return
        seconds = 0.0
        if reply.factor:
            seconds = self.settings.service_time.sample(self._rng) * self._factor * reply.factor
        if seconds == 0:
            self._send_reply(exchange, reply)
        else:
            timer = asyncio.get_running_loop().call_later(seconds, self._relayed, exchange, reply)
            self._serving[exchange] = timer

    def _relayed(self, exchange: Exchange, reply: Reply) -> None:
        if self._freed_worker(exchange):
            self._send_reply(exchange, reply)

    def _send_reply(self, exchange: Exchange, reply: Reply) -> None:
        keep_alive = exchange.keep_alive and not reply.close
        headers = [
            ("X-Gateway", self.settings.name),
            ("Content-Length", str(len(reply.body))),
            ("Content-Type", reply.content_type),
            *reply.headers,
        ]
        if not keep_alive:
            headers.append(("Connection", "close"))
        head = f"HTTP/1.1 {reply.status} {reason_phrase(reply.status)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
        body = b"" if exchange.without_body else reply.body
        self._send(exchange, reply.status, head.encode("latin-1") + body, keep_alive)

    # the operational routes

    def _operational(self, request: ReceivedRequest) -> Reply:
        target, _, query = request.target.decode("latin-1").partition("?")
        path = unquote(target)
        ready = path == "/ready" or path.startswith("/ready/")
        if not ready and path not in ("/health", "/healthz", "/disqualified_endpoints"):
            return Reply(404, b"404 page not found\n", TEXT)
        if request.method == "HEAD":
            return Reply(405, b"method not allowed: only GET requests are allowed\n", TEXT)
        if request.method != "GET":
            return Reply(405, b"Method Not Allowed\n", TEXT, (("Allow", "GET, HEAD"),))
        if path == "/health":
            return Reply(200)
        if path == "/healthz":
            return self._healthz()
        if path == "/disqualified_endpoints":
            return self._disqualified(header(request, b"target-service-id"))
        return self._ready(path.removeprefix("/ready").removeprefix("/"), parse_qs(query).get("detailed") == ["true"])

    def _healthz(self) -> Reply:
        state = {
            "deprecated": "This endpoint is deprecated. Use /health for liveness, /ready for readiness, "
            "and /config for configuration.",
            "status": "ready",
            "imageTag": "development",
            "readyStates": {"pokt-shannon": True},
            "configuredServiceIDs": self._relays.configured(),
        }
        return Reply(200, encode(state), headers=(("Deprecation", "true"),))

    def _ready(self, service: str, detailed: bool) -> Reply:
        services = [service] if service else self._relays.configured()
        if not services:
            return Reply(503, encode({"ready": False, "message": "no services configured"}) + b"\n")
        states = {each: self._readiness(each, detailed) for each in services}
        ready = all(state["ready"] for state in states.values())
        return Reply(200 if ready else 503, encode({"ready": ready, "services": states}) + b"\n")

    def _readiness(self, service: str, detailed: bool) -> dict[str, Any]:
        error = self._relays.session_error(service)
        suppliers = self._relays.suppliers if error is None else []
        state: dict[str, Any] = {
            "ready": error is None,
            "endpoint_count": len(suppliers),
            "has_session": error is None,
        }
        if detailed and service in self._relays.configured():
            height = self._relays.chain.height
            state |= {
                "perceived_block_height": height,
                "median_block_height": height,
                "block_observations": len(self._relays.suppliers),
            }
        if error is not None:
            state["error"] = error
        elif detailed:
            state["endpoints"] = [_endpoint(supplier) for supplier in suppliers]
        return state

    def _disqualified(self, service: str) -> Reply:
        error = self._relays.session_error(service)
        if not service or error is not None:
            message = f"invalid service ID: {error}" if service else "Target-Service-Id header is required"
            return Reply(400, f'{{"error": "400 Bad Request", "message": "{message}"}}\n'.encode(), TEXT)
        counts = ("empty_response", "chain_id_check_errors", "archival_check_errors", "block_number_check_errors")
        state = {
            "protocol_level_disqualified_endpoints": None,
            "qos_level_disqualified_endpoints": {
                "disqualified_endpoints": None,
                **{f"{name}_count": 0 for name in counts},
            },
            "total_service_endpoints_count": len(self._relays.suppliers),
            "disqualified_service_endpoints_count": 0,
        }
        return Reply(200, encode(state) + b"\n")


def _is_relayed(request: ReceivedRequest) -> bool:
    path = request.target.partition(b"?")[0]
    return path == b"/v1" or path.startswith(b"/v1/")


def _endpoint(supplier: str) -> dict[str, Any]:
    url = supplier_url(supplier)
    return {"address": f"{supplier}-{url}", "supplier_address": supplier, "url": url, "is_fallback": False}

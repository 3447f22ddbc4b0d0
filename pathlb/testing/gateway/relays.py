"""The service requests of an emulated PATH gateway: checked as it does, relayed to suppliers, answered as it does."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from .chain import Answer, Chain, answer_to
from .model import PathSettings, ReceivedRequest, ServiceMode
from .replies import (
    Reply,
    encode,
    incomplete_batch,
    internal_error,
    invalid_request,
    missing_service,
    no_response,
    not_configured,
    relay_headers,
    rpc_type_refused,
)

MAX_BODY = 75 * 1024 * 1024
MAX_BATCH = 5500

_RPC_TYPES = ["json_rpc", "websocket"]
_OF_RELAYS = {ServiceMode.SUPPLIERS_FAIL, ServiceMode.RATE_LIMITED, ServiceMode.EMPTY}


@dataclass(frozen=True, slots=True)
class _Service:
    """How one service fares at the moment."""

    mode: ServiceMode = ServiceMode.OK
    share: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one call."""

    tried: list[str]
    """The suppliers, in order."""
    status: int
    body: bytes
    """Empty when the answer was lost."""
    delivered: bool


class Relays:
    """The services of one gateway and the suppliers behind them.

    Every service speaks JSON-RPC over HTTP only and is answered for as PATH does for EVM chains: batches in no order.
    """

    def __init__(self, settings: PathSettings, answer: Answer | None) -> None:
        # Not the generator of the service times, whose sequence must not depend on what fails.
        self._rng = random.Random(f"{settings.name} {settings.seed}")
        self.chain = Chain(self._rng, answer)
        self.suppliers = [f"pokt1supplier{index}" for index in range(settings.suppliers)]
        self.count = 0
        """Relays sent."""
        self._services = {service: _Service() for service in settings.services}

    def set_service(self, service: str, mode: ServiceMode, share: float, factor: float) -> None:
        if service not in self._services:
            raise ValueError(f"no such service: {service!r}; there are {', '.join(self._services)}")
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share!r}")
        if not factor > 0:
            raise ValueError(f"SLOW needs a factor above 0, not {factor!r}")
        self._services[service] = _Service(mode, share, factor)

    def configured(self) -> list[str]:
        """The services this instance has, sorted."""
        return sorted(name for name, each in self._services.items() if each.mode is not ServiceMode.NOT_CONFIGURED)

    def session_error(self, service: str) -> str | None:
        """Why the service has no session, if so."""
        if service not in self.configured():
            return f"ZERO owned apps found for service: {service}"
        if self._services[service].mode is ServiceMode.NO_SESSION:
            return f"no active sessions could be retrieved for the service: service {service}"
        return None

    def answer(self, request: ReceivedRequest) -> Reply | None:
        """Relay the request, if PATH would, and answer it. None: it hangs."""
        if header(request, b"upgrade").lower() == "websocket" and header(request, b"connection").lower() == "upgrade":
            # No supplier takes one, and then PATH writes nothing.
            return Reply(200)
        name = header(request, b"target-service-id")
        if not name:
            return missing_service()
        service = self._services.get(name)
        if service is None:
            return not_configured(name, self.configured())
        # Modes of relays are drawn for each of them instead.
        befallen = service.mode not in _OF_RELAYS and self._drawn(service)
        mode = service.mode if befallen else ServiceMode.OK
        if mode is ServiceMode.NOT_CONFIGURED:
            return not_configured(name, self.configured())
        refused = _check_rpc_type(request, name)
        if refused is not None:
            return refused
        if len(request.body) > MAX_BODY:
            # The limit it names is another one, which is never reached.
            return internal_error(None, f"request body exceeds {100 * 1024 * 1024} bytes limit", close=True)
        try:
            calls, batch = _parse(request.body)
        except ValueError as exc:
            return invalid_request(str(exc))
        if mode is ServiceMode.NO_SESSION:
            return internal_error(calls[0].get("id") if len(calls) == 1 else None, str(self.session_error(name)))
        if len(calls) > MAX_BATCH:
            return no_response()
        outcomes = [self._relay(service, mode, call) for call in calls]
        if mode is ServiceMode.HANG:
            return None
        factor = service.factor if mode is ServiceMode.SLOW else 1.0
        if batch:
            return self._batch_reply(outcomes, factor)
        return self._single_reply(name, service, calls[0], outcomes[0], factor)

    def _drawn(self, service: _Service) -> bool:
        return self._rng.random() < service.share

    def _relay(self, service: _Service, mode: ServiceMode, call: dict[str, Any]) -> _Outcome:
        """Relay to a supplier and, where it fails, once more to another one."""
        tried: list[str] = []
        answer: dict[str, Any] | None = None
        for supplier in self._rng.sample(self.suppliers, 2):
            tried.append(supplier)
            self.count += 1
            fails = service.mode in _OF_RELAYS and self._drawn(service)
            # One call to the chain whatever the relays, so that what is sent twice was sent to the gateway twice.
            if answer is None and not (fails and service.mode is ServiceMode.RATE_LIMITED):
                answer = self._chain_answer(mode, call)
            if answer is not None and not fails:
                return _Outcome(tried, 200, encode(answer), True)
        if service.mode is ServiceMode.RATE_LIMITED:
            return _Outcome(tried, 429, encode({"error": "too many requests"}), False)
        return _Outcome(tried, 200, b"", False)

    def _chain_answer(self, mode: ServiceMode, call: dict[str, Any]) -> dict[str, Any]:
        if mode is ServiceMode.CHAIN_ERROR:
            return answer_to(call, error={"code": 3, "message": "execution reverted"})
        return self.chain.call(call)

    def _single_reply(
        self, name: str, service: _Service, call: dict[str, Any], outcome: _Outcome, factor: float
    ) -> Reply:
        headers = _single_headers(outcome)
        if outcome.delivered:
            headers += (
                ("X-App-Address", "pokt1application"),
                ("X-Supplier-Address", outcome.tried[-1]),
                ("X-Session-Id", f"session-{name}"),
            )
        elif service.mode is ServiceMode.SUPPLIERS_FAIL:
            endpoint = f"{outcome.tried[-1]}-{supplier_url(outcome.tried[-1])}"
            error = (
                f"relay: error sending relay for service {name} endpoint {endpoint}: error sending request to "
                f"endpoint {endpoint}: HTTP relay request failed: context deadline exceeded"
            )
            return internal_error(call.get("id"), error, headers, factor)
        return Reply(outcome.status, outcome.body, headers=headers, factor=factor)

    def _batch_reply(self, outcomes: list[_Outcome], factor: float) -> Reply:
        if len(outcomes) == 1:
            headers = _single_headers(outcomes[0])
        else:
            # Neither the retries of the items nor the suppliers these went to are told.
            headers = relay_headers(list(dict.fromkeys(outcome.tried[0] for outcome in outcomes)))
        answered = [outcome for outcome in outcomes if outcome.body]
        if not answered:
            return Reply(200, headers=headers, factor=factor)
        if len(answered) < len(outcomes):
            return incomplete_batch(len(outcomes), len(answered), headers, factor)
        self._rng.shuffle(answered)
        body = b"[" + b",".join(outcome.body for outcome in answered) + b"]"
        return Reply(answered[0].status, body, headers=headers, factor=factor)


def header(request: ReceivedRequest, name: bytes) -> str:
    """The value of a header given in lower case, or an empty text."""
    return next((value.decode("latin-1") for key, value in request.headers if key.lower() == name), "")


def supplier_url(supplier: str) -> str:
    return f"https://{supplier}.example"


def _single_headers(outcome: _Outcome) -> tuple[tuple[str, str], ...]:
    return (*relay_headers(outcome.tried, len(outcome.tried) - 1), ("X-Hedge-Result", "primary_only"))


def _check_rpc_type(request: ReceivedRequest, service: str) -> Reply | None:
    told = header(request, b"rpc-type")
    if told.lower() == "json_rpc" or (not told and request.method == "POST"):
        return None
    allowed = f"[{' '.join(_RPC_TYPES)}]"
    if told:
        error = f"RPC type '{told}' from RPC-Type header not supported by service '{service}'. Allowed types: {allowed}"
    else:
        error = (
            f"unable to detect RPC type for service '{service}'. Service supports: {allowed}. "
            "Consider using RPC-Type header for explicit type specification"
        )
    return rpc_type_refused(service, error, _RPC_TYPES)


def _parse(body: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The calls, and whether they came as a batch. Raises `ValueError` for what is no JSON-RPC."""
    if not body.strip():
        raise ValueError("empty request body")
    parsed = json.loads(body)
    batch = isinstance(parsed, list)
    calls = parsed if batch else [parsed]
    if not calls:
        raise ValueError("empty batch request not allowed")
    for call in calls:
        if not isinstance(call, dict):
            raise ValueError("json: cannot unmarshal into Go value of type jsonrpc.Request")
        if isinstance(call.get("id"), (bool, float, list, dict)):
            raise ValueError("json: cannot unmarshal into Go value of type string")
    return calls, batch

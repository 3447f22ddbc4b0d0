"""From settings to what they are settings of: a balancer, a gateway, a TLS context."""

from __future__ import annotations

import math
import ssl
from collections.abc import Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

from ..asgi import Gateway
from ..balancer import Balancer
from ..config import Health
from ..core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart
from ..core.errors import ConfigError
from ..errors import PathlbError
from ..exchange import Attempt, Reply, Request
from ..jsonrpc import JSONRPC
from ..profile import PATH_JSONRPC, PATHProfile
from .config import HEALTH_PATH, POLICIES, ServeConfig


class Road:
    """What became of one request, for the access log."""

    __slots__ = ("attempts", "caller")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.attempts: tuple[Attempt, ...] = ()


road: ContextVar[Road | None] = ContextVar("pathlb_road", default=None)
"""Where the balancer is to note what became of the request that this task is for."""


class ServedBalancer(Balancer):
    """A balancer that notes what it did where somebody wants to know."""

    def send(self, request: Request) -> Coroutine[Any, Any, Reply]:
        wanted = road.get()
        return super().send(request) if wanted is None else self._send_noting(request, wanted)

    async def _send_noting(self, request: Request, wanted: Road) -> Reply:
        wanted.caller = _value(request, b"x-real-ip") or wanted.caller
        try:
            reply = await super().send(request)
        except PathlbError as exc:
            wanted.attempts = exc.attempts
            raise
        wanted.attempts = reply.attempts
        return reply


def make_balancer(config: ServeConfig) -> Balancer:
    """The balancer of one worker. Raises `ConfigError`."""
    profile = make_profile(config)
    options: dict[str, Any] = {"profile": profile}
    sections: Mapping[str, type] = {"breaker": Breaker, "panic": Panic, "slow_start": SlowStart, "retry": Retry}
    for name, make in sections.items():
        if (given := getattr(config, name)) is not None:
            options[name] = make(**given)
    if config.outlier is not None:
        options["outlier"] = Outlier(**config.outlier) if isinstance(config.outlier, Mapping) else None
    if isinstance(config.health, Mapping):
        base = profile.health if profile is not None else None
        options["health"] = replace(base or Health(HEALTH_PATH), **config.health)
    if config.jsonrpc is not None:
        options["jsonrpc"] = replace(PATH_JSONRPC if profile is not None else JSONRPC(), **config.jsonrpc)
    limits = replace(profile.limits if profile is not None else Limits(), **(config.limits or {}))
    options["limits"] = share_of(limits, config.workers)
    balancer = ServedBalancer(config.endpoints, policy=POLICIES[config.policy](), deadline=config.deadline, **options)
    balancer.timeouts = balancer.timeouts._replace(**(config.timeouts or {}))
    return balancer


def make_profile(config: ServeConfig) -> PATHProfile | None:
    """What kind of gateways they are. Raises `ConfigError`."""
    if config.profile is None:
        return None
    services: Any = dict(config.services)
    return PATHProfile(
        services=list(services) if None in services.values() else services,
        app_address=config.app_address,
        probes=config.health is not False,
        block_height=None if config.block_height is None else BlockHeight(**config.block_height),
    )


def share_of(limits: Limits, workers: int) -> Limits:
    """The part of one worker of limits that hold for all together, rounded up."""
    return replace(limits, concurrency=math.ceil(limits.concurrency / workers), queue=math.ceil(limits.queue / workers))


def make_gateway(config: ServeConfig, balancer: Balancer, name: str) -> Gateway:
    """The app in front of a balancer; `name` is what all workers call themselves in Via. Raises `ConfigError`."""
    return Gateway(
        balancer,
        max_body=config.max_body,
        max_message=config.max_message,
        rewrite=config.rewrite,
        host=config.host,
        set_request_headers=config.request_headers,
        set_response_headers=config.response_headers,
        trusted=config.trusted,
        tell=config.tell,
        name=name,
    )


def make_tls(config: ServeConfig) -> ssl.SSLContext | None:
    """The TLS settings of the listener, with the files as they are now. Raises `ConfigError` for those of no use."""
    if config.tls is None:
        return None
    for name in ("certificate", "key"):
        file = getattr(config.tls, name)
        try:
            with open(file, "rb"):
                pass
        except OSError as exc:
            raise ConfigError(f"tls.{name}", f"{file}: {exc.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password given the terminal would be asked for one.
        context.load_cert_chain(config.tls.certificate, config.tls.key, password=lambda: "")
    except ssl.SSLError as exc:
        files = f"{config.tls.certificate}, {config.tls.key}"
        raise ConfigError("tls.certificate", f"{files}: {_what(exc)}") from None
    return context


def check_buildable(config: ServeConfig) -> None:
    """Raise `ConfigError` for what only shows when everything is built."""
    make_gateway(config, make_balancer(config), "pathlb-check")
    make_tls(config)


def _what(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    if error.reason is None or "PEM" in error.reason or error.reason == "NO_START_LINE":
        return "no PEM certificate with its key, without a password"
    return error.reason.replace("_", " ").lower()


def _value(request: Request, wanted: bytes) -> str | None:
    return next((value.decode("latin-1") for name, value in request.headers if name == wanted), None)

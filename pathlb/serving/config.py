"""The settings of `pathlb serve`, whether from a file or the command line: frozen, and checked when built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..asgi.forwarded import Forwarding
from ..config import DEADLINE, Health
from ..core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..core.policy import P2C, LeastConnections, Policy, RoundRobin
from ..jsonrpc import JSONRPC
from . import checks
from .checks import TLS, Address, Check, Path, Problem, Wrong

POLICIES: Mapping[str, type[Policy]] = {
    "least-connections": LeastConnections,
    "p2c": P2C,
    "round-robin": RoundRobin,
}
PROFILES = ("path",)
HEALTH_PATH = "/health"

Section = Mapping[str, Any]
"""Settings of one of pathlb's dataclasses, as far as they are given; the profile, or its own defaults, do the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What `pathlb serve` is to do. Raises `ConfigError` that names the setting as the file has it.

    - `endpoints`: the instances, `Endpoint`s or URLs; the rest has defaults.
    - `bind`, `admin`: where to listen (admin: default nowhere); `admin_token`: who may drain.
    - `workers`: processes; `limits` hold for all of them together.
    - `grace`: seconds requests get to end when it stops; `keep_alive`: seconds a connection may be idle.
    - `access_log`: a line a request on stdout.
    - `policy`, `profile`, `services` (ids, or ids and their RPC-Type), `app_address`, `deadline`, and the sections
      `health`, `limits`, `retry`, `timeouts`, `breaker`, `outlier`, `panic`, `slow_start`, `block_height`, `jsonrpc`:
      as in `Balancer` and `PATHProfile`; `health` and `outlier` may be False.
    - `max_body`, `max_message`, `host`, `rewrite`, `trusted`, `tell`, `request_headers`, `response_headers`: as in
      `asgi.Gateway`.
    - `tls`: certificate and key of the listener.
    """

    endpoints: tuple[Endpoint, ...]
    bind: Address = Address("127.0.0.1", 8080)
    admin: Address | None = None
    admin_token: str | None = field(default=None, repr=False)
    workers: int = 1
    grace: float = 30.0
    keep_alive: float = 75.0
    access_log: bool = False
    policy: str = "least-connections"
    profile: str | None = None
    services: Mapping[str, str | None] = field(default_factory=dict)
    app_address: str | None = None
    deadline: float = DEADLINE
    max_body: int = 75 * 2**20
    max_message: int = 16 * 2**20
    host: str | None = None
    rewrite: tuple[str, str] | None = None
    trusted: tuple[str, ...] = ()
    tell: bool = False
    request_headers: Mapping[str, str | None] = field(default_factory=dict)
    response_headers: Mapping[str, str | None] = field(default_factory=dict)
    tls: TLS | None = None
    health: Section | bool | None = None
    limits: Section | None = None
    retry: Section | None = None
    timeouts: Section | None = None
    breaker: Section | None = None
    outlier: Section | bool | None = None
    panic: Section | None = None
    slow_start: Section | None = None
    block_height: Section | None = None
    jsonrpc: Section | None = None

    def __post_init__(self) -> None:
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        values, problems = check_all({key: value for key, value in given.items() if value is not None})
        if problems:
            raise ConfigError(problems[0].setting, problems[0].text)
        for key, value in values.items():
            object.__setattr__(self, key, value)


def _trusted(value: Any) -> tuple[str, ...]:
    networks = checks.texts(value)
    try:
        Forwarding(networks)
    except ConfigError as exc:
        raise Wrong(exc.problem) from None
    return networks


SETTINGS: Mapping[str, Check] = {
    "endpoints": checks.endpoints,
    "bind": checks.address,
    "admin": checks.admin_address,
    "admin_token": checks.name,
    "workers": checks.number(1, 1024, whole=True),
    "grace": checks.number(0, 1e6),
    "keep_alive": checks.number(1e-3, 1e6),
    "access_log": checks.flag,
    "policy": checks.choice(POLICIES),
    "profile": checks.choice(PROFILES),
    "services": checks.services,
    "app_address": checks.app_address,
    "deadline": checks.number(1e-3, 1e6),
    "max_body": checks.number(0, whole=True),
    "max_message": checks.number(1, whole=True),
    "host": checks.host,
    "rewrite": checks.rewrite,
    "trusted": _trusted,
    "tell": checks.flag,
    "request_headers": checks.header_rules,
    "response_headers": checks.header_rules,
    "tls": checks.tls,
    "health": checks.section(Health, leave=("services", "block_height"), off=True, path=HEALTH_PATH),
    "limits": checks.section(Limits),
    "retry": checks.section(Retry, leave=("stop", "wait", "retry")),
    "timeouts": checks.timeouts,
    "breaker": checks.section(Breaker),
    "outlier": checks.section(Outlier, off=True),
    "panic": checks.section(Panic),
    "slow_start": checks.section(SlowStart),
    "block_height": checks.section(BlockHeight),
    "jsonrpc": checks.section(JSONRPC, leave=("methods",)),
}
"""Every setting there is, and what it takes."""


def check_all(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The values as they are kept, or all that is wrong with them."""
    try:
        values = checks.check_table(given, SETTINGS)
    except Wrong as wrong:
        return {}, wrong.problems
    problems: list[Problem] = []
    if not values.get("endpoints"):
        problems.append(Problem(("endpoints",), "there must be at least one"))
    if values.get("profile") != "path":
        of_path = [key for key in ("services", "app_address", "block_height") if values.get(key) not in (None, {})]
        problems += [Problem((key,), "needs profile = 'path': only PATH has services") for key in of_path]
    return values, problems


__all__ = ["POLICIES", "PROFILES", "SETTINGS", "TLS", "Address", "Path", "Problem", "ServeConfig", "check_all"]

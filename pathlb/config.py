"""Every setting of a balancer in one place: those of the core, and those of the shell around it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from .core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart, check_number
from .core.errors import ConfigError
from .core.model import Clock, Rng
from .core.policy import Policy
from .jsonrpc.config import JSONRPC

if TYPE_CHECKING:
    from .classify.base import Classifier
    from .profile import PATHProfile
    from .upstream.base import UpstreamFactory

DEADLINE = 30.0
"""Default total deadline of a request in seconds, over queue, attempts and waits."""

Idempotent = bool | Callable[[Any], bool | None] | None
"""`True` or `False` for every request, or a function of the request (the HTTP library's own object); None decides
nothing.
"""


@dataclass(frozen=True, slots=True)
class Health:
    """Active probes: `GET path` on every endpoint, every `interval` seconds (with up to `jitter` of it added).

    A reply with one of `statuses` within `timeout` seconds passes. `fall` failures in a row take an endpoint out,
    `rise` successes bring it back; while the results contradict the verdict the probes come every
    `changing_interval` seconds. The first result of all decides alone; with `wait` the first requests wait for it.

    `services` maps services (keys) to paths of their own: there one of `statuses` says that the endpoint serves the
    service, 503 that it does not; anything else, and no answer, says nothing. `block_height(service, body)` reads the
    service's block height out of such an answer, if it is there.
    """

    path: str
    statuses: Collection[int] = frozenset({200, 204})
    interval: float = 5.0
    changing_interval: float = 1.0
    timeout: float = 1.0
    rise: int = 2
    fall: int = 2
    jitter: float = 0.1
    wait: bool = True
    services: Mapping[str, str] = field(default_factory=dict)
    block_height: Callable[[str, bytes], int | None] | None = None

    def __post_init__(self) -> None:
        _check_target("Health.path", self.path)
        if not isinstance(self.services, Mapping):
            raise ConfigError("Health.services", f"must map services to paths, not {self.services!r}")
        for key, path in self.services.items():
            _check_target(f"Health.services[{key!r}]", path)
        if self.block_height is not None and not callable(self.block_height):
            raise ConfigError("Health.block_height", f"must be a function, not {self.block_height!r}")
        if not isinstance(self.statuses, Collection) or isinstance(self.statuses, str | bytes) or not self.statuses:
            raise ConfigError("Health.statuses", f"must be a set of at least one status, not {self.statuses!r}")
        for status in self.statuses:  # before they are in a set, which not everything can be
            check_number("Health", "statuses", status, 200, 599, whole=True)
        object.__setattr__(self, "statuses", frozenset(self.statuses))
        for name in ("interval", "changing_interval", "timeout"):
            check_number("Health", name, getattr(self, name), 1e-3)
        check_number("Health", "rise", self.rise, 1, whole=True)
        check_number("Health", "fall", self.fall, 1, whole=True)
        check_number("Health", "jitter", self.jitter, 0, 1)
        if not isinstance(self.wait, bool):
            raise ConfigError("Health.wait", f"must be True or False, not {self.wait!r}")
        if self.changing_interval > self.interval:
            raise ConfigError("Health.changing_interval", f"must be at most interval ({self.interval:g} s)")


def _check_target(name: str, path: object) -> None:
    if not isinstance(path, str) or not path.startswith("/") or not path.isascii() or any(ch <= " " for ch in path):
        raise ConfigError(name, f"must start with / and be a valid request target, not {path!r}")


class BalancerOptions(TypedDict, total=False):
    """The keyword arguments of `Balancer`, which the clients pass on."""

    policy: Policy
    breaker: Breaker
    outlier: Outlier | None
    panic: Panic
    slow_start: SlowStart
    retry: Retry
    limits: Limits
    deadline: float
    health: Health | None
    idempotent: Idempotent
    classifier: Classifier
    jsonrpc: JSONRPC
    block_height: BlockHeight
    profile: PATHProfile | str
    telemetry: bool
    upstream: UpstreamFactory
    clock: Clock
    rng: Rng


def check_options(
    policy: object,
    breaker: object,
    outlier: object,
    panic: object,
    slow_start: object,
    retry: object,
    limits: object,
    deadline: object,
    health: object,
    idempotent: object,
    upstream: object,
) -> None:
    """Raise `ConfigError` for a keyword argument of `Balancer` that is not what it should be."""
    check_number("", "deadline", deadline, 1e-6, 1e9)
    _check_kind("breaker", breaker, Breaker)
    _check_kind("panic", panic, Panic)
    _check_kind("slow_start", slow_start, SlowStart)
    _check_kind("retry", retry, Retry)
    if limits is not None:
        _check_kind("limits", limits, Limits, " (httpx's own pool limits have no effect: pathlb's pools never queue)")
    if outlier is not None:
        _check_kind("outlier", outlier, Outlier)
    if health is not None:
        _check_kind("health", health, Health)
    picks = callable(getattr(policy, "pick", None)) and hasattr(policy, "name") and not isinstance(policy, type)
    if policy is not None and not picks:
        raise ConfigError("policy", f"must be an object with a name and a pick method, not {policy!r}")
    if upstream is not None and not callable(upstream):
        raise ConfigError("upstream", f"must be a function from an Endpoint to an Upstream, not {upstream!r}")
    if idempotent is not None and not isinstance(idempotent, bool) and not callable(idempotent):
        raise ConfigError("idempotent", f"must be a bool or a function of the request, not {idempotent!r}")


def check_meaning(classifier: object, jsonrpc: object, block_height: object, retry: Retry) -> None:
    """The same for what gives replies and requests their meaning."""
    if classifier is not None:
        for method in ("key", "reply", "failure"):
            if isinstance(classifier, type) or not callable(getattr(classifier, method, None)):
                raise ConfigError("classifier", f"must be an object with a {method} method, not {classifier!r}")
        if retry.statuses != Retry().statuses:
            raise ConfigError("retry.statuses", "are the default classifier's; tell yours which are worth a retry")
    if block_height is not None:
        _check_kind("block_height", block_height, BlockHeight)
    if jsonrpc is not None:
        _check_kind("jsonrpc", jsonrpc, JSONRPC)


def _check_kind(name: str, value: object, kind: type, hint: str = "") -> None:
    if not isinstance(value, kind):
        raise ConfigError(name, f"must be a pathlb.{kind.__name__}, not {type(value).__name__}{hint}")

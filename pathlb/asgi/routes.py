"""Which balancer a request goes to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..balancer import Balancer
from ..core.errors import ConfigError
from ..exchange import Headers
from .headers import TAKEN_OUT, is_field, is_host
from .targets import Prefix, check_inside, check_path, strip


@dataclass(frozen=True, slots=True)
class Route:
    """Requests that meet all conditions given go to `balancer`.

    - `path`: a prefix, whole segments of it, however it is percent-encoded; `strip` takes it off before the request
      goes out (default False).
    - `host`: the Host, without port, any case.
    - `header`: a field and its value, `("Target-Service-Id", "eth")`, or the field alone: it is there. Fields that the
      gateway takes out or sets itself (Host, X-Forwarded-For and the like) are not looked at.

    Raises `ConfigError`.
    """

    balancer: Balancer
    path: str = "/"
    host: str | None = None
    header: tuple[str, str] | str | None = None
    strip: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.balancer, Balancer):
            raise ConfigError("Route.balancer", f"must be a pathlb.Balancer, not {type(self.balancer).__name__}")
        check_path("Route.path", self.path)
        if self.host is not None and not _is_name(self.host):
            raise ConfigError("Route.host", f"must be a name without a port, not {self.host!r}")
        header = self.header
        pair = (header, "") if isinstance(header, str) else header
        if pair is None:
            return
        if not isinstance(pair, tuple) or len(pair) != 2 or not is_field(*pair):
            raise ConfigError("Route.header", f"must be a field's name, or (name, value), not {header!r}")
        if pair[0].lower().encode("ascii") in TAKEN_OUT:
            raise ConfigError("Route.header", f"{pair[0]} is about the way to here, and does not lead any further")


class Destination(NamedTuple):
    """Where a request goes, with the target to send."""

    balancer: Balancer
    target: bytes


class Router:
    """The first route that fits, else the default one. Routes with the longer path come first, else in their order."""

    def __init__(self, routes: Iterable[Route], default: Balancer | None) -> None:
        self._default = default
        self._rules = sorted((_Rule(route) for route in routes), key=lambda rule: -rule.length)
        if default is None and not self._rules:
            raise ConfigError("balancer", "is needed where there are no routes")

    @property
    def balancers(self) -> list[Balancer]:
        """All of them, each once."""
        every = [rule.balancer for rule in self._rules]
        if self._default is not None:
            every.insert(0, self._default)
        return list(dict.fromkeys(every))

    def find(self, target: bytes, host: bytes, headers: Headers) -> Destination | None:
        """Where it goes; None when no route fits and there is no default. Raises `BadRequest`."""
        for rule in self._rules:
            if rule.fits(target, host, headers):
                return Destination(rule.balancer, rule.rest(target))
        return None if self._default is None else Destination(self._default, target)


class _Rule:
    def __init__(self, route: Route) -> None:
        self.balancer = route.balancer
        self._prefix = Prefix(route.path)
        self.length = len(self._prefix.plain)
        self._strip = route.strip
        self._host = route.host.lower().encode("idna") if route.host is not None else None
        name, value = route.header if isinstance(route.header, tuple) else (route.header, None)
        self._field = name.lower().encode("ascii") if name is not None else None
        self._value = value.encode("latin-1") if value is not None else None

    def fits(self, target: bytes, host: bytes, headers: Headers) -> bool:
        if self.length and self._prefix.end(target) < 0:
            return False
        if self._host is not None and _without_port(host).lower() != self._host:
            return False
        if self._field is None:
            return True
        return any(name == self._field and self._value in (None, value) for name, value in headers)

    def rest(self, target: bytes) -> bytes:
        if not self._strip:
            return target
        rest = strip(self._prefix, target)
        check_inside(rest)
        return rest


def _is_name(host: object) -> bool:
    if not isinstance(host, str) or not host:
        return False
    if host.startswith("["):
        return host.endswith("]") and is_host(host)
    try:
        return ":" not in host and is_host(host.encode("idna").decode("ascii"))
    except UnicodeError:
        return False


def _without_port(host: bytes) -> bytes:
    return host.partition(b"]")[0] + b"]" if host.startswith(b"[") else host.partition(b":")[0]

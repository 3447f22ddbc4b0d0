"""The nouns every part of the core shares: Endpoint, Sent, Cause, Outcome, the clock and the random numbers."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol
from urllib.parse import SplitResult, urlsplit

from .errors import ConfigError


class Clock(Protocol):
    """Seconds on a monotonic clock; only differences mean anything."""

    def __call__(self) -> float: ...


class Rng(Protocol):
    """What the core needs of `random.Random`."""

    def random(self) -> float: ...

    def randrange(self, stop: int, /) -> int: ...


_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One instance of the gateway: where it is and how much of the load it should get.

    `url` is `http://host[:port][/base/path]`, `https://...` or `unix:///path/to.sock`; IPv6 hosts go in brackets.
    `weight` is relative to the other endpoints (default 1). `metadata` is the caller's own, shown in snapshots.
    `server_hostname` is the name TLS asks for and verifies (default: the host of the URL).

    Two endpoints are the same endpoint when their URLs are. Raises `ConfigError`.
    """

    url: str
    weight: float = field(default=1.0, compare=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    server_hostname: str | None = field(default=None, compare=False)

    scheme: str = field(init=False, compare=False, repr=False)
    host: str = field(init=False, compare=False, repr=False)
    port: int = field(init=False, compare=False, repr=False)
    authority: bytes = field(init=False, compare=False, repr=False)
    """What goes into the Host header: host, and the port where it is not the scheme's own."""
    base_path: bytes = field(init=False, compare=False, repr=False)
    """Prefix of every target, without a trailing slash; `b""` for most."""
    uds: str | None = field(init=False, compare=False, repr=False)
    """Path of the unix socket, if it is one."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        if not isinstance(self.url, str):
            raise ConfigError("Endpoint.url", f"must be a string, not {type(self.url).__name__}")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ConfigError("Endpoint.weight", f"must be a finite number above 0, not {weight!r}")
        if self.server_hostname is not None and not (isinstance(self.server_hostname, str) and self.server_hostname):
            raise ConfigError("Endpoint.server_hostname", "must be a name; leave it out for the URL's host")
        if not isinstance(self.metadata, Mapping):
            raise ConfigError("Endpoint.metadata", f"must be a mapping, not {type(self.metadata).__name__}")
        put(self, "metadata", MappingProxyType(dict(self.metadata)))
        parts = _split(self.url)
        if parts.scheme == "unix":
            put(self, "scheme", "http")
            put(self, "host", "localhost")
            put(self, "port", 80)
            put(self, "authority", b"localhost")
            put(self, "base_path", b"")
            put(self, "uds", parts.path)
            put(self, "url", f"unix://{parts.path}")
            return
        host = _ascii_host(parts)
        port = _port(parts)
        shown = f"[{host}]" if ":" in host else host
        if port != _DEFAULT_PORTS[parts.scheme]:
            shown = f"{shown}:{port}"
        base_path = parts.path.rstrip("/")
        put(self, "scheme", parts.scheme)
        put(self, "host", host)
        put(self, "port", port)
        put(self, "authority", shown.encode("ascii"))
        put(self, "base_path", base_path.encode("ascii"))
        put(self, "uds", None)
        put(self, "url", f"{parts.scheme}://{shown}{base_path}")


_URL = "Endpoint.url"


def _split(url: str) -> SplitResult:
    """Split, and refuse what an endpoint must not carry. No message repeats what may be a secret."""
    if any(ch <= " " or ch == "\x7f" for ch in url):
        raise ConfigError(_URL, "must not contain spaces or control characters")
    shown = "it" if "@" in url else repr(url.split("?")[0].split("#")[0])
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(_URL, f"{shown} is not a URL") from None
    if "@" in parts.netloc:
        raise ConfigError(_URL, "must not contain user info; give credentials as auth= or as a header")
    if parts.scheme not in ("http", "https", "unix"):
        raise ConfigError(_URL, f"{shown} must start with http://, https:// or unix://")
    if "?" in url or "#" in url:
        raise ConfigError(_URL, f"{shown} must not have a query or a fragment")
    if parts.scheme == "unix":
        if parts.netloc or not parts.path.startswith("/") or parts.path == "/":
            raise ConfigError(_URL, f"{shown} must name a socket by its absolute path: unix:///run/gw.sock")
        return parts
    if not parts.netloc:
        raise ConfigError(_URL, f"{shown} has no host")
    if not parts.path.isascii():
        raise ConfigError(_URL, f"{shown}: percent-encode the path")
    return parts


def _ascii_host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    try:
        host = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        host = ""
    if not host or not all(ch.isalnum() or ch in "-._:%" for ch in host):
        raise ConfigError(_URL, f"{parts.geturl()!r} has an invalid host")
    return host


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port is None and not parts.netloc.endswith(":"):
        return _DEFAULT_PORTS[parts.scheme]
    if not port:
        raise ConfigError(_URL, f"{parts.geturl()!r} has an invalid port; use 1 to 65535")
    return port


class Sent(enum.Enum):
    """Whether the endpoint can have seen the request."""

    NOT_SENT = "not sent"
    """Provably no byte of it reached the endpoint: safe to send again, whatever it is."""
    MAYBE_SENT = "maybe sent"
    """It reached the endpoint, or nobody can tell."""


class Cause(enum.Enum):
    """Who an outcome speaks about. `SIGNALS` says what each one moves."""

    OK = "ok"
    INSTANCE = "instance fault"
    SERVICE = "service fault"
    BEYOND = "fault beyond the instance"
    OVERLOAD = "overload"
    REQUEST = "request fault"
    CANCELLED = "cancelled by the caller"
    GIVEN_UP = "given up by the balancer"
    HEDGE_LOST = "hedge lost"
    LOCAL = "local fault"

    # Members are singletons: their identity is a cheaper hash than the one of their name.
    __hash__ = object.__hash__


class Mark(enum.Enum):
    """How one signal counts one outcome."""

    SUCCESS = "success"
    FAILURE = "failure"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class Signals:
    """Which signal counts a cause, and as what."""

    breaker: Mark
    outlier: Mark
    latency: bool
    """Whether the time to the reply head says anything about the endpoint."""


SIGNALS: Mapping[Cause, Signals] = MappingProxyType(
    {
        Cause.OK: Signals(Mark.SUCCESS, Mark.SUCCESS, True),
        Cause.INSTANCE: Signals(Mark.FAILURE, Mark.FAILURE, False),
        # The instance is fine, one service on it is not: the breaker it counts for is the one of its scope.
        Cause.SERVICE: Signals(Mark.FAILURE, Mark.FAILURE, False),
        # Something behind the instance: only an outlier if the peers do not see it too.
        Cause.BEYOND: Signals(Mark.IGNORE, Mark.FAILURE, False),
        # "Not now" is load, not death (pitfall 9): it lengthens no failure count and proves nothing broken either.
        Cause.OVERLOAD: Signals(Mark.IGNORE, Mark.IGNORE, False),
        # A refused request is an endpoint that works.
        Cause.REQUEST: Signals(Mark.SUCCESS, Mark.SUCCESS, True),
        Cause.CANCELLED: Signals(Mark.IGNORE, Mark.IGNORE, False),
        Cause.GIVEN_UP: Signals(Mark.IGNORE, Mark.IGNORE, False),
        Cause.HEDGE_LOST: Signals(Mark.IGNORE, Mark.IGNORE, False),
        Cause.LOCAL: Signals(Mark.IGNORE, Mark.IGNORE, False),
    }
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt ended, once its reply head or its failure is known."""

    cause: Cause
    sent: Sent = Sent.MAYBE_SENT
    retry: bool = False
    """Whether another endpoint may do better."""
    once: bool = False
    """Of such outcomes, one a request is enough: what failed retries by itself, and each attempt multiplies that."""
    unprocessed: bool = False
    """The endpoint says it did nothing with the request: safe to send elsewhere, whatever it is."""
    trip: bool = False
    """One such failure is proof: the breaker opens at once."""
    retry_after: float | None = None
    """Seconds the reply asked to wait, if it did."""
    status: int | None = None
    """Status of the reply; None when there was none."""
    key: str | None = None
    """The part of the endpoint the outcome speaks about (a service id); None for all of it."""
    detail: str = ""
    """One line for people: the error, or what in the reply decided."""
    relays: int | None = None
    """Requests the endpoint made behind itself for this one, its own retries included, where it says so."""

"""What both adapters share: from what a caller wrote to an exchange.Request, and back; no HTTP library's types."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from ..balancer import Balancer
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..errors import UsageError
from ..exchange import Headers, OneShotBody, Reply, Request, Timeouts

PLACEHOLDER = "pathlb.invalid"
"""Host of the logical origin when the caller names none; `.invalid` never resolves (RFC 2606)."""

_PLACEHOLDER = PLACEHOLDER.encode("ascii")
_BEFORE_UPGRADE = {"ws": "http", "wss": "https"}  # what a WebSocket's handshake is
_DEFAULT_PORTS = {"http": 80, "https": 443}
_TAKEN_OVER = ("timeout", "pathlb", "target")  # of the extensions; the target needs the endpoint's base path
_OPTIONS = ("deadline", "idempotent", "pin", "avoid", "key")
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_TIMEOUTS = Timeouts(None, None, None, None)


class Translator:
    """Translates for one transport.

    `host` overrides the Host header. `origin` (scheme, authority) is the only origin accepted beside the endpoints'
    own; None accepts every one as a logical host.
    """

    def __init__(self, balancer: Balancer, *, host: str | None, origin: tuple[str, bytes] | None) -> None:
        if not isinstance(balancer, Balancer):
            raise ConfigError("balancer", f"must be a pathlb.Balancer, not {type(balancer).__name__}")
        if host is not None and not _is_host(host):
            raise ConfigError("host", f"must be a host name with or without a port, not {host!r}")
        self._balancer = balancer
        self._host = host.encode("ascii") if host is not None else None
        self._origin = origin

    def request(
        self,
        method: str,
        scheme: str,
        authority: bytes,
        target: bytes,
        raw_headers: Headers,
        body: bytes | OneShotBody,
        extensions: Mapping[str, Any],
    ) -> Request:
        """The request in pathlb's terms. `authority` is that of the URL; `raw_headers` include Host."""
        host: bytes | None
        if raw_headers and raw_headers[0][0] == b"Host":
            host, headers = raw_headers[0][1], raw_headers[1:]
        else:
            host = next((value for name, value in raw_headers if name.lower() == b"host"), authority)
            headers = [pair for pair in raw_headers if pair[0].lower() != b"host"]
        if "target" in extensions:
            target = _target(extensions["target"])
        scheme = _BEFORE_UPGRADE.get(scheme, scheme)
        bases = self._balancer.bases.get((scheme, authority))
        if bases is not None:
            target = _below_base(authority, target, bases)
        elif self._origin is not None and (scheme, authority) != self._origin:
            raise UsageError(
                f"{scheme}://{authority.decode('ascii')} is neither the client's base_url nor one of its endpoints; "
                "nothing was sent. Use a relative URL to reach the gateways, another client or mounts= for other hosts"
            )
        if self._host is not None:
            host = self._host
        elif host == authority and (bases is not None or authority == _PLACEHOLDER):
            host = None  # not a name the caller chose: the endpoint's own
        rest = {name: value for name, value in extensions.items() if name not in _TAKEN_OVER}
        timeout = extensions.get("timeout")
        request = Request(
            method,
            target,
            headers,
            body,
            host=host,
            timeouts=_timeouts(timeout) if timeout else _NO_TIMEOUTS,
            extensions=rest,
        )
        options = extensions.get("pathlb")
        if options is not None:
            _apply_options(request, options)
        return request

    def redirect_headers(self, reply: Reply, scheme: str, authority: bytes) -> Headers:
        """The headers of a redirect; `scheme` and `authority` are those of the URL of the request.

        One to an endpoint's own address is made relative, so that following it comes back into the balance, to the
        origin the caller knows and with the credentials meant for it.
        """
        # A caller that named an endpoint's own URL names its base path too.
        own = self._balancer.bases.get((scheme, authority), (b"",))[0]
        served = self._balancer.base_path(reply.attempts[-1].endpoint) if reply.attempts else b""
        return [
            (name, self._relative(value, own, served) if name.lower() == b"location" else value)
            for name, value in reply.headers
        ]

    def _relative(self, location: bytes, own: bytes, served: bytes) -> bytes:
        known = self._balancer.bases
        try:
            parts = urlsplit(location.decode("ascii"))
            origin = _origin(parts)
        except ValueError:
            return location
        if parts.netloc:
            bases = known.get(origin, ()) if parts.scheme else _all_bases(known, origin[1])
        elif parts.scheme:
            return location
        else:
            bases = (served,) if served else ()  # relative to the endpoint that sent it
        path = (parts.path or "/").encode("ascii")
        for base in bases:
            if _is_below(path, base):
                # Two leading slashes would make the path a host.
                path = own + b"/" + path[len(base) :].lstrip(b"/")
                return parts._replace(scheme="", netloc="", path=path.decode("ascii")).geturl().encode("ascii")
        return location


def _is_host(value: Any) -> bool:
    if not isinstance(value, str) or not value or not value.isascii():
        return False
    return not any(ch <= " " or ch in "/@?#\x7f" for ch in value)


def _target(value: Any) -> bytes:
    """httpcore's own extension: a request target as it is to go out, dot segments and all."""
    if not isinstance(value, bytes) or not value:
        raise ConfigError('extensions["target"]', f"must be the bytes of a request target, not {value!r}")
    return value


def _below_base(authority: bytes, target: bytes, bases: tuple[bytes, ...]) -> bytes:
    """The target as seen from below the base path it is in; the most specific one comes first in `bases`."""
    path = target.partition(b"?")[0]
    for base in bases:
        if _is_below(path, base):
            rest = target[len(base) :]
            return rest if rest.startswith(b"/") else b"/" + rest
    shown = " or ".join(base.decode("ascii") for base in bases)
    raise UsageError(
        f"{path.decode('ascii')} on {authority.decode('ascii')} is outside the base path of the endpoint there, "
        f"{shown}, and nothing was sent"
    )


def _origin(parts: SplitResult) -> tuple[str, bytes]:
    """Scheme and authority of a Location, as an endpoint's are written. Raises ValueError for a bad port."""
    host, port = (parts.hostname or ""), parts.port
    shown = f"[{host}]" if ":" in host else host
    if port is not None and port != _DEFAULT_PORTS.get(parts.scheme):
        shown = f"{shown}:{port}"
    return parts.scheme, shown.encode("ascii")


def _all_bases(known: Mapping[tuple[str, bytes], tuple[bytes, ...]], authority: bytes) -> tuple[bytes, ...]:
    """The base paths at an authority given without a scheme."""
    return tuple(base for (_, name), bases in known.items() if name == authority for base in bases)


def _is_below(path: bytes, base: bytes) -> bool:
    return path == base or path.startswith(base + b"/")


def _timeouts(timeout: Mapping[str, Any]) -> Timeouts:
    get = timeout.get
    return Timeouts(get("connect"), get("read"), get("write"), get("pool"))


def _apply_options(request: Request, options: Any) -> None:
    """Take over `extensions={"pathlb": {...}}`."""
    if not isinstance(options, Mapping):
        raise ConfigError('extensions["pathlb"]', f"must be a dict, not {type(options).__name__}")
    for name, value in options.items():
        where = f'extensions["pathlb"]["{name}"]'
        if name == "deadline":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(where, f"must be seconds above 0, not {value!r}")
            request.deadline = float(value)
        elif name == "idempotent":
            if not isinstance(value, bool):
                raise ConfigError(where, f"must be a bool, not {value!r}")
            request.idempotent = value
        elif name == "pin":
            request.pin = _endpoint_url(where, value)
        elif name == "avoid":
            values = [value] if isinstance(value, str | Endpoint) else value
            if not isinstance(values, Collection):
                raise ConfigError(where, f"must be endpoint URLs, not {value!r}")
            request.avoid = frozenset(_endpoint_url(where, one) for one in values)
        elif name == "key":
            if not isinstance(value, str):
                raise ConfigError(where, f"must be a string, not {value!r}")
            request.key = value
        else:
            raise ConfigError(where, f"is unknown; the keys are {', '.join(_OPTIONS)}")


def _endpoint_url(where: str, value: Any) -> str:
    try:
        return value.url if isinstance(value, Endpoint) else Endpoint(value).url
    except ConfigError as exc:
        raise ConfigError(where, exc.problem) from None

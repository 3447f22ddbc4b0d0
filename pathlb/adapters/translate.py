"""What both adapters share: from what a caller wrote to an exchange.Request, and back; no HTTP library's types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ..balancer import Balancer
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..errors import UsageError
from ..exchange import Headers, OneShotBody, Reply, Request, Timeouts

PLACEHOLDER = "pathlb.invalid"
"""Host of the logical origin when the caller names none; `.invalid` never resolves (RFC 2606)."""

_OPTIONS = ("deadline", "idempotent", "pin", "avoid")
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_TIMEOUTS = Timeouts(None, None, None, None)


class Translator:
    """Translates for one transport.

    `host` overrides the Host header. `origin` (scheme, authority) is the only origin accepted beside the endpoints'
    own; None accepts every one as a logical host.
    """

    def __init__(self, balancer: Balancer, *, host: str | None, origin: tuple[str, bytes] | None) -> None:
        if not isinstance(balancer, Balancer):
            raise ConfigError("balancer", f"must be a pathlb.Balancer, not {type(balancer).__name__}")
        if host is not None and (not host or not host.isascii() or any(ch <= " " or ch in "/@?#" for ch in host)):
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
        bases = self._balancer.bases
        host: bytes | None
        if raw_headers and raw_headers[0][0] == b"Host":
            host, headers = raw_headers[0][1], raw_headers[1:]
        else:
            host = next((value for name, value in raw_headers if name.lower() == b"host"), authority)
            headers = [pair for pair in raw_headers if pair[0].lower() != b"host"]
        if authority in bases:
            target = self._below_base(authority, target, bases[authority])
        elif self._origin is not None and (scheme, authority) != self._origin:
            raise UsageError(
                f"{scheme}://{authority.decode('ascii')} is neither the client's base_url nor one of its endpoints; "
                "nothing was sent. Use a relative URL to reach the gateways, another client or mounts= for other hosts"
            )
        if self._host is not None:
            host = self._host
        elif host == authority and (authority in bases or authority == PLACEHOLDER.encode()):
            host = None  # not a name the caller chose: the endpoint's own
        rest = {name: value for name, value in extensions.items() if name not in ("timeout", "pathlb")}
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

    def reply_headers(self, reply: Reply) -> Headers:
        """The reply's headers; a redirect to an endpoint's own address is made relative, so that following it comes
        back into the balance, to the origin the caller knows and with the credentials meant for it.
        """
        if reply.status not in _REDIRECTS:
            return reply.headers
        return [
            (name, self._relative(value)) if name.lower() == b"location" else (name, value)
            for name, value in reply.headers
        ]

    def _relative(self, location: bytes) -> bytes:
        bases = self._balancer.bases
        try:
            parts = urlsplit(location.decode("ascii"))
        except ValueError:
            return location
        if parts.netloc:
            authority = parts.netloc.encode("ascii")
            if parts.scheme not in ("http", "https", "") or authority not in bases:
                return location
            base = bases[authority]
        else:
            base = next((base for base in bases.values() if base and _is_below(parts.path.encode(), base)), b"")
            if not base:
                return location
        path = parts.path or "/"
        if not _is_below(path.encode("ascii"), base):
            return location
        path = path[len(base) :] or "/"
        # Two leading slashes would make the path a host.
        return parts._replace(scheme="", netloc="", path="/" + path.lstrip("/")).geturl().encode("ascii")

    @staticmethod
    def _below_base(authority: bytes, target: bytes, base: bytes) -> bytes:
        if not base:
            return target
        if not _is_below(target.partition(b"?")[0], base):
            raise UsageError(
                f"{target.decode('ascii')} on {authority.decode('ascii')} is outside the endpoints' base path "
                f"{base.decode('ascii')}, and nothing was sent"
            )
        rest = target[len(base) :]
        return rest if rest.startswith(b"/") else b"/" + rest


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
            request.pin = _endpoint_url(value)
        elif name == "avoid":
            values = [value] if isinstance(value, str | Endpoint) else value
            request.avoid = frozenset(_endpoint_url(one) for one in values)
        else:
            raise ConfigError(where, f"is unknown; the keys are {', '.join(_OPTIONS)}")


def _endpoint_url(value: Any) -> str:
    return value.url if isinstance(value, Endpoint) else Endpoint(value).url

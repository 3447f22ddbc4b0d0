"""The settings of the HTTP/1.1 connection pool."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass

from ...core.config import check_number
from ...core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pool:
    """How connections to one endpoint are kept, and what a reply may look like.

    - `keepalive_expiry`: seconds a connection may be idle and still be used (default 4: shorter than the 5 s after
      which uvicorn, Node and Apache close theirs, so that no request crosses the end).
    - `max_lifetime`: seconds after which a connection is not used again, up to a tenth less by chance so that those
      made together do not end together (default 3600, nginx's `keepalive_time`; `math.inf` for no limit).
    - `min_connections`: idle or in use, opened ahead and kept open (default 0).
    - `max_connections`: a hard limit (default None). Nothing waits for a connection here: beyond it an attempt fails
      as not sent. `Limits(concurrency=...)` is where requests queue; this is a fuse above it.
    - `local_address`: the local IP address to connect from (default: the system's choice).
    - `max_head`: bytes of a reply head, and of what a chunked body may bring beside its data (default 102,400, as
      httpx's); `max_fields`: its header fields (default 1,000); `max_informational`: 1xx replies before it (default
      100). More is a `RemoteProtocolError`.
    - `buffer`: bytes of a body held for a slow reader before the connection is not read any more (default 65,536; one
      read, of as much, may come on top).

    Raises `ConfigError`.
    """

    keepalive_expiry: float = 4.0
    max_lifetime: float = 3600.0
    min_connections: int = 0
    max_connections: int | None = None
    local_address: str | None = None
    max_head: int = 102_400
    max_fields: int = 1_000
    max_informational: int = 100
    buffer: int = 65_536

    def __post_init__(self) -> None:
        check_number("Pool", "keepalive_expiry", self.keepalive_expiry, 0)
        check_number("Pool", "max_lifetime", self.max_lifetime, 1e-3)
        check_number("Pool", "min_connections", self.min_connections, 0, whole=True)
        if self.max_connections is not None:
            check_number("Pool", "max_connections", self.max_connections, 1, whole=True)
            if self.min_connections > self.max_connections:
                raise ConfigError("Pool.min_connections", f"must not be above max_connections ({self.max_connections})")
        for name in ("max_head", "max_fields", "buffer"):
            check_number("Pool", name, getattr(self, name), 1, math.inf, whole=True)
        check_number("Pool", "max_informational", self.max_informational, 0, whole=True)
        if self.local_address is not None:
            try:
                ipaddress.ip_address(self.local_address)
            except ValueError as exc:
                raise ConfigError("Pool.local_address", f"must be an IP address ({exc})") from None

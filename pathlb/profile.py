"""Everything a balancer in front of PATH, Pocket Network's gateway, should be set to, in one object."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .classify.path import PATHClassifier
from .config import Health
from .core.config import BlockHeight, Limits
from .core.errors import ConfigError
from .exchange import Headers, Request, Timeouts
from .jsonrpc import JSONRPC
from .jsonrpc.text import parse_answer
from .upstream.http1 import Pool

RPC_TYPES = ("json_rpc", "rest", "comet_bft", "websocket", "grpc")
"""What PATH takes as `RPC-Type`."""

PATH_JSONRPC = JSONRPC(max_body=75 * 2**20, max_batch=5_500)
"""PATH's limits on a body (router.max_request_body_bytes) and on a batch (max_batch_payloads)."""

_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PATHProfile:
    """Settings for balancing over PATH gateways; what is given to the balancer itself counts before them.

    - `services`: the service ids used through this balancer, or a mapping from them to their `RPC-Type`, which saves
      PATH from detecting it (and from cutting bodies over 100 KB of services that have several). With one service
      alone requests without a `Target-Service-Id` get it. Each one is probed at `/ready/{service}`, endpoints at
      `/health`.
    - `app_address`: for delegated mode: the `App-Address` of requests without one. There `/ready` is never ready, and
      no service is probed.
    - `probes`: False for no active probes.
    - `jsonrpc`: method rules, size limits, sticky filters, splitting (default: PATH's limits).
    - `block_height`: prefer instances that are not behind, by what their readiness tells (default None).

    The rest it sets: `PATHClassifier`; `Limits.generous()`; read timeout 12 s (a relay may take 10, and one more after
    half a second); connections kept for 100 s idle (PATH: 120). Raises `ConfigError`.
    """

    services: Collection[str] | Mapping[str, str] = ()
    app_address: str | None = None
    probes: bool = True
    jsonrpc: JSONRPC = PATH_JSONRPC
    block_height: BlockHeight | None = None

    classifier: PATHClassifier = field(default_factory=PATHClassifier, init=False, repr=False, compare=False)
    health: Health | None = field(init=False, repr=False, compare=False)
    limits: Limits = field(default=Limits.generous(), init=False, repr=False, compare=False)
    timeouts: Timeouts = field(default=Timeouts(read=12.0), init=False, repr=False, compare=False)
    pool: Pool = field(default=Pool(keepalive_expiry=100.0), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        services = self.services
        if isinstance(services, str) or not isinstance(services, Collection):
            raise ConfigError("PATHProfile.services", f"must be a list of service ids, not {services!r}")
        for service in services:
            if not isinstance(service, str) or not service.strip(".") or not _NAME.issuperset(service):
                raise ConfigError("PATHProfile.services", f"{service!r} is not a service id")
        if isinstance(services, Mapping):
            for service, rpc_type in services.items():
                if rpc_type not in RPC_TYPES:
                    known = ", ".join(RPC_TYPES)
                    raise ConfigError(f"PATHProfile.services[{service!r}]", f"must be one of {known}, not {rpc_type!r}")
        address = self.app_address
        if address is not None and not (isinstance(address, str) and address and _NAME.issuperset(address)):
            raise ConfigError("PATHProfile.app_address", f"{address!r} is not an address")
        for name, kind in (("probes", bool), ("jsonrpc", JSONRPC)):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"PATHProfile.{name}", f"must be a {kind.__name__}, not {getattr(self, name)!r}")
        if self.block_height is not None and not isinstance(self.block_height, BlockHeight):
            raise ConfigError("PATHProfile.block_height", f"must be a BlockHeight, not {self.block_height!r}")
        object.__setattr__(self, "health", self._make_health() if self.probes else None)

    def _make_health(self) -> Health:
        query = "" if self.block_height is None else "?detailed=true"
        paths = {} if self.app_address else {service: f"/ready/{service}{query}" for service in self.services}
        return Health("/health", services=paths, block_height=perceived_height if query else None)

    def prepare(self, request: Request) -> None:
        """Add what the caller left out of the headers PATH wants."""
        services = self.services
        if len(services) != 1 and self.app_address is None and not isinstance(services, Mapping):
            return
        given = {name.lower(): value for name, value in request.headers}
        added: Headers = []
        service = given.get(b"target-service-id", b"").decode("latin-1")
        if b"target-service-id" not in given and len(services) == 1:
            service = next(iter(services))
            added.append((b"Target-Service-Id", service.encode("ascii")))
        if isinstance(services, Mapping) and service in services and not given.keys() & {b"rpc-type", b"upgrade"}:
            added.append((b"RPC-Type", services[service].encode("ascii")))
        if self.app_address is not None and b"app-address" not in given:
            added.append((b"App-Address", self.app_address.encode("ascii")))
        if added:
            request.headers = request.headers + added


def perceived_height(service: str, body: bytes) -> int | None:
    """The block height in PATH's detailed readiness answer; None when it says nothing of it."""
    try:
        height = parse_answer(body)["services"][service]["perceived_block_height"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return height if isinstance(height, int) and not isinstance(height, bool) else None


def find_profile(given: PATHProfile | str | None) -> PATHProfile | None:
    """A profile by its name, or as it is. Raises `ConfigError`."""
    if given is None or isinstance(given, PATHProfile):
        return given
    if given == "path":
        return PATHProfile()
    raise ConfigError("profile", f"must be 'path' or a PATHProfile, not {given!r}")

"""What an emulated gateway is set to and what it reports."""

from __future__ import annotations

import enum
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal


class Mode(enum.Enum):
    """How a gateway behaves. `/health` follows the mode except where it says otherwise."""

    OK = "ok"
    """Replies 200 after the service time; `/health` at once."""
    SLOW = "slow"
    """As OK, with service times multiplied by `factor`; `/health` at once."""
    FAIL = "fail"
    """Replies `status` at once."""
    HANG = "hang"
    """Accepts and reads, never answers, not even what was in flight. Leaving the mode closes those connections.

    With PATH's services the request is relayed all the same: see RESET.
    """
    RESET = "reset"
    """Resets the connection once the request has been read; connections with requests in flight at once.

    With PATH's services the request is relayed first. The caller cannot tell a reset before the relay from one after
    it, and only after it is a second attempt at a write a second write.
    """
    REFUSE = "refuse"
    """Refuses connections and resets the ones it has. Its port stays its own and is listened on again afterwards."""
    THROTTLE = "throttle"
    """Replies 429 with `Retry-After: <retry_after>` at once; `/health` is a 200, the gateway itself being fine."""


class ServiceMode(enum.Enum):
    """How one service of a gateway that behaves like PATH fares. A supplier's failures are retried once by the gateway.

    OK, NO_SESSION, NOT_CONFIGURED, CHAIN_ERROR, SLOW and HANG befall requests; SUPPLIERS_FAIL, RATE_LIMITED and EMPTY
    befall relays, so that a `share` below 1 leaves some to the retry.
    """

    OK = "ok"
    """Relayed and answered by the chain."""
    NO_SESSION = "no_session"
    """500 with JSON-RPC error -31001 and an empty `X-Suppliers-Tried`: nothing was relayed. Not ready."""
    NOT_CONFIGURED = "not_configured"
    """400 `Service 'x' is not configured`. Not ready, and no longer part of plain `/ready`."""
    SUPPLIERS_FAIL = "suppliers_fail"
    """500 with JSON-RPC error -31001 and the suppliers listed. They reached the chain, and their answers were lost."""
    RATE_LIMITED = "rate_limited"
    """A supplier's 429, passed through. It did not reach the chain."""
    EMPTY = "empty"
    """200 with an empty body, as Solana's and Cosmos' services show a lost answer; the chain was reached."""
    CHAIN_ERROR = "chain_error"
    """200 with a JSON-RPC error: the chain refuses the call."""
    SLOW = "slow"
    """As OK, with service times multiplied by `factor`."""
    HANG = "hang"
    """Relayed and never answered, not even once the mode is left."""


@dataclass(frozen=True, slots=True)
class ServiceTime:
    """How long a gateway works on a request: `mean` seconds, spread as `shape` says."""

    mean: float
    shape: Literal["constant", "exponential", "lognormal"] = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.mean < math.inf:
            raise ValueError(f"the mean service time must be 0 seconds or more, not {self.mean!r}")

    @classmethod
    def constant(cls, mean: float) -> ServiceTime:
        """Always `mean` seconds; 0 is an immediate reply."""
        return cls(mean, "constant")

    @classmethod
    def exponential(cls, mean: float) -> ServiceTime:
        """Exponential with that mean in seconds."""
        return cls(mean, "exponential")

    @classmethod
    def lognormal(cls, mean: float) -> ServiceTime:
        """Lognormal with that mean in seconds and sigma 1: a median of 0.61 means, a 99th percentile of 6.2."""
        return cls(mean, "lognormal")

    def sample(self, rng: random.Random) -> float:
        """Seconds for one request."""
        if self.shape == "constant" or self.mean == 0:
            return self.mean
        if self.shape == "exponential":
            return rng.expovariate(1 / self.mean)
        return rng.lognormvariate(math.log(self.mean) - 0.5, 1)


DEFAULT_SERVICE_TIME = ServiceTime(0.01)


@dataclass(frozen=True, slots=True)
class Stats:
    """A gateway's counters at one moment, since it started."""

    requests: int = 0
    """Request heads fully read, `/health` included."""
    by_path: Counter[str] = field(default_factory=Counter)
    """`requests` by path, without the query."""
    by_status: Counter[int] = field(default_factory=Counter)
    """Replies sent, by status."""
    in_flight: int = 0
    """Requests read and not answered, whose connection is still open."""
    max_in_flight: int = 0
    """The most `in_flight` has been."""
    open_connections: int = 0
    connections: int = 0
    """Connections accepted."""
    seen: Counter[bytes] = field(default_factory=Counter)
    """How often each value of the `X-Request-Id` header arrived."""
    relays: int = 0
    """Relays sent to suppliers, the gateway's own retries included; 0 without PATH's services."""


@dataclass(frozen=True, slots=True)
class ReceivedRequest:
    """A request as it came over the wire, complete with its body (chunks joined)."""

    method: str
    target: bytes
    headers: list[tuple[bytes, bytes]]
    """Raw pairs in order, names in the case they were sent in."""
    body: bytes


@dataclass(frozen=True, slots=True)
class Settings:
    """What a gateway is built with.

    `host` and `port`: where to listen (default 127.0.0.1, a free port). `uds`: path of a unix socket to listen on
    instead. `service_time`: see `ServiceTime` (default a constant 0.01 seconds). `workers`: requests served at once
    (default None, unlimited). `queue`: requests that may wait for a worker, first come first served; beyond it they
    get 503 (default None, unlimited). `seed`: of the service times. `record`: keep the requests for `received()`.
    """

    name: str = "gateway"
    host: str = "127.0.0.1"
    port: int = 0
    uds: str | None = None
    service_time: ServiceTime = DEFAULT_SERVICE_TIME
    workers: int | None = None
    queue: int | None = None
    seed: int = 0
    record: bool = False

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be 1 or more, or None for no limit, not {self.workers!r}")
        if self.queue is not None and self.queue < 0:
            raise ValueError(f"queue must be 0 or more, or None for no limit, not {self.queue!r}")


@dataclass(frozen=True, slots=True)
class PathSettings(Settings):
    """What a gateway that behaves like PATH is built with, beside the rest.

    `services`: the ids of those it is configured for. `suppliers`: how many serve each of them (default 5, at least 2:
    a retry goes to another one).
    """

    services: tuple[str, ...] = ()
    suppliers: int = 5

    def __post_init__(self) -> None:
        Settings.__post_init__(self)
        if not self.services or not all(each and each.isascii() and each.isprintable() for each in self.services):
            raise ValueError(f"services must be ids of printable ASCII, at least one, not {self.services!r}")
        if self.suppliers < 2:
            raise ValueError(f"suppliers must be 2 or more, not {self.suppliers!r}")

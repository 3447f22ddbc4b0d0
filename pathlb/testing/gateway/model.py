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
    """Accepts and reads, never answers, not even what was in flight. Leaving the mode closes those connections."""
    RESET = "reset"
    """Resets the connection once the request has been read; connections with requests in flight at once."""
    REFUSE = "refuse"
    """Refuses connections and resets the ones it has. Its port stays its own and is listened on again afterwards."""
    THROTTLE = "throttle"
    """Replies 429 with `Retry-After: <retry_after>` at once; `/health` is a 200, the gateway itself being fine."""


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

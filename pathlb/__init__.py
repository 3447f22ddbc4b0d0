"""pathlb: client-side load balancing for HTTP gateways.

    async with pathlb.AsyncClient(["http://127.0.0.1:3069", "http://127.0.0.1:3070"]) as client:
        response = await client.post("/v1", json=payload)

`AsyncClient` is an `httpx.AsyncClient`; `BalancedTransport` goes under one you have; `Balancer` is what they share.
For httpx2 use the same names from `pathlb.httpx2`.
"""

from .adapters.httpx import AsyncClient, BalancedTransport
from .balancer import Balancer
from .config import Health
from .core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart
from .core.model import Endpoint
from .core.policy import P2C, LeastConnections, RoundRobin
from .errors import (
    ConfigError,
    DeadlineExceeded,
    NoEligibleEndpoint,
    PathlbError,
    QueueFull,
    QueueTimeout,
    RequestTooLarge,
    UpstreamError,
    UsageError,
)
from .jsonrpc import JSONRPC, Safety
from .profile import PATHProfile
from .upstream.default import Upstreams
from .upstream.http1 import Pool
from .upstream.transport import TransportUpstreams

__version__ = "0.1.0"

__all__ = [
    "JSONRPC",
    "P2C",
    "AsyncClient",
    "BalancedTransport",
    "Balancer",
    "BlockHeight",
    "Breaker",
    "ConfigError",
    "DeadlineExceeded",
    "Endpoint",
    "Health",
    "LeastConnections",
    "Limits",
    "NoEligibleEndpoint",
    "Outlier",
    "PATHProfile",
    "Panic",
    "PathlbError",
    "Pool",
    "QueueFull",
    "QueueTimeout",
    "RequestTooLarge",
    "Retry",
    "RoundRobin",
    "Safety",
    "SlowStart",
    "TransportUpstreams",
    "UpstreamError",
    "Upstreams",
    "UsageError",
]

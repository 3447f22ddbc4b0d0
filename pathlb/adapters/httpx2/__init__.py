"""pathlb under and as an httpx2 client."""

from .client import AsyncClient
from .errors import (
    CloseError,
    ConnectError,
    ConnectTimeout,
    DeadlineExceeded,
    LocalProtocolError,
    NoEligibleEndpoint,
    PoolTimeout,
    ProxyError,
    QueueFull,
    QueueTimeout,
    ReadError,
    ReadTimeout,
    RemoteProtocolError,
    RequestTooLarge,
    TransportError,
    UnsupportedProtocol,
    UsageError,
    WriteError,
    WriteTimeout,
)
from .transport import BalancedTransport

__all__ = [
    "AsyncClient",
    "BalancedTransport",
    "CloseError",
    "ConnectError",
    "ConnectTimeout",
    "DeadlineExceeded",
    "LocalProtocolError",
    "NoEligibleEndpoint",
    "PoolTimeout",
    "ProxyError",
    "QueueFull",
    "QueueTimeout",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "RequestTooLarge",
    "TransportError",
    "UnsupportedProtocol",
    "UsageError",
    "WriteError",
    "WriteTimeout",
]

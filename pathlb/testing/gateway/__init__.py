"""One emulated gateway: `Gateway`, its `Settings`, its `Mode` and what it reports."""

from __future__ import annotations

from .model import Mode, ReceivedRequest, ServiceMode, ServiceTime, Settings, Stats
from .server import DEFAULT_BODY, RECORD_LIMIT, Gateway

__all__ = [
    "DEFAULT_BODY",
    "RECORD_LIMIT",
    "Gateway",
    "Mode",
    "ReceivedRequest",
    "ServiceMode",
    "ServiceTime",
    "Settings",
    "Stats",
]

"""The settings for JSON-RPC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ..core.config import check_number
from ..core.errors import ConfigError
from .methods import Safety
from .transactions import find_keccak


@dataclass(frozen=True, slots=True)
class JSONRPC:
    """What is known of the JSON-RPC methods, and what is done beyond sending a request to one endpoint.

    `methods` adds to `DEFAULT_METHODS` and replaces entries of it: a method's name, or how it begins with a `*` at the
    end, to its `Safety`. It is looked at only when an attempt has failed, and costs a request that succeeds nothing.

    The others look into the bodies of POSTs before they are sent, and are off:

    - `sticky_filters`: calls for an Ethereum filter go to the endpoint that made it. Remembered are the last 10,000
      filters, each for 5 minutes since its last use, which is when geth forgets one (`eth/filters`, `deadline`).
    - `split`: a batch of more items than this, all of them reads, goes out in parts of at most so many, side by side,
      each to the endpoint the policy picks.
    - `max_batch` (items) and `max_body` (bytes): what the endpoints take. More raises `RequestTooLarge` before
      anything is sent; a batch that is split counts by its parts.
    - `resend_transactions`: `eth_sendRawTransaction` may be sent twice, since a chain takes a signed transaction once;
      an "already known" from the second endpoint becomes the success it stands for.

    Raises `ConfigError` for values that cannot work, and for `resend_transactions` without `pathlb[web3]`, whose
    Keccak-256 the hash of the transaction takes.
    """

    methods: Mapping[str, Safety] = field(default_factory=dict, hash=False)
    sticky_filters: bool = False
    split: int | None = None
    max_batch: int | None = None
    max_body: int | None = None
    resend_transactions: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.methods, Mapping):
            raise ConfigError("JSONRPC.methods", f"must be a mapping, not {type(self.methods).__name__}")
        for pattern, safety in self.methods.items():
            if not isinstance(pattern, str) or not pattern or "*" in pattern[:-1]:
                raise ConfigError("JSONRPC.methods", f"{pattern!r} must be a method's name, or a beginning and a *")
            if not isinstance(safety, Safety):
                raise ConfigError(f"JSONRPC.methods[{pattern!r}]", f"must be a pathlb.Safety, not {safety!r}")
        object.__setattr__(self, "methods", MappingProxyType(dict(self.methods)))
        for name in ("sticky_filters", "resend_transactions"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"JSONRPC.{name}", f"must be True or False, not {getattr(self, name)!r}")
        for name in ("split", "max_batch", "max_body"):
            if getattr(self, name) is not None:
                check_number("JSONRPC", name, getattr(self, name), 1, whole=True)
        if self.split is not None and self.max_batch is not None and self.split > self.max_batch:
            raise ConfigError("JSONRPC.split", f"must be at most max_batch ({self.max_batch})")
        if self.resend_transactions:
            try:
                find_keccak()
            except ImportError as exc:
                problem = f"needs Keccak-256: pip install 'pathlb[web3]' ({exc})"
                raise ConfigError("JSONRPC.resend_transactions", problem) from None

    @property
    def needs_body(self) -> bool:
        """Whether anything is set that looks into a body before it is sent."""
        limits = (self.split, self.max_batch, self.max_body)
        return self.sticky_filters or self.resend_transactions or any(limit is not None for limit in limits)

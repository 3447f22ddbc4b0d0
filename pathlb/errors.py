"""The errors of pathlb, independent of any HTTP library.

The adapters raise subclasses of these that are also httpx's (or httpx2's) own: `except httpx.ConnectError` and
`except pathlb.NoEligibleEndpoint` catch the same object. The table is in the README.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .core.errors import ConfigError as ConfigError
from .core.errors import IllegalEvent as IllegalEvent
from .core.model import Sent

if TYPE_CHECKING:
    from .exchange import Attempt


class PathlbError(Exception):
    """Base of everything that goes wrong at run time. `attempts` lists what was tried, in order."""

    def __init__(self, message: str, attempts: Sequence[Attempt] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.attempts: tuple[Attempt, ...] = tuple(attempts)

    def __str__(self) -> str:
        if not self.attempts:
            return self.message
        tried = "; ".join(str(attempt) for attempt in self.attempts)
        return f"{self.message} [tried {tried}]"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.args, self.__dict__)


def _restore(cls: type[PathlbError], args: tuple[Any, ...], state: dict[str, Any]) -> PathlbError:
    """An error from its parts: the constructors take others than `BaseException` keeps."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class NoEligibleEndpoint(PathlbError):
    """No endpoint may be picked: all drained, or all out and `Panic(fail_closed=True)`."""


class QueueFull(PathlbError):
    """Every endpoint is at its limit and the queue is full: failed at once, nothing was sent."""


class QueueTimeout(PathlbError):
    """Waited in the queue for as long as allowed; nothing was sent by the wait."""


class DeadlineExceeded(PathlbError):
    """The request's total deadline passed before a reply head arrived."""


class RequestTooLarge(PathlbError, ValueError):
    """The request is larger than what the endpoints take (`JSONRPC(max_body=, max_batch=)`); nothing was sent."""


class UsageError(PathlbError, RuntimeError):
    """The object is used where it cannot work: closed, on another event loop, after a fork, for another origin."""


class Fault(enum.Enum):
    """What went wrong in an attempt, in the vocabulary of httpx's exceptions (the adapters map them one to one)."""

    CONNECT = "ConnectError"
    CONNECT_TIMEOUT = "ConnectTimeout"
    READ = "ReadError"
    READ_TIMEOUT = "ReadTimeout"
    WRITE = "WriteError"
    WRITE_TIMEOUT = "WriteTimeout"
    POOL_TIMEOUT = "PoolTimeout"
    CLOSE = "CloseError"
    PROXY = "ProxyError"
    REMOTE_PROTOCOL = "RemoteProtocolError"
    LOCAL_PROTOCOL = "LocalProtocolError"
    UNSUPPORTED_PROTOCOL = "UnsupportedProtocol"
    TRANSPORT = "TransportError"


class UpstreamError(PathlbError):
    """An attempt on one endpoint failed without a reply head, or a reply's body broke off.

    `fault` says how, `sent` whether the endpoint can have seen the request, `endpoint` (its URL) where;
    `local` is true when this process ran out of descriptors, ports or memory, which no endpoint is to blame for;
    `reused` when the connection had carried a request before (it may have been closed while idle).
    """

    def __init__(
        self,
        fault: Fault,
        sent: Sent,
        endpoint: str,
        detail: str,
        *,
        local: bool = False,
        reused: bool = False,
        attempts: Sequence[Attempt] = (),
    ) -> None:
        super().__init__(f"{endpoint}: {detail}", attempts)
        self.fault = fault
        self.sent = sent
        self.endpoint = endpoint
        self.detail = detail
        self.local = local
        self.reused = reused

"""The errors of pathlb as httpx2's: each is both, so that either `except` catches it."""

from __future__ import annotations

import httpx2

from ... import errors


class NoEligibleEndpoint(errors.NoEligibleEndpoint, httpx2.ConnectError):
    """See `pathlb.NoEligibleEndpoint`."""


class QueueFull(errors.QueueFull, httpx2.PoolTimeout):
    """See `pathlb.QueueFull`."""


class QueueTimeout(errors.QueueTimeout, httpx2.PoolTimeout):
    """See `pathlb.QueueTimeout`."""


class DeadlineExceeded(errors.DeadlineExceeded, httpx2.TimeoutException):
    """See `pathlb.DeadlineExceeded`."""


class RequestTooLarge(errors.RequestTooLarge, httpx2.LocalProtocolError):
    """See `pathlb.RequestTooLarge`."""


class UsageError(errors.UsageError, httpx2.UnsupportedProtocol):
    """See `pathlb.UsageError`."""


class ConnectError(errors.UpstreamError, httpx2.ConnectError):
    """Connecting to the endpoint failed."""


class ConnectTimeout(errors.UpstreamError, httpx2.ConnectTimeout):
    """Connecting to the endpoint took longer than the connect timeout."""


class ReadError(errors.UpstreamError, httpx2.ReadError):
    """The connection broke while the reply was awaited or read."""


class ReadTimeout(errors.UpstreamError, httpx2.ReadTimeout):
    """The endpoint sent nothing for as long as the read timeout."""


class WriteError(errors.UpstreamError, httpx2.WriteError):
    """The connection broke while the request was written."""


class WriteTimeout(errors.UpstreamError, httpx2.WriteTimeout):
    """The endpoint took nothing for as long as the write timeout."""


class PoolTimeout(errors.UpstreamError, httpx2.PoolTimeout):
    """The upstream's own pool had no connection in time."""


class CloseError(errors.UpstreamError, httpx2.CloseError):
    """Closing the connection failed."""


class ProxyError(errors.UpstreamError, httpx2.ProxyError):
    """The proxy in between failed."""


class RemoteProtocolError(errors.UpstreamError, httpx2.RemoteProtocolError):
    """The endpoint's reply was not HTTP, or ended too soon."""


class LocalProtocolError(errors.UpstreamError, httpx2.LocalProtocolError):
    """The request is not valid HTTP."""


class UnsupportedProtocol(errors.UpstreamError, httpx2.UnsupportedProtocol):
    """The upstream does not speak the protocol asked for."""


class TransportError(errors.UpstreamError, httpx2.TransportError):
    """The transport failed in a way of its own."""


_SAME_NAME: dict[type[errors.PathlbError], type[errors.PathlbError]] = {
    errors.NoEligibleEndpoint: NoEligibleEndpoint,
    errors.QueueFull: QueueFull,
    errors.QueueTimeout: QueueTimeout,
    errors.DeadlineExceeded: DeadlineExceeded,
    errors.RequestTooLarge: RequestTooLarge,
    errors.UsageError: UsageError,
}
_BY_FAULT: dict[errors.Fault, type[errors.UpstreamError]] = {
    errors.Fault(cls.__name__): cls
    for cls in (
        ConnectError,
        ConnectTimeout,
        ReadError,
        ReadTimeout,
        WriteError,
        WriteTimeout,
        PoolTimeout,
        CloseError,
        ProxyError,
        RemoteProtocolError,
        LocalProtocolError,
        UnsupportedProtocol,
        TransportError,
    )
}


def adopt(error: errors.PathlbError, request: httpx2.Request) -> errors.PathlbError:
    """The same error as one of this module's: httpx2's class, and `request` set."""
    own = _BY_FAULT[error.fault] if isinstance(error, errors.UpstreamError) else _SAME_NAME[type(error)]
    adopted = own.__new__(own, *error.args)
    adopted.__dict__.update(error.__dict__)
    adopted.request = request  # type: ignore[attr-defined]  # httpx2.RequestError's
    return adopted

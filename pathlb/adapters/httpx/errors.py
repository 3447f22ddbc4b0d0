"""The errors of pathlb as httpx's: each is both, so that either `except` catches it."""

from __future__ import annotations

import httpx

from ... import errors


class NoEligibleEndpoint(errors.NoEligibleEndpoint, httpx.ConnectError):
    """See `pathlb.NoEligibleEndpoint`."""


class QueueFull(errors.QueueFull, httpx.PoolTimeout):
    """See `pathlb.QueueFull`."""


class QueueTimeout(errors.QueueTimeout, httpx.PoolTimeout):
    """See `pathlb.QueueTimeout`."""


class DeadlineExceeded(errors.DeadlineExceeded, httpx.TimeoutException):
    """See `pathlb.DeadlineExceeded`."""


class RequestTooLarge(errors.RequestTooLarge, httpx.LocalProtocolError):
    """See `pathlb.RequestTooLarge`."""


class UsageError(errors.UsageError, httpx.UnsupportedProtocol):
    """See `pathlb.UsageError`."""


class ConnectError(errors.UpstreamError, httpx.ConnectError):
    """Connecting to the endpoint failed."""


class ConnectTimeout(errors.UpstreamError, httpx.ConnectTimeout):
    """Connecting to the endpoint took longer than the connect timeout."""


class ReadError(errors.UpstreamError, httpx.ReadError):
    """The connection broke while the reply was awaited or read."""


class ReadTimeout(errors.UpstreamError, httpx.ReadTimeout):
    """The endpoint sent nothing for as long as the read timeout."""


class WriteError(errors.UpstreamError, httpx.WriteError):
    """The connection broke while the request was written."""


class WriteTimeout(errors.UpstreamError, httpx.WriteTimeout):
    """The endpoint took nothing for as long as the write timeout."""


class PoolTimeout(errors.UpstreamError, httpx.PoolTimeout):
    """The upstream's own pool had no connection in time."""


class CloseError(errors.UpstreamError, httpx.CloseError):
    """Closing the connection failed."""


class ProxyError(errors.UpstreamError, httpx.ProxyError):
    """The proxy in between failed."""


class RemoteProtocolError(errors.UpstreamError, httpx.RemoteProtocolError):
    """The endpoint's reply was not HTTP, or ended too soon."""


class LocalProtocolError(errors.UpstreamError, httpx.LocalProtocolError):
    """The request is not valid HTTP."""


class UnsupportedProtocol(errors.UpstreamError, httpx.UnsupportedProtocol):
    """The upstream does not speak the protocol asked for."""


class TransportError(errors.UpstreamError, httpx.TransportError):
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


def adopt(error: errors.PathlbError, request: httpx.Request) -> errors.PathlbError:
    """The same error as one of this module's: httpx's class, and `request` set."""
    own = _BY_FAULT[error.fault] if isinstance(error, errors.UpstreamError) else _SAME_NAME[type(error)]
    adopted = own.__new__(own, *error.args)
    adopted.__dict__.update(error.__dict__)
    adopted.request = request  # type: ignore[attr-defined]  # httpx.RequestError's
    return adopted

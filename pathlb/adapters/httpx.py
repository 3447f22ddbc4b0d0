"""pathlb under and as an httpx client."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, Unpack

import httpx

from .. import errors
from ..balancer import Balancer
from ..config import BalancerOptions
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..exchange import OneShotBody, Reply, Request
from ..upstream.default import Upstreams
from ..upstream.http1 import Pool
from .translate import PLACEHOLDER, REDIRECTS, Translator

DEFAULT_TIMEOUT = httpx.Timeout(connect=0.5, read=15.0, write=15.0, pool=None)
"""Per attempt, in seconds. A relay may take 10; `pool`, the wait in the queue, is left to `Limits.queue_timeout`."""


class BalancedTransport(httpx.AsyncBaseTransport):
    """Puts a `Balancer` under a plain `httpx.AsyncClient`, whole or on one URL prefix through `mounts=`.

    The host of the request's URL is a logical name: it goes out as the Host header, and the balancer decides where
    to. `host` sends another one instead. The balancer stays its owner's to close: closing this does not close it.
    """

    def __init__(self, balancer: Balancer, *, host: str | None = None) -> None:
        self._balancer = balancer
        self._translator = Translator(balancer, host=host, origin=None)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises `ConfigError` for bad `extensions["pathlb"]`, and the errors of this module otherwise."""
        try:
            outgoing = self._outgoing(request)
            reply = await self._balancer.send(outgoing)
        except errors.PathlbError as exc:
            raise adopt(exc, request) from exc
        return self._incoming(reply, request)

    async def aclose(self) -> None:
        """Does nothing: the balancer is closed by its owner."""

    def _outgoing(self, request: httpx.Request) -> Request:
        url = request.url
        outgoing = self._translator.request(
            request.method,
            url.scheme,
            url.netloc,
            url.raw_path,
            request.headers.raw,
            _body(request),
            request.extensions,
        )
        outgoing.expose = request

        def present(result: Reply | Exception) -> httpx.Response | Exception:
            if isinstance(result, Reply):
                return self._incoming(result, request)
            return adopt(result, request) if isinstance(result, errors.PathlbError) else result

        outgoing.present = present
        return outgoing

    def _incoming(self, reply: Reply, request: httpx.Request) -> httpx.Response:
        extensions = {
            **reply.extensions,
            "http_version": reply.http_version,
            "reason_phrase": reply.reason,
            "pathlb": {"attempts": reply.attempts},
        }
        headers = reply.headers
        if reply.status in REDIRECTS:
            headers = self._translator.redirect_headers(reply, request.url.scheme, request.url.netloc)
        return httpx.Response(
            reply.status,
            headers=headers,
            stream=_ReplyStream(reply, request),
            extensions=extensions,
            request=request,
        )


class AsyncClient(httpx.AsyncClient):
    """An `httpx.AsyncClient` whose requests are balanced over several endpoints.

    `endpoints` is a list of URLs or `Endpoint`s, or a `Balancer` made elsewhere (which is then not closed with the
    client). The keyword arguments of `Balancer` (`policy`, `retry`, `limits` ...) may be given here too.

    Relative URLs and those of `base_url` (default `http://pathlb.invalid`) are balanced. A URL of one of the
    endpoints is balanced too. Any other absolute URL raises `UsageError`, unless `mounts` takes it.

    `host` is sent as the Host header; by default it is the host of `base_url` if given, else the endpoint's own.
    `verify`, `cert`, `http1`, `http2`, `proxy`, `trust_env` and `pool` apply to the connections to every endpoint. All
    other arguments are httpx's own. Raises `ConfigError`.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint | str] | Balancer,
        *,
        host: str | None = None,
        auth: Any = None,
        params: Any = None,
        headers: Any = None,
        cookies: Any = None,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        http1: bool = True,
        http2: bool = False,
        proxy: Any = None,
        pool: Pool = Pool(),
        mounts: Mapping[str, httpx.AsyncBaseTransport | None] | None = None,
        timeout: Any = DEFAULT_TIMEOUT,
        follow_redirects: bool = False,
        max_redirects: int = 20,
        event_hooks: Mapping[str, list[Callable[..., Any]]] | None = None,
        base_url: httpx.URL | str = "",
        trust_env: bool = True,
        default_encoding: str | Callable[[bytes], str] = "utf-8",
        transport: None = None,
        **options: Unpack[BalancerOptions],
    ) -> None:
        if transport is not None:
            raise ConfigError("transport", "is pathlb's own; give upstream= to decide how endpoints are reached")
        connection = (verify, cert, http1, http2, proxy, trust_env, pool)
        defaults = _CONNECTION_DEFAULTS.items()
        changed = [name for value, (name, usual) in zip(connection, defaults, strict=True) if value != usual]
        self._owns_balancer = not isinstance(endpoints, Balancer)
        if isinstance(endpoints, Balancer):
            for name in (*options, *changed):
                raise ConfigError(name, "belongs to the Balancer; set it there (connections: upstream=)")
            self.balancer = endpoints
        else:
            if "upstream" in options:
                for name in changed:
                    raise ConfigError(name, "has no effect with upstream=, which decides how endpoints are reached")
            else:
                options["upstream"] = Upstreams(
                    verify=verify,
                    cert=cert,
                    http1=http1,
                    http2=http2,
                    proxy=proxy,
                    trust_env=trust_env,
                    pool=pool,
                    stack=httpx,
                )
            self.balancer = Balancer(endpoints, **options)
        origin = _base_url(base_url or f"{self.balancer.scheme}://{PLACEHOLDER}")
        balanced = BalancedTransport(self.balancer)
        balanced._translator = Translator(self.balancer, host=host, origin=(origin.scheme, origin.netloc))
        super().__init__(
            auth=auth,
            params=params,
            headers=headers,
            cookies=cookies,
            mounts=mounts,
            timeout=timeout,
            follow_redirects=follow_redirects,
            max_redirects=max_redirects,
            event_hooks=event_hooks,
            base_url=origin,
            trust_env=trust_env,
            default_encoding=default_encoding,
            transport=balanced,
        )

    async def __aenter__(self) -> AsyncClient:
        if self._owns_balancer:
            await self.balancer.__aenter__()
        await super().__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        try:
            await super().__aexit__(*exc)
        finally:
            await self._close_balancer()

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            await self._close_balancer()

    def _merge_url(self, url: httpx.URL | str) -> httpx.URL:
        # `//host/x` names a host: the base class would drop it and send `/x` to the gateways.
        if str(url).startswith("//"):
            url = f"{self.base_url.scheme}:{url}"
        return super()._merge_url(url)

    async def _close_balancer(self) -> None:
        if self._owns_balancer:
            await self.balancer.aclose()


_CONNECTION_DEFAULTS = {
    "verify": True,
    "cert": None,
    "http1": True,
    "http2": False,
    "proxy": None,
    "trust_env": True,
    "pool": Pool(),
}


class _ReplyStream(httpx.AsyncByteStream):
    """The reply's body, its failures as httpx's."""

    def __init__(self, reply: Reply, request: httpx.Request) -> None:
        self._body = reply.body
        self._attempts = reply.attempts
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._body:
                yield part
        except errors.UpstreamError as exc:
            exc.attempts = self._attempts
            raise adopt(exc, self._request) from exc

    async def aclose(self) -> None:
        await self._body.aclose()


def _base_url(given: httpx.URL | str) -> httpx.URL:
    problem = "must be absolute, like http://path-gateway/v1"
    try:
        url = httpx.URL(given)
    except (httpx.InvalidURL, TypeError) as exc:
        raise ConfigError("base_url", f"{problem} ({exc})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url", f"{problem}, not {url!r}")  # whose repr hides a password
    return url


def _body(request: httpx.Request) -> bytes | OneShotBody:
    try:
        return request.content
    except httpx.RequestNotRead:
        stream = request.stream
        assert isinstance(stream, httpx.AsyncByteStream)  # the client has checked
        return OneShotBody(stream)


# --- errors: pathlb's and httpx's at once, so that either `except` catches them


class NoEligibleEndpoint(errors.NoEligibleEndpoint, httpx.ConnectError):
    """See `pathlb.NoEligibleEndpoint`."""


class QueueFull(errors.QueueFull, httpx.PoolTimeout):
    """See `pathlb.QueueFull`."""


class QueueTimeout(errors.QueueTimeout, httpx.PoolTimeout):
    """See `pathlb.QueueTimeout`."""


class DeadlineExceeded(errors.DeadlineExceeded, httpx.TimeoutException):
    """See `pathlb.DeadlineExceeded`."""


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

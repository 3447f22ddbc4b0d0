"""Any httpx or httpx2 transport as an upstream: HTTP/2, trio, proxies, and whatever else has a transport."""

from __future__ import annotations

import importlib
import importlib.util
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from types import ModuleType
from typing import Any

import anyio
import httpx

from ..core.errors import ConfigError
from ..core.model import Endpoint, Sent
from ..errors import Fault, UpstreamError
from ..exchange import Headers, OneShotBody, Reply, Request, WholeBody, is_event_stream
from .http1.head import framing_of
from .oserrors import causes_of, is_local, reason_of

_FAULTS = {fault.value: fault for fault in Fault}

DEFAULT_STACK: ModuleType = httpx

# Parsers quote the bytes they choke on, which may be a credential ("Illegal header value b'Bearer ...'").
_QUOTED = re.compile(r"""\b(bytearray\()?b['"].*""", re.DOTALL)


_FRAMING = (b"content-length", b"transfer-encoding")


class TransportUpstream:
    """One endpoint behind a transport.

    `transport` is an `httpx.AsyncBaseTransport`, or httpx2's when `stack` is the `httpx2` module. The stack's own
    `AsyncHTTPTransport` tells through its trace events whether the request head was being written; any other one is
    taken at its word for nothing: its failures count as maybe sent.
    """

    def __init__(self, transport: Any, endpoint: Endpoint, *, stack: ModuleType = httpx) -> None:
        self.kind = stack.__name__
        self._transport = transport
        self._endpoint = endpoint
        self._stack = stack
        self._stock = type(transport) is stack.AsyncHTTPTransport
        self._origin = f"{endpoint.scheme}://{endpoint.authority.decode('ascii')}"
        self._stream_class = _stream_class(stack)

    async def send(self, request: Request, extra_headers: Headers) -> Reply:
        endpoint, stack = self._endpoint, self._stack
        target = endpoint.base_path + request.target
        headers = [(b"Host", request.host or endpoint.authority), *request.headers, *extra_headers]
        framing = framing_of(request)
        if framing and not any(name.lower() in _FRAMING for name, _ in headers):
            headers += framing
        extensions = dict(request.extensions)
        timeouts = extensions["timeout"] = request.timeouts._asdict()
        if endpoint.server_hostname is not None:
            extensions.setdefault("sni_hostname", endpoint.server_hostname)
        body = request.body
        if isinstance(body, bytes) and not self._stock:
            stream = stack.ByteStream(body)
        else:
            # httpx's own stream of bytes is an async generator, and trio complains of one that a cancellation ends.
            stream = self._stream_class(WholeBody(body) if isinstance(body, bytes) else body)
        watch = _Watch(extensions.get("trace"))
        if self._stock:
            extensions["trace"] = watch
            url: Any = _WireURL(endpoint, target)
            outgoing: Any = _WireRequest(request.method, url, headers, stream, extensions)
        else:
            outgoing = stack.Request(
                request.method,
                stack.URL(self._origin).copy_with(raw_path=target),
                headers=headers,
                stream=stream,
                extensions=extensions,
            )
        try:
            response = await self._transport.handle_async_request(outgoing)
        except stack.TransportError as exc:
            raise self._failure(exc, watch) from exc
        except BaseException:
            await self._close_lost()
            raise
        raw: Headers = response.headers.raw
        if request.events_may_pause and is_event_stream(raw):
            timeouts["read"] = None  # httpcore looks it up when it begins to read the body
        return Reply(
            status=response.status_code,
            headers=raw,
            body=_TransportBody(response.stream, self),
            http_version=response.extensions.get("http_version", b"HTTP/1.1"),
            reason=response.extensions.get("reason_phrase", b""),
            extensions=response.extensions,
            reused=self._stock and not watch.connecting,
        )

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _close_lost(self, stream: Any = None) -> None:
        """Close the connections that httpcore lost in a cancellation: neither idle nor closed, and no request's.

        It happens between the connect and the first write, and, for a task cancelled natively (anyio's shields do not
        hold that off), while the body `stream` is being closed. They would stay open for as long as the pool.
        """
        if not self._stock:
            return
        pool = self._transport._pool
        request = getattr(getattr(stream, "_httpcore_stream", None), "_pool_request", None)
        if request in pool._requests:
            pool._requests.remove(request)
        owned = {id(one.connection) for one in pool._requests}
        lost = [one for one in pool.connections if id(one) not in owned and not one.is_idle() and not one.is_closed()]
        pool._connections = [one for one in pool.connections if one not in lost]
        with anyio.CancelScope(shield=True):
            for connection in lost:
                await connection.aclose()

    def _failure(self, exc: Exception, watch: _Watch | None) -> UpstreamError:
        fault = next((_FAULTS[cls.__name__] for cls in type(exc).__mro__ if cls.__name__ in _FAULTS), Fault.TRANSPORT)
        known = self._stock and watch is not None
        causes = list(causes_of(exc))
        # The library says "All connection attempts failed"; the operating system says why.
        reasons = [reason_of(cause) for cause in causes if isinstance(cause, OSError) and cause.strerror]
        detail = _QUOTED.sub("...", str(exc)) or type(exc).__name__
        return UpstreamError(
            fault,
            Sent.NOT_SENT if known and watch is not None and not watch.writing else Sent.MAYBE_SENT,
            self._endpoint.url,
            f"{detail} ({reasons[-1]})" if reasons and reasons[-1] not in detail else detail,
            local=is_local(causes),
            reused=known and watch is not None and not watch.connecting,
        )


class _Watch:
    """A trace callback of httpcore: notes whether a connection was made for this request, and the request written."""

    __slots__ = ("_caller", "connecting", "writing")

    def __init__(self, caller: Callable[[str, Any], Awaitable[None]] | None) -> None:
        self._caller = caller
        self.connecting = False
        self.writing = False

    async def __call__(self, name: str, info: Any) -> None:
        if name.endswith("send_request_headers.started"):
            self.writing = True
        elif name.startswith("connection.connect_"):
            self.connecting = True
        if self._caller is not None:
            await self._caller(name, info)


class _WireURL:
    """What `AsyncHTTPTransport` reads of a URL. A real one would be parsed again for every endpoint (31 us)."""

    __slots__ = ("port", "raw_host", "raw_path", "raw_scheme")

    def __init__(self, endpoint: Endpoint, target: bytes) -> None:
        self.raw_scheme = endpoint.scheme.encode("ascii")
        self.raw_host = endpoint.host.encode("ascii")
        self.port = endpoint.port
        self.raw_path = target

    @property
    def scheme(self) -> str:
        return self.raw_scheme.decode("ascii")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.raw_host.decode('ascii')}:{self.port}{self.raw_path.decode('latin-1')}"


class _WireRequest:
    """What `AsyncHTTPTransport` reads of a request. `headers.raw` is how it asks for the pairs."""

    __slots__ = ("extensions", "headers", "method", "raw", "stream", "url")

    def __init__(self, method: str, url: _WireURL, raw: Headers, stream: Any, extensions: dict[str, Any]) -> None:
        self.method = method
        self.url = url
        self.raw = raw
        self.headers = self
        self.stream = stream
        self.extensions = extensions


class _TransportBody:
    """The body of a reply, its failures in pathlb's terms."""

    def __init__(self, stream: Any, upstream: TransportUpstream) -> None:
        self._stream = stream
        self._upstream = upstream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for part in self._stream:
                yield part
        except self._upstream._stack.TransportError as exc:
            raise self._upstream._failure(exc, None) from exc

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._upstream._close_lost(self._stream)
            raise
        overfull = _overfull(self._stream)
        if overfull is not None:
            with anyio.CancelScope(shield=True):
                await overfull.aclose()


def _overfull(stream: Any) -> Any:
    """The connection of a closed body stream, if it brought more than the reply.

    httpcore keeps those bytes and would take them for the next request's reply: somebody else's answer. (What arrives
    later it notices by itself.) None for HTTP/2 and for foreign transports.
    """
    try:
        connection = stream._httpcore_stream._stream._connection
        return connection if connection._h11_state.trailing_data[0] and connection.is_idle() else None
    except AttributeError:
        return None


def _stream_class(stack: ModuleType) -> type[Any]:
    """A request body as the stack's `AsyncByteStream`, which its transports insist on."""

    class BodyStream(stack.AsyncByteStream):  # type: ignore[name-defined,misc]
        def __init__(self, body: OneShotBody | WholeBody) -> None:
            self._body = body

        def __aiter__(self) -> AsyncIterator[bytes]:
            return aiter(self._body)

    return BodyStream


def as_upstream(made: Any, endpoint: Endpoint) -> Any:
    """What an upstream factory made, as an upstream, or undecided: httpx's and httpx2's transports are wrapped."""
    if hasattr(made, "handle_async_request"):
        # httpx2 need not be installed; an object of its classes means that it is.
        stack = httpx if isinstance(made, httpx.AsyncBaseTransport) else importlib.import_module("httpx2")
        return TransportUpstream(made, endpoint, stack=stack)
    if not hasattr(made, "decide") and not (hasattr(made, "send") and hasattr(made, "kind")):
        raise ConfigError("upstream", f"must make an Upstream or an async transport, not {type(made).__name__}")
    return made


class TransportUpstreams:
    """Makes one `AsyncHTTPTransport` an endpoint, its pool without limits: waiting is the balancer's business.

    The arguments mean what they mean to `httpx.AsyncClient`. `stack` is the `httpx` or the `httpx2` module.
    """

    def __init__(
        self,
        *,
        verify: ssl.SSLContext | str | bool = True,
        cert: Any = None,
        http1: bool = True,
        http2: bool = False,
        trust_env: bool = True,
        proxy: Any = None,
        stack: ModuleType = httpx,
    ) -> None:
        if not http1 and not http2:
            raise ConfigError("http1", "must be true when http2 is not")
        if http2 and importlib.util.find_spec("h2") is None:
            raise ConfigError("http2", "needs the h2 package: pip install 'pathlb[http2]'")
        if proxy is not None and not isinstance(proxy, stack.Proxy):
            try:
                proxy = stack.Proxy(proxy)
            except (TypeError, ValueError, stack.InvalidURL) as exc:  # none of them shows a password
                raise ConfigError("proxy", f"cannot be used: {exc}") from None
        self._verify = verify
        self._cert = cert
        self._http1 = http1
        self._http2 = http2
        self._trust_env = trust_env
        self._proxy = proxy
        self._stack = stack
        self._context: ssl.SSLContext | None = None

    def __call__(self, endpoint: Endpoint) -> TransportUpstream:
        stack = self._stack
        if self._proxy is not None and endpoint.uds is not None:
            raise ConfigError("proxy", f"cannot be used to reach a unix socket ({endpoint.url})")
        transport = stack.AsyncHTTPTransport(
            verify=self.ssl_context(endpoint),
            http1=self._http1,
            http2=self._http2,
            limits=stack.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=5.0),
            proxy=self._proxy,
            uds=endpoint.uds,
        )
        return TransportUpstream(transport, endpoint, stack=stack)

    def ssl_context(self, endpoint: Endpoint) -> ssl.SSLContext:
        """The context for the connections to an endpoint. Raises `ConfigError`."""
        if endpoint.scheme == "http" and self._proxy is None:
            return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # never used; loading the CA bundle takes 20 ms
        if self._context is None:
            try:
                context = self._stack.create_ssl_context(self._verify, self._cert, self._trust_env)
            except (OSError, TypeError, ValueError) as exc:  # ssl.SSLError is an OSError
                raise ConfigError("verify or cert", f"cannot be loaded: {exc}") from exc
            self._context = context
        assert self._context is not None
        return self._context

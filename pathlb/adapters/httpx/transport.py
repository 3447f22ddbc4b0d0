"""A balancer under any `httpx.AsyncClient`: requests translated there, replies and errors translated back."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx

from ... import errors
from ...balancer import Balancer
from ...exchange import OneShotBody, Reply, Request, WholeBody
from ...upstream.http1.network_stream import NetworkStream
from ..translate import REDIRECTS, Translator
from .errors import adopt
from .network_stream import CoreStream


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
        headers, body = reply.headers, reply.body
        if reply.status == 101 and isinstance(stream := extensions.get("network_stream"), NetworkStream):
            extensions["network_stream"] = CoreStream(stream)
        if reply.status in REDIRECTS:
            headers = self._translator.redirect_headers(reply, request.url.scheme, request.url.netloc)
        response = httpx.Response(
            reply.status,
            headers=headers,
            stream=httpx.ByteStream(body.content) if isinstance(body, WholeBody) else _ReplyStream(reply, request),
            extensions=extensions,
            request=request,
        )
        if b"".join([value for _, value in headers]).isascii():
            response.headers.encoding = "ascii"  # httpx would find out by decoding each of them
        return response


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


def _body(request: httpx.Request) -> bytes | OneShotBody:
    try:
        return request.content
    except httpx.RequestNotRead:
        stream = request.stream
        assert isinstance(stream, httpx.AsyncByteStream)  # the client has checked
        return OneShotBody(stream)

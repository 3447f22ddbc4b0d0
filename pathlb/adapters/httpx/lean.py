"""An `httpx.AsyncClient` that goes the short way where httpx's own would come to the same.

httpx walks every request through auth, redirects, hooks, cookies and two async generators of the reply's body. With
none of these in play that is a third of what a request costs; then the request is sent, its reply read, and that is
all. Whatever somebody set, replaced or patched sends a request httpx's own way. Tests hold the one against the other.
"""

from __future__ import annotations

import contextlib
import logging
import time
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any

import httpx

from .building import SECOND, LeanRequests

logger = logging.getLogger("httpx")

_URLS_KEPT = 256


def _steps() -> tuple[Any, ...]:
    """What `httpx.AsyncClient.send` is made of, as far as others are known to patch it."""
    client = httpx.AsyncClient
    return (
        client.send,
        client._send_handling_auth,
        client._send_handling_redirects,
        client._send_single_request,
    )


_STEPS = _steps()
_HTTPX_OWN = all(
    type(step) is FunctionType and Path(step.__code__.co_filename).parent == Path(httpx.__file__).parent
    for step in _STEPS
)
"""They were not patched before this module was imported."""


class LeanClient(httpx.AsyncClient):
    """As its base class, for one transport. Other keyword arguments are httpx's."""

    def __init__(
        self, *, transport: httpx.AsyncBaseTransport, mounts: Any, default_encoding: Any, **options: Any
    ) -> None:
        super().__init__(transport=transport, mounts=mounts, default_encoding=default_encoding, **options)
        inherited = all(getattr(type(self), step.__name__) is step for step in _STEPS[1:])
        self._lean_transport = transport if _HTTPX_OWN and inherited and not mounts else None
        self._in_use = False
        self._encoding = default_encoding
        self._building = LeanRequests()
        self._merged: dict[str, httpx.URL] = {}
        self._merged_with: httpx.URL | None = None

    async def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx.USE_CLIENT_DEFAULT,
    ) -> httpx.Response:
        """As httpx's."""
        plain = (
            not stream and auth is httpx.USE_CLIENT_DEFAULT and follow_redirects is httpx.USE_CLIENT_DEFAULT
        ) and self._is_plain(request)
        if not plain:
            self._in_use = True
            return await super().send(request, stream=stream, auth=auth, follow_redirects=follow_redirects)
        start = time.perf_counter()
        response = await self._transport.handle_async_request(request)
        response.default_encoding = self._encoding
        if logger.isEnabledFor(logging.INFO):
            logger.info(
                'HTTP Request: %s %s "%s %d %s"',
                request.method,
                request.url,
                response.http_version,
                response.status_code,
                response.reason_phrase,
            )
        if "set-cookie" in response.headers:
            self.cookies.extract_cookies(response)
        try:
            if response.has_redirect_location:
                # A Location that is no URL is an error to httpx, and nothing to httpx2, to who does not follow it.
                with contextlib.suppress(*([httpx.RemoteProtocolError] if SECOND else [])):
                    response.next_request = self._build_redirect_request(request, response)
            if isinstance(response.stream, httpx.ByteStream):
                response.read()
            else:
                await response.aread()
        except BaseException:
            await response.aclose()
            raise
        response.elapsed = timedelta(seconds=time.perf_counter() - start)
        return response

    def _is_plain(self, request: httpx.Request) -> bool:
        """Whether httpx's own way would come to sending this and reading the reply."""
        return (
            self._in_use  # the first request is httpx's, which notes that the client is
            and self._transport is self._lean_transport
            and _steps() == _STEPS
            and not self.is_closed
            and not self.follow_redirects
            and self.auth is None
            and not any(self.event_hooks.values())
            and not request.url.userinfo
            and "timeout" in request.extensions
            and isinstance(request.stream, httpx.ByteStream)
        )

    def build_request(
        self,
        method: str,
        url: httpx.URL | str,
        *,
        content: Any = None,
        data: Any = None,
        files: Any = None,
        json: Any = None,
        params: Any = None,
        headers: Any = None,
        cookies: Any = None,
        timeout: Any = httpx.USE_CLIENT_DEFAULT,
        extensions: Any = None,
    ) -> httpx.Request:
        """As httpx's."""
        if (
            data is None
            and files is None
            and params is None
            and cookies is None
            and extensions is None
            and timeout is httpx.USE_CLIENT_DEFAULT
            and not self.cookies
            and not self.params
        ):
            timeouts = {"timeout": self.timeout.as_dict()}
            request = self._building.build(method, self._merge_url(url), content, json, headers, self.headers, timeouts)
            if request is not None:
                return request
        return super().build_request(
            method,
            url,
            content=content,
            data=data,
            files=files,
            json=json,
            params=params,
            headers=headers,
            cookies=cookies,
            timeout=timeout,
            extensions=extensions,
        )

    def _merge_url(self, url: httpx.URL | str) -> httpx.URL:
        # Most clients ask for few different URLs, and merging one takes longer than all that is balanced for it.
        if self.base_url is not self._merged_with:
            self._merged_with = self.base_url
            self._merged.clear()
        if not isinstance(url, str):
            return super()._merge_url(url)
        merged = self._merged.get(url)
        if merged is None:
            # `//host/x` names a host: the base class would drop it and send `/x` to the gateways.
            merged = super()._merge_url(f"{self.base_url.scheme}:{url}" if url.startswith("//") else url)
            if len(self._merged) >= _URLS_KEPT:
                self._merged.clear()
            self._merged[url] = merged
        return merged

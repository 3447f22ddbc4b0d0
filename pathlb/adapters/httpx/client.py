"""An `httpx.AsyncClient` that is balanced, and spends less than httpx's own on what most requests do not need."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any, Unpack

import httpx

from ...balancer import Balancer
from ...config import BalancerOptions
from ...core.errors import ConfigError
from ...core.model import Endpoint
from ...upstream.default import Upstreams
from ...upstream.http1 import Pool
from ..translate import PLACEHOLDER, Translator
from .lean import LeanRequests
from .transport import BalancedTransport

logger = logging.getLogger("httpx")

_URLS_KEPT = 256

DEFAULT_TIMEOUT = httpx.Timeout(connect=0.5, read=15.0, write=15.0, pool=None)
"""Per attempt, in seconds. A relay may take 10; `pool`, the wait in the queue, is left to `Limits.queue_timeout`."""


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
        balanced = self._balanced = BalancedTransport(self.balancer)
        balanced._translator = Translator(self.balancer, host=host, origin=(origin.scheme, origin.netloc))
        self._balances_all = not mounts
        self._plain = False
        self._lean = LeanRequests()
        self._encoding = default_encoding
        self._merged: dict[str | None, httpx.URL] = {}
        self._merged_with: httpx.URL | None = None
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

    async def send(
        self,
        request: httpx.Request,
        *,
        stream: bool = False,
        auth: Any = httpx.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx.USE_CLIENT_DEFAULT,
    ) -> httpx.Response:
        """As httpx's, which is what is called when there is more to do than to send the request and read its reply."""
        if (
            stream
            or auth is not httpx.USE_CLIENT_DEFAULT
            or follow_redirects is not httpx.USE_CLIENT_DEFAULT
            or not self._plain
            or self.is_closed
            or self.follow_redirects
            or self.auth is not None
            or any(self.event_hooks.values())
            or request.url.userinfo
            or "timeout" not in request.extensions
            or not isinstance(request.stream, httpx.ByteStream)
        ):
            self._plain = self._balances_all  # the first request is the base class's, which notes that it is in use
            return await super().send(request, stream=stream, auth=auth, follow_redirects=follow_redirects)
        start = time.perf_counter()
        response = await self._balanced.handle_async_request(request)
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
        """As httpx's, which is what is called where there is more to merge than headers."""
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
            request = self._lean.build(method, self._merge_url(url), content, json, headers, self.headers, timeouts)
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
        key = url if isinstance(url, str) else None
        if key in self._merged:
            return self._merged[key]
        # `//host/x` names a host: the base class would drop it and send `/x` to the gateways.
        if str(url).startswith("//"):
            url = f"{self.base_url.scheme}:{url}"
        merged = super()._merge_url(url)
        if key is not None and len(self._merged) < _URLS_KEPT:
            self._merged[key] = merged
        return merged

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


def _base_url(given: httpx.URL | str) -> httpx.URL:
    problem = "must be absolute, like http://path-gateway/v1"
    try:
        url = httpx.URL(given)
    except (httpx.InvalidURL, TypeError) as exc:
        raise ConfigError("base_url", f"{problem} ({exc})") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError("base_url", f"{problem}, not {url!r}")  # whose repr hides a password
    return url

"""An `httpx.AsyncClient` that is balanced over several endpoints."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Unpack

import httpx

from ...balancer import Balancer
from ...config import BalancerOptions
from ...core.errors import ConfigError
from ...core.model import Endpoint
from ...profile import find_profile
from ...upstream.default import Upstreams
from ...upstream.http1 import Pool
from ..translate import PLACEHOLDER, Translator
from .lean import LeanClient
from .transport import BalancedTransport

DEFAULT_TIMEOUT = httpx.Timeout(connect=0.5, read=15.0, write=15.0, pool=None)
"""Per attempt, in seconds, unless a profile says otherwise. `pool`, the wait in the queue, is left to
`Limits.queue_timeout`.
"""


class AsyncClient(LeanClient):
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
        pool: Pool | None = None,
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
                profile = find_profile(options.get("profile"))
                options["upstream"] = Upstreams(
                    verify=verify,
                    cert=cert,
                    http1=http1,
                    http2=http2,
                    proxy=proxy,
                    trust_env=trust_env,
                    pool=pool or (profile.pool if profile is not None else Pool()),
                    stack=httpx,
                )
            self.balancer = Balancer(endpoints, **options)
        origin = _base_url(base_url or f"{self.balancer.scheme}://{PLACEHOLDER}")
        balanced = BalancedTransport(self.balancer)
        balanced._translator = Translator(self.balancer, host=host, origin=(origin.scheme, origin.netloc))
        if timeout is DEFAULT_TIMEOUT:
            timeout = httpx.Timeout(**self.balancer.timeouts._asdict())
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
    "pool": None,
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

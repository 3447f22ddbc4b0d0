"""Which upstream leads to which endpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..runner import Runner
from .base import Undecided, Upstream, UpstreamFactory
from .transport import as_upstream


class UpstreamDirectory(dict[str, Upstream]):
    """The upstreams by the URL of their endpoint: those of the members, and of removed ones still in use.

    Those that depend on the async library join with `start`.
    """

    def __init__(self, factory: UpstreamFactory) -> None:
        super().__init__()
        self._factory = factory
        self._endpoints: dict[str, Endpoint] = {}
        self._undecided: dict[str, Undecided] = {}
        self._runner: Runner | None = None
        self.bases: dict[tuple[str, bytes], tuple[bytes, ...]] = {}
        """Scheme and authority of the members, each with the base paths there, longest first."""

    def start(self, runner: Runner) -> None:
        """From now on there is an async library: what waited to know which one is decided."""
        self._runner = runner
        while self._undecided:
            self._join(*self._undecided.popitem())

    def _join(self, url: str, made: Any) -> None:
        runner = self._runner
        if hasattr(made, "decide"):
            if runner is None:
                self._undecided[url] = made
                return
            made = made.decide(runner.library)
        self[url] = made
        if runner is not None and getattr(made, "warm", False):
            runner.spawn(made.keep_warm)

    def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Make upstreams for those that have none. Raises `ConfigError`, and changes nothing then."""
        wanted = {endpoint.url: endpoint for endpoint in endpoints}
        known = self._endpoints
        for url, endpoint in wanted.items():
            if url in known and known[url].server_hostname != endpoint.server_hostname:
                raise ConfigError("Endpoint.server_hostname", f"of {url} cannot change while it is in use")
        new = {url: as_upstream(self._factory(one), one) for url, one in wanted.items() if url not in known}
        known.update(wanted)
        for url, made in new.items():
            self._join(url, made)
        bases: dict[tuple[str, bytes], list[bytes]] = {}
        for endpoint in wanted.values():
            if endpoint.uds is not None:
                continue  # its authority, localhost, is no address of its own
            bases.setdefault((endpoint.scheme, endpoint.authority), []).append(endpoint.base_path)
        self.bases = {origin: tuple(sorted(paths, key=len, reverse=True)) for origin, paths in bases.items()}

    def base_path(self, url: str) -> bytes:
        """The base path of an endpoint; empty for one that is gone."""
        return self._endpoints[url].base_path if url in self._endpoints else b""

    def leave(self, url: str) -> Upstream | None:
        """The endpoint is gone for good: its upstream, if there is one, to be closed."""
        self._endpoints.pop(url, None)
        self._undecided.pop(url, None)
        return self.pop(url, None)

    def kind_of(self, url: str) -> str:
        """What moves the bytes to this endpoint; empty when nothing does, not yet or not any more."""
        return self[url].kind if url in self else ""

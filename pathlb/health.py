"""Active probes: asks every endpoint in turn, on the connections the requests use, and tells the engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import anyio

from .config import Health
from .core.endpoints import EndpointState
from .core.engine import Engine
from .core.model import Clock, Rng
from .errors import PathlbError
from .exchange import Request, Timeouts
from .runner import Runner
from .upstream.base import Upstream

logger = logging.getLogger("pathlb")

_NOT_READY = 503
_READ = 4 * 2**20  # bytes of an answer that may be looked into: PATH's detailed readiness lists every supplier


class _Answer(NamedTuple):
    """To a probe. No status: there was none in time, and `why` says what happened."""

    status: int | None
    why: str
    body: bytes = b""


class Prober:
    """Probes the endpoints of one balancer, each on its own schedule, until the runner is closed."""

    def __init__(self, config: Health, clock: Clock, rng: Rng) -> None:
        self._config = config
        self._clock = clock
        self._rng = rng
        self._engine: Engine
        self._upstreams: Mapping[str, Upstream]
        self._watched: dict[EndpointState, anyio.CancelScope] = {}
        self._unasked: set[EndpointState] = set()
        """Of the first round."""
        self._first_round: anyio.Event | None = None
        self._changed: anyio.Event | None = None
        self.settled = not config.wait
        """The first round is over, or nobody waits for it."""

    def start(self, runner: Runner, engine: Engine, upstreams: Mapping[str, Upstream]) -> None:
        """Begin. Called once, by whichever request comes first."""
        self._engine = engine
        self._upstreams = upstreams
        self._unasked = set(engine.members)
        self._first_round = anyio.Event()
        runner.spawn(self._run)

    async def first_round(self) -> None:
        """Wait until every endpoint was asked once (at most the probe's timeout)."""
        if not self.settled and self._first_round is not None:
            await self._first_round.wait()

    def refresh(self) -> None:
        """The endpoints changed: ask the new ones now."""
        if self._changed is not None:
            self._changed.set()

    async def _run(self) -> None:
        try:
            await self._watch_all()
        finally:  # closed: nobody need wait for a verdict any more
            self.settled = True
            if self._first_round is not None:
                self._first_round.set()

    async def _watch_all(self) -> None:
        async with anyio.create_task_group() as group:
            while True:
                changed = self._changed = anyio.Event()
                members = self._engine.members
                for gone in self._watched.keys() - set(members):
                    self._watched.pop(gone).cancel()
                    self._asked(gone)
                for state in members:
                    if state not in self._watched:
                        scope = self._watched[state] = anyio.CancelScope()
                        group.start_soon(self._watch, state, scope)
                await changed.wait()

    async def _watch(self, state: EndpointState, scope: anyio.CancelScope) -> None:
        """Probe one endpoint, and its services, for as long as it is a member."""
        with scope:
            async with anyio.create_task_group() as group:
                for key, path in self._config.services.items():
                    group.start_soon(self._watch_service, state, key, path)
                while True:
                    answer = await self._ask(state, self._config.path)
                    passed = answer.status in self._config.statuses
                    self._engine.record_probe(self._clock(), state.url, passed, answer.why)
                    self._asked(state)
                    await self._pause(state.url, None)

    async def _watch_service(self, state: EndpointState, key: str, path: str) -> None:
        """Probe one service of an endpoint. Whether the endpoint answers at all is not the question here."""
        config = self._config
        while True:
            answer = await self._ask(state, path)
            now, passed = self._clock(), answer.status in config.statuses
            if passed or answer.status == _NOT_READY:
                self._engine.record_probe(now, state.url, passed, answer.why, key)
            height = self._height(key, answer.body)
            if height is not None:
                self._engine.record_height(now, state.url, key, height)
            await self._pause(state.url, key)

    def _height(self, key: str, body: bytes) -> int | None:
        if self._config.block_height is None:
            return None
        try:
            height = self._config.block_height(key, body)
            if height is not None and type(height) is not int:
                raise TypeError(f"a block height is an int, not {height!r}")
            return height
        except Exception:  # the caller's; a probe must not end with it
            logger.exception("Health.block_height failed on an answer about %r", key)
            return None

    async def _pause(self, url: str, key: str | None) -> None:
        config = self._config
        seconds = config.changing_interval if self._engine.health_changing(url, key) else config.interval
        await anyio.sleep(seconds * (1 + config.jitter * self._rng.random()))

    def _asked(self, state: EndpointState) -> None:
        """One less to wait for."""
        self._unasked.discard(state)
        if not self._unasked and self._first_round is not None and not self.settled:
            self.settled = True
            self._first_round.set()

    async def _ask(self, state: EndpointState, path: str) -> _Answer:
        limit = self._config.timeout
        request = Request("GET", path.encode("ascii"), [], timeouts=Timeouts(limit, limit, limit, None))
        answer = _Answer(None, f"no answer within {limit:g} s")
        with anyio.move_on_after(limit):
            try:
                reply = await self._upstreams[state.url].send(request, [])
                body = bytearray()
                try:
                    async for part in reply.body:
                        body += part
                        if len(body) >= _READ:
                            break  # closing it ends the connection
                finally:
                    with anyio.CancelScope(shield=True):
                        await reply.body.aclose()
                answer = _Answer(reply.status, f"status {reply.status}", bytes(body))
            except PathlbError as exc:
                answer = _Answer(None, str(exc))
            except Exception as exc:  # a foreign transport's own; a probe must not end with it
                answer = _Answer(None, f"{type(exc).__name__}: {exc}")
        return answer

"""Active probes: asks every endpoint in turn, on the connections the requests use, and tells the engine."""

from __future__ import annotations

from collections.abc import Mapping

import anyio

from .config import Health
from .core.endpoints import EndpointState
from .core.engine import Engine
from .core.model import Clock, Rng
from .errors import PathlbError
from .exchange import Request, Timeouts
from .runner import Runner
from .upstream.base import Upstream


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
        """Probe one endpoint for as long as it is a member."""
        config = self._config
        with scope:
            while True:
                passed, why = False, f"no answer within {config.timeout:g} s"
                with anyio.move_on_after(config.timeout):
                    passed, why = await self._ask(state)
                self._engine.record_probe(self._clock(), state.url, passed, why)
                self._asked(state)
                pause = config.changing_interval if self._engine.health_changing(state.url) else config.interval
                await anyio.sleep(pause * (1 + config.jitter * self._rng.random()))

    def _asked(self, state: EndpointState) -> None:
        """One less to wait for."""
        self._unasked.discard(state)
        if not self._unasked and self._first_round is not None and not self.settled:
            self.settled = True
            self._first_round.set()

    async def _ask(self, state: EndpointState) -> tuple[bool, str]:
        config = self._config
        limit = config.timeout
        request = Request("GET", config.path.encode("ascii"), [], timeouts=Timeouts(limit, limit, limit, None))
        try:
            reply = await self._upstreams[state.url].send(request, [])
            try:
                async for _ in reply.body:
                    pass
            finally:
                with anyio.CancelScope(shield=True):
                    await reply.body.aclose()
        except PathlbError as exc:
            return False, str(exc)
        except Exception as exc:  # a foreign transport's own; a probe must not end with it
            return False, f"{type(exc).__name__}: {exc}"
        return reply.status in config.statuses, f"status {reply.status}"

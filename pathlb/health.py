"""Active probes: asks every endpoint in turn, on the connections the requests use, and tells the engine."""

from __future__ import annotations

import math
from collections.abc import Callable

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
        self._engine: Engine | None = None
        self._upstream_of: Callable[[EndpointState], Upstream] | None = None
        self._due: dict[str, float] = {}
        self._first_round: anyio.Event | None = None
        self._wake: anyio.Event | None = None
        self.settled = not config.wait
        """The first round is over, or nobody waits for it."""

    def start(self, runner: Runner, engine: Engine, upstream_of: Callable[[EndpointState], Upstream]) -> None:
        """Begin. Called once, by whichever request comes first."""
        self._engine = engine
        self._upstream_of = upstream_of
        self._first_round = anyio.Event()
        runner.spawn(self._run)

    async def first_round(self) -> None:
        """Wait until every endpoint was asked once (at most the probe's timeout)."""
        if not self.settled and self._first_round is not None:
            await self._first_round.wait()

    def refresh(self) -> None:
        """The endpoints changed: ask the new ones now."""
        if self._wake is not None:
            self._wake.set()

    async def _run(self) -> None:
        assert self._engine is not None  # start() has set it
        while True:
            now = self._clock()
            members = {state.url: state for state in self._engine.members}
            self._due = {url: self._due.get(url, -math.inf) for url in members}
            async with anyio.create_task_group() as group:
                for url, state in members.items():
                    if self._due[url] <= now:
                        group.start_soon(self._probe, state)
            if self._first_round is not None and not self._first_round.is_set():
                self.settled = True
                self._first_round.set()
            self._wake = anyio.Event()
            with anyio.move_on_after(max(0.0, min(self._due.values(), default=math.inf) - self._clock())):
                await self._wake.wait()

    async def _probe(self, state: EndpointState) -> None:
        config = self._config
        assert self._engine is not None
        assert self._upstream_of is not None
        passed, why = False, f"no answer within {config.timeout:g} s"
        with anyio.move_on_after(config.timeout):
            passed, why = await self._ask(self._upstream_of(state))
        self._engine.record_probe(self._clock(), state.url, passed, why)
        pause = config.changing_interval if self._engine.health_changing(state.url) else config.interval
        self._due[state.url] = self._clock() + pause * (1 + config.jitter * self._rng.random())

    async def _ask(self, upstream: Upstream) -> tuple[bool, str]:
        config = self._config
        limit = config.timeout
        request = Request("GET", config.path.encode("ascii"), [], timeouts=Timeouts(limit, limit, limit, None))
        try:
            reply = await upstream.send(request, [])
        except PathlbError as exc:
            return False, str(exc)
        except Exception as exc:  # a foreign transport's own; a probe must not end with it
            return False, f"{type(exc).__name__}: {exc}"
        try:
            async for _ in reply.body:
                pass
        except PathlbError as exc:
            return False, str(exc)
        finally:
            with anyio.CancelScope(shield=True):
                await reply.body.aclose()
        return reply.status in config.statuses, f"status {reply.status}"

"""The async shell around core/engine.py: admit, pick, attempt, classify, observe, decide."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import anyio

from .admission import Admission
from .attempt import Attempter
from .classify.base import Classifier
from .classify.http import HTTPClassifier
from .config import DEADLINE, Health, Idempotent, check_meaning, check_options
from .core.cluster import Settings
from .core.config import BlockHeight, Breaker, Limits, Outlier, Panic, Retry, SlowStart
from .core.endpoints import check_endpoints
from .core.engine import TICK, Engine
from .core.events import Event, Listener
from .core.lease import Lease, Want
from .core.model import Clock, Endpoint, Rng, Sent
from .core.policy import LeastConnections, Policy
from .core.retry import Again
from .core.snapshot import Snapshot
from .deadline import BOUND
from .errors import (
    PathlbError,
    UsageError,
)
from .exchange import Attempt, Reply, Request, Timeouts, WholeBody
from .health import Prober
from .jsonrpc import JSONRPC, JSONRPCLayer, MethodRules
from .jsonrpc.heights import told_height
from .lease_ends import LeasedBody, LeaseEnds, close_quietly
from .orca import read_load
from .profile import PATHProfile, find_profile
from .resending import ResendRule
from .runner import Runner, current_home, make_runner
from .strategies import BoundStrategy
from .telemetry.metrics import Metrics, metrics_configured
from .telemetry.tracing import Tracing
from .upstream.base import UpstreamFactory
from .upstream.default import Upstreams
from .upstream.directory import UpstreamDirectory

logger = logging.getLogger("pathlb")


class Balancer:
    """A set of endpoints and everything known about them: what clients, transports and apps share.

    `endpoints` are URLs or `Endpoint`s. Everything else has a default that is documented with its class:

    - `policy`: how to choose among the eligible endpoints (default `LeastConnections()`);
    - `breaker`, `outlier` (None compares nobody), `panic`, `slow_start`: who is eligible;
    - `retry`: what follows a failure; `deadline`: seconds a request may take up to its reply head (default 30);
    - `limits`: requests in flight per endpoint, and the queue (default `Limits()`);
    - `health`: active probes (default none);
    - `classifier`: what replies and failures mean (default `HTTPClassifier`, with the statuses of `retry`);
    - `jsonrpc`: what JSON-RPC methods in a POST mean for sending it twice, and more (default: bodies are just bytes);
    - `block_height`: prefer endpoints that are not behind (default None: not asked);
    - `profile`: `"path"` or a `PATHProfile` gives these, the connections and the timeouts their values for PATH where
      they are left out;
    - `telemetry`: spans and metrics through the OpenTelemetry API (default on; costs next to nothing without an SDK);
    - `upstream`: makes the way to an endpoint (default `Upstreams()`: pathlb's own connections on asyncio);
    - `clock` (monotonic seconds) and `rng` are for tests and simulations.

    Usable without `async with`: it starts with the first request, on the event loop of that request, and is closed
    with `aclose`. Raises `ConfigError` for settings that cannot work.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint | str],
        *,
        policy: Policy | None = None,
        breaker: Breaker = Breaker(),
        outlier: Outlier | None = Outlier(),
        panic: Panic = Panic(),
        slow_start: SlowStart = SlowStart(),
        retry: Retry = Retry(),
        limits: Limits | None = None,
        deadline: float = DEADLINE,
        health: Health | None = None,
        idempotent: Idempotent = None,
        classifier: Classifier | None = None,
        jsonrpc: JSONRPC | None = None,
        block_height: BlockHeight | None = None,
        profile: PATHProfile | str | None = None,
        telemetry: bool = True,
        upstream: UpstreamFactory | None = None,
        clock: Clock = time.monotonic,
        rng: Rng | None = None,
    ) -> None:
        checked = check_endpoints(endpoints)
        check_options(
            policy, breaker, outlier, panic, slow_start, retry, limits, deadline, health, idempotent, upstream
        )
        self._profile = chosen = find_profile(profile)
        if chosen is not None:
            classifier, jsonrpc = classifier or chosen.classifier, jsonrpc or chosen.jsonrpc
            health, limits = health or chosen.health, limits or chosen.limits
            block_height = block_height or chosen.block_height
            upstream = upstream or Upstreams(pool=chosen.pool)
        check_meaning(classifier, jsonrpc, block_height, retry)
        limits = limits or Limits()
        self.timeouts = chosen.timeouts if chosen is not None else Timeouts()
        """What `AsyncClient` gives its requests where the caller says nothing."""
        self._clock = clock
        # The module's own generator is seeded afresh in every forked worker, one of ours would not be.
        self._rng: Rng = rng if rng is not None else random
        self._telemetry = telemetry
        settings = Settings(
            breaker=breaker,
            outlier=outlier,
            panic=panic,
            slow_start=slow_start,
            limits=limits,
            retry=retry,
            probed=health is not None and health.wait,
            rise=health.rise if health else 1,
            fall=health.fall if health else 1,
            block_height=block_height,
        )
        self._engine = Engine(settings, policy if policy is not None else LeastConnections(), self._rng)
        self._retry = retry
        self._strategic = bool(retry.retry or retry.stop or retry.wait)
        self._deadline = deadline
        self._ends = LeaseEnds(self._engine, clock, self._retire)
        self._admission = Admission(self._engine, clock, limits.queue_timeout, self._ends.release)
        self._resend_rule = ResendRule(idempotent, MethodRules(jsonrpc.methods) if jsonrpc is not None else None)
        self._block_height = block_height is not None
        self._classifier = classifier or HTTPClassifier(frozenset(retry.statuses))
        self._upstreams = UpstreamDirectory(upstream if upstream is not None else Upstreams())
        self._attempter = Attempter(
            self._engine,
            self._upstreams,
            self._classifier,
            Tracing() if telemetry else None,
            clock,
            self._ends.release,
        )
        self._ends.classify = self._attempter.classify
        layer = (
            JSONRPCLayer(jsonrpc, self._road, clock, deadline) if jsonrpc is not None and jsonrpc.needs_body else None
        )
        self._way: Callable[[Request], Awaitable[Reply]] = self._road if layer is None else layer.send
        self._prober = Prober(health, self._clock, self._rng) if health else None
        self._runner: Runner | None = None
        self._pid = 0
        self._ticking = False
        self._closed = False
        self.scheme = "https" if all(endpoint.scheme == "https" for endpoint in checked) else "http"
        """Scheme of the logical origin: that of the endpoints where they agree, so that secure cookies work."""
        self._apply(checked)

    # --- life

    async def __aenter__(self) -> Balancer:
        self._claim()
        if self._prober is not None:
            try:
                await self._prober.first_round()
            except BaseException:  # nobody will leave what was not entered
                await self.aclose()
                raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection and stop the background work. Queued requests fail; closing twice is fine."""
        if self._closed:
            return
        if self._runner is not None:
            self._claim()
        self._closed = self._admission.closed = True
        self._engine.apply(self._clock(), ())
        if self._runner is None:
            return
        with anyio.CancelScope(shield=True):
            await self._runner.aclose()
            # A copy: what is in flight ends with its upstream, and may retire another one.
            for upstream in list(self._upstreams.values()):
                await close_quietly(upstream)
        self._upstreams.clear()

    def _claim(self) -> Runner:
        """The runner of this process and event loop; the first call decides which. Raises `UsageError`."""
        if self._closed:
            raise UsageError("this Balancer is closed; make a new one")
        runner = self._runner
        if runner is None:
            runner = self._runner = make_runner()
            self._pid = os.getpid()
            self._upstreams.start(runner)
            if self._telemetry and metrics_configured():
                self.subscribe(Metrics())
            if self._prober is not None:
                self._prober.start(runner, self._engine, self._upstreams)
            return runner
        if self._pid != os.getpid():
            raise UsageError("this Balancer was used before a fork; make one in each worker process, after the fork")
        if runner.home is not current_home():
            raise UsageError(
                "this Balancer was first used on another event loop and cannot move its connections; "
                "make one per event loop (in tests: one per test), or close it before the loop ends"
            )
        return runner

    # --- operation

    def base_path(self, url: str) -> bytes:
        """The base path of an endpoint, for the adapters."""
        return self._upstreams.base_path(url)

    @property
    def bases(self) -> dict[tuple[str, bytes], tuple[bytes, ...]]:
        """Scheme and authority of the endpoints, each with the base paths there, longest first; for the adapters."""
        return self._upstreams.bases

    def update(self, endpoints: Iterable[Endpoint | str]) -> None:
        """Make these the endpoints, from now on.

        Known ones (by URL) keep their load, breaker and connections; new ones ramp up; removed ones get nothing new,
        and are closed when their last request in flight has ended. Raises `ConfigError` and changes nothing when the
        list is bad.
        """
        if self._closed:
            raise UsageError("this Balancer is closed; make a new one")
        self._apply(check_endpoints(endpoints))

    def drain(self, endpoint: Endpoint | str) -> None:
        """Send nothing new to an endpoint; requests in flight end normally. Raises `ConfigError` if unknown."""
        self._engine.drain(self._clock(), _url(endpoint))

    def undrain(self, endpoint: Endpoint | str) -> None:
        """Take a drained endpoint back, on the slow-start ramp. Raises `ConfigError` if unknown."""
        self._engine.undrain(self._clock(), _url(endpoint))

    def snapshot(self) -> Snapshot:
        """Everything known now, frozen; `.to_dict()` is ready for `json.dumps`."""
        return self._engine.snapshot(self._clock(), self._upstreams.kind_of)

    def subscribe(self, callback: Listener) -> Callable[[], None]:
        """Call `callback(event)` with every event (`pathlb.core.events`); the answer ends the subscription.

        It runs where the event happens, in a request or a timer: keep it short. What it raises is logged, and goes no
        further.
        """

        def guarded(event: Event) -> None:
            try:
                callback(event)
            except Exception:
                logger.exception("a subscriber of pathlb events failed on %r", type(event).__name__)

        return self._engine.subscribe(guarded)

    # --- the road of a request

    async def send(self, request: Request) -> Reply:
        """Send a request to the best endpoint, again where that is safe, and return the reply, its body still to come.

        The reply's body must be closed. Raises `NoEligibleEndpoint`, `QueueFull`, `QueueTimeout`, `DeadlineExceeded`,
        `RequestTooLarge`, `UpstreamError` (the last attempt's) or `UsageError`; all carry `attempts`, but for the
        `DeadlineExceeded` of a caller that has left (`BalancerMiddleware`): they went with the call.
        """
        if self._profile is not None:
            self._profile.prepare(request)
        bound = BOUND.get()
        if bound is not None:
            return await bound.send(self._claim(), request, self._deadline, self._way)
        return await self._way(request)

    async def _road(self, request: Request) -> Reply:
        runner = self._claim()
        engine, clock = self._engine, self._clock
        began = clock()
        deadline = began + (self._deadline if request.deadline is None else request.deadline)
        if self._prober is not None and not self._prober.settled:
            with anyio.move_on_after(deadline - began):
                await self._prober.first_round()
        want = Want(
            resendable=self._resend_rule.resendable(request),
            pin=request.pin,
            avoid=request.avoid,
            key=request.key if request.key is not None else self._classifier.key(request),
            deadline=deadline,
            paced=not isinstance(request.body, bytes),
        )
        attempts: list[Attempt] = []
        unsent = 0
        slept = 0.0
        try:
            while True:
                lease = await self._admission.lease(want, deadline, request.timeouts.pool, attempts)
                if not self._ticking:
                    self._start_ticking(runner)
                last = self._is_last(len(attempts) - unsent)
                reply, error, outcome = await self._attempter.make(
                    runner, request, lease, deadline, len(attempts), last=last
                )
                now = clock()
                endpoint = lease.endpoint
                if reply is not None and now >= endpoint.report_due:
                    endpoint.take_report(now, read_load(reply.headers, now))
                attempts.append(
                    Attempt(endpoint.url, lease.reason, lease.in_flight, lease.candidates, outcome, now - lease.started)
                )
                if reply is not None and not outcome.retry and not self._strategic:
                    return self._hand_over(request, reply, lease, attempts)
                unsent += outcome.sent is Sent.NOT_SENT
                want.failed_on(endpoint)  # before the decision: whether another one is left depends on it
                try:
                    decision = engine.decide(
                        now,
                        lease,
                        outcome,
                        attempts=len(attempts),
                        unsent=unsent,
                        replayable=request.replayable,
                        deadline=deadline,
                        strategy=self._bind(reply or error, request, len(attempts), now - began, slept),
                    )
                except BaseException:  # a strategy of the caller's raised
                    await self._ends.discard(reply, lease)
                    raise
                if not isinstance(decision, Again):
                    if reply is not None:
                        return self._hand_over(request, reply, lease, attempts)
                    self._ends.release(lease)
                    assert error is not None
                    error.attempts = tuple(attempts)
                    try:
                        raise error
                    finally:
                        del error  # its traceback holds this frame, which must not hold it
                await self._ends.discard(reply, lease)
                if decision.wait:
                    slept += decision.wait
                    await anyio.sleep(decision.wait)
        finally:
            engine.finish(clock(), len(attempts), want.relays)

    def _is_last(self, sent: int) -> bool:
        """Whether no attempt will follow the one after `sent` that may have been sent; unknown counts as yes."""
        if self._retry.retry is not None or self._retry.stop is not None:
            return True
        return sent + 1 >= self._engine.attempts_allowed

    def _bind(
        self, result: Reply | PathlbError | None, request: Request, attempts: int, elapsed: float, slept: float
    ) -> BoundStrategy | None:
        if not self._strategic or result is None:
            return None
        return BoundStrategy(self._retry, result, request.present, attempts=attempts, elapsed=elapsed, slept=slept)

    def _hand_over(self, request: Request, reply: Reply, lease: Lease, attempts: list[Attempt]) -> Reply:
        reply.attempts = tuple(attempts)
        if self._block_height and (height := told_height(request, reply)) is not None:
            self._engine.record_height(self._clock(), lease.endpoint.url, lease.key, height)
        if type(reply.body) is WholeBody:
            self._ends.release(lease)
        else:
            reply.body = LeasedBody(reply.body, lease, self._ends)
        return reply

    # --- time

    def _start_ticking(self, runner: Runner) -> None:
        self._ticking = True
        runner.tick(TICK, self._tick)
        self._engine.tick(self._clock())

    def _tick(self) -> bool:
        assert self._runner is not None  # a tick comes from it
        try:
            for inner in self._ends.collect():
                self._runner.spawn(partial(close_quietly, inner), finish=True)
            self._engine.tick(self._clock())
        except Exception:  # a bug, or a policy's: without ticks nothing would ever time out again
            logger.exception("a tick of the pathlb engine failed")
        self._ticking = self._engine.busy
        if not self._ticking:
            self._engine.pause()
        return self._ticking

    # --- endpoints and their upstreams

    def _apply(self, endpoints: list[Endpoint]) -> None:
        self._upstreams.apply(endpoints)
        change = self._engine.apply(self._clock(), endpoints)
        for state in change.removed:
            if not state.in_flight:
                self._retire(state.url)
        if self._prober is not None:
            self._prober.refresh()

    def _retire(self, url: str) -> None:
        """Close the upstream of an endpoint that left."""
        self._attempter.forget(url)
        upstream = self._upstreams.leave(url)
        if upstream is not None and self._runner is not None and not self._closed:
            self._runner.spawn(partial(close_quietly, upstream), finish=True)


def _url(endpoint: Endpoint | str) -> str:
    return (endpoint if isinstance(endpoint, Endpoint) else Endpoint(endpoint)).url

"""One attempt on the endpoint of a lease: send, classify, observe. Everything that waits for a server waits in here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import anyio

from .admission import CANCELLED
from .classify.base import Classifier, NeedBody
from .classify.prefix import read_prefix
from .core.engine import Engine
from .core.lease import Lease
from .core.model import Cause, Clock, Endpoint, Outcome, Sent
from .errors import DeadlineExceeded, Fault, PathlbError, UpstreamError, UsageError
from .exchange import Headers, Reply, Request
from .runner import Runner
from .telemetry.hook import AttemptHook, AttemptSpan, less_replaced
from .upstream.base import Upstream

logger = logging.getLogger("pathlb")

_NO_HEADERS: Headers = []
_SAME_EVENT = 1.0  # seconds within which connections lost together are one event: a server closing its idle ones
_STALL = 0.1  # seconds this process must have stalled during an attempt for its timeout to be its own fault
_TIMEOUTS = (Fault.CONNECT_TIMEOUT, Fault.READ_TIMEOUT, Fault.WRITE_TIMEOUT)

_GIVEN_UP = Outcome(Cause.GIVEN_UP, retry=True, detail="given up: its endpoint was taken out while it waited")
_DEADLINE = "no reply before the deadline"


class Attempter:
    """Makes the attempts of one balancer. `release` ends a lease."""

    def __init__(
        self,
        engine: Engine,
        upstreams: Mapping[str, Upstream],
        classifier: Classifier,
        hook: AttemptHook | None,
        clock: Clock,
        release: Callable[[Lease], None],
    ) -> None:
        self._engine = engine
        self._upstreams = upstreams
        self._classifier = classifier
        self._hook = hook
        self._clock = clock
        self._release = release
        # Since when broken connections of an endpoint have been put down to their age, without one proving otherwise.
        self._excused: dict[str, float] = {}

    async def make(
        self, runner: Runner, request: Request, lease: Lease, deadline: float, resends: int, *, last: bool
    ) -> tuple[Reply | None, PathlbError | None, Outcome]:
        """The reply head or the error, and the outcome it means, which has been observed.

        When it raises (cancelled, or a bug in a transport) the lease is observed and released. `deadline` is a clock
        reading, `resends` the number of attempts before, `last` that no other will follow: then it is not given up.
        """
        endpoint = lease.endpoint
        scope = runner.scope(deadline - lease.started)
        if not last:
            lease.give_up = scope.cancel  # the engine sees to it that only what may be sent twice is given up
        span = self._start_span(request, endpoint.endpoint, resends) if self._hook is not None else None
        reply: Reply | None = None
        error: PathlbError | None = None
        outcome = CANCELLED
        ended = False
        try:
            with scope:
                upstream = self._upstreams.get(endpoint.url)
                if upstream is None:
                    raise UsageError("this Balancer was closed while the request waited")
                if span is None:
                    reply = await upstream.send(request, _NO_HEADERS)
                else:
                    reply = await upstream.send(less_replaced(request, span.headers), span.headers)
                if reply.reused:
                    self._excused.pop(endpoint.url, None)
                verdict = self._classifier.reply(request, reply, None)
                if isinstance(verdict, NeedBody):
                    verdict = await self._read(request, reply, verdict)
                outcome = verdict
                if outcome.relays:
                    lease.want.relays += outcome.relays
            if outcome is CANCELLED:
                outcome, error = self._cut_short(lease)
            ended = True
        except UpstreamError as exc:
            error = exc
            outcome = self.classify(request, exc, lease)
            ended = True
        except Exception as exc:
            # Neither a failure of the network nor a cancellation: a bug in a transport, or in what the caller gave.
            outcome = Outcome(Cause.LOCAL, detail=f"{type(exc).__name__}: {exc}")
            raise
        finally:
            half_read = reply if error is not None or not ended else None
            if half_read is not None:
                reply = None
            self._engine.observe(self._clock(), lease, outcome)
            if span is not None:
                _end_span(span, outcome, reply, error, lease.want.relays)
            if not ended:
                self._release(lease)
            if half_read is not None:
                with anyio.CancelScope(shield=True):
                    await half_read.body.aclose()
        try:
            return reply, error, outcome
        finally:
            del error  # its traceback holds this frame, which must not hold it

    async def _read(self, request: Request, reply: Reply, need: NeedBody) -> Outcome:
        """The verdict on a reply whose head does not decide."""
        verdict = self._classifier.reply(request, reply, await read_prefix(reply, need.limit))
        if isinstance(verdict, NeedBody):
            raise UsageError(f"{type(self._classifier).__name__}.reply asked for the body it was given")
        return verdict

    def forget(self, url: str) -> None:
        """An endpoint has left."""
        self._excused.pop(url, None)

    def classify(self, request: Request, error: UpstreamError, lease: Lease) -> Outcome:
        """What a failure says, and whether it says it about the endpoint at all."""
        if error.reused:
            error.reused = self._excuse(lease)
        outcome = self._classifier.failure(request, error)
        if error.fault in _TIMEOUTS and self._stalled(lease):
            detail = f"{outcome.detail} (this process was stalled meanwhile)"
            return Outcome(Cause.LOCAL, outcome.sent, retry=outcome.retry, detail=detail)
        return outcome

    def _excuse(self, lease: Lease) -> bool:
        """Whether a broken connection may be put down to its age: once, until a reused one has brought a reply again.
        An endpoint that breaks them all the time has a fault.
        """
        now = self._clock()
        return now - self._excused.setdefault(lease.endpoint.url, now) <= _SAME_EVENT

    def _stalled(self, lease: Lease) -> bool:
        return self._engine.stalled_during(lease, self._clock()) >= _STALL

    def _cut_short(self, lease: Lease) -> tuple[Outcome, PathlbError]:
        """The attempt's scope ended it: the engine gave it up, or the deadline came."""
        url = lease.endpoint.url
        if lease.given_up:
            detail = "given up while it waited for a reply"
            return _GIVEN_UP, UpstreamError(Fault.READ_TIMEOUT, Sent.MAYBE_SENT, url, detail)
        waited = self._clock() - lease.started
        # The caller's deadline says little about the endpoint, except to a breaker that asked just this.
        cause = Cause.BEYOND if lease.probing is None else Cause.INSTANCE
        if self._stalled(lease):
            cause = Cause.LOCAL
        return Outcome(cause, detail=_DEADLINE), DeadlineExceeded(
            f"no reply from {url} before the deadline; the last attempt waited {waited:.3g} s"
        )

    def _start_span(self, request: Request, endpoint: Endpoint, resends: int) -> AttemptSpan | None:
        assert self._hook is not None
        try:
            return self._hook.start(request, endpoint, resends)
        except Exception:  # of a sampler, a processor, a propagator: telemetry decides nothing, this neither
            logger.exception("starting a span failed")
            return None


def _end_span(span: AttemptSpan, outcome: Outcome, reply: Reply | None, error: PathlbError | None, relays: int) -> None:
    try:
        span.end(outcome, reply, error, relays)
    except Exception:
        logger.exception("ending a span failed")

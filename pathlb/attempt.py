"""One attempt on the endpoint of a lease: send, classify, observe. Everything that waits for a server waits in here."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .admission import CANCELLED
from .classify.http import HTTPClassifier
from .core.engine import Engine
from .core.lease import Lease
from .core.model import Cause, Clock, Outcome, Sent
from .errors import DeadlineExceeded, Fault, PathlbError, UpstreamError
from .exchange import Headers, Reply, Request
from .runner import Runner
from .telemetry.hook import AttemptHook, less_replaced
from .upstream.base import Upstream

_NO_HEADERS: Headers = []
_STALL = 0.1  # seconds this process must have stalled during an attempt for its timeout to be its own fault
_TIMEOUTS = (Fault.CONNECT_TIMEOUT, Fault.READ_TIMEOUT, Fault.WRITE_TIMEOUT)

_GIVEN_UP = Outcome(Cause.GIVEN_UP, retry=True, detail="given up: its endpoint was taken out while it waited")
_DEADLINE = Outcome(Cause.BEYOND, detail="no reply before the deadline")


class Attempter:
    """Makes the attempts of one balancer. `release` ends a lease."""

    def __init__(
        self,
        engine: Engine,
        upstreams: Mapping[str, Upstream],
        classifier: HTTPClassifier,
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

    async def make(
        self, runner: Runner, request: Request, lease: Lease, deadline: float, resends: int
    ) -> tuple[Reply | None, PathlbError | None, Outcome]:
        """The reply head or the error, and the outcome it means, which has been observed.

        When it raises (cancelled, or a bug in a transport) the lease is observed and released. `deadline` is a clock
        reading, `resends` the number of attempts before.
        """
        endpoint = lease.endpoint
        scope = runner.scope(deadline - lease.started)
        if lease.want.resendable:
            lease.give_up = scope.cancel
        span = self._hook.start(request, endpoint.endpoint, resends) if self._hook is not None else None
        reply: Reply | None = None
        error: PathlbError | None = None
        outcome = CANCELLED
        ended = False
        try:
            with scope:
                upstream = self._upstreams[endpoint.url]
                if span is None:
                    reply = await upstream.send(request, _NO_HEADERS)
                else:
                    reply = await upstream.send(less_replaced(request, span.headers), span.headers)
            if reply is not None:
                outcome = self._classifier.reply(request, reply)
            else:
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
            self._engine.observe(self._clock(), lease, outcome)
            if span is not None:
                span.end(outcome, reply, error)
            if not ended:
                self._release(lease)
        return reply, error, outcome

    def classify(self, request: Request, error: UpstreamError, lease: Lease) -> Outcome:
        """What a failure says, and whether it says it about the endpoint at all."""
        outcome = self._classifier.failure(request, error)
        if error.fault in _TIMEOUTS and self._engine.stalled_during(lease, self._clock()) >= _STALL:
            detail = f"{outcome.detail} (this process was stalled meanwhile)"
            return Outcome(Cause.LOCAL, outcome.sent, retry=outcome.retry, detail=detail)
        return outcome

    def _cut_short(self, lease: Lease) -> tuple[Outcome, PathlbError]:
        """The attempt's scope ended it: the engine gave it up, or the deadline came."""
        url = lease.endpoint.url
        if lease.given_up:
            detail = "given up while it waited for a reply"
            return _GIVEN_UP, UpstreamError(Fault.READ_TIMEOUT, Sent.MAYBE_SENT, url, detail)
        waited = self._clock() - lease.started
        return _DEADLINE, DeadlineExceeded(
            f"no reply from {url} before the deadline; the last attempt waited {waited:.3g} s"
        )

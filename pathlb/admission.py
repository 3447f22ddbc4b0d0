"""The first station of the road: a lease for an attempt, after a wait in the queue if need be; nothing else waits."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from .core.admission import Waiter
from .core.engine import Engine, Grant, Refusal
from .core.lease import Lease, Want
from .core.model import Cause, Clock, Outcome
from .errors import DeadlineExceeded, NoEligibleEndpoint, QueueFull, QueueTimeout, UsageError
from .exchange import Attempt

CANCELLED = Outcome(Cause.CANCELLED, detail="cancelled by the caller")


class Admission:
    """Acquires leases from the engine on behalf of waiting tasks; `release` takes back what nobody uses."""

    def __init__(self, engine: Engine, clock: Clock, queue_timeout: float, release: Callable[[Lease], None]) -> None:
        self._engine = engine
        self._clock = clock
        self._queue_timeout = queue_timeout
        self._release = release
        self.closed = False
        """The balancer was closed: what still waits is told so."""

    async def lease(self, want: Want, deadline: float, patience: float | None, attempts: list[Attempt]) -> Lease:
        """A lease, at once or after a wait of at most `patience` seconds (None: the queue timeout).

        Raises `NoEligibleEndpoint`, `QueueFull`, `QueueTimeout`, `DeadlineExceeded` or, when the balancer is closed
        meanwhile, `UsageError`.
        """
        now = self._clock()
        turn = _Turn()
        grant = self._engine.acquire(now, want, turn.come)
        if isinstance(grant, Lease):
            return grant
        if isinstance(grant, Refusal):
            raise self._refused(grant, attempts)
        seconds = min(self._queue_timeout if patience is None else patience, deadline - now)
        return await self._wait(grant, turn, seconds, deadline, attempts)

    async def _wait(
        self, waiter: Waiter[Grant], turn: _Turn, seconds: float, deadline: float, attempts: list[Attempt]
    ) -> Lease:
        why = "cancelled"
        try:
            with anyio.move_on_after(seconds):
                await turn.wait()
            why = "timeout"
        finally:
            left = self._engine.leave_queue(self._clock(), waiter, why)
            if why == "cancelled" and isinstance(waiter.grant, Lease):
                # Granted and cancelled at once: the grant goes back, and with it to the next in the queue.
                self._engine.observe(self._clock(), waiter.grant, CANCELLED)
                self._release(waiter.grant)
        if not left:
            if isinstance(waiter.grant, Lease):
                return waiter.grant
            assert isinstance(waiter.grant, Refusal)  # it has left the queue with one or the other
            raise self._refused(waiter.grant, attempts)
        if self._clock() >= deadline:
            raise DeadlineExceeded(
                "the deadline passed in the queue: every eligible endpoint is at its limit", attempts
            )
        raise QueueTimeout(
            f"waited {seconds:.3g} s in the queue: every eligible endpoint is at its limit; "
            "add endpoints, or raise Limits(concurrency=...) if they can take more",
            attempts,
        )

    def _refused(self, refusal: Refusal, attempts: list[Attempt]) -> Exception:
        if self.closed:
            return UsageError("this Balancer was closed while the request waited", attempts)
        if refusal.error is not None:
            return refusal.error
        if refusal.queue_full:
            return QueueFull(
                f"the queue is full ({refusal.why}) and every eligible endpoint is at its limit; "
                "send less, add endpoints, or raise Limits(queue=...)",
                attempts,
            )
        return NoEligibleEndpoint(f"no eligible endpoint: {refusal.why}", attempts)


class _Turn:
    """A request's place in the queue, on the async side: the event is made only when there is a wait."""

    __slots__ = ("_event", "_here")

    def __init__(self) -> None:
        self._here = False
        self._event: anyio.Event | None = None

    def come(self) -> None:
        self._here = True
        if self._event is not None:
            self._event.set()

    async def wait(self) -> None:
        if not self._here:
            self._event = anyio.Event()
            await self._event.wait()

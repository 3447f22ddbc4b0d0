"""A lease: the right to one request on one endpoint, with two one-shot ends.

    picked --observe--> observed --release--> released

`observe` says how the attempt ended, at the reply head or the failure; `release` says that the reply's body is done
with and the request no longer in flight. Both are made on the endpoint captured at the pick, whatever happened to it
since. Anything else raises `IllegalEvent`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .breaker import CircuitBreaker
    from .endpoints import EndpointState
    from .scope import Scope


class LeaseState(enum.Enum):
    PICKED = "picked"
    OBSERVED = "observed"
    RELEASED = "released"


_PICKED = LeaseState.PICKED


class Want:
    """What one request asks of a pick. One object serves all its attempts."""

    __slots__ = ("_resendable", "avoid", "deadline", "key", "once_spent", "paced", "pin", "plain", "relays", "tried")

    def __init__(
        self,
        *,
        resendable: bool | Callable[[], bool] = False,
        pin: str | None = None,
        avoid: frozenset[str] = frozenset(),
        key: str | None = None,
        deadline: float = math.inf,
        paced: bool = False,
    ) -> None:
        self._resendable = resendable
        self.pin = pin
        self.avoid = avoid
        self.key = key
        self.deadline = deadline
        """Clock reading by which a reply head must be there."""
        self.paced = paced
        """Its body comes at the pace of its caller: how long it takes says nothing of an endpoint."""
        self.tried: list[EndpointState] = []
        """Endpoints of earlier attempts."""
        self.relays = 0
        """Requests the endpoints made behind themselves for it, as far as they say so."""
        self.once_spent = False
        """An outcome that is worth one more attempt only (`Outcome.once`) has had it."""
        self.plain = pin is None and not avoid
        """Nothing restricts the choice; becomes false with the first failed attempt."""

    @property
    def resendable(self) -> bool:
        """May be sent twice: it can serve as a probe, and be given up when it hangs. Where the answer is in the body,
        it is asked for when the question comes up, once.
        """
        if not isinstance(self._resendable, bool):
            self._resendable = self._resendable()
        return self._resendable

    def failed_on(self, endpoint: EndpointState) -> None:
        """An attempt there failed: go elsewhere next."""
        self.tried.append(endpoint)
        self.plain = False


class Lease:
    """Handed out by `Engine.acquire`; given back through `Engine.observe` and `Engine.release`."""

    __slots__ = (
        "began",
        "candidates",
        "endpoint",
        "epoch",
        "give_up",
        "given_up",
        "in_flight",
        "key",
        "key_epoch",
        "panic",
        "probing",
        "reason",
        "scope",
        "started",
        "state",
        "want",
    )

    def __init__(
        self,
        endpoint: EndpointState,
        want: Want,
        started: float,
        began: float,
        reason: str,
        candidates: int,
    ) -> None:
        self.endpoint = endpoint
        self.want = want
        self.started = started
        """Clock reading at the pick, in seconds."""
        self.began = began
        """The same in running time: the clock less this process's own stalls, which are nobody's latency."""
        self.reason = reason
        self.candidates = candidates
        self.in_flight = endpoint.in_flight
        """In flight at the endpoint before this one."""
        self.state = _PICKED
        self.epoch = endpoint.breaker.epoch
        self.key = want.key
        self.scope: Scope | None = None
        """Of the key on the endpoint, if there is a key."""
        self.key_epoch = 0
        self.panic = False
        self.probing: CircuitBreaker | None = None
        """The breaker this request is the probe of."""
        self.give_up: Callable[[], None] | None = None
        """Set by the shell while the attempt may be abandoned; called by the engine, at most once."""
        self.given_up = False
        """Called, and the retry it leads to is already paid for."""

    @property
    def set_aside(self) -> bool:
        """Whether what becomes of it says nothing (more) of its endpoint beside the peers: its caller sets the pace,
        its service is out there as an outlier, or one of the two has been since the pick.
        """
        scope, started = self.scope, self.started
        if self.want.paced or started < self.endpoint.ejection.returned:
            return True
        return scope is not None and (scope.ejection.until is not None or started < scope.ejection.returned)

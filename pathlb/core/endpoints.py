"""The endpoints and what is known of each. The state of an endpoint outlives changes of the set around it."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from .errors import ConfigError
from .health import HealthState
from .load import LatencyEstimate, ReportedLoad
from .model import Endpoint
from .scope import Scope

_REPORT_EVERY = 0.01  # seconds; to look at every reply would cost more, and tell a policy no more


class Admin(enum.Enum):
    """What the operator said."""

    READY = "ready"
    DRAINING = "draining"
    """Kept in the set, gets nothing new."""
    REMOVED = "removed"
    """No longer in the set; its requests in flight run to their end."""


@dataclass(slots=True)
class Counts:
    """Attempts on one endpoint since it joined."""

    picks: int = 0
    ok: int = 0
    failed: int = 0
    """Instance, service and further faults."""
    overloaded: int = 0
    ignored: int = 0
    """Cancelled, given up, local faults."""
    broken: int = 0
    """Bodies that broke off, after their heads were counted above."""
    released: int = 0
    ejections: int = 0
    breaker_opens: int = 0


class EndpointState(Scope):
    """One endpoint in the engine. `weight` is its present weight: what was configured, on the slow-start ramp."""

    __slots__ = (
        "admin",
        "counts",
        "endpoint",
        "in_flight",
        "latency",
        "overload_streak",
        "ramp_from",
        "report_due",
        "reported_load",
        "scopes",
        "throttled_until",
        "url",
        "weight",
    )

    def __init__(self, endpoint: Endpoint, health: HealthState) -> None:
        super().__init__(health)
        self.endpoint = endpoint
        self.url = endpoint.url
        self.weight = endpoint.weight
        self.in_flight = 0
        self.scopes: dict[str, Scope] = {}
        """What is known of single services (keys) on it."""
        self.admin = Admin.READY
        self.latency = LatencyEstimate()
        self.throttled_until = -math.inf
        self.overload_streak = 0
        """Overload answers in a row."""
        self.ramp_from: float | None = None
        """When its slow start began; None at full weight."""
        self.reported_load: ReportedLoad | None = None
        """What it said last of its own load."""
        self.report_due = -math.inf
        """When a reply is to be looked at for that again."""
        self.counts = Counts()

    def take_report(self, now: float, load: ReportedLoad | None) -> None:
        """A reply was looked at; `load` is what it told, if anything."""
        self.report_due = now + _REPORT_EVERY
        if load is not None:
            self.reported_load = load

    def __repr__(self) -> str:
        return f"<EndpointState {self.url} {self.admin.value} in_flight={self.in_flight}>"


@dataclass(frozen=True, slots=True)
class SetChange:
    """What one `apply` did."""

    added: list[EndpointState] = field(default_factory=list)
    removed: list[EndpointState] = field(default_factory=list)
    kept: list[EndpointState] = field(default_factory=list)


class EndpointSet:
    """The endpoints by URL: the members, and the removed ones that still have requests in flight."""

    def __init__(self) -> None:
        self._members: dict[str, EndpointState] = {}
        self._leaving: dict[str, EndpointState] = {}

    def __iter__(self) -> Iterator[EndpointState]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, url: str) -> EndpointState | None:
        """The member with this URL."""
        return self._members.get(url)

    def everyone(self) -> Iterator[EndpointState]:
        """Members, then those that are leaving."""
        yield from self._members.values()
        yield from self._leaving.values()

    def apply(self, snapshot: Iterable[EndpointState]) -> SetChange:
        """Make `snapshot` the members. Of an endpoint already known (leaving ones too) the state is kept: its load,
        breaker and history; only its settings are taken over.
        """
        change = SetChange()
        members: dict[str, EndpointState] = {}
        for fresh in snapshot:
            url = fresh.url
            known = self._members.get(url) or self._leaving.pop(url, None)
            if known is None:
                change.added.append(fresh)
                members[url] = fresh
                continue
            if known.admin is Admin.REMOVED:
                known.admin = Admin.READY
                change.added.append(known)
            else:
                change.kept.append(known)
            known.endpoint = fresh.endpoint
            members[url] = known
        for url, state in self._members.items():
            if url not in members:
                state.admin = Admin.REMOVED
                change.removed.append(state)
                if state.in_flight:
                    self._leaving[url] = state
        self._members = members
        return change

    def forget(self, state: EndpointState) -> None:
        """A removed endpoint has nothing in flight any more."""
        self._leaving.pop(state.url, None)


def check_endpoints(endpoints: Iterable[Endpoint | str]) -> list[Endpoint]:
    """URLs or Endpoints as a list of Endpoints. Raises `ConfigError` on none, on duplicates, on bad URLs."""
    if isinstance(endpoints, str | Endpoint) or not isinstance(endpoints, Iterable):
        raise ConfigError("endpoints", f"must be a list of URLs or Endpoints, not {type(endpoints).__name__}")
    checked: dict[str, Endpoint] = {}
    for index, given in enumerate(endpoints):
        try:
            endpoint = given if isinstance(given, Endpoint) else Endpoint(given)
        except ConfigError as exc:
            raise ConfigError(f"endpoints[{index}]", exc.problem) from None
        if endpoint.url in checked:
            raise ConfigError(f"endpoints[{index}]", f"{endpoint.url} is listed twice; use weight= for a larger share")
        checked[endpoint.url] = endpoint
    if not checked:
        raise ConfigError("endpoints", "must name at least one endpoint")
    return list(checked.values())

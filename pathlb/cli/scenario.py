"""What the demo can play: a fleet, the traffic over it, and what happens to the fleet meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from ..config import BalancerOptions
from ..core.config import Breaker, Outlier, SlowStart
from ..core.model import Endpoint
from ..profile import PATHProfile
from ..testing import Fleet, Mode, ServiceMode

_SLOWER = 10


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steady traffic, begun by a change to the fleet."""

    name: str
    change: Callable[[], None] = lambda: None
    """Blocks until the change is in effect."""
    outages: tuple[str, ...] = ()
    """The services that nobody can serve meanwhile."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One of the demo's plays. Its requests are reads, and go to the services in turn."""

    services: tuple[str, ...]
    path: tuple[str, ...]
    """What `Fleet` takes: the services of a fleet that behaves like PATH."""
    phases: Callable[[Fleet], list[Phase]]
    options: Callable[[float], BalancerOptions]
    """The balancer's, with which instances come back within so many seconds."""
    settings: str
    """What the options start from, in words."""


def label(url: str) -> str:
    """Short for an instance of this machine: its port."""
    return f":{Endpoint(url).port}"


def _instances(fleet: Fleet) -> list[Phase]:
    first, last = fleet[0], fleet[-1]
    slow = partial(last.set_mode, Mode.SLOW, factor=_SLOWER)
    return [
        Phase("steady"),
        Phase(f"{label(first.url)} killed", first.kill),
        Phase(f"{label(first.url)} restored", first.restore),
        Phase(f"{label(last.url)} {_SLOWER}x slower", slow),
        Phase(f"{label(last.url)} recovered", last.restore),
    ]


def _options(back: float) -> BalancerOptions:
    return {
        "idempotent": True,  # the requests are reads, though JSON-RPC makes them POSTs
        "breaker": Breaker(open_for=min(1.0, back), open_max=back),
        "outlier": Outlier(eject_for=back),
        "slow_start": SlowStart(window=back),
    }


ANY = Scenario(
    services=("eth",),
    path=(),
    phases=_instances,
    options=_options,
    settings="pathlb's defaults",
)

_PATH_SERVICES = ("eth", "poly")


def _services(fleet: Fleet) -> list[Phase]:
    one, (eth, poly) = fleet[1], _PATH_SERVICES
    return [
        *_instances(fleet),
        Phase(f"{eth}: no session on {label(one.url)}", partial(one.set_service, eth, ServiceMode.NO_SESSION)),
        Phase(f"{eth}: session is back", partial(one.set_service, eth, ServiceMode.OK)),
        Phase(f"{poly}: all suppliers fail", partial(fleet.set_service, poly, ServiceMode.SUPPLIERS_FAIL), (poly,)),
        Phase(f"{poly}: suppliers are back", partial(fleet.set_service, poly, ServiceMode.OK)),
    ]


def _path_options(back: float) -> BalancerOptions:
    profile = PATHProfile(services=_PATH_SERVICES)
    assert profile.health is not None
    return {
        **_options(back),
        "idempotent": None,  # PATH's methods say what is a read
        "profile": profile,
        "health": replace(profile.health, interval=back / 2, changing_interval=min(1.0, back / 2)),
    }


PATH = Scenario(
    services=_PATH_SERVICES,
    path=_PATH_SERVICES,
    phases=_services,
    options=_path_options,
    settings=f"PATHProfile(services={list(_PATH_SERVICES)})",
)

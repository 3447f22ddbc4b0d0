"""What the tests of PATH share: clients in front of emulated gateways, calls, traffic, and what the events tell."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx

import pathlb
from pathlb import Balancer, PATHProfile
from pathlb.core.events import BreakerChanged, Ejected, Event, Returned
from pathlb.core.model import Cause, Outcome
from pathlb.core.snapshot import EndpointSnapshot, Snapshot
from pathlb.exchange import Attempt
from pathlb.testing import FleetGateway

PATIENCE = 40.0
"""Seconds any wait of a test may take before it fails: far beyond what it needs on a loaded machine."""

SERVICES = ("eth", "solana", "poly")


def path_client(
    endpoints: Iterable[Any],
    services: Any = SERVICES,
    *,
    read: float = PATIENCE,
    connect: float = PATIENCE,
    prefer: str | None = None,
    **options: Any,
) -> pathlb.AsyncClient:
    """A client with the profile, patient with the machine, and without probes unless a profile is given.

    `prefer=url` sends first attempts there while it is eligible.
    """
    if prefer is not None:
        options["policy"] = Prefer(prefer)
    options.setdefault("profile", PATHProfile(services=services, probes=False))
    options.setdefault("deadline", PATIENCE)
    options.setdefault("rng", random.Random(1))
    timeout = httpx.Timeout(connect=connect, read=read, write=PATIENCE, pool=None)
    return pathlb.AsyncClient(endpoints, timeout=timeout, trust_env=False, **options)


class Prefer:
    """A policy that picks one endpoint while it may: every request meets it first."""

    name = "prefer"

    def __init__(self, url: str) -> None:
        self._url = url

    def pick(self, candidates: Sequence[Any], rng: Any) -> Any:
        return next((one for one in candidates if one.endpoint.url == self._url), None) or min(
            candidates, key=lambda one: one.in_flight
        )


# --- calls


def call(method: str = "eth_call", *params: Any, id: Any = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": list(params)}


def of_service(service: str) -> dict[str, str]:
    return {"Target-Service-Id": service}


def attempts_of(result: httpx.Response | BaseException) -> tuple[Attempt, ...]:
    """What was tried for a reply, or for an error."""
    if isinstance(result, httpx.Response):
        return tuple(result.extensions["pathlb"]["attempts"])
    assert isinstance(result, pathlb.PathlbError), result
    return result.attempts


async def try_to(send: Callable[[], Any]) -> httpx.Response | httpx.HTTPError:
    """A reply, or the error that came in its place."""
    with anyio.fail_after(PATIENCE):
        try:
            response: httpx.Response = await send()
        except httpx.HTTPError as exc:
            return exc
    return response


# --- traffic


@dataclass
class Result:
    """One request of the traffic."""

    service: str
    number: int
    attempts: tuple[Attempt, ...]
    status: int | None
    """None when there was no reply."""
    answered: bool
    """With a 200 and the answer to this very call."""
    what: str
    """For people: the body, or the error."""

    @property
    def endpoints(self) -> list[str]:
        return [attempt.endpoint for attempt in self.attempts]


@dataclass
class Traffic:
    """Reads of several services in turn, so many at a time, each checked for the answer to its own call."""

    client: pathlb.AsyncClient
    services: Sequence[str] = SERVICES
    concurrency: int = 20
    results: list[Result] = field(default_factory=list)
    _number: int = 0

    async def run(self, count: int, *services: str) -> list[Result]:
        """Make so many requests, of these services (default: all)."""
        left = count

        def more() -> bool:
            nonlocal left
            left -= 1
            return left >= 0

        return await self._drive(more, services)

    async def until(self, condition: Callable[[], Any], *services: str) -> list[Result]:
        """Keep the traffic up until the condition holds."""
        return await self._drive(lambda: not condition(), services)

    async def _drive(self, more: Callable[[], bool], services: Sequence[str]) -> list[Result]:
        before = len(self.results)

        async def work() -> None:
            while more():
                await self.one((services or self.services)[self._number % len(services or self.services)])

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as group:
                for _ in range(self.concurrency):
                    group.start_soon(work)
        return self.results[before:]

    async def one(self, service: str) -> Result:
        self._number += 1
        number = self._number
        sent = call("eth_call", number, id=number)
        try:
            response = await self.client.post("/v1", json=sent, headers=of_service(service))
        except httpx.HTTPError as exc:
            result = Result(service, number, attempts_of(exc), None, False, str(exc))
        else:
            answer = {"jsonrpc": "2.0", "id": number, "result": {"method": "eth_call", "params": [number]}}
            answered = response.status_code == 200 and bool(response.content) and response.json() == answer
            result = Result(service, number, attempts_of(response), response.status_code, answered, response.text)
        self.results.append(result)
        return result


def unanswered(results: Iterable[Result]) -> list[Result]:
    return [one for one in results if not one.answered]


# --- what the events and the snapshot tell


class Events(list[Event]):
    """The events of a balancer from now on."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        balancer.subscribe(self.append)

    def of(self, *kinds: type[Any], endpoint: str | None = None) -> list[Any]:
        return [
            one
            for one in self
            if isinstance(one, kinds) and (endpoint is None or getattr(one, "endpoint", "") == endpoint)
        ]

    def trace(self, urls: Sequence[str]) -> list[str]:
        """What breakers and outlier comparison did, one line each: `0/eth closed -> open`; the gateway by its index."""
        lines: list[str] = []
        for one in self.of(BreakerChanged, Ejected, Returned):
            where = f"{urls.index(one.endpoint)}{'/' + one.key if one.key else ''}"
            if isinstance(one, BreakerChanged):
                lines.append(f"{where} {one.before} -> {one.after}")
            else:
                lines.append(f"{where} ejected" if isinstance(one, Ejected) else f"{where} returned")
        return lines


async def until(condition: Callable[[], Any]) -> None:
    """Wait until the condition holds."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await anyio.sleep(0.005)


def endpoint(balancer: Balancer, url: str) -> EndpointSnapshot:
    """What the balancer knows of one endpoint."""
    return next(one for one in balancer.snapshot().endpoints if one.url == url)


def breakers(balancer: Balancer, url: str, service: str = "eth") -> tuple[str, str]:
    """The states of an instance's breaker and of that of a service on it."""
    one = endpoint(balancer, url)
    scoped = one.breakers.get(service)
    return one.breaker.state, scoped.state if scoped is not None else "closed"


async def at_rest(balancer: Balancer) -> Snapshot:
    """The snapshot once nothing is in flight or queued, which must come to be."""

    def idle() -> bool:
        now = balancer.snapshot()
        return now.in_flight == 0 and now.queued == 0

    await until(idle)
    snapshot = balancer.snapshot()
    for one in snapshot.endpoints:
        assert one.counts["picks"] == one.counts["released"], one
    return snapshot


def of_this_process(outcome: Outcome) -> bool:
    """A timeout that the machine is to blame for: busy, it may stall any process for longer than a short timeout."""
    return outcome.cause is Cause.LOCAL and "stalled meanwhile" in outcome.detail


# --- what the gateways tell


def by_service(gateway: FleetGateway) -> Counter[str]:
    """How many relay requests of each service a recording gateway has received."""
    found: Counter[str] = Counter()
    for request in gateway.received():
        for name, value in request.headers:
            if name.lower() == b"target-service-id":
                found[value.decode()] += 1
    return found


# --- replies of PATH that no mode of the fleet gives


def path_headers(tried: str = "", retries: int = 0) -> list[tuple[bytes, bytes]]:
    """What is on every answer of PATH's relay handler."""
    return [
        (b"Content-Type", b"application/json"),
        (b"X-Archival-Request", b"false"),
        (b"X-Retry-Count", b"%d" % retries),
        (b"X-Suppliers-Tried", tried.encode()),
    ]


def path_error(why: str, *, code: int = -31001, id: Any = 1) -> bytes:
    """The body of an error PATH constructs itself, cause known (shape A)."""
    data = {"error": why, "retryable": "true"}
    error = {"code": code, "message": f"internal error: {why}", "data": data}
    return json.dumps({"id": id, "jsonrpc": "2.0", "error": error}, separators=(",", ":")).encode()


NO_RESPONSE = (
    b'{"id":null,"jsonrpc":"2.0","error":{"code":-31001,"message":"Failed to receive any response from endpoints. '
    b'This could be due to network issues or high load. Please try again.","data":{"retryable":"true"}}}'
)
"""The same, cause unknown (shape B)."""

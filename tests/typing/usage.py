"""The public API as its users write it. Never run: `mypy --strict` reads it, in `make check`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, assert_type

import httpx
import httpx2
import tenacity

import pathlb
import pathlb.httpx2
from pathlb import (
    P2C,
    AsyncClient,
    BalancedTransport,
    Balancer,
    Breaker,
    ConfigError,
    DeadlineExceeded,
    Endpoint,
    Health,
    LeastConnections,
    Limits,
    NoEligibleEndpoint,
    Outlier,
    Panic,
    PathlbError,
    QueueFull,
    QueueTimeout,
    Retry,
    RoundRobin,
    SlowStart,
    UpstreamError,
    UsageError,
)
from pathlb.core.events import BreakerChanged, Event
from pathlb.core.model import Rng
from pathlb.core.policy.base import CandidateT
from pathlb.core.snapshot import EndpointSnapshot, Snapshot
from pathlb.exchange import Attempt, Headers, Reply, Request
from pathlb.testing import Fleet, ScriptedUpstream
from pathlb.upstream.base import Upstream
from pathlb.upstream.transport import TransportUpstream, TransportUpstreams


async def a_client() -> None:
    async with AsyncClient(["http://127.0.0.1:3069", Endpoint("http://127.0.0.1:3070", weight=2)]) as client:
        assert_type(client, AsyncClient)
        response = await client.post("/v1", json={"id": 1}, headers={"Target-Service-Id": "eth"})
        assert_type(response, httpx.Response)
        async with client.stream("GET", "/events") as stream:
            assert_type(stream, httpx.Response)
        request = client.build_request("GET", "/", extensions={"pathlb": {"deadline": 2.0, "pin": "http://a"}})
        assert_type(await client.send(request), httpx.Response)
        assert_type(client.balancer, Balancer)
    plain: httpx.AsyncClient = AsyncClient(("http://a",))
    await plain.aclose()


async def a_client_of_httpx2() -> None:
    async with pathlb.httpx2.AsyncClient(["http://a"], deadline=10) as client:
        assert_type(await client.get("/"), httpx2.Response)
    plain: httpx2.AsyncClient = client
    await plain.aclose()


async def under_other_clients(balancer: Balancer) -> None:
    transport: httpx.AsyncBaseTransport = BalancedTransport(balancer, host="path-gateway")
    httpx.AsyncClient(transport=transport)
    httpx.AsyncClient(mounts={"http://path-gateway": BalancedTransport(balancer)})
    httpx2.AsyncClient(transport=pathlb.httpx2.BalancedTransport(balancer))
    AsyncClient(balancer, base_url="http://path-gateway/v1", auth=("user", "pass"), follow_redirects=True)


def every_setting() -> None:
    def by_path(request: httpx.Request) -> bool | None:
        return True if request.url.path.startswith("/read") else None

    balancer = Balancer(
        ["http://a", "unix:///run/gw.sock"],
        policy=RoundRobin(),
        breaker=Breaker(failures=3),
        outlier=Outlier(latency_factor=5),
        panic=Panic(fail_closed=True),
        slow_start=SlowStart(window=0),
        retry=Retry(
            stop=tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(5),
            wait=tenacity.wait_chain(tenacity.wait_fixed(0), tenacity.wait_random_exponential()),
            retry=tenacity.retry_if_exception_type(httpx.ConnectError) | tenacity.retry_if_result(lambda r: True),
        ),
        limits=Limits.modest(),
        deadline=5,
        health=Health("/health", statuses=[200, 204], wait=False),
        idempotent=by_path,
        telemetry=False,
        upstream=TransportUpstreams(verify=False, http2=True),
    )
    assert_type(balancer, Balancer)
    Balancer(["http://a"], outlier=None, health=None, policy=P2C(), idempotent=True, limits=Limits.generous())
    Balancer(["http://a"], policy=LeastConnections())
    AsyncClient(["http://a"], retry=Retry(attempts=2, statuses=[503]), limits=Limits(concurrency=10))


class Nearest:
    """A policy of the user's own."""

    name = "nearest"

    def pick(self, candidates: Sequence[CandidateT], rng: Rng) -> CandidateT:
        return min(candidates, key=lambda state: float(state.endpoint.metadata.get("distance", 0)))


class Counting:
    """An upstream of the user's own."""

    kind = "counting"

    def __init__(self, inner: Upstream) -> None:
        self.inner = inner
        self.count = 0

    async def send(self, request: Request, extra_headers: Headers) -> Reply:
        self.count += 1
        return await self.inner.send(request, extra_headers)

    async def aclose(self) -> None:
        await self.inner.aclose()


def counting(endpoint: Endpoint) -> Counting:
    return Counting(TransportUpstream(httpx.AsyncHTTPTransport(), endpoint))


def own_parts() -> None:
    Balancer(["http://a"], policy=Nearest(), upstream=counting)
    AsyncClient(["http://a"], policy=Nearest(), upstream=counting)


async def operation(balancer: Balancer) -> None:
    balancer.update(["http://a", Endpoint("http://b", metadata={"zone": "eu"})])
    balancer.drain("http://a")
    balancer.undrain(Endpoint("http://a"))
    snapshot = balancer.snapshot()
    assert_type(snapshot, Snapshot)
    assert_type(snapshot.endpoints, tuple[EndpointSnapshot, ...])
    assert_type(snapshot.endpoints[0].latency, float | None)
    assert_type(snapshot.endpoints[0].counts, Mapping[str, int])
    json.dumps(snapshot.to_dict())

    def listen(event: Event) -> None:
        if isinstance(event, BreakerChanged):
            assert_type(event.after, str)

    assert_type(balancer.subscribe(listen), Callable[[], None])
    reply = await balancer.send(Request("GET", b"/", [], deadline=1.0, avoid=frozenset({"http://a"})))
    assert_type(reply.attempts, tuple[Attempt, ...])
    parts: AsyncIterator[bytes] = aiter(reply.body)
    async for part in parts:
        assert_type(part, bytes)
    await reply.body.aclose()


async def errors(client: AsyncClient) -> None:
    try:
        await client.get("/")
    except (NoEligibleEndpoint, QueueFull, QueueTimeout, DeadlineExceeded, UsageError) as exc:
        assert_type(exc.attempts, tuple[Attempt, ...])
    except UpstreamError as exc:
        assert_type(exc.endpoint, str)
        assert_type(exc.local, bool)
    except PathlbError as exc:
        assert_type(exc.message, str)
    except ConfigError as exc:
        assert_type(exc.field, str)


def in_tests() -> None:
    with Fleet(2) as fleet:
        AsyncClient(fleet.urls)
    upstreams = {"http://a": ScriptedUpstream()}
    Balancer(list(upstreams), upstream=ScriptedUpstream.factory(upstreams))


def what_is_wrong() -> None:
    """Each of these must be an error: `warn_unused_ignores` complains where one is not."""
    AsyncClient()  # type: ignore[call-arg]
    AsyncClient(["http://a"], retries=3)  # type: ignore[call-arg]
    AsyncClient(["http://a"], limits=httpx.Limits())  # type: ignore[arg-type]
    AsyncClient(["http://a"], transport=httpx.AsyncHTTPTransport())  # type: ignore[arg-type]
    Balancer(["http://a"], policy=object())  # type: ignore[arg-type]
    Balancer(["http://a"], deadline="5")  # type: ignore[arg-type]
    Balancer([5])  # type: ignore[list-item]
    Retry(stop=3)  # type: ignore[arg-type]
    Endpoint("http://a").weight = 2  # type: ignore[misc]
    BalancedTransport(["http://a"])  # type: ignore[arg-type]
    httpx2.AsyncClient(transport=BalancedTransport(Balancer(["http://a"])))  # type: ignore[arg-type]
    any_client: Any = AsyncClient(["http://a"])
    del any_client

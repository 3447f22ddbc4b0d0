"""Helpers of the fault tests."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import anyio
import httpx
import httpx2
import sniffio

import pathlb
import pathlb.httpx2
from pathlb.core.events import Event
from pathlb.core.snapshot import EndpointSnapshot, Snapshot
from pathlb.testing import FaultServer
from pathlb.upstream.http1 import Http1Upstream
from pathlb.upstream.http1.connection import State

PATIENCE = 30.0
"""Seconds any wait of a test may take before it fails: far beyond what it needs on a loaded machine."""


@dataclass(frozen=True)
class Stack:
    """One HTTP library and pathlb's client for it."""

    lib: ModuleType
    face: ModuleType

    def client(self, endpoints: Iterable[Any], *, connect: float = 0.5, read: float = 0.5, **options: Any) -> Any:
        """A client with short timeouts; `prefer=url` sends first attempts there while it is eligible."""
        prefer = options.pop("prefer", None)
        if prefer is not None:
            options["policy"] = Prefer(prefer)
        options.setdefault("deadline", 10.0)
        options.setdefault("trust_env", False)
        timeout = self.lib.Timeout(connect=connect, read=read, write=5.0, pool=None)
        return self.face.AsyncClient(endpoints, timeout=timeout, **options)


STACKS = {"httpx": Stack(httpx, pathlb), "httpx2": Stack(httpx2, pathlb.httpx2)}


class Prefer:
    """A policy that picks one endpoint while it may: every request meets it first."""

    name = "prefer"

    def __init__(self, url: str) -> None:
        self._url = url

    def pick(self, candidates: Sequence[Any], rng: Any) -> Any:
        return next((one for one in candidates if one.endpoint.url == self._url), None) or min(
            candidates, key=lambda one: one.in_flight
        )


_ids = itertools.count(1)


def request_id() -> str:
    """A fresh value for X-Request-Id."""
    return f"{os.getpid()}-{next(_ids)}"


def seen_by(server: FaultServer) -> Counter[bytes]:
    """How often each X-Request-Id was read by a fault server."""
    found = (re.search(rb"(?i)\r\nx-request-id: *([^\r]+)\r\n", raw) for raw in list(server.requests))
    return Counter(match[1] for match in found if match)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds. Raises `TimeoutError` after `PATIENCE` seconds."""
    with anyio.fail_after(PATIENCE):
        while not condition():  # noqa: ASYNC110  what is waited for sets no event
            await anyio.sleep(0.005)


async def at_rest(balancer: pathlb.Balancer) -> Snapshot:
    """The snapshot once nothing is in flight or queued, which must come to be."""

    def idle() -> bool:
        now = balancer.snapshot()
        return now.in_flight == 0 and now.queued == 0

    await until(idle)
    snapshot = balancer.snapshot()
    for one in snapshot.endpoints:
        assert one.counts["picks"] == one.counts["released"], one
        outcomes = sum(one.counts[name] for name in ("ok", "failed", "overloaded", "ignored"))
        assert outcomes >= one.counts["picks"], one  # a body that breaks off counts once more
    return snapshot


def endpoint(balancer: pathlb.Balancer, url: str) -> EndpointSnapshot:
    """What the balancer knows of one endpoint."""
    return next(one for one in balancer.snapshot().endpoints if one.url == url)


def living_tasks() -> int:
    """Tasks of the running async library, system tasks included."""
    if sniffio.current_async_library() == "asyncio":
        return len(asyncio.all_tasks())
    import trio

    return trio.lowlevel.current_statistics().tasks_living


def descriptors() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """Around the life of a client: no task outlives it, and nothing unclosed waits for the garbage collector (its
    ResourceWarning would fail the test).
    """
    before = living_tasks()
    yield
    await until(lambda: living_tasks() <= before)
    gc.collect()


class Events(list[Event]):
    """The events of a balancer from now on."""

    def __init__(self, balancer: pathlb.Balancer) -> None:
        super().__init__()
        balancer.subscribe(self.append)

    def of(self, *kinds: type[Any], endpoint: str | None = None) -> list[Any]:
        return [
            one
            for one in self
            if isinstance(one, kinds) and (endpoint is None or getattr(one, "endpoint", "") == endpoint)
        ]


def open_connections(client: Any) -> list[str]:
    """Connections in the pools below a client that are neither idle nor closed."""
    return [busy for upstream in client.balancer._upstreams.values() for busy in _busy(upstream)]


def _busy(upstream: Any) -> list[str]:
    if isinstance(upstream, Http1Upstream):
        return [f"{one.url} {one.state.value}" for one in upstream._open if one.state not in (State.IDLE, State.CLOSED)]
    pool = upstream._transport._pool
    return [repr(one) for one in pool.connections if not one.is_idle() and not one.is_closed()]


def left_in_pools(client: Any) -> int:
    """Requests the pools still think they serve."""
    return sum(
        upstream._dialling if isinstance(upstream, Http1Upstream) else len(upstream._transport._pool._requests)
        for upstream in client.balancer._upstreams.values()
    )


def pooled(client: Any) -> int:
    """Connections the pools below a client know of."""
    return sum(
        len(upstream._open if isinstance(upstream, Http1Upstream) else upstream._transport._pool.connections)
        for upstream in client.balancer._upstreams.values()
    )

"""What balancing itself costs, in CPU time: no sockets, an upstream that answers at once.

    python -m benchmarks.overhead [--quick] [--profile] [--only pick|road|adapter]

- pick: `Engine.acquire` alone, and the two ends of its lease.
- road: everything beyond the adapter, `Balancer.send`, reading and closing the reply, less a bare loop that asks the
  same scripted upstream; with the OpenTelemetry SDK in a process of its own, since a process can have only one.
- adapter: `pathlb.AsyncClient` over the scripted upstream, less an httpx client over a transport that does nothing.

Requests are made by a few tasks side by side, each giving way after every request as it would with a real network;
the bare loop does the same. Exit status 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import httpx2
import trio

import pathlb
import pathlb.httpx2
from pathlb.core.cluster import Settings
from pathlb.core.engine import Engine
from pathlb.core.lease import Lease, Want
from pathlb.core.model import Cause, Outcome
from pathlb.core.policy import P2C, LeastConnections, Policy, RoundRobin
from pathlb.exchange import Request, Timeouts
from pathlb.testing import ScriptedUpstream

from .measure import Figure, Row, Step, cpu_us, interleaved, machine, print_rows

PICK_TARGET = 3.0
ROAD_TARGET, ROAD_AIM = 25.0, 12.0
TASKS = 16
BODY = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
HEADERS = [(b"Content-Type", b"application/json"), (b"Target-Service-Id", b"eth"), (b"Content-Length", b"63")]
POLICIES: tuple[Callable[[], Policy], ...] = (LeastConnections, RoundRobin, P2C)


def urls(count: int) -> list[str]:
    return [f"http://10.0.{index // 250}.{index % 250 + 1}:3069" for index in range(count)]


# --- a: the pick


def pick_rows(rounds: int) -> list[Row]:
    """`acquire` by policy and size of the set, then `observe` and `release`."""
    rows: list[Row] = []
    observe: list[float] = []
    release: list[float] = []
    for count in (5, 50, 1000):
        for make in POLICIES:
            policy = make()
            picks = Picks(policy, count)
            picks.round()  # warms up
            samples = [picks.round() for _ in range(rounds)]
            figure = Figure(tuple(sample[0] for sample in samples))
            rows.append(Row(f"acquire, {policy.name}, {count} endpoints", figure, PICK_TARGET if count == 5 else None))
            observe += [sample[1] for sample in samples]
            release += [sample[2] for sample in samples]
    rows.append(Row("observe", Figure(tuple(observe))))
    rows.append(Row("release", Figure(tuple(release))))
    return rows


class Picks:
    """An engine, and leases taken and given back in batches, so that only one kind of call is timed at once."""

    BATCH = 250
    BATCHES = 8

    def __init__(self, policy: Policy, count: int) -> None:
        self._engine = Engine(Settings(), policy, random.Random(1))
        self._now = time.monotonic()
        self._engine.apply(self._now, [pathlb.Endpoint(url) for url in urls(count)])

    def round(self) -> tuple[float, float, float]:
        """Microseconds of one acquire, one observe and one release."""
        engine, outcome = self._engine, Outcome(Cause.OK, status=200)
        spent = [0.0, 0.0, 0.0]
        for _ in range(self.BATCHES):
            wants = [Want(resendable=True) for _ in range(self.BATCH)]
            self._now += 0.001
            now = self._now
            began = time.thread_time()
            grants = [engine.acquire(now, want, _nothing) for want in wants]
            spent[0] += time.thread_time() - began
            leases = [grant for grant in grants if isinstance(grant, Lease)]
            assert len(leases) == self.BATCH
            began = time.thread_time()
            for lease in leases:
                engine.observe(now, lease, outcome)
            spent[1] += time.thread_time() - began
            began = time.thread_time()
            for lease in leases:
                engine.release(now, lease)
            spent[2] += time.thread_time() - began
        acquired, observed, released = (seconds * 1e6 / (self.BATCH * self.BATCHES) for seconds in spent)
        return acquired, observed, released


def _nothing() -> None:
    pass


# --- b: the road beyond the adapter


class Road:
    """The cases of the road on the event loop that is running."""

    def __init__(self) -> None:
        self.cases: dict[str, Step] = {}
        self._upstreams = {url: ScriptedUpstream() for url in urls(5)}
        self._bare = next(iter(self._upstreams.values()))

    def balancer(self, **options: Any) -> pathlb.Balancer:
        return pathlb.Balancer(list(self._upstreams), upstream=ScriptedUpstream.factory(self._upstreams), **options)

    def add_bare(self) -> None:
        """The same request and the same reading, straight from the scripted upstream."""
        upstream = self._bare

        async def bare() -> None:
            reply = await upstream.send(_request(), [])
            async for _ in reply.body:
                pass
            await reply.body.aclose()

        async def bare_unread() -> None:
            reply = await upstream.send(_request(), [])
            await reply.body.aclose()

        self.cases["bare"] = bare
        self.cases["bare, unread"] = bare_unread

    def add(self, name: str, balancer: pathlb.Balancer) -> None:
        async def balanced() -> None:
            reply = await balancer.send(_request())
            async for _ in reply.body:
                pass
            await reply.body.aclose()

        self.cases[name] = balanced

    def add_unread(self, name: str, balancer: pathlb.Balancer) -> None:
        async def balanced() -> None:
            reply = await balancer.send(_request())
            await reply.body.aclose()

        self.cases[name] = balanced


_TIMEOUTS = Timeouts()


def _request() -> Request:
    return Request("POST", b"/v1", HEADERS, BODY, timeouts=_TIMEOUTS, idempotent=True)


async def road(drive: Callable[[Step, int], Awaitable[None]], rounds: int, requests: int) -> dict[str, Figure]:
    """The cases that need no SDK, on the running event loop."""
    made = Road()
    made.add_bare()
    async with AsyncExitStack() as stack:
        plain = await stack.enter_async_context(made.balancer())
        silent = await stack.enter_async_context(made.balancer(telemetry=False))
        heard = await stack.enter_async_context(made.balancer())
        stack.callback(heard.subscribe(lambda event: None))
        made.add("no SDK", plain)
        made.add_unread("no SDK, body unread", plain)
        made.add("telemetry=False", silent)
        made.add("no SDK, one event subscriber", heard)
        return await interleaved(made.cases, drive, rounds=rounds, requests=requests)


async def road_with_sdk(drive: Callable[[Step, int], Awaitable[None]], rounds: int, requests: int) -> dict[str, Figure]:
    """The road with spans and metrics recorded. Sets the SDK up for this process, for good."""
    # Imported here: the other cases are to run in a process that has never seen the SDK.
    from opentelemetry import metrics, trace
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    spans = TracerProvider()
    spans.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=4 * requests))
    trace.set_tracer_provider(spans)
    meters = MeterProvider([InMemoryMetricReader()])
    made = Road()
    made.add_bare()
    async with AsyncExitStack() as stack:
        # Metrics are listened to from the first request on, if there is somebody to collect them by then.
        traced = await stack.enter_async_context(made.balancer())
        metrics.set_meter_provider(meters)
        both = await stack.enter_async_context(made.balancer())
        made.add("SDK, spans", traced)
        made.add("SDK, spans and metrics", both)

        async def drive_and_flush(step: Step, count: int) -> None:
            await drive(step, count)
            spans.force_flush()  # a round pays for the export of its own spans
            exporter.clear()

        figures = await interleaved(made.cases, drive_and_flush, rounds=rounds, requests=requests)
        await made.cases["SDK, spans"]()
        spans.force_flush()
        assert len(exporter.get_finished_spans()) == 1, "the SDK recorded nothing: the figures mean nothing"
    spans.shutdown()
    meters.shutdown()
    return figures


async def drive_asyncio(step: Step, requests: int) -> None:
    async def work() -> None:
        for _ in range(requests // TASKS):
            await step()
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for _ in range(TASKS):
            group.create_task(work())


async def drive_trio(step: Step, requests: int) -> None:
    async def work() -> None:
        for _ in range(requests // TASKS):
            await step()
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for _ in range(TASKS):
            nursery.start_soon(work)


def run_road(library: str, sdk: bool, rounds: int, requests: int) -> dict[str, Figure]:
    measure = road_with_sdk if sdk else road
    if library == "asyncio":
        return asyncio.run(measure(drive_asyncio, rounds, requests))
    return trio.run(measure, drive_trio, rounds, requests)


def run_apart(library: str, rounds: int, requests: int) -> dict[str, Figure]:
    """The road with the SDK, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--sdk", library, str(rounds), str(requests)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return {name: Figure(tuple(samples)) for name, samples in json.loads(done.stdout).items()}


def road_rows(library: str, rounds: int, requests: int) -> Iterator[Row]:
    for sdk in (False, True):
        figures = run_apart(library, rounds, requests) if sdk else run_road(library, sdk, rounds, requests)
        if not sdk:
            yield Row(f"{library}: bare loop over the scripted upstream", figures["bare"])
        for name, figure in figures.items():
            if name.startswith("bare"):
                continue
            base = figures["bare, unread" if "unread" in name else "bare"]
            target = (ROAD_TARGET, ROAD_AIM) if name == "no SDK" else (None, None)
            yield Row(f"{library}: road, {name}, beyond it", figure.beyond(base), *target)


# --- c: the adapter


class NullTransport(httpx.AsyncBaseTransport):
    """Answers like the scripted upstream."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=[(b"content-length", b"2")], stream=NullStream())


class NullStream(httpx.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"ok"


class NullTransport2(httpx2.AsyncBaseTransport):
    """The same for httpx2."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers=[(b"content-length", b"2")], stream=NullStream2())


class NullStream2(httpx2.AsyncByteStream):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"ok"


async def adapter(rounds: int, requests: int) -> list[Row]:
    made = Road()
    factory = made.balancer
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        clients: dict[str, httpx.AsyncClient | httpx2.AsyncClient] = {
            "httpx": await enter(httpx.AsyncClient(base_url="http://gateway", transport=NullTransport())),
            "httpx balanced": await enter(pathlb.AsyncClient(await enter(factory()))),
            "httpx2": await enter(httpx2.AsyncClient(base_url="http://gateway", transport=NullTransport2())),
            "httpx2 balanced": await enter(pathlb.httpx2.AsyncClient(await enter(factory()))),
        }
        cases = {name: _post(client) for name, client in clients.items()}
        figures = await interleaved(cases, drive_asyncio, rounds=rounds, requests=requests)
    rows: list[Row] = []
    for stack_name in ("httpx", "httpx2"):
        bare, balanced = figures[stack_name], figures[f"{stack_name} balanced"]
        rows.append(Row(f"{stack_name}.AsyncClient.post over a transport that does nothing", bare))
        rows.append(Row(f"pathlb's for {stack_name} over the scripted upstream", balanced))
        rows.append(Row("    the difference: adapter and road", balanced.beyond(bare)))
    return rows


def _post(client: httpx.AsyncClient | httpx2.AsyncClient) -> Step:
    headers = {"Target-Service-Id": "eth", "Content-Type": "application/json"}

    async def post() -> None:
        await client.post("/v1", content=BODY, headers=headers)

    return post


# --- the command


def profile(requests: int) -> None:
    """The road under cProfile, which makes calls look dearer than the lines between them: an order, not a cost."""

    async def run() -> None:
        made = Road()
        async with made.balancer() as balancer:
            made.add("no SDK", balancer)
            step = made.cases["no SDK"]
            await drive_asyncio(step, requests)
            profiler = cProfile.Profile(time.process_time)
            profiler.enable()
            await drive_asyncio(step, requests)
            profiler.disable()
        stats = pstats.Stats(profiler).strip_dirs().sort_stats("tottime")
        stats.print_stats(35)

    began = cpu_us()
    asyncio.run(run())
    print(f"{requests} requests, {cpu_us(began) / 1e6:.1f} s of CPU")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: some seconds, more noise")
    parser.add_argument("--profile", action="store_true", help="profile the road instead of timing it")
    parser.add_argument("--only", choices=("pick", "road", "adapter"), help="one part")
    parser.add_argument("--sdk", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.sdk:
        library, rounds, requests = options.sdk
        figures = run_road(library, True, int(rounds), int(requests))
        json.dump({name: figure.samples for name, figure in figures.items()}, sys.stdout)
        return 0
    if options.profile:
        profile(4_000 if options.quick else 20_000)
        return 0
    rounds, requests = (5, 800) if options.quick else (25, 3_200)
    rows: list[Row] = []

    def show(title: str, found: list[Row]) -> None:
        print_rows(title, found)
        rows.extend(found)

    print(f"Python {sys.version.split()[0]}, {rounds} rounds of {requests} requests, {TASKS} tasks")
    print(f"this machine at this moment: {machine():.0f} ns for a call of an empty function")
    if options.only in (None, "pick"):
        show("The pick", pick_rows(rounds))
    if options.only in (None, "road"):
        for library in ("asyncio", "trio"):
            show(f"The road beyond the adapter, {library}", list(road_rows(library, rounds, requests)))
    if options.only in (None, "adapter"):
        show("The adapter, asyncio", asyncio.run(adapter(rounds, requests // 4)))
    missed = [row.name for row in rows if row.missed]
    if missed:
        print(f"\nmissed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

"""`pathlb demo`: emulated gateways, a balanced client, and what happens to the gateways (see `scenario`)."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import cycle

import anyio
import anyio.abc
import anyio.to_thread

from ..adapters.httpx import AsyncClient
from ..core.events import BreakerChanged, Ejected, Event, GivenUp, HealthChanged, PanicChanged, Returned
from ..errors import PathlbError
from ..exchange import Attempt
from ..testing import Fleet, ServiceTime
from . import number
from .report import closing_report, kept_up
from .scenario import ANY, PATH, Scenario, label
from .screen import Row, Screen, View, make_screen
from .traffic import Ledger, open_loop, percentile

FIRST_PORT = 3069
_HIGHEST_PORT = 65_485  # fifty more follow
_SERVICE_TIME = ServiceTime.constant(0.02)
_RATES = (2000.0, 1000.0, 500.0, 200.0)
"""Requests a second, the first of them this machine can do: what five gateways of 400 each are for, and less."""
_TRIAL = 1.0  # seconds a rate is tried
_GRACE = 1.0  # seconds that requests in flight get when the demo is interrupted
_REQUEST = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
_HEADERS = {"Content-Type": "application/json"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 if no request was lost, 1 if one was. Ctrl-C ends it with the report so far."
    parser.add_argument(
        "--rate", type=number(1, 10_000), help=f"requests a second, in all (default {_RATES[0]:g} if this machine can)"
    )
    parser.add_argument(
        "--seconds-per-phase",
        type=number(0.1, 3600),
        default=7.0,
        metavar="S",
        help="default %(default)g; five phases, nine with --profile path",
    )
    parser.add_argument(
        "--gateways", type=int, choices=range(2, 51), default=5, metavar="N", help="2 to 50 (default %(default)d)"
    )
    parser.add_argument(
        "--port",
        type=port_number,
        default=FIRST_PORT,
        metavar="P",
        help="of the first gateway, the others follow (default %(default)d; 0: any that are free)",
    )
    parser.add_argument(
        "--profile",
        choices=["path"],
        help="emulate PATH gateways with two services, one of which loses its session on an instance, the other all "
        "of its suppliers; what is lost in that outage is not held against the exit status",
    )
    parser.add_argument("--plain", action="store_true", help="lines instead of a table that redraws itself")


def port_number(text: str) -> int:
    """An argparse type: room for all the gateways' ports from here on."""
    port = int(text)
    if not 0 <= port <= _HIGHEST_PORT:
        raise argparse.ArgumentTypeError(f"must be from 0 to {_HIGHEST_PORT}, not {text}")
    return port


def run(options: argparse.Namespace, scenario: Scenario | None = None) -> int:
    """Play a scenario to a client; the exit status is 1 if a request was lost that could have been answered."""
    scenario = scenario or (PATH if options.profile == "path" else ANY)
    seconds, count = options.seconds_per_phase, options.gateways
    wanted = range(options.port, options.port + count) if options.port else [0] * count
    ports = [port if _is_free(port) else 0 for port in wanted]
    print(f"starting {count} emulated gateways ...", flush=True)
    with Fleet(ports=ports, processes=True, service_time=_SERVICE_TIME, path=scenario.path) as fleet:
        for gateway, port in zip(fleet, wanted, strict=True):
            if port and gateway.port != port:
                print(f"port {port} is taken: {gateway.name} is on {gateway.port}")
        demo = Demo(fleet, options.rate or 0.0, seconds, scenario, make_screen(options.plain))
        if not options.rate:
            anyio.run(demo.find_rate)
        print(demo.introduction, flush=True)
        anyio.run(demo.run)
        instances = [label(url) for url in fleet.urls]
    print()
    print(closing_report(demo.ledger, instances, demo.rate, demo.unfinished))
    return 1 if any(tally.lost > tally.hopeless for tally in demo.ledger.totals().values()) else 0


class Demo:
    """One performance: the traffic, the changes to the fleet, and what is seen of both."""

    def __init__(self, fleet: Fleet, rate: float, seconds: float, scenario: Scenario, screen: Screen) -> None:
        self.ledger = Ledger()
        self.unfinished = 0
        """Requests neither answered nor lost: the end came first."""
        self.rate = rate
        """Requests a second; 0 until `find_rate` has found out."""
        self._fleet = fleet
        self._seconds = seconds
        self._scenario = scenario
        self._phases = scenario.phases(fleet)
        self._services = cycle(scenario.services)
        self._outages: tuple[str, ...] = ()
        """The services that nobody can serve at the moment."""
        self._screen = screen
        self._began = 0.0
        self._back_within = seconds / 3

    @property
    def introduction(self) -> str:
        """What is about to be seen, and which settings are not pathlb's own."""
        back = self._back_within
        health = self._scenario.options(back).get("health")
        probes = f", Health(interval={health.interval:.2g})" if health else ""
        return (
            f"{self.rate:,g} requests/s of {_SERVICE_TIME.mean * 1000:.0f} ms through one pathlb.AsyncClient, "
            f"{len(self._phases)} phases of {self._seconds:g} s\n"
            f"{self._scenario.settings}, but shortened so that you see instances come back: "
            f"Breaker(open_max={back:.2g}), Outlier(eject_for={back:.2g}), SlowStart(window={back:.2g}){probes}"
        )

    async def find_rate(self) -> None:
        """Take the highest of some rates that this machine can do, with the gateways on it, and say so."""
        for rate in _RATES:
            self.ledger = Ledger()
            account = self.ledger.open("trial")
            async with self._client() as client:
                async with anyio.create_task_group() as requests:
                    fire = partial(requests.start_soon, self._request, client)
                    await open_loop(rate, _TRIAL, fire, account)
            self.rate = rate
            if kept_up(account, rate) and (percentile(account.latencies, 50) or 0.0) < 2 * _SERVICE_TIME.mean:
                print(f"{rate:,g} requests/s: this machine can, with the gateways on it", flush=True)
                break
            print(f"{rate:,g} requests/s: more than this machine can, with the gateways on it", flush=True)
        self.ledger = Ledger()

    async def run(self) -> None:
        """Play every phase, or until SIGINT or SIGTERM, and wait for the last answers."""
        client = self._client()
        self._began = time.monotonic()
        with self._screen:
            async with client, anyio.create_task_group() as watchers:
                client.balancer.subscribe(self._tell)
                watchers.start_soon(self._watch, client)
                async with anyio.create_task_group() as requests:
                    interrupted = await self._until_over(client, requests)
                    if interrupted:
                        self._screen.note("interrupted: waiting for the last answers")
                        requests.cancel_scope.deadline = anyio.current_time() + _GRACE
                watchers.cancel_scope.cancel()

    def _client(self) -> AsyncClient:
        return AsyncClient(self._fleet.urls, **self._scenario.options(self._back_within))

    async def _until_over(self, client: AsyncClient, requests: anyio.abc.TaskGroup) -> bool:
        """Send requests phase by phase; true if a signal ended it early."""
        async with anyio.create_task_group() as playing:
            playing.start_soon(self._on_signal, playing.cancel_scope)
            for phase in self._phases:
                self._outages += phase.outages
                # Blocks, and must not hold up the requests of this loop.
                await anyio.to_thread.run_sync(phase.change)
                self._outages = phase.outages
                account = self.ledger.open(phase.name)
                self._note(f"-- {phase.name}")
                fire = partial(requests.start_soon, self._request, client)
                await open_loop(self.rate, self._seconds, fire, account)
            playing.cancel_scope.cancel()
            return False
        return True

    @staticmethod
    async def _on_signal(scope: anyio.CancelScope) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                scope.cancel()
                return

    async def _request(self, client: AsyncClient) -> None:
        ledger, service = self.ledger, next(self._services)
        hopeless = service in self._outages
        started = time.monotonic()
        self.unfinished += 1
        attempts: Sequence[Attempt] = ()
        reason = ""
        try:
            response = await client.post("/v1", content=_REQUEST, headers={**_HEADERS, "Target-Service-Id": service})
            attempts = response.extensions["pathlb"]["attempts"]
            if not response.is_success:
                reason = f"status {response.status_code}"
        except PathlbError as exc:
            attempts, reason = exc.attempts, exc.message
        except Exception as exc:
            # Whatever it is, the caller has no answer, and the report says why.
            reason = f"{type(exc).__name__}: {exc}"
        if reason:
            if len(self._scenario.services) > 1:
                reason = f"{service}: {reason}"
            ledger.lost(service, reason, len(attempts), hopeless or service in self._outages)
        else:
            now = time.monotonic()
            ledger.answered(service, now, label(attempts[-1].endpoint), now - started, len(attempts))
        # Not in a finally: what is cancelled here stays unfinished.
        self.unfinished -= 1

    async def _watch(self, client: AsyncClient) -> None:
        while True:
            await anyio.sleep(self._screen.interval)
            if self.ledger.accounts:
                self._screen.show(self._view(client))

    def _view(self, client: AsyncClient) -> View:
        now = time.monotonic()
        recent = self.ledger.recent(now)
        totals = self.ledger.totals()
        rows = []
        for endpoint in client.balancer.snapshot().endpoints:
            name = label(endpoint.url)
            rows.append(
                Row(
                    name,
                    "; ".join([endpoint.state, *(f"{key}: {state}" for key, state in endpoint.services.items())]),
                    endpoint.in_flight,
                    recent.rate(name),
                    recent.p50(name),
                    recent.share(name),
                    endpoint.breaker.state,
                )
            )
        return View(
            seconds=now - self._began,
            phase=self.ledger.current.phase,
            rate=sum(row.rate for row in rows),
            p50=percentile(recent.everything(), 50),
            lost={service: totals[service].lost for service in self._scenario.services},
            rows=rows,
        )

    def _tell(self, event: Event) -> None:
        text = describe(event)
        if text:
            self._note(text)

    def _note(self, text: str) -> None:
        self._screen.note(f"[{time.monotonic() - self._began:4.1f} s] {text}")


def describe(event: Event) -> str:
    """An event in a few words; nothing for those that come with every request."""
    match event:
        case BreakerChanged(before=before, after=("open" | "closed") as after):
            return f"{_subject(event)}: breaker {before} -> {after} ({event.why})"
        case Ejected():
            return f"{_subject(event)}: ejected for {event.seconds:.1f} s, by its {event.signal} ({event.why})"
        case Returned():
            return f"{_subject(event)}: back from its ejection"
        case HealthChanged(before=before, after=after) if "down" in (before, after):
            return f"{_subject(event)}: probes say it is {after} ({event.why})"
        case GivenUp():
            return f"{label(event.endpoint)}: {event.attempts} attempts given up and sent elsewhere"
        case PanicChanged(panicking=True):
            return f"panic: {event.eligible} of {event.total} instances eligible, requests go to those out too"
        case PanicChanged():
            return "panic is over"
    return ""


def _subject(event: BreakerChanged | Ejected | Returned | HealthChanged) -> str:
    return label(event.endpoint) + (f" for {event.key}" if event.key else "")


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False

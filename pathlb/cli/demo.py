"""`pathlb demo`: emulated gateways, a balanced client, one instance killed, one slowed, both brought back."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.abc
import anyio.to_thread

from ..adapters.httpx import AsyncClient
from ..core.config import Breaker, Outlier, SlowStart
from ..core.events import BreakerChanged, Ejected, Event, GivenUp, PanicChanged, Returned
from ..core.model import Endpoint
from ..errors import PathlbError
from ..testing import Fleet, Mode, ServiceTime
from . import number
from .report import closing_report, kept_up
from .screen import Row, Screen, View, make_screen
from .traffic import Ledger, open_loop, percentile

FIRST_PORT = 3069
_SERVICE_TIME = ServiceTime.constant(0.02)
_SLOWER = 10
_RATES = (2000.0, 1000.0, 500.0, 200.0)
"""Requests a second, the first of them this machine can do: what five gateways of 400 each are for, and less."""
_TRIAL = 1.0  # seconds a rate is tried
_GRACE = 1.0  # seconds that requests in flight get when the demo is interrupted
_REQUEST = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
_HEADERS = {"Content-Type": "application/json", "Target-Service-Id": "eth"}


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of steady traffic, begun by a change to the fleet."""

    name: str
    change: Callable[[], None] = lambda: None
    """Blocks until the change is in effect."""


def play(fleet: Fleet) -> list[Phase]:
    """What happens in the demo, in order."""
    first, last = fleet[0], fleet[-1]
    slow = partial(last.set_mode, Mode.SLOW, factor=_SLOWER)
    return [
        Phase("steady"),
        Phase(f"{_label(first.url)} killed", first.kill),
        Phase(f"{_label(first.url)} restored", first.restore),
        Phase(f"{_label(last.url)} {_SLOWER}x slower", slow),
        Phase(f"{_label(last.url)} recovered", last.restore),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 if no request was lost, 1 if one was. Ctrl-C ends it with the report so far."
    parser.add_argument(
        "--rate", type=number(1, 10_000), help=f"requests a second, in all (default {_RATES[0]:g} if this machine can)"
    )
    parser.add_argument(
        "--seconds-per-phase", type=number(0.1, 3600), default=7.0, metavar="S", help="default %(default)g, five phases"
    )
    parser.add_argument(
        "--gateways", type=int, choices=range(2, 51), default=5, metavar="N", help="2 to 50 (default %(default)d)"
    )
    parser.add_argument("--plain", action="store_true", help="lines instead of a table that redraws itself")


def run(options: argparse.Namespace, script: Callable[[Fleet], list[Phase]] = play) -> int:
    """Play `script` to a client; the exit status is 1 if a request was lost."""
    seconds, count = options.seconds_per_phase, options.gateways
    ports = [port if _is_free(port) else 0 for port in range(FIRST_PORT, FIRST_PORT + count)]
    print(f"starting {count} emulated gateways ...", flush=True)
    with Fleet(ports=ports, processes=True, service_time=_SERVICE_TIME) as fleet:
        for gateway, port in zip(fleet, range(FIRST_PORT, FIRST_PORT + count), strict=True):
            if gateway.port != port:
                print(f"port {port} is taken: {gateway.name} is on {gateway.port}")
        demo = Demo(fleet, options.rate or 0.0, seconds, script(fleet), make_screen(options.plain))
        if not options.rate:
            anyio.run(demo.find_rate)
        print(demo.introduction, flush=True)
        anyio.run(demo.run)
        instances = [_label(url) for url in fleet.urls]
    print()
    print(closing_report(demo.ledger, instances, demo.rate, demo.unfinished))
    return 1 if any(account.lost for account in demo.ledger.accounts) else 0


class Demo:
    """One performance: the traffic, the changes to the fleet, and what is seen of both."""

    def __init__(self, fleet: Fleet, rate: float, seconds: float, phases: Sequence[Phase], screen: Screen) -> None:
        self.ledger = Ledger()
        self.unfinished = 0
        """Requests neither answered nor lost: the end came first."""
        self.rate = rate
        """Requests a second; 0 until `find_rate` has found out."""
        self._fleet = fleet
        self._seconds = seconds
        self._phases = phases
        self._screen = screen
        self._began = 0.0
        self._back_within = seconds / 3

    @property
    def introduction(self) -> str:
        """What is about to be seen, and which settings are not pathlb's own."""
        back = self._back_within
        return (
            f"{self.rate:,g} requests/s of {_SERVICE_TIME.mean * 1000:.0f} ms through one pathlb.AsyncClient, "
            f"{len(self._phases)} phases of {self._seconds:g} s\n"
            f"pathlb's defaults, but shortened so that you see instances come back: Breaker(open_max={back:.2g}), "
            f"Outlier(eject_for={back:.2g}), SlowStart(window={back:.2g})"
        )

    async def find_rate(self) -> None:
        """Take the highest of some rates that this machine can do, with the gateways on it, and say so."""
        for rate in _RATES:
            self.ledger = Ledger()
            account = self.ledger.open("trial")
            async with AsyncClient(self._fleet.urls, idempotent=True) as client:
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
        back = self._back_within
        client = AsyncClient(
            self._fleet.urls,
            idempotent=True,  # the requests are reads, though JSON-RPC makes them POSTs
            breaker=Breaker(open_for=min(1.0, back), open_max=back),
            outlier=Outlier(eject_for=back),
            slow_start=SlowStart(window=back),
        )
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

    async def _until_over(self, client: AsyncClient, requests: anyio.abc.TaskGroup) -> bool:
        """Send requests phase by phase; true if a signal ended it early."""
        async with anyio.create_task_group() as playing:
            playing.start_soon(self._on_signal, playing.cancel_scope)
            for phase in self._phases:
                # Blocks, and must not hold up the requests of this loop.
                await anyio.to_thread.run_sync(phase.change)
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
        ledger = self.ledger
        started = time.monotonic()
        self.unfinished += 1
        try:
            response = await client.post("/v1", content=_REQUEST, headers=_HEADERS)
        except PathlbError as exc:
            ledger.lost(exc.message, len(exc.attempts))
        except Exception as exc:
            # Whatever it is, the caller has no answer, and the report says why.
            ledger.lost(f"{type(exc).__name__}: {exc}", 1)
        else:
            attempts = response.extensions["pathlb"]["attempts"]
            if response.is_success:
                now = time.monotonic()
                ledger.answered(now, _label(attempts[-1].endpoint), now - started, len(attempts))
            else:
                ledger.lost(f"status {response.status_code}", len(attempts))
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
        rows = []
        for endpoint in client.balancer.snapshot().endpoints:
            label = _label(endpoint.url)
            rows.append(
                Row(
                    label,
                    endpoint.state,
                    endpoint.in_flight,
                    recent.rate(label),
                    recent.p50(label),
                    recent.share(label),
                    endpoint.breaker.state,
                )
            )
        return View(
            seconds=now - self._began,
            phase=self.ledger.current.phase,
            rate=sum(row.rate for row in rows),
            p50=percentile(recent.everything(), 50),
            lost=sum(account.lost for account in self.ledger.accounts),
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
        case BreakerChanged(before=before, after="open"):
            return f"{_label(event.endpoint)}: breaker {before} -> open ({event.why})"
        case BreakerChanged(before=before, after="closed"):
            return f"{_label(event.endpoint)}: breaker {before} -> closed ({event.why})"
        case Ejected():
            return f"{_label(event.endpoint)}: ejected for {event.seconds:.1f} s, by its {event.signal} ({event.why})"
        case Returned():
            return f"{_label(event.endpoint)}: back from its ejection"
        case GivenUp():
            return f"{_label(event.endpoint)}: {event.attempts} attempts given up and sent elsewhere"
        case PanicChanged(panicking=True):
            return f"panic: {event.eligible} of {event.total} instances eligible, requests go to those out too"
        case PanicChanged():
            return "panic is over"
    return ""


def _label(url: str) -> str:
    """Short for an instance of this machine: its port."""
    return f":{Endpoint(url).port}"


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
        return True
    return False

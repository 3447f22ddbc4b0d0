"""Five gateways under 60% load, one of them going bad: what the callers notice.

    python -m benchmarks.faults [--seconds 12] [--only MODE] [--baseline]

The fleet runs in processes of its own: five gateways of 8 workers and 100 ms a request, 400 requests/s in all. Requests
arrive at 240/s whether or not earlier ones have been answered (open loop, exponential gaps), nine GETs to one POST,
and latency counts from the arrival. From second 3 on one gateway is killed, hangs, resets, fails fast or is ten times
slower. Every request has an X-Request-Id, and the gateways count how often they saw it.

Exit status 1 if a target is missed: no GET lost, no POST sent twice, and of a gateway failing fast at most 2/N of the
picks in the second after the first and at most 1% after five, probes aside.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

import httpx

import pathlb
from pathlb.core.events import BreakerChanged, Ejected, Event, GivenUp, Picked
from pathlb.testing import Fleet, FleetGateway, Mode, ServiceTime

GATEWAYS = 5
WORKERS = 8
SERVICE = 0.1
RATE = 0.6 * GATEWAYS * WORKERS / SERVICE
POSTS = 0.1
FAULT_AT = 3.0
BAD = 0

FAULTS: dict[str, Callable[[FleetGateway], None]] = {
    "killed": lambda gateway: gateway.kill(),
    "hung": lambda gateway: gateway.set_mode(Mode.HANG),
    "resetting": lambda gateway: gateway.set_mode(Mode.RESET),
    "failing": lambda gateway: gateway.set_mode(Mode.FAIL, status=500),
    "slow": lambda gateway: gateway.set_mode(Mode.SLOW, factor=10.0),
}

Send = Callable[[str, str], Awaitable[httpx.Response]]
"""Sends a request by method and id."""


@dataclass(slots=True)
class Sent:
    """One request of the load."""

    at: float
    method: str
    id: str
    lag: float = 0.0
    """Seconds this process was late to begin: the machine's fault, and part of `seconds` all the same."""
    seconds: float = 0.0
    attempts: int = 1
    error: str = ""


@dataclass(slots=True)
class Watch:
    """What the balancer tells about the bad endpoint and the others."""

    bad: str
    picks: list[tuple[float, str, bool]] = field(default_factory=list)
    """Time, endpoint, whether it was a probe."""
    out: list[tuple[float, str]] = field(default_factory=list)
    """When the bad endpoint was taken out, and how."""
    others_out: int = 0
    given_up: int = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Picked():
                self.picks.append((event.at, event.endpoint, event.reason == "probe"))
            case Ejected():
                self._note(event.at, event.endpoint, f"ejected: {event.signal}")
            case BreakerChanged(after="open"):
                self._note(event.at, event.endpoint, f"breaker: {event.why}")
            case GivenUp():
                self.given_up += event.attempts

    def _note(self, at: float, endpoint: str, how: str) -> None:
        if endpoint == self.bad:
            self.out.append((at, how))
        else:
            self.others_out += 1

    def share(self, start: float, end: float) -> float:
        """Of the picks between two moments, those of the bad endpoint; probes aside."""
        picked = [endpoint for at, endpoint, probe in self.picks if start <= at < end and not probe]
        return picked.count(self.bad) / len(picked) if picked else 0.0

    def probes(self, start: float) -> int:
        return sum(probe and at >= start for at, _, probe in self.picks)


@dataclass(slots=True)
class Result:
    """One run."""

    fault: str
    sent: list[Sent]
    fault_at: float
    duplicates: int
    cpu: float
    """Of one core, this process."""
    watch: Watch | None = None

    def lost(self) -> list[Sent]:
        return [one for one in self.sent if one.error and one.method == "GET"]

    def failed_posts(self) -> list[Sent]:
        return [one for one in self.sent if one.error and one.method == "POST"]

    def latencies(self, start: float, end: float) -> str:
        """p50 and p99 of the answered requests that arrived in the meantime, in ms."""
        known = [one.seconds * 1000 for one in self.sent if start <= one.at - self.fault_at < end and not one.error]
        if len(known) < 2:
            return "-"
        cuts = quantiles(known, n=100, method="inclusive")
        return f"{cuts[49]:.0f}/{cuts[98]:.0f}"

    def lag(self) -> float:
        """p99 of the lateness of this process, in ms."""
        return quantiles([one.lag * 1000 for one in self.sent], n=100, method="inclusive")[98]

    def missed(self) -> list[str]:
        """The targets this run of pathlb missed."""
        watch = self.watch
        found: list[str] = []
        if self.lost():
            found.append(f"{len(self.lost())} idempotent requests lost ({self.lost()[0].error})")
        if self.duplicates:
            found.append(f"{self.duplicates} POSTs sent twice")
        if watch is not None and self.fault == "failing":
            second = watch.share(self.fault_at + 1, self.fault_at + 2)
            late = watch.share(self.fault_at + 5, float("inf"))
            if second > 2 / GATEWAYS:
                found.append(f"share {second:.0%} in the 2nd second, more than {2 / GATEWAYS:.0%}")
            if late > 0.01:
                found.append(f"share {late:.1%} after 5 s, more than 1%")
        return found


async def load(send: Send, fault: Callable[[], None], seconds: float, seed: int) -> tuple[list[Sent], float]:
    """Make the requests, and the fault; answers when all have ended, with the moment of the fault."""
    rng = random.Random(seed)
    sent: list[Sent] = []
    fault_at = 0.0
    began = time.monotonic()

    async def break_one() -> None:
        nonlocal fault_at
        await asyncio.sleep(began + FAULT_AT - time.monotonic())
        fault_at = time.monotonic()
        await asyncio.to_thread(fault)

    async def request(one: Sent) -> None:
        one.lag = time.monotonic() - one.at
        try:
            response = await send(one.method, one.id)
        except httpx.HTTPError as exc:
            one.error = f"{type(exc).__name__}: {exc}"
            tried = getattr(exc, "attempts", ())
        else:
            tried = response.extensions.get("pathlb", {}).get("attempts", ())
            if response.status_code != 200:
                one.error = f"status {response.status_code}"
        one.attempts = max(1, len(tried))
        one.seconds = time.monotonic() - one.at

    async with asyncio.TaskGroup() as group:
        group.create_task(break_one())
        at = began
        while (at := at + rng.expovariate(RATE)) < began + seconds:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            one = Sent(at, "POST" if rng.random() < POSTS else "GET", f"{seed}-{len(sent)}")
            sent.append(one)
            group.create_task(request(one))
    return sent, fault_at


async def run(fault: str, seconds: float, seed: int, *, baseline: bool) -> Result:
    """One fault, on a fleet of its own."""
    with Fleet(GATEWAYS, processes=True, service_time=ServiceTime.constant(SERVICE), workers=WORKERS) as fleet:
        bad = fleet[BAD]

        def break_it() -> None:
            FAULTS[fault](bad)

        watch = None if baseline else Watch(bad.url)
        cpu, began = time.process_time(), time.monotonic()
        if watch is None:
            sent, fault_at = await _plain(fleet.urls, break_it, seconds, seed)
        else:
            sent, fault_at = await _balanced(fleet.urls, break_it, seconds, seed, watch)
        share = (time.process_time() - cpu) / min(seconds, time.monotonic() - began)
        seen = await asyncio.to_thread(fleet.seen)
    duplicates = sum(seen[one.id.encode()] > 1 for one in sent if one.method == "POST")
    return Result(fault, sent, fault_at, duplicates, share, watch)


async def _balanced(
    urls: Sequence[str], fault: Callable[[], None], seconds: float, seed: int, watch: Watch
) -> tuple[list[Sent], float]:
    async with pathlb.AsyncClient(urls) as client:
        client.balancer.subscribe(watch)
        return await load(_sender(lambda: client), fault, seconds, seed)


async def _plain(urls: Sequence[str], fault: Callable[[], None], seconds: float, seed: int) -> tuple[list[Sent], float]:
    """What one has without a balancer: a client per gateway and a throw of the dice, with the same timeouts."""
    timeout = httpx.Timeout(connect=0.5, read=15.0, write=15.0, pool=None)
    unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    clients = [httpx.AsyncClient(base_url=url, timeout=timeout, limits=unlimited) for url in urls]
    rng = random.Random(seed)
    try:
        return await load(_sender(lambda: rng.choice(clients)), fault, seconds, seed)
    finally:
        for client in clients:
            await client.aclose()


def _sender(choose: Callable[[], httpx.AsyncClient]) -> Send:
    async def send(method: str, request_id: str) -> httpx.Response:
        content = b"{}" if method == "POST" else None
        return await choose().request(method, "/v1", content=content, headers={"X-Request-Id": request_id})

    return send


HEADERS = (
    ("fault", 17),
    ("requests", 8),
    ("lost", 5),
    ("retried", 7),
    ("POSTs failed", 12),
    ("twice", 5),
    ("ms before", 9),
    ("0-2 s", 10),
    ("2-5 s", 10),
    ("5 s on", 10),
    ("picks 0-1", 9),
    ("1-2", 6),
    ("2-5", 6),
    ("5 on", 6),
    ("probes", 6),
    ("given up", 8),
    ("CPU", 5),
    ("lag", 5),
    ("taken out", 0),
)


def print_line(cells: Sequence[str]) -> None:
    columns = zip(cells, HEADERS, strict=True)
    padded = [cell.rjust(width) if index else cell.ljust(width) for index, (cell, (_, width)) in enumerate(columns)]
    print("  ".join(padded).rstrip(), flush=True)


def print_result(result: Result) -> None:
    watch, at = result.watch, result.fault_at
    seen = ["-"] * 6 + [f"{result.cpu:.0%}", f"{result.lag():.0f}", ""]
    if watch is not None:
        first = next(((moment - at, how) for moment, how in watch.out if moment >= at), None)
        others = f"; {watch.others_out} times another one" if watch.others_out else ""
        seen = [
            f"{watch.share(at, at + 1):.1%}",
            f"{watch.share(at + 1, at + 2):.1%}",
            f"{watch.share(at + 2, at + 5):.1%}",
            f"{watch.share(at + 5, float('inf')):.1%}",
            str(watch.probes(at)),
            str(watch.given_up),
            f"{result.cpu:.0%}",
            f"{result.lag():.0f}",
            (f"{first[0]:.2f} s, {first[1]}" if first is not None else "never") + others,
        ]
    print_line(
        [
            result.fault if watch is not None else "  httpx, no lb",
            str(len(result.sent)),
            str(len(result.lost())),
            str(sum(one.attempts > 1 for one in result.sent)),
            str(len(result.failed_posts())),
            str(result.duplicates),
            result.latencies(-FAULT_AT + 0.5, 0.0),
            result.latencies(0.0, 2.0),
            result.latencies(2.0, 5.0),
            result.latencies(5.0, float("inf")),
            *seen,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="length of each run (default 12, at least 9)")
    parser.add_argument("--only", choices=sorted(FAULTS), help="one fault")
    parser.add_argument("--baseline", action="store_true", help="also plain httpx: a random client each, no retries")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default 1)")
    options = parser.parse_args()
    if options.seconds < 9:
        parser.error("--seconds must be at least 9: the targets look at five seconds after the fault and more")
    print(
        f"{GATEWAYS} gateways of {WORKERS} workers, {SERVICE * 1000:.0f} ms a request. {RATE:.0f} requests/s for "
        f"{options.seconds:g} s, {POSTS:.0%} of them POSTs; the fault comes at second {FAULT_AT:g}.\n"
        "ms: p50/p99 of the requests that arrived before the fault, and in the seconds after it. picks: the bad\n"
        "gateway's share in the seconds after the fault, probes aside. CPU: this process, of one core. lag: p99 in\n"
        "ms of what this process was late to begin a request: where it is large, the latencies are the machine's.\n"
    )
    print_line([name for name, _ in HEADERS])
    missed: list[str] = []
    for fault in [options.only] if options.only else FAULTS:
        result = asyncio.run(run(fault, options.seconds, options.seed, baseline=False))
        print_result(result)
        missed += [f"{fault}: {what}" for what in result.missed()]
        if options.baseline:
            print_result(asyncio.run(run(fault, options.seconds, options.seed, baseline=True)))
    print("\n" + ("\n".join(f"MISSED  {what}" for what in missed) if missed else "every target met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

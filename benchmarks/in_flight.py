"""Thousands of requests in flight from one process: an open loop over five slow gateways, pathlb beside other clients.

    python -m benchmarks.in_flight [--seconds 60] [--rate 2000] [--only NAME,NAME]

The gateways take 1.5 s for each request and any number at once, so that 2,000 requests/s are 3,000 in flight. They
arrive on schedule, whether or not earlier ones have been answered, and latency counts from the scheduled moment. Each
client has a process to itself, so that CPU time and memory are its own; pathlb balances, the others take the gateways
in turn. `nothing` sends nothing and sleeps as long: what the schedule and a task for each request cost by themselves.

A client with four times as many requests in flight as there should be has collapsed and gets no more; what it has not
answered some time later is left unfinished.

Exit status 1 if pathlb missed a target: no errors, nothing unfinished, and a mean latency within 2% of the gateways'.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, quantiles

from pathlb.testing import Fleet, ServiceTime

from .contenders import BALANCED, PACKAGES, REPLY, TITLES, open_contender
from .environment import require, require_descriptors, unwind_on_sigterm
from .measure import Step
from .processes import cpu_us_of

GATEWAYS = 5
SERVICE = 1.5
WITHIN = 0.02
COLLAPSED = 4
"""Times the requests in flight there should be."""
GRACE = 20.0
"""Seconds after the last request in which the answers have to come."""
START = 30.0
"""Seconds a contender may take to start and to report."""

NOTHING = "nothing"
NAMES = ("pathlb-httpx", "pathlb-httpx2", "balancer", "aiohttp", "httpx2", "httpx", NOTHING)


@dataclass(frozen=True, slots=True)
class Order:
    """What the process of a contender is to do."""

    name: str
    urls: list[str]
    gateways: list[int]
    """Their process ids."""
    rate: float
    seconds: float

    @property
    def in_flight(self) -> int:
        return round(self.rate * SERVICE)


@dataclass(slots=True)
class Report:
    """What it answers."""

    sent: int = 0
    stopped_after: float | None = None
    """Seconds after which it had collapsed and got no more requests."""
    answered: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    unfinished: int = 0
    mean: float = 0.0
    p50: float = 0.0
    p99: float = 0.0
    late: float = 0.0
    """p99 of what the process was late to begin a request; part of the latencies."""
    peak: int = 0
    """Most requests in flight."""
    memory: float = 0.0
    """Bytes the process has grown by at most, for each of `peak`."""
    cpu: float = 0.0
    """Of one core, while requests are sent and answered at the full rate."""
    gateways_cpu: float = 0.0
    """Of one core, all gateways together, at the same time."""
    idle: float = 0.0
    """Cores of the machine that had nothing to do, at the same time."""


# --- the process of a contender


@dataclass(frozen=True, slots=True)
class Clocks:
    """CPU time spent by everybody up to a moment, in seconds."""

    at: float
    own: float
    gateways: float
    idle: float

    @classmethod
    def read(cls, gateways: Sequence[int]) -> Clocks:
        hertz = os.sysconf("SC_CLK_TCK")
        machine = Path("/proc/stat").read_text().splitlines()[0].split()
        return cls(
            at=time.monotonic(),
            own=time.process_time(),
            gateways=cpu_us_of(gateways) / 1e6,
            idle=(int(machine[4]) + int(machine[5])) / hertz,
        )


def _memory(which: str) -> int:
    """`VmRSS`, the memory of this process, or `VmHWM`, the most it ever was; in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {which}")


async def measure(order: Order) -> Report:
    """Carry out an order, here and now."""
    async with AsyncExitStack() as stack:
        step: Step = _nothing
        if order.name != NOTHING:
            step = (await open_contender(order.name, stack, order.urls)).post
        await asyncio.gather(*[step() for _ in range(GATEWAYS)])  # everything is imported and every code path warm
        load = Load(order, step)
        await load.run()
        report = load.report()
        if report.unfinished:
            # Taking down thousands of requests one by one takes as long as a collapsed client takes for everything.
            print_report(report)
            os._exit(0)
    return report


async def _nothing() -> None:
    await asyncio.sleep(SERVICE)


class Load:
    """The requests of an order, and what became of them."""

    def __init__(self, order: Order, step: Step) -> None:
        self._order = order
        self._step = step
        self._tasks: set[asyncio.Task[None]] = set()
        self._errors: Counter[str] = Counter()
        count = round(order.rate * order.seconds)
        # Filled before the memory is looked at: the records are no client's.
        self._latencies = array("d", [-1.0]) * count
        self._late = array("d", [0.0]) * count
        self._sent = 0
        self._peak = 0
        self._stopped_after: float | None = None
        gc.collect()
        self._memory = _memory("VmRSS")

    async def run(self) -> None:
        """Send everything, or until the client has collapsed, and wait for the answers."""
        order = self._order
        self._first, began = Clocks.read(order.gateways), time.monotonic()
        steady = asyncio.create_task(self._steady())
        ceiling = COLLAPSED * order.in_flight
        for index in range(len(self._latencies)):
            due = began + index / order.rate
            if (ahead := due - time.monotonic()) > 0:
                await asyncio.sleep(ahead)
            self._late[index] = time.monotonic() - due
            task = asyncio.create_task(self._request(index, due))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            self._sent += 1
            self._peak = max(self._peak, len(self._tasks))
            if len(self._tasks) >= ceiling:
                self._stopped_after = time.monotonic() - began
                break
        self._last = Clocks.read(order.gateways)
        steady.cancel()  # one that has not come to it yet must not now
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=SERVICE + GRACE)

    async def _steady(self) -> None:
        await asyncio.sleep(SERVICE)
        self._first = Clocks.read(self._order.gateways)  # from now on there are answers too

    async def _request(self, index: int, due: float) -> None:
        try:
            await self._step()
        except Exception as exc:
            self._errors[type(exc).__name__] += 1
        else:
            self._latencies[index] = time.monotonic() - due

    def report(self) -> Report:
        known = [latency for latency in self._latencies if latency >= 0]
        first, last = self._first, self._last
        took = last.at - first.at
        report = Report(
            sent=self._sent,
            stopped_after=self._stopped_after,
            answered=len(known),
            errors=dict(self._errors),
            unfinished=len(self._tasks),
            late=_percentiles(self._late[: self._sent])[98],
            peak=self._peak,
            memory=(_memory("VmHWM") - self._memory) / self._peak,
            cpu=(last.own - first.own) / took,
            gateways_cpu=(last.gateways - first.gateways) / took,
            idle=(last.idle - first.idle) / took,
        )
        if len(known) > 1:
            cuts = _percentiles(known)
            report.mean, report.p50, report.p99 = fmean(known), cuts[49], cuts[98]
        return report


def _percentiles(values: Sequence[float]) -> list[float]:
    return quantiles(values, n=100, method="inclusive")


def print_report(report: Report) -> None:
    print(json.dumps(asdict(report)), flush=True)


# --- the command


def run(name: str, rate: float, seconds: float) -> tuple[Report, int] | str:
    """One contender on a fleet of its own: its report with the requests the gateways got, or why there is none."""
    with Fleet(GATEWAYS, processes=True, service_time=ServiceTime.constant(SERVICE)) as fleet:
        for gateway in fleet:
            gateway.set_body(REPLY)
        order = Order(name, fleet.urls, _children(), rate, seconds)
        command = [sys.executable, "-m", "benchmarks.in_flight", "--order", json.dumps(asdict(order))]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds + SERVICE + GRACE + START)
        except subprocess.TimeoutExpired as exc:
            return f"no report within {exc.timeout:.0f} s"
        if done.returncode:
            return f"its process ended with status {done.returncode}"
        warm_up = 0 if name == NOTHING else GATEWAYS
        return Report(**json.loads(done.stdout)), sum(gateway.stats().requests for gateway in fleet) - warm_up


def _children() -> list[int]:
    """Process ids of what this process has started: the gateways."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(path.parent.name))
    return found


HEADERS = (
    ("", 20),
    ("sent", 7),
    ("errors", 6),
    ("unfinished", 10),
    ("mean ms", 7),
    ("over", 6),
    ("p50", 6),
    ("p99", 6),
    ("late", 6),
    ("in flight", 9),
    ("KB each", 7),
    ("CPU", 5),
    ("gateways got", 12),
    ("CPU", 5),
    ("idle", 5),
    ("", 0),
)


def print_line(cells: Sequence[str]) -> None:
    columns = zip(cells, HEADERS, strict=True)
    padded = [cell.rjust(width) if index else cell.ljust(width) for index, (cell, (_, width)) in enumerate(columns)]
    print("  ".join(padded).rstrip(), flush=True)


def print_result(name: str, report: Report, received: int) -> None:
    remarks = [f"{count} {error}" for error, count in sorted(report.errors.items())]
    if report.stopped_after is not None:
        remarks.insert(0, f"COLLAPSED after {report.stopped_after:.1f} s")
    latencies = [report.mean, report.mean / SERVICE - 1, report.p50, report.p99]
    mean, over, p50, p99 = latencies if report.answered else [float("nan")] * 4
    print_line(
        [
            TITLES.get(name, name),
            str(report.sent),
            str(sum(report.errors.values())),
            str(report.unfinished),
            f"{mean * 1000:.0f}",
            f"{over:+.1%}",
            f"{p50 * 1000:.0f}",
            f"{p99 * 1000:.0f}",
            f"{report.late * 1000:.0f}",
            str(report.peak),
            f"{report.memory / 1024:.1f}",
            f"{report.cpu:.0%}",
            str(received),
            f"{report.gateways_cpu:.0%}",
            f"{report.idle:.0%}",
            ", ".join(remarks),
        ]
    )


def missed(name: str, report: Report) -> list[str]:
    """The targets this run of pathlb missed."""
    found: list[str] = []
    title = TITLES[name]
    if report.errors:
        found.append(f"{title}: {sum(report.errors.values())} errors")
    if report.unfinished or report.stopped_after is not None:
        found.append(f"{title}: {report.unfinished} unfinished of {report.sent} sent")
    if not report.answered or abs(report.mean / SERVICE - 1) > WITHIN:
        found.append(
            f"{title}: mean latency {report.mean / SERVICE - 1:+.1%} from the gateways', not within {WITHIN:.0%}"
        )
    return found


def _names(text: str) -> list[str]:
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.in_flight", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of sending, for each (default 60, at least 3)")
    parser.add_argument("--rate", type=float, default=2000.0, help="requests a second (default 2000)")
    parser.add_argument("--only", type=_names, help=f"a comma list of {', '.join(NAMES)}")
    parser.add_argument("--order", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.order:
        print_report(asyncio.run(measure(Order(**json.loads(options.order)))))
        return 0
    if options.seconds < 2 * SERVICE or options.rate < 1:
        parser.error(f"--seconds must be at least {2 * SERVICE:g}, --rate 1")
    names = [name for name in NAMES if not options.only or name in options.only]
    if unknown := set(options.only or ()) - set(NAMES):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    require(sorted({package for name in names for package in PACKAGES.get(name, ())}))
    expected = round(options.rate * SERVICE)
    require_descriptors(COLLAPSED * expected + 100)
    unwind_on_sigterm()
    cores = os.cpu_count() or 1
    print(
        f"{options.rate:g} requests/s for {options.seconds:g} s over {GATEWAYS} gateways that take {SERVICE:g} s for "
        f"each: {expected} in flight.\n"
        "ms: from the scheduled moment; late: p99 of what the client was late to begin. KB each: growth of the\n"
        "process at its peak, for each request in flight. CPU: of one core, the client; then the gateways, which are\n"
        f"Python too, all together. idle: what this machine of {cores} cores had left of {cores}00%; where that is\n"
        "next to nothing the machine is the limit and not the client.\n"
    )
    print_line([name for name, _ in HEADERS])
    found: list[str] = []
    for name in names:
        result = run(name, options.rate, options.seconds)
        if isinstance(result, str):
            print(f"{TITLES.get(name, name)}: {result}", flush=True)
            found += [f"{TITLES[name]}: {result}"] if name in BALANCED else []
            continue
        print_result(name, *result)
        found += missed(name, result[0]) if name in BALANCED else []
    if BALANCED.intersection(names):
        print("\n" + ("\n".join(f"MISSED  {what}" for what in found) if found else "every target met"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

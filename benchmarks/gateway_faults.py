"""`pathlb serve` over five gateways under 60% load, one of them going bad: what the callers notice.

    python -m benchmarks.gateway_faults [--seconds 12] [--rounds 3] [--rate 1500] [--only MODE]

The five gateways behave like PATH, run in processes of their own, and have 10 workers and 20 ms a request: that is 500
requests/s each. In front of them is `pathlb serve URL... --profile path` with one worker, and this process is its
callers: reads (`eth_blockNumber`) that arrive at 1,500/s whether or not earlier ones have been answered (open loop,
exponential gaps). Latency counts from the arrival to the last byte of the answer. From second 2 on one gateway is
killed, hangs, resets, fails fast or is ten times slower. A round has a run of each fault and one of none, the steady
one: what the others are compared with, over the same seconds.

Exit status 1 if a target is missed: no request lost, and a p99 of at most 1.25 times the steady run's, in the median of
the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx

from pathlb.serving.server import new_event_loop
from pathlb.testing import Fleet, ServiceTime

from .bare import BareClient
from .environment import require_descriptors, unwind_on_sigterm
from .faults import FAULTS, GATEWAYS, Sent

WORKERS = 10
SERVICE = 0.02
RATE = 1500.0
FAULT_AT = 2.0
BAD = 0
RATIO = 1.25
STEADY = "none"
_PATIENCE = 20.0  # seconds; an answer that takes longer is none
_START_WITHIN = 30.0
_END_WITHIN = 10.0
_ASKED = 5  # times: a worker with a backlog is late to answer
_LATE = 5.0  # ms of p99 lateness of this process, and
_FULL = 0.85  # of all cores: from there on a run says more of the machine than of pathlb
_CALL = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
_SERVING = re.compile(r"serving http://127\.0\.0\.1:(\d+),.* admin on (http://\S+)")


# --- `pathlb serve` as a process


@dataclass(frozen=True, slots=True)
class Served:
    """A running `pathlb serve`."""

    port: int
    admin: str

    def workers(self) -> list[dict[str, Any]]:
        """What each worker knows; `pid` is among it."""
        for _ in range(_ASKED):
            told: list[dict[str, Any]] = httpx.get(self.admin + "/snapshot", trust_env=False).json()["workers"]
            if not any("error" in one for one in told):
                return told
        raise RuntimeError(f"a worker says nothing: {told}")


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[Served]:
    """`pathlb serve` with these arguments, on ports of its own choice, until the block ends."""
    command = [sys.executable, "-m", "pathlb", "serve", "--bind", "127.0.0.1:0", "--admin", "0", *arguments]
    with tempfile.TemporaryFile("a+") as told:  # appended to: reading here does not move where the other one writes
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=told)
        try:
            yield _started(process, told)
        finally:
            process.terminate()
            try:
                process.wait(_END_WITHIN)
            except subprocess.TimeoutExpired:  # requests are under way; a second signal ends them too
                process.terminate()
                process.wait()


def _started(process: subprocess.Popen[bytes], told: Any) -> Served:
    end = time.monotonic() + _START_WITHIN
    while True:
        told.seek(0)
        said = told.read()
        if found := _SERVING.search(said):
            return Served(int(found[1]), found[2])
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"pathlb serve does not come up:\n{said}")
        time.sleep(0.02)


# --- a run


@dataclass(frozen=True, slots=True)
class Run:
    """What the callers saw, and what it took."""

    fault: str
    sent: list[Sent]
    fault_at: float
    retried: int
    bad_share: float
    """Of the picks of the whole run, those of the bad gateway."""
    out: str
    """How it was taken out."""
    cpu: float
    """Of one core, the worker."""
    busy: float
    """Of all cores, everything that runs here."""

    def lost(self) -> list[Sent]:
        return [one for one in self.sent if one.error]

    def percentile(self, percent: int, start: float = 0.0, end: float = float("inf")) -> float:
        """In ms, of the answered requests that arrived between two moments, in seconds from the fault."""
        known = [one.seconds * 1000 for one in self.sent if start <= one.at - self.fault_at < end and not one.error]
        return quantiles(known, n=100, method="inclusive")[percent - 1] if len(known) > 1 else float("nan")

    def lag(self) -> float:
        """p99 of the lateness of this process, in ms."""
        return quantiles([one.lag * 1000 for one in self.sent], n=100, method="inclusive")[98]


async def load(
    port: int, rate: float, seconds: float, fault: Callable[[], None] | None, seed: int
) -> tuple[list[Sent], float]:
    """Make the requests, and the fault; answers when all have ended, with the moment of the fault."""
    rng = random.Random(seed)
    client = BareClient("127.0.0.1", port)
    head = b"POST /v1 HTTP/1.1\r\nHost: gateway\r\nTarget-Service-Id: eth\r\nContent-Type: application/json\r\n"
    message = head + b"Content-Length: %d\r\n\r\n%b" % (len(_CALL), _CALL)
    sent: list[Sent] = []
    asking: set[asyncio.Task[None]] = set()

    async def request(one: Sent) -> None:
        one.lag = time.monotonic() - one.at
        one.error = f"no answer within {_PATIENCE:g} s"  # until there is one
        try:
            reply = await client.send(message)
        except OSError as exc:
            one.error = f"{type(exc).__name__}: {exc}"
        else:
            answered = reply.status == 200 and b'"result"' in b"".join(reply.parts)
            one.error = "" if answered else f"status {reply.status}: {b''.join(reply.parts)[:200]!r}"
        one.seconds = time.monotonic() - one.at

    at = began = time.monotonic()
    fault_at = began + FAULT_AT
    breaking: asyncio.Future[None] | None = None
    while (at := at + rng.expovariate(rate)) < began + seconds:
        if at >= fault_at and breaking is None and fault is not None:
            breaking = asyncio.ensure_future(asyncio.to_thread(fault))
        await asyncio.sleep(max(0.0, at - time.monotonic()))
        one = Sent(at, "POST", "")
        sent.append(one)
        task = asyncio.create_task(request(one))
        asking.add(task)
        task.add_done_callback(asking.discard)
    if breaking is not None:
        await breaking
    if asking:
        await asyncio.wait(asking, timeout=_PATIENCE)
    for task in asking:
        task.cancel()
    await client.aclose()
    return sent, fault_at


def run(fault: str, rate: float, seconds: float, seed: int) -> Run:
    """One fault, on a fleet and a `pathlb serve` of its own."""
    fleet = Fleet(
        GATEWAYS, processes=True, service_time=ServiceTime.constant(SERVICE), workers=WORKERS, path=["eth"], seed=seed
    )
    with fleet, serving(*fleet.urls, "--profile", "path", "--workers", "1") as served:
        bad = fleet[BAD]
        pid = served.workers()[0]["pid"]
        cpu, machine, began = _cpu_of(pid), _busy(), time.monotonic()
        break_it = None if fault == STEADY else lambda: FAULTS[fault](bad)
        with asyncio.Runner(loop_factory=new_event_loop) as runner, without_collections():
            sent, fault_at = runner.run(load(served.port, rate, seconds, break_it, seed))
        took = time.monotonic() - began
        used, worked = _cpu_of(pid) - cpu, _busy() - machine
        counts = {one["url"]: one["counts"] for one in served.workers()[0]["endpoints"]}
    picks = sum(one["picks"] for one in counts.values())
    of_bad = counts[bad.url]
    return Run(
        fault,
        sent,
        fault_at,
        sum(one["failed"] + one["ignored"] for one in counts.values()),
        of_bad["picks"] / picks,
        f"{of_bad['breaker_opens']} breaker, {of_bad['ejections']} outlier",
        used / took,
        worked / took / (os.cpu_count() or 1),
    )


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Callers that stand still while Python looks for garbage would blame the gateway for it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _cpu_of(pid: int) -> float:
    """Seconds of CPU a process has used."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _busy() -> float:
    """Seconds of CPU all processes have used."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


# --- the report

HEADERS = (
    ("fault", 9),
    ("sent", 6),
    ("lost", 5),
    ("retried", 7),
    ("p50", 6),
    ("p99", 7),
    ("/steady", 7),
    ("p99 0-1 s", 9),
    ("1-3 s", 7),
    ("3 s on", 7),
    ("picks", 6),
    ("CPU", 5),
    ("machine", 7),
    ("lag", 5),
    ("taken out by", 0),
)


def print_line(cells: Sequence[str]) -> None:
    columns = zip(cells, HEADERS, strict=True)
    padded = [cell.rjust(width) if index else cell.ljust(width) for index, (cell, (_, width)) in enumerate(columns)]
    print("  ".join(padded).rstrip(), flush=True)


def print_run(one: Run, steady: Run) -> None:
    print_line(
        [
            one.fault,
            str(len(one.sent)),
            str(len(one.lost())),
            str(one.retried),
            f"{one.percentile(50):.1f}",
            f"{one.percentile(99):.1f}",
            f"{ratio(one, steady):.2f}",
            f"{one.percentile(99, 0, 1):.1f}",
            f"{one.percentile(99, 1, 3):.1f}",
            f"{one.percentile(99, 3):.1f}",
            f"{one.bad_share:.1%}",
            f"{one.cpu:.0%}",
            f"{one.busy:.0%}",
            f"{one.lag():.1f}",
            one.out,
        ]
    )


def ratio(one: Run, steady: Run) -> float:
    return one.percentile(99) / steady.percentile(99)


def missed(fault: str, runs: Sequence[Run], ratios: Sequence[float]) -> list[str]:
    """The targets missed with one fault, over all rounds."""
    lost = [one for each in runs for one in each.lost()]
    found = [f"{len(lost)} requests lost ({lost[0].error})"] if lost else []
    if median(ratios) > RATIO:
        found.append(f"p99 {median(ratios):.2f} times the steady run's, more than {RATIO:g}")
    return [f"{fault}: {what}" for what in found]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gateway_faults", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="length of each run (default 12, at least 6)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--rate", type=float, default=RATE, help="requests/s, in all (default 1500)")
    parser.add_argument("--only", choices=sorted(FAULTS), help="one fault")
    parser.add_argument("--seed", type=int, default=1, help="of the arrivals (default 1)")
    options = parser.parse_args()
    if options.seconds < 6 or options.rounds < 1 or options.rate < 1:
        parser.error("--seconds must be at least 6, --rounds and --rate at least 1")
    require_descriptors(4096)
    unwind_on_sigterm()
    print(
        f"{GATEWAYS} gateways of {WORKERS} workers, {SERVICE * 1000:.0f} ms a request, behind `pathlb serve --profile "
        f"path` with one worker.\n{options.rate:g} requests/s for {options.seconds:g} s; the fault comes at second "
        f"{FAULT_AT:g}. p50, p99: ms, of the requests that arrived from then on;\n/steady: p99 as a multiple of the "
        "run without a fault. p99 0-1 s, 1-3 s, 3 s on: by seconds from the fault. retried: attempts\nthat failed or "
        "were given up. picks: the bad gateway's share, over the whole run. CPU: the worker, of one core; machine: "
        "all\nprocesses, of all cores. lag: p99 in ms of what this process was late to begin a request.\n"
    )
    print_line([name for name, _ in HEADERS])
    taken: dict[str, list[Run]] = {}
    ratios: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        seed = options.seed + turn
        steady = run(STEADY, options.rate, options.seconds, seed)
        for fault in [STEADY, *([options.only] if options.only else FAULTS)]:
            one = steady if fault == STEADY else run(fault, options.rate, options.seconds, seed)
            print_run(one, steady)
            taken.setdefault(fault, []).append(one)
            ratios.setdefault(fault, []).append(ratio(one, steady))
    unfit = [one.fault for runs in taken.values() for one in runs if one.lag() > _LATE or one.busy > _FULL]
    if unfit:
        print(f"\nthe machine was the limit in {len(unfit)} runs ({', '.join(unfit)}): quieten it, or lower --rate")
    found = [what for fault, runs in taken.items() for what in missed(fault, runs, ratios[fault])]
    print("\n" + ("\n".join(f"MISSED  {what}" for what in found) if found else "every target met"))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

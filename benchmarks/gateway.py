"""What a hop costs: `pathlb serve` beside nginx, HAProxy, Envoy, Caddy and Traefik in front of the same five backends.

    python -m benchmarks.gateway [--seconds 2] [--rounds 5] [--only NAME,NAME]

Each has a core, and one worker or thread. wrk POSTs 63 bytes and gets a JSON-RPC answer of 43, over 64 connections and
then over one; the backends are nginx on five ports. Everybody is measured in every round, in a new order each time,
after a round to warm up, and before that has shown that it forwards, and to all backends.

wrk and the backends share another core, which may be full before a fast hop is: `direct` is what it can do without one,
and "of a core" how busy the hop was. So it is the CPU time of a request, of all processes of the hop, that tells what a
core could do: requests/s a core is its reciprocal. A hop that has time left does less at a time, and takes a little
more CPU for each request than it would if it had not: where it is not near 100% the figure is on the low side.

Added latency is that over one connection, less what the backends take without a hop. Its base is in the table too.

`balancer` is no hop: `Balancer.send` in the Python process that wants the answer. Its CPU time includes what this
process would spend on any HTTP client, which the hops' do not, their callers being others; its added latency is that
beyond `bare`, which is no client but the least that Python can do.

Exit status 1 if a request through pathlb failed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from functools import partial
from statistics import quantiles

from .contenders import BALANCED, COMMON, LARGE, PAYLOAD, POST_HEADERS, REPLY, TITLES, open_contender
from .environment import require, require_descriptors, unwind_on_sigterm
from .hops import HOPS, OWN, how_to_install
from .measure import Figure, machine
from .nginx import nginx
from .processes import cpu_us_of, family, on_cores
from .throughput import loop_factory, sample
from .wrk import Wrk

PORTS = 5
CONCURRENCY = 64
FAIR_SHARE = 0.5
"""Of what a backend would get if all got the same: less, and the hop does not balance."""
TELLING = REPLY.replace(b"15a3f", b"$server_port")
"""What the backends say behind a hop: as long as `REPLY` once nginx has put in which of them it is."""

DIRECT, BARE, BALANCER = "direct", "bare", "balancer"
NAMES = (*HOPS, BALANCER)


@dataclass(frozen=True, slots=True)
class Sample:
    """One row in one round; latencies in microseconds."""

    rate: float
    cpu: float
    """Microseconds for each request; not known of those that are no hop."""
    p50: float
    p99: float
    alone_p50: float
    """One request at a time."""
    alone_p99: float
    failed: str


Measure = Callable[[], Sample]


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table."""

    name: str
    title: str
    measure: Measure
    base: str
    """The row whose latency is that of the backends, for this one."""


def through(wrk: Wrk, url: str, seconds: int, pids: Collection[int] = ()) -> Sample:
    """A sample over HTTP; `pids` is who is charged."""
    began = cpu_us_of(pids)
    many = wrk.load(url, CONCURRENCY, seconds)
    spent = cpu_us_of(pids) - began
    alone = wrk.load(url, 1, seconds)
    failed = [f"{count} {what}" for load in (many, alone) for what, count in load.failed.items()]
    cpu = spent / many.requests if pids else math.nan
    return Sample(many.rate, cpu, many.p50, many.p99, alone.p50, alone.p99, ", ".join(failed))


def within(name: str, urls: Sequence[str], seconds: int, core: int) -> Sample:
    """A sample of a client of `contenders`, here and now."""

    async def measure() -> Sample:
        async with AsyncExitStack() as stack:
            client = await open_contender(name, stack, urls if name in BALANCED else urls[:1])
            latencies: list[float] = []

            async def step() -> None:
                began = time.perf_counter()
                await client.post()
                latencies.append((time.perf_counter() - began) * 1e6)

            many = await sample(step, CONCURRENCY, seconds)
            p50, p99 = _percentiles(latencies)
            latencies.clear()
            alone = await sample(step, 1, seconds)
            failed = [f"{one.failed} failed ({one.error})" for one in (many, alone) if one.failed]
            return Sample(many.rate, many.cpu, p50, p99, *_percentiles(latencies), ", ".join(failed))

    gc.collect()
    with on_cores({core}), asyncio.Runner(loop_factory=loop_factory("uvloop")) as runner:
        return runner.run(measure())


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def check(wrk: Wrk, url: str, backends: Sequence[str]) -> None:
    """Raise `RuntimeError` unless all that is answered is a backend's answer, and each backend has its share."""
    found = wrk.answers(url, CONCURRENCY, 1)
    expected = {
        "200 " + TELLING.replace(b"$server_port", port.encode()).decode()
        for _, _, port in (backend.rpartition(":") for backend in backends)
    }
    if others := found.keys() - expected:
        raise RuntimeError(f"answers with something else: {min(others)[:200]}")
    least = min(found[answer] for answer in expected)
    if least < FAIR_SHARE * found.total() / len(expected):
        raise RuntimeError(f"does not balance: one backend got {least} of {found.total()} requests")


def start(
    stack: ExitStack,
    names: Sequence[str],
    backends: Sequence[str],
    plain: Sequence[str],
    cores: Sequence[int],
    seconds: int,
) -> list[Row]:
    """What there is to measure, started. Raises `RuntimeError` when that is not possible for pathlb.

    `backends` tell who they are, `plain` all say the same; of `cores` the first one is for the load.
    """
    wrk = Wrk(PAYLOAD, {**COMMON, **POST_HEADERS}, cores[:1])
    own = [*cores[1:], cores[0]]
    target = backends[0] + "/v1"
    found = [Row(DIRECT, "direct: no hop", partial(through, wrk, target, seconds), DIRECT)]
    for name in names:
        if name == BALANCER:
            for client, base in ((BARE, BARE), (BALANCER, BARE)):
                found.append(Row(client, TITLES[client], partial(within, client, plain, seconds, own[0]), base))
            continue
        hop = HOPS[name]
        try:
            url, pid = stack.enter_context(hop.serving(backends, own[: hop.cores]))
            check(wrk, url + "/v1", backends)
        except RuntimeError as exc:
            if name in OWN:
                raise RuntimeError(f"{hop.title}: {exc}") from exc
            print(f"LEFT OUT  {hop.title}: {exc}")
            continue
        measure = partial(through, wrk, url + "/v1", seconds, family(pid))
        found.append(Row(name, hop.title, measure, DIRECT))
    return found


def measure_all(wanted: Sequence[Row], rounds: int) -> Table:
    """Every row in every round, in a new order each time, after a round to warm up."""
    taken: dict[str, list[Sample]] = {row.name: [] for row in wanted}
    order, rng = list(wanted), random.Random(1)
    for turn in range(rounds + 1):
        rng.shuffle(order)
        for row in order:
            try:
                one = row.measure()
            except RuntimeError as exc:
                raise RuntimeError(f"{row.title}: {exc}") from exc
            if turn:
                taken[row.name].append(one)
    return Table(wanted, taken)


# --- the report


class Table:
    """What was measured."""

    def __init__(self, measured: Sequence[Row], samples: Mapping[str, Sequence[Sample]]) -> None:
        self._rows = {row.name: row for row in measured}
        self._samples = samples

    def figure(self, name: str, of: Callable[[Sample], float]) -> Figure:
        return Figure(tuple(of(one) for one in self._samples[name]))

    def a_core(self, name: str) -> Figure:
        """Requests/s that a core is good for."""
        return self.figure(name, lambda one: 1e6 / one.cpu)

    def failures(self, name: str) -> str:
        """What went wrong, if anything did."""
        return "; ".join(one.failed for one in self._samples[name] if one.failed)

    def pathlb_failed(self) -> bool:
        return any(self.failures(name) for name in self._rows if name in OWN or name == BALANCER)

    def print(self) -> None:
        print(f"\n  {'':<26} {f'{CONCURRENCY} concurrent':<66}  one after the other, us")
        print(
            f"  {'':<26} {'requests/s':>10} {'+-':>6} {'CPU us':>7} {'+-':>5} {'a core':>8} {'of a core':>9}"
            f" {'p50 ms':>7} {'p99 ms':>7}  {'p50':>6} {'added':>6} {'p99':>6} {'added':>6}"
        )
        for row in self._rows.values():
            cells = [self._under_load(row.name), self._charged(row.name), self._latency(row.name), self._alone(row)]
            print(f"  {row.title:<26} {' '.join(cells)}  {self.failures(row.name)}".rstrip())

    def _under_load(self, name: str) -> str:
        rate = self.figure(name, lambda one: one.rate)
        return f"{rate.median:10,.0f} {rate.spread:6,.0f}"

    def _charged(self, name: str) -> str:
        cpu = self.figure(name, lambda one: one.cpu)
        if math.isnan(cpu.median):
            return " " * 32
        busy = self.figure(name, lambda one: one.rate * one.cpu / 1e6)
        return f"{cpu.median:7.1f} {cpu.spread:5.1f} {self.a_core(name).median:8,.0f} {busy.median:9.0%}"

    def _latency(self, name: str) -> str:
        p50, p99 = self.figure(name, lambda one: one.p50 / 1000), self.figure(name, lambda one: one.p99 / 1000)
        return f"{p50.median:7.2f} {p99.median:7.2f}"

    def _alone(self, row: Row) -> str:
        cells = ""
        for of in (lambda one: one.alone_p50, lambda one: one.alone_p99):
            figure = self.figure(row.name, of)
            added = f"{figure.beyond(self.figure(row.base, of)).median:+.0f}" if row.base != row.name else ""
            cells += f" {figure.median:6.0f} {added:>6}"
        return cells

    def print_ratios(self) -> None:
        """pathlb as a multiple of the others, and of itself."""
        ours = [name for name in self._rows if name in OWN or name == BALANCER]
        others = [name for name in self._rows if name in HOPS and name not in OWN]
        if ours and others:
            print("\n  Requests/s a core as a multiple of; the median of the ratios of each round")
            print(f"  {'':<26}" + "".join(f" {name:>9}" for name in others))
        for name in ours if others else ():
            ratios = (self.a_core(name).over(self.a_core(other)).median for other in others)
            print(f"  {self._rows[name].title:<26}" + "".join(f" {ratio:9.2f}" for ratio in ratios))
        if self._rows.keys() >= OWN:
            one, two = (self.figure(name, lambda one: one.rate) for name in ("pathlb", "pathlb-2"))
            a_core = self.a_core("pathlb-2").over(self.a_core("pathlb")).median
            print(f"\n  Two workers: {two.over(one).median:.2f} times the requests/s, {a_core:.2f} of those a core")


# --- the command


def run(names: Sequence[str], rounds: int, seconds: int) -> int:
    cores = sorted(os.sched_getaffinity(0))
    versions = [f"{name} {HOPS[name].told_version()}" for name in names if name in HOPS and name != "pathlb-2"]
    print(
        f"{', '.join([*versions, f'Python {sys.version.split()[0]}'])}\n"
        f"{rounds} rounds of {seconds} s at {CONCURRENCY} concurrent and {seconds} s at one, for each; this machine at "
        f"this moment: {machine():.0f} ns for a call of an empty function"
    )
    if len(cores) > 1:
        print(f"wrk and the backends on core {cores[0]}, each hop on core {cores[1]}")
    else:
        print("ONE CORE for wrk, the backends and the hop together: only the CPU times are good")
    if len(cores) == 2 and "pathlb-2" in names:
        print("the second worker shares the core of wrk and the backends: look at its CPU time, not at its requests/s")
    with ExitStack() as stack:
        # One server could not do both: `Balancer.send` is measured by a client that knows each byte of the answer.
        telling = stack.enter_context(nginx(PORTS, TELLING, LARGE, cores[0]))
        plain = stack.enter_context(nginx(PORTS, REPLY, LARGE, cores[0]))
        table = measure_all(start(stack, names, telling, plain, cores, seconds), rounds)
    table.print()
    table.print_ratios()
    return 1 if table.pathlb_failed() else 0


def installed(names: Sequence[str]) -> list[str]:
    """Those that can be started; says what to do about the others."""
    missing = [name for name in names if name in HOPS and HOPS[name].find() is None]
    if missing:
        commands = how_to_install([HOPS[name] for name in missing])
        print(f"NOT INSTALLED, and left out: {', '.join(missing)}. To install: {commands}")
    return [name for name in names if name not in missing]


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gateway", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--seconds", type=int, default=2, help="length of a sample, of which each takes two (default 2)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="samples of each (default 5)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"a comma list of {', '.join(NAMES)}")
    options = parser.parse_args()
    if options.seconds < 1 or options.rounds < 1:
        parser.error("--seconds and --rounds must be above 0")
    if unknown := set(options.only or ()) - set(NAMES):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    require(["uvloop", "uvicorn"], ["nginx", "wrk"])
    require_descriptors(20 * CONCURRENCY)
    unwind_on_sigterm()
    wanted = [name for name in NAMES if not options.only or name in options.only]
    return run(installed(wanted), options.rounds, options.seconds)


if __name__ == "__main__":
    sys.exit(main())

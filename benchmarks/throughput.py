"""Requests a second and CPU time a request over a real network, pathlb beside other clients: a closed loop on one core.

    python -m benchmarks.throughput [--quick] [--rounds 5] [--seconds 0.7] [--loop asyncio|uvloop|both]
                                    [--kind post,get] [--concurrency 1,32,400] [--only NAME,NAME]

nginx answers from a core of its own: POSTs of 63 bytes with 43, GETs with 64 KiB that are read as they stream. A
number of workers each send their next request when the last one has been answered. Everybody is measured in every
round, in a new order each time, from the moment the load is steady; pathlb over five ports, the others over one. The
floors are no clients: they show what there is to win.

Exit status 1 if a target is missed or a request of pathlb's failed.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

from .contenders import BALANCED, LARGE, NAMES, PACKAGES, REPLY, TITLES, Contender, open_contender
from .environment import require, require_descriptors, unwind_on_sigterm
from .measure import Figure, Step, cpu_us, machine
from .nginx import nginx

PORTS = 5
LOOPS = ("asyncio", "uvloop")
KINDS = ("post", "get")
CONCURRENCY = (1, 32, 400)
RAMP = 0.3
"""Seconds in which the workers of a sample begin."""
SETTLE = 0.25
"""Share of its length that then passes before it begins: longer where fewer answers than workers came by then,"""
SETTLED_WITHIN = 3.0
"""but not for more than so many seconds."""
STUCK = 60.0
"""Seconds after which requests that have not ended never will."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the median of the ratios `own` / `base` has to be, by concurrency: (required, aim). POSTs only."""

    own: str
    base: str
    wanted: Mapping[int, tuple[float, float]]
    cpu: bool = False
    """A ratio of CPU times, which may be that much at most; else of requests/s, which has to be as much at least."""


TARGETS = (
    Target("pathlb-httpx", "httpx", {32: (4.8, 6), 400: (7, 9)}),
    Target("pathlb-httpx2", "httpx2", {32: (2.7, 3.5), 400: (5.4, 7)}),
    Target("pathlb-httpx", "aiohttp", {32: (0.57, 0.75), 400: (0.6, 0.8)}),
    Target("balancer", "aiohttp", {32: (1.6, 2), 400: (1.8, 2.2)}),
    Target("pathlb-httpx", "httpx-bare", {32: (1.15, 0.9), 400: (1.15, 0.9)}, cpu=True),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender in one round."""

    rate: float
    """Requests answered a second."""
    cpu: float
    """Microseconds of CPU for each."""
    failed: int
    error: str


async def sample(step: Step, concurrency: int, seconds: float) -> Sample:
    """Send from so many workers and look at `seconds` of it; what begins and ends the load is left out.

    Raises `RuntimeError` when nothing is answered.
    """
    done = failed = 0
    error = ""
    running = True
    connected = asyncio.Event()

    async def work() -> None:
        nonlocal done, failed, error
        while running:
            try:
                await step()
            except Exception as exc:
                failed += 1
                error = f"{type(exc).__name__}: {exc}"
                await asyncio.sleep(0.01)  # one that fails at once must not keep the others from running
            else:
                done += 1
                if done == concurrency:
                    connected.set()

    try:
        async with asyncio.timeout(seconds + STUCK), asyncio.TaskGroup() as group:
            # One after the other: hundreds that connect in the same instant keep httpx's pool busy for ten seconds,
            # and what it does in those is not what it does under this load.
            began, started = time.perf_counter(), 0
            while started < concurrency:
                due = min(concurrency, 1 + int((time.perf_counter() - began) / RAMP * concurrency))
                for _ in range(due - started):
                    group.create_task(work())
                started = due
                await asyncio.sleep(0.001)
            await asyncio.sleep(SETTLE * seconds)
            with suppress(TimeoutError):
                await asyncio.wait_for(connected.wait(), SETTLED_WITHIN)
            before, cpu, began = done, cpu_us(), time.perf_counter()
            await asyncio.sleep(seconds)
            answered, spent, took = done - before, cpu_us(cpu), time.perf_counter() - began
            running = False  # the workers end with the requests they are at, and keep their connections
    except TimeoutError:
        raise RuntimeError(f"requests hang: {done} answered, {failed} failed ({error})") from None
    if not answered:
        raise RuntimeError(f"nothing answered in {took:.1f} s, {failed} failed ({error})")
    return Sample(answered / took, spent / answered, failed, error)


@dataclass(frozen=True, slots=True)
class Cell:
    """One table: what the contenders did with one kind of request at one concurrency."""

    loop: str
    kind: str
    concurrency: int
    samples: dict[str, list[Sample]]

    def rate(self, name: str) -> Figure:
        return Figure(tuple(one.rate for one in self.samples[name]))

    def cpu(self, name: str) -> Figure:
        return Figure(tuple(one.cpu for one in self.samples[name]))

    def failures(self, name: str) -> str:
        """What went wrong, if anything did."""
        failed = [one for one in self.samples[name] if one.failed]
        return f"{sum(one.failed for one in failed)} failed ({failed[-1].error})" if failed else ""


async def measure_cell(
    contenders: Mapping[str, Contender], loop: str, kind: str, concurrency: int, *, rounds: int, seconds: float
) -> Cell:
    """All contenders in every round, in a new order each time, after a sample each to warm up."""
    steps = {name: one.post if kind == "post" else one.get for name, one in contenders.items()}
    taken: dict[str, list[Sample]] = {name: [] for name in steps}
    order, rng = list(steps), random.Random(1)
    for turn in range(rounds + 1):
        rng.shuffle(order)
        for name in order:
            gc.collect()  # nobody pays for what another left behind
            try:
                one = await sample(steps[name], concurrency, seconds)
            except RuntimeError as exc:
                raise RuntimeError(f"{name}, {kind}, {concurrency} concurrent, {loop}: {exc}") from exc
            if turn:
                taken[name].append(one)
    return Cell(loop, kind, concurrency, taken)


async def measure_loop(
    loop: str,
    names: Sequence[str],
    urls: Sequence[str],
    cells: Iterable[tuple[str, int]],
    *,
    rounds: int,
    seconds: float,
) -> list[Cell]:
    """Every cell on the event loop that is running, printed as it is done."""
    found: list[Cell] = []
    async with AsyncExitStack() as stack:
        contenders = {name: await open_contender(name, stack, urls if name in BALANCED else urls[:1]) for name in names}
        for kind, concurrency in cells:
            cell = await measure_cell(contenders, loop, kind, concurrency, rounds=rounds, seconds=seconds)
            print_cell(cell)
            found.append(cell)
    return found


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop  # not needed by who measures asyncio only

    return uvloop.new_event_loop


# --- the report


def print_cell(cell: Cell) -> None:
    print(f"\n{cell.loop}, {cell.kind.upper()}, {cell.concurrency} concurrent")
    print(f"  {'':<36} {'requests/s':>10} {'+-':>6}  {'CPU us each':>11} {'+-':>6}  {'of a core':>9}")
    for name in cell.samples:
        rate, cpu = cell.rate(name), cell.cpu(name)
        share = Figure(tuple(one.rate * one.cpu / 1e6 for one in cell.samples[name]))
        print(
            f"  {TITLES[name]:<36} {rate.median:10,.0f} {rate.spread:6,.0f}  {cpu.median:11,.0f} {cpu.spread:6,.0f}"
            f"  {share.median:9.0%}  {cell.failures(name)}".rstrip(),
            flush=True,
        )


def print_targets(cells: Iterable[Cell]) -> bool:
    """The table of the targets, as far as they were measured; whether one was missed."""
    measured = [
        (cell, target, wanted)
        for cell in cells
        for target in TARGETS
        if (wanted := target.wanted.get(cell.concurrency)) and cell.kind == "post"
        if {target.own, target.base} <= cell.samples.keys()
    ]
    if not measured:
        return False
    print("\nTargets: POST, one core; the median of the ratios of each round")
    print(f"  {'':<70} {'loop':<7} {'at':>4} {'measured':>8} {'+-':>5}  {'required':>8} {'aim':>6}")
    missed = False
    for cell, target, (required, aim) in measured:
        figure = cell.cpu if target.cpu else cell.rate
        ratio = figure(target.own).over(figure(target.base))
        sign = -1 if target.cpu else 1
        met = sign * ratio.median >= sign * required
        aimed = sign * ratio.median >= sign * aim
        missed |= not met
        title = f"{TITLES[target.own]} / {TITLES[target.base]}, {'CPU' if target.cpu else 'requests/s'}"
        print(
            f"  {title:<70} {cell.loop:<7} {cell.concurrency:>4} {ratio.median:8.2f} {ratio.spread:5.2f}  "
            f"{'<=' if target.cpu else '>='} {required:5g} {aim:6g}  "
            f"{'met, the aim too' if aimed else 'met' if met else 'MISSED'}"
        )
    return missed


def print_failures(cells: Iterable[Cell]) -> bool:
    """Who had failures; whether pathlb had."""
    found = [(cell, name, cell.failures(name)) for cell in cells for name in cell.samples]
    for cell, name, what in found:
        if what:
            print(f"FAILED  {name}, {cell.kind}, {cell.concurrency} concurrent, {cell.loop}: {what}")
    return any(what and name in BALANCED for _, name, what in found)


# --- the command


def run(options: argparse.Namespace, names: Sequence[str]) -> int:
    cores = sorted(os.sched_getaffinity(0))
    server_core = cores[1] if len(cores) > 1 else cores[0]
    print(
        f"Python {sys.version.split()[0]}, {options.rounds} rounds of {options.seconds:g} s for each; this machine at "
        f"this moment: {machine():.0f} ns for a call of an empty function"
    )
    if server_core != cores[0]:
        print(f"client on core {cores[0]}, nginx on core {server_core}")
    else:
        print("ONE CORE for the client and nginx together: requests/s are half nginx's, only the CPU times are good")
    print("+-: half the distance between the quartiles. Of a core: well below 100% it is not the client that is slow.")
    cells: list[Cell] = []
    wanted = [(kind, concurrency) for kind in options.kind for concurrency in options.concurrency]
    with nginx(PORTS, REPLY, LARGE, server_core) as urls:
        os.sched_setaffinity(0, {cores[0]})
        for loop in LOOPS if options.loop == "both" else (options.loop,):
            with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
                measuring = measure_loop(loop, names, urls, wanted, rounds=options.rounds, seconds=options.seconds)
                cells += runner.run(measuring)
    missed = print_targets(cells)
    return 1 if print_failures(cells) or missed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.throughput", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="POSTs at 32 and 400 on asyncio, 3 rounds of 0.3 s")
    parser.add_argument("--rounds", type=int, help="samples of each contender (default 5)")
    parser.add_argument("--seconds", type=float, help="length of a sample (default 0.7)")
    parser.add_argument("--loop", choices=(*LOOPS, "both"), help="event loop (default both)")
    parser.add_argument("--kind", type=_names, help="post, get or both (default post,get)")
    parser.add_argument("--concurrency", type=_numbers, help="workers (default 1,32,400)")
    parser.add_argument("--only", type=_names, help="a comma list of contenders")
    quick = {"rounds": 3, "seconds": 0.3, "loop": "asyncio", "kind": ["post"], "concurrency": [32, 400]}
    usual = {"rounds": 5, "seconds": 0.7, "loop": "both", "kind": list(KINDS), "concurrency": list(CONCURRENCY)}
    options = parser.parse_args()
    for name, value in (quick if options.quick else usual).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.rounds < 1 or options.seconds <= 0 or min(options.concurrency) < 1:
        parser.error("--rounds, --seconds and --concurrency must be above 0")
    if not set(options.kind) <= set(KINDS):
        parser.error(f"--kind must be of {', '.join(KINDS)}")
    return options


def _names(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    options = parse()
    unknown = set(options.only or ()) - set(NAMES)
    if unknown:
        sys.exit(f"--only: no contender is called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    names = [name for name in NAMES if not options.only or name in options.only]
    packages = {package for name in names for package in PACKAGES.get(name, ())}
    require(sorted(packages | ({"uvloop"} if options.loop != "asyncio" else set())), ["nginx"])
    require_descriptors(max(options.concurrency) * len(names) + 100)
    unwind_on_sigterm()
    return run(options, names)


if __name__ == "__main__":
    sys.exit(main())

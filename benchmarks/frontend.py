"""A Next.js front end whose gateways go bad: the pages it loses through `pathlb serve`, and through nginx.

    python -m benchmarks.frontend [--rate 50] [--seconds 6] [--relay 0.1] [--only pathlb|nginx]
                                  [--logs FOLDER]

examples/nextjs, built with `next build` and run with `next start`, asks the gateways at LOCAL_GATEWAY_URL for the block
height in every page it renders, with POSTs over connections that Node's fetch keeps. That is `pathlb serve` with its
defaults, or an nginx with least_conn, proxy_next_upstream as it comes and 64 connections kept; behind it are five
emulated PATH gateways of 100 ms a relay. One is killed, another one hangs, a third one becomes ten times slower, and
each is restored before the next. Pages are asked for on schedule, whether or not earlier ones have come (open loop);
every other one is the route handler. The chain grows with every phase, so that an old page would be seen.

Exit status 1 if a page was lost through pathlb.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from pathlb.cli.traffic import percentile
from pathlb.testing import Fleet, Mode, ServiceTime

from .environment import require, unwind_on_sigterm
from .frontend_servers import build_app, next_app, nginx, serve

GATEWAYS = 5
SLOWER = 10.0
HOPS = ("pathlb", "nginx")
PATHS = ("/", "/api/height")
WARM_UP = 100
"""Pages before the first phase, one after the other: Node compiles what it has seen often."""
PATIENCE = 30.0
"""Seconds a visitor waits for a page."""

SHOWN = re.compile(r'<h1>Block (\d+)</h1>|\{"height":(\d+)\}')
MARKUP = re.compile(r"<[^>]*>|\\[rn]|\s+")
TOLD = 160  # characters of a reason


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of pages, begun by a change to the fleet."""

    name: str
    change: Callable[[Fleet], None] = lambda fleet: None
    fault: bool = False


PHASES = (
    Phase("steady"),
    Phase("one killed", lambda fleet: fleet[0].kill(), fault=True),
    Phase("restored", lambda fleet: fleet[0].restore()),
    Phase("one hung", lambda fleet: fleet[1].set_mode(Mode.HANG), fault=True),
    Phase("restored", lambda fleet: fleet[1].restore()),
    Phase(f"one {SLOWER:g}x slower", lambda fleet: fleet[2].set_mode(Mode.SLOW, factor=SLOWER), fault=True),
    Phase("restored", lambda fleet: fleet[2].restore()),
)


@dataclass(slots=True)
class Page:
    """One page, as its visitor saw it."""

    phase: int
    seconds: float = 0.0
    """Since it was due, until it was there or had failed."""
    failure: str = ""


class State:
    """Where the phases, and the chain behind the gateways, have come to."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.phase = 0
        self.oldest = self.newest = 1000
        """The block heights a page may show: while it changes some gateways are at the old one."""

    def begin(self, phase: int) -> None:
        """Blocks until the phase's change is in effect, and the chain has grown."""
        self.phase = phase
        PHASES[phase].change(self._fleet)
        self.newest += 1
        for gateway in self._fleet:
            gateway.set_height(self.newest)
        self.oldest = self.newest


async def ask(client: httpx.AsyncClient, path: str, state: State) -> str:
    """Ask for a page; why it failed, or nothing."""
    oldest = state.oldest
    try:
        response = await client.get(path)
    except httpx.HTTPError as exc:
        return f"{type(exc).__name__}: {exc}"
    if response.status_code != 200:
        said = " ".join(MARKUP.sub(" ", response.text).split()) if path != "/" else "Next.js's error page"
        return f"{path}: status {response.status_code}: {said[:TOLD]}"
    shown = SHOWN.search(response.text)
    if shown is None:
        return f"{path}: status 200 without a block height"
    height = int(shown[1] or shown[2])
    if not oldest <= height <= state.newest:
        return f"{path}: shows block {height}, which is not the chain's"
    return ""


async def visit(url: str, fleet: Fleet, rate: float, seconds: float) -> list[Page]:
    """All phases, one after the other."""
    pages: list[Page] = []
    state = State(fleet)

    async def one(client: httpx.AsyncClient, page: Page, path: str, due: float) -> None:
        page.failure = await ask(client, path, state)
        page.seconds = time.monotonic() - due
        if not PHASES[page.phase].fault:
            came = (index for index in range(page.phase, state.phase + 1) if PHASES[index].fault)
            page.phase = next(came, page.phase)

    # Idle connections are dropped before Next.js does it, after 5 s: that race is between the visitor and Next.js.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=PATIENCE, trust_env=False) as client:
        for number in range(WARM_UP):
            if failure := await ask(client, PATHS[number % len(PATHS)], state):
                raise RuntimeError(f"the app does not work: {failure}")
        async with asyncio.TaskGroup() as group:
            began = time.monotonic()
            for index in range(len(PHASES)):
                beginning = group.create_task(asyncio.to_thread(state.begin, index))
                for number in range(round(rate * seconds)):
                    due = began + index * seconds + number / rate
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    page = Page(index)
                    pages.append(page)
                    group.create_task(one(client, page, PATHS[number % len(PATHS)], due))
                await beginning
    return pages


def run(hop: str, options: argparse.Namespace, logs: Path) -> list[Page]:
    """All phases through one hop, each of the servers fresh."""
    with ExitStack() as stack:
        relay = ServiceTime.constant(options.relay)
        fleet = stack.enter_context(Fleet(GATEWAYS, processes=True, service_time=relay, path=["eth"]))
        if hop == "pathlb":
            gateway = stack.enter_context(serve(fleet.urls, logs, access_log=options.logs is not None))
        else:
            gateway = stack.enter_context(nginx(fleet.urls, logs))
        url = stack.enter_context(next_app(gateway, logs / f"next-{hop}.log"))
        return asyncio.run(visit(url, fleet, options.rate, options.seconds))


# --- the report


def print_line(hop: str, phase: str, pages: Sequence[Page]) -> None:
    taken = [page.seconds * 1000 for page in pages]
    failed = sum(bool(page.failure) for page in pages)
    p50, p99 = percentile(taken, 50) or 0.0, percentile(taken, 99) or 0.0
    longest = max(taken, default=0.0)
    print(f"{hop:<8}{phase:<16}{len(pages):>6}{failed:>8}{p50:>8.0f}{p99:>8.0f}{longest:>9.0f}", flush=True)


def print_pages(hop: str, pages: Sequence[Page]) -> None:
    """The table of one hop."""
    for index, phase in enumerate(PHASES):
        print_line(hop, phase.name, [page for page in pages if page.phase == index])
    print_line(hop, "all", pages)


def print_failures(hop: str, pages: Sequence[Page]) -> None:
    """Why pages failed, in which phase."""
    reasons = Counter((page.phase, page.failure) for page in pages if page.failure)
    for (phase, reason), count in sorted(reasons.items()):
        print(f"{hop}, {PHASES[phase].name}: {count} x {reason}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.frontend", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rate", type=float, default=50.0, help="pages a second (default %(default)g)")
    parser.add_argument("--seconds", type=float, default=6.0, help="length of a phase (default %(default)g)")
    parser.add_argument("--relay", type=float, default=0.1, help="seconds a gateway takes (default %(default)g)")
    parser.add_argument("--only", choices=HOPS, help="one of the two")
    parser.add_argument("--logs", type=Path, help="keep what the servers say in this folder, and pathlb's access log")
    options = parser.parse_args()
    if options.rate <= 0 or options.relay < 0 or options.seconds < 1:
        parser.error("--rate must be above 0, --relay not below, --seconds at least 1")
    return options


def main() -> int:
    options = parse()
    hops = [options.only] if options.only else HOPS
    require([], ["nginx"] if "nginx" in hops else [])
    unwind_on_sigterm()
    build_app()
    print(
        f"{options.rate:g} pages/s of a Next.js app, {GATEWAYS} gateways of {options.relay * 1000:g} ms behind "
        f"the hop, {len(PHASES)} phases of {options.seconds:g} s.\n"
        "A page has failed when its status is not 200, when it does not show the chain's current block height (an\n"
        f"error in its place, or an old height), or when it is not there within {PATIENCE:g} s. A page belongs to the\n"
        "phase it was asked for in, or to the fault it was under way at; ms since it was due, of failed ones too.\n"
    )
    print(f"{'hop':<8}{'phase':<16}{'pages':>6}{'failed':>8}{'p50 ms':>8}{'p99 ms':>8}{'longest':>9}", flush=True)
    results: dict[str, list[Page]] = {}
    with ExitStack() as stack:
        logs = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pathlb-frontend-")))
        logs.mkdir(parents=True, exist_ok=True)
        for hop in hops:
            pages = run(hop, options, logs.resolve())
            results[hop] = pages
            print_pages(hop, pages)
            print()
    for hop, pages in results.items():
        print_failures(hop, pages)
    lost = sum(bool(page.failure) for page in results.get("pathlb", ()))
    if "pathlb" in results:
        print(f"MISSED  {lost} pages lost through pathlb" if lost else "no page lost through pathlb")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

"""CPU time of small things on a busy machine: interleaved rounds, compared round by round."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

Step = Callable[[], Awaitable[None]]
"""One request, from start to end."""

Drive = Callable[[Step, int], Awaitable[None]]
"""Makes so many requests on the running event loop."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What was measured, one sample a round: mostly microseconds of CPU for each operation."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2

    def beyond(self, other: Figure) -> Figure:
        """What this costs more than `other`, round by round: what slows the machine down slows both."""
        return Figure(tuple(own - base for own, base in zip(self.samples, other.samples, strict=True)))

    def over(self, other: Figure) -> Figure:
        """This as a multiple of `other`, round by round for the same reason."""
        return Figure(tuple(own / base for own, base in zip(self.samples, other.samples, strict=True)))


def cpu_us(since: float = 0.0) -> float:
    """CPU time of this process in microseconds, other threads of it included."""
    return time.process_time() * 1e6 - since


async def interleaved(cases: Mapping[str, Step], drive: Drive, *, rounds: int, requests: int) -> dict[str, Figure]:
    """Drive every case once a round, in a new order each time, after a round to warm up."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    order, rng = list(cases), random.Random(1)
    for name in order:
        await drive(cases[name], requests)
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            gc.collect()  # nobody pays for what another left behind
            began = cpu_us()
            await drive(cases[name], requests)
            samples[name].append(cpu_us(began) / requests)
    return {name: Figure(tuple(taken)) for name, taken in samples.items()}


def machine() -> float:
    """Nanoseconds of CPU a call of an empty function takes here and now: figures taken at 30 are not those at 60."""

    def empty() -> None:
        pass

    taken: list[float] = []
    for _ in range(9):
        began = cpu_us()
        for _ in range(100_000):
            empty()
        taken.append(cpu_us(began) / 100)
    return median(taken)


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the report; `target` is the most the median may be, `aim` what it should be."""

    name: str
    figure: Figure
    target: float | None = None
    aim: float | None = None

    @property
    def missed(self) -> bool:
        return self.target is not None and self.figure.median > self.target


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print a table: median, quartile spread and least of the rounds, and the verdict where there is a target."""
    print(f"\n{title}")
    print(f"  {'us of CPU each':<58} {'median':>8} {'+-':>6} {'least':>8}  target")
    for row in rows:
        wanted = ""
        if row.target is not None:
            aim = f", aim {row.aim:g}" if row.aim is not None else ""
            wanted = f"<= {row.target:g}{aim}: {'MISSED' if row.missed else 'met'}"
        figure = row.figure
        print(f"  {row.name:<58} {figure.median:8.2f} {figure.spread:6.2f} {figure.least:8.2f}  {wanted}".rstrip())

"""The demo's live picture: a table that redraws itself on a terminal, a line a second elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.table import Table

_STYLES = {"ready": "green", "slow start": "cyan", "half-open": "yellow", "ejected": "yellow", "breaker open": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One instance at one moment."""

    instance: str
    state: str
    """Its own, and after semicolons those of single services, where they differ."""
    in_flight: int
    rate: float
    p50: float | None
    """Seconds; None without an answer in the last second."""
    share: float
    breaker: str


@dataclass(frozen=True, slots=True)
class View:
    """The fleet at one moment."""

    seconds: float
    phase: str
    rate: float
    p50: float | None
    lost: Mapping[str, int]
    """By service."""
    rows: Sequence[Row]


class Screen(Protocol):
    """Where the demo is watched."""

    interval: float
    """Seconds between views."""

    def __enter__(self) -> Screen: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None: ...

    def show(self, view: View) -> None: ...

    def note(self, text: str) -> None:
        """Something happened; one line."""


def make_screen(plain: bool) -> Screen:
    """The table where there is a terminal to draw on and rich to draw with."""
    if plain or not sys.stdout.isatty():
        return PlainScreen()
    try:
        return RichScreen()
    except ImportError:
        return PlainScreen()


class PlainScreen:
    """Lines on stdout."""

    interval = 1.0

    def __enter__(self) -> PlainScreen:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        pass

    def show(self, view: View) -> None:
        print(plain_line(view), flush=True)

    def note(self, text: str) -> None:
        print(text, flush=True)


def plain_line(view: View) -> str:
    """One view on one line."""
    rows = "  ".join(f"{row.instance} {row.rate:.0f}/s{_unless_ready(row.state)}" for row in view.rows)
    return (
        f"[{view.seconds:4.1f} s] {view.phase}: {view.rate:.0f}/s, p50 {milliseconds(view.p50)} ms, "
        f"{_lost(view)} | {rows}"
    )


def _lost(view: View) -> str:
    if len(view.lost) < 2:
        return f"{sum(view.lost.values())} lost"
    return "lost: " + ", ".join(f"{count} {service}" for service, count in view.lost.items())


def _unless_ready(state: str) -> str:
    return "" if state == "ready" else f" ({state})"


class RichScreen:
    """A table that is redrawn in place, what happened above it."""

    interval = 0.25

    def __init__(self) -> None:
        from rich.live import Live

        # No thread of its own: redrawn by `show`, and by nothing else.
        self._live = Live(auto_refresh=False)

    def __enter__(self) -> RichScreen:
        self._live.__enter__()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._live.__exit__(exc_type, exc, tb)

    def show(self, view: View) -> None:
        self._live.update(rich_table(view), refresh=True)

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)


def rich_table(view: View) -> Table:
    """One view as a table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"{view.phase}  ({view.seconds:.0f} s)",
        caption=f"{view.rate:.0f} requests/s answered, p50 {milliseconds(view.p50)} ms, {_lost(view)}",
    )
    table.add_column("instance")
    table.add_column("state", min_width=max(map(len, _STYLES)))
    for name in ("in flight", "requests/s", "p50 ms", "share"):
        table.add_column(name, justify="right")
    table.add_column("breaker", min_width=len("half-open"))
    for row in view.rows:
        table.add_row(
            row.instance,
            Text(row.state, style="yellow" if ";" in row.state else _STYLES.get(row.state, "red")),
            str(row.in_flight),
            f"{row.rate:.0f}",
            milliseconds(row.p50),
            f"{row.share:.0%}",
            row.breaker,
        )
    return table


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f}"

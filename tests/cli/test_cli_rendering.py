"""What the demo shows, without a demo: the live views, the events in words, the accounts and the report."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from functools import partial

import anyio
import pytest
from rich.console import Console

from pathlb.cli.demo import describe
from pathlb.cli.report import closing_report
from pathlb.cli.screen import PlainScreen, RichScreen, Row, View, make_screen, plain_line, rich_table
from pathlb.cli.traffic import Account, Ledger, open_loop, percentile
from pathlb.core.events import (
    BreakerChanged,
    Ejected,
    Event,
    GivenUp,
    HealthChanged,
    PanicChanged,
    Released,
    Returned,
)
from pathlb.testing import FakeClock

URL = "http://127.0.0.1:3069"
VIEW = View(
    seconds=8.0,
    phase=":3069 killed",
    rate=200.0,
    p50=0.0234,
    lost={"eth": 0},
    rows=[
        Row(":3069", "breaker open", 0, 0.0, None, 0.0, "open"),
        Row(":3070", "ready", 4, 200.0, 0.0234, 1.0, "closed"),
    ],
)


# --- live views


def test_a_plain_line() -> None:
    assert plain_line(VIEW) == (
        "[ 8.0 s] :3069 killed: 200/s, p50 23 ms, 0 lost | :3069 0/s (breaker open)  :3070 200/s"
    )


def test_a_table() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(rich_table(VIEW))
    text = output.getvalue()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert cells == [
        [":3069", "breaker open", "0", "0", "-", "0%", "open"],
        [":3070", "ready", "4", "200", "23", "100%", "closed"],
    ]
    assert ":3069 killed  (8 s)" in text
    assert "200 requests/s answered, p50 23 ms, 0 lost" in text


def test_losses_and_states_of_services() -> None:
    row = Row(":3069", "ready; eth: breaker open", 0, 0.0, None, 0.0, "closed")
    view = replace(VIEW, lost={"eth": 0, "poly": 7}, rows=[row])
    assert plain_line(view).endswith(" p50 23 ms, lost: 0 eth, 7 poly | :3069 0/s (ready; eth: breaker open)")
    table = rich_table(view)
    assert str(table.caption).endswith("lost: 0 eth, 7 poly")
    assert [str(cell) for cell in table.columns[1].cells] == ["ready; eth: breaker open"]


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with make_screen(plain=False) as screen:
        assert isinstance(screen, PlainScreen)
        screen.note("something happened")
        screen.show(VIEW)
    assert capsys.readouterr().out == f"something happened\n{plain_line(VIEW)}\n"


def test_a_table_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert isinstance(make_screen(plain=False), RichScreen)
    assert isinstance(make_screen(plain=True), PlainScreen)


def test_lines_where_rich_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert isinstance(make_screen(plain=False), PlainScreen)


def test_what_happened_comes_above_the_table_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with RichScreen() as screen:
        screen.note("[ 1.0 s] brackets are [bold]no markup[/bold]")
        screen.show(VIEW)
    output = capsys.readouterr().out
    assert "[ 1.0 s] brackets are [bold]no markup[/bold]" in output
    assert output.index("brackets") < output.index("breaker open")


# --- events


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (BreakerChanged(1, URL, None, "closed", "open", "5 in a row"), ":3069: breaker closed -> open (5 in a row)"),
        (BreakerChanged(1, URL, None, "probing", "closed", "ok"), ":3069: breaker probing -> closed (ok)"),
        (BreakerChanged(1, URL, None, "open", "half-open", "time"), ""),
        (BreakerChanged(1, URL, "eth", "closed", "open", "5"), ":3069 for eth: breaker closed -> open (5)"),
        (Ejected(1, URL, "latency", 2.34, "median"), ":3069: ejected for 2.3 s, by its latency (median)"),
        (Returned(1, URL), ":3069: back from its ejection"),
        (Returned(1, URL, "eth"), ":3069 for eth: back from its ejection"),
        (HealthChanged(1, URL, "up", "down", "status 503", "eth"), ":3069 for eth: probes say it is down (status 503)"),
        (HealthChanged(1, URL, "down", "up", "status 200"), ":3069: probes say it is up (status 200)"),
        (HealthChanged(1, URL, "unknown", "up", "status 200"), ""),
        (GivenUp(1, URL, 3), ":3069: 3 attempts given up and sent elsewhere"),
        (PanicChanged(1, True, 0, 5), "panic: 0 of 5 instances eligible, requests go to those out too"),
        (PanicChanged(1, False, 1, 5), "panic is over"),
        (Released(1, URL, 0), ""),
    ],
)
def test_events_in_words(event: Event, text: str) -> None:
    assert describe(event) == text


# --- accounts


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 50), (99, 99), (100, 100)])
def test_percentile(percent: float, value: float) -> None:
    assert percentile(range(100, 0, -1), percent) == value


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) is None


def test_the_recent_second() -> None:
    ledger = Ledger()
    ledger.open("steady")
    ledger.answered("eth", 1.0, "a", 0.5, 1)
    ledger.answered("eth", 2.5, "a", 0.1, 1)
    ledger.answered("eth", 2.6, "a", 0.3, 1)
    ledger.answered("eth", 2.7, "b", 0.2, 2)
    recent = ledger.recent(3.0)
    assert (recent.rate("a"), recent.rate("b"), recent.rate("c")) == (2, 1, 0)
    assert (recent.p50("a"), recent.p50("c")) == (0.1, None)
    assert recent.share("b") == pytest.approx(1 / 3)
    assert ledger.recent(9.0).share("a") == 0


def test_requests_are_sent_when_they_are_due_whatever_became_of_the_others() -> None:
    account = Account("steady")
    sent: list[float] = []
    anyio.run(partial(open_loop, 100, 0.1, lambda: sent.append(0), account))
    assert account.due == account.sent == len(sent) == 10
    assert account.seconds >= 0.1


@pytest.mark.parametrize(("stall", "sent"), [(0.5, 10), (2.0, 1)])
def test_a_stalled_driver_catches_up_or_admits_what_it_left_out(stall: float, sent: int) -> None:
    clock = FakeClock()
    account = Account("steady")

    def fire() -> None:
        if account.sent == 1:
            clock.advance(stall)

    anyio.run(partial(open_loop, 1000, 0.01, fire, account, clock))
    assert (account.due, account.sent) == (10, sent)
    assert account.seconds == pytest.approx(stall)


# --- the report


def ledger() -> Ledger:
    ledger = Ledger()
    steady = ledger.open("steady")
    for number in range(100):
        ledger.answered("eth", number, ":3069" if number % 2 else ":3070", (number + 1) / 1000, 1)
    steady.due = steady.sent = 100
    steady.seconds = 10.0
    killed = ledger.open(":3069 killed")
    ledger.answered("eth", 100, ":3070", 0.02, 2)
    ledger.lost("eth", "status 503", 3)
    killed.due = killed.sent = 2
    killed.seconds = 0.2
    return ledger


def test_the_report() -> None:
    assert closing_report(ledger(), [":3069", ":3070"], rate=10, unfinished=0) == "\n".join(
        [
            "102 requests in 10.2 s: 1 lost, 2 retried",
            "",
            "phase         requests  lost  retried  asked/s  sent/s  p50 ms  p99 ms",
            "steady             100     0        0       10      10      50      99",
            ":3069 killed         2     1        2       10      10      20      20",
            "",
            "share of the answers per instance",
            "phase         :3069  :3070",
            "steady          50%    50%",
            ":3069 killed     0%   100%",
            "",
            "lost because:",
            "  1 x status 503",
        ]
    )


def test_the_report_of_several_services_has_a_line_for_an_outage_and_a_table() -> None:
    several = ledger()
    several.lost("poly", "poly: status 500", 2, hopeless=True)
    lines = closing_report(several, [":3069"], rate=10, unfinished=0).splitlines()
    assert lines[:2] == ["103 requests in 10.2 s: 2 lost, 3 retried", "lost while nobody could serve poly: 1"]
    start = lines.index("lost and retried per service")
    assert lines[start + 1 : start + 5] == [
        "phase         eth requests  eth lost  eth retried  poly requests  poly lost  poly retried",
        "steady                 100         0            0              0          0             0",
        ":3069 killed             2         1            2              1          1             1",
        "",
    ]


def test_the_report_says_when_the_figures_are_not_the_fleets() -> None:
    slow = ledger()
    slow.accounts[0].sent = 90
    assert "this machine did not keep up" in closing_report(slow, [":3069"], rate=10, unfinished=0)
    assert "this machine did not keep up" in closing_report(ledger(), [":3069"], rate=20, unfinished=0)


def test_the_report_counts_what_was_cut_off() -> None:
    assert "3 more were in flight at the end" in closing_report(ledger(), [":3069"], rate=10, unfinished=3)


def test_the_report_names_the_most_frequent_reasons() -> None:
    many = ledger()
    for number in range(9):
        many.lost("eth", f"reason {number}", 1)
    many.lost("eth", "reason 8", 1)
    lines = closing_report(many, [":3069"], rate=10, unfinished=0).splitlines()
    assert lines[-6] == "  2 x reason 8"
    assert lines[-1] == "  and 5 other reasons"


def test_the_report_of_a_demo_that_ended_before_it_began() -> None:
    assert closing_report(Ledger(), [":3069"], rate=10, unfinished=0).startswith("0 requests in 0.0 s")

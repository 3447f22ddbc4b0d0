"""The demo's closing report: what was asked, what was lost, how long it took, who answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .screen import milliseconds
from .traffic import Account, Ledger, Tally, percentile

_KEPT_UP = 0.95  # of the rate asked for: below it the figures say more about this machine than about the fleet
_REASONS = 5


def closing_report(ledger: Ledger, instances: Sequence[str], rate: float, unfinished: int) -> str:
    """The report in lines; `unfinished` requests were cut off by the end and are neither answered nor lost."""
    return "\n".join(_lines(ledger, instances, rate, unfinished))


def kept_up(account: Account, rate: float) -> bool:
    """Whether the requests were sent when they were due."""
    return account.sent >= _KEPT_UP * account.due and account.rate >= _KEPT_UP * rate


def _lines(ledger: Ledger, instances: Sequence[str], rate: float, unfinished: int) -> Iterator[str]:
    accounts = ledger.accounts
    totals = ledger.totals()
    total = sum(totals.values(), Tally())
    seconds = sum(account.seconds for account in accounts)
    yield f"{total.ended} requests in {seconds:.1f} s: {total.lost} lost, {total.retried} retried"
    services = sorted(totals)
    for service in services:
        if totals[service].hopeless:
            yield f"lost while nobody could serve {service}: {totals[service].hopeless}"
    if unfinished:
        yield f"{unfinished} more were in flight at the end and are not counted"
    yield ""
    yield from _table(
        ["phase", "requests", "lost", "retried", "asked/s", "sent/s", "p50 ms", "p99 ms"],
        [_figures(account, rate) for account in accounts],
    )
    yield ""
    if len(services) > 1:
        yield "lost and retried per service"
        yield from _table(
            ["phase", *(f"{service} {what}" for service in services for what in ("requests", "lost", "retried"))],
            [[account.phase, *_per_service(account, services)] for account in accounts],
        )
        yield ""
    yield "share of the answers per instance"
    yield from _table(
        ["phase", *instances],
        [[account.phase, *(f"{account.share(one):.0%}" for one in instances)] for account in accounts],
    )
    if not all(kept_up(account, rate) for account in accounts):
        yield ""
        yield "this machine did not keep up with the rate asked for: part of the latency is its own; lower --rate"
    if ledger.reasons:
        yield ""
        yield "lost because:"
        for reason, count in ledger.reasons.most_common(_REASONS):
            yield f"  {count} x {reason}"
        if len(ledger.reasons) > _REASONS:
            yield f"  and {len(ledger.reasons) - _REASONS} other reasons"


def _per_service(account: Account, services: Iterable[str]) -> Iterator[str]:
    for service in services:
        tally = account.tallies[service]
        yield from (str(tally.ended), str(tally.lost), str(tally.retried))


def _figures(account: Account, rate: float) -> list[str]:
    total = account.total
    return [
        account.phase,
        str(total.ended),
        str(total.lost),
        str(total.retried),
        f"{rate:g}",
        f"{account.rate:.0f}",
        milliseconds(percentile(account.latencies, 50)),
        milliseconds(percentile(account.latencies, 99)),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The first column to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        yield "  ".join(cells)

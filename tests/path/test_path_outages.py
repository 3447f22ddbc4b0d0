"""Outages under load, several services at once: of a service everywhere, of a service on one gateway, of suppliers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from pathkit import SERVICES, Events, Result, Traffic, at_rest, by_service, endpoint, path_client, unanswered

from pathlb import Breaker, Outlier
from pathlb.core.events import BreakerChanged, Ejected, Finished, Retried
from pathlb.core.model import Cause
from pathlb.testing import Fleet, ServiceMode, ServiceTime

pytestmark = pytest.mark.anyio

OTHERS = [service for service in SERVICES if service != "eth"]
BRISK = {
    "breaker": Breaker(open_for=0.2, open_max=0.4),
    "outlier": Outlier(eject_for=1.0, eject_max=1.0),
}
"""Soon back, for tests that wait for it."""


def path_fleet(n: int = 3) -> Fleet:
    return Fleet(n, path=SERVICES, service_time=ServiceTime.constant(0.01), record=True)


def of(results: list[Result], *services: str) -> list[Result]:
    return [one for one in results if one.service in services]


def relays(fleet: Fleet) -> int:
    return sum(gateway.stats().relays for gateway in fleet)


# --- one service, everywhere

NETWORK_WIDE = {
    ServiceMode.NO_SESSION: Cause.SERVICE,
    ServiceMode.SUPPLIERS_FAIL: Cause.BEYOND,
    ServiceMode.EMPTY: Cause.BEYOND,
    ServiceMode.RATE_LIMITED: Cause.BEYOND,
}


@pytest.mark.parametrize("mode", NETWORK_WIDE)
async def test_a_service_is_out_everywhere(mode: ServiceMode) -> None:
    """No gateway is to blame, and none is: the other services do not notice."""
    with path_fleet() as fleet:
        async with path_client(fleet.urls) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            assert not unanswered(await traffic.run(150))
            fleet.set_service("eth", mode)
            seen, relayed, before = [by_service(gateway) for gateway in fleet], relays(fleet), len(events)
            results = await traffic.run(300)
            eth, others = of(results, "eth"), of(results, *OTHERS)

            # The service: every answer says why, and no breaker of an instance opened, nor was any set aside.
            assert not [one for one in eth if one.answered]
            causes = {attempt.outcome.cause for one in eth for attempt in one.attempts}
            assert causes - {Cause.GIVEN_UP} == {NETWORK_WIDE[mode]}  # by the balancer: where a breaker has opened
            assert [one for one in events.of(BreakerChanged) if one.key != "eth"] == []
            assert events.of(Ejected) == []
            if mode is not ServiceMode.NO_SESSION:
                assert events.of(BreakerChanged) == []
            # The others: nothing lost, nothing tried twice, everywhere.
            assert not unanswered(others)
            assert {len(one.attempts) for one in others} == {1}
            now = [by_service(gateway) for gateway in fleet]
            assert all(now[index][service] > seen[index][service] for index in range(3) for service in OTHERS)

            # What it costs: PATH's own retry, and one gateway more; or each gateway once, then each request one.
            finished = [one for one in list(events)[before:] if isinstance(one, Finished)]
            assert len(finished) == len(results)
            told = sum(one.relays for one in finished)
            assert relays(fleet) - relayed == told
            if mode is ServiceMode.NO_SESSION:
                assert told == len(others)
                assert max(len(one.attempts) for one in eth) <= 3
                # Five failures in a row open a breaker; besides there is what was in flight then.
                assert sum(len(one.attempts) - 1 for one in eth) <= 3 * (5 + traffic.concurrency)
            else:
                assert {len(one.attempts) for one in eth} <= {1, 2}
                assert all(len(set(one.endpoints)) == len(one.attempts) for one in eth), "elsewhere, if at all"
                assert told <= len(others) + 4 * len(eth)

            # And it is over at once when it is over.
            fleet.set_service("eth", ServiceMode.OK)
            assert (await traffic.one("eth")).answered
            results = await traffic.until(lambda: not any(one.breakers for one in client.balancer.snapshot().endpoints))
            results += await traffic.run(90)
            assert not unanswered(results)
            assert {len(one.attempts) for one in results} == {1}
            assert [one for one in events.of(BreakerChanged) if one.key != "eth"] == []
            assert events.of(Ejected) == []
            await at_rest(client.balancer)


async def test_the_trace_of_an_outage_everywhere() -> None:
    """Open, and still asked: with no gateway left for the service its requests go out all the same."""
    with path_fleet() as fleet:
        async with path_client(fleet.urls, **BRISK) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            await traffic.run(60)
            fleet.set_service("eth", ServiceMode.NO_SESSION)
            await traffic.until(lambda: opened(events, fleet) == set(fleet.urls))
            failed = await traffic.run(60, "eth")
            assert not [one for one in failed if one.answered]
            assert {one.attempts[-1].reason for one in failed} <= {"panic", "probe"}
            fleet.set_service("eth", ServiceMode.OK)
            results = await traffic.until(lambda: not any(one.breakers for one in client.balancer.snapshot().endpoints))
            assert not unanswered(results)
            for index in range(3):
                trace = [line for line in breaker_lines(events, fleet) if line.startswith(f"{index}/eth")]
                check_breaker(trace)
            assert all("/eth" in line for line in events.trace(fleet.urls))


def opened(events: Events, fleet: Fleet) -> set[str]:
    return {one.endpoint for one in events.of(BreakerChanged) if one.after == "open"}


def breaker_lines(events: Events, fleet: Fleet) -> list[str]:
    return [line for line in events.trace(fleet.urls) if "->" in line]


def check_breaker(trace: list[str]) -> None:
    """The states of one breaker: from closed to closed, each from the one before."""
    steps = [line.partition(" ")[2].split(" -> ") for line in trace]
    state = "closed"
    for before, after in steps:
        assert before == state, trace
        state = after
    assert ["closed", "open"] in steps, trace
    assert state == "closed", trace


# --- one service, on one gateway

BREAKER_OPENS = [ServiceMode.NO_SESSION, ServiceMode.NOT_CONFIGURED]
EJECTED = [
    ServiceMode.SUPPLIERS_FAIL,
    ServiceMode.EMPTY,
    ServiceMode.RATE_LIMITED,
    ServiceMode.HANG,
    ServiceMode.SLOW,
]


@pytest.mark.parametrize("mode", BREAKER_OPENS + EJECTED)
async def test_a_service_is_out_on_one_gateway(mode: ServiceMode) -> None:
    """It goes to the others, and nobody else does; and it comes back."""
    with path_fleet() as fleet:
        async with path_client(fleet.urls, **BRISK) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            assert not unanswered(await traffic.run(150))
            assert events.trace(fleet.urls) == []
            fleet[0].set_service("eth", mode, factor=50.0)
            await traffic.until(lambda: events.trace(fleet.urls))
            before = [by_service(gateway) for gateway in fleet]
            await traffic.run(150)
            # Out for eth, in for the others.
            assert endpoint(client.balancer, fleet.urls[0]).state == "ready"
            now = [by_service(gateway) for gateway in fleet]
            assert all(now[0][service] > before[0][service] for service in OTHERS)
            assert all(now[index]["eth"] > before[index]["eth"] for index in (1, 2))
            if mode in BREAKER_OPENS:
                await traffic.until(lambda: "0/eth probing -> open" in events.trace(fleet.urls))
            fleet[0].set_service("eth", ServiceMode.OK)

            def back() -> bool:
                one = endpoint(client.balancer, fleet.urls[0])
                return not one.services and not one.breakers and by_service(fleet[0])["eth"] > served

            served = by_service(fleet[0])["eth"]
            await traffic.until(back)

            assert not unanswered(traffic.results)
            assert {len(one.attempts) for one in of(traffic.results, *OTHERS)} == {1}
            assert {len(one.attempts) for one in of(traffic.results, "eth")} <= {1, 2}
            assert {one.endpoint for one in events.of(Retried)} <= {fleet.urls[0]}
            assert events.of(Retried) or mode is ServiceMode.SLOW
            trace = events.trace(fleet.urls)
            assert {line.partition(" ")[0] for line in trace} == {"0/eth"}
            if mode in BREAKER_OPENS:
                check_breaker(breaker_lines(events, fleet))
                steps = [line.partition(" ")[2] for line in breaker_lines(events, fleet)]
                assert steps[:4] == ["closed -> open", "open -> half-open", "half-open -> probing", "probing -> open"]
                assert steps[-3:] == ["open -> half-open", "half-open -> probing", "probing -> closed"]
            else:
                assert trace == ["0/eth ejected", "0/eth returned"] * (len(trace) // 2)
            await at_rest(client.balancer)


# --- suppliers, independently


async def test_suppliers_fail_now_and_then_everywhere() -> None:
    """Three relays in ten fail: PATH's retry makes that one request in eleven, one gateway more one in a hundred."""
    with path_fleet() as fleet:
        fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.3)
        async with path_client(fleet.urls) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            results = await traffic.run(600)
            assert not unanswered(of(results, *OTHERS))
            eth = of(results, "eth")
            assert len(eth) == 200
            # 1.6 are to be expected, and more than 12 once in ten million runs.
            assert len(unanswered(eth)) <= 12
            assert {len(one.attempts) for one in results} <= {1, 2}
            assert events.trace(fleet.urls) == []
            attempts = Counter(len(one.attempts) for one in eth)
            assert relays(fleet) <= 4 * attempts[2] + 2 * attempts[1] + 400
            await at_rest(client.balancer)


async def test_one_gateways_suppliers_are_worse() -> None:
    """What all have is nobody's fault; what one has beyond it is."""
    options: dict[str, Any] = BRISK
    with path_fleet() as fleet:
        fleet.set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=0.3)
        fleet[1].set_service("eth", ServiceMode.SUPPLIERS_FAIL, share=1.0)
        async with path_client(fleet.urls, **options) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            await traffic.until(lambda: events.of(Ejected))
            assert [(one.endpoint, one.key, one.signal) for one in events.of(Ejected)] == [
                (fleet.urls[1], "eth", "failures")
            ]
            assert not unanswered(of(traffic.results, *OTHERS))
            assert events.of(BreakerChanged) == []

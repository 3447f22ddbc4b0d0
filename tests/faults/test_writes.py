"""No transaction is sent twice, whatever becomes of the gateways: counted at the emulated chain."""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.to_thread
import pytest
from faultkit import Stack, at_rest, nothing_left, open_connections, until

import pathlb
from pathlb import Breaker, Outlier, PATHProfile, Retry, SlowStart, TransportUpstreams
from pathlb.core.model import Sent
from pathlb.testing import Fleet, FleetGateway, Mode, ServiceMode, ServiceTime

pytestmark = pytest.mark.anyio

PROFILE = PATHProfile(services=["eth"])
HANGS = 0.25
"""Seconds a reply is waited for."""
BATCHES = 10
"""Every so many requests a transaction goes out in a batch, with a read."""
OUTAGES = 20
"""Every so many turns all gateways have the same fault."""

_transactions = itertools.count()

_INSTANCE: list[dict[str, Any]] = [
    *[{"mode": mode} for mode in (Mode.RESET, Mode.HANG, Mode.REFUSE) for _ in range(2)],
    {"mode": Mode.FAIL, "status": 500},
    {"mode": Mode.FAIL, "status": 502},
    {"mode": Mode.SLOW, "factor": 20.0},
    {"mode": Mode.THROTTLE, "retry_after": "0.01"},
]
_SERVICE: list[dict[str, Any]] = [
    {"mode": mode, "share": share}
    for mode in (
        ServiceMode.NO_SESSION,
        ServiceMode.NOT_CONFIGURED,
        ServiceMode.SUPPLIERS_FAIL,
        ServiceMode.RATE_LIMITED,
        ServiceMode.EMPTY,
        ServiceMode.SLOW,
        ServiceMode.HANG,
    )
    for share in (0.5, 1.0)
]


class Havoc:
    """Breaks and mends the gateways, one at a turn. Two of them stay whole, but for the turns when all fail alike."""

    def __init__(self, fleet: Fleet, rng: random.Random) -> None:
        self._fleet = fleet
        self._rng = rng
        self._broken: set[int] = set()
        self._turns = 0
        self.done: Counter[str] = Counter()

    def turn(self) -> None:
        """Blocks for some milliseconds."""
        rng, fleet = self._rng, self._fleet
        self._turns += 1
        if self._turns % OUTAGES < 2:
            self._broken.clear()
            fault = rng.choice(_INSTANCE + _SERVICE)
            for gateway in fleet:
                self._restore(gateway)
                if self._turns % OUTAGES == 0:
                    self._break(gateway, fault)
        elif len(self._broken) == len(fleet) - 2 or (self._broken and rng.random() < 0.4):
            index = rng.choice(sorted(self._broken))
            self._broken.remove(index)
            self._restore(fleet[index])
        else:
            index = rng.choice([index for index in range(len(fleet)) if index not in self._broken])
            self._broken.add(index)
            # Of the instance, of the service, or both.
            for faults in rng.choice([[_INSTANCE], [_SERVICE], [_INSTANCE, _SERVICE]]):
                self._break(fleet[index], rng.choice(faults))

    def _break(self, gateway: FleetGateway, fault: dict[str, Any]) -> None:
        mode = fault["mode"]
        self.done[mode.name] += 1
        if isinstance(mode, ServiceMode):
            gateway.set_service("eth", **fault)
        else:
            gateway.set_mode(**fault)

    def end(self) -> None:
        """All are whole again."""
        for gateway in self._fleet:
            self._restore(gateway)

    def _restore(self, gateway: FleetGateway) -> None:
        gateway.restore()
        gateway.set_service("eth", ServiceMode.OK)


class Writes:
    """What the caller saw of each transaction."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        """By status or kind of error."""
        self.sent: set[str] = set()
        self.answered: set[str] = set()
        """A 200 on its own, or a result in a batch."""
        self.failed: set[str] = set()
        self.resent = 0
        """Requests with more than one attempt."""
        self.unsafe: list[Any] = []
        """Attempts that were made up for though they may have been delivered."""

    async def send(self, stack: Stack, client: Any) -> None:
        """Send a transaction nobody has sent before."""
        number = next(_transactions)
        transaction = f"0x02f8{number:012x}"
        write = {"jsonrpc": "2.0", "id": number, "method": "eth_sendRawTransaction", "params": [transaction]}
        read = {"jsonrpc": "2.0", "id": "height", "method": "eth_blockNumber", "params": []}
        batch = number % BATCHES == 0
        self.sent.add(transaction)
        answered = False
        try:
            response = await client.post("/v1", json=[read, write] if batch else write)
        except pathlb.PathlbError as exc:
            end = next(cls.__name__ for cls in type(exc).__mro__ if cls.__module__ == stack.lib.__name__)
            attempts = exc.attempts
        else:
            end = f"{response.status_code}{'' if response.content else ', empty'}"
            attempts = response.extensions["pathlb"]["attempts"]
            answered = response.status_code == 200
            if batch and answered:
                items = response.json() if response.content else []
                answered = any("result" in item for item in items if item.get("id") == number)
        self.ends[f"batch {end}" if batch else end] += 1
        (self.answered if answered else self.failed).add(transaction)
        self.resent += len(attempts) > 1
        for attempt in attempts[:-1]:
            if attempt.outcome.sent is not Sent.NOT_SENT and not attempt.outcome.unprocessed:
                self.unsafe.append(attempts)


def options(stack: Stack, way: str) -> dict[str, Any]:
    """Quick to take a gateway out and to take it back: the faults are to meet many requests."""
    assert PROFILE.health is not None
    settings: dict[str, Any] = {
        "profile": PROFILE,
        "health": dataclasses.replace(PROFILE.health, interval=0.1, changing_interval=0.02),
        "breaker": Breaker(open_for=0.02, open_max=0.1, probe_patience=0.0),
        "outlier": Outlier(eject_for=0.05, eject_max=0.2, overdue_floor=0.1),
        "slow_start": SlowStart(window=0),
        "read": HANGS,
    }
    if way == "transports":
        settings |= {"upstream": TransportUpstreams(trust_env=False, stack=stack.lib), "trust_env": True}
    return settings


async def run(
    stack: Stack, fleet: Fleet, requests: int, *, every: int, workers: int, **settings: Any
) -> tuple[Writes, Havoc]:
    """Send so many transactions, with a turn of havoc before each `every`-th of them."""
    havoc, writes = Havoc(fleet, random.Random(1)), Writes()
    numbers = iter(range(requests))
    turns, due = anyio.create_memory_object_stream[None]()  # a turn has to be taken before the next is due

    async def wreak() -> None:
        async for _ in due:
            await anyio.to_thread.run_sync(havoc.turn)

    async def worker() -> None:
        for number in numbers:
            if number % every == 0:
                await turns.send(None)
            await writes.send(stack, client)

    async with nothing_left():
        async with stack.client(fleet.urls, **settings) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(wreak)
                async with anyio.create_task_group() as senders:
                    for _ in range(workers):
                        senders.start_soon(worker)
                turns.close()
            due.close()
            await at_rest(client.balancer)
            await until(lambda: open_connections(client) == [])
    havoc.end()
    return writes, havoc


def check(fleet: Fleet, writes: Writes, havoc: Havoc, requests: int) -> str:
    """The promise, and that it was put to the test. The answer is the figures."""
    # The gateways may have served other tests before.
    reached = {transaction: count for transaction, count in fleet.transactions().items() if transaction in writes.sent}
    duplicated = {transaction: count for transaction, count in reached.items() if count > 1}
    lost = writes.failed & reached.keys()
    figures = "\n".join(
        [
            f"{requests:,} transactions: {len(writes.answered):,} answered, {len(writes.failed):,} failed "
            f"({len(lost):,} of these reached the chain), {writes.resent:,} sent elsewhere, "
            f"{len(duplicated)} duplicated",
            "ends:   " + ", ".join(f"{end} {count:,}" for end, count in writes.ends.most_common()),
            "faults: " + ", ".join(f"{fault} {count:,}" for fault, count in havoc.done.most_common()),
        ]
    )
    assert duplicated == {}, figures
    assert writes.unsafe == [], figures
    assert [each for each in writes.answered if reached.get(each) != 1] == [], figures
    assert writes.ends.total() == len(writes.sent) == requests
    # Sending again what failed would have doubled these.
    assert len(lost) > requests // 500, figures
    assert writes.resent, figures
    assert len(writes.answered) > requests // 10, figures
    assert {"RESET", "HANG", "REFUSE", "FAIL", "NO_SESSION", "SUPPLIERS_FAIL"} <= havoc.done.keys(), figures
    return figures


@pytest.fixture(scope="module")
def gateways() -> Iterator[Fleet]:
    with Fleet(5, path=["eth"], processes=True, service_time=ServiceTime.exponential(0.002)) as fleet:
        yield fleet


@pytest.mark.parametrize("way", ["own pool", "transports"])
async def test_none_is_sent_twice(stack: Stack, anyio_backend: str, gateways: Fleet, way: str) -> None:
    if anyio_backend == "trio" and way == "own pool":
        pytest.skip("on trio they are always transports")
    requests = 2_000 if way == "own pool" else 1_000
    writes, havoc = await run(stack, gateways, requests, every=10, workers=20, **options(stack, way))
    check(gateways, writes, havoc, requests)


async def test_the_chain_would_tell(stack: Stack, anyio_backend: str, gateways: Fleet) -> None:
    """The same with a caller who says that transactions may be sent twice."""
    settings = options(stack, "own pool" if anyio_backend == "asyncio" else "transports")
    settings |= {"idempotent": True, "retry": Retry(budget_reserve=1_000)}
    writes, _ = await run(stack, gateways, 300, every=10, workers=20, **settings)
    reached = gateways.transactions()
    assert writes.unsafe
    assert max(reached[transaction] for transaction in writes.sent) > 1


@pytest.mark.soak
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_none_of_100_000(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    requests = 100_000
    with Fleet(5, path=["eth"], processes=True, service_time=ServiceTime.exponential(0.005)) as fleet:
        writes, havoc = await run(stack, fleet, requests, every=100, workers=50, **options(stack, "own pool"))
        figures = check(fleet, writes, havoc, requests)
    with capsys.disabled():
        sys.stdout.write(f"\n{stack.lib.__name__}: {figures}\n")

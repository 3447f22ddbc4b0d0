"""Random traces through the engine, checked against the model in world.py; each trace is replayed and must repeat."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from .world import World

INDEX = st.integers(0, 9)
WAITS = [None, None, 0.0, 1.0, -3.0, 1e9]
FLAGS = [0, 0, 1, 1, 1, 2, 4]


class EngineMachine(RuleBasedStateMachine):
    """Each rule is one operation of the world, kept in a log."""

    def __init__(self) -> None:
        super().__init__()
        self.setup: dict[str, Any] = {}
        self.trace: list[tuple[str, tuple[Any, ...]]] = []
        self.world: World | None = None

    def do(self, operation: str, *arguments: Any) -> None:
        assert self.world is not None
        self.trace.append((operation, arguments))
        getattr(self.world, operation)(*arguments)

    @initialize(
        seed=st.integers(0, 99),
        policy=st.integers(0, 2),
        concurrency=st.integers(1, 3),
        fail_closed=st.booleans(),
        probed=st.booleans(),
    )
    def begin(self, **setup: Any) -> None:
        self.setup = setup
        self.world = World(**setup)
        if setup["probed"]:
            for number in range(3):
                self.do("probe", number, True)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 2.5, 12.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.do("pass_time", seconds)

    @rule(count=st.sampled_from([1, 3, 20, 60]))
    def ticks(self, count: int) -> None:
        self.do("ticks", count)

    @rule(seconds=st.sampled_from([0.2, 2.0, 30.0]))
    def stall(self, seconds: float) -> None:
        self.do("stall", seconds)

    @rule(mask=st.integers(0, 31))
    def apply(self, mask: int) -> None:
        self.do("apply", mask)

    @rule(number=INDEX, back=st.booleans())
    def drain(self, number: int, back: bool) -> None:
        self.do("drain", number, back)

    @rule(number=st.integers(0, 4), key=st.integers(0, 3), passed=st.booleans())
    def probe_key(self, number: int, key: int, passed: bool) -> None:
        self.do("probe_key", number, key, passed)

    @rule(number=st.integers(0, 4), key=st.integers(0, 3), height=st.sampled_from([0, 1, 5, 10**9]))
    def tell_height(self, number: int, key: int, height: int) -> None:
        self.do("tell_height", number, key, height)

    @rule(number=INDEX, passed=st.booleans())
    def probe(self, number: int, passed: bool) -> None:
        self.do("probe", number, passed)

    @rule(
        resendable=st.booleans(),
        key=INDEX,
        pin=st.sampled_from([0, 1, 2, 9, 9, 9]),
        avoid=st.sampled_from([0, 0, 1, 6]),
    )
    def acquire(self, resendable: bool, key: int, pin: int, avoid: int) -> None:
        self.do("acquire", resendable, key, pin, avoid)

    @rule(resendable=st.booleans(), count=st.integers(1, 8))
    def acquire_plainly(self, resendable: bool, count: int) -> None:
        for _ in range(count):
            self.do("acquire_plainly", resendable)

    @rule(
        number=INDEX,
        cause=INDEX,
        unsent=st.booleans(),
        keyed=st.booleans(),
        retry_after=st.sampled_from(WAITS),
        flags=st.sampled_from([*FLAGS, 3, 5, 6, 7]),
    )
    def observe(self, flags: int, **of: Any) -> None:
        arguments = (of["number"], of["cause"], of["unsent"], of["keyed"], of["retry_after"], flags)
        self.do("observe", *arguments)

    @rule(number=INDEX, cause=st.sampled_from([0, 0, 0, 1, 4]), count=st.integers(1, 5))
    def finish(self, number: int, cause: int, count: int) -> None:
        for _ in range(count):
            self.do("finish", number, cause)

    @rule(number=INDEX)
    def release(self, number: int) -> None:
        self.do("release", number)

    @rule(number=INDEX, body=st.booleans())
    def misuse(self, number: int, body: bool) -> None:
        self.do("fail_body" if body else "end_twice", number)

    @rule(number=INDEX, replayable=st.sampled_from([True, True, False]))
    def retry(self, number: int, replayable: bool) -> None:
        self.do("retry", number, replayable)

    @rule(number=INDEX)
    def leave(self, number: int) -> None:
        self.do("leave", number)

    @rule(
        number=st.integers(0, 2), count=st.sampled_from([1, 3, 8]), cause=st.sampled_from([0, 1, 1, 2, 3, 4]), key=INDEX
    )
    def burst(self, number: int, count: int, cause: int, key: int) -> None:
        self.do("burst", number, count, cause, key)

    @rule(number=st.integers(0, 2), resendable=st.booleans())
    def down_and_up(self, number: int, resendable: bool) -> None:
        """An outage until the next probe is due, under traffic."""
        self.do("burst", number, 3, 1, 0)
        self.do("acquire_plainly", resendable)
        self.do("ticks", 21)
        self.do("acquire_plainly", resendable)

    @rule(bad=st.integers(0, 2))
    def one_does_worse(self, bad: int) -> None:
        self.do("one_does_worse", bad)

    @rule(bad=st.integers(0, 2), key=st.integers(0, 1))
    def one_service_does_worse(self, bad: int, key: int) -> None:
        self.do("one_service_does_worse", bad, key)

    def teardown(self) -> None:
        if self.world is None:
            return
        self.do("rest")
        again = World(**self.setup)
        for operation, arguments in self.trace:
            getattr(again, operation)(*arguments)
        assert again.log == self.world.log, "the same seed and the same trace gave other events"


def random_operation(rng: random.Random) -> tuple[str, tuple[Any, ...]]:
    """One operation, as likely as it takes to get into deep water: queues, outages, probes, panic."""
    index, coin = rng.randrange(10), rng.random() < 0.5
    cause = rng.choice([0] * 12 + [1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    operations: list[tuple[int, str, tuple[Any, ...]]] = [
        (30, "acquire_plainly", (coin,)),
        (12, "acquire", (coin, rng.randrange(4), rng.choice([0, 1, 2, 3, 9, 9, 9]), rng.choice([0, 0, 1, 6]))),
        (20, "observe", (index, cause, coin, rng.random() < 0.5, rng.choice(WAITS), rng.choice(FLAGS))),
        (20, "finish", (index, cause)),
        (20, "release", (index,)),
        (12, "retry", (index, rng.random() < 0.9)),
        (12, "ticks", (rng.choice([1, 1, 3, 10, 25]),)),
        (4, "pass_time", (rng.choice([0.01, 0.5, 1.2, 6.0]),)),
        (3, "leave", (index,)),
        (3, "burst", (index, rng.choice([1, 3, 8]), rng.choice([0, 1, 2, 3, 4]), rng.randrange(4))),
        (1, "one_does_worse", (index % 5,)),
        (2, "one_service_does_worse", (index % 5, int(coin))),
        (5, "probe_key", (index, rng.randrange(4), rng.random() < 0.6)),
        (1, "tell_height", (index, rng.randrange(4), rng.choice([0, 1, 5, 9]))),
        (2, "drain", (index, rng.random() < 0.7)),
        (2, "probe", (index, rng.random() < 0.7)),
        (1, "apply", (rng.choice([7, 7, 15, 31, 3, 5, 0]),)),
        (1, "stall", (rng.choice([0.2, 2.0, 10.0]),)),
        (1, "end_twice", (index,)),
        (1, "fail_body", (index,)),
    ]
    _, name, arguments = rng.choices(operations, [weight for weight, _, _ in operations])[0]
    return name, arguments


@pytest.mark.parametrize("seed", range(24))
def test_long_random_traces(seed: int) -> None:
    rng = random.Random(seed)
    setup = {
        "seed": seed,
        "policy": seed,
        "concurrency": 1 + seed % 3,
        "fail_closed": seed % 4 == 3,
        "probed": seed % 5 == 4,
    }
    trace = [random_operation(rng) for _ in range(1500)] + [("rest", ())]
    worlds = [World(**setup), World(**setup)]
    for world in worlds:
        for name, arguments in trace:
            getattr(world, name)(*arguments)
    assert worlds[0].log == worlds[1].log


def test_the_traces_reach_everything() -> None:
    """The checks above mean something only if what they check happens."""
    seen: Counter[str] = Counter()
    for seed in range(12):
        rng = random.Random(seed)
        world = World(seed=seed, policy=seed, concurrency=1 + seed % 3, fail_closed=False, probed=False)
        for _ in range(1500):
            name, arguments = random_operation(rng)
            getattr(world, name)(*arguments)
        for event in world.log:
            seen[type(event).__name__] += 1
            for part in ("reason", "why", "signal", "before", "after", "key"):
                seen[f"{type(event).__name__}.{part}={getattr(event, part, None)}"] += 1
    for wanted in (
        "Picked.reason=probe", "Picked.reason=panic", "Picked.reason=pinned", "Picked.reason=least connections",
        "Picked.reason=p2c", "Picked.reason=round robin", "Picked.reason=only candidate", "Dequeued.why=granted",
        "Dequeued.why=refused", "BreakerChanged.before=probing", "BreakerChanged.after=probing", "GivenUp", "Returned",
        "Ejected.signal=failures", "QueueOverflow", "Retried", "RetryRefused.why=not safe to send twice",
        "PanicChanged", "Ejected.key=None", "Ejected.key=eth", "Returned.key=btc", "HealthChanged.key=eth",
        "BreakerChanged.key=btc", "BreakerChanged.why=one failure was proof",
        "RetryRefused.why=it fails beyond the endpoints, and a second one has tried",
    ):  # fmt: skip
        assert seen[wanted] >= 5, (wanted, seen[wanted])


TestEngineMachine = EngineMachine.TestCase

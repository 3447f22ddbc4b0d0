"""The picking policies."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathlb.core.load import LatencyEstimate
from pathlb.core.model import Endpoint
from pathlb.core.policy import P2C, LeastConnections, Policy, RoundRobin

from .helpers import ScriptedRng


@dataclass
class Server:
    endpoint: Endpoint
    in_flight: int = 0
    weight: float = 1.0
    latency: LatencyEstimate = field(default_factory=LatencyEstimate)


def fleet(loads: Sequence[tuple[int, float]]) -> list[Server]:
    return [Server(Endpoint(f"http://gw{index}"), in_flight, weight) for index, (in_flight, weight) in enumerate(loads)]


FLEETS = st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0])), min_size=2, max_size=8)
POLICIES = [LeastConnections, RoundRobin, P2C]


@pytest.mark.parametrize("kind", POLICIES)
@given(loads=FLEETS, seed=st.integers(0, 1000))
def test_always_picks_a_member(kind: type[Policy], loads: list[tuple[int, float]], seed: int) -> None:
    policy, rng, servers = kind(), random.Random(seed), fleet(loads)
    for count in range(2, len(servers) + 1):
        picked = policy.pick(servers[:count], rng)
        assert any(picked is server for server in servers[:count])


@pytest.mark.parametrize("kind", POLICIES)
def test_same_seed_same_picks(kind: type[Policy]) -> None:
    servers = fleet([(0, 1.0)] * 5)
    first, second = kind(), kind()
    one, other = random.Random(7), random.Random(7)
    assert [first.pick(servers, one) for _ in range(50)] == [second.pick(servers, other) for _ in range(50)]
    assert isinstance(first.name, str)


@given(loads=FLEETS, seed=st.integers(0, 1000))
def test_least_connections_picks_a_minimum(loads: list[tuple[int, float]], seed: int) -> None:
    servers = fleet(loads)
    picked = LeastConnections().pick(servers, random.Random(seed))
    assert picked.in_flight / picked.weight == min(server.in_flight / server.weight for server in servers)


def near(count: int, expected: float, of: int) -> bool:
    """Within five standard deviations."""
    return abs(count - expected) < 5 * (expected * (1 - expected / of)) ** 0.5


def test_least_connections_breaks_ties_by_weight() -> None:
    servers = fleet([(1, 1.0), (0, 1.0), (0, 1.0), (5, 1.0), (0, 2.0)])
    policy, rng = LeastConnections(), random.Random(3)
    counts = Counter(policy.pick(servers, rng).endpoint.url for _ in range(8000))
    assert set(counts) == {"http://gw1", "http://gw2", "http://gw4"}
    for url, expected in (("http://gw1", 2000), ("http://gw2", 2000), ("http://gw4", 4000)):
        assert near(counts[url], expected, 8000)


def test_least_connections_gives_an_idle_endpoint_on_the_ramp_something() -> None:
    servers = fleet([(0, 1.0), (0, 1.0), (0, 0.1)])
    policy, rng = LeastConnections(), random.Random(4)
    counts = Counter(policy.pick(servers, rng).endpoint.url for _ in range(8000))
    assert near(counts["http://gw2"], 8000 * 0.1 / 2.1, 8000)
    servers[0].in_flight = servers[1].in_flight = 1
    assert policy.pick(servers, rng) is servers[2]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_round_robin_is_exact_over_every_cycle(weights: list[int]) -> None:
    servers = fleet([(0, float(weight)) for weight in weights])
    policy, rng = RoundRobin(), random.Random(0)
    for _ in range(3):
        cycle = Counter(policy.pick(servers, rng).endpoint.url for _ in range(sum(weights)))
        assert [cycle[server.endpoint.url] for server in servers] == weights


@given(st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_round_robin_is_smooth(weights: list[int]) -> None:
    """After any number of picks nobody is a full pick ahead of its share; how far behind is bounded by the count."""
    servers = fleet([(0, float(weight)) for weight in weights])
    policy, rng, counts = RoundRobin(), random.Random(0), Counter[str]()
    for made in range(1, 2 * sum(weights) + 1):
        counts[policy.pick(servers, rng).endpoint.url] += 1
        for server, weight in zip(servers, weights, strict=True):
            assert counts[server.endpoint.url] - Fraction(made * weight, sum(weights)) < 1


def test_round_robin_interleaves() -> None:
    a, b, c = servers = fleet([(0, 5.0), (0, 1.0), (0, 1.0)])
    policy, rng = RoundRobin(), random.Random(0)
    assert [policy.pick(servers, rng) for _ in range(7)] == [a, a, b, a, c, a, a]


def test_round_robin_owes_nothing_to_one_that_was_out() -> None:
    a, b, c = servers = fleet([(0, 1.0)] * 3)
    policy, rng = RoundRobin(), random.Random(0)
    for _ in range(7):
        policy.pick(servers, rng)
    for _ in range(30):
        policy.pick([a, b], rng)
    assert Counter(policy.pick(servers, rng).endpoint.url for _ in range(6))[c.endpoint.url] == 2


@given(loads=FLEETS, first=st.floats(0, 0.999), second=st.floats(0, 0.999), tie=st.floats(0, 0.999))
def test_p2c_never_compares_one_with_itself(
    loads: list[tuple[int, float]], first: float, second: float, tie: float
) -> None:
    read: list[int] = []

    class Watched(Sequence[Server]):
        def __len__(self) -> int:
            return len(servers)

        def __getitem__(self, index):  # type: ignore[no-untyped-def]
            read.append(index)
            return servers[index]

    servers = fleet(loads)
    picked = P2C().pick(Watched(), ScriptedRng(first, second, tie))
    one, other = read
    assert one != other
    loads_of_both = {index: servers[index].in_flight / servers[index].weight for index in read}
    assert loads_of_both[servers.index(picked)] == min(loads_of_both.values())


def test_p2c_reaches_every_pair_evenly() -> None:
    servers = fleet([(load, 1.0) for load in range(4)])
    policy, rng = P2C(), random.Random(5)
    counts = Counter(policy.pick(servers, rng).in_flight for _ in range(12_000))
    # Of the 6 pairs the least loaded wins 3, the next 2, the next 1, the most loaded none.
    assert counts[3] == 0
    for load, expected in ((0, 6000), (1, 4000), (2, 2000)):
        assert abs(counts[load] - expected) < 300


def test_p2c_breaks_ties_by_weight() -> None:
    servers = fleet([(0, 1.0), (0, 3.0)])
    policy, rng = P2C(), random.Random(6)
    counts = Counter(policy.pick(servers, rng).endpoint.url for _ in range(8000))
    assert near(counts["http://gw1"], 6000, 8000)

"""`profile=PATHProfile(...)`: headers, probes, settings, heights, readiness; what is given beside it counts first."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import httpx
import pytest
from pathkit import (
    PATIENCE,
    SERVICES,
    Events,
    Traffic,
    attempts_of,
    breakers,
    by_service,
    call,
    endpoint,
    of_service,
    path_client,
    unanswered,
    until,
)

import pathlb
import pathlb.httpx2
from pathlb import JSONRPC, Balancer, BlockHeight, ConfigError, Health, Limits, PATHProfile, Pool
from pathlb.classify import HTTPClassifier, PATHClassifier
from pathlb.core.events import BreakerChanged, HealthChanged
from pathlb.core.model import Cause
from pathlb.exchange import Headers, Reply, Request
from pathlb.profile import find_profile, perceived_height
from pathlb.testing import Body, Fleet, Mode, ScriptedUpstream, ServiceMode, ServiceTime

pytestmark = pytest.mark.anyio

INSTANT = ServiceTime.constant(0)
BOTH = ["eth", "solana"]


def path_fleet(n: int = 2, **options: Any) -> Fleet:
    return Fleet(n, path=SERVICES, service_time=INSTANT, record=True, **options)


def quick(profile: PATHProfile) -> Health:
    """The profile's probes, in quick succession, and patient with the machine."""
    assert profile.health is not None
    return replace(profile.health, interval=0.02, changing_interval=0.01, timeout=PATIENCE)


def paths(fleet: Fleet) -> Counter[str]:
    return sum((gateway.stats().by_path for gateway in fleet), Counter())


# --- headers

UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket"}

HEADERS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, list[str]]]] = {
    "one service is everybody's": ({"services": ["eth"]}, {}, {"target-service-id": ["eth"]}),
    "what is given stays": ({"services": ["eth"]}, of_service("near"), {"target-service-id": ["near"]}),
    "in any spelling": ({"services": ["eth"]}, {"TARGET-service-ID": "near"}, {"target-service-id": ["near"]}),
    "even if it is empty": ({"services": ["eth"]}, of_service(""), {"target-service-id": [""]}),
    "several are nobody's": ({"services": BOTH}, {}, {}),
    "several, one given": ({"services": BOTH}, of_service("eth"), {"target-service-id": ["eth"]}),
    "none known": ({}, {}, {}),
    "type of the only one": (
        {"services": {"eth": "json_rpc"}},
        {},
        {"target-service-id": ["eth"], "rpc-type": ["json_rpc"]},
    ),
    "type of the one given": (
        {"services": {"eth": "json_rpc", "solana": "rest"}},
        of_service("solana"),
        {"target-service-id": ["solana"], "rpc-type": ["rest"]},
    ),
    "no type without a service": ({"services": {"eth": "json_rpc", "solana": "rest"}}, {}, {}),
    "no type of an unknown one": (
        {"services": {"eth": "json_rpc"}},
        of_service("near"),
        {"target-service-id": ["near"]},
    ),
    "a type that is given": (
        {"services": {"eth": "json_rpc"}},
        {"rpc-type": "comet_bft"},
        {"target-service-id": ["eth"], "rpc-type": ["comet_bft"]},
    ),
    "no type on an upgrade": ({"services": {"eth": "json_rpc"}}, UPGRADE, {"target-service-id": ["eth"]}),
    "the app": ({"app_address": "pokt1app"}, {}, {"app-address": ["pokt1app"]}),
    "another app": ({"app_address": "pokt1app"}, {"app-address": "pokt1x"}, {"app-address": ["pokt1x"]}),
    "all three": (
        {"services": {"eth": "json_rpc"}, "app_address": "pokt1app"},
        {},
        {"target-service-id": ["eth"], "rpc-type": ["json_rpc"], "app-address": ["pokt1app"]},
    ),
}


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("through", ["client", "balancer", "transport"])
async def test_headers(case: str, through: str) -> None:
    options, given, wanted = HEADERS[case]
    profile = PATHProfile(**options, probes=False)
    with path_fleet(1) as fleet:
        if through == "client":
            async with path_client(fleet.urls, profile=profile) as client:
                await client.post("/v1", json=call(), headers=given)
        elif through == "transport":
            async with Balancer(fleet.urls, profile=profile) as balancer:
                async with httpx.AsyncClient(transport=pathlb.BalancedTransport(balancer)) as plain:
                    await plain.post("http://path/v1", json=call(), headers=given, timeout=PATIENCE)
        else:
            headers: Headers = [(name.encode(), value.encode()) for name, value in given.items()]
            headers.append((b"Content-Length", b"2"))
            before = headers.copy()
            async with Balancer(fleet.urls, profile=profile) as balancer:
                reply = await balancer.send(Request("POST", b"/v1", headers, b"{}"))
                await reply.body.aclose()
            assert headers == before, "the caller's own list"
        received = fleet[0].received()  # more than once, where it was refused
        assert received
        for one in received:
            found: dict[str, list[str]] = {}
            for name, value in one.headers:
                if (lower := name.decode().lower()) in ("target-service-id", "rpc-type", "app-address"):
                    found.setdefault(lower, []).append(value.decode())
            assert found == wanted


async def test_what_is_sent_again_is_not_added_to_again() -> None:
    with path_fleet(2) as fleet:
        fleet[0].set_service("eth", ServiceMode.NO_SESSION)
        profile = PATHProfile(services={"eth": "json_rpc"}, probes=False)
        async with path_client(fleet.urls, profile=profile, prefer=fleet.urls[0]) as client:
            response = await client.post("/v1", json=call())
            assert len(attempts_of(response)) == 2
        for gateway in fleet:
            (received,) = gateway.received()
            names = [name.lower() for name, _ in received.headers]
            assert (names.count(b"target-service-id"), names.count(b"rpc-type")) == (1, 1)


# --- probes


async def test_probes_ask_for_health_and_for_each_service() -> None:
    with path_fleet() as fleet:
        profile = PATHProfile(services=BOTH)
        async with path_client(fleet.urls, profile=profile, health=quick(profile)):
            wanted = {"/health", "/ready/eth", "/ready/solana"}
            await until(lambda: all(min(gateway.stats().by_path[path] for path in wanted) > 2 for gateway in fleet))
        assert set(paths(fleet)) == wanted, "never /healthz, never /ready of everything"
        assert {request.method for gateway in fleet for request in gateway.received()} == {"GET"}
        assert {request.target for gateway in fleet for request in gateway.received()} == {
            path.encode() for path in wanted
        }
        assert set(sum((gateway.stats().by_status for gateway in fleet), Counter())) == {200}


async def test_the_profiles_own_probes_decide_before_the_first_request() -> None:
    with path_fleet() as fleet:
        fleet[0].kill()
        async with path_client(fleet.urls, profile=PATHProfile(services=BOTH)) as client:
            health = {one.url: one.health for one in client.balancer.snapshot().endpoints}
            assert health == dict(zip(fleet.urls, ["down", "up"], strict=True))


async def test_delegated_mode_probes_no_service() -> None:
    """There /ready is never ready."""
    with path_fleet() as fleet:
        profile = PATHProfile(services=BOTH, app_address="pokt1app")
        async with path_client(fleet.urls, profile=profile, health=quick(profile)):
            await until(lambda: min(gateway.stats().by_path["/health"] for gateway in fleet) > 2)
        assert set(paths(fleet)) == {"/health"}


async def test_no_probes() -> None:
    with path_fleet() as fleet:
        async with path_client(fleet.urls, profile=PATHProfile(services=BOTH, probes=False)) as client:
            await Traffic(client, BOTH).run(10)
        assert set(paths(fleet)) == {"/v1"}


def test_what_the_probes_ask() -> None:
    assert PATHProfile().health == Health("/health")
    assert PATHProfile(probes=False).health is None
    assert PATHProfile(services={"eth": "json_rpc"}).health == Health("/health", services={"eth": "/ready/eth"})
    detailed = PATHProfile(services=["eth"], block_height=BlockHeight()).health
    assert detailed == Health("/health", services={"eth": "/ready/eth?detailed=true"}, block_height=perceived_height)


# --- settings


async def test_what_the_profile_sets(anyio_backend: str) -> None:
    with path_fleet() as fleet:
        async with pathlb.AsyncClient(fleet.urls, profile="path") as client:
            assert client.timeout == httpx.Timeout(connect=0.5, read=12.0, write=15.0, pool=None)
            balancer = client.balancer
            assert isinstance(balancer._classifier, PATHClassifier)
            assert balancer._engine._settings.limits == Limits.generous()
            assert balancer._engine._settings.block_height is None
            assert balancer._prober is not None
            if anyio_backend == "asyncio":
                pools = {upstream._settings for upstream in balancer._upstreams.values()}  # type: ignore[attr-defined]
                assert pools == {Pool(keepalive_expiry=100.0)}
        async with pathlb.httpx2.AsyncClient(fleet.urls, profile="path") as other:
            assert other.timeout.read == 12.0
        async with Balancer(fleet.urls, profile="path") as shared, pathlb.AsyncClient(shared) as third:
            assert third.timeout.read == 12.0
            if anyio_backend == "asyncio":
                pools = {upstream._settings for upstream in shared._upstreams.values()}  # type: ignore[attr-defined]
                assert pools == {Pool(keepalive_expiry=100.0)}


async def test_what_is_given_counts_first(anyio_backend: str) -> None:
    height = BlockHeight(lag=7)
    profile = PATHProfile(services=["eth"], block_height=BlockHeight())
    with path_fleet() as fleet:
        async with pathlb.AsyncClient(
            fleet.urls,
            profile=profile,
            timeout=3.0,
            limits=Limits.modest(),
            pool=Pool(keepalive_expiry=1.0),
            jsonrpc=JSONRPC(max_batch=1),
            block_height=height,
            classifier=HTTPClassifier(),
            health=Health("/healthz"),
        ) as client:
            balancer = client.balancer
            assert client.timeout == httpx.Timeout(3.0)
            assert balancer._engine._settings.limits == Limits.modest()
            assert balancer._engine._settings.block_height is height
            assert type(balancer._classifier) is HTTPClassifier
            if anyio_backend == "asyncio":
                pools = {upstream._settings for upstream in balancer._upstreams.values()}  # type: ignore[attr-defined]
                assert pools == {Pool(keepalive_expiry=1.0)}
            with pytest.raises(pathlb.RequestTooLarge):
                await client.post("/v1", json=[call(), call(id=2)])
        assert set(paths(fleet)) == {"/healthz"}


async def test_an_upstream_of_ones_own() -> None:
    scripted = ScriptedUpstream()
    profile = PATHProfile(services=["eth"], probes=False)
    async with pathlb.AsyncClient(["http://a"], profile=profile, upstream=lambda endpoint: scripted) as client:
        await client.post("/v1", json=call())
    ((request, _),) = scripted.calls
    assert (b"Target-Service-Id", b"eth") in request.headers


async def test_a_classifier_of_ones_own() -> None:
    """It is asked for the key too."""

    class Mine(PATHClassifier):
        def key(self, request: Request) -> str | None:
            return f"mine {super().key(request)}"

    with path_fleet(1) as fleet:
        fleet[0].set_service("eth", ServiceMode.NOT_CONFIGURED)
        async with path_client(fleet.urls, classifier=Mine()) as client:
            response = await client.post("/v1", json=call(), headers=of_service("eth"))
        assert {attempt.outcome.key for attempt in attempts_of(response)} == {"mine eth"}


# --- mistakes

MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("PATHProfile.services", {"services": "eth"}),
    ("PATHProfile.services", {"services": None}),
    ("PATHProfile.services", {"services": [""]}),
    ("PATHProfile.services", {"services": [1]}),
    ("PATHProfile.services", {"services": ["eth/../x"]}),
    ("PATHProfile.services", {"services": [".."]}),
    ("PATHProfile.services", {"services": ["eth\r\nX: y"]}),
    ("PATHProfile.services['eth']", {"services": {"eth": "jsonrpc"}}),
    ("PATHProfile.services['eth']", {"services": {"eth": None}}),
    ("PATHProfile.app_address", {"app_address": ""}),
    ("PATHProfile.app_address", {"app_address": "a\r\nb"}),
    ("PATHProfile.app_address", {"app_address": 1}),
    ("PATHProfile.probes", {"probes": None}),
    ("PATHProfile.probes", {"probes": 1}),
    ("PATHProfile.jsonrpc", {"jsonrpc": None}),
    ("PATHProfile.jsonrpc", {"jsonrpc": {"max_batch": 1}}),
    ("PATHProfile.block_height", {"block_height": 3}),
    ("PATHProfile.block_height", {"block_height": True}),
]


@pytest.mark.parametrize(("field", "options"), MISTAKES, ids=[f"{field} {options}" for field, options in MISTAKES])
def test_a_mistake_names_its_field(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        PATHProfile(**options)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize("given", ["nope", "PATH", "", 1, PATHProfile, {}])
@pytest.mark.parametrize("face", [Balancer, pathlb.AsyncClient, pathlb.httpx2.AsyncClient])
def test_no_such_profile(face: Any, given: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        face(["http://127.0.0.1:3069"], profile=given)
    assert caught.value.field == "profile"
    assert "must be 'path' or a PATHProfile" in str(caught.value)
    assert repr(given) in str(caught.value)


def test_profiles_by_name() -> None:
    assert find_profile("path") == PATHProfile()
    assert find_profile(None) is None
    own = PATHProfile(services=["eth"])
    assert find_profile(own) is own


# --- keys


async def test_the_key_of_one_request() -> None:
    """It has a breaker of its own, whatever service the request is for."""
    with path_fleet(2) as fleet:
        fleet[0].set_service("eth", ServiceMode.NOT_CONFIGURED)
        async with path_client(fleet.urls, prefer=fleet.urls[0]) as client:
            extensions = {"pathlb": {"key": "gold"}}
            response = await client.post("/v1", json=call(), headers=of_service("eth"), extensions=extensions)
            assert attempts_of(response)[0].outcome.key == "gold"
            url = fleet.urls[0]
            assert [breakers(client.balancer, url, key)[1] for key in ("gold", "eth")] == ["open", "closed"]


# --- block height


async def test_heights_from_readiness() -> None:
    """Instances that are behind are passed over, for that service, until they have caught up."""
    profile = PATHProfile(services=BOTH, block_height=BlockHeight(lag=3))
    with path_fleet(3) as fleet:
        fleet[1].set_height(1004)
        fleet[2].set_height(1003)
        async with path_client(fleet.urls, profile=profile, health=quick(profile)) as client:

            def heights() -> list[int | None]:
                return [one.heights.get("eth") for one in client.balancer.snapshot().endpoints]

            await until(lambda: heights() == [1000, 1004, 1003])
            traffic = Traffic(client, BOTH)
            assert not unanswered(await traffic.run(40))
            assert by_service(fleet[0])["eth"] == 0
            # Within `lag` of the highest nobody is behind.
            fleet[0].set_height(1001)
            await until(lambda: heights() == [1001, 1004, 1003])
            assert not unanswered(await traffic.until(lambda: by_service(fleet[0])["eth"]))
        assert {request.target for request in fleet[0].received() if b"/ready/eth" in request.target} == {
            b"/ready/eth?detailed=true"
        }


# Only what is in memory with the head is looked at, which it is on pathlb's own connections.
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_heights_in_passing() -> None:
    profile = PATHProfile(services=BOTH, probes=False, block_height=BlockHeight(lag=3))
    with path_fleet(3) as fleet:
        for gateway, height in zip(fleet, [1000, 1004, 1005], strict=True):
            gateway.set_height(height)
        async with path_client(fleet.urls, profile=profile) as client:

            async def ask(url: str) -> None:
                body = call("eth_blockNumber")
                await client.post("/v1", json=body, headers=of_service("eth"), extensions={"pathlb": {"pin": url}})

            for gateway in fleet:
                await ask(gateway.url)
            heights = [one.heights for one in client.balancer.snapshot().endpoints]
            assert heights == [{"eth": 1000}, {"eth": 1004}, {"eth": 1005}]
            before = by_service(fleet[0])
            traffic = Traffic(client, BOTH)
            assert not unanswered(await traffic.run(40))
            now = by_service(fleet[0])
            assert now["eth"] == before["eth"]
            assert now["solana"] > before["solana"], "of which nothing is known"
            fleet[0].set_height(1005)
            await ask(fleet.urls[0])
            assert not unanswered(await traffic.run(40))
            assert by_service(fleet[0])["eth"] > now["eth"] + 1


@pytest.mark.parametrize(
    ("body", "height"),
    [
        (b'{"ready":true,"services":{"eth":{"ready":true,"perceived_block_height":7}}}', 7),
        (b'{"ready":true,"services":{"eth":{"ready":true}}}', None),
        (b'{"ready":true,"services":{"solana":{"perceived_block_height":7}}}', None),
        (b'{"ready":true,"services":{"eth":{"perceived_block_height":"7"}}}', None),
        (b'{"ready":true,"services":{"eth":{"perceived_block_height":true}}}', None),
        (b'{"ready":true,"services":["eth"]}', None),
        (b'{"ready":false,"message":"no services configured"}', None),
        (b"[]", None),
        (b"null", None),
        (b"", None),
        (b"404 page not found\n", None),
        (b"[" * 100_000, None),
        (b"\xff", None),
    ],
)
def test_the_height_in_an_answer(body: bytes, height: int | None) -> None:
    assert perceived_height("eth", body) == height


async def test_a_height_reader_that_fails_does_not_end_the_probes(caplog: pytest.LogCaptureFixture) -> None:
    def fail(service: str, body: bytes) -> int | None:
        raise RuntimeError("a bug")

    with path_fleet(1) as fleet, caplog.at_level(logging.CRITICAL, "pathlb"):
        health = Health("/health", services={"eth": "/ready/eth"}, interval=0.02, changing_interval=0.01, timeout=30)
        async with path_client(fleet.urls, health=replace(health, block_height=fail)) as client:
            await until(lambda: fleet[0].stats().by_path["/ready/eth"] > 3)
            fleet[0].set_service("eth", ServiceMode.NO_SESSION)
            await until(lambda: endpoint(client.balancer, fleet.urls[0]).services)


# --- readiness


@pytest.mark.parametrize("mode", [ServiceMode.NO_SESSION, ServiceMode.NOT_CONFIGURED])
async def test_readiness_takes_one_service_out_and_brings_it_back(mode: ServiceMode) -> None:
    profile = PATHProfile(services=SERVICES)
    with path_fleet(3) as fleet:
        async with path_client(fleet.urls, profile=profile, health=quick(profile)) as client:
            events = Events(client.balancer)
            traffic = Traffic(client)
            assert not unanswered(await traffic.run(60))

            def told() -> list[tuple[str, str | None, str]]:
                return [(one.endpoint, one.key, one.after) for one in events.of(HealthChanged)]

            fleet[1].set_service("eth", mode)
            await until(lambda: told() == [(fleet.urls[1], "eth", "down")])
            assert endpoint(client.balancer, fleet.urls[1]).services == {"eth": "health check failed"}
            assert endpoint(client.balancer, fleet.urls[1]).state == "ready"
            before = by_service(fleet[1])
            results = await traffic.run(120)
            assert not unanswered(results)
            assert {len(one.attempts) for one in results} == {1}, "nobody had to find out"
            now = by_service(fleet[1])
            assert now["eth"] == before["eth"]
            assert now["solana"] > before["solana"]
            assert now["poly"] > before["poly"]
            fleet[1].set_service("eth", ServiceMode.OK)
            await until(lambda: told()[1:] == [(fleet.urls[1], "eth", "up")])
            assert not unanswered(await traffic.until(lambda: by_service(fleet[1])["eth"] > now["eth"]))
            assert {one.health for one in client.balancer.snapshot().endpoints} == {"up"}
            assert events.of(BreakerChanged) == []


async def test_a_service_ready_nowhere_is_asked_for_all_the_same() -> None:
    """Readiness is a hint: with nobody ready the gateways have the word."""
    profile = PATHProfile(services=SERVICES)
    with path_fleet(2) as fleet:
        async with path_client(fleet.urls, profile=profile, health=quick(profile)) as client:
            events = Events(client.balancer)
            fleet.set_service("eth", ServiceMode.NO_SESSION)
            await until(lambda: len(events.of(HealthChanged)) == 2)
            response = await client.post("/v1", json=call(), headers=of_service("eth"))
            assert response.status_code == 500
            assert response.json()["error"]["code"] == -31001
            fleet.set_service("eth", ServiceMode.OK)
            response = await client.post("/v1", json=call(), headers=of_service("eth"))
            assert response.status_code == 200, "before any probe has seen it"


async def test_what_is_no_word_on_readiness_changes_nothing() -> None:
    """Anything but 200 and 503, or nothing at all: whether the instance answers is what /health is for."""
    asked: Counter[bytes] = Counter()

    def answer(request: Request, extra: Headers) -> Reply | Exception:
        asked[request.target] += 1
        if request.target == b"/health":
            return Reply(200, [], Body())
        turn = asked[request.target] % 3
        return Reply(404 if turn == 1 else 500, [], Body()) if turn else RuntimeError("no answer")

    profile = PATHProfile(services=["eth"])
    upstream = ScriptedUpstream(answer)
    async with Balancer(
        ["http://a"], profile=profile, upstream=lambda one: upstream, health=quick(profile)
    ) as balancer:
        events = Events(balancer)
        await until(lambda: asked[b"/ready/eth"] > 9)
        assert balancer.snapshot().endpoints[0].services == {}
        assert events.of(HealthChanged) == []


async def test_an_instance_that_is_down_is_down_for_every_service() -> None:
    profile = PATHProfile(services=SERVICES)
    with path_fleet(2) as fleet:
        async with path_client(fleet.urls, profile=profile, health=quick(profile)) as client:
            events = Events(client.balancer)
            fleet[0].set_mode(Mode.FAIL, status=502)
            await until(lambda: endpoint(client.balancer, fleet.urls[0]).health == "down")
            results = await Traffic(client).run(30)
            assert not unanswered(results)
            assert {one.endpoints[0] for one in results} == {fleet.urls[1]}
            assert [(one.key, one.after) for one in events.of(HealthChanged)] == [(None, "down")]
            assert {attempt.outcome.cause for one in results for attempt in one.attempts} == {Cause.OK}

"""Active health probes, over real sockets where they matter and over a script where they must be counted."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import anyio
import pytest
from io_helpers import Answer, Seen, Site, Stack, by_url, reply, scripted, until

import pathlb
from pathlb import Health
from pathlb.core.events import EndpointsChanged, HealthChanged
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request
from pathlb.testing import Fleet, Mode, ScriptedUpstream

pytestmark = pytest.mark.anyio

FAST = Health("/health", interval=0.01, changing_interval=0.005, timeout=5, jitter=0)


class Patient:
    """An upstream whose probes answer what they are told to, and hang when that is None."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.probes = 0
        self.requests = 0
        self.upstream = ScriptedUpstream(self.answer)

    async def answer(self, request: Request, extra: Headers) -> Reply:
        if request.target != b"/health":
            self.requests += 1
            return reply()
        self.probes += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await anyio.sleep_forever()
        assert answer is not None
        if answer == 0:
            raise UpstreamError(Fault.CONNECT, pathlb.errors.Sent.NOT_SENT, "http://a", "refused")
        if answer == -1:
            raise ValueError("a bug")
        return reply(answer)


async def test_off_until_asked_for(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        await client.get("/")
        assert {one.health for one in client.balancer.snapshot().endpoints} == {"up"}
    assert sum(gateway.stats().by_path["/health"] for gateway in fleet) == 0


async def test_the_first_round_decides_before_the_first_request(stack: Stack, fleet: Fleet) -> None:
    fleet[0].kill()
    fleet[1].set_mode(Mode.FAIL)
    async with stack.pathlb.AsyncClient(fleet.urls, health=Health("/health")) as client:
        assert {url: one.health for url, one in by_url(client.balancer).items()} == {
            fleet.urls[0]: "down",
            fleet.urls[1]: "down",
            fleet.urls[2]: "up",
        }
        for _ in range(5):
            response = await client.get("/")
            assert len(response.extensions["pathlb"]["attempts"]) == 1
            assert response.headers["x-gateway"] == "gateway-2"


async def test_without_async_with_the_first_requests_wait_too(stack: Stack) -> None:
    good, bad = Patient(200), Patient(503)
    table = {"http://a": good.upstream, "http://b": bad.upstream}
    client = stack.pathlb.AsyncClient(list(table), upstream=ScriptedUpstream.factory(table), health=FAST)
    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(client.get, "/")
    await client.aclose()
    assert (good.requests, bad.requests) == (5, 0)


async def test_not_waiting_starts_with_all_up(stack: Stack) -> None:
    hanging = Patient(None)
    async with scripted(hanging.upstream, health=Health("/health", timeout=60, wait=False)) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            response = await client.get("/")
    assert response.extensions["pathlb"]["attempts"][0].reason == "only candidate"
    assert hanging.requests == 1


async def test_the_deadline_covers_the_wait_for_the_first_round(stack: Stack) -> None:
    hanging = Patient(None)
    balancer = scripted(hanging.upstream, health=Health("/health", timeout=60), panic=pathlb.Panic(fail_closed=True))
    async with stack.http.AsyncClient(transport=stack.pathlb.BalancedTransport(balancer)) as client:
        with pytest.raises(pathlb.PathlbError):
            await client.get("http://gw/", extensions={"pathlb": {"deadline": 0.02}})
    await balancer.aclose()
    assert hanging.requests == 0


async def test_a_probe_that_hangs_fails_at_its_timeout(stack: Stack) -> None:
    hanging, good = Patient(None), Patient(200)
    health = Health("/health", timeout=0.02, interval=60)
    told: list[HealthChanged] = []
    balancer = scripted(hanging.upstream, good.upstream, health=health)
    balancer.subscribe(lambda event: told.append(event) if isinstance(event, HealthChanged) else None)
    async with balancer:
        assert by_url(balancer)["http://a"].health == "down"
        assert by_url(balancer)["http://b"].health == "up"
    assert {event.why for event in told} == {"no answer within 0.02 s", "status 200"}


async def test_down_after_fall_and_up_after_rise(stack: Stack) -> None:
    patient = Patient(200, 503, 200, 503, 503, 503, 200, 503, 200, 200, 200)
    told: list[tuple[str, str, int]] = []

    def listen(event: Any) -> None:
        if isinstance(event, HealthChanged) and event.endpoint == "http://a":
            told.append((event.before, event.after, patient.probes))

    health = Health("/health", interval=0.002, changing_interval=0.002, timeout=5, fall=3, rise=2, jitter=0)
    balancer = scripted(patient.upstream, ScriptedUpstream(), health=health)
    balancer.subscribe(listen)
    async with balancer:
        await until(lambda: len(told) == 3)
    assert told == [("unknown", "up", 1), ("up", "down", 6), ("down", "up", 10)]


@pytest.mark.parametrize(
    ("answer", "statuses", "verdict"),
    [
        (200, {200}, "up"),
        (204, {200, 204}, "up"),
        (404, {200, 404}, "up"),
        (204, {200}, "down"),
        (302, {200}, "down"),
        (500, {200}, "down"),
        (0, {200}, "down"),
        (-1, {200}, "down"),
    ],
)
async def test_what_passes(answer: int, statuses: set[int], verdict: str) -> None:
    patient = Patient(answer)
    async with scripted(patient.upstream, health=Health("/health", statuses=statuses)) as balancer:
        assert balancer.snapshot().endpoints[0].health == verdict


async def test_a_body_that_breaks_off_does_not_pass() -> None:
    class Broken:
        async def __aiter__(self) -> Any:
            yield b"part"
            raise UpstreamError(Fault.READ, pathlb.errors.Sent.MAYBE_SENT, "http://a", "broke off")

        async def aclose(self) -> None:
            pass

    told: list[str] = []
    balancer = scripted(ScriptedUpstream(lambda request, extra: Reply(200, [], Broken())), health=Health("/h"))
    balancer.subscribe(lambda event: told.append(event.why) if isinstance(event, HealthChanged) else None)
    async with balancer:
        assert balancer.snapshot().endpoints[0].health == "down"
    assert told == ["http://a: broke off"]


async def test_probes_go_to_the_path_below_the_base_with_the_endpoints_host(stack: Stack) -> None:
    def answer(seen: Seen) -> Answer:
        return Answer(204 if seen.target == "/base/status?full=1" else 404)

    with Site(answer) as site:
        async with stack.pathlb.AsyncClient(
            [f"{site.url}/base"], health=Health("/status?full=1"), base_url="http://path-gateway"
        ) as client:
            assert client.balancer.snapshot().endpoints[0].health == "up"
    assert (site.seen[0].method, site.seen[0].all("host")) == ("GET", [site.authority])


async def test_an_instance_comes_back_without_traffic(stack: Stack, fleet: Fleet) -> None:
    fleet[0].kill()
    async with stack.pathlb.AsyncClient(fleet.urls, health=FAST) as client:
        assert by_url(client.balancer)[fleet.urls[0]].health == "down"
        fleet[0].restore()
        await until(lambda: by_url(client.balancer)[fleet.urls[0]].health == "up")
        assert by_url(client.balancer)[fleet.urls[0]].state == "slow start"


async def test_one_that_hangs_does_not_delay_the_others() -> None:
    """Each has its own schedule."""
    hanging, good = Patient(200, None), Patient(200)
    health = Health("/health", interval=0.002, changing_interval=0.002, timeout=60, jitter=0)
    async with scripted(hanging.upstream, good.upstream, health=health):
        await until(lambda: hanging.probes == 2)
        before = good.probes
        await until(lambda: good.probes >= before + 5)
    assert hanging.probes == 2


async def test_endpoints_that_join_are_asked_at_once_and_those_that_leave_no_more(stack: Stack) -> None:
    patients = {f"http://{name}": Patient(200) for name in "abc"}

    def factory(endpoint: pathlb.Endpoint) -> ScriptedUpstream:
        return ScriptedUpstream(patients[endpoint.url].answer)

    health = Health("/health", interval=60, changing_interval=60, timeout=60)
    async with pathlb.Balancer(["http://a", "http://b"], upstream=factory, health=health) as balancer:
        balancer.update(["http://b", "http://c"])
        assert by_url(balancer)["http://c"].state == "not checked yet"
        await until(lambda: by_url(balancer)["http://c"].health == "up")
        assert [one.probes for one in patients.values()] == [1, 1, 1]
        # One that left and came back is a new one.
        balancer.update(["http://b"])
        balancer.update(["http://b", "http://c"])
        await until(lambda: by_url(balancer)["http://c"].health == "up")
        assert [one.probes for one in patients.values()] == [1, 1, 2]


async def test_one_that_left_is_not_asked_while_it_serves_its_last_requests(stack: Stack) -> None:
    leaving, staying = Patient(200), Patient(200)
    async with scripted(leaving.upstream, staying.upstream, health=FAST) as balancer:
        async with stack.pathlb.AsyncClient(balancer) as client:
            async with client.stream("GET", "/", extensions={"pathlb": {"pin": "http://a"}}):
                balancer.update(["http://b"])
                assert by_url(balancer)["http://a"].in_flight == 1
                before, seen = leaving.probes, staying.probes
                await until(lambda: staying.probes >= seen + 5)
    assert leaving.probes <= before + 1, "the one under way"


async def test_one_that_joins_during_the_first_round_is_asked_then() -> None:
    """And one that leaves is no longer waited for."""
    hanging, good = Patient(None), Patient(200)
    factory = ScriptedUpstream.factory({"http://a": hanging.upstream, "http://b": good.upstream})
    balancer = pathlb.Balancer(["http://a"], upstream=factory, health=Health("/health", interval=60, timeout=60))
    async with anyio.create_task_group() as group:
        group.start_soon(balancer.__aenter__)
        await until(lambda: hanging.probes == 1)
        balancer.update(["http://b"])
        await until(lambda: good.probes == 1)
    assert balancer.snapshot().endpoints[0].health in ("up", "unknown")
    await until(lambda: balancer.snapshot().endpoints[0].health == "up")
    await balancer.aclose()


async def test_a_drained_endpoint_is_still_asked(stack: Stack) -> None:
    patient = Patient(200)
    told: list[Any] = []
    async with scripted(patient.upstream, ScriptedUpstream(), health=FAST) as balancer:
        balancer.subscribe(lambda event: told.append(event) if isinstance(event, EndpointsChanged) else None)
        balancer.drain("http://a")
        before = patient.probes
        await until(lambda: patient.probes > before)
        assert by_url(balancer)["http://a"].state == "draining"
        balancer.undrain("http://a")
        assert by_url(balancer)["http://a"].state in ("ready", "slow start")
    assert [(event.drained, event.undrained) for event in told[:2]] == [(("http://a",), ()), ((), ("http://a",))]


async def test_not_entered_after_all_leaves_nothing_running() -> None:
    hanging = Patient(None)
    balancer = scripted(hanging.upstream, health=Health("/health", timeout=60))
    with anyio.move_on_after(0.02) as scope:
        async with balancer:
            raise AssertionError("the first round cannot end")
    assert scope.cancelled_caught
    with pytest.raises(pathlb.UsageError, match="closed"):
        await balancer.send(Request("GET", b"/", []))
    assert hanging.upstream.closed


async def test_nor_does_a_client_that_was_not(stack: Stack) -> None:
    class Elsewhere(stack.http.AsyncBaseTransport):  # type: ignore[misc, name-defined]
        entered = 0

        async def __aenter__(self) -> Any:
            self.entered += 1
            return self

    hanging = Patient(None)
    elsewhere = Elsewhere()
    with anyio.move_on_after(0.02):
        async with stack.pathlb.AsyncClient(
            ["http://a"],
            upstream=lambda endpoint: hanging.upstream,
            health=Health("/health", timeout=60),
            mounts={"http://other": elsewhere},
        ):
            raise AssertionError("the first round cannot end")
    assert hanging.upstream.closed
    assert elsewhere.entered == 0


async def test_what_the_first_request_has_set_is_not_the_probes() -> None:
    """A span around it, say, or who is logged in."""
    seen: set[str] = set()

    def answer(request: Request, extra: Headers) -> Reply:
        seen.add(current.get())
        return reply()

    current: ContextVar[str] = ContextVar("current", default="nobody's")
    token = current.set("the first request's")
    async with scripted(ScriptedUpstream(answer), health=Health("/health")):
        pass
    current.reset(token)
    assert seen == {"nobody's"}


async def test_closing_ends_the_probes() -> None:
    patient = Patient(200)
    async with scripted(patient.upstream, health=FAST):
        await until(lambda: patient.probes > 2)
    before = patient.probes
    await anyio.wait_all_tasks_blocked()
    assert patient.probes == before

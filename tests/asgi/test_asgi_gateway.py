"""The Gateway as an app, called without a server, on asyncio and on trio."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import pytest
from asgi_kit import OTHER, PATIENCE, URL, Exchange, Parts, Taking, balancing, ok
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount

from pathlb import JSONRPC, Balancer, ConfigError, Limits, TransportUpstreams
from pathlb.asgi import Gateway, Route, lookout, watch
from pathlb.asgi.gateway import BrokenOff
from pathlb.asgi.types import ASGIApp, Message
from pathlb.core.model import Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, Reply, Request, Timeouts, WholeBody
from pathlb.testing import Fleet, ScriptedUpstream

pytestmark = pytest.mark.anyio

KIB, MIB = 2**10, 2**20
PART = b"x" * 65_536


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def upstream() -> ScriptedUpstream:
    return ScriptedUpstream()


@pytest.fixture
async def balancer(upstream: ScriptedUpstream) -> AsyncIterator[Balancer]:
    balancer = balancing(upstream)
    yield balancer
    await balancer.aclose()


def only(upstream: ScriptedUpstream) -> Request:
    """The only request it got."""
    ((request, _),) = upstream.calls
    return request


def broken(fault: Fault = Fault.READ, sent: Sent = Sent.MAYBE_SENT, **more: Any) -> UpstreamError:
    return UpstreamError(fault, sent, URL, "it broke", **more)


class TestTargets:
    """What of the path goes out."""

    @pytest.mark.parametrize("target", ["/", "/a%2Fb/%7e%C3%a9?c=%20&d", "//host/p", "/a//b/", "/a?", "/a;b=c?/../.."])
    async def test_bytes_are_untouched(self, target: str, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        await Exchange(target).run(Gateway(balancer))
        assert only(upstream).target == target.removesuffix("?").encode()

    @pytest.mark.parametrize("app", [Starlette, FastAPI])
    @pytest.mark.parametrize(
        ("target", "expected"),
        [
            ("/rpc", b"/"),
            ("/rpc?a=%20", b"/?a=%20"),
            ("/rpc/", b"/"),
            ("/rpc/v1/%7Eb%2fc?d", b"/v1/%7Eb%2fc?d"),
            ("/rpc//v1", b"//v1"),
            ("/%72pc/v1", b"/v1"),
            ("/rpc/rpc/v1", b"/rpc/v1"),
        ],
    )
    async def test_a_mount_takes_its_prefix_off(
        self, target: str, expected: bytes, app: Any, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        host = app()
        host.mount("/rpc", Gateway(balancer))
        exchange = await Exchange(target).run(host)
        if exchange.status == 307:  # a mount's own, of the path without a slash
            assert exchange.one(b"location").split(b"?")[0].endswith(b"/rpc/")
        else:
            assert only(upstream).target == expected

    async def test_mounts_in_mounts(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        app = Starlette(routes=[Mount("/a b", routes=[Mount("/{tenant}", app=Gateway(balancer))])])
        await Exchange("/a%20b/%74en%C3%A9nt/%7Ex").run(app)
        assert only(upstream).target == b"/%7Ex"

    async def test_a_prefix_that_only_the_app_in_front_knows(
        self, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        # As behind a proxy that has taken it off, with FastAPI(root_path="/api").
        await Exchange("/v1/x", root_path="/api").run(Gateway(balancer))
        assert only(upstream).target == b"/v1/x"

    @pytest.mark.parametrize(
        ("path", "expected"), [("/a b%é", b"/a%20b%25%C3%A9"), ("/~x/(y)", b"/~x/(y)"), ("/%41", b"/%2541")]
    )
    async def test_a_server_without_raw_path(
        self, path: str, expected: bytes, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        exchange = Exchange(path="/")
        exchange.scope.update(path=path, raw_path=None)
        await exchange.run(Gateway(balancer))
        assert only(upstream).target == expected

    async def test_a_raw_path_with_the_query_on_it(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        await Exchange("/a?b=c", raw_path=b"/a?b=c").run(Gateway(balancer))
        assert only(upstream).target == b"/a?b=c"

    @pytest.mark.parametrize(
        ("rewrite", "target", "expected"),
        [
            (("/api", "/v1"), "/api", b"/v1"),
            (("/api", "/v1"), "/api/x?y", b"/v1/x?y"),
            (("/api", "/v1"), "/api?y", b"/v1?y"),
            (("/api", "/v1"), "/apix", b"/apix"),
            (("/api", "/v1"), "/%61pi/%7ex", b"/v1/%7ex"),
            (("/api/", "/v1/"), "/api/x", b"/v1/x"),
            (("/api", "/"), "/api", b"/"),
            (("/api", "/"), "/api/x", b"/x"),
            (("/", "/v1"), "/x", b"/v1/x"),
            (("/", "/v1"), "/", b"/v1/"),
            (("/a%20b", "/c%20d"), "/a%20b/e", b"/c%20d/e"),
        ],
    )
    async def test_rewrite(
        self, rewrite: tuple[str, str], target: str, expected: bytes, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        await Exchange(target).run(Gateway(balancer, rewrite=rewrite))
        assert only(upstream).target == expected

    async def test_rewrite_comes_after_the_mount(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        app = Starlette(routes=[Mount("/api", app=Gateway(balancer, rewrite=("/api", "/v1")))])
        await Exchange("/api/api/x").run(app)
        assert only(upstream).target == b"/v1/x"

    @pytest.mark.parametrize(
        "target",
        ["/rpc/../admin", "/rpc/%2e%2E/admin", "/rpc/a/../../admin", "/rpc//../admin", "/rpc/./../admin", "/rpc/.."],
    )
    async def test_nobody_climbs_out_of_a_mount(
        self, target: str, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        for app in (
            Starlette(routes=[Mount("/rpc", app=Gateway(balancer))]),
            Gateway(balancer, rewrite=("/rpc", "/v1")),
            Gateway(routes=[Route(balancer, path="/rpc", strip=True)]),
        ):
            assert (await Exchange(target).run(app)).status == 400
        assert upstream.count == 0

    @pytest.mark.parametrize(
        "scope",
        [
            {"raw_path": b"/a b"},
            {"raw_path": b"/a\r\nX: 1"},
            {"raw_path": b"/\xe9"},
            {"raw_path": b"/a#b"},
            {"raw_path": b"a"},
            {"raw_path": b"*"},
            {"raw_path": b"http://evil.test/"},
            {"query_string": b"a b"},
            {"query_string": b"a#b"},
        ],
    )
    async def test_what_is_no_target(
        self, scope: dict[str, bytes], balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        gateway = Gateway(balancer)
        for _ in range(2):
            assert (await Exchange(**scope).run(gateway)).status == 400
        assert upstream.count == 0

    async def test_what_is_kept_in_mind_is_bounded(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        gateway = Gateway(balancer)
        for number in range(1_500):
            await Exchange(f"/{number}", root_path=f"/{number}", headers=[(b"x-%d" % number, b"1")]).run(gateway)
        assert upstream.count == 1_500
        assert max(map(len, (gateway._targets._paths, gateway._targets._mounts, gateway._known.plain))) <= 1_000


class TestRoutes:
    @pytest.fixture
    async def others(self) -> AsyncIterator[list[tuple[Balancer, ScriptedUpstream]]]:
        upstreams = [ScriptedUpstream(lambda *_, n=number: ok(b"%d" % n)) for number in range(3)]
        balancers = [balancing(one) for one in upstreams]
        yield list(zip(balancers, upstreams, strict=True))
        for balancer in balancers:
            await balancer.aclose()

    async def test_by_path(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), (two, _) = others
        gateway = Gateway(zero, routes=[Route(one, path="/a"), Route(two, path="/a/b")])
        for target, expected in [
            ("/", b"0"),
            ("/ab", b"0"),
            ("/a", b"1"),
            ("/a?b", b"1"),
            ("/a/c", b"1"),
            ("/%61/c", b"1"),
            ("/a/b", b"2"),
            ("/a/b/", b"2"),
            ("/a%2Fb", b"0"),
            ("/A", b"0"),
        ]:
            assert (await Exchange(target).run(gateway)).body == expected, target

    async def test_strip(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, upstream), (one, whole), _ = others
        gateway = Gateway(routes=[Route(zero, path="/a/", strip=True), Route(one, path="/a/b")])
        for target, expected in [("/a", b"/"), ("/a?q", b"/?q"), ("/a/%7Ec?q", b"/%7Ec?q"), ("/%61/c", b"/c")]:
            await Exchange(target).run(gateway)
            assert upstream.calls[-1][0].target == expected
        await Exchange("/a/b/c").run(gateway)
        assert only(whole).target == b"/a/b/c"

    async def test_by_host(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), (two, _) = others
        gateway = Gateway(zero, routes=[Route(one, host="One.test"), Route(two, host="[2001:db8::1]")])
        for host, expected in [
            (b"one.test", b"1"),
            (b"ONE.test:8080", b"1"),
            (b"[2001:db8::1]:80", b"2"),
            (b"two.test", b"0"),
            (b"one.test.evil", b"0"),
        ]:
            assert (await Exchange(host=host).run(gateway)).body == expected, host

    async def test_by_header(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), (two, _) = others
        gateway = Gateway(zero, routes=[Route(one, header=("Target-Service-Id", "eth")), Route(two, header="X-Canary")])
        for headers, expected in [
            ([(b"target-service-id", b"eth")], b"1"),
            ([(b"target-service-id", b"eth2")], b"0"),
            ([(b"target-service-id", b"sol"), (b"target-service-id", b"eth")], b"1"),
            ([(b"x-canary", b"")], b"2"),
            ([], b"0"),
        ]:
            assert (await Exchange(headers=headers).run(gateway)).body == expected, headers

    async def test_all_conditions_together(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), _ = others
        gateway = Gateway(zero, routes=[Route(one, path="/a", host="one.test", header="x-a")])
        for target, host, headers, expected in [
            ("/a", b"one.test", [(b"x-a", b"")], b"1"),
            ("/b", b"one.test", [(b"x-a", b"")], b"0"),
            ("/a", b"two.test", [(b"x-a", b"")], b"0"),
            ("/a", b"one.test", [], b"0"),
        ]:
            assert (await Exchange(target, host=host, headers=headers).run(gateway)).body == expected

    async def test_the_first_of_equals(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), _ = others
        gateway = Gateway(routes=[Route(zero, path="/a", header="x-a"), Route(one, path="/b"), Route(one, path="/a")])
        assert (await Exchange("/a", headers=[(b"x-a", b"")]).run(gateway)).body == b"0"
        assert (await Exchange("/a").run(gateway)).body == b"1"

    async def test_no_route_and_no_default(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), *_ = others
        assert (await Exchange("/b").run(Gateway(routes=[Route(zero, path="/a")]))).status == 404

    async def test_a_route_sees_the_mounted_path(self, others: list[tuple[Balancer, ScriptedUpstream]]) -> None:
        (zero, _), (one, _), _ = others
        app = Starlette(routes=[Mount("/rpc", app=Gateway(zero, routes=[Route(one, path="/a")]))])
        assert (await Exchange("/rpc/a").run(app)).body == b"1"
        assert (await Exchange("/a").run(app)).status == 404


class TestBodies:
    """Short ones are held and can be sent again, long ones stream and cannot."""

    @pytest.mark.parametrize(
        ("parts", "chunked"), [([b"x" * 65_536], False), ([b"x"] * 100, False), ([b"x" * 65_536], True), ([b""], True)]
    )
    async def test_a_short_one_is_sent_again_elsewhere(self, parts: list[bytes], chunked: bool) -> None:
        answers = iter([broken(), ok()])
        first, second = (ScriptedUpstream(lambda *_: next(answers)) for _ in range(2))
        balancer = balancing(first, second)
        exchange = await Exchange("/", *parts, chunked=chunked, method="PUT").run(Gateway(balancer, tell=True))
        assert (exchange.status, exchange.one(b"x-pathlb-attempts")) == (200, b"2")
        assert only(first).body == only(second).body == b"".join(parts)
        await balancer.aclose()

    @pytest.mark.parametrize(
        ("parts", "chunked"), [([PART, b"x"], False), ([b"x" * 65_537], True), ([PART, b"", b"x"], True)]
    )
    async def test_a_long_one_is_not(self, parts: list[bytes], chunked: bool) -> None:
        takings = [Taking(broken), Taking(broken)]  # type: ignore[arg-type]
        balancer = balancing(*map(ScriptedUpstream, takings))
        exchange = await Exchange("/", *parts, chunked=chunked, method="PUT").run(Gateway(balancer, tell=True))
        assert (exchange.status, exchange.one(b"x-pathlb-attempts")) == (502, b"1")
        assert takings[0].bodies + takings[1].bodies == [b"".join(parts)]
        await balancer.aclose()

    async def test_a_long_one_goes_elsewhere_when_nobody_has_touched_it(self) -> None:
        taking = Taking()
        refuses = ScriptedUpstream(lambda *_: broken(Fault.CONNECT, Sent.NOT_SENT))
        for upstreams in ([refuses, ScriptedUpstream(taking)], [ScriptedUpstream(taking), refuses]):
            balancer = balancing(*upstreams)
            for _ in range(2):
                assert (await Exchange("/", PART, PART).run(Gateway(balancer))).status == 200
            await balancer.aclose()
        assert taking.bodies == [PART + PART] * 4

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_framing(self, chunked: bool) -> None:
        upstream = ScriptedUpstream(Taking())
        balancer = balancing(upstream)
        await Exchange("/", PART, b"x", chunked=chunked).run(Gateway(balancer))
        lengths = [value for name, value in only(upstream).headers if name == b"content-length"]
        assert lengths == ([] if chunked else [b"65537"])
        await balancer.aclose()

    async def test_one_is_not_read_for_a_request_without_it(
        self, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        exchange = await Exchange().run(Gateway(balancer))
        assert exchange.calls == 0
        assert only(upstream).body == b""

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_max_body(self, chunked: bool) -> None:
        for limit, parts in [(10, [b"x" * 6, b"x" * 5]), (100_000, [PART, b"x" * 34_465])]:
            taking = Taking()
            balancer = balancing(ScriptedUpstream(taking))
            gateway = Gateway(balancer, max_body=limit)
            exchange = await Exchange("/", *parts, chunked=chunked).run(gateway)
            assert exchange.status == 413
            assert taking.bodies == []
            if not chunked:
                assert exchange.calls == 0  # what is too long by its own account is not read
            assert (await Exchange("/", parts[0], parts[1][1:], chunked=chunked).run(gateway)).status == 200
            assert list(map(len, taking.bodies)) == [limit]
            await balancer.aclose()

    async def test_no_body_at_all(self, balancer: Balancer) -> None:
        gateway = Gateway(balancer, max_body=0)
        assert (await Exchange("/", b"x").run(gateway)).status == 413
        assert (await Exchange("/", b"", chunked=True).run(gateway)).status == 200

    @pytest.mark.parametrize("length", [b"2", b"4"])
    async def test_one_that_is_not_as_long_as_it_says(
        self, length: bytes, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        exchange = Exchange("/", b"abc")
        exchange.scope["headers"][1] = (b"content-length", length)
        assert (await exchange.run(Gateway(balancer))).status == 400
        assert upstream.count == 0

    async def test_a_long_one_that_is_not_as_long_as_it_says(self) -> None:
        taking = Taking()
        balancer = balancing(ScriptedUpstream(taking))
        exchange = Exchange("/", PART, b"abc")
        exchange.scope["headers"][1] = (b"content-length", b"65540")
        assert (await exchange.run(Gateway(balancer))).status == 400
        assert exchange.one(b"connection") == b"close"
        assert taking.bodies == []
        await balancer.aclose()

    async def test_http_2_has_bodies_that_nobody_announces(
        self, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        exchange = Exchange("/", b"abc", b"de", http_version="2")
        del exchange.scope["headers"][1]
        assert (await exchange.run(Gateway(balancer))).status == 200
        assert only(upstream).body == b"abcde"

    async def test_a_long_one_takes_as_long_as_its_caller_does(self) -> None:
        taking, go = Taking(), anyio.Event()
        balancer = balancing(ScriptedUpstream(taking), deadline=0.05)
        async with anyio.create_task_group() as tasks:
            exchange = Exchange("/", PART, PART, go, b"x")
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.received == 2 * len(PART))
            await anyio.sleep(0.1)  # past the deadline
            go.set()
        assert (exchange.status, len(taking.bodies[0])) == (200, 2 * len(PART) + 1)
        await balancer.aclose()

    @pytest.mark.parametrize("parts", [[b"x"], [PART, PART]], ids=["short", "long"])
    async def test_one_that_stops_coming(self, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "SENDING", 0.01)
        balancer = balancing(ScriptedUpstream(Taking()))
        exchange = await Exchange("/", *parts, anyio.Event(), b"x").run(Gateway(balancer))
        assert (exchange.status, exchange.one(b"connection")) == (408, b"close")
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    async def test_a_caller_that_takes_nothing_of_its_reply(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It holds a place at an endpoint, and would for ever."""
        monkeypatch.setattr(watch, "TAKING", 0.01)
        body = Parts([PART, PART])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        exchange.take(len(PART))
        with pytest.raises(BrokenOff, match="does not take"):
            await exchange.run(Gateway(balancer))
        assert body.closed
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    async def test_a_caller_that_waits_for_its_reply_is_not_hurried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "SENDING", 0.01)
        monkeypatch.setattr(watch, "TAKING", 0.01)
        looked = anyio.Event()
        gateway = Gateway(balancing(ScriptedUpstream(lambda *_: Reply(200, [], Parts([b"a", looked, b"b"])))))
        real = gateway._lookout._look

        def look() -> bool:
            again = real()
            if gateway._lookout._present:
                looked.set()
            return again

        monkeypatch.setattr(gateway._lookout, "_look", look)
        exchange = await Exchange("/", b"x").run(gateway)
        assert (exchange.status, exchange.body, exchange.whole) == (200, b"ab", True)
        await gateway.balancers[0].aclose()

    @pytest.mark.parametrize("why", ["too large", "no endpoint"])
    async def test_a_long_json_rpc_call_is_refused_in_json_rpc(self, why: str) -> None:
        """Of what nobody has read the beginning is looked at; its id is not known then."""
        balancer = balancing(ScriptedUpstream(Taking()))
        gateway = Gateway(balancer, max_body=10 if why == "too large" else 10**6)
        if why == "no endpoint":
            balancer.drain(URL)
        call = b'{"jsonrpc":"2.0","id":7,"method":"eth_call","params":["'
        for kind, expected in (
            (b"application/json", b"application/json"),
            (b"text/plain", b"application/problem+json"),
        ):
            exchange = Exchange("/", call, PART, PART, headers=[(b"content-type", kind)])
            await exchange.run(gateway)
            assert exchange.status == (413 if why == "too large" else 503)
            assert exchange.one(b"content-type") == expected
        assert (
            json.loads(
                (await Exchange("/", call, PART, headers=[(b"content-type", b"application/json")]).run(gateway)).body
            )["id"]
            is None
        )
        asked = Exchange(
            "/", call, PART, headers=[(b"content-type", b"application/json"), (b"expect", b"100-continue")]
        )
        await asked.run(gateway)
        assert asked.calls == 0  # a server takes the first call for the go-ahead
        await balancer.aclose()


class TestOverTransports:
    """Where pathlb's own connections do not serve: trio, HTTP/2, proxies."""

    @pytest.mark.parametrize(
        ("parts", "chunked"),
        [([b"{}"], False), ([b"{", b"}"], True), ([PART, PART], False), ([PART, PART], True), ([], False)],
        ids=["short", "chunks", "long", "long, in chunks", "none"],
    )
    async def test_bodies_are_framed(self, parts: list[bytes], chunked: bool) -> None:
        with Fleet(1) as fleet:
            balancer = Balancer(fleet.urls, upstream=TransportUpstreams())
            exchange = await Exchange("/v1", *parts, chunked=chunked).run(Gateway(balancer))
            assert (exchange.status, balancer.snapshot().in_flight) == (200, 0)
            await balancer.aclose()


class TestPace:
    """64 MiB either way, with a side that stops: what is buffered stays small."""

    async def test_up(self) -> None:
        resume, stopped = anyio.Event(), anyio.Event()
        taken = 0

        async def slow(request: Request, _: Headers) -> Reply:
            nonlocal taken
            async for part in request.body:  # type: ignore[union-attr]
                taken += len(part)
                if taken == 16 * MIB:
                    stopped.set()
                    await resume.wait()
                assert exchange.received - taken <= 128 * KIB
            return ok()

        balancer = balancing(ScriptedUpstream(slow))
        exchange = Exchange("/", *[PART] * 1024)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            with anyio.fail_after(PATIENCE):
                await stopped.wait()
            await anyio.wait_all_tasks_blocked()
            assert exchange.received - taken <= 128 * KIB
            resume.set()
        assert (exchange.status, taken) == (200, 64 * MIB)
        await balancer.aclose()

    async def test_down(self) -> None:
        body = Parts([PART] * 1024)
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        exchange.take(16 * MIB)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.size == 16 * MIB)
            await anyio.wait_all_tasks_blocked()
            assert body.given - 16 * MIB <= 128 * KIB
            assert not body.closed
            exchange.take()
        assert (exchange.size, body.closed, exchange.whole) == (64 * MIB, True, True)
        await balancer.aclose()


class TestReplies:
    async def test_a_whole_one_is_two_messages(self) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(201, [(b"X-A", b"1")], WholeBody(b"hello"))))
        exchange = await Exchange().run(Gateway(balancer))
        assert exchange.said == [
            {"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"1")]},
            {"type": "http.response.body", "body": b"hello"},
        ]
        await balancer.aclose()

    async def test_a_long_one_comes_part_by_part(self) -> None:
        gates = [anyio.Event(), anyio.Event()]
        body = Parts([b"a", gates[0], b"b", gates[1], b"c"])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.body == b"a")
            gates[0].set()
            await exchange.until(lambda: exchange.body == b"ab")
            assert not exchange.whole
            gates[1].set()
        assert (exchange.body, exchange.whole, body.closed) == (b"abc", True, True)
        await balancer.aclose()

    @pytest.mark.parametrize("parts", [[], [b"a"]])
    async def test_one_that_breaks_off_is_never_ended(self, parts: list[bytes]) -> None:
        body = Parts([*parts, broken()])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        with pytest.raises(BrokenOff, match=r"^the reply broke off: it broke$"):
            await exchange.run(Gateway(balancer))
        assert (exchange.status, exchange.whole, body.closed) == (200, False, True)
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    @pytest.mark.parametrize("make", [Starlette, FastAPI])
    async def test_one_that_breaks_off_in_a_mount(self, make: Any) -> None:
        body = Parts([b"a", broken()])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        app = make(debug=True)
        app.mount("/rpc", Gateway(balancer))
        exchange = Exchange("/rpc/")
        with pytest.raises(BrokenOff):
            await exchange.run(app)
        assert (exchange.body, exchange.whole, body.closed) == (b"a", False, True)
        await balancer.aclose()

    @pytest.mark.parametrize(
        "reply",
        [
            (200, [(b"Content-Length", b"1"), (b"Transfer-Encoding", b"chunked")]),
            (200, [(b"X", b"a\r\nSet-Cookie: evil=1")]),
            (200, [(b"X", b"a\0")]),
            (200, [(b"X Y", b"a")]),
            (200, [(b"X:", b"a")]),
            (101, []),
            (999, []),
        ],
    )
    async def test_one_that_cannot_be_handed_over(self, reply: tuple[int, Headers]) -> None:
        """Whatever upstream it comes from: pathlb's own knows these rules too."""
        body = Parts([b"a"])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(*reply, body)))
        exchange = await Exchange().run(Gateway(balancer))
        assert exchange.status == 502
        assert body.closed
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    @pytest.mark.parametrize("status", [204, 304])
    async def test_one_that_has_no_body_says_no_length(self, status: int) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(status, [(b"Content-Length", b"5")], WholeBody(b""))))
        assert (await Exchange().run(Gateway(balancer))).headers == []
        await balancer.aclose()

    async def test_names_are_lower_case_and_those_of_one_hop_are_left_out(self) -> None:
        headers = [(b"X-B", b"2"), (b"Connection", b"x-mine"), (b"X-Mine", b"1"), (b"x-b", b"1"), (b"X-A", b"")]
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [*headers], WholeBody(b""))))
        gateway = Gateway(balancer)
        for _ in range(2):
            assert (await Exchange().run(gateway)).headers == [(b"x-b", b"2"), (b"x-b", b"1"), (b"x-a", b"")]
        await balancer.aclose()

    async def test_a_bug_is_a_500_without_its_trace(self, caplog: pytest.LogCaptureFixture) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: RuntimeError("secret")))
        exchange = await Exchange().run(Gateway(balancer))
        assert exchange.status == 500
        assert b"secret" not in exchange.body
        assert "secret" in caplog.text
        await balancer.aclose()

    async def test_a_batch_that_is_too_long_for_the_gateways_is_a_413(self) -> None:
        balancer = balancing(ScriptedUpstream(), jsonrpc=JSONRPC(max_batch=1))
        call = b'{"jsonrpc":"2.0","id":%d,"method":"eth_chainId"}'
        exchange = await Exchange("/", b"[%b,%b]" % (call % 1, call % 2)).run(Gateway(balancer))
        assert exchange.status == 413
        assert [answer["id"] for answer in json.loads(exchange.body)] == [1, 2]
        await balancer.aclose()

    async def test_a_closed_balancer_is_a_500(self) -> None:
        balancer = balancing(ScriptedUpstream())
        await balancer.aclose()
        assert (await Exchange().run(Gateway(balancer))).status == 500

    @pytest.mark.parametrize(
        ("error", "status"),
        [
            (broken(Fault.CONNECT_TIMEOUT, Sent.NOT_SENT), 504),
            (broken(Fault.READ_TIMEOUT), 504),
            (broken(Fault.WRITE_TIMEOUT), 504),
            (broken(Fault.CONNECT, Sent.NOT_SENT), 502),
            (broken(Fault.REMOTE_PROTOCOL), 502),
            (broken(Fault.LOCAL_PROTOCOL, Sent.NOT_SENT), 400),
            (broken(Fault.CONNECT, Sent.NOT_SENT, local=True), 503),
            (broken(Fault.POOL_TIMEOUT, Sent.NOT_SENT, local=True), 503),
        ],
    )
    async def test_faults(self, error: UpstreamError, status: int) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: error))
        exchange = await Exchange("/", b"x").run(Gateway(balancer))
        assert exchange.status == status
        assert b"gateway-1" not in exchange.body
        await balancer.aclose()

    async def test_the_queue_is_full(self) -> None:
        go = anyio.Event()

        async def slow(*_: Any) -> Reply:
            await go.wait()
            return ok()

        balancer = balancing(ScriptedUpstream(slow), limits=Limits(concurrency=1, queue=0))
        first, second = Exchange(), Exchange()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first.run_aside, Gateway(balancer))
            await anyio.wait_all_tasks_blocked()
            await second.run(Gateway(balancer))
            go.set()
        assert (second.status, second.one(b"retry-after")) == (503, b"1")
        assert first.status == 200
        await balancer.aclose()


class TestFields:
    async def test_tell(self) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: ok(headers=[(b"X-Pathlb-Attempts", b"7")])))
        exchange = await Exchange().run(Gateway(balancer, tell=True))
        assert (exchange.one(b"x-pathlb-endpoint"), exchange.one(b"x-pathlb-attempts")) == (URL.encode(), b"1")
        exchange = await Exchange().run(Gateway(balancer))
        assert exchange.one(b"x-pathlb-attempts") == b"7"
        await balancer.aclose()

    async def test_tell_of_failures(self) -> None:
        balancer = balancing(*(ScriptedUpstream(lambda *_: broken()) for _ in range(2)))
        exchange = await Exchange().run(Gateway(balancer, tell=True))
        assert exchange.status == 502
        assert exchange.one(b"x-pathlb-attempts") == b"3"
        assert exchange.one(b"x-pathlb-endpoint").decode() in (URL, OTHER)
        balancer.drain(URL)
        balancer.drain(OTHER)
        exchange = await Exchange().run(Gateway(balancer, tell=True))
        assert exchange.status == 503
        assert [name for name, _ in exchange.headers] == [b"content-type", b"content-length", b"retry-after"]
        await balancer.aclose()

    async def test_request_rules(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        rules = {"X-Api-Key": "k\xe9y", "Cookie": None, "X-Forwarded-Proto": "https", "X-New": ""}
        headers = [(b"x-api-key", b"theirs"), (b"cookie", b"a=1"), (b"x-kept", b"1"), (b"x-api-key", b"again")]
        await Exchange(headers=headers).run(Gateway(balancer, set_request_headers=rules, name="gw"))
        assert only(upstream).headers == [
            (b"x-kept", b"1"),
            (b"x-forwarded-for", b"192.0.2.7"),
            (b"x-forwarded-host", b"www.test"),
            (b"x-real-ip", b"192.0.2.7"),
            (b"via", b"1.1 gw"),
            (b"x-api-key", b"k\xe9y"),
            (b"x-forwarded-proto", b"https"),
            (b"x-new", b""),
        ]

    async def test_response_rules(self) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: ok(headers=[(b"Server", b"inner"), (b"X-Kept", b"1")])))
        gateway = Gateway(balancer, set_response_headers={"Server": None, "Cache-Control": "no-store"})
        exchange = await Exchange().run(gateway)
        assert exchange.headers == [(b"content-length", b"2"), (b"x-kept", b"1"), (b"cache-control", b"no-store")]
        balancer.drain(URL)
        assert (await Exchange().run(gateway)).one(b"cache-control") == b"no-store"  # of its own answers, too
        await balancer.aclose()

    async def test_host(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        await Exchange().run(Gateway(balancer))
        await Exchange().run(Gateway(balancer, host="inner.test:81"))
        assert [request.host for request, _ in upstream.calls] == [b"www.test", b"inner.test:81"]

    async def test_timeouts_are_the_balancers(self) -> None:
        upstream = ScriptedUpstream()
        balancer = balancing(upstream)
        balancer.timeouts = Timeouts(read=7.0)  # as a profile's may be
        await Exchange().run(Gateway(balancer))
        assert only(upstream).timeouts == balancer.timeouts

    async def test_events_may_be_far_apart(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        await Exchange().run(Gateway(balancer))
        assert only(upstream).events_may_pause

    async def test_the_load_of_an_endpoint_is_not_the_callers_business(self) -> None:
        load = [(b"Endpoint-Load-Metrics", b"TEXT cpu_utilization=0.5"), (b"endpoint-load-metrics-bin", b"AAAA")]
        balancer = balancing(ScriptedUpstream(lambda *_: ok(headers=load)))
        exchange = await Exchange().run(Gateway(balancer))
        assert [name for name, _ in exchange.headers] == [b"content-length"]
        assert balancer.snapshot().endpoints[0].reported_load is not None
        await balancer.aclose()
        await balancer.aclose()

    async def test_field_names_that_servers_leave_as_they_came(
        self, balancer: Balancer, upstream: ScriptedUpstream
    ) -> None:
        exchange = Exchange()
        exchange.scope["headers"] = iter(
            [[b"HOST", b"www.test"], [b"X-A", b"1"], [b"Connection", b"x-b"], [b"X-B", b""]]
        )
        await exchange.run(Gateway(balancer))
        assert only(upstream).headers[0] == (b"x-a", b"1")
        assert b"x-b" not in dict(only(upstream).headers)


class TestCallerLeaves:
    """Whoever waits for a caller that has left is cancelled."""

    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lookout, "_LOOK_EVERY", 0.001)

    @pytest.mark.parametrize("parts", [(), (b"abc",)])
    async def test_while_the_upstream_has_not_answered(self, parts: tuple[bytes, ...]) -> None:
        cancelled = []

        async def hang(*_: Any) -> Reply:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                cancelled.append(True)
                raise

        balancer = balancing(ScriptedUpstream(hang))
        exchange = Exchange("/", *parts)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.receiving)
            exchange.leave()
        assert cancelled == [True]
        assert exchange.said == []
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    async def test_in_the_middle_of_a_reply(self) -> None:
        body = Parts([b"a", anyio.Event(), b"b"])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.receiving and exchange.body == b"a")
            exchange.leave()
        assert (body.cancelled, body.closed, exchange.failure) == (True, True, None)
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    async def test_in_the_middle_of_its_body(self) -> None:
        taking = Taking()
        balancer = balancing(ScriptedUpstream(taking))
        exchange = Exchange("/", PART, PART, anyio.Event(), b"x")
        never = exchange._parts[2]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.received == 2 * len(PART))
            exchange.leave()
            assert isinstance(never, anyio.Event)
            never.set()
        assert (taking.bodies, exchange.said, exchange.failure) == ([], [], None)
        assert balancer.snapshot().in_flight == 0
        await balancer.aclose()

    async def test_before_its_body_has_come(self, balancer: Balancer, upstream: ScriptedUpstream) -> None:
        exchange = Exchange("/", b"abc", b"d")
        exchange._parts.pop()
        exchange._parts.append(go := anyio.Event())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.received)
            exchange.leave()
            go.set()
        assert (upstream.count, exchange.said) == (0, [])

    async def test_during_the_reply_to_half_its_body(self) -> None:
        body = Parts([b"a", anyio.Event()])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(413, [], body)))
        exchange = Exchange("/", PART, PART, PART)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.receiving)
            exchange.leave()
        assert (body.cancelled, body.closed) == (True, True)
        await balancer.aclose()

    async def test_a_body_that_is_answered_early_is_let_go_of(self) -> None:
        balancer = balancing(ScriptedUpstream(lambda *_: ok(b"enough", status=413)))
        exchange = await Exchange("/", PART, PART, PART).run(Gateway(balancer))
        assert (exchange.status, exchange.body, exchange.whole) == (413, b"enough", True)
        assert exchange.received == 0
        await balancer.aclose()

    async def test_an_answered_caller_that_is_said_to_have_left(self) -> None:
        """As servers say of it when the last of the answer is sent: nothing is cancelled any more."""
        closing, closed = anyio.Event(), anyio.Event()

        class Slow(Parts):
            async def aclose(self) -> None:
                closing.set()
                await anyio.wait_all_tasks_blocked()
                await super().aclose()
                closed.set()

        go = anyio.Event()
        body = Slow([b"a", go])
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], body)))
        exchange = Exchange()
        real = exchange.send

        async def send(message: Message) -> None:
            await real(message)
            if exchange.whole:
                exchange.leave()

        exchange.send = send  # type: ignore[method-assign]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.receiving)
            go.set()
        assert closed.is_set()
        assert (exchange.failure, exchange.receiving) == (None, 0)
        await balancer.aclose()

    async def test_nobody_is_left_waiting_for_a_caller_that_stays(self) -> None:
        go = anyio.Event()
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], Parts([b"a", go]))))
        exchange = Exchange()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(exchange.run_aside, Gateway(balancer))
            await exchange.until(lambda: exchange.receiving)
            go.set()
            await exchange.until(lambda: exchange.whole and not exchange.receiving)
        await balancer.aclose()

    async def test_a_server_whose_receive_fails(self) -> None:
        go = anyio.Event()
        balancer = balancing(ScriptedUpstream(lambda *_: Reply(200, [], Parts([b"a", go]))))
        exchange = Exchange()

        async def receive() -> Message:
            go.set()
            raise OSError

        exchange.receive = receive  # type: ignore[method-assign]
        await exchange.run(Gateway(balancer))
        assert exchange.whole
        await balancer.aclose()


async def test_the_watch_costs_short_requests_nothing(balancer: Balancer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No task, no call of `receive`, and one timer for all of them."""
    gateway = Gateway(balancer)
    spawned, ticks = [], []
    await Exchange().run(gateway)
    runner = gateway._lookout._runner
    assert runner is not None
    monkeypatch.setattr(runner, "spawn", lambda *_, **__: spawned.append(1))
    monkeypatch.setattr(runner, "tick", lambda *_: ticks.append(1))
    gateway._lookout._looking = False
    exchanges = [Exchange("/", b"abc") if number % 2 else Exchange() for number in range(100)]
    for exchange in exchanges:
        await exchange.run(gateway)
    assert sum(exchange.calls for exchange in exchanges) == 50  # for the bodies
    assert (spawned, len(ticks)) == ([], 1)
    assert gateway._lookout._present == {}


class TestLifespan:
    class Conversation:
        """A server's side of it."""

        def __init__(self, app: ASGIApp) -> None:
            self._app = app
            self._to, self._inbox = anyio.create_memory_object_stream[str](2)
            self._from, self._outbox = anyio.create_memory_object_stream[Message](2)

        async def run(self) -> None:
            async def receive() -> Message:
                return {"type": await self._inbox.receive()}

            with self._to, self._inbox, self._from, self._outbox:
                await self._app({"type": "lifespan"}, receive, self._from.send)

        async def say(self, phase: str) -> Message:
            await self._to.send(f"lifespan.{phase}")
            with anyio.fail_after(PATIENCE):
                return await self._outbox.receive()

    async def test_balancers_live_as_long_as_the_server(self) -> None:
        upstreams = [ScriptedUpstream(), ScriptedUpstream()]
        one, two = (balancing(upstream) for upstream in upstreams)
        gateway = Gateway(one, routes=[Route(two, path="/two"), Route(one, path="/one")])
        assert gateway.balancers == [one, two]
        async with anyio.create_task_group() as tasks:
            server = self.Conversation(gateway)
            tasks.start_soon(server.run)
            assert await server.say("startup") == {"type": "lifespan.startup.complete"}
            assert (await Exchange("/two").run(gateway)).status == 200
            assert not upstreams[1].closed
            assert await server.say("shutdown") == {"type": "lifespan.shutdown.complete"}
        assert upstreams[1].closed
        assert (await Exchange("/two").run(gateway)).status == 500

    async def test_a_failed_startup_closes_what_was_started(self) -> None:
        upstream = ScriptedUpstream()
        one, two = balancing(upstream), balancing(ScriptedUpstream())
        await Exchange().run(Gateway(one))
        await two.aclose()
        async with anyio.create_task_group() as tasks:
            server = self.Conversation(Gateway(one, routes=[Route(two, path="/two")]))
            tasks.start_soon(server.run)
            failed = await server.say("startup")
        assert failed["type"] == "lifespan.startup.failed"
        assert "this Balancer is closed" in failed["message"]
        assert upstream.closed

    async def test_a_failed_shutdown_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        one, two = balancing(ScriptedUpstream()), balancing(ScriptedUpstream())
        closed = []

        async def fail() -> None:
            closed.append(True)
            raise RuntimeError("no")

        monkeypatch.setattr(one, "aclose", fail)
        async with anyio.create_task_group() as tasks:
            server = self.Conversation(Gateway(one, routes=[Route(two, path="/two")]))
            tasks.start_soon(server.run)
            await server.say("startup")
            failed = await server.say("shutdown")
        assert (failed["type"], closed) == ("lifespan.shutdown.failed", [True])
        assert two._closed

    async def test_without_one_it_starts_with_the_first_request(self) -> None:
        upstream = ScriptedUpstream()
        balancer = balancing(upstream)
        app = Starlette(routes=[Mount("/rpc", app=Gateway(balancer))])
        assert (await Exchange("/rpc/").run(app)).status == 200
        await balancer.aclose()
        assert upstream.closed

    async def test_other_scopes_are_nobody_s(self, balancer: Balancer) -> None:
        with pytest.raises(NotImplementedError):
            await Gateway(balancer)({"type": "tea"}, Exchange().receive, Exchange().send)


class TestConfigErrors:
    @pytest.fixture
    def one(self) -> Iterator[Balancer]:
        return balancing(ScriptedUpstream())  # type: ignore[return-value]

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"max_body": -1}, "max_body"),
            ({"max_body": 1.5}, "max_body"),
            ({"max_body": "1"}, "max_body"),
            ({"rewrite": "/a"}, "rewrite"),
            ({"rewrite": ("/a",)}, "rewrite"),
            ({"rewrite": ("a", "/b")}, "rewrite"),
            ({"rewrite": ("/a", "/b?c")}, "rewrite"),
            ({"rewrite": ("/a b", "/c")}, "rewrite"),
            ({"rewrite": ("/é", "/c")}, "rewrite"),
            ({"host": ""}, "host"),
            ({"host": "a b"}, "host"),
            ({"host": "a\r\nX: 1"}, "host"),
            ({"host": "é"}, "host"),
            ({"host": 7}, "host"),
            ({"name": ""}, "name"),
            ({"name": "a b"}, "name"),
            ({"name": "a,b"}, "name"),
            ({"name": "é"}, "name"),
            ({"trusted": "127.0.0.1"}, "trusted"),
            ({"trusted": ["localhost"]}, "trusted"),
            ({"trusted": ["10.0.0.0/33"]}, "trusted"),
            ({"set_request_headers": {"a b": "c"}}, "set_request_headers"),
            ({"set_request_headers": {"": "c"}}, "set_request_headers"),
            ({"set_request_headers": {"a": "c\r\nd: e"}}, "set_request_headers"),
            ({"set_request_headers": {"a": "\u2603"}}, "set_request_headers"),
            ({"set_request_headers": {"a": 0}}, "set_request_headers"),
            ({"set_request_headers": {"Host": "a"}}, "host="),
            ({"set_request_headers": {"Content-Length": "1"}}, "set_request_headers"),
            ({"set_request_headers": ["a"]}, "set_request_headers"),
            ({"set_response_headers": {"Transfer-Encoding": None}}, "set_response_headers"),
            ({"set_response_headers": {"Connection": "close"}}, "set_response_headers"),
        ],
    )
    def test_gateway(self, options: dict[str, Any], name: str, one: Balancer) -> None:
        with pytest.raises(ConfigError, match=name):
            Gateway(one, **options)

    def test_nothing_to_balance_over(self) -> None:
        with pytest.raises(ConfigError, match="balancer"):
            Gateway()

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"path": "a"}, "path"),
            ({"path": "/a b"}, "path"),
            ({"path": "/a?b"}, "path"),
            ({"path": 7}, "path"),
            ({"host": "a:80"}, "host"),
            ({"host": ""}, "host"),
            ({"host": "a b"}, "host"),
            ({"host": "[::1"}, "host"),
            ({"host": "a..b"}, "host"),
            ({"header": ""}, "header"),
            ({"header": "a b"}, "header"),
            ({"header": ("a", "b", "c")}, "header"),
            ({"header": ("a", None)}, "header"),
            ({"header": ("a", "\u2603")}, "header"),
            ({"header": "X-Forwarded-For"}, "header"),
            ({"header": ("Host", "a")}, "header"),
        ],
    )
    def test_route(self, options: dict[str, Any], name: str, one: Balancer) -> None:
        with pytest.raises(ConfigError, match=f"Route.{name}"):
            Route(one, **options)

    def test_a_route_to_no_balancer(self) -> None:
        with pytest.raises(ConfigError, match=r"Route\.balancer"):
            Route("http://gateway.test")  # type: ignore[arg-type]

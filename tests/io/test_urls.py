"""Where a URL leads, which target and which Host go over the wire, and what never does."""

from __future__ import annotations

from typing import Any

import pytest
from io_helpers import Answer, Seen, Site, Stack, reply, scripted

import pathlb
from pathlb.exchange import Request
from pathlb.testing import Fleet, ScriptedUpstream
from pathlb.upstream.transport import TransportUpstream

pytestmark = pytest.mark.anyio


def only(fleet: Fleet) -> Any:
    """The one request that arrived."""
    (received,) = [one for gateway in fleet for one in gateway.received()]
    return received


def host_of(received: Any) -> bytes:
    (host,) = [value for name, value in received.headers if name.lower() == b"host"]
    return bytes(host)


class TestWhatIsBalanced:
    @pytest.mark.parametrize(
        ("base", "url", "target"),
        [
            ("", "/v1", b"/v1"),
            ("", "v1", b"/v1"),
            ("", "", b"/"),
            ("", "?a=b", b"/?a=b"),
            ("", "http://pathlb.invalid/v1", b"/v1"),
            ("http://path-gateway", "/v1", b"/v1"),
            ("http://path-gateway/api", "v1", b"/api/v1"),
            ("http://path-gateway/api/", "/v1?x=1", b"/api/v1?x=1"),
            ("http://path-gateway/api", "http://path-gateway/elsewhere", b"/elsewhere"),
            ("https://path-gateway:8443", "https://path-gateway:8443/v1", b"/v1"),
        ],
    )
    async def test_relative_urls_and_those_of_the_logical_origin(
        self, stack: Stack, fleet: Fleet, base: str, url: str, target: bytes
    ) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls, base_url=base) as client:
            assert (await client.get(url)).status_code == 200
        assert only(fleet).target == target

    async def test_an_endpoints_own_url_is_balanced_like_the_others(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls, policy=pathlb.RoundRobin()) as client:
            for _ in range(3):
                await client.get(f"{fleet.urls[0]}/v1")
        assert [len(gateway.received()) for gateway in fleet] == [1, 1, 1]

    @pytest.mark.parametrize(
        "url",
        [
            "http://evil.example/x",
            "http://path-gateway:81/x",
            "https://path-gateway/x",
            "//evil.example/x",
            "http://user:hunter2@evil.example/x?token=t0ps3cret",
        ],
    )
    async def test_another_absolute_url_is_an_error_that_names_it_and_nothing_is_sent(
        self, stack: Stack, fleet: Fleet, url: str
    ) -> None:
        async with stack.pathlb.AsyncClient(
            fleet.urls, base_url="http://path-gateway", headers={"Authorization": "Bearer s3cret"}
        ) as client:
            with pytest.raises(pathlb.UsageError) as caught:
                await client.get(url)
            assert isinstance(caught.value, stack.http.UnsupportedProtocol)
            assert caught.value.attempts == ()
        message = str(caught.value)
        assert stack.http.URL(url).host in message
        assert "mounts=" in message
        assert "hunter2" not in message
        assert "s3cret" not in message
        assert [gateway.stats().requests for gateway in fleet] == [0, 0, 0]

    async def test_the_other_scheme_of_an_endpoint_is_another_origin(self, stack: Stack, fleet: Fleet) -> None:
        """What was to be encrypted must not go out in the clear."""
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            with pytest.raises(pathlb.UsageError, match=r"https://127\.0\.0\.1"):
                await client.get(fleet.urls[0].replace("http:", "https:"))
        assert [gateway.stats().requests for gateway in fleet] == [0, 0, 0]

    async def test_mounts_take_other_hosts(self, stack: Stack, fleet: Fleet) -> None:
        with Site() as elsewhere:
            mounts = {elsewhere.url: stack.http.AsyncHTTPTransport()}
            async with stack.pathlb.AsyncClient(fleet.urls, mounts=mounts) as client:
                response = await client.get(f"{elsewhere.url}/x")
                assert (await client.get("/y")).headers["x-gateway"]
                assert "pathlb" not in response.extensions
        assert [seen.target for seen in elsewhere.seen] == ["/x"]
        assert only(fleet).target == b"/y"

    async def test_a_removed_endpoints_url_is_no_longer_known(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            client.balancer.update(fleet.urls[1:])
            with pytest.raises(pathlb.UsageError):
                await client.get(fleet.urls[0])


class TestTargets:
    @pytest.mark.parametrize(
        ("url", "target"),
        [
            ("/a%2Fb", b"/a%2Fb"),
            ("/x?a=b&c", b"/x?a=b&c"),
            ("/x?a=b&c&a=%20+", b"/x?a=b&c&a=%20+"),
            ("/x?", b"/x?"),
            ("/grün", b"/gr%C3%BCn"),
            ("/a//b", b"/a//b"),
            ("/%61;p=1/~x", b"/%61;p=1/~x"),
        ],
    )
    async def test_they_arrive_as_the_library_wrote_them(
        self, stack: Stack, fleet: Fleet, url: str, target: bytes
    ) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            response = await client.get(url)
            assert response.request.url.raw_path == target
        assert only(fleet).target == target

    async def test_dot_segments_survive_where_the_caller_can_write_them(self, stack: Stack, fleet: Fleet) -> None:
        """httpx's URL removes them; its `target` extension, and pathlb's own requests, do not."""
        async with stack.pathlb.AsyncClient([f"{fleet.urls[0]}/base"]) as client:
            await client.get("/x", extensions={"target": b"/a/../b?q"})
            reply = await client.balancer.send(Request("GET", b"/a/../b", []))
            await reply.body.aclose()
        assert [one.target for one in fleet[0].received()] == [b"/base/a/../b?q", b"/base/a/../b"]

    async def test_a_bad_target_extension_says_so(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            with pytest.raises(pathlb.ConfigError, match="target"):
                await client.get("/", extensions={"target": 5})

    @pytest.mark.parametrize(
        ("base", "url", "target"),
        [
            ("/gw", "/v1", b"/gw/v1"),
            ("/gw/", "/", b"/gw/"),
            ("/gw/a%2Fb", "/v1?x", b"/gw/a%2Fb/v1?x"),
        ],
    )
    async def test_base_paths_of_endpoints_are_kept(
        self, stack: Stack, fleet: Fleet, base: str, url: str, target: bytes
    ) -> None:
        async with stack.pathlb.AsyncClient([fleet.urls[0] + base]) as client:
            await client.get(url)
        assert only(fleet).target == target

    async def test_an_endpoints_own_url_below_its_base_path(self, stack: Stack, fleet: Fleet) -> None:
        endpoint = f"{fleet.urls[0]}/gw"
        async with stack.pathlb.AsyncClient([endpoint]) as client:
            await client.get(f"{endpoint}/v1?x")
            await client.get(endpoint)
            with pytest.raises(pathlb.UsageError, match="outside the base path") as caught:
                await client.get(f"{fleet.urls[0]}/admin?token=t0ps3cret")
        assert "t0ps3cret" not in str(caught.value)
        assert [one.target for one in fleet[0].received()] == [b"/gw/v1?x", b"/gw/"]

    async def test_two_base_paths_on_one_authority(self, stack: Stack, fleet: Fleet) -> None:
        endpoints = [f"{fleet.urls[0]}/a", f"{fleet.urls[0]}/a/b"]
        async with stack.pathlb.AsyncClient(endpoints, policy=pathlb.RoundRobin()) as client:
            for _ in range(2):
                await client.get(f"{endpoints[0]}/x")
            for _ in range(2):
                await client.get(f"{endpoints[1]}/x")
        assert sorted(one.target for one in fleet[0].received()) == [b"/a/b/x", b"/a/b/x", b"/a/x", b"/a/x"]

    async def test_a_transport_that_needs_a_real_url_gets_one(self, stack: Stack) -> None:
        seen: list[Any] = []

        def answer(request: Any) -> Any:
            seen.append(request)
            return stack.http.Response(200, text="mocked")

        def upstream(endpoint: pathlb.Endpoint) -> Any:
            return TransportUpstream(stack.http.MockTransport(answer), endpoint, stack=stack.http)

        async with stack.pathlb.AsyncClient(["http://a/base", "http://b/base"], upstream=upstream) as client:
            assert (await client.post("/v1%2F?q=1", content=b"x")).text == "mocked"
        (request,) = seen
        assert str(request.url).endswith("/base/v1%2F?q=1")
        assert request.url.host in ("a", "b")
        assert request.headers["host"] == request.url.host


class TestRedirects:
    """A redirect to a known endpoint's authority comes back into the balance with its credentials; no other leaves."""

    @staticmethod
    def redirecting(location: str) -> Site:
        return Site(lambda seen: Answer(302, [("Location", location)]) if seen.target == "/old" else Answer())

    @pytest.mark.parametrize("base", ["", "http://path-gateway"])
    async def test_to_an_endpoints_authority(self, stack: Stack, base: str) -> None:
        with Site() as second, self.redirecting(f"{second.url}/new?x=1") as first:
            async with stack.pathlb.AsyncClient(
                [first.url, second.url],
                base_url=base,
                follow_redirects=True,
                headers={"Authorization": "Bearer s3cret"},
            ) as client:
                client.balancer.drain(second.url)
                response = await client.get("/old")
                assert response.status_code == 200
                assert response.history[0].headers["location"] == "/new?x=1"
        assert [seen.target for seen in first.seen] == ["/old", "/new?x=1"], "balanced, not sent where it pointed"
        assert [seen.all("authorization") for seen in first.seen] == [["Bearer s3cret"]] * 2
        assert [seen.all("host") for seen in first.seen] == [[base[7:] or first.authority]] * 2
        assert not second.seen

    async def test_written_in_other_ways(self, stack: Stack) -> None:
        endpoints = ["http://gateway.internal", "https://[::1]"]
        locations = {
            b"HTTP://Gateway.Internal:80/new": b"/new",
            b"http://u:p@gateway.internal/new": b"/new",
            b"//gateway.internal/new": b"/new",
            b"https://[::1]:443/new#frag": b"/new#frag",
            b"http://gateway.internal": b"/",
            b"http://gateway.internal//evil/x": b"/evil/x",
            b"https://gateway.internal/new": None,
            b"http://gateway.internal:81/new": None,
            b"http://gateway.internal:bad/new": None,
            b"http://evil.example/new": None,
            b"//evil.example/new": None,
            b"/plain": None,
            b"plain": None,
            b"mailto:x@y": None,
            "http://gateway.internal/grün".encode("latin-1"): None,
        }
        for location, expected in locations.items():
            table = dict.fromkeys(endpoints, ScriptedUpstream([reply(301, [(b"Location", location)])]))
            balancer = pathlb.Balancer(endpoints, upstream=ScriptedUpstream.factory(table))
            async with balancer, stack.pathlb.AsyncClient(balancer) as client:
                assert await location_shown(client) == (expected or location)

    @pytest.mark.parametrize("location", ["http://evil.example/x", "//evil.example/x", "https://evil.example/x"])
    async def test_to_a_foreign_host_raises_and_sends_nothing_more(self, stack: Stack, location: str) -> None:
        with self.redirecting(location) as site:
            async with stack.pathlb.AsyncClient(
                [site.url], follow_redirects=True, headers={"Authorization": "Bearer s3cret"}
            ) as client:
                with pytest.raises(pathlb.UsageError, match=r"evil\.example"):
                    await client.get("/old")
                assert client.balancer.snapshot().in_flight == 0
        assert [seen.target for seen in site.seen] == ["/old"]

    async def test_base_paths_are_taken_off_and_put_on_again(self, stack: Stack) -> None:
        site: Site

        def answer(seen: Seen) -> Answer:
            locations = {"/gw/old": "/gw/middle", "/gw/middle": f"{site.url}/gw/new", "/gw/away": f"{site.url}/admin"}
            location = locations.get(seen.target)
            return Answer(302, [("Location", location)]) if location else Answer()

        with Site(answer) as site:
            endpoint = f"{site.url}/gw"
            async with stack.pathlb.AsyncClient([endpoint], follow_redirects=True) as client:
                assert (await client.get("/old")).status_code == 200
                assert [seen.target for seen in site.seen] == ["/gw/old", "/gw/middle", "/gw/new"]
                # Addressed by its own URL, the endpoint has its base path in it.
                assert (await client.get(f"{endpoint}/old")).status_code == 200
                assert [seen.target for seen in site.seen[3:]] == ["/gw/old", "/gw/middle", "/gw/new"]
                with pytest.raises(pathlb.UsageError, match="outside the base path"):
                    await client.get("/away")


async def location_shown(client: Any) -> bytes:
    """The Location the caller sees, also where the library would not follow it."""
    request = client.build_request("GET", "/")
    response = await client._transport.handle_async_request(request)
    await response.aclose()
    return bytes(dict(response.headers.raw)[b"Location"])


class TestHost:
    """What the caller wrote for a logical host, else the chosen endpoint's authority; `host=` overrides."""

    @pytest.mark.parametrize(
        ("options", "url", "headers", "expected"),
        [
            ({}, "/v1", {}, None),
            ({}, "http://pathlb.invalid/v1", {}, None),
            ({"base_url": "http://path-gateway/v1"}, "/x", {}, b"path-gateway"),
            ({"base_url": "http://path-gateway:8080"}, "/x", {}, b"path-gateway:8080"),
            ({"base_url": "http://path-gateway"}, "/x", {"Host": "written.example"}, b"written.example"),
            ({}, "/x", {"host": "written.example"}, b"written.example"),
            ({"host": "override.example"}, "/x", {}, b"override.example"),
            ({"host": "override.example:99"}, "/x", {"Host": "written.example"}, b"override.example:99"),
            ({"host": "override.example", "base_url": "http://path-gateway"}, "/x", {}, b"override.example"),
        ],
    )
    async def test_the_clients(
        self, stack: Stack, fleet: Fleet, options: Any, url: str, headers: Any, expected: bytes | None
    ) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls, **options) as client:
            response = await client.get(url, headers=headers)
        chosen = response.extensions["pathlb"]["attempts"][-1].endpoint
        assert host_of(only(fleet)) == (expected or chosen.removeprefix("http://").encode())

    async def test_an_endpoints_own_url(self, stack: Stack, fleet: Fleet) -> None:
        """The one it is sent to, not the one it was addressed to: an instance may not know its peers' names."""
        async with stack.pathlb.AsyncClient(fleet.urls) as client:
            await client.get(fleet.urls[0], extensions={"pathlb": {"pin": fleet.urls[1]}})
        assert host_of(only(fleet)) == fleet.urls[1].removeprefix("http://").encode()

    @pytest.mark.parametrize(
        ("host", "url", "expected"),
        [
            (None, "http://path-gateway/v1", b"path-gateway"),
            (None, "https://path-gateway:444/v1", b"path-gateway:444"),
            ("override.example", "http://path-gateway/v1", b"override.example"),
        ],
    )
    async def test_a_transports(self, stack: Stack, fleet: Fleet, host: str | None, url: str, expected: bytes) -> None:
        async with pathlb.Balancer(fleet.urls) as balancer:
            transport = stack.pathlb.BalancedTransport(balancer, host=host)
            async with stack.http.AsyncClient(transport=transport) as client:
                await client.get(url)
        assert host_of(only(fleet)) == expected

    async def test_a_retry_gets_its_own_endpoints_host(self, stack: Stack, fleet: Fleet) -> None:
        async with stack.pathlb.AsyncClient(fleet.urls, policy=pathlb.RoundRobin()) as client:
            fleet[0].kill()
            for _ in range(3):
                await client.get("/")
        for gateway in (fleet[1], fleet[2]):
            assert {host_of(one) for one in gateway.received()} == {gateway.url.removeprefix("http://").encode()}

    @pytest.mark.parametrize("host", ["", "a b", "a/b", "u@h", "grün.example", "a\r\nX: y", "h?q", "h#f"])
    async def test_a_bad_one_is_refused_at_construction(self, stack: Stack, host: str) -> None:
        for make in (
            lambda: stack.pathlb.AsyncClient(["http://a"], host=host),
            lambda: stack.pathlb.BalancedTransport(pathlb.Balancer(["http://a"]), host=host),
        ):
            with pytest.raises(pathlb.ConfigError) as caught:
                make()
            assert caught.value.field == "host"


async def test_order_duplicates_and_case_of_headers_survive(stack: Stack, fleet: Fleet) -> None:
    mine = [(b"X-One", b"1"), (b"x-TWO", b"2"), (b"X-One", b"3"), (b"accept", b"a/b"), (b"X-Empty", b"")]
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        request = stack.http.Request("GET", client.base_url.join("/"), headers=mine)
        await client.send(request)
    headers = only(fleet).headers
    assert headers[0][0] == b"Host", "first, as RFC 9110 advises"
    assert headers[1:] == mine


async def test_a_host_header_in_the_middle_moves_to_the_front(stack: Stack, fleet: Fleet) -> None:
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        request = stack.http.Request("GET", client.base_url, headers=[(b"A", b"1"), (b"hOST", b"h"), (b"B", b"2")])
        await client.send(request)
    assert only(fleet).headers == [(b"Host", b"h"), (b"A", b"1"), (b"B", b"2")]


async def test_two_hosts_are_not_sent(stack: Stack, fleet: Fleet) -> None:
    """Two readers of such a request may see two different ones."""
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        request = stack.http.Request("GET", client.base_url, headers=[(b"Host", b"one"), (b"host", b"two")])
        with pytest.raises(stack.http.LocalProtocolError):
            await client.send(request)
    assert [gateway.stats().requests for gateway in fleet] == [0, 0, 0]


async def test_names_of_scripted_endpoints(stack: Stack) -> None:
    """A URL with a default port written out is the same origin."""
    balancer = scripted(ScriptedUpstream())
    async with balancer, stack.pathlb.AsyncClient(balancer) as client:
        assert (await client.get("http://a:80/x")).status_code == 200

"""How endpoints are reached: TLS, unix sockets, IPv6, HTTP/2, proxies; each setting for every endpoint."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
import trustme
from io_helpers import Answer, Site, Stack

import pathlb
from pathlb.testing import Fleet
from pathlb.upstream.transport import TransportUpstreams

pytestmark = pytest.mark.anyio


def server_context(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class TestTLS:
    async def test_a_context_for_all_endpoints(self, stack: Stack, authority: trustme.CA) -> None:
        context = server_context(authority, "127.0.0.1")
        with Site(tls=context) as first, Site(tls=context) as second:
            async with stack.pathlb.AsyncClient(
                [first.url, second.url], verify=client_context(authority), policy=pathlb.RoundRobin()
            ) as client:
                for _ in range(4):
                    assert (await client.get("/")).status_code == 200
            assert (len(first.seen), len(second.seen)) == (2, 2)
            assert first.connections == 1, "kept alive"

    async def test_an_unknown_authority_is_refused_and_nothing_was_sent(
        self, stack: Stack, authority: trustme.CA
    ) -> None:
        with Site(tls=server_context(authority, "127.0.0.1")) as site:
            async with stack.pathlb.AsyncClient([site.url]) as client:
                with pytest.raises(stack.http.ConnectError, match="CERTIFICATE_VERIFY_FAILED") as caught:
                    await client.post("/")
        assert {attempt.sent for attempt in caught.value.attempts} == {pathlb.errors.Sent.NOT_SENT}
        assert not site.seen

    async def test_verify_false(self, stack: Stack, authority: trustme.CA) -> None:
        with Site(tls=server_context(authority, "elsewhere.example")) as site:
            async with stack.pathlb.AsyncClient([site.url], verify=False) as client:
                assert (await client.get("/")).status_code == 200

    async def test_the_name_is_the_endpoints_host(self, stack: Stack, authority: trustme.CA) -> None:
        """Not the logical name the caller uses, which is for the Host header."""
        with Site(tls=server_context(authority, "localhost")) as site:
            endpoint = f"https://localhost:{site.port}"
            async with stack.pathlb.AsyncClient(
                [endpoint], verify=client_context(authority), base_url="https://path-gateway"
            ) as client:
                assert (await client.get("/")).status_code == 200
        assert site.names == ["localhost"]
        assert site.seen[0].all("host") == ["path-gateway"]

    async def test_server_hostname_overrides_it(self, stack: Stack, authority: trustme.CA) -> None:
        with Site(tls=server_context(authority, "gateway.example")) as site:
            named = pathlb.Endpoint(site.url, server_hostname="gateway.example")
            async with stack.pathlb.AsyncClient([named], verify=client_context(authority)) as client:
                assert (await client.get("/")).status_code == 200
            assert site.names == ["gateway.example"]
            async with stack.pathlb.AsyncClient([site.url], verify=client_context(authority)) as client:
                with pytest.raises(stack.http.ConnectError):
                    await client.get("/")

    async def test_a_client_certificate(self, stack: Stack, authority: trustme.CA) -> None:
        server = server_context(authority, "127.0.0.1")
        server.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(server)
        mine = client_context(authority)
        authority.issue_cert("client.example").configure_cert(mine)
        with Site(tls=server) as site:
            async with stack.pathlb.AsyncClient([site.url], verify=mine) as client:
                await client.get("/")
        ((_, name),) = site.seen[0].peer["subjectAltName"]
        assert name == "client.example"

    async def test_plain_endpoints_load_no_certificates(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        def loaded(*args: Any, **kwargs: Any) -> ssl.SSLContext:
            raise AssertionError("20 ms for nothing")

        monkeypatch.setattr(stack.http, "create_ssl_context", loaded)
        await stack.pathlb.AsyncClient(["http://a", "http://b"]).aclose()
        with pytest.raises(AssertionError):
            stack.pathlb.AsyncClient(["https://a"])

    @pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("given", [{"cert": "/nowhere.pem"}, {"verify": "/nowhere.pem"}])
    def test_certificates_that_cannot_be_loaded(self, stack: Stack, given: Any) -> None:
        with pytest.raises(pathlb.ConfigError, match="verify or cert"):
            TransportUpstreams(**given, stack=stack.http)(pathlb.Endpoint("https://a"))


async def test_unix_sockets(stack: Stack) -> None:
    with Fleet(2, uds=True, record=True) as fleet:
        async with stack.pathlb.AsyncClient(fleet.urls, policy=pathlb.RoundRobin()) as client:
            for _ in range(4):
                assert (await client.get("/v1?x")).status_code == 200
            fleet[0].kill()
            assert (await client.get("/v1")).headers["x-gateway"] == "gateway-1"
        received = fleet[1].received()
    assert received[0].target == b"/v1?x"
    assert (b"Host", b"localhost") in received[0].headers


async def test_ipv6(stack: Stack) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with Site(family=socket.AF_INET6) as site:
        async with stack.pathlb.AsyncClient([site.url]) as client:
            response = await client.get("/")
            assert response.extensions["pathlb"]["attempts"][0].endpoint == f"http://[::1]:{site.port}"
            assert (await client.get(f"{site.url}/own")).status_code == 200
    assert [seen.all("host") for seen in site.seen] == [[site.authority]] * 2


class H2Server:
    """HTTP/2 that says which stream answered; with TLS by ALPN, without by prior knowledge."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self.streams: list[dict[bytes, bytes]] = []
        server = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                sock = self.request if tls is None else tls.wrap_socket(self.request, server_side=True)
                server.connections += 1
                with sock, contextlib.suppress(OSError):
                    server.talk(sock)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True

        if tls is not None:
            tls.set_alpn_protocols(["h2"])
        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    def talk(self, sock: socket.socket) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        sock.sendall(connection.data_to_send())
        while data := sock.recv(65536):
            for event in connection.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    assert event.headers is not None
                    self.streams.append({bytes(name): bytes(value) for name, value in event.headers})
                if isinstance(event, h2.events.StreamEnded):
                    assert event.stream_id is not None
                    connection.send_headers(event.stream_id, [(":status", "200"), ("x-stream", str(event.stream_id))])
                    connection.send_data(event.stream_id, b"two", end_stream=True)
            sock.sendall(connection.data_to_send())

    @contextlib.contextmanager
    def running(self) -> Iterator[H2Server]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()
            self._server.server_close()


async def test_http2_by_prior_knowledge(stack: Stack) -> None:
    with H2Server().running() as server:
        async with stack.pathlb.AsyncClient(
            [f"{server.url}/base"], http1=False, http2=True, base_url="http://path-gateway"
        ) as client:
            replies = [await client.post("/v1?x", content=b"body") for _ in range(3)]
    assert [response.http_version for response in replies] == ["HTTP/2"] * 3
    assert [response.content for response in replies] == [b"two"] * 3
    assert [response.headers["x-stream"] for response in replies] == ["1", "3", "5"], "one connection, three streams"
    assert server.connections == 1
    assert server.streams[0][b":authority"] == b"path-gateway"
    assert server.streams[0][b":path"] == b"/base/v1?x"


async def test_http2_over_tls(stack: Stack, authority: trustme.CA) -> None:
    with H2Server(server_context(authority, "127.0.0.1")).running() as server:
        async with stack.pathlb.AsyncClient([server.url], verify=client_context(authority), http2=True) as client:
            assert (await client.get("/")).http_version == "HTTP/2"


async def test_a_proxy_in_between(stack: Stack) -> None:
    """It sees the chosen endpoint's address, whatever the Host says."""
    with Site(lambda seen: Answer(200, [], seen.target.encode())) as proxy:
        async with stack.pathlb.AsyncClient(
            ["http://gateway.example:8080/base"], proxy=proxy.url, base_url="http://path-gateway"
        ) as client:
            response = await client.get("/v1?x")
    assert response.text == "http://gateway.example:8080/base/v1?x"
    assert proxy.seen[0].all("host") == ["path-gateway"]


async def test_the_environments_proxies_are_not_used(
    stack: Stack, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would put one hop that can fail between the client and all its gateways."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    async with stack.pathlb.AsyncClient(fleet.urls) as client:
        assert (await client.get("/")).status_code == 200

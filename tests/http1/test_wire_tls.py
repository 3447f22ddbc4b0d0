"""TLS: what is offered and verified, and servers that break off at every stage."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trustme
from http1_kit import PATIENCE, quiet, turns
from http1_servers import Server, ask, assert_at_rest, content, exchange, failure, timers
from http1_tls import TLSPeer, client_context, server_context

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault
from pathlb.testing import http_reply
from pathlb.upstream.http1 import Http1Upstream, Pool

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Bench:
    """A pool that speaks TLS to a server that is played by hand."""

    def __init__(self, server: Server, upstream: Http1Upstream, context: ssl.SSLContext) -> None:
        self.server = server
        self.upstream = upstream
        self.context = context
        self.asked: list[str | None] = []
        context.sni_callback = lambda _, name, __: self.asked.append(name)

    async def accept(self) -> TLSPeer:
        return TLSPeer(await self.server.accept(), self.context)

    def send(self, **extensions: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.upstream.send(ask(extensions=extensions), []))

    async def connected(self) -> tuple[asyncio.Task[Any], TLSPeer]:
        """A request that waits for its reply."""
        request = self.send()
        peer = await self.accept()
        await peer.handshake()
        await peer.request()
        return request, peer

    async def idle(self) -> TLSPeer:
        """A connection that has carried a request."""
        request, peer = await self.connected()
        await peer.send(http_reply())
        await content(await request)
        return peer


@contextlib.asynccontextmanager
async def bench(
    authority: trustme.CA,
    *,
    certificate: str = "127.0.0.1",
    host: str = "127.0.0.1",
    server_hostname: str | None = None,
    trusting: bool = True,
    **pool: Any,
) -> AsyncIterator[Bench]:
    theirs = server_context(authority, certificate)
    mine = client_context(authority) if trusting else ssl.create_default_context()
    async with quiet(), Server() as server:
        endpoint = Endpoint(f"https://{host}:{server.port}", server_hostname=server_hostname)
        upstream = Http1Upstream(endpoint, Pool(keepalive_expiry=1e6, **pool), mine)
        try:
            yield Bench(server, upstream, theirs)
        finally:
            async with asyncio.timeout(PATIENCE):
                await upstream.aclose()
                await turns()
        await server.deserted()
        assert upstream._open == set()
        assert upstream._dialling == 0
        assert timers() == []


class TestHandshake:
    async def test_a_request(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request = one.send()
            peer = await one.accept()
            await peer.handshake()
            assert await peer.answer() == b"GET / HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % one.server.port
            reply = await request
            assert await content(reply) == b"ok"
            tls = reply.extensions["network_stream"].get_extra_info("ssl_object")
            assert tls.version() == "TLSv1.3"
            again = asyncio.create_task(exchange(one.upstream))
            await peer.answer()
            assert (await again).reused
            assert_at_rest(one.upstream, 1)

    async def test_http_1_1_is_offered_and_nothing_else(self, authority: trustme.CA) -> None:
        """A server that could do HTTP/2 would speak it."""
        async with bench(authority) as one:
            one.context.set_alpn_protocols(["h2", "http/1.1"])
            peer = await one.idle()
            assert peer.tls.selected_alpn_protocol() == "http/1.1"

    @pytest.mark.parametrize(
        ("server_hostname", "extensions", "asked"),
        [
            (None, {}, "localhost"),
            ("gateway.example", {}, "gateway.example"),
            (None, {"sni_hostname": "gateway.example"}, "gateway.example"),
            ("other.example", {"sni_hostname": "gateway.example"}, "gateway.example"),
        ],
    )
    async def test_the_name(
        self, server_hostname: str | None, extensions: dict[str, str], asked: str, authority: trustme.CA
    ) -> None:
        """The endpoint's host, unless the endpoint says otherwise, unless the request does. It is verified, too."""
        async with bench(authority, certificate=asked, host="localhost", server_hostname=server_hostname) as one:
            request = one.send(**extensions)
            peer = await one.accept()
            await peer.handshake()
            assert b"\r\nHost: localhost:" in await peer.answer()
            assert (await request).status == 200
            assert one.asked == [asked]

    @pytest.mark.parametrize("why", ["unknown authority", "wrong name"])
    async def test_a_bad_certificate(self, why: str, authority: trustme.CA) -> None:
        certificate = "elsewhere.example" if why == "wrong name" else "127.0.0.1"
        async with bench(authority, certificate=certificate, trusting=why == "wrong name") as one:
            request = one.send()
            peer = await one.accept()
            with contextlib.suppress(ssl.SSLError, EOFError, ConnectionError):
                await peer.handshake()
            error = await failure(request)
            assert (error.fault, error.sent, error.local) == (Fault.CONNECT, Sent.NOT_SENT, False)
            assert "CERTIFICATE_VERIFY_FAILED" in error.detail
            await peer.peer.gone()

    async def test_one_that_hangs(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            error = await failure(one.upstream.send(ask(connect=0.05), []))
            assert (error.fault, error.sent) == (Fault.CONNECT_TIMEOUT, Sent.NOT_SENT)
            assert "TLS" in error.detail
            await (await one.server.accept()).gone()

    async def test_cancelled_in_the_middle(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request = one.send()
            peer = await one.server.accept()
            await peer.exactly(10)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert one.upstream._dialling == 0
            await peer.gone()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda one: one.name)
    async def test_cancelled_at_every_turn_of_the_loop(self, version: ssl.TLSVersion, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            one.context.maximum_version = version

            async def serve() -> None:
                while True:
                    peer = await one.accept()
                    with contextlib.suppress(EOFError, ConnectionError, ssl.SSLError):
                        await peer.handshake()
                        await peer.answer()

            serving = asyncio.create_task(serve())
            for at in itertools.count(1):
                request = one.send()
                await turns(at)
                request.cancel()
                await asyncio.wait([request])
                if not request.cancelled():
                    assert (await request).status == 200
                for connection in list(one.upstream._open):
                    connection.close()
                await turns(10)
                assert one.upstream._dialling == 0
                assert one.upstream._open == set()
                if not request.cancelled():
                    break
            serving.cancel()
            await asyncio.wait([serving])
            assert at > 6

    @pytest.mark.parametrize("how", ["closes", "resets", "speaks HTTP", "speaks first"])
    async def test_a_server_that_does_not_do_it(self, how: str, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request = one.send()
            peer = await one.server.accept()
            if how == "speaks first":
                await peer.send(b"220 smtp.example ESMTP\r\n")
            else:
                await peer.exactly(10)
            if how == "closes":
                peer.fin()
            elif how == "resets":
                peer.reset()
            elif how == "speaks HTTP":
                await peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            error = await failure(request)
            assert (error.fault, error.sent, error.local) == (Fault.CONNECT, Sent.NOT_SENT, False)
            assert error.detail
            await peer.gone()

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda one: one.name)
    async def test_a_server_that_says_goodbye_at_once(self, version: ssl.TLSVersion, authority: trustme.CA) -> None:
        """With the last bytes of its handshake: the connection is over before anybody has had it."""
        async with bench(authority) as one:
            one.context.maximum_version = version
            request = one.send()
            peer = await one.accept()
            await peer.handshake(flush=False)
            peer.say_goodbye()
            await peer.flush()
            peer.peer.fin()
            error = await failure(request)
            assert error.fault in (Fault.CONNECT, Fault.READ, Fault.REMOTE_PROTOCOL)


class TestEnds:
    async def test_an_idle_connection_is_closed(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            peer = await one.idle()
            peer.say_goodbye()
            await peer.flush()
            await peer.peer.gone()
            assert one.upstream._take() is None

    async def test_an_idle_connection_is_cut(self, authority: trustme.CA) -> None:
        """Without a goodbye."""
        async with bench(authority) as one:
            peer = await one.idle()
            peer.peer.fin()
            await peer.peer.gone()
            assert one.upstream._take() is None

    async def test_bytes_nobody_asked_for(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            peer = await one.idle()
            await peer.send(http_reply(body=b"not yours"))
            await peer.peer.gone()
            assert one.upstream._take() is None

    async def test_session_tickets_are_none(self, authority: trustme.CA) -> None:
        """TLS 1.3 sends them when it likes, on connections that are idle, too."""
        async with bench(authority) as one:
            request, peer = await one.connected()
            await peer.send(http_reply())
            await request
            peer.tls.context.num_tickets = 2
            again = asyncio.create_task(exchange(one.upstream))
            await peer.answer()
            assert (await again).reused

    @pytest.mark.parametrize("goodbye", [True, False], ids=["goodbye", "cut"])
    async def test_before_the_reply(self, goodbye: bool, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request, peer = await one.connected()
            if goodbye:
                peer.say_goodbye()
                await peer.flush()
            peer.peer.fin()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.REMOTE_PROTOCOL, Sent.MAYBE_SENT)
            assert "without sending a reply" in error.detail
            await peer.peer.gone()

    @pytest.mark.parametrize("goodbye", [True, False], ids=["goodbye", "cut"])
    async def test_within_a_body_with_a_length(self, goodbye: bool, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request, peer = await one.connected()
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = aiter((await request).body)
            assert await anext(body) == b"ab"
            if goodbye:
                peer.say_goodbye()
                await peer.flush()
            peer.peer.fin()
            assert (await failure(anext(body))).fault is Fault.REMOTE_PROTOCOL

    @pytest.mark.parametrize("goodbye", [True, False], ids=["goodbye", "cut"])
    async def test_of_a_body_without_a_length(self, goodbye: bool, authority: trustme.CA) -> None:
        """It is whole in both cases, as with httpx: servers that cut are too common."""
        async with bench(authority) as one:
            request, peer = await one.connected()
            await peer.send(b"HTTP/1.1 200 OK\r\n\r\nall")
            if goodbye:
                peer.say_goodbye()
                await peer.flush()
            peer.peer.fin()
            assert await content(await request) == b"all"
            await peer.peer.gone()

    async def test_a_slow_reader_holds_the_server_up(self, authority: trustme.CA) -> None:
        async with bench(authority) as one:
            request, peer = await one.connected()
            data = bytes(range(256)) * 80_000
            await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data))
            body: Any = (await request).body
            sending = asyncio.create_task(peer.send(data))
            [connection] = one.upstream._open
            async with asyncio.timeout(PATIENCE):
                while not connection._reading_paused:
                    await turns()
            await turns(20)
            assert body.held <= 65_536 + 2 * 262_144
            assert not sending.done()
            assert await content(await request) == data
            await sending

    async def test_a_closed_connection_gives_its_place_back_at_once(self, authority: trustme.CA) -> None:
        """`Pool.max_connections` counts those that are open."""
        async with bench(authority, max_connections=1) as one:

            async def serve() -> None:
                for _ in range(3):
                    peer = await one.accept()
                    await peer.handshake()
                    await peer.answer(http_reply(headers=[(b"Connection", b"close")]))

            serving = asyncio.create_task(serve())
            try:
                for _ in range(3):
                    await exchange(one.upstream)
            finally:
                serving.cancel()
                await asyncio.wait([serving])

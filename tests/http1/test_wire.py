"""What goes over the wire: the exact bytes of requests, and what comes of the bytes of replies."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from http1_kit import PATIENCE, turns
from http1_servers import Stream, answering, ask, bench, content, exchange, failure, moved_clock

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.exchange import Headers, OneShotBody, Request
from pathlb.testing import http_reply

pytestmark = pytest.mark.anyio

CHUNKED = (b"Transfer-Encoding", b"chunked")


def length(value: int) -> tuple[bytes, bytes]:
    return (b"Content-Length", b"%d" % value)


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([*lines, b"", b""])


HOST = b"Host: HOST"

# Name: (request, what goes over the wire). Bodies as functions: a stream can be sent once.
REQUESTS: dict[str, tuple[Callable[[], Request], bytes]] = {
    "GET": (lambda: ask(), head(b"GET / HTTP/1.1", HOST)),
    "query": (lambda: ask(target=b"/a/b?c=%20d&e"), head(b"GET /a/b?c=%20d&e HTTP/1.1", HOST)),
    "headers as they are, in order": (
        lambda: ask("DELETE", [(b"x-B", b"1"), (b"X-a", b"\xe9 \t,"), (b"x-b", b"2"), (b"Empty", b"")]),
        head(b"DELETE / HTTP/1.1", HOST, b"x-B: 1", b"X-a: \xe9 \t,", b"x-b: 2", b"Empty: "),
    ),
    "HEAD": (lambda: ask("HEAD"), head(b"HEAD / HTTP/1.1", HOST)),
    "OPTIONS *": (lambda: ask("OPTIONS", target=b"*"), head(b"OPTIONS * HTTP/1.1", HOST)),
    "POST": (
        lambda: ask("POST", body=b"hello"),
        head(b"POST / HTTP/1.1", HOST, b"Content-Length: 5") + b"hello",
    ),
    "POST with its length": (
        lambda: ask("POST", [(b"content-length", b"5"), (b"A", b"b")], b"hello"),
        head(b"POST / HTTP/1.1", HOST, b"content-length: 5", b"A: b") + b"hello",
    ),
    "empty POST": (lambda: ask("POST"), head(b"POST / HTTP/1.1", HOST, b"Content-Length: 0")),
    "empty PUT with its length": (
        lambda: ask("PUT", [length(0)]),
        head(b"PUT / HTTP/1.1", HOST, b"Content-Length: 0"),
    ),
    "GET with a body": (
        lambda: ask(body=b"hello"),
        head(b"GET / HTTP/1.1", HOST, b"Content-Length: 5") + b"hello",
    ),
    "stream": (
        lambda: ask("POST", body=Stream(b"hello", b"", b"x" * 16).body),
        head(b"POST / HTTP/1.1", HOST, b"Transfer-Encoding: chunked")
        + b"5\r\nhello\r\n10\r\nxxxxxxxxxxxxxxxx\r\n0\r\n\r\n",
    ),
    "empty stream": (
        lambda: ask("POST", body=Stream().body),
        head(b"POST / HTTP/1.1", HOST, b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ),
    "stream with its length": (
        lambda: ask("POST", [length(7)], Stream(b"hello", b"", b"ab").body),
        head(b"POST / HTTP/1.1", HOST, b"Content-Length: 7") + b"helloab",
    ),
    "empty stream with its length": (
        lambda: ask("POST", [length(0)], Stream().body),
        head(b"POST / HTTP/1.1", HOST, b"Content-Length: 0"),
    ),
    "bytes, chunked": (
        lambda: ask("POST", [CHUNKED], b"hello"),
        head(b"POST / HTTP/1.1", HOST, b"Transfer-Encoding: chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "no bytes, chunked": (
        lambda: ask("POST", [CHUNKED]),
        head(b"POST / HTTP/1.1", HOST, b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    ),
    "stream, chunked": (
        lambda: ask("POST", [(b"transfer-encoding", b"Chunked")], Stream(b"hello").body),
        head(b"POST / HTTP/1.1", HOST, b"transfer-encoding: Chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "another host": (
        lambda: ask(host=b"path-gateway"),
        head(b"GET / HTTP/1.1", b"Host: path-gateway"),
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
async def test_request(name: str) -> None:
    make, expected = REQUESTS[name]
    async with bench() as (server, upstream):
        request = asyncio.create_task(exchange(upstream, make()))
        peer = await server.accept()
        raw = expected.replace(b": HOST\r\n", b": 127.0.0.1:%d\r\n" % server.port)
        async with asyncio.timeout(PATIENCE):
            assert await peer.exactly(len(raw)) == raw
        await peer.send(http_reply(body=b"") if b"HEAD " not in raw else b"HTTP/1.1 200 OK\r\n\r\n")
        await request
        assert peer.arrived() == b"", "and not one byte more"
        assert len(upstream._idle) == 1


async def test_the_base_path_and_extra_headers() -> None:
    async with bench(path="/base/path") as (server, upstream):
        request = asyncio.create_task(upstream.send(ask(target=b"/v1?x", headers=[(b"A", b"1")]), [(b"B", b"2")]))
        peer = await server.accept()
        expected = head(b"GET /base/path/v1?x HTTP/1.1", b"Host: 127.0.0.1:%d" % server.port, b"A: 1", b"B: 2")
        assert await peer.answer() == expected
        await request


@pytest.mark.parametrize("name", ["traceparent", "Connection"])
async def test_the_request_is_not_changed(name: str) -> None:
    """It is sent again, elsewhere, when this fails."""
    async with bench(answering) as (_, upstream):
        request = ask("POST", [(b"A", b"1")], b"x")
        await upstream.send(request, [(name.encode(), b"close")])
        assert request.headers == [(b"A", b"1")]


async def test_head_and_body_go_out_in_one_write() -> None:
    """One packet: a server that reads once has it all."""
    async with bench() as (server, upstream):
        request = asyncio.create_task(exchange(upstream, ask("POST", body=b"x" * 1000)))
        peer = await server.accept()
        await peer.head()
        assert len(peer._inbox) == 1000
        await peer.exactly(1000)
        await peer.send(http_reply())
        await request
        request = asyncio.create_task(exchange(upstream, ask("POST", body=b"hello")))
        await turns(1)
        assert peer.arrived().endswith(b"\r\n\r\nhello"), "at the first turn, on a connection that is there"
        await peer.send(http_reply())
        await request


BAD: dict[str, Request] = {
    "line end in a value": ask(headers=[(b"A", b"b\r\nEvil: yes")]),
    "line end in the host": ask(host=b"a\r\nEvil: yes"),
    "space in the target": ask(target=b"/ HTTP/1.1\r\nEvil: yes\r\n\r\n"),
    "wrong length": ask("POST", [length(3)], b"hello"),
    "two framings": ask("POST", [length(5), CHUNKED], b"hello"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_no_request_is_not_sent(name: str) -> None:
    async with bench() as (server, upstream):
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(BAD[name], [])
        assert (caught.value.fault, caught.value.sent) == (Fault.LOCAL_PROTOCOL, Sent.NOT_SENT)
        assert "Evil" not in str(caught.value), "values may be secrets"
        assert server.connections == 0


async def test_extra_headers_are_checked_too() -> None:
    async with bench() as (server, upstream):
        with pytest.raises(UpstreamError) as caught:
            await upstream.send(ask(), [(b"A", b"b\r\nEvil: yes")])
        assert caught.value.fault is Fault.LOCAL_PROTOCOL
        assert server.connections == 0


class TestReply:
    async def test_all_of_it(self) -> None:
        raw = b"HTTP/1.1 203 Not Quite\r\nX-One: 1\r\nx-two:  2 \r\nX-One: 3\r\nContent-Length: 2\r\n\r\nok"
        async with bench(lambda peer: answering(peer, raw)) as (_, upstream):
            reply = await upstream.send(ask(), [])
            assert (reply.status, reply.reason, reply.http_version) == (203, b"Not Quite", b"HTTP/1.1")
            expected: Headers = [(b"X-One", b"1"), (b"x-two", b"2"), (b"X-One", b"3"), (b"Content-Length", b"2")]
            assert reply.headers == expected
            assert await content(reply) == b"ok"

    @pytest.mark.parametrize("line", [b"HTTP/1.1 200 \r\n", b"HTTP/1.1 200\r\n"])
    async def test_without_a_reason(self, line: bytes) -> None:
        async with bench(lambda peer: answering(peer, line + b"Content-Length: 2\r\n\r\nok")) as (_, upstream):
            for _ in range(2):
                reply = await upstream.send(ask(), [])
                assert (reply.status, reply.reason) == (200, b"")

    async def test_the_reason_is_not_the_last_replys(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(http_reply(404))
            assert (await request).reason == b"Not Found"
            request = asyncio.create_task(upstream.send(ask(), []))
            await peer.answer(b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n")
            assert (await request).reason == b""

    async def test_trailers_are_not_headers(self) -> None:
        """What comes behind the body must not be taken for something its reader was told before."""
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
            reply = await request
            await peer.send(b"0\r\nX-Checksum: 1\r\nSet-Cookie: a\r\n\r\n")
            assert await content(reply) == b"ok"
            assert reply.headers == [(b"Transfer-Encoding", b"chunked")]
            assert reply.body.trailers == [(b"X-Checksum", b"1"), (b"Set-Cookie", b"a")]  # type: ignore[attr-defined]
            assert len(upstream._idle) == 1

    @pytest.mark.parametrize(
        ("kind", "pauses"), [(b"text/event-stream; charset=utf-8", True), (b"application/json", False)]
    )
    @pytest.mark.parametrize("may_pause", [True, False])
    async def test_events_may_be_far_apart(self, kind: bytes, pauses: bool, may_pause: bool) -> None:
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(read=9.0, events_may_pause=may_pause), []))
                peer = await server.accept()
                await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: 2\r\n\r\n" % kind)
                body = asyncio.create_task(content(await request))
                await turns()
                skip(10.0)
                await turns()
                if pauses and may_pause:
                    await peer.send(b"ok")
                    assert await body == b"ok"
                else:
                    assert (await failure(body)).fault is Fault.READ_TIMEOUT

    @pytest.mark.parametrize("closes", [False, True])
    async def test_an_error_reply_does_not_wait_for_the_rest_of_a_body(self, closes: bool) -> None:
        """The caller is silent, and may be waiting for the answer itself."""
        ended = asyncio.Event()

        async def silent() -> AsyncIterator[bytes]:
            try:
                yield b"half"
                await asyncio.Event().wait()
            finally:
                ended.set()

        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask("POST", [length(8)], OneShotBody(silent())), []))
            peer = await server.accept()
            await peer.head()
            await peer.send(http_reply(413, headers=[(b"Connection", b"close")] if closes else []))
            reply = await request
            assert (reply.status, await content(reply)) == (413, b"ok")
            assert ended.is_set()
            assert not upstream._idle  # half a request is on it

    async def test_informational_replies_are_passed_over(self) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 100
        async with bench(lambda peer: answering(peer, early + http_reply())) as (_, upstream):
            reply = await exchange(upstream)
            assert (reply.status, reply.headers) == (200, [(b"Content-Length", b"2")])
            assert (await exchange(upstream)).reused

    @pytest.mark.parametrize(
        ("raw", "limit"),
        [
            (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 101 + http_reply(), "Pool.max_informational"),
            (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1001 + b"Content-Length: 0\r\n\r\n", "Pool.max_fields"),
            (http_reply(headers=[(b"A", b"x" * 110_000)]), "Pool.max_head"),
            (b"HTTP/1.1 200 " + b"x" * 110_000, "Pool.max_head"),
            (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 20_000, "Pool.max_head"),
        ],
        ids=["1xx", "fields", "a value", "the status line", "an endless head"],
    )
    async def test_a_head_has_its_limits(self, raw: bytes, limit: str) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(exchange(upstream))
            peer = await server.accept()
            await peer.head()
            sending = asyncio.create_task(peer.send(raw))
            with pytest.raises(UpstreamError, match=limit) as caught:
                await request
            assert caught.value.fault is Fault.REMOTE_PROTOCOL
            await asyncio.wait([sending])
            if not sending.cancelled():
                sending.exception()  # the client was gone before all was sent
            await peer.gone()

    async def test_the_limits_can_be_set(self) -> None:
        raw = http_reply(headers=[(b"A", b"x" * 200_000)] + [(b"B", b"b")] * 1500)
        async with bench(lambda peer: answering(peer, raw), max_head=300_000, max_fields=2000) as (_, upstream):
            assert len((await exchange(upstream)).headers) == 1502

    async def test_the_connection_can_be_asked_about(self) -> None:
        """As with httpx: `extensions["network_stream"]`."""
        async with bench(answering) as (server, upstream):
            for _ in range(2):
                stream = (await exchange(upstream)).extensions["network_stream"]
                assert stream.get_extra_info("server_addr") == ("127.0.0.1", server.port)
                assert stream.get_extra_info("client_addr")[0] == "127.0.0.1"
                assert stream.get_extra_info("socket").family == socket.AF_INET
                assert stream.get_extra_info("ssl_object") is None
                assert stream.get_extra_info("nonsense") is None


class TestSockets:
    async def test_a_unix_socket(self, tmp_path: Path) -> None:
        path = str(tmp_path / "gw.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        async with bench(listener=listener, endpoint=Endpoint(f"unix://{path}")) as (server, upstream):
            request = asyncio.create_task(exchange(upstream))
            peer = await server.accept()
            assert await peer.answer() == b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
            assert (await request).extensions["network_stream"].get_extra_info("server_addr") == path
            request = asyncio.create_task(exchange(upstream))
            await peer.answer()
            assert (await request).reused
            peer.fin()
            await peer.gone()

    async def test_a_unix_socket_that_is_not_there(self, tmp_path: Path) -> None:
        async with bench(endpoint=Endpoint(f"unix://{tmp_path}/gw.sock")) as (_, upstream):
            with pytest.raises(UpstreamError, match="No such file") as caught:
                await upstream.send(ask(), [])
            assert (caught.value.fault, caught.value.sent) == (Fault.CONNECT, Sent.NOT_SENT)

    async def test_the_local_address(self) -> None:
        async with bench(answering, local_address="127.0.0.2") as (server, upstream):
            stream = (await exchange(upstream)).extensions["network_stream"]
            assert server.peers[0].sock.getpeername()[0] == "127.0.0.2"
            assert stream.get_extra_info("client_addr")[0] == "127.0.0.2"

    @pytest.mark.parametrize("address", ["192.0.2.1", "::1"], ids=["not ours", "of another family"])
    async def test_a_local_address_that_cannot_be_used(self, address: str) -> None:
        async with bench(local_address=address) as (server, upstream):
            with pytest.raises(UpstreamError) as caught:
                await upstream.send(ask(), [])
            assert (caught.value.fault, caught.value.sent) == (Fault.CONNECT, Sent.NOT_SENT)
            assert server.connections == 0

    async def test_small_packets_do_not_wait_for_each_other(self) -> None:
        async with bench(answering) as (_, upstream):
            sock = (await exchange(upstream)).extensions["network_stream"].get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

"""However a request or the pool ends, the pool is left consistent: cancellation, timeouts, `aclose`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from http1_cancel import every_await
from http1_kit import PATIENCE, turns
from http1_servers import (
    Peer,
    Stream,
    answering,
    ask,
    assert_at_rest,
    bench,
    content,
    exchange,
    failure,
    moved_clock,
    timers,
    until,
)

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault
from pathlb.exchange import Request
from pathlb.testing import black_hole, http_reply

pytestmark = pytest.mark.anyio

IN_TWO_HALVES = http_reply(body=b"ab")


async def slowly(peer: Peer) -> None:
    """Answers every request in two pieces, so that head and body are waited for."""
    while True:
        try:
            await peer.request()
            await turns(2)
            await peer.send(IN_TWO_HALVES[:-1])
            await turns(6)
            await peer.send(IN_TWO_HALVES[-1:])
        except (EOFError, ConnectionError):
            peer.close()
            return


def plain() -> Request:
    return ask()


def streamed() -> Request:
    return ask("POST", body=Stream(b"x" * 1000, times=3).body)


def hesitant() -> Request:
    return ask("POST", [(b"Expect", b"100-continue")], body=b"x" * 1000)


class TestCancellation:
    @pytest.mark.parametrize("late", [False, True], ids=["", "late"])
    @pytest.mark.parametrize("connection", ["new", "reused"])
    @pytest.mark.parametrize("make", [plain, streamed])
    async def test_at_every_await(self, make: Callable[[], Request], connection: str, late: bool) -> None:
        async with bench(slowly) as (server, upstream):

            async def work() -> None:
                reply = await upstream.send(make(), [])
                try:
                    async for _ in reply.body:
                        pass
                finally:
                    await reply.body.aclose()

            async def check() -> None:
                await turns()  # what was cut off is closed at the next turn
                assert_at_rest(upstream)
                await until(lambda: server.served == len(upstream._open))
                assert (await exchange(upstream)).status == 200
                assert_at_rest(upstream)
                await until(lambda: server.served == len(upstream._open))
                if connection == "new":
                    for one in list(upstream._open):
                        one.close()

            if connection == "reused":
                await exchange(upstream)
            assert await every_await(work, check, late=late) >= {"new": 3, "reused": 2}[connection]

    async def test_while_waiting_for_the_go_ahead(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(hesitant(), []))
            peer = await server.accept()
            await peer.head()
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert await peer.gone() == b"", "the body was not sent"

    async def test_while_writing_to_a_server_that_does_not_read(self) -> None:
        async with bench() as (server, upstream):
            stream = Stream(b"x" * 1_000_000, times=100)
            request = asyncio.create_task(upstream.send(ask("POST", body=stream.body), []))
            peer = await server.accept()
            await until(lambda: any(one._writing_paused for one in upstream._open))
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            assert stream.closed
            await peer.gone()
            await until(lambda: not upstream._open)

    async def test_of_a_body_and_reading_on(self) -> None:
        """A timeout around one read of a body loses nothing of it."""
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = (await request).body
            parts = aiter(body)
            assert await anext(parts) == b"ab"
            reading = asyncio.ensure_future(anext(parts))
            await turns()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            await peer.send(b"cd")
            assert await content(await request) == b"cd"
            assert_at_rest(upstream, 1)

    async def test_of_one_request_leaves_the_others_alone(self) -> None:
        async with bench() as (server, upstream):
            requests = [asyncio.create_task(exchange(upstream)) for _ in range(3)]
            peers = [await server.accept() for _ in requests]
            requests[1].cancel()
            gone = [peers[1].gone()]
            for peer in (peers[0], peers[2]):
                await peer.answer()
            await asyncio.gather(requests[0], requests[2], *gone)
            assert_at_rest(upstream, 2)

    async def test_a_body_that_is_dropped_closes_its_connection(self) -> None:
        """What would still come is nobody's."""
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = (await request).body
            await body.aclose()
            await body.aclose()
            await peer.gone()

    async def test_closing_a_body_late_does_not_hurt_the_next_request(self) -> None:
        """Its connection serves somebody else by then."""
        async with bench() as (server, upstream):
            first = asyncio.create_task(upstream.send(ask(), []))
            peer = await server.accept()
            await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = (await first).body
            await peer.send(b"cd")
            await until(lambda: upstream._idle)
            second = asyncio.create_task(upstream.send(ask(), []))
            await peer.head()
            await body.aclose()
            await peer.send(http_reply(body=b"second"))
            assert await content(await second) == b"second"


class TestReadTimeout:
    async def test_a_slow_reader_is_not_timed_out(self) -> None:
        """The time between two reads is the caller's."""
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(read=5.0), []))
                peer = await server.accept()
                await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nab")
                body = aiter((await request).body)
                skip(6)
                await turns()
                assert await anext(body) == b"ab"
                skip(6)
                await turns()
                await peer.send(b"cd")
                assert await anext(body) == b"cd"
                reading = asyncio.ensure_future(anext(body))
                await turns()
                skip(6)
                assert (await failure(reading)).fault is Fault.READ_TIMEOUT
                await peer.gone()

    async def test_every_part_that_comes_starts_it_anew(self) -> None:
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(read=5.0), []))
                peer = await server.accept()
                await peer.head()
                for byte in http_reply(body=b""):
                    skip(4)
                    await peer.send(bytes([byte]))
                    await turns()
                assert (await request).status == 200

    async def test_a_cancelled_read_is_not_timed_out_afterwards(self) -> None:
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(upstream.send(ask(read=5.0), []))
                peer = await server.accept()
                await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
                body = aiter((await request).body)
                reading = asyncio.ensure_future(anext(body))
                await turns()
                reading.cancel()
                await asyncio.wait([reading])
                skip(6)
                await turns()
                await peer.send(b"ab")
                assert await anext(body) == b"ab"

    async def test_the_one_of_the_last_request_is_not_the_next_ones(self) -> None:
        async with bench() as (server, upstream):
            with moved_clock() as skip:
                request = asyncio.create_task(exchange(upstream, ask(read=5.0)))
                peer = await server.accept()
                await peer.answer()
                await request
                request = asyncio.create_task(exchange(upstream, ask(read=None)))
                await turns()
                skip(6)
                await turns()
                await peer.answer()
                assert (await request).reused


class TestClose:
    async def test_with_requests_in_flight(self) -> None:
        """Waiting for the head, reading a body, writing one: each ends, and so do all connections."""
        async with bench() as (server, upstream):
            waiting = asyncio.create_task(upstream.send(ask(), []))
            peers = [await server.accept()]
            await peers[0].head()
            reading = asyncio.create_task(exchange(upstream))
            peers.append(await server.accept())
            await peers[1].answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            writing = asyncio.create_task(upstream.send(ask("POST", body=b"x" * 50_000_000), []))
            peers.append(await server.accept())
            await peers[2].head()
            await until(lambda: any(one._writing_paused for one in upstream._open))
            async with asyncio.timeout(PATIENCE):
                await upstream.aclose()
            assert upstream._open == set()
            assert timers() == []
            for task in (waiting, reading, writing):
                error = await failure(task)
                assert (error.fault, error.sent) == (Fault.READ, Sent.MAYBE_SENT)
                assert "closed" in error.detail
            for peer in peers:
                await peer.gone()

    async def test_idle_connections_and_the_sweeper(self) -> None:
        async with bench(answering) as (server, upstream):
            await exchange(upstream)
            assert timers() != []
            await upstream.aclose()
            assert timers() == []
            await until(lambda: server.served == 0)

    async def test_no_timer_of_a_request_is_left(self) -> None:
        async with bench(answering) as (_, upstream):
            await exchange(upstream)
            assert len(timers()) == 2, "the connection's and the sweeper's"
            await upstream.aclose()
            assert timers() == []

    async def test_twice(self) -> None:
        async with bench(answering) as (_, upstream):
            await exchange(upstream)
            async with asyncio.timeout(PATIENCE):
                await upstream.aclose()
                await upstream.aclose()

    async def test_twice_at_once(self) -> None:
        async with bench(answering) as (_, upstream):
            await exchange(upstream)
            async with asyncio.timeout(PATIENCE / 10):
                await asyncio.gather(upstream.aclose(), upstream.aclose())

    async def test_an_unused_one(self) -> None:
        async with bench() as (server, upstream):
            await upstream.aclose()
            assert server.connections == 0

    async def test_nothing_is_sent_afterwards(self) -> None:
        async with bench(answering) as (server, upstream):
            await exchange(upstream)
            await upstream.aclose()
            error = await failure(upstream.send(ask(), []))
            assert (error.fault, error.sent) == (Fault.CONNECT, Sent.NOT_SENT)
            assert "closed" in error.detail
            assert server.connections == 1

    async def test_while_dialling(self) -> None:
        """A connection that is made when the pool is closed already is not used."""
        async with bench(answering) as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            await asyncio.sleep(0)
            assert upstream._dialling == 1
            await upstream.aclose()
            error = await failure(request)
            assert (error.fault, error.sent) == (Fault.CONNECT, Sent.NOT_SENT)
            await turns()
            assert upstream._open == set()
            await until(lambda: server.served == 0)

    async def test_while_a_dial_hangs(self) -> None:
        """It does not wait for that, or a client could not be closed before its connect timeout."""
        with black_hole() as url:
            async with bench(endpoint=Endpoint(url)) as (_, upstream):
                request = asyncio.create_task(upstream.send(ask(connect=None), []))
                await turns()
                async with asyncio.timeout(PATIENCE):
                    await upstream.aclose()
                request.cancel()
                await asyncio.wait([request])

    async def test_a_whole_reply_can_still_be_read(self) -> None:
        async with bench(answering) as (_, upstream):
            reply = await upstream.send(ask(), [])
            await upstream.aclose()
            assert await content(reply) == b"ok"

    async def test_what_has_come_of_a_body_is_not_lost(self) -> None:
        async with bench() as (server, upstream):
            request = asyncio.create_task(upstream.send(ask(), []))
            await (await server.accept()).answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            body = aiter((await request).body)
            await upstream.aclose()
            assert await anext(body) == b"ab"
            assert (await failure(anext(body))).fault is Fault.READ


async def test_a_broken_body_fails_at_every_read() -> None:
    async with bench() as (server, upstream):
        request = asyncio.create_task(upstream.send(ask(), []))
        peer = await server.accept()
        await peer.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n")
        body = aiter((await request).body)
        peer.reset()
        for _ in range(2):
            error = await failure(anext(body))
            assert (error.fault, error.reused) == (Fault.READ, False)


async def test_a_failure_on_a_reused_connection_says_so() -> None:
    """It may have been closed while it was idle: reason enough to try again elsewhere."""
    async with bench() as (server, upstream):
        request = asyncio.create_task(exchange(upstream))
        peer = await server.accept()
        await peer.answer()
        await request
        for reused in (True, False):
            request = asyncio.create_task(exchange(upstream))
            if not reused:
                peer = await server.accept()
            await peer.head()
            peer.fin()
            error = await failure(request)
            assert (error.fault, error.sent, error.reused) == (Fault.REMOTE_PROTOCOL, Sent.MAYBE_SENT, reused)

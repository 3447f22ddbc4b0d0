"""Connecting: names with several addresses, failures, timeouts, cancellation. Whatever fails, nothing was sent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Iterator
from functools import partial
from typing import Any

import pytest
from http1_cancel import every_await
from http1_kit import PATIENCE, turns
from http1_servers import Server, answering, ask, bench, exchange

from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.testing import black_hole, refused_url
from pathlb.upstream.http1 import Http1Upstream, Pool, dial
from pathlb.upstream.http1.connection import Connection

pytestmark = pytest.mark.anyio

Address = tuple[str, int]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def address(url: str) -> Address:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def failure(work: Awaitable[object]) -> UpstreamError:
    """What `work` failed with: nothing that was sent."""
    with pytest.raises(UpstreamError) as caught:
        async with asyncio.timeout(PATIENCE):
            await work
    assert caught.value.sent is Sent.NOT_SENT
    return caught.value


@contextlib.contextmanager
def resolving(*addresses: Address) -> Iterator[list[str]]:
    """Every name has these addresses, in this order; yields the names asked for."""
    loop = asyncio.get_running_loop()
    asked: list[str] = []

    async def getaddrinfo(host: str, port: int, **options: Any) -> list[Any]:
        asked.append(host)
        await asyncio.sleep(0)
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = [socket.AF_INET6 if ":" in one else socket.AF_INET for one, _ in addresses]
        return [
            (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", one)
            for family, one in zip(families, addresses, strict=True)
        ]

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
    try:
        yield asked
    finally:
        del loop.getaddrinfo  # type: ignore[method-assign]


@contextlib.asynccontextmanager
async def named() -> AsyncIterator[tuple[Server, Http1Upstream, Address]]:
    """A server that answers, a pool for a name, and the server's address."""
    async with bench(answering, endpoint=Endpoint("http://gateway.test")) as (server, upstream):
        yield server, upstream, ("127.0.0.1", server.port)


class TestAddresses:
    async def test_one(self) -> None:
        async with named() as (server, upstream, here):
            with resolving(here) as asked:
                await exchange(upstream)
                assert (asked, server.connections) == (["gateway.test"], 1)
                assert (await exchange(upstream)).reused
                assert asked == ["gateway.test"], "only for a new connection"

    async def test_an_address_is_not_asked_for(self) -> None:
        async with bench(answering) as (_, upstream):
            with resolving() as asked:
                await exchange(upstream)
                assert asked == []

    async def test_the_first_refuses(self) -> None:
        with refused_url() as url:
            async with named() as (server, upstream, here):
                before = descriptors()
                with resolving(address(url), here):
                    await exchange(upstream)
                assert descriptors() == before + 2, "the two ends of one connection"
                assert server.connections == 1

    async def test_no_head_start_after_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dial, "_HEAD_START", 1e6)
        with refused_url() as url:
            async with named() as (_, upstream, here):
                with resolving(address(url), address(url), here):
                    assert (await exchange(upstream)).status == 200

    async def test_the_first_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second is tried beside it after the head start; the loser's socket is closed."""
        monkeypatch.setattr(dial, "_HEAD_START", 0.01)
        with black_hole() as url:
            async with named() as (_, upstream, here):
                before = descriptors()
                with resolving(address(url), here):
                    await exchange(upstream, ask(connect=None))
                assert descriptors() == before + 2, "the two ends of one connection"

    async def test_the_first_wins_when_it_is_quick_enough(self) -> None:
        async with named() as (server, upstream, here), Server(answering) as other:
            with resolving(here, ("127.0.0.1", other.port)):
                await exchange(upstream)
            await turns()
            assert (server.connections, other.connections) == (1, 0)

    async def test_families_take_turns(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A host whose IPv6 leads nowhere does not wait for all of its addresses there (RFC 8305)."""
        tried: list[Any] = []

        async def connect(sock: socket.socket, where: Any) -> None:
            tried.append(where[0])
            raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

        async with named() as (_, upstream, _here):
            monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
            v6 = [(f"fd00::{number}", 80) for number in range(3)]
            with resolving(*v6, ("10.0.0.1", 80), ("10.0.0.2", 80)):
                await failure(upstream.send(ask(), []))
        assert tried == ["fd00::0", "10.0.0.1", "fd00::1", "10.0.0.2", "fd00::2"]

    async def test_all_refuse(self) -> None:
        with refused_url() as one, refused_url() as other:
            async with named() as (_, upstream, _here):
                before = descriptors()
                with resolving(address(one), address(other)):
                    error = await failure(upstream.send(ask(), []))
                assert (error.fault, error.local) == (Fault.CONNECT, False)
                assert "Connection refused" in error.detail
                assert error.endpoint == "http://gateway.test"
                assert descriptors() == before

    async def test_all_reasons_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def connect(sock: socket.socket, where: Any) -> None:
            number = errno.EHOSTUNREACH if where[0] == "10.0.0.1" else errno.ECONNREFUSED
            raise OSError(number, os.strerror(number))

        async with named() as (_, upstream, _here):
            monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
            with resolving(("10.0.0.1", 80), ("10.0.0.2", 80)):
                error = await failure(upstream.send(ask(), []))
        assert "No route to host" in error.detail
        assert "Connection refused" in error.detail

    async def test_all_hang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dial, "_HEAD_START", 0.001)
        with black_hole() as url:
            async with named() as (_, upstream, _here):
                before = descriptors()
                with resolving(address(url), address(url)):
                    error = await failure(upstream.send(ask(connect=0.02), []))
                assert error.fault is Fault.CONNECT_TIMEOUT
                assert descriptors() == before

    async def test_the_system_gives_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own timeout, long before or after ours: an error like others."""

        async def connect(sock: socket.socket, where: Any) -> None:
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

        async with bench() as (_, upstream):
            monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
            error = await failure(upstream.send(ask(connect=None), []))
            assert error.fault is Fault.CONNECT
            assert "timed out" in error.detail

    async def test_no_such_name(self) -> None:
        async with named() as (_, upstream, _here):
            with resolving():
                error = await failure(upstream.send(ask(), []))
            assert (error.fault, error.local) == (Fault.CONNECT, False)
            assert "not known" in error.detail

    async def test_a_name_that_cannot_be_one(self) -> None:
        """A label of more than 63 characters: Python refuses before the resolver does, with another error."""
        async with bench(endpoint=Endpoint(f"http://{'a' * 64}.test")) as (_, upstream):
            assert (await failure(upstream.send(ask(), []))).fault is Fault.CONNECT

    async def test_resolving_takes_too_long(self) -> None:
        async with named() as (_, upstream, _here):

            async def getaddrinfo(*args: Any, **options: Any) -> None:
                await asyncio.get_running_loop().create_future()

            asyncio.get_running_loop().getaddrinfo = getaddrinfo  # type: ignore[assignment,method-assign]
            try:
                error = await failure(upstream.send(ask(connect=0.02), []))
            finally:
                del asyncio.get_running_loop().getaddrinfo  # type: ignore[method-assign]
            assert error.fault is Fault.CONNECT_TIMEOUT


class TestCancellation:
    async def test_of_a_connect_that_hangs(self) -> None:
        with black_hole() as url:
            async with bench(endpoint=Endpoint(url)) as (_, upstream):
                before = descriptors()
                request = asyncio.create_task(upstream.send(ask(connect=None), []))
                await turns()
                assert descriptors() == before + 1
                request.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await request
                assert descriptors() == before

    @pytest.mark.parametrize("order", ["refused, hole, here", "here, hole", "hole, here", "here, here"])
    @pytest.mark.parametrize("late", [False, True], ids=["", "late"])
    async def test_at_every_await_of_a_race(self, order: str, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """No socket is left, wherever it is cut off: not the winner's either while the losers are being seen off."""
        monkeypatch.setattr(dial, "_HEAD_START", 0.005)
        with refused_url() as refused, black_hole() as hole:
            async with named() as (_, _, here):
                addresses = {"refused": address(refused), "hole": address(hole), "here": here}
                with resolving(*(addresses[one] for one in order.split(", "))):
                    before = descriptors()

                    async def work() -> None:
                        made.append(await dialer.dial(make, None, None))

                    async def check() -> None:
                        while made:
                            made.pop().close()
                        await turns(10)  # the other end closes as well
                        assert descriptors() == before

                    made: list[Connection] = []
                    loop = asyncio.get_running_loop()
                    make = partial(Connection, loop, Nobody(), Pool(), "http://gateway.test")
                    dialer = dial.Dialer(Endpoint("http://gateway.test"), None, None)
                    assert await every_await(work, check, late=late) >= 3

    @pytest.mark.parametrize("order", ["refused, here", "here, hole"])
    async def test_at_every_turn_of_the_loop(self, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same from the outside, where the pool keeps count."""
        monkeypatch.setattr(dial, "_HEAD_START", 0.005)
        with refused_url() as refused, black_hole() as hole:
            async with named() as (_, upstream, here):
                addresses = {"refused": address(refused), "hole": address(hole), "here": here}
                with resolving(*(addresses[one] for one in order.split(", "))):
                    before = descriptors()
                    for at in itertools.count(1):
                        request = asyncio.create_task(upstream.send(ask(connect=None), []))
                        await turns(at)
                        request.cancel()
                        await asyncio.wait([request])
                        for connection in list(upstream._open):
                            connection.close()
                        await turns(10)
                        assert upstream._dialling == 0
                        assert upstream._open == set()
                        assert descriptors() == before, f"cancelled after {at} turns"
                        if not request.cancelled():
                            break
                    assert at > 4


class Nobody:
    """The owner of a connection that is not in a pool."""

    def put(self, connection: Connection) -> None: ...

    def closing(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...


CHILD = """
import asyncio, json, os, resource, sys
from pathlb.core.model import Endpoint
from pathlb.errors import UpstreamError
from pathlb.exchange import Request, Timeouts
from pathlb.upstream.http1 import Http1Upstream

async def main():
    upstream = Http1Upstream(Endpoint(sys.argv[1]))
    request = Request("GET", b"/", [], timeouts=Timeouts(20, 20, 20, None))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 2, hard))
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    try:
        await upstream.send(request, [])
        told = None
    except UpstreamError as exc:
        told = [exc.fault.value, exc.sent.value, exc.local, exc.detail]
    for one in taken:
        os.close(one)
    reply = await upstream.send(request, [])
    await upstream.aclose()
    print(json.dumps([told, reply.status]))

asyncio.run(main())
"""


async def test_out_of_descriptors() -> None:
    """In a process of its own. No endpoint is to blame for it."""
    async with Server(answering) as server:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "error", "-c", CHILD, server.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        async with asyncio.timeout(PATIENCE):
            out, err = await child.communicate()
        assert (child.returncode, err) == (0, b"")
        told, status = json.loads(out)
        assert told[:3] == ["ConnectError", "not sent", True]
        assert "Too many open files" in told[3]
        assert status == 200

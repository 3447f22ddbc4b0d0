"""`pathlb serve` with callers and upstreams that hold on to what they have: everybody else is served all the same."""

from __future__ import annotations

import asyncio
import os
import resource
import select
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse
from pathlib import Path

import pytest
from servekit import CALL, PATIENCE, TOKEN, Load, Served, until

from pathlb import Balancer
from pathlb.asgi import Gateway
from pathlb.serving import server as serving
from pathlb.serving.server import UvicornServer
from pathlb.testing import FaultServer, Fleet, Hang, ReadRequest, Send, ServiceTime, WaitFor, http_reply

IDLE = 1_000
SLOW = 50
UPLOAD = 64 * 2**20  # bytes: more than the kernel keeps on the way
REQUEST = (
    b"POST /v1 HTTP/1.1\r\nHost: x\r\nTarget-Service-Id: eth\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(CALL), CALL)
)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(3, path=["eth"], service_time=ServiceTime.constant(0.002)) as fleet:
        yield fleet


@pytest.fixture
def connect() -> Iterator[Callable[[int], socket.socket]]:
    """Connections to a port, which are closed in the end."""
    opened: list[socket.socket] = []

    def connect(port: int) -> socket.socket:
        opened.append(socket.create_connection(("127.0.0.1", port), timeout=PATIENCE))
        return opened[-1]

    yield connect
    for one in opened:
        one.close()


def answer_to(connection: socket.socket) -> int:
    """The status of an answer, which is read to its end; 0 if there is none."""
    with HTTPResponse(connection) as reply:
        try:
            reply.begin()
            reply.read()
        except ConnectionError:
            return 0
        return reply.status


def test_of_a_killed_worker_only_what_it_had_in_hand_is_lost(connect: Callable[[int], socket.socket]) -> None:
    script = [ReadRequest(), WaitFor("go"), Send(http_reply(headers=[(b"Connection", b"close")]))]
    with FaultServer([script]) as held, Served(held.url, "--workers", "2") as served:
        asking: list[socket.socket] = []

        def ask_until_both_have_some() -> bool:
            asking.append(connect(served.port))
            asking[-1].sendall(REQUEST)
            held.wait_for_requests(len(asking))
            return all(worker["in_flight"] for worker in served.workers)

        until(ask_until_both_have_some)
        victim, other = served.workers
        assert victim["in_flight"] + other["in_flight"] == len(asking)

        os.kill(victim["pid"], signal.SIGKILL)
        until(lambda: len(select.select(asking, [], [], 0)[0]) == victim["in_flight"], "its callers have noticed")
        held.set("go")
        # Before there is a new one as well as after.
        assert {served.post().status_code for _ in range(20)} == {200}
        until(lambda: len(served.pids) == 2 and victim["pid"] not in served.pids, "a new one is in its place")
        assert {served.post().status_code for _ in range(20)} == {200}

        answers = [answer_to(one) for one in asking]
        assert answers.count(200) == other["in_flight"]
        assert answers.count(0) == victim["in_flight"]


def test_an_upstream_that_reads_nothing_of_an_upload_holds_up_nobody_else(
    fleet: Fleet, tmp_path: Path, connect: Callable[[int], socket.socket]
) -> None:
    file = tmp_path / "pathlb.toml"
    file.write_text("[timeouts]\nwrite = 600\n")
    with FaultServer([[Hang()]]) as deaf, Served(deaf.url, *fleet.urls, "--config", str(file)) as served:
        for url in fleet.urls:
            assert served.admin("POST", f"/drain?endpoint={url}", TOKEN)[0] == 200
        uploading = connect(served.port)
        uploading.sendall(b"PUT /v1 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % UPLOAD)
        with ThreadPoolExecutor() as threads:
            upload = threads.submit(uploading.sendall, bytes(UPLOAD))
            until(lambda: deaf.connections, "the upload goes to the upstream that does not read")
            for url in fleet.urls:
                assert served.admin("POST", f"/undrain?endpoint={url}", TOKEN)[0] == 200
            assert served.admin("POST", f"/drain?endpoint={deaf.url}", TOKEN)[0] == 200
            with Load(served.port) as load:
                load.wait_for(200)
                assert not upload.done()  # nobody holds what the upstream does not take
                deaf.release()  # it closes the connection
                assert answer_to(uploading) == 502
                upload.result()  # nobody wants the rest, which is read all the same
            assert load.lost == []


def test_many_idle_connections_keep_nobody_from_being_served(
    fleet: Fleet, tmp_path: Path, connect: Callable[[int], socket.socket]
) -> None:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    file = tmp_path / "pathlb.toml"
    file.write_text('profile = "path"\nkeep_alive = 600\n')
    with Served(*fleet.urls, "--config", str(file)) as served:
        idle = []
        for _ in range(min(IDLE, allowed // 2)):
            idle.append(connect(served.port))
            idle[-1].sendall(REQUEST)
            assert answer_to(idle[-1]) == 200
        with Load(served.port) as load:
            load.wait_for(200)
            for one in idle:
                one.sendall(REQUEST)
            assert {answer_to(one) for one in idle} == {200}
        assert load.lost == []
        assert load.refused == 0


@pytest.mark.anyio
async def test_callers_that_never_come_to_the_end_of_a_head_are_cut_off_and_others_served_meanwhile(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_TIMEOUT", 0.5)
    monkeypatch.setattr(serving, "_LOOK_FOR_SLOW_EVERY", 0.05)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()

    async def dribble() -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"POST /v1 HTTP/1.1\r\nX: ")
        cut = asyncio.create_task(reader.read())
        while not cut.done():
            writer.write(b"x")
            await asyncio.wait({cut}, timeout=0.02)
        writer.close()
        assert cut.exception() is not None or cut.result() == b""

    async with asyncio.timeout(PATIENCE), Balancer(fleet.urls, profile="path") as balancer:
        server = UvicornServer(Gateway(balancer), listener)
        await server.start()
        reader, writer = await asyncio.open_connection(*address)
        dribbling = [asyncio.create_task(dribble()) for _ in range(SLOW)]
        answered = 0
        while not all(one.done() for one in dribbling) or not answered:
            writer.write(REQUEST)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            answered += 1
        await asyncio.gather(*dribbling)
        writer.close()
        await server.drain(0)

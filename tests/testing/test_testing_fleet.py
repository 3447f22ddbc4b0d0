from __future__ import annotations

import contextlib
import gc
import http.client
import os
import random
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from pathlb.errors import UsageError
from pathlb.testing import Fleet, FleetGateway, Mode, ReceivedRequest, ServiceTime

INSTANT = ServiceTime.constant(0)
FOREVER = ServiceTime.constant(3600)


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def processes(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def connect(gateway: FleetGateway) -> socket.socket:
    return socket.create_connection(("127.0.0.1", gateway.port), timeout=20)


def open_descriptors() -> set[str]:
    """What the open descriptors lead to: sockets and pipes by their inode, so that a reused number is a new one."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing itself
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return found


def ask(sock: socket.socket, path: str = "/") -> None:
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


def read_all(sock: socket.socket) -> bytes:
    return b"".join(iter(lambda: sock.recv(65536), b""))


def read_reply(sock: socket.socket) -> http.client.HTTPResponse:
    reply = http.client.HTTPResponse(sock)
    reply.begin()
    reply.read()
    return reply


def until_in_flight(gateway: FleetGateway, count: int) -> None:
    """The requests are on their way through the kernel and arrive; the test's own timeout ends what does not."""
    while gateway.stats().in_flight != count:
        pass


def test_replies_are_json_and_name_their_gateway(client: httpx.Client, processes: bool) -> None:
    with Fleet(2, service_time=INSTANT, processes=processes) as fleet:
        for index, url in enumerate(fleet.urls):
            reply = client.post(f"{url}/any/path?q=1", json={"x": 1})
            assert reply.status_code == 200
            assert reply.json() == {"jsonrpc": "2.0", "id": 1, "result": "0x1"}
            assert reply.headers["x-gateway"] == f"gateway-{index}" == fleet[index].name
        fleet[0].set_body(b"\x00\xff")
        assert client.get(fleet.urls[0]).content == b"\x00\xff"
        assert client.get(fleet.urls[0] + "/health").content == b""
        assert client.head(fleet.urls[0]).headers["content-length"] == "2"


def test_counts_what_arrives(client: httpx.Client, processes: bool) -> None:
    with Fleet(2, service_time=INSTANT, processes=processes) as fleet:
        for path in ("/a", "/a?x", "/health"):
            client.get(fleet[0].url + path)
        fleet[0].set_mode(Mode.FAIL)
        client.get(f"{fleet[0].url}/b")
        for gateway in fleet:
            client.get(gateway.url, headers={"x-REQUEST-id": "twice"})
        client.get(fleet[1].url, headers={"X-Request-Id": "once"})
        stats = fleet[0].stats()
        assert stats.requests == 5
        assert stats.by_path == Counter({"/a": 2, "/health": 1, "/b": 1, "/": 1})
        assert stats.by_status == Counter({200: 3, 500: 2})
        assert (stats.in_flight, stats.max_in_flight) == (0, 1)
        assert (stats.connections, stats.open_connections) == (1, 1)
        assert stats.seen == Counter({b"twice": 1})
        assert fleet.seen() == Counter({b"twice": 2, b"once": 1})


def test_records_requests_when_asked_to(client: httpx.Client, processes: bool) -> None:
    with Fleet(1, service_time=INSTANT, record=True, processes=processes) as fleet:
        with connect(fleet[0]) as sock:
            head = b"PUT /%ff?a=b HTTP/1.1\r\nHost: x\r\nX-A: \xe9\r\nx-a: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
            sock.sendall(head + b"2\r\n\x00\xff\r\n1\r\nz\r\n0\r\n\r\n")
            assert read_reply(sock).status == 200
        client.post(fleet[0].url, content=b"sized")
        chunked, sized = fleet[0].received()
        headers = [(b"Host", b"x"), (b"X-A", b"\xe9"), (b"x-a", b"2"), (b"Transfer-Encoding", b"chunked")]
        assert chunked == ReceivedRequest("PUT", b"/%ff?a=b", headers, b"\x00\xffz")
        assert (sized.method, sized.body) == ("POST", b"sized")
    with Fleet(1, service_time=INSTANT) as fleet:
        client.get(fleet[0].url)
        assert fleet[0].received() == []


def test_keeps_connections_as_the_client_asks(client: httpx.Client) -> None:
    with Fleet(1, service_time=INSTANT) as fleet:
        for _ in range(3):
            client.get(fleet[0].url)
        assert fleet[0].stats().connections == 1
        assert client.get(fleet[0].url, headers={"Connection": "close"}).headers["connection"] == "close"
        with connect(fleet[0]) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert read_all(sock).endswith(b'"0x1"}')


def test_pipelined_requests_are_answered_in_order() -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001), record=True) as fleet, connect(fleet[0]) as sock:
        paths = [f"/{index}" for index in range(20)]
        requests = [f"GET {path} HTTP/1.1\r\n\r\n" for path in paths]
        sock.sendall("".join(requests).encode() + b"GET /health HTTP/1.0\r\n\r\n")
        replies = read_all(sock)
        assert replies.count(b"HTTP/1.1 200 OK") == 21
        # The empty reply to /health is the last one, though it takes no service time.
        assert b"Content-Length: 0" in replies.rsplit(b"HTTP/1.1", 1)[1]
        assert replies.count(b"Content-Length: 0") == 1
        assert fleet[0].stats().by_path == Counter([*paths, "/health"])


def test_a_long_pipeline_waiting_for_a_slow_first_request() -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.05), workers=1, queue=0) as fleet, connect(fleet[0]) as sock:
        sock.sendall(
            b"GET / HTTP/1.1\r\n\r\n" + b"GET /health HTTP/1.1\r\n\r\n" * 3000 + b"GET /health HTTP/1.0\r\n\r\n"
        )
        assert read_all(sock).count(b"HTTP/1.1 200 OK") == 3002


def test_nonsense_gets_400_and_the_end() -> None:
    with Fleet(1) as fleet, connect(fleet[0]) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        assert read_all(sock).startswith(b"HTTP/1.1 400 ")
        assert fleet[0].stats().by_status == Counter({400: 1})


def test_an_upgrade_is_declined_and_what_follows_ignored() -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001)) as fleet, connect(fleet[0]) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n\x81\x00")
        assert read_all(sock).startswith(b"HTTP/1.1 200 OK")


def test_workers_queue_and_overflow() -> None:
    with Fleet(1, service_time=FOREVER, workers=2, queue=1) as fleet:
        socks = []
        try:
            for count in (1, 2, 3):
                socks.append(connect(fleet[0]))
                ask(socks[-1])
                until_in_flight(fleet[0], count)
            with connect(fleet[0]) as fourth:
                ask(fourth)
                assert read_reply(fourth).status == 503
                ask(fourth, "/health")
                assert read_reply(fourth).status == 200
                # The one in the queue gives up: its place is free again, those of the two being served are not.
                socks.pop().close()
                until_in_flight(fleet[0], 2)
                ask(fourth)
                until_in_flight(fleet[0], 3)
                socks.pop().close()
                until_in_flight(fleet[0], 2)
                with connect(fleet[0]) as fifth:
                    ask(fifth)
                    assert read_reply(fifth).status == 503
        finally:
            for sock in socks:
                sock.close()
        assert fleet[0].stats().max_in_flight == 4


def test_one_worker_serves_first_come_first_served() -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001), workers=1) as fleet:
        socks = [connect(fleet[0]) for _ in range(8)]
        # The first one holds the worker until the others have queued up.
        fleet[0].set_mode(Mode.SLOW, factor=300)
        for count, sock in enumerate(socks, 1):
            ask(sock)
            while fleet[0].stats().requests != count:
                pass
            fleet[0].restore()
        # The last reply cannot come before the others: when it is here, theirs are.
        assert read_reply(socks[-1]).status == 200
        for sock in socks[:-1]:
            sock.setblocking(False)
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 OK")
        for sock in socks:
            sock.close()


def test_slow_multiplies_the_service_time_and_spares_health(client: httpx.Client, processes: bool) -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001), processes=processes) as fleet:
        assert client.get(fleet[0].url).status_code == 200
        fleet[0].set_mode(Mode.SLOW, factor=3_600_000)
        with connect(fleet[0]) as sock:
            ask(sock)
            until_in_flight(fleet[0], 1)
            assert client.get(f"{fleet[0].url}/health").status_code == 200
            fleet[0].restore()
            assert client.get(fleet[0].url).status_code == 200
            assert fleet[0].stats().in_flight == 1


def test_fail_and_throttle(client: httpx.Client, processes: bool) -> None:
    with Fleet(1, service_time=FOREVER, processes=processes) as fleet:
        url = fleet[0].url
        fleet[0].set_mode(Mode.FAIL)
        assert (client.get(url).status_code, client.get(f"{url}/health").status_code) == (500, 500)
        fleet[0].set_mode(Mode.FAIL, status=599)
        assert client.get(url).status_code == 599
        fleet[0].set_mode(Mode.THROTTLE, retry_after="Fri, 31 Dec 1999 23:59:59 GMT")
        reply = client.get(url)
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "Fri, 31 Dec 1999 23:59:59 GMT")
        health = client.get(f"{url}/health")
        assert (health.status_code, "retry-after" in health.headers) == (200, False)
        fleet[0].set_mode(Mode.THROTTLE)
        assert client.get(url).headers["retry-after"] == "1"
        fleet[0].set_mode(Mode.FAIL, status=429)
        assert "retry-after" not in client.get(url).headers


def test_hang_answers_nothing_until_it_is_left(processes: bool) -> None:
    with Fleet(1, service_time=FOREVER, workers=1, processes=processes) as fleet:
        with connect(fleet[0]) as served, connect(fleet[0]) as queued, connect(fleet[0]) as idle:
            ask(idle, "/health")
            read_reply(idle)
            for count, sock in enumerate([served, queued], 1):
                ask(sock)
                until_in_flight(fleet[0], count)
            fleet[0].set_mode(Mode.HANG)
            with connect(fleet[0]) as late:
                ask(late, "/health")
                until_in_flight(fleet[0], 3)
                fleet[0].restore()
                assert [read_all(sock) for sock in (served, queued, late)] == [b"", b"", b""]
            stats = fleet[0].stats()
            assert (stats.in_flight, stats.open_connections, stats.by_status) == (0, 1, Counter({200: 1}))
            ask(idle, "/health")
            assert read_reply(idle).status == 200


def test_reset_resets_what_is_in_flight_and_what_comes(processes: bool) -> None:
    with Fleet(1, service_time=FOREVER, workers=1, processes=processes) as fleet:
        with connect(fleet[0]) as busy, connect(fleet[0]) as idle:
            ask(busy)
            until_in_flight(fleet[0], 1)
            ask(idle, "/health")
            assert read_reply(idle).status == 200
            fleet[0].set_mode(Mode.RESET)
            assert fleet[0].stats().open_connections == 1
            with pytest.raises(ConnectionResetError):
                busy.recv(1)
            ask(idle)
            with pytest.raises(ConnectionResetError):
                idle.recv(1)
            stats = fleet[0].stats()
            assert (stats.requests, stats.in_flight, stats.open_connections) == (3, 0, 0)
            assert stats.by_status == Counter({200: 1})


def test_kill_refuses_and_restore_listens_on_the_same_port(client: httpx.Client, processes: bool) -> None:
    with Fleet(2, service_time=INSTANT, processes=processes) as fleet:
        urls = fleet.urls
        with connect(fleet[0]) as idle:
            ask(idle)
            assert read_reply(idle).status == 200
            idle.setblocking(False)
            fleet[0].kill()
            # No waiting: it is in effect.
            with pytest.raises(ConnectionResetError):
                idle.recv(1)
            assert fleet[0].stats().open_connections == 0
        for _ in range(2):
            with pytest.raises(ConnectionRefusedError):
                connect(fleet[0])
        fleet[0].kill()
        assert client.get(urls[1]).status_code == 200
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", fleet[0].port))
        fleet[0].restore()
        assert fleet.urls == urls
        assert client.get(urls[0]).status_code == 200


def test_a_port_taken_while_killed_is_reported(client: httpx.Client, processes: bool) -> None:
    with Fleet(1, service_time=INSTANT, processes=processes) as fleet:
        fleet[0].kill()
        with socket.create_server(("127.0.0.1", fleet[0].port)):
            with pytest.raises(OSError, match=r"gateway-0 cannot listen on .*in use"):
                fleet[0].restore()
        fleet[0].restore()
        assert client.get(fleet[0].url).status_code == 200


def test_what_follows_a_closing_reply_or_a_reset_is_ignored() -> None:
    with Fleet(1, service_time=INSTANT) as fleet:
        with connect(fleet[0]) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\nGET /late HTTP/1.1\r\n\r\n")
            assert read_all(sock).count(b"HTTP/1.1") == 1
        fleet[0].set_mode(Mode.RESET)
        with connect(fleet[0]) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        stats = fleet[0].stats()
        assert (stats.in_flight, stats.open_connections, stats.by_status) == (0, 0, Counter({200: 1}))


@pytest.mark.parametrize("mode", [Mode.REFUSE, Mode.HANG, Mode.RESET])
def test_what_a_mode_ends_frees_its_worker(mode: Mode) -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001), workers=1) as fleet:
        fleet[0].set_mode(Mode.SLOW, factor=3_600_000)
        with connect(fleet[0]) as served, connect(fleet[0]) as queued:
            for count, sock in enumerate([served, queued], 1):
                ask(sock)
                until_in_flight(fleet[0], count)
            fleet[0].set_mode(mode)
            fleet[0].restore()
        with connect(fleet[0]) as sock:
            ask(sock)
            assert read_reply(sock).status == 200
        assert fleet[0].stats().in_flight == 0


def test_no_timer_of_a_hung_request_goes_off_later(caplog: pytest.LogCaptureFixture) -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.001)) as fleet:
        fleet[0].set_mode(Mode.SLOW, factor=100)
        with connect(fleet[0]) as hung, connect(fleet[0]) as later:
            ask(hung)
            while fleet[0].stats().requests != 1:
                pass
            fleet[0].set_mode(Mode.HANG)
            # Answered after the time of the hung one has passed.
            fleet[0].set_mode(Mode.SLOW, factor=200)
            ask(later)
            assert read_reply(later).status == 200
        # asyncio logs what a stray timer raises.
        assert caplog.records == []


def test_leaving_hang_closes_a_client_that_does_not_read() -> None:
    with Fleet(1, service_time=INSTANT) as fleet, connect(fleet[0]) as sock:
        # More than the kernel buffers for a client that reads nothing.
        fleet[0].set_body(b"x" * 20_000_000)
        ask(sock)
        while fleet[0].stats().by_status != {200: 1}:
            pass
        fleet[0].set_mode(Mode.HANG)
        ask(sock)
        until_in_flight(fleet[0], 1)
        fleet[0].restore()
        assert fleet[0].stats().open_connections == 0


def test_given_ports_are_used_and_taken_ones_refused(client: httpx.Client, processes: bool) -> None:
    with Fleet(2) as fleet:
        ports = [gateway.port for gateway in fleet]
    with Fleet(ports=ports, service_time=INSTANT, processes=processes) as fleet:
        assert [gateway.port for gateway in fleet] == ports
        assert client.get(f"http://127.0.0.1:{ports[1]}").status_code == 200
        threads = set(threading.enumerate())
        with pytest.raises(OSError, match=rf"gateway-0 cannot listen on http://127.0.0.1:{ports[1]}: .*in use"):
            with Fleet(ports=[ports[1]], processes=processes):
                pass
        assert set(threading.enumerate()) - threads == set()


def test_leaves_nothing_behind(client: httpx.Client, processes: bool) -> None:
    # What earlier tests left running may end meanwhile: only what is new counts.
    descriptors, threads = open_descriptors(), set(threading.enumerate())
    for _ in range(2):
        with Fleet(2, service_time=FOREVER, processes=processes) as fleet, connect(fleet[0]) as busy:
            ask(busy)
            until_in_flight(fleet[0], 1)
            fleet[1].kill()
        with pytest.raises(ConnectionRefusedError):
            connect(fleet[0])
    gc.collect()
    assert open_descriptors() - descriptors == set()
    assert set(threading.enumerate()) - threads == set()


def test_a_gateway_process_ends_with_its_parent() -> None:
    """A parent that is killed leaves no `with` block; its children notice their stdin."""
    code = "from pathlb.testing import Fleet; print(Fleet(1, processes=True).__enter__()[0].port, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        with socket.create_connection(("127.0.0.1", int(parent.stdout.readline())), timeout=20) as sock:
            parent.kill()
            # A reset; or a plain end, where the gateway went before it had accepted the connection.
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""


def test_a_dead_gateway_process_is_reported() -> None:
    with Fleet(1, processes=True) as fleet:
        fleet[0]._control._process.kill()  # type: ignore[attr-defined]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="gateway-0 ended by itself"):
                fleet[0].stats()


def test_unix_sockets(processes: bool) -> None:
    def get(path: str) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(path)
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return read_all(sock)

    with Fleet(2, service_time=INSTANT, uds=True, processes=processes) as fleet:
        path = fleet.urls[1].removeprefix("unix://")
        assert b"X-Gateway: gateway-1\r\n" in get(path)
        fleet[1].kill()
        with pytest.raises(ConnectionRefusedError):
            get(path)
        fleet[1].restore()
        assert get(path).startswith(b"HTTP/1.1 200 OK")
    assert not os.path.exists(os.path.dirname(path))


def test_every_gateway_has_service_times_of_its_own_and_the_seed_repeats_them() -> None:
    def sample(seed: int, index: int) -> float:
        settings = Fleet(2, service_time=ServiceTime.exponential(1), seed=seed)._settings[index]
        return settings.service_time.sample(random.Random(settings.seed))

    assert sample(1, 0) == sample(1, 0)
    assert len({sample(seed, index) for seed in (0, 1) for index in (0, 1)}) == 4


def test_misuse_is_told() -> None:
    fleet = Fleet(2)
    assert len(fleet) == 2
    for use in (lambda: fleet.urls, lambda: fleet[0]):
        with pytest.raises(UsageError, match="with"):
            use()
    with fleet:
        with pytest.raises(UsageError, match="running already"):
            fleet.__enter__()
        gateway = fleet[0]
    with pytest.raises(UsageError, match="with"):
        gateway.stats()
    for arguments in ({"n": 0}, {"n": 1, "ports": [1, 2]}, {"uds": True, "ports": [1]}):
        with pytest.raises(ValueError, match=r"gateway|ports"):
            Fleet(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"factor": 0.0}, "factor"), ({"status": 200}, "status"), ({"retry_after": "1\r\nX: y"}, "Retry-After")],
)
def test_impossible_modes_are_refused_and_change_nothing(
    client: httpx.Client, processes: bool, arguments: dict[str, object], message: str
) -> None:
    with Fleet(1, service_time=INSTANT, processes=processes) as fleet:
        with pytest.raises(ValueError, match=message):
            fleet[0].set_mode(Mode.FAIL, **arguments)  # type: ignore[arg-type]
        assert client.get(fleet[0].url).status_code == 200


def test_controlled_from_several_threads_at_once(client: httpx.Client, processes: bool) -> None:
    with Fleet(1, service_time=INSTANT, processes=processes) as fleet:

        def flap() -> None:
            for _ in range(20):
                fleet[0].kill()
                fleet[0].restore()

        threads = [threading.Thread(target=flap) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert client.get(fleet[0].url).status_code == 200


def test_a_caller_that_leaves_is_counted_out_once() -> None:
    with Fleet(1, service_time=ServiceTime.constant(0.05)) as fleet:
        gateway = fleet[0]
        with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            while not gateway.stats().requests:
                pass
        # The next answer comes after the time of the one that was left behind.
        with socket.create_connection(("127.0.0.1", gateway.port)) as caller:
            caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert caller.recv(65536).startswith(b"HTTP/1.1 200")
        assert gateway.stats().in_flight == 0

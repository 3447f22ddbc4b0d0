"""`pathlb serve` as an operator sees it: real processes, real signals, callers that count what they lose."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import trustme
import websockets
import websockets.sync.client
import websockets.sync.server
from servekit import CALL, PATIENCE, ROOT, TOKEN, Load, Served, alive, taken_port, until

from pathlb import Endpoint
from pathlb.cli import main
from pathlb.serving.checks import Address
from pathlb.serving.config import ServeConfig
from pathlb.serving.listen import listen
from pathlb.serving.render import render
from pathlb.serving.workers import Workers, _environment
from pathlb.testing import FaultServer, Fleet, Hang, ReadRequest, Send, ServiceTime, WaitFor, http_reply


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet(3, path=["eth"], service_time=ServiceTime.constant(0.002)) as fleet:
        yield fleet


def write_endpoints(file: Path, urls: list[str], more: str = "") -> None:
    """As a careful operator does it: the file is replaced at once."""
    draft = file.with_suffix(".new")
    draft.write_text(more + "".join(f'[[endpoints]]\nurl = "{url}"\n' for url in urls))
    draft.rename(file)


# --- one server for what leaves it as it was


@pytest.fixture(scope="module")
def served(fleet: Fleet) -> Iterator[Served]:
    with Served(*fleet.urls, "--workers", "2", "--profile", "path", "--service", "eth", "--access-log") as served:
        yield served
        assert served.end() == 0


def test_json_rpc_goes_through_to_the_fleet(served: Served) -> None:
    reply = served.post()
    assert reply.status_code == 200
    assert reply.json()["result"] == "0x3e8"
    assert "x-pathlb-endpoint" not in reply.headers
    assert "server" not in {name.lower() for name in reply.headers} or reply.headers["server"] != "uvicorn"


def test_the_only_service_need_not_be_named(served: Served) -> None:
    assert served.post(headers={}).json()["result"] == "0x3e8"


def test_every_worker_serves(served: Served) -> None:
    def everybody_has() -> bool:
        served.post()
        return all(sum(one["counts"]["picks"] for one in worker["endpoints"]) for worker in served.workers)

    assert len(served.pids) == 2
    until(everybody_has, "both workers were picked")


def test_the_access_log_has_a_line_a_request_without_what_is_secret(served: Served) -> None:
    served.post(
        "/v1/marked?apikey=hunter2&plain", headers={"Authorization": "Bearer hunter3", "Target-Service-Id": "eth"}
    )
    line = until(lambda: next((line for line in served.logged if "/v1/marked" in line), None))
    assert re.fullmatch(
        r"time=\S+Z caller=127\.0\.0\.1 method=POST path=/v1/marked\?apikey=\*&\* status=\d+ bytes=\d+ "
        r"seconds=\d\.\d{6} endpoint=http://127\.0\.0\.1:\d+ attempts=1",
        line,
    )
    assert "hunter" not in "".join(served.logged)


def test_admin_health_ready_and_snapshot(served: Served, fleet: Fleet) -> None:
    assert served.admin("GET", "/health") == (200, {"status": "up"})
    assert served.admin("GET", "/ready") == (200, {"ready": True})
    for worker in served.workers:
        assert [one["url"] for one in worker["endpoints"]] == fleet.urls
        assert worker["policy"] == "least connections"


def test_sighup_without_a_file_changes_nothing(served: Served) -> None:
    served.process.send_signal(signal.SIGHUP)
    until(lambda: served.heard("SIGHUP: there is no --config to read again"))
    assert served.post().status_code == 200


def test_every_worker_sees_a_drain_and_its_end(served: Served, fleet: Fleet) -> None:
    url = fleet.urls[1]
    assert served.admin("POST", f"/drain?endpoint={url}", TOKEN) == (200, {"endpoint": url, "draining": True})
    assert [states[url] for states in served.states()] == ["draining", "draining"]
    with Load(served.port) as load:
        pass
    assert load.gateways["gateway-1"] == 0
    assert served.admin("POST", f"/undrain?endpoint={url}", TOKEN)[0] == 200
    assert not {"draining"} & {states[url] for states in served.states()}
    assert load.lost == []


def test_draining_takes_the_token_and_a_known_endpoint(served: Served, fleet: Fleet) -> None:
    path = f"/drain?endpoint={fleet.urls[0]}"
    assert served.admin("POST", path)[0] == 401
    assert served.admin("POST", path, "wrong")[0] == 401
    assert served.admin("GET", path, TOKEN)[0] == 405
    assert served.admin("POST", "/drain?endpoint=http://elsewhere:1", TOKEN)[0] == 404
    assert served.admin("POST", "/drain", TOKEN)[0] == 400
    assert "draining" not in served.states()[0].values()


def test_a_killed_worker_comes_back_and_the_other_one_serves_meanwhile(served: Served, fleet: Fleet) -> None:
    assert served.admin("POST", f"/drain?endpoint={fleet.urls[2]}", TOKEN)[0] == 200
    before = served.pids
    with Load(served.port, callers=4, keep=False) as load:
        os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in served.pids, "the supervisor has noticed")
        load.wait_for(100)
        until(lambda: len(served.pids) == 2, "the worker is back")
        load.wait_for(100)
    # What it was busy with is lost with it; what only waited to be accepted is not.
    assert len(load.lost) <= 4
    assert load.refused == 0
    assert re.search(
        rf"worker {before[0]} was killed by SIGKILL; another one starts in [\d.]+ s", "\n".join(served.said)
    )
    # The new one knows what the operator has said.
    assert [states[fleet.urls[2]] for states in served.states()] == ["draining", "draining"]
    assert served.admin("POST", f"/undrain?endpoint={fleet.urls[2]}", TOKEN)[0] == 200


# --- the end


@pytest.mark.parametrize("keep", [True, False], ids=["kept connections", "a connection a request"])
def test_no_request_is_lost_at_sigterm(fleet: Fleet, keep: bool) -> None:
    with Served(*fleet.urls, "--workers", "2", "--profile", "path") as served:
        with Load(served.port, callers=16, keep=keep) as load:
            load.wait_for(200)
            assert served.end() == 0
            until(lambda: load.refused >= 16, "nobody listens")
    assert load.lost == []


def test_a_reply_under_way_is_brought_to_its_end() -> None:
    first, rest = b"data: 1\n\n", b"data: 2\n\n"
    stream = [
        ReadRequest(),
        Send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 18\r\n\r\n" + first),
        WaitFor("the rest"),
        Send(rest),
        Hang(),
    ]
    with FaultServer([stream]) as slow, Served(slow.url) as served:
        with httpx.stream("GET", served.url, trust_env=False, timeout=PATIENCE) as reply:
            parts = reply.iter_raw()
            assert next(parts) == first
            served.process.send_signal(signal.SIGINT)
            until(lambda: not listens(served.port), "no new connections")
            assert served.process.poll() is None
            slow.set("the rest")
            assert b"".join(parts) == rest
        assert served.process.wait(PATIENCE) == 0
        assert served.heard("SIGINT: no new connections; requests under way have 30 s")


def test_it_is_not_ready_while_it_drains() -> None:
    with FaultServer([[ReadRequest(), WaitFor("go"), Send(http_reply())]]) as slow, Served(slow.url) as served:
        with ThreadPoolExecutor() as threads:
            asking = threads.submit(served.post)
            slow.wait_for_requests(1)
            assert served.admin("GET", "/ready") == (200, {"ready": True})
            served.process.send_signal(signal.SIGTERM)
            until(lambda: not listens(served.port), "no new connections")
            assert served.admin("GET", "/ready") == (503, {"ready": False})
            assert [worker["in_flight"] for worker in served.workers] == [1]
            slow.set("go")
            assert asking.result().status_code == 200
        assert served.process.wait(PATIENCE) == 0


def test_what_takes_longer_than_the_grace_time_is_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "pathlb.toml"
    with FaultServer([[ReadRequest(), Hang()]]) as hanging:
        write_endpoints(file, [hanging.url], "grace = 1\n")
        with Served("--config", str(file)) as served, ThreadPoolExecutor() as threads:
            asking = threads.submit(served.post)
            until(lambda: hanging.requests, "it is under way")
            began = time.monotonic()
            assert served.end() == 0
            assert 1 <= time.monotonic() - began < 5
            with contextlib.suppress(httpx.RemoteProtocolError):  # without an answer, or with this one
                assert asking.result().status_code >= 500
            assert served.heard("1 requests were cut off: they took longer than the grace time of 1 s")
            assert served.heard("Traceback") is None


def test_a_websocket_is_closed_as_the_service_goes_away() -> None:
    with echoing_websockets() as url, Served(url, "--access-log") as served:
        with websockets.sync.client.connect(f"ws{served.url.removeprefix('http')}/feed?key=1", proxy=None) as socket:
            socket.send("hello")
            assert socket.recv(PATIENCE) == "hello"
            began = time.monotonic()
            served.process.send_signal(signal.SIGTERM)
            with pytest.raises(websockets.ConnectionClosed) as closed:
                socket.recv(PATIENCE)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code in (1001, 1012)
        assert served.process.wait(PATIENCE) == 0
        assert time.monotonic() - began < 10
        line = until(lambda: next((line for line in served.logged if "/feed" in line), None))
        assert " path=/feed?key=* status=101 bytes=5 " in line
        assert line.endswith(f" endpoint={url} attempts=1")
        assert served.heard("Traceback|WARNING|ERROR") is None


@contextlib.contextmanager
def echoing_websockets() -> Iterator[str]:
    """The URL of a server whose WebSockets say what they hear."""

    def echo(connection: websockets.sync.server.ServerConnection) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            for message in connection:
                connection.send(message)

    with websockets.sync.server.serve(echo, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


def test_a_second_signal_ends_it_at_once() -> None:
    with FaultServer([[ReadRequest(), Hang()]]) as hanging, Served(hanging.url) as served:
        with ThreadPoolExecutor() as threads:
            asking = threads.submit(served.post)
            until(lambda: hanging.requests, "it is under way")
            served.process.send_signal(signal.SIGINT)
            until(lambda: served.heard("no new connections"))
            served.process.send_signal(signal.SIGINT)
            assert served.process.wait(PATIENCE) == 1
            with pytest.raises(httpx.TransportError):
                asking.result()


def test_a_supervisor_that_is_killed_leaves_nobody_behind(fleet: Fleet) -> None:
    with Served(*fleet.urls, "--workers", "2") as served:
        pids = served.pids
        assert all(map(alive, pids))
        served.process.kill()
        until(lambda: not any(map(alive, pids)), "the workers have ended")
        assert not listens(served.port)


# --- new settings


def test_a_changed_file_and_sighup_change_the_endpoints_and_lose_nothing(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "pathlb.toml"
    general = 'profile = "path"\nworkers = 2\n'
    write_endpoints(file, fleet.urls[:1], general)
    with Served("--config", str(file)) as served:
        with Load(served.port) as load:
            assert set(load.gateways) == {"gateway-0"}

            write_endpoints(file, fleet.urls[1:], general)  # it is noticed
            until(lambda: [set(states) for states in served.states()] == [set(fleet.urls[1:])] * 2)
            load.wait_for(100)
            assert set(load.gateways) == {"gateway-0", "gateway-1", "gateway-2"}

            write_endpoints(file, fleet.urls, general)
            served.process.send_signal(signal.SIGHUP)
            until(lambda: [set(states) for states in served.states()] == [set(fleet.urls)] * 2)
            load.wait_for(100)

            # Other settings come into force as well, with a new balancer; the old one stays for what it has to do.
            with socket.create_connection(("127.0.0.1", served.port), timeout=PATIENCE) as slow:
                slow.sendall(b"POST /v1 HTTP/1.1\r\nHost: a\r\nTarget-Service-Id: eth\r\nConnection: close\r\n")
                slow.sendall(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(CALL) + CALL[:9])
                write_endpoints(file, fleet.urls, general + 'policy = "p2c"\ntell = true\n')
                until(lambda: {worker["policy"] for worker in served.workers} == {"p2c"})
                load.wait_for(100)
                slow.sendall(CALL[9:])
                assert slow.makefile("rb").read().startswith(b"HTTP/1.1 200 ")
            assert "x-pathlb-endpoint" in served.post().headers
            until(lambda: served.heard("3 endpoints, 0 new, 0 removed; changed: policy, tell"))

            file.write_text('policy = "p2c"\n[[endpoints]]\nurl = "gopher://a"\n')
            told = f"the configuration stays as it was: {file}:3: endpoints[0].url: 'gopher://a' must start with http"
            until(lambda: any(told in line for line in served.said), told)
            assert [set(states) for states in served.states()] == [set(fleet.urls)] * 2

            file.unlink()
            until(lambda: served.heard("pathlb.toml: cannot be read: No such file or directory"))

            write_endpoints(file, fleet.urls[:2], "keep_alive = 9\n" + general)
            until(lambda: served.heard("not before the next start: keep_alive"))
            load.wait_for(100)
        assert load.lost == []
        assert load.refused == 0


def probing(file: Path, urls: list[str]) -> None:
    """A balancer that waits for the first answers to its probes."""
    write_endpoints(file, urls, 'health = {path = "/health", timeout = 60}\n')


def test_while_a_reload_waits_for_a_probe_everything_else_goes_on(fleet: Fleet, tmp_path: Path) -> None:
    file, url = tmp_path / "pathlb.toml", fleet.urls[0]
    write_endpoints(file, fleet.urls)
    script = [ReadRequest(), WaitFor("go"), Send(http_reply(headers=[(b"Connection", b"close")]))]
    with FaultServer([script]) as slow, Served("--config", str(file)) as served:
        probing(file, [*fleet.urls, slow.url])
        served.process.send_signal(signal.SIGHUP)
        slow.wait_for_requests(1)
        assert served.admin("GET", "/ready") == (200, {"ready": True})
        assert served.post().status_code == 200
        assert served.admin("POST", f"/drain?endpoint={url}", TOKEN)[0] == 200
        assert [set(states) for states in served.states()] == [set(fleet.urls)]
        assert served.states()[0][url] == "draining"

        slow.set("go")
        until(lambda: slow.url in served.states()[0], "the new balancer")
        assert served.states()[0][url] == "draining"


def test_a_stop_ends_a_reload_that_waits_for_a_probe(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "pathlb.toml"
    write_endpoints(file, fleet.urls)
    with FaultServer([[ReadRequest(), Hang()]]) as hanging, Served("--config", str(file)) as served:
        probing(file, [*fleet.urls, hanging.url])
        served.process.send_signal(signal.SIGHUP)
        hanging.wait_for_requests(1)
        assert served.end() == 0
        assert served.heard("Traceback|WARNING|ERROR") is None


# --- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def test_a_tls_listener_takes_a_new_certificate_without_losing_anything(
    fleet: Fleet, tmp_path: Path, authority: trustme.CA
) -> None:
    file, old, new = tmp_path / "pathlb.toml", authority.issue_cert("127.0.0.1"), authority.issue_cert("127.0.0.1")
    tls = '[tls]\ncertificate = "chain.pem"\nkey = "key.pem"\n'

    def install(certificate: trustme.LeafCert) -> None:
        (tmp_path / "chain.pem").write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
        (tmp_path / "key.pem").write_bytes(certificate.private_key_pem.bytes())

    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    install(old)
    file.write_text("".join(f'[[endpoints]]\nurl = "{url}"\n' for url in fleet.urls) + tls)
    with Served("--config", str(file)) as served:
        assert served.url.startswith("https://")
        assert served.post(verify=trusting).json()["result"] == "0x3e8"
        before = shown_certificate(served.port, trusting)
        with Load(served.port, tls=trusting, keep=False) as load:
            install(new)
            served.process.send_signal(signal.SIGHUP)
            until(lambda: shown_certificate(served.port, trusting) != before, "the new certificate")
            # A plain caller is turned away, and harms nobody.
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{served.port}", trust_env=False, timeout=PATIENCE)
            (tmp_path / "key.pem").write_text("nonsense")
            served.process.send_signal(signal.SIGHUP)
            until(lambda: served.heard(r"stays as it was: \S+pathlb.toml:\d+: tls.certificate: .*no PEM certificate"))
            load.wait_for(20)
            assert served.end() == 0
        assert load.lost == []


def shown_certificate(port: int, trusting: ssl.SSLContext) -> bytes | None:
    with socket.create_connection(("127.0.0.1", port)) as plain:
        with trusting.wrap_socket(plain, server_hostname="127.0.0.1") as encrypted:
            return encrypted.getpeercert(binary_form=True)


# --- what keeps it from starting, or should not


@pytest.mark.parametrize("flag", ["--bind", "--admin"])
def test_a_taken_port_is_one_line_and_status_1(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    free = [] if flag == "--bind" else ["--bind", "127.0.0.1:0"]
    with taken_port() as port:
        assert main(["serve", "http://127.0.0.1:1", *free, flag, f"127.0.0.1:{port}"]) == 1
    line = capsys.readouterr().err
    assert line == f"pathlb: cannot listen on 127.0.0.1:{port}: Address already in use; another process listens there\n"


def test_a_sighup_before_it_serves_is_no_reason_to_end(tmp_path: Path) -> None:
    file = tmp_path / "pathlb.toml"
    os.mkfifo(file)
    command = [sys.executable, "-m", "pathlb", "serve", "--config", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        with file.open("w") as settings:  # which waits for the reader
            process.send_signal(signal.SIGHUP)
            settings.write("nonsense")
        assert process.stderr is not None
        assert process.stderr.read().startswith(f"pathlb: {file}:1: Expected '='")
        assert process.wait(PATIENCE) == 2


def test_workers_import_nothing_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resource.py").write_text("raise ImportError('from the current directory')")
    monkeypatch.chdir(tmp_path)
    config = render(ServeConfig(endpoints=(Endpoint("http://127.0.0.1:1"),)))

    async def start_and_stop() -> None:
        workers = Workers(1, listener, {"config": config, "drained": [], "name": "test"})
        await workers.start()
        await workers.stop(0.0)

    with listen(Address("127.0.0.1", 0)) as listener:
        asyncio.run(start_and_stop())


def test_workers_are_told_where_the_package_is_only_if_they_would_not_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/operator")
    monkeypatch.setattr(sys, "path", ["/current", "/standard/library", str(ROOT)])
    assert _environment()["PYTHONPATH"] == "/of/the/operator"
    monkeypatch.setattr(sys, "path", [str(ROOT), "/standard/library"])
    assert _environment()["PYTHONPATH"] == f"{ROOT}{os.pathsep}/of/the/operator"


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return False
    return True

"""`pathlb check`: one line per instance, that says what is wrong and what to do."""

from __future__ import annotations

import contextlib
import datetime
import errno
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import trustme

from pathlb.cli import main
from pathlb.cli.check import _Progress, diagnose
from pathlb.cli.readiness import Readiness, explain, read_readiness
from pathlb.config import Health
from pathlb.core.model import Endpoint, Sent
from pathlb.errors import Fault, UpstreamError
from pathlb.testing import (
    FaultServer,
    Fin,
    Fleet,
    Hang,
    Mode,
    Read,
    ReadRequest,
    Reset,
    Send,
    SendSlowly,
    ServiceMode,
    Step,
    black_hole,
    http_reply,
    refused_url,
)

Check = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Check:
    def run(*arguments: str) -> tuple[int, list[str]]:
        status = main(["check", *arguments])
        output = capsys.readouterr()
        assert output.err == ""
        return status, output.out.splitlines()

    return run


@pytest.fixture
def server() -> Iterator[Callable[..., FaultServer]]:
    """Starts a server that plays these steps on every connection."""
    with contextlib.ExitStack() as stack:
        yield lambda *steps: stack.enter_context(FaultServer([steps]))


def limit(steps: Sequence[Step]) -> str:
    """A short timeout where it is going to end, and one that a busy machine keeps where it is not."""
    return "0.2" if any(isinstance(step, Hang | SendSlowly) for step in steps) else "20"


# --- what is fine


def test_one_line_per_instance_in_the_order_given(check: Check) -> None:
    with Fleet(3) as fleet:
        status, lines = check(*fleet.urls)
        assert status == 0
        assert [line.split()[1] for line in lines] == fleet.urls
        assert all(line.startswith("ok    http://127.0.0.1:") and "  200 in " in line for line in lines)
        assert [gateway.stats().by_path for gateway in fleet] == [{"/health": 1}] * 3


def test_one_that_fails_makes_the_status_1(check: Check) -> None:
    with Fleet(2) as fleet:
        fleet[1].kill()
        status, lines = check(*fleet.urls)
    assert status == 1
    assert lines[0].startswith("ok    ")
    assert lines[1].startswith("FAIL  ")


def test_the_path_and_the_base_path_are_what_was_asked_for(check: Check, server: Callable[..., FaultServer]) -> None:
    asked = server(ReadRequest(), Send(http_reply(204, b"")))
    assert check(f"{asked.url}/base", "--path", "/ready?full=1")[0] == 0
    assert asked.requests[0].startswith(b"GET /base/ready?full=1 HTTP/1.1\r\nHost: 127.0.0.1")


def test_a_unix_socket(check: Check) -> None:
    with Fleet(1, uds=True) as fleet:
        assert check(fleet.urls[0])[0] == 0


# --- addresses that cannot be reached


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:3069", "bad URL: '127.0.0.1:3069' must start with http://, https:// or unix://"),
        ("http://127.0.0.1:99999", "has an invalid port; use 1 to 65535"),
        ("http://127.0.0.1/?a=b", "must not have a query or a fragment"),
    ],
)
def test_a_bad_url(url: str, message: str, check: Check) -> None:
    status, [line] = check(url)
    assert status == 1
    assert message in line


def test_credentials_are_not_repeated(check: Check) -> None:
    status, [line] = check("http://me:secret@127.0.0.1:3069")
    assert status == 1
    assert "secret" not in line
    assert "must not contain user info" in line


def test_a_name_that_does_not_resolve(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    _, [line] = check("http://gateway.invalid:3069")
    assert "the name 'gateway.invalid' does not resolve (Name or service not known)" in line


def test_refused(check: Check) -> None:
    with refused_url() as url:
        status, [line] = check(url)
    assert status == 1
    assert f"connection refused: nothing listens on {url[7:]}; start the gateway, or correct the port" in line


def test_a_connect_that_hangs(check: Check) -> None:
    with black_hole() as url:
        _, [line] = check(url, "--timeout", "0.2")
    assert f"timed out connecting to {url[7:]} after 0.2 s" in line


def test_a_unix_socket_that_is_not_there(check: Check, tmp_path: Path) -> None:
    _, [line] = check(f"unix://{tmp_path}/gw.sock")
    assert f"there is no socket {tmp_path}/gw.sock" in line


# --- instances that answer wrongly, or not at all


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([ReadRequest(), Hang()], "connected, but no HTTP answer within 0.2 s"),
        ([ReadRequest(), Reset()], "connected, but it hung up without an HTTP answer"),
        ([ReadRequest(), Fin()], "connected, but it hung up without an HTTP answer"),
        ([ReadRequest(), Send(b"220 mail.test ESMTP\r\n\r\n"), Fin()], "what answers is not HTTP/1.1"),
        ([ReadRequest(), Send(http_reply(headers=[(b"Content-Length", b"9")])), Fin()], "200, but the body broke off"),
        (
            [
                ReadRequest(),
                Send(http_reply(body=b"", headers=[(b"Content-Length", b"99")])),
                SendSlowly(b"x" * 99, 0.1),
            ],
            "answers, but was not done after 0.6 s",
        ),
        ([ReadRequest(), Send(http_reply(204, b""))], "ok  "),
        ([ReadRequest(), Send(http_reply(202))], "answered 202 to /health, expected 200 or 204"),
        ([ReadRequest(), Send(http_reply(301, headers=[(b"Location", b"/new")]))], "a redirect to /new"),
        ([ReadRequest(), Send(http_reply(401))], "answered 401 to /health: it wants credentials"),
        ([ReadRequest(), Send(http_reply(404))], "answered 404 to /health: the gateway answers, but not there"),
        ([ReadRequest(), Send(http_reply(429))], "answered 429 to /health: it is being throttled"),
    ],
)
def test_what_is_wrong(steps: list[Step], message: str, check: Check, server: Callable[..., FaultServer]) -> None:
    status, [line] = check(server(*steps).url, "--timeout", limit(steps))
    assert message in line
    assert status == (0 if message == "ok  " else 1)


def test_an_unhealthy_gateway(check: Check) -> None:
    with Fleet(1) as fleet:
        fleet[0].set_mode(Mode.FAIL, status=503)
        _, [line] = check(*fleet.urls)
    assert "answered 503 to /health: the gateway is up and says it is not well" in line


# --- TLS


class Quiet(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def tls_server(certificate: trustme.LeafCert) -> Iterator[str]:
    """URL of a server with that certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"https://localhost:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def trusted(ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return ca


def test_tls_that_is_fine(check: Check, trusted: trustme.CA) -> None:
    with tls_server(trusted.issue_cert("localhost")) as url:
        assert check(url)[0] == 0


def test_tls_with_a_ca_nobody_knows(check: Check, ca: trustme.CA) -> None:
    with tls_server(ca.issue_cert("localhost")) as url:
        _, [line] = check(url)
    assert "TLS: its certificate is not trusted" in line
    assert "SSL_CERT_FILE" in line


def test_tls_for_another_name(check: Check, trusted: trustme.CA) -> None:
    with tls_server(trusted.issue_cert("other.test")) as url:
        _, [line] = check(url)
    assert "TLS: its certificate is not for 'localhost'" in line
    assert "server_hostname" in line


def test_tls_expired(check: Check, trusted: trustme.CA) -> None:
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    with tls_server(trusted.issue_cert("localhost", not_before=past, not_after=past)) as url:
        _, [line] = check(url)
    assert "TLS: its certificate has expired" in line


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Read(5), Send(http_reply(400)), Fin()], "TLS: what listens on port"),
        ([Read(5), Fin()], "connected, but the TLS handshake broke off"),
        ([Read(5), Reset()], "connected, but the TLS handshake broke off"),
        ([Hang()], "connected, but the TLS handshake went unanswered"),
    ],
)
def test_https_to_what_speaks_no_tls(
    steps: list[Step], message: str, check: Check, server: Callable[..., FaultServer]
) -> None:
    _, [line] = check(server(*steps).url.replace("http:", "https:"), "--timeout", limit(steps))
    assert message in line
    assert "write http://" in line


def test_http_to_what_speaks_tls(check: Check, ca: trustme.CA) -> None:
    with tls_server(ca.issue_cert("localhost")) as url:
        _, [line] = check(url.replace("https:", "http:"))
    assert "if this is a TLS port, write https://" in line


# --- what is hard to bring about


@pytest.mark.parametrize(
    ("cause", "local", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), False, "no permission for 10.0.0.1:3069"),
        (OSError(errno.EMFILE, "Too many open files"), True, "this machine is out of descriptors, ports or memory"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), False, "cannot connect to 10.0.0.1:3069: it failed"),
        (ssl.SSLError(1, "[SSL: NO_SHARED_CIPHER]"), False, "TLS: the handshake failed"),
    ],
)
def test_diagnose(cause: OSError, local: bool, message: str) -> None:
    error = UpstreamError(Fault.CONNECT, Sent.NOT_SENT, "http://10.0.0.1:3069", "it failed", local=local)
    error.__cause__ = ExceptionGroup("all attempts", [cause])
    assert diagnose(error, Endpoint("http://10.0.0.1:3069"), _Progress(), Health("/health")).startswith(message)


# --- services of PATH gateways

PATH = ("--profile", "path", "--service", "eth", "--service", "solana")


def test_the_services_of_path_gateways(check: Check) -> None:
    with Fleet(2, path=["eth", "solana"]) as fleet:
        status, lines = check(*fleet.urls, *PATH)
        asked = [gateway.stats().by_path for gateway in fleet]
    assert status == 0
    assert [line[:4] for line in lines] == ["ok  ", "    ", "    "] * 2
    assert lines[1] == lines[4] == "      ok    eth     5 endpoints, block 1000"
    assert lines[2] == lines[5] == "      ok    solana  5 endpoints, block 1000"
    assert asked == [{"/health": 1, "/ready/eth": 1, "/ready/solana": 1}] * 2


def test_the_profile_alone_asks_for_no_service(check: Check) -> None:
    with Fleet(2, path=["eth"]) as fleet:
        status, lines = check(*fleet.urls, "--profile", "path")
        assert [gateway.stats().by_path for gateway in fleet] == [{"/health": 1}] * 2
    assert (status, len(lines)) == (0, 2)


def test_a_service_that_is_not_ready_on_one_instance(check: Check) -> None:
    with Fleet(3, path=["eth", "solana"]) as fleet:
        fleet[1].set_service("solana", ServiceMode.NO_SESSION)
        fleet[2].set_service("solana", ServiceMode.NOT_CONFIGURED)
        status, lines = check(*fleet.urls, *PATH)
    assert status == 1
    assert [line.split()[0] for line in lines] == ["ok", "ok", "ok", "ok", "ok", "FAIL", "ok", "ok", "FAIL"]
    assert lines[5] == (
        '      FAIL  solana  not ready: no session, 0 endpoints, "no active sessions could be retrieved for the '
        'service: service solana"; 1 of 2 others ready: ask again, a session may just be changing; else look at its '
        "full node and its log, or restart it"
    )
    assert '"ZERO owned apps found for service: solana"; 1 of 2 others ready: compare its owned_apps' in lines[8]


def test_a_service_that_nobody_is_ready_for(check: Check) -> None:
    with Fleet(2, path=["eth"]) as fleet:
        status, lines = check(*fleet.urls, "--profile", "path", "--service", "ehtereum")
    assert status == 1
    assert all("0 of 1 others ready: correct the service id, or stake an app for it" in lines[i] for i in (1, 3))


def test_an_instance_behind_the_best_is_told_and_is_no_failure(check: Check) -> None:
    with Fleet(3, path=["eth"]) as fleet:
        fleet[0].set_height(940)
        fleet[2].set_height(1001)
        status, lines = check(*fleet.urls, "--profile", "path", "--service", "eth")
    assert status == 0
    assert [line.partition(", ")[2] for line in lines[1::2]] == [
        "block 940, 61 behind the best",
        "block 1000, 1 behind the best",
        "block 1001",
    ]


def test_an_instance_that_is_down_is_not_asked_for_services(check: Check) -> None:
    with Fleet(2, path=["eth"]) as fleet:
        fleet[0].kill()
        status, lines = check(*fleet.urls, "--profile", "path", "--service", "eth")
    assert status == 1
    assert [line.split()[0] for line in lines] == ["FAIL", "ok", "ok"]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([Send(http_reply(200, b"<html>")), Fin()], "answered 200 to /ready/eth?detailed=true, but not as PATH does"),
        ([Send(http_reply(404)), Fin()], "answered 404 to /ready/eth?detailed=true, but not as PATH does"),
        ([Hang()], "no answer to /ready/eth?detailed=true within 0.2 s: it may be fetching a session"),
        ([Reset()], "connected, but it hung up without an HTTP answer"),
        ([Send(http_reply(headers=[(b"Content-Length", b"99")])), Fin()], "200, but the body broke off"),
        (
            [Send(http_reply(503, b'{"ready":false,"message":"readiness reporting not available"}\n')), Fin()],
            'not ready: no session, 0 endpoints, "readiness reporting not available": look at the full node',
        ),
    ],
)
def test_readiness_that_cannot_be_told(
    steps: list[Step], message: str, check: Check, server: Callable[..., FaultServer]
) -> None:
    first = (ReadRequest(), Send(http_reply(200, b"")), ReadRequest())
    url = server(*first, *steps).url
    status, lines = check(url, "--profile", "path", "--service", "eth", "--timeout", limit(steps))
    assert status == 1
    assert lines[0].startswith("ok    ")
    assert lines[1].startswith("      FAIL  eth  ")
    assert message in lines[1]


@pytest.mark.parametrize(
    ("told", "others", "message"),
    [
        (Readiness(True, 1, True, "", None), [], "1 endpoint"),
        (Readiness(True, 3, True, "", None), [Readiness(True, 3, True, "", 7)], "3 endpoints, no block seen yet"),
        (Readiness(False, 0, True, "", 7), [], "not ready: a session, 0 endpoints: it filtered every supplier out"),
        (
            Readiness(False, 0, False, "error getting the selected app from the HTTP request: <nil>", None),
            [],
            'from the HTTP request: <nil>": in delegated mode PATH is ready for nothing; leave --service out',
        ),
    ],
)
def test_readiness_in_words(told: Readiness, others: list[Readiness], message: str) -> None:
    assert message in explain(told, others)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b'"services"', b'{"services":{}}', b'{"ready":1}', b"[" * 100_000, b"\xff"]
)
def test_what_is_no_readiness(body: bytes) -> None:
    assert read_readiness("eth", body) is None


def test_what_path_says_is_repeated_on_one_line_and_not_for_ever() -> None:
    told = read_readiness("eth", json.dumps({"ready": False, "message": "no\n\x1b[31m" + "x" * 999}).encode())
    assert told is not None
    assert told.error.startswith("no  [31mxxx")
    assert len(told.error) < 210

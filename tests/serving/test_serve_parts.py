"""The parts of `pathlb serve` one by one: channel, admin, workers, what is built from the settings."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from servekit import ROOT, nothing

from pathlb import Balancer, ConfigError, Endpoint, Limits
from pathlb.asgi.gateway import BrokenOff
from pathlb.asgi.types import Message
from pathlb.cli import main
from pathlb.exchange import Request, Timeouts
from pathlb.serving.admin import Admin
from pathlb.serving.build import check_buildable, make_balancer, make_tls, share_of
from pathlb.serving.channel import Asker, ChannelClosed, Refused, answer_all
from pathlb.serving.checks import TLS, Address
from pathlb.serving.config import ServeConfig
from pathlb.serving.listen import address_of, listen, refuse_new
from pathlb.serving.worker import Worker, _Expected

pytestmark = pytest.mark.anyio

A = (Endpoint("http://127.0.0.1:1"),)


# --- the channel


async def test_questions_are_answered_in_order_with_results_and_errors() -> None:
    async def handle(question: dict[str, Any]) -> Any:
        if question["do"] == "fail":
            raise ConfigError("endpoints", "must not")
        await asyncio.sleep(0)
        return question

    ours, theirs = socket.socketpair()
    answering = asyncio.create_task(answer_all(theirs, handle))
    asker = await Asker.open(ours)
    first, failed, second = await asyncio.gather(
        asker.ask("say", n=1), asker.ask("fail"), asker.ask("say", text="x" * 200_000), return_exceptions=True
    )
    assert first == {"do": "say", "n": 1}
    assert isinstance(failed, Refused)
    assert str(failed) == "endpoints: must not"
    assert len(second["text"]) == 200_000
    theirs.shutdown(socket.SHUT_RDWR)
    with pytest.raises(ChannelClosed):
        await asker.ask("say")
    await answering
    with pytest.raises(ChannelClosed):
        await asker.ask("say")


# --- admin


class Operated:
    """Two workers, one of which does not answer."""

    admin_token: str | None = "t0ken"

    def __init__(self, *states: str, problems: list[str] | None = None) -> None:
        self._states = states
        self._problems = problems or []

    async def snapshots(self) -> list[dict[str, Any]]:
        return [{"pid": 1, "endpoints": [{"state": state} for state in self._states]}, {"pid": 2, "error": "it ended"}]

    async def set_drained(self, url: str, drained: bool) -> list[str]:
        if url != A[0].url:
            raise ConfigError("endpoint", f"{url} is none of the endpoints")
        return self._problems


async def ask(operated: Operated, method: str, path: str, authorization: bytes = b"Bearer t0ken") -> tuple[int, bytes]:
    said: list[Message] = []

    async def send(message: Message) -> None:
        said.append(message)

    path, _, query = path.partition("?")
    headers = [(b"authorization", authorization)] if authorization else []
    scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": headers}
    await Admin(operated)(scope, nothing, send)
    return said[0]["status"], said[1]["body"]


@pytest.mark.parametrize(
    ("states", "status"),
    [
        (["ready"], 200),
        (["draining", "slow start"], 200),
        (["breaker open", "throttled"], 200),
        (["breaker open", "ejected", "health check failed", "draining"], 503),
        ([], 503),
    ],
)
async def test_ready_is_an_endpoint_in_service(states: list[str], status: int) -> None:
    assert (await ask(Operated(*states), "GET", "/ready"))[0] == status


DRAIN = f"/drain?endpoint={A[0].url}"


@pytest.mark.parametrize(
    ("method", "path", "authorization", "status", "told"),
    [
        ("HEAD", "/health", b"", 200, "up"),
        ("POST", "/health", b"", 405, "/health takes GET"),
        ("GET", "/", b"", 404, "there are /health, /ready, /snapshot, /drain, /undrain"),
        ("GET", "/drain", b"", 405, "/drain takes POST"),
        ("POST", DRAIN, b"Bearer t0ken", 200, "true"),
        ("POST", DRAIN, b"bearer  t0ken", 200, "true"),
        ("POST", DRAIN, b"", 401, "Authorization: Bearer TOKEN"),
        ("POST", DRAIN, b"Basic t0ken", 401, "the admin token is needed"),
        ("POST", DRAIN, b"Bearer t0ke\xff", 401, "the admin token is needed"),
        ("POST", "/drain?endpoint=a&endpoint=b", b"Bearer t0ken", 400, "name one endpoint"),
        ("POST", "/undrain?endpoint=http://b", b"Bearer t0ken", 404, "http://b is none of the endpoints"),
    ],
)
async def test_admin_answers(method: str, path: str, authorization: bytes, status: int, told: str) -> None:
    answered, body = await ask(Operated("ready"), method, path, authorization)
    assert answered == status
    assert told in body.decode()


async def test_nobody_drains_where_there_is_no_token() -> None:
    operated = Operated("ready")
    operated.admin_token = None
    assert (await ask(operated, "POST", DRAIN, b"Bearer None"))[0] == 403


async def test_a_drain_that_a_worker_did_not_take_is_told() -> None:
    assert (await ask(Operated(problems=["worker 1: it ended"]), "POST", DRAIN))[0] == 500


# --- what is built


def test_limits_are_those_of_all_workers_together() -> None:
    assert share_of(Limits(concurrency=500, queue=10, queue_timeout=3), 3) == Limits(167, 4, 3)


def test_settings_add_to_those_of_the_profile() -> None:
    config = ServeConfig(
        endpoints=A,
        profile="path",
        services={"eth": "json_rpc"},
        timeouts={"connect": 0.1},
        health={"interval": 2},
        limits={"queue": 7},
        jsonrpc={"split": 3},
    )
    balancer = make_balancer(config)
    assert balancer.timeouts[:2] == (0.1, 12.0)
    assert balancer._prober is not None
    assert balancer._prober._config.services == {"eth": "/ready/eth"}
    assert balancer._prober._config.interval == 2
    check_buildable(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"outlier": False, "breaker": {"failures": 2}, "jsonrpc": {}},
        {"outlier": {"confirm": 1}, "health": {}, "policy": "round-robin", "panic": {"fail_closed": True}},
        {"profile": "path", "health": False, "app_address": "pokt1", "block_height": {"lag": 1}},
    ],
)
def test_every_setting_can_be_built(settings: dict[str, Any]) -> None:
    check_buildable(ServeConfig(endpoints=A, **settings))


def test_the_timeouts_of_a_request_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Timeouts] = []
    monkeypatch.setattr(Balancer, "send", lambda self, request: seen.append(request.timeouts))
    balancer = make_balancer(ServeConfig(endpoints=A, timeouts={"read": 7}))
    own = balancer.timeouts._replace(read=None)  # as for events, which may be hours apart
    balancer.send(Request("GET", b"/", [], timeouts=own))
    assert seen == [own]


async def test_a_certificate_of_another_kind_replaces_the_one_before(tmp_path: Path) -> None:
    authority = trustme.CA()
    files = str(tmp_path / "a.crt"), str(tmp_path / "a.key")
    config = ServeConfig(endpoints=A, bind=Address("127.0.0.1", 0), tls=TLS(*files))
    listener = listen(config.bind)
    worker = Worker(listener, None)

    async def is_served_by(kind: str) -> bool:
        caller = ssl.create_default_context()
        authority.configure_trust(caller)
        caller.maximum_version = ssl.TLSVersion.TLSv1_2  # where a cipher goes with a kind of certificate
        caller.set_ciphers(f"ECDHE-{kind}-AES128-GCM-SHA256")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", address_of(listener).port, ssl=caller)
        except (ssl.SSLError, ConnectionError):
            return False
        writer.close()
        await writer.wait_closed()
        return True

    for kind, other in (("RSA", "ECDSA"), ("ECDSA", "RSA")):
        leaf = authority.issue_cert("127.0.0.1", key_type=trustme.KeyType[kind])
        leaf.private_key_and_cert_chain_pem.write_to_path(files[0])
        leaf.private_key_pem.write_to_path(files[1])
        await worker._apply(config, [], "name")
        assert await is_served_by(kind)
        assert not await is_served_by(other)
    assert worker._server is not None
    assert worker._balancer is not None
    await worker._server.drain(0)
    await worker._balancer.aclose()


@pytest.mark.parametrize(
    ("certificate", "key", "told"),
    [
        ("a", "b", "the key does not belong to the certificate"),
        ("a", "nonsense", "no PEM certificate with its key, without a password"),
        ("nonsense", "a", "no PEM certificate with its key, without a password"),
        ("a", "locked", "no PEM certificate with its key, without a password"),
    ],
)
def test_certificates_that_are_no_use(certificate: str, key: str, told: str, tmp_path: Path) -> None:
    authority = trustme.CA()
    for name in ("a", "b"):
        leaf = authority.issue_cert("127.0.0.1")
        (tmp_path / f"{name}.crt").write_bytes(leaf.cert_chain_pems[0].bytes())
        (tmp_path / f"{name}.key").write_bytes(leaf.private_key_pem.bytes())
        private = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
        locked = serialization.BestAvailableEncryption(b"secret")
        (tmp_path / "locked.key").write_bytes(
            private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked)
        )
    for suffix in ("crt", "key"):
        (tmp_path / f"nonsense.{suffix}").write_text("nonsense")
    files = str(tmp_path / f"{certificate}.crt"), str(tmp_path / f"{key}.key")
    with pytest.raises(ConfigError, match=f"^tls.certificate: {re.escape(', '.join(files))}: {told}$"):
        make_tls(ServeConfig(endpoints=A, tls=TLS(*files)))


# --- listening


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (errno.EADDRNOTAVAIL, "this machine has no such address"),
        (errno.EACCES, "ports below 1024 are for root, or for CAP_NET_BIND_SERVICE"),
    ],
)
def test_why_it_cannot_listen(code: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(socket.socket):
        def bind(self, address: object, /) -> None:
            raise OSError(code, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(OSError, match=rf"^cannot listen on 127\.0\.0\.1:80: no; {told}$"):
        listen(Address("127.0.0.1", 80))


def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(OSError, match=r"^cannot listen on nowhere:80: Name or service not known$"):
        listen(Address("nowhere", 80))


def test_a_name_with_both_kinds_of_addresses_is_the_ipv4_one(monkeypatch: pytest.MonkeyPatch) -> None:
    four, six = (
        (family, socket.SOCK_STREAM, 0, "", where)
        for family, where in ((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0)))
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [six, four])
    with listen(Address("localhost", 0)) as listener:
        assert address_of(listener).host == "127.0.0.1"


@pytest.mark.skipif(not socket.has_ipv6, reason="there is no IPv6")
def test_all_addresses_are_those_of_ipv4_too() -> None:
    with listen(Address("::", 0)) as listener:
        socket.create_connection(("127.0.0.1", address_of(listener).port), timeout=5).close()


# --- workers


def test_without_a_server_library_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['uvicorn'] = None; import pathlb.cli; sys.exit(pathlb.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "serve", A[0].url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stderr == "pathlb: serving needs uvicorn: pip install 'pathlb[serve]'\n"


def test_a_worker_that_does_not_come_up_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["serve", A[0].url, "--bind", "127.0.0.1:0"]) == 1
    assert caplog.messages[-1].endswith("ended with status 1 before it served anything")


def test_a_worker_that_cannot_be_started_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert main(["serve", A[0].url, "--bind", "127.0.0.1:0", "--workers", "2"]) == 1
    assert "a worker could not be started: [Errno 2] No such file or directory" in caplog.messages[-1]


def test_what_the_gateway_does_on_purpose_is_not_logged_as_an_error() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Expected())
    told = logging.Logger("uvicorn.error")
    told.addHandler(handler)
    told.warning("Invalid HTTP request received.")
    told.error("Cancel %s running task(s), timeout graceful shutdown exceeded", 1)
    for error in (BrokenOff("on purpose"), asyncio.CancelledError(), TypeError("a bug")):
        told.error("Exception in ASGI application\n", exc_info=error)
    assert stream.getvalue().count("Exception in ASGI application") == 1
    assert "a bug" in stream.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such filter")
def test_who_has_connected_is_accepted_when_nobody_may_begin_to_any_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as first, socket.socket() as second:
        listener.setblocking(False)
        first.connect(listener.getsockname())
        refuse_new(listener)
        second.setblocking(False)
        assert second.connect_ex(listener.getsockname()) == errno.EINPROGRESS
        accepted, peer = listener.accept()
        accepted.close()
        assert peer == first.getsockname()
        with pytest.raises(BlockingIOError):
            listener.accept()

"""`pathlb check URL...`: probe each instance as a client would, and say what is wrong and what to do about it."""

from __future__ import annotations

import argparse
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel

from ..config import Health
from ..core.config import BlockHeight
from ..core.errors import ConfigError
from ..core.model import Endpoint
from ..errors import Fault, UpstreamError
from ..exchange import Headers, Reply, Request, Timeouts
from ..profile import PATHProfile
from ..upstream.base import Upstream, UpstreamFactory
from ..upstream.oserrors import causes_of
from ..upstream.transport import TransportUpstreams
from . import number
from .readiness import Readiness, explain, read_readiness

_HOSTNAME_MISMATCH = 62  # X509_V_ERR_HOSTNAME_MISMATCH
_IP_MISMATCH = 64  # X509_V_ERR_IP_ADDRESS_MISMATCH
_EXPIRED = 10  # X509_V_ERR_CERT_HAS_EXPIRED
_NO_VERDICT = (ssl.SSLWantReadError, ssl.SSLWantWriteError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The TLS errors that only say the peer went silent or away."""
_READ = 2**22  # bytes of an answer that are looked at: PATH's details list every supplier


@dataclass(frozen=True, slots=True)
class Finding:
    """What one probe came to: of an instance, or of a service on it."""

    name: str
    ok: bool
    what: str
    services: tuple[Finding, ...] = ()

    @property
    def fine(self) -> bool:
        return self.ok and all(service.ok for service in self.services)

    def __str__(self) -> str:
        lines = [f"{'ok  ' if self.ok else 'FAIL'}  {self.name}  {self.what}"]
        return "\n      ".join(lines + [str(service) for service in self.services])


class Unanswered(Exception):
    """There was no answer, or not a whole one; the message says why and what to do."""

    def __init__(self, why: str, fault: Fault | None = None) -> None:
        super().__init__(why)
        self.fault = fault


Told = dict[str, Readiness | str]
"""By service: what an instance says of it, or why it could not be asked."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 if every instance, and every --service on it, is fine, 1 if one is not, 2 for bad usage. "
        "To be some blocks behind is no failure."
    )
    parser.add_argument("urls", nargs="+", metavar="URL", help="http://host:port, https://... or unix:///path")
    parser.add_argument("--path", default="/health", help="what to ask for (default %(default)s)")
    parser.add_argument(
        "--timeout", type=number(0.001), default=2.0, help="seconds to connect, and to answer (default %(default)g)"
    )
    parser.add_argument("--profile", choices=["path"], help="what kind of gateways they are (default: any)")
    parser.add_argument(
        "--service",
        action="append",
        default=[],
        metavar="ID",
        dest="services",
        help="with --profile path: ask whether they are ready for this service too; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    findings: list[Finding] = anyio.run(check_all, options.urls, what_to_ask(options))
    for finding in findings:
        print(finding)
    return 0 if all(finding.fine for finding in findings) else 1


def what_to_ask(options: argparse.Namespace) -> Health:
    """The probes that a balancer with these settings makes. Raises `ConfigError`."""
    if options.profile is None:
        if options.services:
            raise ConfigError("--service", "needs --profile path: other gateways cannot be asked for their services")
        return Health(options.path, timeout=options.timeout)
    try:
        # With block heights its paths ask for the details.
        profile = PATHProfile(services=options.services, block_height=BlockHeight())
    except ConfigError as exc:
        raise ConfigError("--service", exc.problem) from None
    assert profile.health is not None
    return replace(profile.health, path=options.path, timeout=options.timeout)


async def check_all(urls: Sequence[str], health: Health) -> list[Finding]:
    """Probe all at once; one finding each, in the order given."""
    checked: dict[int, tuple[Finding, Told]] = {}
    upstreams = TransportUpstreams()

    async def check(index: int, url: str) -> None:
        checked[index] = await check_one(url, health, upstreams)

    async with anyio.create_task_group() as group:
        for index, url in enumerate(urls):
            group.start_soon(check, index, url)
    everything = [told for _, told in checked.values()]
    return [
        replace(finding, services=tuple(_services(told, [other for other in everything if other is not told])))
        for finding, told in (checked[index] for index in range(len(urls)))
    ]


def _services(told: Told, others: Sequence[Told]) -> Iterator[Finding]:
    """What one instance says of its services, seen beside the others."""
    width = max(map(len, told), default=0)
    for service, said in told.items():
        name = service.ljust(width)
        if isinstance(said, str):
            yield Finding(name, False, said)
        else:
            answers = [other.get(service) for other in others]
            readable = [answer for answer in answers if isinstance(answer, Readiness)]
            yield Finding(name, said.ready, explain(said, readable))


async def check_one(url: str, health: Health, upstreams: UpstreamFactory) -> tuple[Finding, Told]:
    """Ask one instance for `health.path` and then for its services, by the way a client would take to it."""
    try:
        endpoint = Endpoint(url)
    except ConfigError as exc:
        # The message may not repeat credentials, and neither may the line.
        return Finding(url if "@" not in url else "(URL with user info)", False, f"bad URL: {exc.problem}"), {}
    failed = partial(Finding, endpoint.url, False)
    told: Told = {}
    upstream = upstreams(endpoint)
    # Let the others build theirs (a TLS context takes 20 ms), so that no latency has that in it.
    await anyio.lowlevel.checkpoint()
    try:
        answer = await _ask(upstream, endpoint, health.path, health, _Progress())
        if answer.status not in health.statuses:
            return failed(_wrong_status(answer, health)), told
        async with anyio.create_task_group() as group:
            told.update(dict.fromkeys(health.services, ""))  # in the order given
            for service in health.services:
                group.start_soon(_ask_service, upstream, endpoint, service, health, told)
    except Unanswered as exc:
        return failed(str(exc)), told
    finally:
        with anyio.CancelScope(shield=True):
            await upstream.aclose()
    return Finding(endpoint.url, True, f"{answer.status} in {answer.seconds * 1000:.0f} ms"), told


async def _ask_service(upstream: Upstream, endpoint: Endpoint, service: str, health: Health, told: Told) -> None:
    path = health.services[service]
    try:
        # The instance has just been connected to, and may be over the same connection.
        answer = await _ask(upstream, endpoint, path, health, _Progress(connected=True))
    except Unanswered as exc:
        told[service] = (
            f"no answer to {path} within {health.timeout:g} s: it may be fetching a session; look at its full node, "
            "or give a longer --timeout"
            if exc.fault is Fault.READ_TIMEOUT
            else str(exc)
        )
        return
    told[service] = (
        read_readiness(service, answer.body)
        or f"answered {answer.status} to {path}, but not as PATH does: it is another gateway, or something before it"
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Headers
    body: bytes
    seconds: float
    """Up to its head."""


async def _ask(upstream: Upstream, endpoint: Endpoint, path: str, health: Health, progress: _Progress) -> _Answer:
    """A whole answer. Raises `Unanswered`."""
    limit = health.timeout
    request = Request(
        "GET",
        path.encode("ascii"),
        [(b"Accept", b"*/*"), (b"User-Agent", b"pathlb-check")],
        timeouts=Timeouts(connect=limit, read=limit, write=limit),
        extensions={"trace": progress},
    )
    started = time.monotonic()
    reply: Reply | None = None
    seconds = 0.0
    body = bytearray()
    try:
        # Each step has its own timeout; this one is for an answer that trickles in for ever.
        with anyio.fail_after(3 * limit):
            reply = await upstream.send(request, [])
            seconds = time.monotonic() - started
            async for part in reply.body:
                body += part[: _READ - len(body)]
    except UpstreamError as exc:
        if reply is not None:
            why = f"answered {reply.status}, but the body broke off ({exc.detail}): look at the gateway's log"
            raise Unanswered(why) from exc
        raise Unanswered(diagnose(exc, endpoint, progress, health), exc.fault) from exc
    except TimeoutError as exc:
        why = f"answers, but was not done after {3 * limit:g} s: it is overloaded, or --path is a stream"
        raise Unanswered(why) from exc
    finally:
        if reply is not None:
            with anyio.CancelScope(shield=True):
                await reply.body.aclose()
    return _Answer(reply.status, reply.headers, bytes(body), seconds)


class _Progress:
    """How far the connection came, from httpcore's trace events."""

    def __init__(self, *, connected: bool = False) -> None:
        self.connected = connected
        self.handshaking = False

    async def __call__(self, name: str, info: Any) -> None:
        if name in ("connection.connect_tcp.complete", "connection.connect_unix_socket.complete"):
            self.connected = True
        elif name.startswith("connection.start_tls."):
            self.handshaking = not name.endswith(".complete")


def diagnose(error: UpstreamError, endpoint: Endpoint, progress: _Progress, health: Health) -> str:
    """What is wrong and what to do, for a probe that brought no reply."""
    where = endpoint.uds or f"{endpoint.host}:{endpoint.port}"
    for cause in causes_of(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _NO_VERDICT):
            return f"TLS: {_tls(cause, endpoint)}"
        if isinstance(cause, socket.gaierror):
            return f"the name {endpoint.host!r} does not resolve ({cause.strerror}): correct it, or look at the DNS"
        if isinstance(cause, ConnectionRefusedError):
            return f"connection refused: nothing listens on {where}; start the gateway, or correct the port"
        if isinstance(cause, FileNotFoundError):
            return f"there is no socket {where}: start the gateway, or correct the path"
        if isinstance(cause, PermissionError):
            return f"no permission for {where}: look at the socket's owner and mode, or at the firewall"
    if error.local:
        return f"this machine is out of descriptors, ports or memory ({error.detail}); the instance is not to blame"
    if progress.handshaking:
        what = "went unanswered" if error.fault is Fault.CONNECT_TIMEOUT else f"broke off ({error.detail})"
        return f"connected, but the TLS handshake {what}: if {where} speaks plain HTTP, write http://"
    if error.fault is Fault.CONNECT_TIMEOUT:
        return (
            f"timed out connecting to {where} after {health.timeout:g} s: the host is down, a firewall drops "
            "the packets, or it is too busy to accept"
        )
    if not progress.connected:
        return f"cannot connect to {where}: {error.detail}"
    if error.fault is Fault.READ_TIMEOUT:
        return (
            f"connected, but no HTTP answer within {health.timeout:g} s: it hangs, is no HTTP server, or needs "
            "a longer --timeout"
        )
    tls_port = "if this is a TLS port, write https://; else " if endpoint.scheme == "http" else ""
    if error.fault is Fault.REMOTE_PROTOCOL and "disconnected" not in error.detail:
        return f"what answers is not HTTP/1.1 ({error.detail}): {tls_port}look at what listens on {where}"
    if error.fault in (Fault.READ, Fault.WRITE, Fault.REMOTE_PROTOCOL):
        return f"connected, but it hung up without an HTTP answer ({error.detail}): {tls_port}look at its log"
    return error.detail


def _tls(error: ssl.SSLError, endpoint: Endpoint) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        reason = getattr(error, "reason", None)  # OpenSSL's own errors have one
        if reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG"):
            return f"what listens on port {endpoint.port} does not speak it: write http://, or correct the port"
        return f"the handshake failed ({reason or error}): look at the gateway's TLS settings and log"
    if error.verify_code in (_HOSTNAME_MISMATCH, _IP_MISMATCH):
        return (
            f"its certificate is not for {endpoint.host!r}: use the name it is for, "
            "or give that to Endpoint(server_hostname=...)"
        )
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: renew it"
    return (
        f"its certificate is not trusted ({error.verify_message}): for a CA of your own set SSL_CERT_FILE "
        "to its certificate, or give verify= to the client"
    )


def _wrong_status(answer: _Answer, health: Health) -> str:
    status = answer.status
    said = f"answered {status} to {health.path}"
    if status in (401, 403):
        return f"{said}: it wants credentials for that; give a --path that is open"
    if status in (404, 405):
        return f"{said}: the gateway answers, but not there; give its health --path"
    if 300 <= status < 400:
        location = next((value.decode("latin-1") for name, value in answer.headers if name.lower() == b"location"), "")
        return f"{said}, a redirect to {location or 'nowhere'}: give the address it stands for"
    if status == 429:
        return f"{said}: it is being throttled; ask less often"
    if status >= 500:
        return f"{said}: the gateway is up and says it is not well; look at its log"
    return f"{said}, expected {' or '.join(str(one) for one in sorted(health.statuses))}: give its health --path"

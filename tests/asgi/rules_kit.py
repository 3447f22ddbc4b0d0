"""Real servers with a Gateway, each in a process of its own, and raw sockets on both sides of them.

`README.md` beside this says where the servers differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pathlb.testing import FaultServer, ReadRequest, Script, Send, Step, http_reply

KINDS = ["uvicorn-h11", "uvicorn-httptools", "hypercorn", "granian"]
PATIENCE = 20.0
"""Seconds any wait may take before the test fails; none should."""

_HERE = Path(__file__).parent
_RST_ON_CLOSE = struct.pack("ii", 1, 0)
Pairs = list[tuple[bytes, bytes]]


class Sent(NamedTuple):
    """A request as an upstream got it."""

    line: bytes
    headers: Pairs
    body: bytes
    raw: bytes

    def all(self, name: bytes) -> list[bytes]:
        return [value for known, value in self.headers if known.lower() == name]

    def one(self, name: bytes) -> bytes:
        (value,) = self.all(name)
        return value


class Answer(NamedTuple):
    """What a caller got."""

    status: int
    headers: Pairs
    body: bytes
    whole: bool
    """It came to the end that its head had announced. Without an announcement any end will do."""
    framed: bool
    """Its head says where it ends."""

    def all(self, name: bytes) -> list[bytes]:
        return [value for known, value in self.headers if known == name]

    def one(self, name: bytes) -> bytes:
        (value,) = self.all(name)
        return value

    @property
    def problem(self) -> Any:
        """The body of a problem, which it has to be."""
        assert self.one(b"content-type") == b"application/problem+json"
        content = json.loads(self.body)
        assert content["status"] == self.status
        return content


class Caller:
    """One connection to a server, by hand."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.interim: list[int] = []
        """Statuses of the informational replies so far."""
        self._inbox = b""

    def send(self, *data: bytes) -> None:
        for part in data:
            self.sock.sendall(part)

    def ask(self, *data: bytes, method: bytes | None = None) -> Answer:
        """Send a request, and read the answer."""
        self.send(*data)
        return self.answer(head_only=(method or data[0]).startswith(b"HEAD"))

    def answer(self, *, head_only: bool = False) -> Answer:
        """Read one answer. Raises `EOFError` when the connection ends before there is a head."""
        status, headers = self.head()
        fields = dict(headers)
        if head_only or status in (204, 304):
            return Answer(status, headers, b"", True, True)
        if fields.get(b"transfer-encoding", b"").lower() == b"chunked":
            assert b"content-length" not in fields
            return Answer(status, headers, *self._chunks(), True)
        if b"content-length" in fields:
            length = int(fields[b"content-length"])
            body = self._take(length)
            return Answer(status, headers, body, len(body) == length, True)
        body = b""
        while part := self._take(1):
            body += part
        return Answer(status, headers, body, True, False)

    def head(self) -> tuple[int, Pairs]:
        """Read the head of an answer."""
        while True:
            lines = [self._line()]
            while lines[-1] != b"\r\n":
                lines.append(self._line())
            status = int(lines[0].split()[1])
            if status >= 200 or status == 101:
                pairs = [line.partition(b":") for line in lines[1:-1]]
                return status, [(name.lower(), value.strip()) for name, _, value in pairs]
            self.interim.append(status)

    def read(self, count: int) -> bytes:
        """So many bytes, which have to come."""
        data = self._take(count)
        assert len(data) == count
        return data

    def until(self, mark: bytes) -> bytes:
        """What comes up to and including these bytes, which have to come."""
        while mark not in self._inbox:
            assert self._more()
        at = self._inbox.index(mark) + len(mark)
        data, self._inbox = self._inbox[:at], self._inbox[at:]
        return data

    def rest(self) -> bytes:
        """What comes until the server ends the connection."""
        while self._more():
            pass
        data, self._inbox = self._inbox, b""
        return data

    def ended(self) -> bool:
        """Whether the server ends the connection, and without another byte."""
        return not self._more() and not self._inbox

    def reset(self) -> None:
        """Leave, rudely."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST_ON_CLOSE)
        self.sock.close()

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def _more(self) -> bool:
        try:
            data = self.sock.recv(65_536)
        except ConnectionError:
            return False
        self._inbox += data
        return bool(data)

    def _line(self) -> bytes:
        while b"\n" not in self._inbox:
            if not self._more():
                raise EOFError(self._inbox)
        line, _, self._inbox = self._inbox.partition(b"\n")
        return line + b"\n"

    def _take(self, count: int) -> bytes:
        while len(self._inbox) < count and self._more():
            pass
        data, self._inbox = self._inbox[:count], self._inbox[count:]
        return data

    def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        with contextlib.suppress(EOFError):
            while size := int(self._line().partition(b";")[0], 16):
                data = self._take(size)
                body += data
                if len(data) < size:
                    return body, False
                self._line()
            while self._line() != b"\r\n":
                pass
            return body, True
        return body, False


class Upstream(FaultServer):
    """An upstream that keeps the bytes of each request, and plays `reply` after it."""

    def __init__(self, *reply: Step | bytes, script: Script | None = None) -> None:
        steps = [Send(step) if isinstance(step, bytes) else step for step in reply or (http_reply(),)]

        def forever(_: int) -> Iterator[Step]:
            while True:
                yield ReadRequest()
                yield from steps

        super().__init__(forever if script is None else [script])  # type: ignore[arg-type]  # any iterable will do

    @property
    def sent(self) -> list[Sent]:
        """The requests."""
        return [_parse(raw) for raw in self.requests]

    def one(self) -> Sent:
        """The only request."""
        (request,) = self.sent
        return request


class Gone(Step):
    """Wait until the client closes, whatever it sends before, and say so."""

    def __init__(self) -> None:
        self.happened = threading.Event()
        self.received = 0

    def play(self, channel: Any) -> None:
        try:
            while data := channel.reader.read1(65_536):
                self.received += len(data)
        finally:
            self.happened.set()

    def wait(self) -> None:
        assert self.happened.wait(PATIENCE), "the upstream connection is still open"


class Reads(Step):
    """Read so many bytes, and say so."""

    def __init__(self, count: int) -> None:
        self.happened = threading.Event()
        self._count = count

    def play(self, channel: Any) -> None:
        assert len(channel.reader.read(self._count)) == self._count
        self.happened.set()

    def wait(self) -> None:
        assert self.happened.wait(PATIENCE), "the upstream has not been sent enough"


class Does(Step):
    """Call a function."""

    def __init__(self, what: Callable[[], object]) -> None:
        self._what = what

    def play(self, channel: Any) -> None:
        self._what()


class Front:
    """One server, with whatever Gateway the test at hand needs."""

    def __init__(self, kind: str, port: int, log: Path) -> None:
        self.kind = kind
        self.port = port
        self._log = log

    def gateway(self, *upstreams: FaultServer | str, **options: Any) -> None:
        """Requests from now on are for this Gateway (`rules_site.make_gateway`)."""
        urls = [one if isinstance(one, str) else one.url for one in upstreams]
        body = json.dumps({"endpoints": urls or None, **options}).encode()
        with Caller(self.port) as caller:
            head = b"POST /~gateway HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: %d\r\n\r\n" % len(body)
            try:
                assert caller.ask(head + body).status == 204
            except (AssertionError, EOFError):
                pytest.fail(self.log[-5_000:])

    def call(self) -> Caller:
        return Caller(self.port)

    def ask(self, *data: bytes) -> Answer:
        """One request on a connection of its own."""
        with self.call() as caller:
            return caller.ask(*data)

    @property
    def log(self) -> str:
        """What the server has written to its log."""
        return self._log.read_text(errors="replace")


@contextlib.contextmanager
def serving(kind: str) -> Iterator[Front]:
    """A server in a process of its own. Nothing is left of it, and nothing may have gone wrong in it.

    Its environment names a proxy that does not exist: nobody is to ask for it.
    """
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    path = os.pathsep.join([str(_HERE), str(_HERE.parent.parent)])
    environment = {**os.environ, **nowhere, "PYTHONPATH": path}
    with tempfile.TemporaryDirectory(prefix="pathlb-rules-") as folder:
        log = Path(folder) / "log"
        with (
            log.open("wb") as stream,
            subprocess.Popen(
                [sys.executable, "-W", "error", str(_HERE / "rules_site.py"), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=environment,
                cwd=folder,
                start_new_session=True,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                line = process.stdout.readline()
                assert line, log.read_text()
                port = int(line)
                _await(port, process, log)
                yield Front(kind, port, log)
                process.stdin.close()  # which ends it
                process.wait(PATIENCE)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        wrong = re.findall(r".*(?:Warning|never awaited|never retrieved|was destroyed).*", log.read_text())
        assert not wrong, log.read_text()


def _await(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), PATIENCE).close()
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)


def get(target: bytes = b"/", *fields: bytes, host: bytes = b"gateway.test", method: bytes = b"GET") -> bytes:
    """A request without a body; `fields` are whole lines, without their ends."""
    return b"\r\n".join([b"%b %b HTTP/1.1" % (method, target), b"Host: " + host, *fields, b"", b""])


def post(body: bytes = b"x=1", *fields: bytes, target: bytes = b"/", method: bytes = b"POST") -> bytes:
    """A request with a body."""
    return get(target, *fields, b"Content-Length: %d" % len(body), method=method) + body


def chunked(*parts: bytes, trailers: Sequence[bytes] = ()) -> bytes:
    """A body in chunks."""
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    return b"".join([*chunks, b"0\r\n", *(b"%b\r\n" % field for field in trailers), b"\r\n"])


def _parse(raw: bytes) -> Sent:
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *fields = head.split(b"\r\n")
    pairs = [field.partition(b": ") for field in fields]
    return Sent(line, [(name, value) for name, _, value in pairs], body, raw)

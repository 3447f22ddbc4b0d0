"""`pathlb serve` as a process of its own, and callers that count what they lose."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from pathlb.asgi.types import Message

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
CALL = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
TOKEN = "s3cret-t0ken"


def until(condition: Callable[[], Any], what: str = "", patience: float = PATIENCE) -> Any:
    """What `condition` answers as soon as it is true; fails after a time."""
    end = time.monotonic() + patience
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {patience:g} s: {what or condition}"
        time.sleep(0.01)
    return value


class Served:
    """A running `pathlb serve`. Its stderr and stdout are read all along."""

    def __init__(self, *arguments: str, token: str | None = TOKEN, bind: str = "127.0.0.1:0") -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        environment.pop("PATHLB_ADMIN_TOKEN", None)
        if token is not None:
            environment["PATHLB_ADMIN_TOKEN"] = token
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pathlb", "serve", "--bind", bind, "--admin", "0", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self.said: list[str] = []
        self.logged: list[str] = []
        self._readers = [
            threading.Thread(target=_read, args=(stream, lines))
            for stream, lines in ((self.process.stderr, self.said), (self.process.stdout, self.logged))
        ]
        for reader in self._readers:
            reader.start()
        until(lambda: self.process.poll() is not None or self.heard("serving http"), "it serves")
        line = self.heard("serving http") or ""
        assert line, self.said
        found = re.search(r"serving (https?)://127.0.0.1:(\d+).* admin on (http://\S+)", line)
        assert found is not None, line
        self.port = int(found[2])
        self.url = f"{found[1]}://127.0.0.1:{self.port}"
        self.admin_url = found[3]

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()
            for reader in self._readers:
                reader.join(PATIENCE)
            for stream in (self.process.stderr, self.process.stdout):
                if stream is not None:
                    stream.close()

    def heard(self, pattern: str) -> str | None:
        """The last line on stderr with this in it."""
        return next((line for line in reversed(self.said) if re.search(pattern, line)), None)

    def end(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def admin(self, method: str, path: str, token: str | None = None) -> tuple[int, Any]:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        reply = httpx.request(method, self.admin_url + path, headers=headers, trust_env=False, timeout=PATIENCE)
        return reply.status_code, reply.json()

    @property
    def workers(self) -> list[dict[str, Any]]:
        snapshot = self.admin("GET", "/snapshot")[1]["workers"]
        assert isinstance(snapshot, list)
        return snapshot

    @property
    def pids(self) -> list[int]:
        return [worker["pid"] for worker in self.workers]

    def states(self) -> list[dict[str, str]]:
        """What each worker says of each endpoint."""
        return [{one["url"]: one["state"] for one in worker.get("endpoints", ())} for worker in self.workers]

    def post(self, path: str = "/v1", **options: Any) -> httpx.Response:
        options.setdefault("headers", {"Target-Service-Id": "eth"})
        return httpx.post(self.url + path, content=CALL, trust_env=False, timeout=PATIENCE, **options)


def _read(stream: Any, lines: list[str]) -> None:
    while line := stream.readline():
        lines.append(line.rstrip("\n"))


def alive(pid: int) -> bool:
    """Whether the process is there, and no zombie that nobody waits for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


class Load:
    """Callers that ask all the time, in a thread, while the `with` block runs.

    `keep`: they keep their connection for as long as the server does. A refused connection is no loss: nobody listens.
    `lost` are the requests that were written and not answered with a 200.
    """

    def __init__(self, port: int, *, callers: int = 8, keep: bool = True, tls: ssl.SSLContext | None = None) -> None:
        self._port = port
        self._callers = callers
        self._keep = keep
        self._tls = tls
        self._over = threading.Event()
        self.answered = 0
        self.refused = 0
        self.lost: list[str] = []
        self.gateways: Counter[str] = Counter()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Load:
        self._thread.start()
        self.wait_for(50)
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def wait_for(self, more: int) -> None:
        """Until so many more requests have been answered."""
        target = self.answered + more
        until(lambda: self.answered >= target or self.lost, f"{more} answers")

    async def _run(self) -> None:
        await asyncio.gather(*(self._call() for _ in range(self._callers)))

    async def _call(self) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self._over.is_set():
            if connection is None:
                try:
                    connection = await asyncio.open_connection("127.0.0.1", self._port, ssl=self._tls)
                except OSError:
                    self.refused += 1
                    await asyncio.sleep(0.01)
                    continue
            reader, writer = connection
            try:
                closing = await asyncio.wait_for(self._ask(reader, writer), PATIENCE)
            except Exception as exc:
                self.lost.append(f"{type(exc).__name__}: {exc}")
                closing = True
            if closing or not self._keep:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                connection = None
        if connection is not None:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        writer.write(
            b"POST /v1 HTTP/1.1\r\nHost: x\r\nTarget-Service-Id: eth\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(CALL), CALL)
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n"))}
        body = await reader.readexactly(int(fields["content-length"]))
        if not head.startswith("HTTP/1.1 200 ") or "result" not in json.loads(body):
            raise AssertionError(head + body.decode("latin-1"))
        self.answered += 1
        self.gateways[fields.get("x-gateway", "")] += 1
        return "close" in fields.get("connection", "")


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


async def ignore(message: Message) -> None:
    """A caller that takes everything."""


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}

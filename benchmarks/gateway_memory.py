"""What `pathlb serve` holds in memory while it hands on much more: bodies, events and messages, fast and slow sides.

    python -m benchmarks.gateway_memory [--mib 1024] [--idle 10000]

One worker, whose callers are the usual ones: curl, httpx for the events, websockets. This process is what is behind it,
and makes or counts the bytes; both ends take a checksum, and anything that arrives otherwise than it was sent ends the
program. The worker's peak is the kernel's (VmHWM, set back before each line), and compared with its memory before the
first of them: what one transfer leaves behind counts against all that follow. The slow sides take 32 MiB a second of
what the other one offers at full speed: where that was held, it would show.

Exit status 1 if the target is missed: a peak of at most 100 MiB above idle. Linux only, and needs curl.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import httpx
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from pathlb.serving.server import new_event_loop

from .environment import require, require_descriptors, unwind_on_sigterm
from .gateway_faults import Served, serving

MIB = 2**20
LIMIT = 100 * MIB
SLOW = 32 * MIB  # bytes a second
SLOW_SHARE = 4  # a slow transfer is a quarter of the whole
PART = 65_536
LARGEST = 16 * MIB  # the largest WebSocket message there may be
_EVENT = 1024  # bytes of data
_AT_ONCE = 100  # connections being opened or asked on
_SPARE = 500  # descriptors for everything but idle connections
_BLOCK = random.Random(1).randbytes(LARGEST)


class Wrong(Exception):
    """Something arrived otherwise than it was sent."""


# --- bytes with a checksum, and a pace


@dataclass(slots=True)
class Tally:
    """What has passed by."""

    size: int = 0
    crc: int = 0

    def add(self, data: bytes) -> None:
        self.size += len(data)
        self.crc = zlib.crc32(data, self.crc)

    def check(self, expected: Tally) -> None:
        if self != expected:
            raise Wrong(f"{self.size} bytes with checksum {self.crc:08x}, {expected.size} with {expected.crc:08x} sent")


def parts(total: int, size: int = PART) -> Iterator[bytes]:
    """So many bytes, no two parts of which are alike."""
    for index in range(-(-total // size)):
        yield (b"%016d" % index + _BLOCK[16:size])[: total - index * size]


@cache
def tally_of(total: int) -> Tally:
    tally = Tally()
    for part in parts(total):
        tally.add(part)
    return tally


@dataclass(slots=True)
class Pace:
    """Keeps somebody to so many bytes a second."""

    rate: float
    began: float = field(default_factory=time.monotonic)
    size: int = 0

    async def keep(self, size: int) -> None:
        self.size += size
        ahead = self.began + self.size / self.rate - time.monotonic()
        if ahead > 0:
            await asyncio.sleep(ahead)


# --- behind the gateway


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of an HTTP server: `/down/N` and `/chunks/N` send, `/events/N` too, `/up` and `/slow` count."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            _, what, *number = head.split()[1].split("/")
            if what in ("up", "slow"):
                tally, pace = Tally(), Pace(SLOW) if what == "slow" else None
                async for part in body_of(head, reader):
                    tally.add(part)
                    if pace is not None:
                        await pace.keep(len(part))
                told = json.dumps({"size": tally.size, "crc": tally.crc}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
                continue
            await send_body(writer, what, int(number[0]))
    writer.close()


async def body_of(head: str, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    length = re.search(r"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    while left := int(length[1]) if length else int(await reader.readline(), 16):
        while left:
            part = await reader.read(min(left, PART))
            if not part:
                raise ConnectionError("the body ends early")
            left -= len(part)
            yield part
        if length:
            return
        await reader.readline()
    await reader.readline()


async def send_body(writer: asyncio.StreamWriter, what: str, total: int) -> None:
    kind = b"text/event-stream" if what == "events" else b"application/octet-stream"
    framing = b"Content-Length: %d" % total if what == "down" else b"Transfer-Encoding: chunked"
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n" % (kind, framing))
    for part in events(total) if what == "events" else parts(total):
        writer.write(part if what == "down" else b"%x\r\n%b\r\n" % (len(part), part))
        await writer.drain()
    if what != "down":
        writer.write(b"0\r\n\r\n")
    await writer.drain()


def events(count: int) -> Iterator[bytes]:
    data = b"x" * _EVENT
    for number in range(count):
        yield b"id: %d\ndata: %b\n\n" % (number, data)


async def talk(connection: ServerConnection) -> None:
    """One WebSocket: `/echo` says what it hears, `/flood/N` sends, `/slow` counts until it hears an empty message."""
    assert connection.request is not None
    _, what, *number = connection.request.path.split("/")
    with contextlib.suppress(ConnectionClosed):
        if what == "flood":
            for part in parts(int(number[0])):
                await connection.send(part)
            return
        tally, pace = Tally(), Pace(SLOW)
        while data := await connection.recv(decode=False):
            if what == "echo":
                await connection.send(data)
                continue
            tally.add(data)
            await pace.keep(len(data))
        await connection.send(json.dumps({"size": tally.size, "crc": tally.crc}))


# --- in front of it


async def curl(*arguments: str) -> tuple[Tally, bytes]:
    """What curl says on stdout, and the last part of it, which is all of a short answer. Raises `Wrong`."""
    command = ("curl", "--silent", "--show-error", "--fail", "--noproxy", "*", *arguments)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    tally, last = Tally(), b""
    try:
        while part := await process.stdout.read(4 * PART):
            tally.add(part)
            last = part
        if status := await process.wait():
            raise Wrong(f"curl ended with status {status}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return tally, last


async def download(url: str, total: int, *options: str) -> int:
    tally, _ = await curl(*options, f"{url}/{total}")
    tally.check(tally_of(total))
    return total


async def upload(url: str, file: Path, total: int, *options: str) -> int:
    _, told = await curl(*options, "--upload-file", str(file), url)
    Tally(**json.loads(told)).check(tally_of(total))
    return total


async def listen_to_events(url: str, total: int) -> int:
    count = total // _EVENT
    expected = 0
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        async with client.stream("GET", f"{url}/events/{count}") as reply:
            event: dict[str, str] = {}
            async for line in reply.aiter_lines():
                name, _, value = line.partition(": ")
                if name:
                    event[name] = value
                    continue
                if event != {"id": str(expected), "data": "x" * _EVENT}:
                    raise Wrong(f"event {expected} came as {str(event)[:100]}")
                expected, event = expected + 1, {}
    if expected != count:
        raise Wrong(f"{expected} of {count} events came")
    return count * _EVENT


async def echo(url: str, total: int, size: int, compression: str | None = None) -> int:
    sent, heard = Tally(), Tally()
    async with _socket(f"{url}/echo", compression) as connection:

        async def listen() -> None:
            while heard.size < total:
                heard.add(await connection.recv(decode=False))

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(listen())
            for part in parts(total, size):
                sent.add(part)
                await connection.send(part)
    heard.check(sent)
    return 2 * total


async def listen_slowly(url: str, total: int) -> int:
    heard, pace = Tally(), Pace(SLOW)
    async with _socket(f"{url}/flood/{total}") as connection:
        while heard.size < total:
            part = await connection.recv(decode=False)
            heard.add(part)
            await pace.keep(len(part))
    heard.check(tally_of(total))
    return total


async def flood(url: str, total: int) -> int:
    async with _socket(f"{url}/slow") as connection:
        for part in parts(total):
            await connection.send(part)
        await connection.send(b"")
        Tally(**json.loads(await connection.recv())).check(tally_of(total))
    return total


def _socket(url: str, compression: str | None = None) -> connect:
    return connect(url.replace("http", "ws", 1), compression=compression, max_size=None, proxy=None)


async def idle(port: int, count: int) -> int:
    """So many connections, on each of which nothing happens while others are served, and then something again."""
    gate = asyncio.Semaphore(_AT_ONCE)
    streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(which: int) -> None:
        async with gate:
            if which == len(streams):
                streams.append(await asyncio.open_connection("127.0.0.1", port))
            reader, writer = streams[which]
            writer.write(b"GET /down/5 HTTP/1.1\r\nHost: gateway\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200 ") or len(await reader.readexactly(5)) != 5:
                raise Wrong(head.decode("latin-1"))

    try:
        for which in range(count):
            await ask(which)
        for _ in range(10):
            await asyncio.gather(*map(ask, range(_AT_ONCE)))
        await asyncio.gather(*map(ask, range(count)))
    finally:
        for _, writer in streams:
            writer.close()
    return 0


# --- the report


class Meter:
    """The memory of one worker, line by line."""

    def __init__(self, served: Served) -> None:
        self._proc = Path(f"/proc/{served.workers()[0]['pid']}")
        self._idle = self._memory("VmRSS")
        self.missed: list[str] = []

    async def line(self, what: str, work: Callable[[], Awaitable[int]]) -> None:
        before = self._memory("VmRSS")
        (self._proc / "clear_refs").write_text("5")  # the peak is what it is now
        began = time.monotonic()
        moved = await work()
        seconds = time.monotonic() - began
        peak = self._memory("VmHWM")
        above = peak - self._idle
        moved_mib = f"{moved / MIB:,.0f}" if moved else "-"
        print(
            f"{what:<62} {moved_mib:>6} {seconds:8.1f} {self._idle / MIB:9.1f} {before / MIB:7.1f} {peak / MIB:7.1f} "
            f"{above / MIB:11.1f}",
            flush=True,
        )
        if above > LIMIT:
            self.missed.append(f"{what}: {above / MIB:.0f} MiB above idle, more than {LIMIT // MIB}")

    def _memory(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", (self._proc / "status").read_text())
        assert found is not None
        return int(found[1]) * 1024


async def measure(total: int, connections: int, folder: Path) -> list[str]:
    """All lines; the answer is what missed the target."""
    slow = total // SLOW_SHARE
    whole, quarter = folder / "whole", folder / "quarter"
    for file, size in ((whole, total), (quarter, slow)):
        with file.open("wb") as out:
            out.writelines(parts(size))
        tally_of(size)  # while nothing is timed
    settings = folder / "pathlb.toml"
    settings.write_text(f"max_body = {2 * total}\nkeep_alive = 600\n")  # idle for as long as this takes
    backend = await asyncio.start_server(answer, "127.0.0.1", 0)
    sockets = await serve(talk, "127.0.0.1", 0, compression="deflate", max_size=None)
    http, ws = (f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in (backend, sockets))
    print(f"{'':<62} {'MiB':>6} {'seconds':>8} {'RSS idle':>9} {'before':>7} {'peak':>7} {'above idle':>11}")
    async with backend, sockets:
        with serving(http, "--config", str(settings)) as served:
            meter = Meter(served)
            url = f"http://127.0.0.1:{served.port}"
            chunked = ("--header", "Transfer-Encoding: chunked")
            limited = ("--limit-rate", str(SLOW))
            line = meter.line
            await line("curl, download with Content-Length", partial(download, f"{url}/down", total))
            await line("curl, download in chunks", partial(download, f"{url}/chunks", total))
            await line("curl, upload with Content-Length", partial(upload, f"{url}/up", whole, total))
            await line("curl, upload in chunks", partial(upload, f"{url}/up", whole, total, *chunked))
            await line("curl, download by a slow reader", partial(download, f"{url}/down", slow, *limited))
            await line("curl, upload to an upstream that reads slowly", partial(upload, f"{url}/slow", quarter, slow))
            await line(f"httpx, server-sent events of {_EVENT} bytes", partial(listen_to_events, url, slow))
            await line(f"{connections:,} idle connections, others served", partial(idle, served.port, connections))
            missed = meter.missed
        with serving(ws, "--config", str(settings)) as served:
            meter = Meter(served)
            url, line = f"http://127.0.0.1:{served.port}", meter.line
            await line("websockets, echo in messages of 64 KiB", partial(echo, url, slow, PART))
            await line("websockets, the same, compressed", partial(echo, url, slow // 8, PART, "deflate"))
            await line("websockets, a slow reader", partial(listen_slowly, url, slow))
            await line("websockets, an upstream that reads slowly", partial(flood, url, slow))
            await line("websockets, echo in messages of 16 MiB, the largest", partial(echo, url, slow, LARGEST))
            return missed + meter.missed


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gateway_memory", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="of each fast transfer; others a quarter (default 1024)")
    parser.add_argument("--idle", type=int, default=10_000, help="idle connections (default 10000, or what is allowed)")
    options = parser.parse_args()
    if options.mib < 64 or options.idle < _AT_ONCE:
        parser.error(f"--mib must be at least 64, --idle at least {_AT_ONCE}")
    require([], ["curl"])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = options.idle if most == resource.RLIM_INFINITY else min(options.idle, most - _SPARE)
    require_descriptors(allowed + _SPARE)
    unwind_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="pathlb-") as folder:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            try:
                missed = runner.run(measure(options.mib * MIB, allowed, Path(folder)))
            except Wrong as exc:
                sys.exit(f"WRONG  {exc}")
    print("\n" + ("\n".join(f"MISSED  {what}" for what in missed) if missed else "every target met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

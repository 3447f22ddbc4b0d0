"""A server that plays a script on raw sockets: every way a peer can go wrong, on cue."""

from __future__ import annotations

import contextlib
import http
import io
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_NO_LINGER = struct.pack("ii", 1, 0)


class _Over(Exception):
    """The connection's script ends here: the client went away or the server stops."""


class _Channel:
    """What the steps of one connection act on."""

    def __init__(self, server: FaultServer, sock: socket.socket) -> None:
        self.server = server
        self.sock = sock
        self.reader = sock.makefile("rb")

    def wait(self, condition: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until the condition holds or the seconds have passed; a stopping server ends the script."""
        with self.server._changed:
            self.server._changed.wait_for(lambda: self.server._stopping or condition(), timeout)
            if self.server._stopping:
                raise _Over


class Step:
    """One thing a `FaultServer` does on a connection."""

    def play(self, channel: _Channel) -> None:
        """Do it. Blocks the connection's own thread."""
        raise NotImplementedError


Script = Sequence[Step]
"""What happens on one connection, in order. After the last step the connection is closed, as by `Close()`."""


@dataclass(frozen=True, slots=True)
class ReadRequest(Step):
    """Read one whole request, with its Content-Length or chunked body, and add it to `FaultServer.requests`.

    The script ends where the client closes instead.
    """

    def play(self, channel: _Channel) -> None:
        request = _read_request(channel.reader)
        with channel.server._changed:
            channel.server.requests.append(request)
            channel.server._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Read(Step):
    """Read `count` bytes (default 1) of whatever comes, and drop them: the start of a request, say."""

    count: int = 1

    def play(self, channel: _Channel) -> None:
        _exactly(channel.reader, self.count)


@dataclass(frozen=True, slots=True)
class Send(Step):
    """Send bytes."""

    data: bytes

    def play(self, channel: _Channel) -> None:
        channel.sock.sendall(self.data)


@dataclass(frozen=True, slots=True)
class SendSlowly(Step):
    """Send bytes one at a time, `gap` seconds before each but the first."""

    data: bytes
    gap: float

    def play(self, channel: _Channel) -> None:
        for index in range(len(self.data)):
            if index:
                channel.wait(lambda: False, self.gap)
            channel.sock.sendall(self.data[index : index + 1])


@dataclass(frozen=True, slots=True)
class Reset(Step):
    """Close with a RST; the script ends. The client may lose what was sent before and it had not read."""

    def play(self, channel: _Channel) -> None:
        channel.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        raise _Over


@dataclass(frozen=True, slots=True)
class Fin(Step):
    """End the stream cleanly and drop what still arrives until the client closes too; the script ends.

    Unlike `Close` it never becomes a RST, whatever the client sends.
    """

    def play(self, channel: _Channel) -> None:
        channel.sock.shutdown(socket.SHUT_WR)
        while channel.reader.read1(65536):
            pass
        raise _Over


@dataclass(frozen=True, slots=True)
class HalfClose(Step):
    """Close the write side and go on with the script: the server still reads."""

    def play(self, channel: _Channel) -> None:
        channel.sock.shutdown(socket.SHUT_WR)


@dataclass(frozen=True, slots=True)
class Hang(Step):
    """Do nothing until `FaultServer.release()`, then go on with the script; at once if that was called already."""

    def play(self, channel: _Channel) -> None:
        channel.wait(lambda: channel.server._released)


@dataclass(frozen=True, slots=True)
class WaitFor(Step):
    """Wait until the test calls `FaultServer.set(event)`; at once if it has already."""

    event: str

    def play(self, channel: _Channel) -> None:
        channel.wait(lambda: self.event in channel.server._set)


@dataclass(frozen=True, slots=True)
class Close(Step):
    """Close the connection; the script ends. With bytes unread, the kernel makes it a RST."""

    def play(self, channel: _Channel) -> None:
        raise _Over


class FaultServer:
    """Listens on 127.0.0.1 and plays a script on each connection, in a thread of its own, while its `with` block runs.

    `scripts` is a list with the script of the first connection, the second, ... (the last one goes on for all others),
    or a function from the connection's index, counted from 0, to its script.
    """

    def __init__(self, scripts: Sequence[Script] | Callable[[int], Script]) -> None:
        if callable(scripts):
            self._script_of = scripts
        elif scripts:
            self._script_of = lambda index: scripts[min(index, len(scripts) - 1)]
        else:
            raise ValueError("a FaultServer needs at least one script")
        self.requests: list[bytes] = []
        """Raw bytes of each request that `ReadRequest` has read completely, all connections together."""
        self.connections = 0
        """Connections accepted."""
        self._changed = threading.Condition()
        self._set: set[str] = set()
        self._released = False
        self._stopping = False
        self._running = contextlib.ExitStack()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._port = 0

    @property
    def port(self) -> int:
        """Where it listens, on 127.0.0.1."""
        return self._port

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def set(self, event: str) -> None:
        """Let every `WaitFor(event)` go on, now and later."""
        with self._changed:
            self._set.add(event)
            self._changed.notify_all()

    def release(self) -> None:
        """Let every `Hang` go on, now and later."""
        with self._changed:
            self._released = True
            self._changed.notify_all()

    def wait_for_requests(self, count: int, timeout: float = 10.0) -> None:
        """Block until `count` requests have been read. Raises `TimeoutError` after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= count, timeout):
                raise TimeoutError(f"{len(self.requests)} of {count} requests after {timeout} seconds")

    def __enter__(self) -> FaultServer:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            self._port = listener.getsockname()[1]
            # A blocked accept is not woken by closing its socket from another thread, a selector is by this pair.
            wake, waker = socket.socketpair()
            stack.enter_context(wake)
            stack.enter_context(waker)
            acceptor = threading.Thread(target=self._accept, args=(listener, wake), name="pathlb-faults", daemon=True)
            acceptor.start()
            stack.callback(self._join)
            stack.callback(acceptor.join)
            stack.callback(waker.send, b"x")
            self._running = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._running.close()

    def _join(self) -> None:
        """End every script and wait for the threads; nobody accepts any more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            for sock in self._open:
                # What a thread is blocked in returns; already disconnected is fine.
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self, listener: socket.socket, wake: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if wake in ready:
                    return
                sock, _ = listener.accept()
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._changed:
                    index = self.connections
                    self.connections += 1
                    self._open.add(sock)
                thread = threading.Thread(
                    target=self._play, args=(sock, index), name=f"pathlb-faults-{index}", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _play(self, sock: socket.socket, index: int) -> None:
        channel = _Channel(self, sock)
        try:
            for step in self._script_of(index):
                step.play(channel)
        except (_Over, OSError):
            # The script is over, or the client was faster to leave.
            pass
        finally:
            with self._changed:
                self._open.discard(sock)
            channel.reader.close()
            sock.close()


def http_reply(status: int = 200, body: bytes = b"ok", headers: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole HTTP/1.1 reply, with Content-Length unless `headers` frame the body themselves."""
    phrase = http.HTTPStatus(status).phrase.encode("ascii") if status in set(http.HTTPStatus) else b""
    fields = list(headers)
    if not {name.lower() for name, _ in fields} & {b"content-length", b"transfer-encoding"}:
        fields.append((b"Content-Length", b"%d" % len(body)))
    head = b"".join(b"%b: %b\r\n" % field for field in fields)
    return b"HTTP/1.1 %d %b\r\n%b\r\n%b" % (status, phrase, head, body)


def _read_request(reader: io.BufferedReader) -> bytes:
    """The bytes of one request, up to and including its body."""
    raw = _lines(reader)
    fields = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(b":") for line in raw.splitlines()[1:])
    }
    if fields.get(b"transfer-encoding", b"").lower().endswith(b"chunked"):
        while True:
            size_line = _line(reader)
            raw += size_line
            size = int(size_line.partition(b";")[0], 16)
            if size == 0:
                return raw + _lines(reader)
            raw += _exactly(reader, size + 2)
    return raw + _exactly(reader, int(fields.get(b"content-length", b"0")))


def _lines(reader: io.BufferedReader) -> bytes:
    """Lines up to and including an empty one."""
    lines = [_line(reader)]
    while lines[-1] != b"\r\n":
        lines.append(_line(reader))
    return b"".join(lines)


def _line(reader: io.BufferedReader) -> bytes:
    line = reader.readline()
    if not line.endswith(b"\r\n"):
        raise _Over
    return line


def _exactly(reader: io.BufferedReader, count: int) -> bytes:
    data = reader.read(count)
    if len(data) < count:
        raise _Over
    return data

"""The emulated gateway: what it does with requests, and its modes."""

from __future__ import annotations

import asyncio
import http
import random
import socket
from collections import Counter, deque
from pathlib import Path

from .connection import Connection, Exchange
from .model import Mode, ReceivedRequest, Settings, Stats

DEFAULT_BODY = b'{"jsonrpc":"2.0","id":1,"result":"0x1"}'
RECORD_LIMIT = 10_000
"""How many requests a recording gateway keeps, the latest ones."""

_BACKLOG = 4096


def reason_phrase(status: int) -> str:
    return http.HTTPStatus(status).phrase if status in http.HTTPStatus._value2member_map_ else "Emulated"


class Gateway:
    """One HTTP/1.1 server on a real socket, to be used on one asyncio event loop (`Fleet` works from anywhere).

    Every method and path gets a 200 with a small JSON body and `X-Gateway: <name>`; `GET /health` gets an empty 200
    that takes neither a worker nor service time. A request whose client has gone leaves the queue; one being served
    keeps its worker until its time is over, as in most servers.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings = settings or Settings()
        self.wants_requests = settings.record
        self.port = settings.port
        """The port listened on, once started; 0 for a unix socket."""
        self._rng = random.Random(settings.seed)
        self._mode = Mode.OK
        self._factor = 1.0
        self._status = 500
        self._retry_after = ""
        self._body = DEFAULT_BODY
        self._rendered: dict[tuple[int, bool, bool, bool], bytes] = {}
        self._held: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Connection] = set()
        self._serving: dict[Exchange, asyncio.TimerHandle] = {}
        self._waiting: deque[Exchange] = deque()
        self._requests = 0
        self._by_path: Counter[bytes] = Counter()
        self._by_status: Counter[int] = Counter()
        self._seen: Counter[bytes] = Counter()
        self._in_flight = 0
        self._max_in_flight = 0
        self._accepted = 0
        self._received: deque[ReceivedRequest] = deque(maxlen=RECORD_LIMIT)

    @property
    def url(self) -> str:
        """`http://host:port`, or `unix:///path`."""
        if self.settings.uds is not None:
            return f"unix://{self.settings.uds}"
        return f"http://{self.settings.host}:{self.port}"

    async def start(self) -> None:
        """Listen. Raises `OSError` when the port is taken; `aclose` then too."""
        if self.settings.uds is None:
            # Bound for as long as the gateway exists and never listened on: while it refuses connections, nobody
            # else is given its port.
            self._held = self._bind()
            self.port = self._held.getsockname()[1]
        await self._listen()

    async def aclose(self) -> None:
        """Stop listening and reset every connection. Twice is fine."""
        self._forget_all()
        await self._stop_listening()
        await self._drop(set(self._connections))
        if self._held is not None:
            self._held.close()
            self._held = None
        self._unlink()

    async def set_mode(self, mode: Mode, *, factor: float = 10.0, status: int = 500, retry_after: str = "1") -> None:
        """Behave like `mode` from now on; returns when it is in effect, for the requests in flight too.

        `factor` is SLOW's (default 10), `status` FAIL's (400 to 599, default 500), `retry_after` THROTTLE's header
        value (default `1`). Raises `ValueError` for values out of range, `OSError` when REFUSE is left and
        somebody took the port.
        """
        if not 400 <= status <= 599:
            raise ValueError(f"FAIL needs a status from 400 to 599, not {status!r}")
        if not factor > 0:
            raise ValueError(f"SLOW needs a factor above 0, not {factor!r}")
        if not retry_after.isprintable() or not retry_after.isascii():
            raise ValueError(f"Retry-After must be printable ASCII, not {retry_after!r}")
        left, self._mode = self._mode, mode
        self._factor = factor if mode is Mode.SLOW else 1.0
        self._status = status
        self._retry_after = retry_after
        self._rendered.clear()
        busy = {connection for connection in self._connections if connection.active is not None}
        if mode is Mode.HANG:
            self._forget_all()
        elif mode is Mode.RESET:
            self._forget_all()
            await self._drop(busy)
        elif mode is Mode.REFUSE:
            self._forget_all()
            await self._stop_listening()
            await self._drop(set(self._connections))
        elif left is Mode.HANG:
            await self._drop(busy, cleanly=True)
        if mode is not Mode.REFUSE and self._server is None:
            await self._listen()

    def set_body(self, body: bytes) -> None:
        """The body of every 200 but `/health`'s, from the next reply on."""
        self._body = body
        self._rendered.clear()

    def stats(self) -> Stats:
        """A snapshot of the counters."""
        return Stats(
            requests=self._requests,
            by_path=Counter({path.decode("latin-1"): count for path, count in self._by_path.items()}),
            by_status=self._by_status.copy(),
            in_flight=self._in_flight,
            max_in_flight=self._max_in_flight,
            open_connections=len(self._connections),
            connections=self._accepted,
            seen=self._seen.copy(),
        )

    def received(self) -> list[ReceivedRequest]:
        """The latest requests, oldest first, at most `RECORD_LIMIT`; empty unless `record` is set."""
        return list(self._received)

    # the socket

    def _bind(self) -> socket.socket:
        uds = self.settings.uds
        sock = socket.socket(socket.AF_INET if uds is None else socket.AF_UNIX)
        try:
            if uds is None:
                # On both sockets of the port, so that neither keeps the other from binding.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((self.settings.host, self.port))
            else:
                self._unlink()
                sock.bind(uds)
        except OSError as exc:
            sock.close()
            raise OSError(exc.errno, f"{self.settings.name} cannot listen on {self.url}: {exc.strerror}") from exc
        return sock

    def _unlink(self) -> None:
        if self.settings.uds is not None:
            Path(self.settings.uds).unlink(missing_ok=True)

    async def _listen(self) -> None:
        sock = self._bind()
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: Connection(self), sock=sock, backlog=_BACKLOG)
        except BaseException:
            sock.close()
            raise

    async def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        # asyncio takes a connection in two steps, and loses the socket of one whose server was closed in between.
        for sock in server.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        await asyncio.sleep(0)
        server.close()

    async def _drop(self, connections: set[Connection], *, cleanly: bool = False) -> None:
        for connection in connections:
            if cleanly:
                connection.hang_up()
            else:
                connection.reset()
        # asyncio closes the sockets in its next iteration, and the caller is promised they are closed.
        for connection in connections:
            await connection.lost.wait()

    # what connections tell

    def opened(self, connection: Connection) -> None:
        self._accepted += 1
        self._connections.add(connection)
        if self._server is None:
            # Accepted in the same iteration in which the gateway stopped listening.
            connection.reset()

    def head_read(self, connection: Connection, target: bytes, request_ids: list[bytes]) -> None:
        self._requests += 1
        self._by_path[target.partition(b"?")[0]] += 1
        for request_id in request_ids:
            self._seen[request_id] += 1
        self._in_flight += 1
        self._max_in_flight = max(self._max_in_flight, self._in_flight)

    def received_whole(self, request: ReceivedRequest) -> None:
        if self.settings.record:
            self._received.append(request)

    def malformed(self, connection: Connection) -> None:
        if connection.gone:
            return
        self._by_status[400] += 1
        connection.reply(self._render(400, False, False, False), False)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._in_flight -= connection.unanswered
        active = connection.active
        if active is not None and active in self._waiting:
            self._waiting.remove(active)

    def arrived(self, exchange: Exchange) -> None:
        mode = self._mode
        if exchange.connection.gone or mode is Mode.HANG:
            return
        if mode is Mode.RESET or mode is Mode.REFUSE:
            exchange.connection.reset()
        elif mode is Mode.FAIL:
            self._answer(exchange, self._status)
        elif exchange.health:
            self._answer(exchange, 200)
        elif mode is Mode.THROTTLE:
            self._answer(exchange, 429)
        elif self._has_worker():
            self._serve(exchange)
        elif self.settings.queue is None or len(self._waiting) < self.settings.queue:
            self._waiting.append(exchange)
        else:
            self._answer(exchange, 503)

    # serving

    def _has_worker(self) -> bool:
        return self.settings.workers is None or len(self._serving) < self.settings.workers

    def _serve(self, exchange: Exchange) -> None:
        seconds = self.settings.service_time.sample(self._rng) * self._factor
        if seconds == 0:
            self._answer(exchange, 200)
        else:
            self._serving[exchange] = asyncio.get_running_loop().call_later(seconds, self._served, exchange)

    def _served(self, exchange: Exchange) -> None:
        if self._freed_worker(exchange):
            self._answer(exchange, 200)

    def _freed_worker(self, exchange: Exchange) -> bool:
        """The time of the request is over. Says whether anybody is left to be answered."""
        del self._serving[exchange]
        # Before the answer: it may bring the connection's next request, which must not jump the queue.
        while self._waiting and self._has_worker():
            self._serve(self._waiting.popleft())
        # A connection that is gone has had its request taken out of the count already.
        return exchange is exchange.connection.active and not exchange.connection.gone

    def _forget_all(self) -> None:
        """Everything in flight stays unanswered."""
        for timer in self._serving.values():
            timer.cancel()
        self._serving.clear()
        self._waiting.clear()

    def _answer(self, exchange: Exchange, status: int) -> None:
        key = (status, exchange.health, exchange.without_body, exchange.keep_alive)
        data = self._rendered.get(key)
        if data is None:
            data = self._rendered[key] = self._render(*key)
        self._send(exchange, status, data, exchange.keep_alive)

    def _send(self, exchange: Exchange, status: int, data: bytes, keep_alive: bool) -> None:
        connection = exchange.connection
        connection.unanswered -= 1
        self._in_flight -= 1
        self._by_status[status] += 1
        connection.reply(data, keep_alive)

    def _render(self, status: int, health: bool, without_body: bool, keep_alive: bool) -> bytes:
        phrase = reason_phrase(status)
        if health:
            body = b""
        elif status == 200:
            body = self._body
        else:
            body = b'{"error":"%s"}' % phrase.encode("ascii")
        head = f"HTTP/1.1 {status} {phrase}\r\nX-Gateway: {self.settings.name}\r\nContent-Length: {len(body)}\r\n"
        if body:
            head += "Content-Type: application/json\r\n"
        if status == 429 and self._mode is Mode.THROTTLE:
            head += f"Retry-After: {self._retry_after}\r\n"
        if not keep_alive:
            head += "Connection: close\r\n"
        return f"{head}\r\n".encode("ascii") + (b"" if without_body else body)

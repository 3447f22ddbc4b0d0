"""A worker process: it accepts from the shared socket and balances. `python -P -m pathlb.serving.worker`.

It does what the supervisor says (`channel`), and ends when the supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from dataclasses import fields
from typing import Any

from ..asgi.gateway import BrokenOff
from ..asgi.types import ASGIApp, Receive, Scope, Send
from ..balancer import Balancer
from .access_log import AccessLogged, LineWriter
from .board import Board
from .build import make_balancer, make_gateway, make_tls
from .channel import answer_all
from .config import ServeConfig
from .load import read
from .server import UvicornServer, allow_many_connections, new_event_loop

logger = logging.getLogger("pathlb.serving")

_MARGIN = 5  # seconds beyond its grace time after which a worker that hangs is ended by its alarm


class Worker:
    """One worker: its balancer, its server, and what it is told."""

    def __init__(self, listener: socket.socket, place: tuple[Board, int] | None) -> None:
        self._listener = listener
        self._place = place
        self._config: ServeConfig | None = None
        self._balancer: Balancer | None = None
        self._app: ASGIApp | None = None
        self._server: UvicornServer | None = None
        self._lines: LineWriter | None = None
        self._drained: set[str] = set()
        """Of the balancer's endpoints."""
        self._to_drain: set[str] = set()
        """As told last, which may be meant for the next balancer already."""
        self._applying: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._grace: float | None = None

    async def run(self, channel: socket.socket) -> None:
        """Until it is told to stop, or nobody is left to tell it."""
        answering = asyncio.create_task(answer_all(channel, self._handle))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({answering, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await self._end()
        for task in (answering, stopping):
            task.cancel()

    async def _handle(self, question: dict[str, Any]) -> Any:
        match question["do"]:
            case "apply":
                await self._apply(read(question["config"], "config"), question["drained"], question["name"])
                return None
            case "drain":  # it does not wait for the turn, and for the probes that an `apply` may wait for
                self._to_drain = set(question["drained"])
                self._drain()
                return None
            case "snapshot":
                return self._balancer.snapshot().to_dict() if self._balancer is not None else None
            case "stop":
                self._grace = question["grace"]
                self._stop.set()
                return None
            case other:
                raise ValueError(f"a worker cannot {other!r}")

    async def _apply(self, config: ServeConfig, drained: list[str], name: str) -> None:
        """Make this the configuration, without losing a request: one after the other, and until the end at most."""
        self._to_drain = set(drained)
        task = asyncio.current_task()
        assert task is not None
        self._applying.add(task)
        try:
            async with self._turn:
                await self._change_to(config, name)
        finally:
            self._applying.discard(task)

    async def _change_to(self, config: ServeConfig, name: str) -> None:
        """The first one starts the server."""
        before = self._config
        if before is not None and self._balancer is not None and _same_balancer(before, config):
            self._balancer.update(config.endpoints)
        else:
            await self._replace(config, name)
        self._config = config
        self._drain()
        if self._server is None:
            server = UvicornServer(
                self._call,
                self._listener,
                tls=make_tls(config),
                keep_alive=config.keep_alive,
                max_message=config.max_message,
                place=self._place,
            )
            # Requests leave no cycles behind. Collecting as often as by default takes an eighth of a busy worker,
            # and full collections, which look at all that stays, stop it for 15 to 30 ms.
            gc.collect()
            gc.freeze()
            gc.set_threshold(50_000, 20, 50)
            await server.start()
            self._server = server
        elif self._server.tls is not None:
            self._server.tls = make_tls(config)  # the files may be others by now

    def _call(self, scope: Scope, receive: Receive, send: Send) -> Any:
        assert self._app is not None  # the server starts later
        return self._app(scope, receive, send)

    async def _replace(self, config: ServeConfig, name: str) -> None:
        """A new balancer for new requests; the old one ends with the last of its own."""
        balancer = make_balancer(config)
        app: ASGIApp = make_gateway(config, balancer, name)
        await balancer.__aenter__()  # which waits for the first probes
        if config.access_log:
            self._lines = self._lines or LineWriter()
            app = AccessLogged(app, self._lines)
        old, self._balancer, self._app, self._drained = self._balancer, balancer, app, set()
        if old is not None and self._server is not None:
            task = asyncio.create_task(_retire(old, self._server.requests()))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    def _drain(self) -> None:
        assert self._balancer is not None
        assert self._config is not None
        members = {endpoint.url for endpoint in self._config.endpoints}
        for url in (self._to_drain - self._drained) & members:
            self._balancer.drain(url)
        for url in (self._drained - self._to_drain) & members:
            self._balancer.undrain(url)
        self._drained = self._to_drain & members

    async def _end(self) -> None:
        grace = self._grace
        if grace is None:  # nobody says
            grace = self._config.grace if self._config is not None else 0.0
        signal.alarm(math.ceil(grace) + _MARGIN)
        applying = set(self._applying)
        for task in applying:
            task.cancel()
        if applying:
            await asyncio.wait(applying)
        if self._server is not None and (cut := await self._server.drain(grace)):
            logger.warning("%d requests were cut off: they took longer than the grace time of %g s", cut, grace)
        for task in list(self._retiring):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if self._balancer is not None:
            await self._balancer.aclose()
        if self._lines is not None:
            await asyncio.to_thread(self._lines.close)


def _same_balancer(one: ServeConfig, other: ServeConfig) -> bool:
    """Whether the endpoints are all that the balancers and gateways of these differ in, if in anything."""
    of_others = ("endpoints", "bind", "admin", "admin_token", "workers", "keep_alive", "grace", "tls")
    names = [field.name for field in fields(ServeConfig) if field.name not in of_others]
    return all(getattr(one, name) == getattr(other, name) for name in names)


async def _retire(balancer: Balancer, requests: set[asyncio.Task[None]]) -> None:
    """Close a balancer when nobody uses it any more: the requests that were under way when it was replaced."""
    try:
        if requests:
            await asyncio.wait(requests)
    finally:
        await balancer.aclose()


class _Expected(logging.Filter):
    """Leaves out what uvicorn tells of callers and upstreams: a reply cut short is how the gateway says so."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR:
            return False
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, BrokenOff | asyncio.CancelledError) and not record.msg.startswith("Cancel %s")


def set_up_logging() -> None:
    """To stderr, with the process: of the supervisor and of each worker."""
    logging.basicConfig(format="%(asctime)s pathlb[%(process)d] %(levelname)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").addFilter(_Expected())


def main() -> None:
    """Run a worker, on the descriptors of its end of the channel, of the listening socket and of the board."""
    # Signals are the supervisor's: it says what they mean, also to those that got them together with it.
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    set_up_logging()
    allow_many_connections()
    channel, listening, shared, slot, workers = map(int, sys.argv[1:])
    place = (Board(shared, workers), slot) if workers > 1 else None

    async def work() -> None:
        await Worker(socket.socket(fileno=listening), place).run(socket.socket(fileno=channel))

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(work())


if __name__ == "__main__":
    main()

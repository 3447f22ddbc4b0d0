"""The supervisor process: it holds the listening socket, the signals and the configuration, and starts the workers.

The workers inherit one listening socket, rather than having one each with SO_REUSEPORT: connections wait in one queue,
which a worker that dies does not take along, and the next one free takes them; with a queue each, those that the kernel
has given to a dead or busy worker would be lost, or wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import ConfigError
from ..core.model import Endpoint
from .admin import Admin
from .build import check_buildable
from .config import SETTINGS, ServeConfig
from .listen import address_of, listen
from .load import load, place_of
from .render import render
from .server import UvicornServer
from .workers import StartFailed, Workers

logger = logging.getLogger("pathlb.serving")

_LOOK_EVERY = 1.0  # seconds between two looks at the configuration file
_ADMIN_GRACE = 1.0
_AT_START = ("bind", "admin", "workers", "keep_alive", "max_message")


class Source:
    """Where the configuration comes from: the command line alone, or a file with what the command line adds."""

    def __init__(self, file: str | None, overrides: Mapping[str, Any]) -> None:
        self.file = file
        self._overrides = overrides
        self._seen = self._taken = self._stamp()

    def read(self) -> ServeConfig:
        """The configuration as it is now. Raises `ConfigError`."""
        if self.file is None:
            config = ServeConfig(**self._overrides)
            check_buildable(config)
            return config
        self._taken = self._stamp()
        try:
            config = load(self.file, self._overrides)
        except OSError as exc:
            raise ConfigError(self.file, f"cannot be read: {exc.strerror}") from None
        try:
            check_buildable(config)
        except ConfigError as exc:
            path = exc.field.split(".")
            raise ConfigError(place_of(self.file, *path), exc.problem) from None
        return config

    def has_changed(self) -> bool:
        """Whether the file is another one than was read, and still the one of the last look.

        Who writes it in place may be half way, and half a file may be a good one.
        """
        before, self._seen = self._seen, self._stamp()
        return self._seen == before != self._taken

    def _stamp(self) -> tuple[int, int, int] | None:
        if self.file is None:
            return None
        try:
            seen = os.stat(self.file)
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_ino, seen.st_size


def serve(source: Source) -> int:
    """Serve until told to stop; the answer is the exit status. Raises `ConfigError`, and `OSError` for a taken port."""
    config = source.read()
    listener = listen(config.bind)
    with listener:
        if config.admin is None:
            return asyncio.run(Supervisor(source, config, listener, None).run())
        with listen(config.admin) as admin:
            return asyncio.run(Supervisor(source, config, listener, admin).run())


class Supervisor:
    """One run of `pathlb serve`."""

    def __init__(
        self, source: Source, config: ServeConfig, listener: socket.socket, admin: socket.socket | None
    ) -> None:
        self._source = source
        self._config = config
        self._listener = listener
        self._admin = admin
        self._name = f"pathlb-{secrets.token_hex(4)}"  # in Via: one service, however many workers
        self._drained: set[str] = set()
        self._workers = Workers(config.workers, listener, self._state())
        self._stop = asyncio.Event()
        self._killed = False
        self._reload = asyncio.Event()

    @property
    def admin_token(self) -> str | None:
        return self._config.admin_token

    async def snapshots(self) -> list[dict[str, Any]]:
        return await self._workers.snapshots()

    async def set_drained(self, url: str, drained: bool) -> list[str]:
        url = Endpoint(url).url
        if url not in {endpoint.url for endpoint in self._config.endpoints}:
            raise ConfigError("endpoint", f"{url} is none of the endpoints")
        (self._drained.add if drained else self._drained.discard)(url)
        logger.info("%s %s", url, "gets no new requests" if drained else "is taken back")
        return await self._workers.drain(self._state())

    async def run(self) -> int:
        """Until a signal says to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop_on, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        admin: UvicornServer | None = None
        if self._admin is not None:
            admin = UvicornServer(Admin(self, self._stop.is_set), self._admin, keep_alive=5.0)
        stopping = asyncio.create_task(self._stop.wait())
        starting = asyncio.create_task(self._workers.start())
        following: asyncio.Task[None] | None = None
        status = 0
        if admin is not None:
            await admin.start()
        try:
            await asyncio.wait({stopping, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                self._tell_start()
                following = asyncio.create_task(self._follow())
                await stopping
        except StartFailed as exc:
            logger.error("%s before it served anything", exc)
            status = 1
        for task in (stopping, starting, following):
            if task is not None:
                task.cancel()
        await self._workers.stop(self._config.grace)
        if admin is not None:
            await admin.drain(_ADMIN_GRACE)
        return 1 if self._killed else status

    # --- signals and the file

    def _stop_on(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            logger.warning("%s again: ending now, requests under way or not", number.name)
            self._killed = True
            self._workers.kill()
            return
        logger.info("%s: no new connections; requests under way have %g s", number.name, self._config.grace)
        self._stop.set()

    async def _follow(self) -> None:
        """Take over what changes in the file, or may have when there is a SIGHUP."""
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY):
                    await self._reload.wait()
            except TimeoutError:
                if not self._source.has_changed():
                    continue
            self._reload.clear()
            try:
                await self._take_over()
            except Exception:  # a bug; the next change must be seen all the same
                logger.exception("the configuration could not be taken over")

    async def _take_over(self) -> None:
        if self._source.file is None:
            logger.info("SIGHUP: there is no --config to read again")
            return
        before = self._config
        try:
            config = self._source.read()
        except ConfigError as exc:
            logger.error("the configuration stays as it was: %s", exc)
            return
        later = [name for name in _AT_START if _differ(name, before, config)]
        if (config.tls is None) != (before.tls is None):
            later.append("tls")
        if later:
            logger.warning("not before the next start: %s", ", ".join(later))
        self._config = replace(config, **{name: getattr(before, name) for name in later})
        urls = {endpoint.url for endpoint in config.endpoints}
        self._drained &= urls
        problems = await self._workers.publish(self._state())
        for problem in problems:
            logger.error("the configuration was not taken over by %s", problem)
        added = len(urls - {endpoint.url for endpoint in before.endpoints})
        removed = len(before.endpoints) + added - len(urls)
        changed = [name for name in SETTINGS if name not in ("endpoints", *later) and _differ(name, before, config)]
        others = f"; changed: {', '.join(changed)}" if changed else ""
        logger.info("%s: %d endpoints, %d new, %d removed%s", self._source.file, len(urls), added, removed, others)

    # --- parts

    def _state(self) -> dict[str, Any]:
        config = replace(self._config, admin_token=None)  # none of the workers'
        return {"config": render(config), "drained": sorted(self._drained), "name": self._name}

    def _tell_start(self) -> None:
        config = self._config
        scheme = "https" if config.tls is not None else "http"
        workers = f"{config.workers} workers" if config.workers > 1 else "1 worker"
        told = f"{scheme}://{address_of(self._listener)}, {len(config.endpoints)} endpoints, {workers}"
        if self._admin is None:
            logger.info("serving %s", told)
            return
        where = address_of(self._admin)
        logger.info("serving %s, admin on http://%s", told, where)
        if where.host not in ("127.0.0.1", "::1"):
            logger.warning("the admin listener on %s is not on loopback: who reaches it can read /snapshot", where)


def _differ(name: str, one: ServeConfig, other: ServeConfig) -> bool:
    return bool(getattr(one, name) != getattr(other, name))

"""Connecting: names to addresses, addresses to a socket, a socket to a connection, with TLS where it is due."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import socket
import ssl
from collections.abc import Callable
from typing import Any

from ...core.model import Endpoint, Sent
from ...errors import Fault, UpstreamError
from ..oserrors import causes_of, is_local, reason_of
from .connection import Connection

_HEAD_START = 0.25  # seconds an address has before the next one is tried beside it (RFC 8305)

Address = tuple[int, Any]
"""Family and socket address."""

_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}  # seconds; two minutes in all


class Dialer:
    """Connects to one endpoint."""

    def __init__(self, endpoint: Endpoint, context: ssl.SSLContext | None, local_address: str | None) -> None:
        self._endpoint = endpoint
        self._context = context
        self._server_hostname = endpoint.server_hostname or endpoint.host
        self._local = (local_address, 0) if local_address is not None else None
        self._fixed: list[Address] | None = None
        """Where no name has to be asked for."""
        if endpoint.uds is not None:
            self._fixed = [(socket.AF_UNIX, endpoint.uds)]
        else:
            with contextlib.suppress(ValueError):
                version = ipaddress.ip_address(endpoint.host).version
                family = socket.AF_INET if version == 4 else socket.AF_INET6
                self._fixed = [(family, (endpoint.host, endpoint.port))]

    async def dial(
        self, make: Callable[[], Connection], timeout: float | None, server_hostname: str | None
    ) -> Connection:
        """A new connection. `timeout` is httpx's connect timeout: seconds to connect, and as many for TLS.

        Raises `UpstreamError`, always NOT_SENT.
        """
        step = "connect"
        try:
            async with asyncio.timeout(timeout):
                sock = await self._connect()
            step = "TLS handshake"
            async with asyncio.timeout(timeout):
                return await self._wrap(sock, make, server_hostname or self._server_hostname)
        except TimeoutError as exc:
            # The system's own is an OSError with a number: it gave up before we did.
            if exc.errno is not None:
                raise self._error(Fault.CONNECT, f"{step}: {reason_of(exc)}") from exc
            raise self._error(Fault.CONNECT_TIMEOUT, f"no {step} within {timeout:g} s") from None
        except OSError as exc:  # ssl.SSLError is one
            raise self._error(Fault.CONNECT, reason_of(exc), local=is_local([exc])) from exc
        except ValueError as exc:  # a name that no resolver takes, or no certificate can have
            raise self._error(Fault.CONNECT, f"the name cannot be used: {exc}") from exc
        except ExceptionGroup as group:
            causes = list(causes_of(group))
            reasons = {reason_of(cause) for cause in causes if isinstance(cause, OSError)}
            raise self._error(Fault.CONNECT, "; ".join(sorted(reasons)), local=is_local(causes)) from group

    async def _connect(self) -> socket.socket:
        addresses = self._fixed or await self._resolve()
        if len(addresses) == 1:
            return await self._connect_to(addresses[0])
        return await self._race(addresses)

    async def _resolve(self) -> list[Address]:
        """The addresses of the name, families taking turns (RFC 8305)."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self._endpoint.host, self._endpoint.port, type=socket.SOCK_STREAM)
        if not found:
            raise OSError(f"no address for {self._endpoint.host}")
        families: dict[int, list[Address]] = {}
        for family, _, _, _, address in found:
            families.setdefault(family, []).append((family, address))
        turns = itertools.chain.from_iterable(itertools.zip_longest(*families.values()))
        return [address for address in turns if address is not None]

    async def _connect_to(self, address: Address) -> socket.socket:
        family, where = address
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            if family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _keep_alive(sock)
                if self._local is not None:
                    sock.bind(self._local)
            await asyncio.get_running_loop().sock_connect(sock, where)
        except BaseException:
            sock.close()
            raise
        return sock

    async def _race(self, addresses: list[Address]) -> socket.socket:
        """The first that connects, each with a head start over the next. Raises an `ExceptionGroup` of all failures."""
        tasks: list[asyncio.Task[socket.socket]] = []
        winner: asyncio.Task[socket.socket] | None = None
        try:
            for address in addresses:
                tasks.append(asyncio.create_task(self._connect_to(address)))
                winner = await _first_success(tasks, _HEAD_START if len(tasks) < len(addresses) else None)
                if winner is not None:
                    return winner.result()
        finally:
            # Nobody waits for them, or a cancellation meanwhile would lose the winner.
            for task in tasks:
                if task is not winner:
                    task.cancel()
                    task.add_done_callback(_close_result)
        failures = [exc for task in tasks if isinstance(exc := task.exception(), Exception)]
        raise ExceptionGroup("no address of the name can be reached", failures)

    async def _wrap(self, sock: socket.socket, make: Callable[[], Connection], server_hostname: str) -> Connection:
        loop = asyncio.get_running_loop()
        taken = False

        def protocol() -> Connection:
            nonlocal taken
            taken = True
            return make()

        try:
            if self._endpoint.uds is not None:
                _, connection = await loop.create_unix_connection(protocol, sock=sock)
            elif self._context is None:
                _, connection = await loop.create_connection(protocol, sock=sock)
            else:
                _, connection = await loop.create_connection(
                    protocol, sock=sock, ssl=self._context, server_hostname=server_hostname
                )
        except BaseException:
            # Once there is a protocol the socket is the event loop's to close: closed under its hands, the descriptor
            # would soon be somebody else's. Cancelled early it forgets to, unless the stream comes to its end.
            if taken:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            else:
                sock.close()
            raise
        return connection

    def _error(self, fault: Fault, detail: str, *, local: bool = False) -> UpstreamError:
        return UpstreamError(fault, Sent.NOT_SENT, self._endpoint.url, detail, local=local)


def _keep_alive(sock: socket.socket) -> None:
    """Have the system ask a silent peer whether it is there still: a host that vanished ends no connection."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # each system has some
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


async def _first_success(
    tasks: list[asyncio.Task[socket.socket]], seconds: float | None
) -> asyncio.Task[socket.socket] | None:
    """The first task to connect; None when all have failed, or after `seconds`."""
    pending = set(tasks)
    while pending:
        done, pending = await asyncio.wait(pending, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        for task in done:
            if task.exception() is None:
                return task
    return None


def _close_result(task: asyncio.Task[socket.socket]) -> None:
    """It connected all the same, too late."""
    if not task.cancelled() and task.exception() is None:
        task.result().close()

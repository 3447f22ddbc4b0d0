"""What the servers of `rules_kit` serve, and how each is started: `python rules_site.py KIND`, which prints its port.

A `POST /~gateway` says which Gateway all other requests are for, until the next one. The process ends with its stdin.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from typing import Any

from pathlb import Balancer, Breaker, Limits, Panic, Retry, RoundRobin
from pathlb.asgi import Gateway, Route
from pathlb.asgi.types import Message, Receive, Scope, Send
from pathlb.exchange import Timeouts

HELD = 128  # connections the system may hold for the server


class Site:
    """An app with one Gateway, which can be exchanged."""

    def __init__(self) -> None:
        self._gateway: Gateway | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["path"] == "/~gateway":
            await self._exchange(receive, send)
        else:
            assert self._gateway is not None
            await self._gateway(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _exchange(self, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message: Message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await self._close()
        self._gateway = make_gateway(json.loads(body))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _close(self) -> None:
        if self._gateway is not None:
            for balancer in self._gateway.balancers:
                await balancer.aclose()


def make_gateway(options: dict[str, Any]) -> Gateway:
    """`balancer`, `routes` and whatever else a Gateway takes, all JSON."""
    endpoints, routes = options.pop("endpoints"), options.pop("routes", ())
    balancer = _make_balancer(endpoints, options.pop("balancer", {})) if endpoints is not None else None
    return Gateway(
        balancer,
        routes=[Route(_make_balancer(route.pop("endpoints"), {}), **route) for route in routes],
        name="gateway-test",
        **options,
    )


def _make_balancer(endpoints: list[str], options: dict[str, Any]) -> Balancer:
    attempts = options.pop("attempts", 1)
    drained = options.pop("drained", False)
    concurrency = options.pop("concurrency", 1000)
    balancer = Balancer(
        endpoints,
        breaker=Breaker(failures=1000, min_requests=1000),
        outlier=None,
        panic=Panic(fail_closed=True),
        policy=RoundRobin(),
        retry=Retry(attempts=attempts, wait_base=0.001),
        limits=Limits(concurrency=concurrency, queue=0 if concurrency < 1000 else 100),
        **options,
    )
    balancer.timeouts = Timeouts(connect=20.0, read=20.0, write=20.0)  # a test machine may be busy elsewhere
    if drained:
        for endpoint in endpoints:
            balancer.drain(endpoint)
    return balancer


site = Site()


def _say(port: int) -> None:
    print(port, flush=True)  # noqa: T201  for the parent


def _stop_with_stdin() -> None:
    os.read(0, 1)  # and not sys.stdin's, whose lock the workers that granian forks would wait for
    os.kill(os.getpid(), signal.SIGTERM)


def _listen() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=HELD)


def _uvicorn(http: str) -> None:
    import uvicorn

    config = uvicorn.Config(
        site,
        http=http,  # type: ignore[arg-type]
        ws="none",
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=5,
    )
    with _listen() as sock:
        _say(sock.getsockname()[1])
        uvicorn.Server(config).run([sock])


async def _hypercorn() -> None:
    import hypercorn.asyncio
    import hypercorn.config

    sock = _listen()
    port = sock.getsockname()[1]
    config = hypercorn.config.Config()
    config.bind = [f"fd://{sock.detach()}"]  # which it closes
    config.graceful_timeout = 5.0
    config.include_server_header = config.include_date_header = False
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    _say(port)
    await hypercorn.asyncio.serve(site, config, shutdown_trigger=stop.wait, mode="asgi")  # type: ignore[arg-type]


def _granian() -> None:
    from granian import Granian
    from granian.constants import Interfaces
    from granian.log import LogLevels

    with socket.socket() as held:  # so that nobody else is given the port: granian shares it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        _say(port)
        Granian(
            "rules_site:site",
            port=port,
            interface=Interfaces.ASGI,
            websockets=False,
            log_level=LogLevels.warning,
            workers_kill_timeout=5,
        ).serve()


def main(kind: str) -> None:
    threading.Thread(target=_stop_with_stdin, daemon=True).start()
    if kind == "hypercorn":
        asyncio.run(_hypercorn())
    elif kind == "granian":
        _granian()
    else:
        _uvicorn(kind.partition("-")[2])


if __name__ == "__main__":
    main(sys.argv[1])

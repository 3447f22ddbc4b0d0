"""The clients that are compared, each making the same two requests in the way its own users would.

A contender is given the servers: one, or several that it takes in turn (pathlb balances over them). Everybody sends the
same payload under the same headers, has its library's default timeouts and no limit on connections, looks at no
environment variable, and checks the status and every byte of the body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import httpx2

import pathlb
import pathlb.httpx2
from pathlb.exchange import Request

from .bare import BareClient, BareTransport, NullTransport
from .measure import Step

if TYPE_CHECKING:
    import aiohttp

PAYLOAD = b'{"jsonrpc":"2.0","id":1,"method":"eth_blockNumber","params":[]}'
REPLY = b'{"jsonrpc":"2.0","id":1,"result":"0x15a3f"}'
LARGE = bytes(range(256)) * 256
"""What `/64k` answers: no part of it could pass for another one out of place."""

COMMON = {"Accept": "*/*", "Accept-Encoding": "gzip, deflate", "User-Agent": "pathlb-benchmark"}
"""What a client is told once; these are the headers every library sends by itself, with one value for all."""
POST_HEADERS = {"Content-Type": "application/json", "Target-Service-Id": "eth"}
GET_HEADERS = {"Target-Service-Id": "eth"}
POST_LENGTH = {"Content-Length": str(len(PAYLOAD))}

assert len(PAYLOAD) == 63
assert len(REPLY) == 43
assert len(LARGE) == 65_536


@dataclass(frozen=True, slots=True)
class Contender:
    """A client ready to send."""

    post: Step
    """POST of the payload to `/v1`."""
    get: Step
    """GET of `/64k`, the body read as it streams."""


class WrongReply(Exception):
    """The status or the body is not what the server sent."""


def check(status: int, body: bytes) -> None:
    """Raise `WrongReply` unless this is the reply of `/v1`."""
    if status != 200 or body != REPLY:
        raise WrongReply(f"{status} {body[:100]!r}")


class LargeBody:
    """Compares the body of `/64k` while it arrives, without keeping it."""

    __slots__ = ("_read",)

    def __init__(self) -> None:
        self._read = 0

    def take(self, part: bytes) -> None:
        if not LARGE.startswith(part, self._read):
            raise WrongReply(f"other bytes than expected from byte {self._read} on")
        self._read += len(part)

    def end(self, status: int) -> None:
        if status != 200 or self._read != len(LARGE):
            raise WrongReply(f"{status}, {self._read} bytes")


def _in_turn(urls: Sequence[str], path: str) -> Iterator[str]:
    return cycle([url + path for url in urls])


# --- clients with httpx's interface

Client = httpx.AsyncClient | httpx2.AsyncClient
UNLIMITED = httpx.Limits(max_connections=None, max_keepalive_connections=None)
UNLIMITED2 = httpx2.Limits(max_connections=None, max_keepalive_connections=None)


def _based(urls: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The client's `base_url`, and what to put before each path.

    One server is the base, so that the call is the one that pathlb's users make: `client.post("/v1")`.
    """
    return (urls[0], [""]) if len(urls) == 1 else ("", urls)


def _through(client: Client, urls: Sequence[str] = ("",)) -> Contender:
    posts, gets = _in_turn(urls, "/v1"), _in_turn(urls, "/64k")

    async def post() -> None:
        response = await client.post(next(posts), content=PAYLOAD, headers=POST_HEADERS)
        check(response.status_code, response.content)

    async def get() -> None:
        body = LargeBody()
        async with client.stream("GET", next(gets), headers=GET_HEADERS) as response:
            async for part in response.aiter_bytes():
                body.take(part)
        body.end(response.status_code)

    return Contender(post, get)


async def _plain(stack: AsyncExitStack, urls: Sequence[str], transport: httpx.AsyncBaseTransport | None) -> Contender:
    base, urls = _based(urls)
    client = httpx.AsyncClient(base_url=base, headers=COMMON, limits=UNLIMITED, trust_env=False, transport=transport)
    return _through(await stack.enter_async_context(client), urls)


async def _httpx(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    return await _plain(stack, urls, None)


async def _httpx2(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    base, urls = _based(urls)
    client = httpx2.AsyncClient(base_url=base, headers=COMMON, limits=UNLIMITED2, trust_env=False)
    return _through(await stack.enter_async_context(client), urls)


async def _httpx_aiohttp(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    from httpx_aiohttp import AiohttpTransport  # see PACKAGES

    # The session is made here because the transport takes "no limit" in its own `limits=` for aiohttp's default, 100.
    return await _plain(stack, urls, AiohttpTransport(client=_session))


async def _null(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    return await _plain(stack, urls, NullTransport({"/v1": REPLY, "/64k": LARGE}))


async def _httpx_bare(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    host, port = _only_server(urls)
    return await _plain(stack, urls, BareTransport(host, port))


async def _pathlb_httpx(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    client = pathlb.AsyncClient(urls, headers=COMMON, trust_env=False)
    return _through(await stack.enter_async_context(client))


async def _pathlb_httpx2(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    client = pathlb.httpx2.AsyncClient(urls, headers=COMMON, trust_env=False)
    return _through(await stack.enter_async_context(client))


# --- clients with an interface of their own


def _session() -> aiohttp.ClientSession:
    import aiohttp  # see PACKAGES

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=COMMON, trust_env=False)


async def _aiohttp(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    session = await stack.enter_async_context(_session())
    # Whole URLs, since joining them to a base would cost this client something.
    posts, gets = _in_turn(urls, "/v1"), _in_turn(urls, "/64k")

    async def post() -> None:
        async with session.post(next(posts), data=PAYLOAD, headers=POST_HEADERS) as response:
            check(response.status, await response.read())

    async def get() -> None:
        body = LargeBody()
        async with session.get(next(gets), headers=GET_HEADERS) as response:
            async for part in response.content.iter_any():
                body.take(part)
        body.end(response.status)

    return Contender(post, get)


def _pairs(*headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("ascii"), value.encode("ascii")) for group in headers for name, value in group.items()]


async def _balancer(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    balancer = await stack.enter_async_context(pathlb.Balancer(urls))
    post_headers, get_headers = _pairs(COMMON, POST_HEADERS, POST_LENGTH), _pairs(COMMON, GET_HEADERS)

    async def post() -> None:
        reply = await balancer.send(Request("POST", b"/v1", post_headers, PAYLOAD))
        try:
            body = b"".join([part async for part in reply.body])
        finally:
            await reply.body.aclose()
        check(reply.status, body)

    async def get() -> None:
        body = LargeBody()
        reply = await balancer.send(Request("GET", b"/64k", get_headers))
        try:
            async for part in reply.body:
                body.take(part)
        finally:
            await reply.body.aclose()
        body.end(reply.status)

    return Contender(post, get)


async def _bare(stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    host, port = _only_server(urls)
    client = BareClient(host, port)
    stack.push_async_callback(client.aclose)
    own = {"Host": f"{host}:{port}"}
    post_request = _render(b"POST /v1", _pairs(own, COMMON, POST_HEADERS, POST_LENGTH)) + PAYLOAD
    get_request = _render(b"GET /64k", _pairs(own, COMMON, GET_HEADERS))

    async def post() -> None:
        reply = await client.send(post_request)
        check(reply.status, b"".join(reply.parts))

    async def get() -> None:
        body = LargeBody()
        reply = await client.send(get_request)
        for part in reply.parts:
            body.take(part)
        body.end(reply.status)

    return Contender(post, get)


def _render(what: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    return b"%b HTTP/1.1\r\n%b\r\n" % (what, b"".join(b"%b: %b\r\n" % header for header in headers))


def _only_server(urls: Sequence[str]) -> tuple[str, int]:
    (url,) = urls
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


# --- by name

_OPENERS: dict[str, Callable[[AsyncExitStack, Sequence[str]], Awaitable[Contender]]] = {
    "httpx": _httpx,
    "httpx2": _httpx2,
    "httpx-aiohttp": _httpx_aiohttp,
    "aiohttp": _aiohttp,
    "pathlb-httpx": _pathlb_httpx,
    "pathlb-httpx2": _pathlb_httpx2,
    "balancer": _balancer,
    "null": _null,
    "bare": _bare,
    "httpx-bare": _httpx_bare,
}
NAMES = tuple(_OPENERS)
PACKAGES = {"aiohttp": ("aiohttp",), "httpx-aiohttp": ("aiohttp", "httpx-aiohttp")}
"""What a contender needs beside the development dependencies; imported by who uses it and nobody else."""
BALANCED = frozenset({"pathlb-httpx", "pathlb-httpx2", "balancer"})
"""Those that choose among the servers themselves."""

TITLES = {
    "httpx": "httpx",
    "httpx2": "httpx2",
    "httpx-aiohttp": "httpx over httpx-aiohttp",
    "aiohttp": "aiohttp alone",
    "pathlb-httpx": "pathlb through httpx",
    "pathlb-httpx2": "pathlb through httpx2",
    "balancer": "Balancer.send alone",
    "null": "floor: httpx over nothing",
    "bare": "floor: bare protocol",
    "httpx-bare": "floor: httpx over the bare protocol",
}


async def open_contender(name: str, stack: AsyncExitStack, urls: Sequence[str]) -> Contender:
    """One of `NAMES` on the running event loop, for as long as `stack` is open."""
    return await _OPENERS[name](stack, urls)

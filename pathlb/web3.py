"""A web3.py provider over several gateways (`pip install 'pathlb[web3]'`).

    async with AsyncBalancedProvider(["http://127.0.0.1:3069", "http://127.0.0.1:3070"], service="eth") as provider:
        w3 = AsyncWeb3(provider)
        print(await w3.eth.block_number)

It goes through `Balancer.send`, without an HTTP library in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self, TypeGuard, Unpack

import anyio

try:
    import web3
except ModuleNotFoundError as exc:
    if exc.name != "web3":
        raise
    raise ImportError("pathlb.web3 needs web3.py: pip install 'pathlb[web3]'", name="web3") from exc

# What web3's own providers have; there is no public name, and without it `cache_allowed_requests` would do nothing.
from web3._utils.caching import async_handle_request_caching  # type: ignore[attr-defined]
from web3.exceptions import BadResponseFormat, ProviderConnectionError
from web3.providers.async_base import AsyncJSONBaseProvider
from web3.types import RPCEndpoint, RPCResponse

from . import __version__
from .balancer import Balancer
from .config import BalancerOptions
from .core.errors import ConfigError
from .core.model import Endpoint
from .errors import PathlbError, UpstreamError
from .exchange import Attempt, Headers, Reply, Request, WholeBody
from .jsonrpc import JSONRPC

__all__ = ["AsyncBalancedProvider", "BadReply"]

_SERVICE = "Target-Service-Id"
_SHOWN = 500  # characters of a body that an error quotes


class BadReply(PathlbError, BadResponseFormat):
    """A gateway replied with something that is no JSON-RPC answer, whatever its status.

    `status` and `endpoint` (its URL) say who replied what; `body` is its beginning (up to 500 characters), None when it
    cannot be read; `attempts` lists what was tried.
    """

    def __init__(
        self, problem: str, status: int, endpoint: str, body: str | None, attempts: Sequence[Attempt] = ()
    ) -> None:
        shown = "" if body is None else f": {body!r}"
        super().__init__(f"{endpoint} replied {status} {problem}{shown}", attempts)
        self.status = status
        self.endpoint = endpoint
        self.body = body


class AsyncBalancedProvider(AsyncJSONBaseProvider):
    """A provider for `AsyncWeb3` whose requests are balanced over several endpoints. For asyncio, as web3 is.

    `endpoints` is a list of URLs or `Endpoint`s, or a `Balancer` made elsewhere, which is then not closed with the
    provider. The keyword arguments of `Balancer` (`policy`, `retry`, `limits` ...) may be given here too. One made here
    knows the JSON-RPC methods (`jsonrpc=JSONRPC()`), so that reads may be sent twice; for PATH say `profile="path"`.

    - `path`: what is posted to, below the base path of an endpoint (default `/v1`).
    - `headers`: sent with every request; those of the same name replace the provider's own.
    - `service`: the id of the service meant, sent as `Target-Service-Id` (default: none is sent).

    Each attempt has the balancer's timeouts (by default 0.5 s to connect, 15 s to read or write), the whole request
    its `deadline`. There is no `exception_retry_configuration`: sending again, elsewhere, what may be sent twice is the
    balancer's business, and a second layer would multiply its attempts. `w3.eth.filter` needs
    `jsonrpc=JSONRPC(sticky_filters=True)`: a filter belongs to the gateway that made it.

    An answer is what JSON-RPC says it is, whatever the HTTP status: web3 raises its `Web3RPCError` with the code and
    message of a gateway that replies 500. Anything else is a `BadReply`, which is web3's `BadResponseFormat`. When
    there is no reply, pathlb's errors come out as they are: `UpstreamError`, `DeadlineExceeded`, `NoEligibleEndpoint`,
    `QueueFull`, `QueueTimeout`, `RequestTooLarge`, and `UsageError` after `disconnect` or on another event loop.

    Usable without `async with`: it starts with the first request and is closed with `disconnect`. web3 reserves
    `async with AsyncWeb3(...)` for its WebSocket and IPC providers. Raises `ConfigError` for what cannot work.
    """

    def __init__(
        self,
        endpoints: Iterable[Endpoint | str] | Balancer,
        *,
        path: str = "/v1",
        headers: Mapping[str, str] | None = None,
        service: str | None = None,
        **options: Unpack[BalancerOptions],
    ) -> None:
        super().__init__()
        self._target = _target(path)
        self._headers = _headers(headers if headers is not None else {}, service)
        self._owns_balancer = not isinstance(endpoints, Balancer)
        if isinstance(endpoints, Balancer):
            for name in options:
                raise ConfigError(name, "belongs to the Balancer; set it there")
            self.balancer = endpoints
        else:
            if options.get("profile") is None:  # which has its own
                options.setdefault("jsonrpc", JSONRPC())
            self.balancer = Balancer(endpoints, **options)

    async def __aenter__(self) -> Self:
        if self._owns_balancer:
            await self.balancer.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.disconnect()

    async def disconnect(self) -> None:
        """Close the balancer with its connections, for good; one that was given stays open. Twice is fine."""
        if self._owns_balancer:
            await self.balancer.aclose()

    async def is_connected(self, show_traceback: bool = False) -> bool:
        """Whether a gateway answers `web3_clientVersion` with a result.

        With `show_traceback`, raises web3's `ProviderConnectionError` instead of answering False.
        """
        try:
            return await super().is_connected(show_traceback)
        except PathlbError as exc:
            if show_traceback:
                raise ProviderConnectionError(f"no gateway answers: {exc}") from exc
            return False

    @async_handle_request_caching
    async def make_request(self, method: RPCEndpoint, params: Any) -> RPCResponse:
        """The answer to one call, a result or an error. Raises what the class says."""
        reply, content = await self._post(self.encode_rpc_request(method, params))
        answer = self._decode(reply, content)
        if not _is_answer(answer):
            raise _bad(reply, "without a JSON-RPC answer", content)
        return answer

    async def make_batch_request(self, requests: list[tuple[RPCEndpoint, Any]]) -> list[RPCResponse] | RPCResponse:
        """The answers to several calls sent as one batch, in their order, or the one error that stands for them all.

        Raises what the class says; answers that cannot be matched with the calls are a `BadReply`.
        """
        calls = [self.form_request(method, params) for method, params in requests]
        reply, content = await self._post(self.encode_batch_request_dicts(calls))
        answers = self._decode(reply, content)
        if _is_answer(answers):
            return answers
        if not isinstance(answers, list) or not all(map(_is_answer, answers)):
            raise _bad(reply, "without JSON-RPC answers", content)
        # web3's own provider sorts them and pairs them up: when one is missing, calls get each other's results.
        by_id: dict[object, RPCResponse] = {
            answer.get("id"): answer for answer in answers if isinstance(answer.get("id"), int | None)
        }
        if len(answers) == len(calls) and by_id.keys() == {call["id"] for call in calls}:
            return [by_id[call["id"]] for call in calls]
        if None in by_id and "error" in by_id[None]:
            return by_id[None]  # to no call in particular, and it says why
        raise _bad(reply, f"with {len(answers)} answers that do not match the {len(calls)} calls of the batch", content)

    async def _post(self, body: bytes) -> tuple[Reply, bytes]:
        """The reply to a request, and its body, whole."""
        request = Request("POST", self._target, self._headers, body, timeouts=self.balancer.timeouts)
        reply = await self.balancer.send(request)
        if isinstance(reply.body, WholeBody):
            return reply, reply.body.content
        try:
            return reply, b"".join([part async for part in reply.body])
        except UpstreamError as exc:
            exc.attempts = reply.attempts
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await reply.body.aclose()

    def _decode(self, reply: Reply, content: bytes) -> Any:
        """The JSON of a body; None when it has none. Raises `BadReply` for a body in a coding nobody asked for."""
        for name, value in reply.headers:
            if name.lower() == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                coding = value.decode("ascii", "replace")
                raise _bad(reply, f"with a body in the content coding {coding!r}, which was not asked for")
        try:
            return self.decode_rpc_response(content)
        except ValueError:  # of the JSON or of its UTF-8
            return None


def _is_answer(value: Any) -> TypeGuard[RPCResponse]:
    """Whether it is a JSON-RPC answer. The version tells it from the `{"error": ...}` of a proxy in between."""
    return isinstance(value, dict) and value.get("jsonrpc") == "2.0" and ("result" in value or "error" in value)


def _bad(reply: Reply, problem: str, content: bytes | None = None) -> BadReply:
    body = None
    if content is not None:
        body = content[: _SHOWN * 4].decode("utf-8", "replace")[:_SHOWN]  # of at most four bytes each
    return BadReply(problem, reply.status, reply.attempts[-1].endpoint, body, reply.attempts)


def _target(path: object) -> bytes:
    if not isinstance(path, str) or not path.startswith("/") or not path.isascii() or any(ch <= " " for ch in path):
        raise ConfigError("path", f"must start with / and be a valid request target, not {path!r}")
    return path.encode("ascii")


def _headers(given: Mapping[str, str], service: str | None) -> Headers:
    """The headers of every request."""
    headers = {
        "content-type": (b"Content-Type", b"application/json"),
        # Without the field a server may choose any coding (RFC 9110 12.5.3), and there is nothing here to decode it.
        "accept-encoding": (b"Accept-Encoding", b"identity"),
        "user-agent": (b"User-Agent", f"pathlb/{__version__} web3.py/{web3.__version__}".encode("ascii")),
    }
    if not isinstance(given, Mapping):
        raise ConfigError("headers", f"must be a mapping, not {type(given).__name__}")
    for name, value in given.items():
        try:
            headers[name.lower()] = (name.encode("ascii"), value.encode("latin-1"))
        except (AttributeError, UnicodeEncodeError):
            # Not the value, which may be a secret.
            raise ConfigError("headers", f"must be text that HTTP can carry, which {name!r} is not") from None
    if service is not None:
        if not isinstance(service, str) or not service.isascii() or not service or any(ch <= " " for ch in service):
            raise ConfigError("service", f"must be the id of a service, like 'eth', not {service!r}")
        if _SERVICE.lower() in headers:
            raise ConfigError("service", f"is the {_SERVICE} header, which headers= has too; give one of them")
        headers[_SERVICE.lower()] = (_SERVICE.encode("ascii"), service.encode("ascii"))
    return list(headers.values())

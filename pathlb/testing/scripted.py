"""An upstream without a network: answers from a script or a function."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping

from pathlb.core.model import Endpoint
from pathlb.errors import UsageError
from pathlb.exchange import Headers, Reply, Request

Answer = Reply | Exception
"""What one call comes to: a reply to return or an exception to raise."""

Handler = Callable[[Request, Headers], Answer | Awaitable[Answer]]
"""Decides a call from the request and the balancer's extra headers; an `async def` may wait first."""

CALLS_KEPT = 1000
"""How many calls a `ScriptedUpstream` remembers; `count` goes on."""

_HEADERS: Headers = [(b"content-length", b"2")]


class Body:
    """A reply body in memory: `data` in one piece, or none when it is empty."""

    __slots__ = ("_rest", "closed")

    def __init__(self, data: bytes = b"") -> None:
        self._rest = data
        self.closed = False
        """Whether `aclose` was called; a closed body yields nothing more."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        rest, self._rest = self._rest, b""
        if not rest or self.closed:
            raise StopAsyncIteration
        return rest

    async def aclose(self) -> None:
        self.closed = True


class ScriptedUpstream:
    """An `Upstream` that answers at once and from memory, on any event loop.

    `script` is a function `(request, extra_headers)` asked every time, or answers given in order, one per call
    (a `Reply` is returned, an exception raised). Without a script, and after its last answer, every call gets
    a fresh `200` with the body `ok`.
    """

    kind = "scripted"

    def __init__(self, script: Iterable[Answer] | Handler | None = None) -> None:
        self.calls: deque[tuple[Request, Headers]] = deque(maxlen=CALLS_KEPT)
        """The latest calls, oldest first: the request and the extra headers it came with."""
        self.count = 0
        """How many calls there were."""
        self.closed = False
        """Whether `aclose` was called (and the endpoint has not joined again since)."""
        self._handler: Handler | None
        if script is None or callable(script):
            self._handler = script
        else:
            answers = iter(script)
            self._handler = lambda request, extra_headers: next(answers, None) or _ok()

    async def send(self, request: Request, extra_headers: Headers) -> Reply:
        """Answer by the script. Raises what the script says, and `UsageError` after `aclose`."""
        if self.closed:
            raise UsageError("the scripted upstream was closed and is still used")
        self.count += 1
        self.calls.append((request, extra_headers))
        if self._handler is None:
            return _ok()
        answer = self._handler(request, extra_headers)
        if not isinstance(answer, Reply | Exception):
            answer = await answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        self.closed = True

    @staticmethod
    def factory(upstreams: Mapping[str, ScriptedUpstream]) -> Callable[[Endpoint], ScriptedUpstream]:
        """What to give to `Balancer(upstream=...)`: looks the endpoint's URL up in `upstreams`.

        An endpoint that leaves and joins again gets the same upstream, open again. The callable raises `LookupError`
        for an endpoint that has none.
        """
        by_url = {Endpoint(url).url: upstream for url, upstream in upstreams.items()}

        def make(endpoint: Endpoint, /) -> ScriptedUpstream:
            upstream = by_url.get(endpoint.url)
            if upstream is None:
                raise LookupError(f"no scripted upstream for {endpoint.url}; there are {', '.join(by_url) or 'none'}")
            upstream.closed = False
            return upstream

        return make


def _ok() -> Reply:
    return Reply(200, _HEADERS.copy(), Body(b"ok"))

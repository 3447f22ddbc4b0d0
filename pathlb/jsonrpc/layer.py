"""What happens to JSON-RPC requests around the balancer's road, when their bodies have to be looked into first."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable

from ..core.model import Clock
from ..exchange import Reply, Request
from .batch import Splitter
from .calls import Call, read_call
from .config import JSONRPC
from .filters import StickyFilters
from .methods import MethodRules
from .sizes import SizeLimits
from .text import Element, is_array, parse, parse_elements
from .transactions import METHOD, Resender

_RAW_TRANSACTION = METHOD.encode()
_FILTER = b"Filt"  # not the whole word: its e is a hexadecimal digit, and a search would stop at each of them


class JSONRPCLayer:
    """Wraps `send`, the balancer's road, in what a `JSONRPC` setting asks for; not needed unless `config.needs_body`.

    Only POSTs with their body in memory are looked at, and of these only such as contain a telling word: the rest go
    straight on. `clock` is monotonic seconds; `deadline` is the balancer's own, in seconds (default 30, as there),
    for requests without one.
    """

    def __init__(
        self,
        config: JSONRPC,
        send: Callable[[Request], Awaitable[Reply]],
        clock: Clock = time.monotonic,
        deadline: float = 30.0,
    ) -> None:
        self.rules = MethodRules(config.methods)
        """What may be sent twice, for the balancer."""
        self._send = send
        self._limits = limits = SizeLimits(config.max_batch, config.max_body)
        self._splitter = Splitter(config.split, self.rules, limits, send, clock, deadline) if config.split else None
        self._filters = StickyFilters(self.rules, send, clock, deadline) if config.sticky_filters else None
        self._resender = Resender(send, clock, deadline) if config.resend_transactions else None
        # A batch up to this size is neither split nor refused for its items.
        self._small = min(config.split or math.inf, config.max_batch or math.inf)

    async def send(self, request: Request) -> Reply:
        """Send a request. Raises what the road raises, and `RequestTooLarge` before anything is sent."""
        body = request.body
        if not isinstance(body, bytes) or request.method != "POST":
            return await self._send(request)
        if is_array(body):
            return await self._send_batch(request, body)
        self._limits.check_size(len(body))
        if self._filters is not None and _FILTER in body:
            call = _only_call(body)
            if call is not None:
                return await self._filters.send(request, [call])
        elif self._resender is not None and _RAW_TRANSACTION in body and request.idempotent is not False:
            call = _only_call(body)
            if call is not None and call.method == METHOD:
                return await self._resender.send(request, call)
        return await self._send(request)

    async def _send_batch(self, request: Request, body: bytes) -> Reply:
        filters = self._filters if _FILTER in body else None
        elements: list[Element] = []
        # Every call is an object, so there are at least as many braces.
        if filters is not None or body.count(b"{") > self._small:
            try:
                elements = parse_elements(body)
            except ValueError:  # for the endpoint to refuse
                filters = None
        calls = _all_calls(elements)
        if self._splitter is not None and self._splitter.splits(request, calls):
            texts = (element.text for element in elements)
            ids = (call.id for call in calls if call.id is not None)
            return await self._splitter.send(request, dict(zip(ids, texts, strict=True)))
        self._limits.check_items(len(elements))
        self._limits.check_size(len(body))
        if filters is not None and calls:
            return await filters.send(request, calls)
        return await self._send(request)


def _only_call(body: bytes) -> Call | None:
    """The call a body is; None when it is anything else, or can be read in two ways."""
    try:
        return read_call(parse(body))
    except ValueError:
        return None


def _all_calls(elements: list[Element]) -> list[Call]:
    """The calls of a batch; none when one of them is no call, or can be read in two ways."""
    try:
        return [read_call(element.value) for element in elements]
    except ValueError:
        return []

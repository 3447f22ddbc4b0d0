"""Filters stay where they were made: the id in the reply leads later calls to the same endpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from ..exchange import Reply, Request
from .calls import Call
from .coding import asking_for_readable, decoded, read_whole
from .methods import MethodRules, Safety
from .text import parse_answer

CAPACITY = 10_000
"""Filters remembered; beyond it the ones not used for longest are forgotten."""
EXPIRY = 300.0
"""Seconds without use after which a filter is forgotten, as geth forgets it (`eth/filters/api.go`, `deadline`)."""

_Place = tuple[str | bytes | None, bytes, str]
"""A filter: the service it was asked of, the target, its id."""


class FilterHomes:
    """Which endpoint made which filter. `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        # The ones used last come last.
        self._homes: OrderedDict[_Place, tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def get(self, place: _Place) -> str | None:
        """URL of the endpoint that made it, if it is known (still)."""
        home, used = self._homes.get(place, ("", -EXPIRY))
        return home if home and self._clock() - used < EXPIRY else None

    def put(self, place: _Place, endpoint: str) -> None:
        """It was made by this endpoint, or has just been used there."""
        now = self._clock()
        self._homes[place] = endpoint, now
        self._homes.move_to_end(place)
        while len(self._homes) > CAPACITY or now - next(iter(self._homes.values()))[1] >= EXPIRY:
            self._homes.popitem(last=False)

    def drop(self, place: _Place) -> None:
        self._homes.pop(place, None)


class StickyFilters:
    """Sends calls for filters to the endpoint that made them. `deadline` is the balancer's, in seconds."""

    def __init__(
        self,
        rules: MethodRules,
        send: Callable[[Request], Awaitable[Reply]],
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self._rules = rules
        self._send = send
        self._clock = clock
        self._deadline = deadline
        self._homes = FilterHomes(clock)

    async def send(self, request: Request, calls: Sequence[Call]) -> Reply:
        """Send one call, or the calls of a batch.

        A pin of the caller's own is kept. A batch for filters of several endpoints cannot be right anywhere, and goes
        where the policy likes. Raises what sending raises, and where a filter is made what reading the reply raises.
        """
        service, target = _service(request), request.target
        makers = {call.id for call in calls if _makes_filter(call.method) and call.id is not None}
        used = {(service, target, of): call.method for call in calls if (of := self._filter_of(call)) is not None}
        if makers:
            until = self._clock() + (self._deadline if request.deadline is None else request.deadline)
            request = replace(request, headers=asking_for_readable(request.headers))
        if request.pin is None and used:
            homes = {home for place in used if (home := self._homes.get(place)) is not None}
            if len(homes) == 1:
                request = replace(request, pin=homes.pop())
        reply = await self._send(request)
        if reply.status != 200:
            return reply
        endpoint = reply.attempts[-1].endpoint
        for place, method in used.items():
            # What was done elsewhere does nothing to the filter.
            if self._homes.get(place) == endpoint:
                if method == "eth_uninstallFilter":
                    self._homes.drop(place)
                else:
                    self._homes.put(place, endpoint)
        if makers:
            content = await read_whole(reply, until - self._clock())
            for made in _results(reply, content, makers):
                self._homes.put((service, target, made), endpoint)
        return reply

    def _filter_of(self, call: Call) -> str | None:
        """The id of the filter a call is for."""
        params = call.params
        if not isinstance(params, list) or not params or not isinstance(params[0], str):
            return None
        return params[0] if self._rules.safety(call.method) is Safety.FILTER else None


def _makes_filter(method: str) -> bool:
    """`eth_newFilter`, `eth_newBlockFilter`, `eth_newPendingTransactionFilter`."""
    return method.startswith("eth_new") and method.endswith("Filter")


def _service(request: Request) -> str | bytes | None:
    """The service asked for: two chains behind one gateway may give out the same id."""
    if request.key is not None:
        return request.key
    for name, value in request.headers:
        if len(name) == 17 and name.lower() == b"target-service-id":
            return value
    return None


def _results(reply: Reply, content: bytes, ids: set[Any]) -> list[str]:
    """The results of the calls with these ids, those that are strings; none where the reply cannot be read."""
    try:
        answer = parse_answer(decoded(reply, content))
    except ValueError:
        return []
    answers = answer if isinstance(answer, list) else [answer]
    return [
        one["result"]
        for one in answers
        if isinstance(one, dict)
        and isinstance(one.get("result"), str)
        and isinstance(one.get("id"), str | int)
        and one["id"] in ids
    ]

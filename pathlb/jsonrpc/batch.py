"""A large batch in parts, side by side, each to the endpoint the policy picks; the answers joined by their ids."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import anyio

from ..errors import PathlbError, UpstreamError
from ..exchange import Attempt, Headers, Reply, Request, WholeBody
from .calls import Call, Id
from .coding import asking_for_readable, decoded, read_whole, with_content
from .methods import MethodRules, Safety
from .sizes import SizeLimits
from .text import Element, is_array, join, parse_answer, parse_answers

# "Internal error" of JSON-RPC 2.0, which is also what clients that retry by code (viem) take for worth another try.
_NO_ANSWER = -32603
_SHOWN = 200  # characters of an endpoint's own error message that are repeated

# Headers that are about the body as a whole, or are signed with it: none of them is true of a part.
_OF_THE_WHOLE = frozenset(
    {
        b"content-digest",
        b"content-encoding",
        b"content-md5",
        b"digest",
        b"idempotency-key",
        b"repr-digest",
        b"signature",
        b"x-amz-content-sha256",
        b"x-flashbots-signature",
    }
)


class Splitter:
    """Sends batches in parts of at most `size` items. `clock` is monotonic, `deadline` the balancer's, in seconds."""

    def __init__(
        self,
        size: int,
        rules: MethodRules,
        limits: SizeLimits,
        send: Callable[[Request], Awaitable[Reply]],
        clock: Callable[[], float],
        deadline: float,
    ) -> None:
        self._size = size
        self._rules = rules
        self._limits = limits
        self._send = send
        self._clock = clock
        self._deadline = deadline

    def splits(self, request: Request, calls: Sequence[Call]) -> bool:
        """Whether a batch goes out in parts: it is large, all of it reads, and each item has an id of its own.

        Others go out whole. Notifications get no answer, so nobody could tell that one of them was lost.
        """
        if len(calls) <= self._size or any(name.lower() in _OF_THE_WHOLE for name, _ in request.headers):
            return False
        ids = {call.id for call in calls}
        if None in ids or len(ids) < len(calls):
            return False
        return all(self._rules.safety(method) is Safety.READ for method in {call.method for call in calls})

    async def send(self, request: Request, items: Mapping[Id, str]) -> Reply:
        """Send a batch, given as the JSON text of each item by its id, and return one reply, its answers in order.

        A part that fails is sent again by the balancer, like any request. Items that a reply leaves out, or all of one
        that cannot be read, are asked for once more, elsewhere if possible. Where that does not help either, an item
        is answered by an error that says what was tried. Only when no item has an answer, the first part's failure
        is the result: the reply as it came, or what sending it raised. Raises `RequestTooLarge` before anything is
        sent.
        """
        parts = [_Part(chunk) for chunk in _chunks(items, self._size)]
        for part in parts:
            self._limits.check_size(len(join(part.items.values())))
        until = self._clock() + (self._deadline if request.deadline is None else request.deadline)
        request = replace(request, headers=asking_for_readable(request.headers))
        bugs: list[Exception] = []

        async def run(part: _Part) -> None:
            try:
                await self._fetch(part, request, until)
            except Exception as exc:  # no failure of an endpoint: the caller gets it as it is, not in a group
                bugs.append(exc)
                group.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as group:
                for part in parts:
                    group.start_soon(run, part)
            if bugs:
                raise bugs[0]
            return _whole(parts)
        finally:
            # Their tracebacks hold the frames that hold them.
            bugs.clear()
            for part in parts:
                part.failure = None

    async def _fetch(self, part: _Part, request: Request, until: float) -> None:
        await self._ask(part, part.items, request, until)
        missing = {key: text for key, text in part.items.items() if key not in part.answers}
        left = until - self._clock()
        if missing and part.again and request.idempotent is not False and left > 0:
            elsewhere = request.avoid | {part.attempts[-1].endpoint}
            await self._ask(part, missing, replace(request, avoid=elsewhere, deadline=left), until)

    async def _ask(self, part: _Part, items: Mapping[Id, str], request: Request, until: float) -> None:
        body = join(items.values())
        begun = False
        try:
            reply = await self._send(replace(request, body=body, headers=_sized(request.headers, len(body))))
            begun = True
            content = await read_whole(reply, until - self._clock())
        except PathlbError as exc:
            # The balancer has done what it can up to a reply head; a body that breaks off is left to us.
            part.fail(exc, again=begun and isinstance(exc, UpstreamError))
        else:
            part.take(reply, content, items)


class _Part:
    """Some items of a batch, and what has become of them."""

    def __init__(self, items: Mapping[Id, str]) -> None:
        self.items = items
        self.answers: dict[Id, str] = {}
        self.attempts: list[Attempt] = []
        self.head: Reply | None = None
        """The first reply that answered an item."""
        self.failure: Reply | PathlbError | None = None
        """What came in place of answers when they were last asked for."""
        self.again = False
        """Asking once more for what has no answer may help."""
        self.status: int | None = None
        self.why = ""
        """Why an item has no answer."""

    def fail(self, error: PathlbError, *, again: bool) -> None:
        """There was no reply, or not all of it."""
        self.attempts += error.attempts
        self.status = None
        self._note(error.message, error, again=again)

    def take(self, reply: Reply, content: bytes, asked: Mapping[Id, str]) -> None:
        """Keep the answers of a reply, or what it is instead."""
        self.attempts += reply.attempts
        self.status = reply.status
        if reply.status != 200:
            self._note(f"status {reply.status}", reply)
            return
        try:
            plain = decoded(reply, content)
            verdict = None if is_array(plain) else parse_answer(plain)
            answers = [] if isinstance(verdict, dict) else parse_answers(plain)
        except ValueError as exc:
            self._note(f"the reply could not be read: {exc}", again=True)
            return
        if isinstance(verdict, dict):  # on the part as a whole; asking again would not change it
            self._note(f"the part was refused as a whole{_message(verdict)}", reply)
            return
        found = _match(answers, asked)
        self.answers.update(found)
        if found and self.head is None:
            self.head = reply
        self._note("the reply left it out", again=True)

    def _note(self, why: str, failure: Reply | PathlbError | None = None, *, again: bool = False) -> None:
        self.why, self.failure, self.again = why, failure, again

    def error(self, key: Id) -> str:
        """The text of an answer for an item that got none."""
        tried = "; ".join(str(attempt) for attempt in self.attempts)
        error: dict[str, Any] = {"code": _NO_ANSWER, "message": f"no answer: {self.why} [tried {tried}]"}
        if self.status is not None:
            error["data"] = {"status": self.status}
        return json.dumps({"jsonrpc": "2.0", "id": key, "error": error}, separators=(",", ":"))


def _chunks(items: Mapping[Id, str], size: int) -> Iterable[dict[Id, str]]:
    """In as few parts as possible, and these as equal as possible: the largest one decides how long all take."""
    pairs = list(items.items())
    parts = -(-len(pairs) // size)
    for index in range(parts):
        yield dict(pairs[index * len(pairs) // parts : (index + 1) * len(pairs) // parts])


def _match(answers: Iterable[Element], asked: Mapping[Id, str]) -> dict[Id, str]:
    """The text of the answer to each item asked for. Of two answers to one item neither can be trusted."""
    found: dict[Id, str] = {}
    twice: set[Id] = set()
    for value, text in answers:
        key = value.get("id") if isinstance(value, dict) else None
        if not isinstance(key, str | int) or isinstance(key, bool) or key not in asked:  # True is 1 to Python
            continue
        if key in found:
            twice.add(key)
        found[key] = text
    return {key: text for key, text in found.items() if key not in twice}


def _message(answer: dict[str, Any]) -> str:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return f": {message[:_SHOWN]}" if isinstance(message, str) else ""


def _sized(headers: Headers, length: int) -> Headers:
    """Headers with the Content-Length of this body, where they have one."""
    return [
        (name, b"%d" % length if len(name) == 14 and name.lower() == b"content-length" else value)
        for name, value in headers
    ]


def _whole(parts: Sequence[_Part]) -> Reply:
    attempts = tuple(attempt for part in parts for attempt in part.attempts)
    if not any(part.answers for part in parts):
        for part in parts:
            failure = part.failure
            if failure is not None:
                failure.attempts = attempts
                if isinstance(failure, Reply):
                    return failure
                try:
                    raise failure
                finally:
                    del failure  # its traceback holds this frame, which must not hold it
    head = next((part.head for part in parts if part.head is not None), None)
    if head is None:
        head = Reply(200, [(b"Content-Type", b"application/json")], WholeBody(b""))
    texts = [part.answers.get(key) or part.error(key) for part in parts for key in part.items]
    whole = with_content(head, join(texts))
    whole.attempts = attempts
    return whole

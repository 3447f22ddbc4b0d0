"""Questions and answers between the supervisor and a worker: a line of JSON each, over a pair of sockets.

The supervisor asks, `{"id": 7, "do": "snapshot"}`; the worker answers, `{"id": 7, "result": ...}` or
`{"id": 7, "error": "..."}`. It begins with the questions in their order, and answers each when it can: some take long.
Either end learns of the other's death by the end of the stream.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

_LONGEST = 2**26  # bytes of a line; snapshots of many endpoints are long


class ChannelClosed(Exception):
    """The other end is gone."""


class Refused(Exception):
    """The other end answered with an error; the text is its own."""


class Asker:
    """The supervisor's end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._closed = False
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def open(cls, connection: socket.socket) -> Asker:
        return cls(*await asyncio.open_connection(sock=connection, limit=_LONGEST))

    async def ask(self, do: str, **what: Any) -> Any:
        """The worker's answer. Raises `ChannelClosed` and `Refused`."""
        if self._closed:
            raise ChannelClosed
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self._waiting[number] = answer
        self._writer.write(json.dumps({"id": number, "do": do, **what}).encode() + b"\n")
        return await answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                told = json.loads(line)
                answer = self._waiting.pop(told["id"])
                if answer.done():  # nobody waited that long
                    continue
                if "error" in told:
                    answer.set_exception(Refused(told["error"]))
                else:
                    answer.set_result(told["result"])
        except (ConnectionError, ValueError):
            pass  # gone, or gone mad
        finally:
            self._closed = True
            self._writer.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(ChannelClosed())


Handler = Callable[[dict[str, Any]], Awaitable[Any]]


async def answer_all(connection: socket.socket, handle: Handler) -> None:
    """The worker's end: answer every question until the supervisor is gone. What `handle` raises is the answer too.

    `handle` runs for several at a time; it is cancelled for those that nobody waits for any more.
    """
    reader, writer = await asyncio.open_connection(sock=connection, limit=_LONGEST)
    answering: set[asyncio.Task[None]] = set()

    async def answer(question: dict[str, Any]) -> None:
        number = question.pop("id")
        try:
            told = {"result": await handle(question)}
        except Exception as exc:
            told = {"error": f"{exc}" or type(exc).__name__}
        writer.write(json.dumps({"id": number, **told}).encode() + b"\n")  # it is waited for, so it does not pile up

    try:
        while line := await reader.readline():
            task = asyncio.create_task(answer(json.loads(line)))
            answering.add(task)
            task.add_done_callback(answering.discard)
    except ConnectionError:
        pass
    finally:
        writer.close()
        for task in answering:
            task.cancel()
        if answering:
            await asyncio.wait(answering)

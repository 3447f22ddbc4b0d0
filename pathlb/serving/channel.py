"""Questions and answers between the supervisor and a worker: a line of JSON each, over a pair of sockets.

The supervisor asks, `{"do": "snapshot"}`; the worker answers in order, `{"result": ...}` or `{"error": "..."}`. Either
end learns of the other's death by the end of the stream.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections import deque
from collections.abc import Awaitable, Callable
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
        self._waiting: deque[asyncio.Future[Any]] = deque()
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
        self._waiting.append(answer)
        self._writer.write(json.dumps({"do": do, **what}).encode() + b"\n")
        return await answer

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = self._waiting.popleft()
                told = json.loads(line)
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
            for answer in self._waiting:
                if not answer.done():
                    answer.set_exception(ChannelClosed())


Handler = Callable[[dict[str, Any]], Awaitable[Any]]


async def answer_all(connection: socket.socket, handle: Handler) -> None:
    """The worker's end: answer every question until the supervisor is gone. What `handle` raises is the answer too."""
    reader, writer = await asyncio.open_connection(sock=connection, limit=_LONGEST)
    try:
        while line := await reader.readline():
            try:
                told = {"result": await handle(json.loads(line))}
            except Exception as exc:
                told = {"error": f"{exc}" or type(exc).__name__}
            writer.write(json.dumps(told).encode() + b"\n")
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()
